"""holdfast.compat.pygpukit against its formula in float64: layout, decays, no scale, kinds of arrays, bad inputs."""

from __future__ import annotations

import numpy as np
import pytest
from gradients import check_gradients
from holdfast.compat import pygpukit
from reference import assert_close

H, T, D = 3, 21, 16


def random(*shape, dtype=np.float32):
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(dtype)


def inputs(*batch, values=D):
    return random(*batch, H, T, D), random(*batch, H, T, D) + 0.5, random(*batch, H, T, values)


def parallel(Q, K, V, gamma):
    """(Q K^T * D) V, D_ij = gamma^(i - j) for j <= i, of [.., H, T, D]."""
    Q, K, V, gamma = (np.asarray(x, np.float64) for x in (Q, K, V, gamma))
    distance = np.arange(Q.shape[-2])[:, None] - np.arange(Q.shape[-2])
    mask = np.where(distance >= 0, gamma[:, None, None] ** np.maximum(distance, 0), 0)
    return (Q @ K.swapaxes(-1, -2) * mask) @ V


def test_decay():
    gamma = pygpukit.retention_init_decay(9)
    assert gamma.dtype == np.float32
    assert gamma.tolist() == [1 - 2.0 ** (-5 - h) for h in range(9)]


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("values", [D, 24])
def test_parallel_and_chunkwise(batch, values):
    Q, K, V = inputs(*batch, values=values)
    gamma = pygpukit.retention_init_decay(H)
    expected = parallel(Q, K, V, gamma)
    assert_close(pygpukit.retention_parallel(Q, K, V, gamma), expected)
    assert_close(pygpukit.retention_chunkwise(Q, K, V, gamma), expected)
    for chunk_size in (1, 4, T, T + 1):  # with a last chunk that is shorter
        assert_close(pygpukit.retention_chunkwise(Q, K, V, gamma, chunk_size=chunk_size), expected)


def test_parallel_decays_as_told():
    Q, K, V = inputs()
    gamma = np.array([0.5, 1.0, 0.0], np.float32)  # the last one forgets all but the token itself
    assert_close(pygpukit.retention_parallel(Q, K, V, gamma), parallel(Q, K, V, gamma))
    assert_close(pygpukit.retention_parallel(Q, K, V, gamma.tolist()), parallel(Q, K, V, gamma))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_recurrent(batch):
    Q, K, V = inputs(*batch)
    gamma = pygpukit.retention_init_decay(H)
    state = np.broadcast_to(pygpukit.retention_init_state(H, D), (*batch, H, D, D)).copy()
    expected_state, outs = np.zeros((*batch, H, D, D)), []
    for t in range(T):
        before = state.copy()
        out, new = pygpukit.retention_recurrent(Q[..., t, :], K[..., t, :], V[..., t, :], gamma, state)
        assert out.shape == (*batch, H, D) and (state == before).all()
        update = K[..., t, :, None].astype(np.float64) * V[..., t, None, :]
        expected_state = gamma[:, None, None].astype(np.float64) * expected_state + update
        state = new
        outs.append(out)
    assert_close(np.stack(outs, axis=-2), parallel(Q, K, V, gamma))
    assert_close(state, expected_state)  # [head_dim of K, head_dim of V]

    halfway = pygpukit.retention_recurrent(*(x[..., :9, :] for x in (Q, K, V)), gamma, np.zeros_like(state))[1]
    out, rest = pygpukit.retention_recurrent(*(x[..., 9:, :] for x in (Q, K, V)), gamma, halfway)
    assert_close(out, parallel(Q, K, V, gamma)[..., 9:, :])
    assert_close(rest, expected_state)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_state(dtype):
    state = pygpukit.retention_init_state(H, D, dtype=dtype)
    assert state.shape == (H, D, D) and state.dtype == np.float32 and not state.any()


class OfDLPack:
    """Nothing but DLPack."""

    def __init__(self, array):
        self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__


