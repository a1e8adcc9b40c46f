"""float16 and bfloat16: what retention() and retention_step() take, what kind of array they return, and that mixtures
are refused."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import holdfast
import numpy as np
import pytest
from exporter import BFLOAT, FLOAT, Exporter, Namespaced
from reference import assert_close, retention

B, T, H, K, V = SHAPE = 2, 70, 3, 24, 16
# Relative RMS of an output rounded to the type, at most: the specification's number for T = 4096.
TOLERANCE = {"float16": 4e-4, "bfloat16": 2.5e-3}


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, rounded to the nearest even; no NaN."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def ml_dtypes_array(bits: np.ndarray) -> np.ndarray:
    return bits.view(pytest.importorskip("ml_dtypes").bfloat16)


def torch_tensor(bits: np.ndarray):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def of_exporter(x) -> np.ndarray:
    return widened(x.array)


# What makes a bfloat16 array of its bits, and gives its numbers back as float32.
BFLOAT16 = {
    "ml_dtypes": (ml_dtypes_array, lambda x: x.astype(np.float32)),
    "torch": (torch_tensor, lambda x: x.float().numpy()),
    "dlpack": (lambda bits: Exporter(bits, dtype=(BFLOAT, 16)), of_exporter),
    "holdfast": (holdfast.BFloat16Array, lambda x: widened(x.bits)),
}
# The same for float16.
FLOAT16 = {
    "numpy": (lambda x: x, lambda x: x.astype(np.float32)),
    "memoryview": (lambda x: memoryview(x), lambda x: np.asarray(x).astype(np.float32)),
    "torch": (lambda x: pytest.importorskip("torch").from_numpy(x), lambda x: x.float().numpy()),
    "dlpack": (lambda x: Exporter(x, dtype=(FLOAT, 16)), lambda x: x.array.astype(np.float32)),
}
KINDS = [("float16", kind) for kind in FLOAT16] + [("bfloat16", kind) for kind in BFLOAT16]


def returned_kind(dtype: str, kind: str) -> type:
    if kind == "torch":
        return sys.modules["torch"].Tensor
    if dtype == "bfloat16" and kind != "ml_dtypes":
        return holdfast.BFloat16Array
    return np.ndarray


@pytest.fixture
def rounded(problem):
    """rounded(dtype, kind): a problem with q, k, v in that dtype and kind, and the results for those numbers."""

    def make(dtype: str, kind: str) -> SimpleNamespace:
        p = problem(*SHAPE)
        make_array = (FLOAT16 if dtype == "float16" else BFLOAT16)[kind][0]
        narrow = (lambda x: x.astype(np.float16)) if dtype == "float16" else bfloat16_bits
        numbers = (lambda x: x.astype(np.float32)) if dtype == "float16" else widened
        stored = {name: narrow(getattr(p, name)) for name in "qkv"}
        p.expected, p.expected_state = retention(
            *(numbers(x) for x in stored.values()), p.log_decay, initial_state=p.initial_state
        )
        p.q, p.k, p.v = map(make_array, stored.values())
        p.token = lambda t: [make_array(x[:, t]) for x in stored.values()]
        p.out = make_array(np.zeros((B, T, H, V), np.float16 if dtype == "float16" else np.uint16))
        return p

    return make


def numbers_of(dtype: str, kind: str, x) -> np.ndarray:
    if isinstance(x, holdfast.BFloat16Array):
        return widened(x.bits)
    if dtype == "float16" and isinstance(x, np.ndarray):
        return x.astype(np.float32)
    return (FLOAT16 if dtype == "float16" else BFLOAT16)[kind][1](x)


@pytest.mark.parametrize("dtype, kind", KINDS)
def test_result_is_of_the_same_dtype_and_kind(rounded, dtype, kind):
    p = rounded(dtype, kind)
    out, state = holdfast.retention(p.q, p.k, p.v, p.log_decay, initial_state=p.initial_state, return_state=True)
    assert type(out) is returned_kind(dtype, kind)
    assert dtype in str(getattr(out, "dtype", "bfloat16"))
    assert "float32" in str(state.dtype) and type(state) is (type(out) if kind == "torch" else np.ndarray)
    assert_close(numbers_of(dtype, kind, out), p.expected, TOLERANCE[dtype])
    assert_close(state, p.expected_state)

    alone = holdfast.retention(p.q, p.k, p.v, p.log_decay, initial_state=p.initial_state)
    np.testing.assert_array_equal(numbers_of(dtype, kind, alone), numbers_of(dtype, kind, out))


@pytest.mark.parametrize("dtype, kind", KINDS)
def test_out_is_written_in_place(rounded, dtype, kind):
    p = rounded(dtype, kind)
    assert holdfast.retention(p.q, p.k, p.v, p.log_decay, initial_state=p.initial_state, out=p.out) is p.out
    assert_close(numbers_of(dtype, kind, p.out), p.expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype, kind", KINDS)
def test_expanded_states(rounded, dtype, kind):
    p = rounded(dtype, kind)
    numbers = (numbers_of(dtype, kind, x) for x in (p.q, p.k, p.v))
    expected = holdfast.power_retention(*numbers, p.log_decay, return_state=True)
    out, *states = holdfast.power_retention(p.q, p.k, p.v, p.log_decay, return_state=True)
    assert type(out) is returned_kind(dtype, kind)
    for actual, wanted in zip(states, expected[1:], strict=True):
        assert_close(np.asarray(actual), wanted)
    options = {"out": out, "degree": 2, "dfinal_state": states[0], "wanted": ("initial_state",)}
    dstate = holdfast.retention_backward(p.v, p.q, p.k, p.v, p.log_decay, **options).initial_state
    assert dstate.shape == expected[1].shape


@pytest.mark.parametrize("dtype, kind", KINDS)
def test_steps(rounded, dtype, kind):
    p, state = rounded(dtype, kind), rounded(dtype, kind).initial_state
    for t in range(T):
        out = holdfast.retention_step(*p.token(t), p.log_decay[:, t], state)
        assert type(out) is returned_kind(dtype, kind)
        assert_close(numbers_of(dtype, kind, out), p.expected[:, t], TOLERANCE[dtype])
    assert_close(state, p.expected_state)
    assert holdfast.retention_step(*p.token(0), None, state, out=out) is out


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_kinds_may_be_mixed_and_the_result_is_of_qs(rounded, dtype):
    kinds = [kind for each, kind in KINDS if each == dtype]
    p, others = rounded(dtype, kinds[0]), [rounded(dtype, kind) for kind in kinds[1:]]
    for other in others:
        out = holdfast.retention(p.q, other.k, other.v, p.log_decay, initial_state=p.initial_state)
        assert type(out) is np.ndarray and out.dtype.name == dtype
        assert_close(out, p.expected, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", BFLOAT16)
def test_views_of_bfloat16(rounded, kind):
    p = rounded("bfloat16", kind)
    if kind in ("dlpack", "holdfast"):
        bits = (p.q.array if kind == "dlpack" else p.q.bits)[:, ::-1]
        q, expected = BFLOAT16[kind][0](bits), BFLOAT16[kind][0](bits.copy())
    elif kind == "torch":
        q = p.q.transpose(1, 2).contiguous().transpose(1, 2)
        expected = p.q
    else:
        q, expected = p.q[:, ::-1], p.q[:, ::-1].copy()
    result = holdfast.retention(q, p.k, p.v)
    np.testing.assert_array_equal(
        numbers_of("bfloat16", kind, result), numbers_of("bfloat16", kind, holdfast.retention(expected, p.k, p.v))
    )


def test_bfloat16_of_other_namespaces(rounded):
    p = rounded("bfloat16", "dlpack")
    out = holdfast.retention(Namespaced(p.q.array, dtype=(BFLOAT, 16)), p.k, p.v, p.log_decay)
    assert type(out) is Namespaced and type(out.array) is holdfast.BFloat16Array
    expected = holdfast.retention(p.q, p.k, p.v, p.log_decay)
    np.testing.assert_array_equal(out.array.bits, expected.bits)


def test_bfloat16_array_is_shared_with_torch(rounded):
    torch = pytest.importorskip("torch")
    p = rounded("bfloat16", "holdfast")
    out = holdfast.retention(p.q, p.k, p.v)
    tensor = torch.from_dlpack(out)
    assert tensor.dtype == torch.bfloat16 and tensor.shape == (B, T, H, V) and tensor.data_ptr() == out.bits.ctypes.data
    assert holdfast.retention(out, out, out).bits.shape == (B, T, H, V)


def test_ml_dtypes_need_not_be_imported():
    """Its arrays are known by their dtype's name, and nothing here imports it."""
    subprocess.run(
        [sys.executable, "-c", "import sys, holdfast; assert not {'ml_dtypes', 'torch'} & set(sys.modules)"], check=True
    )


