"""What retention() takes for arrays, and what it returns: kinds, views, `out`, and that nothing leaks."""

from __future__ import annotations

import array
import ctypes
import gc
import os
import sys
import threading
import tracemalloc
from pathlib import Path

import holdfast
import numpy as np
import pytest
from exporter import IS_COPIED, READ_ONLY, Exporter, Namespaced, OldExporter

B, T, H, K, V = SHAPE = 2, 70, 3, 24, 16


def as_array(x: np.ndarray) -> memoryview:
    flat = array.array("f", x.ravel())
    return memoryview(flat).cast("B").cast("f", x.shape)


def as_ctypes(x: np.ndarray) -> ctypes.Array:
    element = ctypes.c_float
    for extent in reversed(x.shape):
        element = element * extent
    return element.from_buffer_copy(np.ascontiguousarray(x))


def as_bytes(x: np.ndarray) -> memoryview:
    return memoryview(x.tobytes()).cast("f", x.shape)


KINDS = {
    "numpy": lambda x: x,
    "memoryview": memoryview,
    "array": as_array,
    "bytes": as_bytes,
    "ctypes": as_ctypes,
    "dlpack": Exporter,
    "dlpack unversioned": lambda x: Exporter(x, versioned=False),
    "dlpack old": OldExporter,
    "dlpack read-only": lambda x: Exporter(x, flags=READ_ONLY),
    "dlpack without strides": lambda x: Exporter(np.ascontiguousarray(x), strides=False),
    "dlpack with an offset": lambda x: Exporter(x, byte_offset=64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_arrays(problem, kind):
    p = problem(*SHAPE)
    make = KINDS[kind]
    expected, expected_state = holdfast.retention(
        p.q, p.k, p.v, p.log_decay, initial_state=p.initial_state, return_state=True
    )
    q, k, v, log_decay, initial_state = map(make, (p.q, p.k, p.v, p.log_decay, p.initial_state))
    out, state = holdfast.retention(q, k, v, log_decay, initial_state=initial_state, return_state=True)
    assert type(out) is type(state) is np.ndarray and out.dtype == state.dtype == np.float32
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(state, expected_state)

    per_head = make(holdfast.decay(H))
    np.testing.assert_array_equal(
        holdfast.retention(q, k, v, per_head), holdfast.retention(p.q, p.k, p.v, holdfast.decay(H))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_arrays_with_expanded_states(problem, kind):
    """Their rows are more than the arrays have: D follows from K, and not all of them have a shape in Python."""
    p = problem(B, T, H, 16, V)
    expected = holdfast.power_retention(p.q, p.k, p.v, p.log_decay, return_state=True)
    q, k, v, log_decay = map(KINDS[kind], (p.q, p.k, p.v, p.log_decay))
    results = holdfast.power_retention(q, k, v, log_decay, return_state=True)
    for actual, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)

    out, *states = expected
    names = ("q", "initial_state", "initial_sum_of_keys")
    initial = dict(zip(names[1:], states, strict=True))
    dx = holdfast.retention_backward(p.out, p.q, p.k, p.v, out=out, degree=2, **initial, wanted=names)
    initial = {name: KINDS[kind](x) for name, x in initial.items()}
    given = KINDS[kind](p.out), q, k, v
    dy = holdfast.retention_backward(*given, out=KINDS[kind](out), degree=2, **initial, wanted=names)
    for name in names:
        np.testing.assert_array_equal(getattr(dy, name), getattr(dx, name))

    tiled = holdfast.convert_state(states[0], 16, "tiled")
    np.testing.assert_array_equal(holdfast.convert_state(KINDS[kind](states[0]), 16, "tiled"), tiled)
    back = holdfast.convert_state(tiled, 16, "tight")
    np.testing.assert_array_equal(holdfast.convert_state(KINDS[kind](tiled), 16, "tight"), back)
    assert holdfast.convert_state(KINDS[kind](states[1]), 16, "tiled").shape == tiled.shape[:3]


@pytest.mark.parametrize("kind", ["numpy", "memoryview", "array", "ctypes", "dlpack", "dlpack old"])
def test_out_is_written_in_place_and_returned(problem, kind):
    p = problem(*SHAPE)
    expected = holdfast.retention(p.q, p.k, p.v, p.log_decay)
    out = KINDS[kind](p.out)
    assert holdfast.retention(p.q, p.k, p.v, p.log_decay, out=out) is out
    written = out.array if isinstance(out, Exporter) else np.asarray(out)
    np.testing.assert_array_equal(written, expected)

    out_again, state = holdfast.retention(p.q, p.k, p.v, p.log_decay, out=out, return_state=True)
    assert out_again is out and state.shape == (B, H, K, V)


def test_out_may_be_a_view(problem):
    p = problem(*SHAPE)
    expected = holdfast.retention(p.q, p.k, p.v, p.log_decay)
    padded = np.full((B, H, T, V + 3), 7, np.float32)
    out = padded[:, :, ::-1, 1 : V + 1].transpose(0, 2, 1, 3)  # heads before time, time backwards, rows apart
    holdfast.retention(p.q, p.k, p.v, p.log_decay, out=out)
    np.testing.assert_array_equal(out, expected)
    assert np.all(padded[..., 0] == 7) and np.all(padded[..., V + 1 :] == 7)


VIEWS = {
    "heads before time": lambda x: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
    "negative strides": lambda x: np.ascontiguousarray(x[::-1, ::-1, ::-1])[::-1, ::-1, ::-1],
    "every second": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "part of rows": lambda x: np.concatenate([x, x], axis=-1)[..., : x.shape[-1]],
    "read-only": lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(x.shape),
    "fortran batch": lambda x: np.ascontiguousarray(x.transpose(2, 1, 0, 3)).transpose(2, 1, 0, 3),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(problem, view):
    p = problem(*SHAPE)
    expected = holdfast.retention(p.q, p.k, p.v, p.log_decay, initial_state=p.initial_state)
    q, k, v, initial_state = map(VIEWS[view], (p.q, p.k, p.v, p.initial_state))
    log_decay = VIEWS[view](p.log_decay[..., None])[..., 0]
    assert not np.shares_memory(q, p.q)
    np.testing.assert_array_equal(holdfast.retention(q, k, v, log_decay, initial_state=initial_state), expected)


def test_broadcast_views(problem):
    p = problem(*SHAPE)
    q, k = (np.broadcast_to(x[:1, :, :1], x.shape) for x in (p.q, p.k))
    log_decay = np.broadcast_to(p.log_decay[:, :1], p.log_decay.shape)
    assert 0 in q.strides and 0 in log_decay.strides and not q.flags.writeable
    expected = holdfast.retention(q.copy(), k.copy(), p.v, log_decay.copy())
    np.testing.assert_array_equal(holdfast.retention(q, k, p.v, log_decay), expected)


def test_inputs_may_be_one_array(problem):
    x = problem(1, 100, 2, 32, 32).q
    np.testing.assert_array_equal(holdfast.retention(x, x, x), holdfast.retention(x, x.copy(), x.copy()))


def test_a_subclass_of_ndarray_gives_a_plain_one(problem):
    p = problem(*SHAPE)
    out = holdfast.retention(p.q.view(np.recarray), p.k, p.v)
    assert type(out) is np.ndarray


def test_other_namespaces_get_their_own_arrays(problem):
    p = problem(*SHAPE)
    expected, expected_state = holdfast.retention(p.q, p.k, p.v, return_state=True)
    q = Namespaced(p.q)
    out, state = holdfast.retention(q, p.k, p.v, return_state=True)
    assert type(out) is type(state) is Namespaced
    np.testing.assert_array_equal(out.array, expected)
    np.testing.assert_array_equal(state.array, expected_state)
    assert type(holdfast.retention(q, p.k, p.v)) is Namespaced

    mine = np.empty_like(p.out)
    assert holdfast.retention(q, p.k, p.v, out=mine) is mine
    out, state = holdfast.retention(q, p.k, p.v, out=mine, return_state=True)
    assert out is mine and type(state) is Namespaced


def test_torch(problem):
    torch = pytest.importorskip("torch")
    p = problem(*SHAPE)
    expected, expected_state = holdfast.retention(
        p.q, p.k, p.v, p.log_decay, initial_state=p.initial_state, return_state=True
    )
    q, k, v, log_decay, initial_state = map(torch.from_numpy, (p.q, p.k, p.v, p.log_decay, p.initial_state))
    out, state = holdfast.retention(q, k, v, log_decay, initial_state=initial_state, return_state=True)
    assert type(out) is type(state) is torch.Tensor and out.dtype == state.dtype == torch.float32
    np.testing.assert_array_equal(out.numpy(), expected)
    np.testing.assert_array_equal(state.numpy(), expected_state)
    assert type(holdfast.retention(q, p.k, p.v)) is torch.Tensor  # others may be of other kinds
    assert type(holdfast.retention(p.q, k, v)) is np.ndarray

    result = torch.zeros(B, T, H, V)
    assert holdfast.retention(q, k, v, log_decay, initial_state=initial_state, out=result) is result
    np.testing.assert_array_equal(result.numpy(), expected)
    by_head = q.transpose(1, 2).contiguous().transpose(1, 2)
    np.testing.assert_array_equal(holdfast.retention(by_head, k, v), holdfast.retention(q, k, v))


def test_torch_that_requires_grad(problem):
    torch = pytest.importorskip("torch")
    p = problem(*SHAPE)
    q, k, v = map(torch.from_numpy, (p.q, p.k, p.v))
    with pytest.raises(NotImplementedError, match=r"v requires grad.*expected v.detach\(\)"):
        holdfast.retention(q, k, v.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match=r"out requires grad"):
        holdfast.retention(q, k, v, out=torch.zeros(B, T, H, V, requires_grad=True))
    assert type(holdfast.retention(q, k, v.clone().requires_grad_().detach())) is torch.Tensor


def test_torch_dtypes_and_layouts(problem):
    torch = pytest.importorskip("torch")
    p = problem(*SHAPE)
    with pytest.raises(NotImplementedError, match="k has dtype float64; expected float32, float16 or bfloat16"):
        holdfast.retention(p.q, torch.from_numpy(p.k).double(), p.v)
    with pytest.raises(TypeError, match="k is of type Tensor, which does not share its memory"):
        holdfast.retention(p.q, torch.from_numpy(p.k).to_sparse(), p.v)


# ---- Read-only and copied outputs ----------------------------------------------------------------------------------


def test_out_must_be_writable(problem):
    p = problem(*SHAPE)
    read_only = p.out.view()
    read_only.flags.writeable = False
    for out in (read_only, memoryview(read_only), as_bytes(p.out), Exporter(p.out, flags=READ_ONLY)):
        with pytest.raises(ValueError, match="out is read-only; expected memory to write to"):
            holdfast.retention(p.q, p.k, p.v, out=out)
    with pytest.raises(ValueError, match="out exports a copy of itself"):
        holdfast.retention(p.q, p.k, p.v, out=Exporter(p.out, flags=IS_COPIED))
    assert np.all(p.out == 7)


# ---- Leaks ---------------------------------------------------------------------------------------------------------


def failing_and_working_calls(p):
    """Calls that return, and calls that fail at every stage."""
    good = {"initial_state": p.initial_state, "return_state": True}
    (B, H, K, V) = p.initial_state.shape
    state = np.zeros((B, H, holdfast.state_size(K, 2), V), np.float32)
    squares = {"degree": 2, "normalize": False, "initial_state": state}
    return [
        (None, lambda: holdfast.retention(p.q, p.k, p.v, p.log_decay, **good)),
        (None, lambda: holdfast.retention(p.q, p.k, p.v, p.log_decay, out=p.out, **good)),
        (TypeError, lambda: holdfast.retention(p.q, p.k, p.v, p.log_decay, out=[], **good)),
        (ValueError, lambda: holdfast.retention(p.q, p.k, p.v[0], p.log_decay, **good)),
        (ValueError, lambda: holdfast.retention(p.q, p.k, p.v, p.log_decay, out=p.q, **good)),
        (ValueError, lambda: holdfast.retention(p.q, p.k, p.v, -p.log_decay, **good)),
        (TypeError, lambda: holdfast.retention(p.q, p.k, p.v, p.log_decay, scale="x", **good)),
        (None, lambda: holdfast.retention(p.q, p.k, p.v, form="parallel", **squares)),
        (NotImplementedError, lambda: holdfast.retention(p.q, p.k, p.v.astype("d"), p.log_decay, **good)),
    ]


def call_all(calls):
    for error, call in calls:
        if error is None:
            call()
        else:
            with pytest.raises(error):
                call()


def test_references_and_buffers_are_given_back(problem):
    p = problem(*SHAPE)
    calls = failing_and_working_calls(p)
    arrays = (p.q, p.k, p.v, p.log_decay, p.initial_state, p.out)
    before = [sys.getrefcount(x) for x in arrays]
    call_all(calls)
    gc.collect()
    assert [sys.getrefcount(x) for x in arrays] == before

    resizable = bytearray(p.q.tobytes())  # cannot be resized for as long as somebody holds its buffer
    q = memoryview(resizable).cast("f", p.q.shape)
    holdfast.retention(q, p.k, p.v)
    with pytest.raises(ValueError):
        holdfast.retention(q, p.k, p.v[0])
    q.release()
    resizable.clear()


@pytest.mark.parametrize("versioned", [True, False])
def test_capsules_are_given_back(problem, versioned):
    p = problem(*SHAPE)
    q, out = Exporter(p.q, versioned=versioned), Exporter(p.out, versioned=versioned)
    holdfast.retention(q, p.k, p.v, out=out)
    with pytest.raises(ValueError):
        holdfast.retention(q, p.k, p.v[0], out=out)
    assert q.exported == q.given_back == out.exported == out.given_back == 2


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_grow(problem):
    p = problem(*SHAPE)
    calls = failing_and_working_calls(p)
    for _ in range(20):
        call_all(calls)
    tracemalloc.start()
    try:
        call_all(calls)
        gc.collect()
        traced, _ = tracemalloc.get_traced_memory()
        for _ in range(50):
            call_all(calls)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - traced < p.out.nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_resident_memory_does_not_grow(problem):
    p = problem(1, 64, 2, 128, 128)
    calls = failing_and_working_calls(p)

    def call_on_threads(n: int) -> None:  # each thread has a context, with workspace, of its own
        for _ in range(n):
            thread = threading.Thread(target=call_all, args=[calls])
            thread.start()
            thread.join()

    # A round may happen to find one context more alive than the last one did, of 8 MB, and keep its memory; what is
    # lost is lost in every round. Far below what 200 contexts or 200 results (64 KiB each and more) would take.
    call_on_threads(20)
    growth = []
    for _ in range(5):
        before = resident_bytes()
        call_on_threads(200)
        growth.append(resident_bytes() - before)
        if growth[-1] < 4 << 20:
            return
    raise AssertionError(f"memory grew in every round, by {growth} bytes")