def test_kinds_of_arrays():
    Q, K, V = inputs()
    gamma = pygpukit.retention_init_decay(H)
    expected = pygpukit.retention_parallel(Q, K, V, gamma)
    for kind in (memoryview, OfDLPack):
        assert (pygpukit.retention_parallel(kind(Q), kind(K), kind(V), gamma) == expected).all()
    half = [x.astype(np.float16) for x in (Q, K, V)]
    out = pygpukit.retention_chunkwise(*half, gamma)
    assert out.dtype == np.float16
    assert_close(out, parallel(*half, gamma), 4e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors(dtype):
    torch = pytest.importorskip("torch")
    Q, K, V = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in inputs())
    gamma = torch.from_numpy(pygpukit.retention_init_decay(H))
    out = pygpukit.retention_parallel(Q, K, V, gamma)
    assert out.dtype == Q.dtype
    tolerance = {"float32": 2e-6, "bfloat16": 2.5e-3}[dtype]
    assert_close(out.float(), parallel(*(x.float() for x in (Q, K, V)), gamma), tolerance)
    state = pygpukit.retention_init_state(H, D, dtype=Q.dtype)
    step, new = pygpukit.retention_recurrent(Q[:, 0], K[:, 0], V[:, 0], gamma, state)
    assert step.dtype == Q.dtype and new.dtype == torch.float32
    assert_close(step.float(), out[:, 0].float().numpy(), tolerance)


def test_bad_inputs():
    Q, K, V = inputs()
    gamma, state = pygpukit.retention_init_decay(H), pygpukit.retention_init_state(H, D)
    for wrong in (gamma + 1, -gamma, gamma * np.nan):
        with pytest.raises(ValueError, match="gamma has an element"):
            pygpukit.retention_parallel(Q, K, V, wrong)
    with pytest.raises(ValueError, match="log_decay"):
        pygpukit.retention_parallel(Q, K, V, gamma[:-1])
    with pytest.raises(ValueError, match="Q has 2 dimensions; expected 3 or 4"):
        pygpukit.retention_parallel(Q[0], K, V, gamma)
    with pytest.raises(ValueError, match="K has 4 dimensions; expected 2 or 3"):
        pygpukit.retention_recurrent(Q, K[None], V, gamma, state)
    with pytest.raises(ValueError, match="state has 2 dimensions"):
        pygpukit.retention_recurrent(Q, K, V, gamma, state[0])
    with pytest.raises(NotImplementedError, match="initial_state"):
        pygpukit.retention_recurrent(Q, K, V, gamma, state.astype(np.float16))
    with pytest.raises(ValueError, match="chunk_size"):
        pygpukit.retention_chunkwise(Q, K, V, gamma, chunk_size=0)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        pygpukit.retention_init_state(H, D, dtype="int8")
    with pytest.raises(ValueError, match="num_heads is -1"):
        pygpukit.retention_init_decay(-1)


def test_gradients():
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(x) for x in (*inputs(), pygpukit.retention_init_decay(H))]

    def by_hand(Q, K, V, gamma):
        distance = torch.arange(T)[:, None] - torch.arange(T)
        return (Q @ K.mT * (gamma[:, None, None] ** distance.clamp(min=0)).tril()) @ V

    for call in (pygpukit.retention_parallel, pygpukit.retention_chunkwise):
        check_gradients(call, by_hand, *tensors)
    state = torch.from_numpy(random(H, D, D))

    def one_token(Q, K, V, gamma, state):
        new = gamma[:, None, None] * state + K[:, 0, :, None] * V[:, 0, None]
        return torch.einsum("hk,hkv->hv", Q[:, 0], new), new

    check_gradients(
        lambda Q, K, V, gamma, state: pygpukit.retention_recurrent(Q[:, 0], K[:, 0], V[:, 0], gamma, state),
        one_token,
        *tensors,
        state,
    )
