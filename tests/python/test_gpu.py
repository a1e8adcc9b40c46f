"""Arrays on a GPU, and backends by name. CUDA's driver is a stub of tests/stubs, which runs no kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import holdfast
import numpy as np
import pytest
from exporter import CUDA, Exporter

STUB = Path(holdfast.__file__).parents[2] / "tests" / "stubs" / "cuda"
BACKENDS = holdfast.info()["backends"]


def test_backends_are_listed():
    assert list(BACKENDS) == ["cpu", "cuda", "metal", "opencl", "vulkan"]
    for backend in BACKENDS.values():
        assert set(backend) == {"compiled", "available", "why_not", "devices", "targets"}
        assert backend["available"] == (backend["why_not"] == "")
        assert backend["compiled"] == bool(backend["targets"])
        assert backend["devices"] or not backend["available"]


@pytest.mark.parametrize("name", ["cuda", "metal", "opencl", "vulkan"])
def test_a_backend_can_be_forced(name, problem):
    p = problem(1, 5, 2, 4, 3)
    lines = []
    holdfast.set_verbose(lines.append)
    if BACKENDS[name]["available"]:
        want = holdfast.retention(p.q, p.k, p.v)
        holdfast.set_backend(name)
        np.testing.assert_allclose(holdfast.retention(p.q, p.k, p.v), want, rtol=1e-5, atol=1e-6)
        state = np.zeros((1, 2, 4, 3), np.float32)
        for t in range(5):
            out = holdfast.retention_step(p.q[:, t], p.k[:, t], p.v[:, t], None, state)
            np.testing.assert_allclose(out, want[:, t], rtol=1e-5, atol=1e-6)
        power, power_state, power_sum = holdfast.retention(p.q, p.k, p.v, degree=2, return_state=True)
        parallel, weights = holdfast.retention(p.q, p.k, p.v, form="parallel", return_weights=True)
        np.testing.assert_allclose(parallel, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.einsum("bhij,bjhe->bihe", weights, p.v), want, rtol=1e-5, atol=1e-6)
        q, k, v = (x[:, 0] for x in (p.q, p.k, p.v))
        token = holdfast.retention_step(q, k, v, None, power_state, power_sum, degree=2)
        x, theta, weight = p.q[..., :4], holdfast.theta(4), np.arange(4, dtype=np.float32)
        turned, normed = holdfast.rotate(x, theta, 3), holdfast.head_norm_gate(x, p.q)
        back, gradients = holdfast.rotate_backward(x, theta, 3), holdfast.head_norm_gate_backward(x, x, p.q, weight)
        of_power = holdfast.retention_backward(power, p.q, p.k, p.v, out=power, degree=2)
        of_weights = holdfast.retention_backward(power, p.q, p.k, p.v, out=power, degree=2, form="parallel")
        holdfast.set_backend(None)
        of_cpu = holdfast.retention_backward(power, p.q, p.k, p.v, out=power, degree=2)
        for *got, wanted in zip(of_power[:3], of_weights[:3], of_cpu[:3], strict=True):
            np.testing.assert_allclose(got, [wanted] * 2, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(turned, holdfast.rotate(x, theta, 3), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(normed, holdfast.head_norm_gate(x, p.q), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(back, holdfast.rotate_backward(x, theta, 3), rtol=1e-5, atol=1e-6)
        for got, wanted in zip(gradients, holdfast.head_norm_gate_backward(x, x, p.q, weight), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
        want, want_state, want_sum = holdfast.retention(p.q, p.k, p.v, degree=2, return_state=True)
        np.testing.assert_allclose(power, want, rtol=1e-4, atol=1e-5)
        want = holdfast.retention_step(q, k, v, None, want_state, want_sum, degree=2)
        np.testing.assert_allclose(token, want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(power_state, want_state, rtol=1e-4, atol=1e-5)
        del lines[-7:]
        assert all("tensors copied from the CPU and back" in line for line in lines[1:])
        assert [line.split(":")[0] for line in lines] == [
            *["forward"] * 2,
            *["step"] * 5,
            *["forward"] * 2,
            "step",
            "rotate",
            "head_norm_gate",
            "rotate_backward",
            "head_norm_gate_backward",
            *["backward"] * 2,
        ]
    else:
        with pytest.raises(holdfast.TargetUnavailable, match="which cannot run here") as error:
            holdfast.set_backend(name)
        assert BACKENDS[name]["why_not"] in str(error.value)
    holdfast.retention(p.q, p.k, p.v)
    assert "best target that this CPU runs" in lines[-1]


def test_bad_backends():
    with pytest.raises(holdfast.TargetUnavailable, match="backend is 'gpu'; expected one of cpu, cuda"):
        holdfast.set_backend("gpu")
    with pytest.raises(TypeError, match="backend is of type int; expected str or None"):
        holdfast.set_backend(1)


def test_new_arrays_need_a_library():
    x = Exporter(np.zeros((1, 2, 1, 4), np.float32), device=CUDA)
    with pytest.raises(NotImplementedError, match="q is on a GPU and of type Exporter"):
        holdfast.retention(x, x, x)
    with pytest.raises(NotImplementedError, match="q is on a GPU and of type Exporter"):
        holdfast.retention_step(x, x, x, None, x)
    with pytest.raises(NotImplementedError, match="q is on a GPU and of type Exporter"):
        holdfast.retention_backward(x, x, x, x)
    with pytest.raises(NotImplementedError, match="x is on a GPU and of type Exporter"):
        holdfast.rotate(x, x)
    with pytest.raises(NotImplementedError, match="x is on a GPU and of type Exporter"):
        holdfast.head_norm_gate(x)
    with pytest.raises(NotImplementedError, match="dout is on a GPU and of type Exporter"):
        holdfast.rotate_backward(x, x)
    with pytest.raises(NotImplementedError, match="x is on a GPU and of type Exporter"):
        holdfast.head_norm_gate_backward(x, x)


SCRIPT = """
import ctypes, numpy as np, holdfast
from exporter import CUDA, Exporter

