"""retention_step(): values, arrays and exceptions."""

from __future__ import annotations

import gc
import sys
import threading

import holdfast
import numpy as np
import pytest
import reference
from exporter import ROCM, Exporter
from reference import assert_close

SHAPE = B, H, K, V = 2, 3, 8, 6


@pytest.fixture
def token(problem):
    """token(B, H, K, V, decay="token"): one token of `problem`, and a state."""

    def make(B, H, K, V, decay="token"):
        p = problem(B, 1, H, K, V, decay)
        p.q, p.k, p.v, p.out = (x[:, 0] for x in (p.q, p.k, p.v, p.out))
        p.state = p.initial_state.copy()
        if decay == "token":
            p.log_decay = p.log_decay[:, 0]
        return p

    return make


@pytest.mark.parametrize("decay", [None, "head", "token"])
@pytest.mark.parametrize("B, H, K, V", [(1, 1, 1, 1), (2, 3, 7, 5), (1, 8, 64, 64), (3, 1, 33, 100), (1, 2, 128, 80)])
def test_agrees_with_the_reference(problem, B, H, K, V, decay):
    p = problem(B, 20, H, K, V, decay)
    expected, expected_state = reference.retention(p.q, p.k, p.v, p.log_decay, initial_state=p.initial_state)
    state, out = p.initial_state.copy(), np.empty_like(p.v)
    for t in range(20):  # views of one token
        log_decay = p.log_decay[:, t] if decay == "token" else p.log_decay
        out[:, t] = holdfast.retention_step(p.q[:, t], p.k[:, t], p.v[:, t], log_decay, state)
    assert_close(out, expected)
    assert_close(state, expected_state)


def test_is_retention_of_one_token(token):
    p = token(*SHAPE)
    expected, state = holdfast.retention(
        p.q[:, None], p.k[:, None], p.v[:, None], p.log_decay[:, None], initial_state=p.state, return_state=True
    )
    np.testing.assert_array_equal(holdfast.retention_step(p.q, p.k, p.v, p.log_decay, p.state), expected[:, 0])
    np.testing.assert_array_equal(p.state, state)


def test_goes_on_from_retention(problem):
    p = problem(2, 100, 2, 16, 8)
    whole, final = reference.retention(p.q, p.k, p.v, p.log_decay)
    _, state = holdfast.retention(p.q[:, :99], p.k[:, :99], p.v[:, :99], p.log_decay[:, :99], return_state=True)
    assert_close(holdfast.retention_step(p.q[:, 99], p.k[:, 99], p.v[:, 99], p.log_decay[:, 99], state), whole[:, 99])
    assert_close(state, final)


@pytest.mark.parametrize("scale", [1, -0.25, np.float32(3)])
def test_scale(token, scale):
    p = token(*SHAPE)
    expected, _ = reference.retention(
        p.q[:, None], p.k[:, None], p.v[:, None], p.log_decay[:, None], scale=scale, initial_state=p.state
    )
    assert_close(holdfast.retention_step(p.q, p.k, p.v, p.log_decay, p.state, scale=scale), expected[:, 0])


@pytest.mark.parametrize("make", [np.asarray, memoryview, Exporter, lambda x: Exporter(x, versioned=False)])
def test_kinds_of_arrays(token, make):
    p, q = token(*SHAPE), token(*SHAPE)
    expected = holdfast.retention_step(q.q, q.k, q.v, q.log_decay, q.state)
    arrays = map(make, (p.q, p.k, p.v, p.log_decay, p.state))
    out = holdfast.retention_step(*arrays)
    assert type(out) is np.ndarray and out.dtype == np.float32
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(p.state, q.state)

    mine = make(np.ascontiguousarray(p.out))
    p.state[:] = p.initial_state
    assert holdfast.retention_step(p.q, p.k, p.v, p.log_decay, p.state, out=mine) is mine
    np.testing.assert_array_equal(mine.array if isinstance(mine, Exporter) else np.asarray(mine), expected)


def test_torch(token):
    torch = pytest.importorskip("torch")
    p, q = token(*SHAPE), token(*SHAPE)
    expected = holdfast.retention_step(q.q, q.k, q.v, q.log_decay, q.state)
    out = holdfast.retention_step(*map(torch.from_numpy, (p.q, p.k, p.v, p.log_decay, p.state)))
    assert type(out) is torch.Tensor
    np.testing.assert_array_equal(out.numpy(), expected)
    np.testing.assert_array_equal(p.state, q.state)
    with pytest.raises(NotImplementedError, match="state requires grad"):
        holdfast.retention_step(p.q, p.k, p.v, None, torch.zeros(B, H, K, V, requires_grad=True))


def test_heads_in_groups(problem):
    p = problem(2, 9, 6, 24, 40)
    k, v, decay, state = p.k[:, :, :2], p.v[:, :, :2], p.log_decay[:, :, :2], p.initial_state[:, :2].copy()
    expected, final = reference.retention(p.q, k, v, decay, initial_state=state)
    for t in range(9):
        out = holdfast.retention_step(p.q[:, t], k[:, t], v[:, t], decay[:, t], state)
        assert_close(out, expected[:, t])
    assert_close(state, final)


@pytest.mark.parametrize("B, H", [(0, 2), (2, 0)])
def test_nothing_to_do(token, B, H):
    p = token(B, H, 4, 3)
    assert holdfast.retention_step(p.q, p.k, p.v, p.log_decay, p.state).shape == (B, H, 3)