def test_an_out_of_bfloat16_must_be_writable(rounded):
    p = rounded("bfloat16", "ml_dtypes")
    p.out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only; expected memory to write to"):
        holdfast.retention(p.q, p.k, p.v, out=p.out)


@pytest.mark.parametrize("dtype, kind", [("float16", "numpy"), ("bfloat16", "ml_dtypes")])
def test_dtypes_are_not_mixed(rounded, problem, dtype, kind):
    p, wide = rounded(dtype, kind), problem(*SHAPE)
    for name in ("k", "v", "out"):
        arrays = {"q": p.q, "k": p.k, "v": p.v, "out": p.out, name: getattr(wide, name)}
        with pytest.raises(ValueError, match=f"{name} has dtype float32; expected {dtype}, that of q"):
            holdfast.retention(**arrays)
    with pytest.raises(ValueError, match=f"k has dtype {dtype}; expected float32, that of q"):
        holdfast.retention(wide.q, p.k, wide.v)
    with pytest.raises(NotImplementedError, match=f"initial_state has dtype {dtype}; expected float32"):
        holdfast.retention(p.q, p.k, p.v, initial_state=wide.initial_state.astype(p.q.dtype))
    with pytest.raises(NotImplementedError, match=f"log_decay has dtype {dtype}; expected float32"):
        holdfast.retention(p.q, p.k, p.v, wide.log_decay.astype(p.q.dtype))


def test_bits_are_no_numbers(problem):
    p = problem(*SHAPE)
    expected = "q has dtype uint16; expected float32, float16 or bfloat16"
    with pytest.raises(NotImplementedError, match=expected):
        holdfast.retention(bfloat16_bits(p.q), bfloat16_bits(p.k), bfloat16_bits(p.v))