class Array(Exporter):
    streams = []
    def __dlpack__(self, *, stream=None, max_version=None, copy=None):
        self.streams.append(stream)
        return self._export()

class Library(Array):  # of the array API: makes new arrays
    shape, dtype = property(lambda self: self.array.shape), property(lambda self: self.array.dtype)
    float32 = np.float32
    def __init__(self, array): super().__init__(array, device=CUDA)
    def __array_namespace__(self): return Library
    @staticmethod
    def empty(shape, dtype, device):
        assert device == CUDA
        return Library(np.full(shape, 7, dtype))

def on_gpu(*shape): return Array(np.ones(shape, np.float32), device=CUDA)
q, k, v, out = (on_gpu(1, 40, 2, 8) for _ in range(4))
assert holdfast.retention(q, k, v, out=out) is out
assert Array.streams == [1] * 4, Array.streams
stub = ctypes.CDLL("libcuda.so.1")
stub.stub_record.restype = ctypes.c_char_p
record = stub.stub_record().decode().splitlines()
launches = [line for line in record if line.startswith("cuLaunchKernel")]
assert launches and all(line.endswith("stream 0x1") for line in launches), launches
assert not [line for line in record if "Memcpy" in line or "Synchronize" in line], record
q = Library(np.ones((1, 40, 2, 8), np.float32))
new, state = holdfast.retention(q, q, q, return_state=True)
assert type(new) is Library and new.shape == (1, 40, 2, 8) and state.shape == (1, 2, 8, 8)
assert new.array[0, 0, 0, 0] == 7  # the stub runs nothing, and nothing was copied
stub.stub_clear()
state = on_gpu(1, 2, 8, 8)
token = Library(np.ones((1, 2, 8), np.float32))
for _ in range(2):
    step = holdfast.retention_step(token, token, token, None, state)
    assert type(step) is Library and step.shape == (1, 2, 8)
    assert step.array[0, 0, 0] == 7
record = stub.stub_record().decode().splitlines()
assert len([line for line in record if line.startswith("cuLaunchKernel")]) == 2 * 3, record
assert not [line for line in record if "Memcpy" in line or "Synchronize" in line], record
new, state, keys = holdfast.retention(q, q, q, degree=2, return_state=True)
assert state.shape == (1, 2, 36, 8) and keys.shape == (1, 2, 36) and type(keys) is Library
assert type(holdfast.retention_step(token, token, token, None, state, keys, degree=2)) is Library
for degree, features in ((1, 16), (2, 256)):
    x = Library(np.ones((1, 40, 2, 16), np.float32))
    options = dict(degree=degree, normalize=False, form="recurrent", state_layout="vk", return_state=True)
    new, state = holdfast.retention(x, x, x, expansion="tiled" if degree == 2 else "tight", **options)
    assert type(new) is Library and state.shape == (1, 2, 16, features), state.shape