@pytest.mark.parametrize("degree", [1, 2])
def test_without_queries_the_state_advances(token, degree):
    p = token(B, 2, K, V)
    D = holdfast.state_size(K, degree)
    states = [(np.ones((B, 2, D, V), np.float32), np.ones((B, 2, D), np.float32)[: B * (degree > 1)]) for _ in range(2)]
    for q, (state, keys) in zip((p.q, p.q[:, :0]), states, strict=True):
        sums = keys if degree > 1 else None
        out = holdfast.retention_step(q, p.k, p.v, p.log_decay, state, sums, degree=degree)
        assert out.shape == (B, q.shape[1], V)
    for with_queries, without in zip(*states, strict=True):
        np.testing.assert_allclose(without, with_queries, rtol=1e-5, atol=1e-6)


def test_says_what_runs(token):
    lines = []
    holdfast.set_verbose(lines.append)
    p = token(*SHAPE)
    holdfast.retention_step(p.q, p.k, p.v, p.log_decay, p.state)
    assert len(lines) == 1 and lines[0].startswith("step: recurrent_f32_")


def ones(*shape):
    return np.ones(shape, np.float32)


READ_ONLY = np.broadcast_to(np.float32(0), (B, H, K, V))


@pytest.mark.parametrize(
    "error, text, changes",
    [
        (ValueError, "q has 2 dimensions; expected 3, [B, H, K]", {"q": ones(H, K)}),
        (ValueError, "q has 4 dimensions; expected 3, [B, H, K]", {"q": ones(B, 1, H, K)}),
        (ValueError, "k [B, Hk, K] has Hk = 4; expected a divisor of 3, the H of q", {"k": ones(B, 4, K)}),
        (ValueError, "v [B, Hk, V] has B = 1; expected 2, that of q", {"v": ones(1, H, V)}),
        (ValueError, "log_decay has 3 dimensions; expected 1, [Hk], or 2", {"log_decay": ones(1, B, H)}),
        (ValueError, "log_decay[0, 0] is 1; expected a number <= 0", {"log_decay": ones(B, H)}),
        (ValueError, "state [B, Hk, D, V] has D = 7; expected 8", {"state": ones(B, H, K - 1, V)}),
        (ValueError, "state is read-only; expected memory to write to", {"state": READ_ONLY[:]}),
        (ValueError, "state has stride 8 on its last axis", {"state": ones(B, H, V, K).swapaxes(2, 3)}),
        (ValueError, "out [B, H, V] has V = 5; expected 6", {"out": ones(B, H, V - 1)}),
        (ValueError, "out is read-only; expected memory to write to", {"out": READ_ONLY[:, :, 0]}),
        (ValueError, "scale is 0; expected", {"scale": 0.0}),
        (ValueError, "degree is 0; expected 1", {"degree": 0}),
        (NotImplementedError, "state has dtype float64; expected float32", {"state": np.ones((B, H, K, V))}),
        (NotImplementedError, "v is on device type 10", {"v": Exporter(ones(B, H, V), device=ROCM)}),
        (ValueError, "state [B, Hk, D, V] has D = 8; expected 36", {"degree": 2}),
        (ValueError, "sum_of_keys is None; expected a tensor [B, Hk, D]", {"normalize": True}),
        (ValueError, "sum_of_keys is given and out, of degree 1", {"sum_of_keys": ones(B, H, K)}),
        (TypeError, "state is of type NoneType; expected an array", {"state": None}),
        (TypeError, "q is of type list; expected an array", {"q": [1.0]}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("with_out", [True, False])
def test_errors(token, error, text, changes, with_out):
    p = token(*SHAPE)
    arguments = {"q": p.q, "k": p.k, "v": p.v, "log_decay": p.log_decay, "state": p.state}
    if with_out:
        arguments["out"] = p.out
    with pytest.raises(error) as caught:
        holdfast.retention_step(**{**arguments, **changes})
    assert type(caught.value) is error and text in str(caught.value)
    assert np.all(p.out == 7)
    np.testing.assert_array_equal(p.state, p.initial_state)


def test_outputs_that_overlap(token):
    p = token(*SHAPE)
    with pytest.raises(ValueError, match="out overlaps v in memory"):
        holdfast.retention_step(p.q, p.k, p.v, None, p.state, out=p.v)
    with pytest.raises(ValueError, match="out overlaps state in memory"):
        holdfast.retention_step(p.q, p.k, p.v, None, p.state, out=p.state[:, :, 0])
    np.testing.assert_array_equal(p.state, p.initial_state)


def test_references_are_given_back(token):
    p = token(*SHAPE)
    arrays = (p.q, p.k, p.v, p.log_decay, p.state, p.out)
    before = [sys.getrefcount(x) for x in arrays]
    holdfast.retention_step(p.q, p.k, p.v, p.log_decay, p.state, out=p.out)
    with pytest.raises(ValueError):
        holdfast.retention_step(p.q, p.k, p.v[0], p.log_decay, p.state, out=p.out)
    gc.collect()
    assert [sys.getrefcount(x) for x in arrays] == before


def test_from_many_threads(problem):
    p = problem(4, 50, 2, 32, 32)
    expected, _ = reference.retention(p.q, p.k, p.v, p.log_decay)
    out = np.empty_like(p.v)

    def sequence(b):
        state, one = np.zeros((1, 2, 32, 32), np.float32), slice(b, b + 1)
        for t in range(50):
            holdfast.retention_step(p.q[one, t], p.k[one, t], p.v[one, t], p.log_decay[one, t], state, out=out[one, t])

    threads = [threading.Thread(target=sequence, args=[b]) for b in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_close(out, expected)