stub.stub_clear()
theta, positions = on_gpu(4), Array(np.zeros(40, np.int64), device=CUDA, dtype=(0, 64))
for _ in range(2):
    for x in (holdfast.rotate(q, theta, positions=positions), holdfast.head_norm_gate(q, q, on_gpu(2, 8))):
        assert type(x) is Library and x.shape == (1, 40, 2, 8) and x.array[0, 0, 0, 0] == 7
out = on_gpu(1, 40, 2, 8)
assert holdfast.rotate(q, theta, out=out) is out and holdfast.head_norm_gate(out, out=out) is out
assert holdfast.rotate_backward(out, theta, dx=out) is out
record = stub.stub_record().decode().splitlines()
assert len([line for line in record if line.startswith("cuLaunchKernel")]) == 7, record
assert not [line for line in record if "Memcpy" in line or "Synchronize" in line or "Alloc" in line], record
decays = Library(np.zeros(2, np.float32))
gradients = holdfast.retention_backward(q, q, q, q, decays)
assert [type(x) for x in gradients[:4]] == [Library] * 4 and gradients[4:] == (None, None)
assert [x.shape for x in gradients[:4]] == [(1, 40, 2, 8)] * 3 + [(2,)] and gradients.q.array[0, 0, 0, 0] == 7
wanted = ("k", "initial_state", "initial_sum_of_keys")
given = holdfast.Gradients(on_gpu(1, 40, 2, 8), None, None, None, None, None)
gradients = holdfast.retention_backward(
    q, q, q, q, out=q, degree=2, wanted=wanted, gradients=given, state_layout="vk")
assert gradients.q is given.q and gradients.v is None and gradients.k.shape == (1, 40, 2, 8)
assert gradients.initial_state.shape == (1, 2, 8, 36) and gradients.initial_sum_of_keys.shape == (1, 2, 36)
gradients = holdfast.head_norm_gate_backward(q, q, q, Library(np.ones((2, 8), np.float32)))
assert [type(x) for x in gradients] == [Library] * 3
assert [x.shape for x in gradients] == [(1, 40, 2, 8), (1, 40, 2, 8), (2, 8)], [x.shape for x in gradients]
try:
    holdfast.retention_step(q, q, q, None, state)
except ValueError as error:
    assert "q has 4 dimensions; expected 3, [B, H, K]" in str(error), error
else:
    raise AssertionError
try:
    holdfast.retention(q, q, np.ones((1, 40, 2, 8), np.float32), out=out)
except ValueError as error:
    assert "v is on the CPU and q on CUDA device 0; expected all tensors on one device" in str(error), error
else:
    raise AssertionError

asked = []
def allocate(bytes, device, stream):
    asked.append((bytes, device, stream))
    memory = np.zeros(bytes + 256, np.uint8)
    memory = memory[-memory.ctypes.data % 256:][:bytes]
    return Array(memory, device=CUDA, dtype=(1, 8))
calls = (
    lambda: holdfast.retention(q, q, q, decays),
    lambda: holdfast.retention_step(token, token, token, None, on_gpu(1, 2, 8, 8)),
    lambda: holdfast.retention_backward(q, q, q, q, decays))
from holdfast import _holdfast
for given in (allocate, lambda *_: None, None):
    asked.clear()
    _holdfast.set_cuda_allocator(given)
    for call in calls:
        call()
        stub.stub_clear()
        call()
        record = stub.stub_record().decode()
        assert "cuLaunchKernel" in record and "Alloc" not in record and "Free" not in record, record
    if given is allocate:
        assert len(asked) == 6 and all(a[0] > 0 and a[1:] == (0, 1) for a in asked), asked
_holdfast.set_cuda_allocator(lambda *_: np.zeros(256, np.uint8))
try:
    calls[0]()
except ValueError as error:
    assert "workspace is on the CPU; expected CUDA device 0, as q" in str(error), error
else:
    raise AssertionError
print("done", holdfast.info()["backends"]["cuda"]["devices"])
"""


@pytest.mark.skipif(
    not STUB.is_dir(), reason="no stub of CUDA's driver in the build: it has no target of cuda, or no tests"
)
def test_arrays_on_cuda():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parent,
        env={**os.environ, "LD_LIBRARY_PATH": str(STUB)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "done ['Stub 0 (sm_80)', 'Stub 1 (sm_90)', 'Stub 2 (sm_86)']\n"
