"""holdfast.compat.retention against power retention's formula in float64: forms, states in the package's order of
features, the cache of inference and when it is folded, bad inputs."""

from __future__ import annotations

import pytest
from gradients import check_gradients
from reference import assert_close

torch = pytest.importorskip("torch")
from holdfast.compat import retention as power  # noqa: E402

B, T, HQ, HK, K, V = 2, 37, 4, 2, 16, 24
# Relative RMS. A normalised output of few tokens, or with gates, may cancel: sums of some ten float32 terms that are
# ten times their result.
TOLERANCE = 5e-6


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def inputs(length=T, seed=0, key_size=K):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    # Weak gates, so that what is carried from chunk to chunk matters. Keys with a mean: odd powers do not cancel.
    Q, KK = normal(B, length, HQ, key_size) + 1, normal(B, length, HK, key_size) + 1
    return Q, KK, normal(B, length, HK, V), -normal(B, length, HK).abs() / 50


def by_hand(Q, K, V, log_G, deg, before=None):
    """[B, T, HQ, V] from all weights, row by row, in float64; `before`: tokens (K, V, log_G) that came first."""
    Q, K, V = Q.double(), K.double(), V.double()
    G = torch.zeros(K.shape[:3]).double() if log_G is None else log_G.double()
    skip = 0
    if before is not None:
        skip = before[0].shape[1]
        K, V, G = (torch.cat([x.double(), y], 1) for x, y in zip(before, (K, V, G), strict=True))
    group = Q.shape[2] // K.shape[2]
    outs = []
    for i in range(Q.shape[1]):
        last = skip + i + 1
        kept = (G[:, :last].flip(1).cumsum(1).flip(1) - G[:, :last]).exp()  # gates of the tokens after j, up to i
        scores = torch.einsum("bhd,bjhd->bjh", Q[:, i], K[:, :last].repeat_interleave(group, 2)) ** deg
        w = scores * kept.repeat_interleave(group, 2)
        outs.append(torch.einsum("bjh,bjhe->bhe", w, V[:, :last].repeat_interleave(group, 2)) / w.sum(1)[..., None])
    return torch.stack(outs, 1)


def tiled(k):
    """Features on the side of keys in the package's order, blocks of 16, from its definition."""
    features = []
    for block in range(k.shape[-1] // 16):
        for o in range(16 * (block + 1)):
            for i in range(16):
                features.append(k[..., o] * k[..., 16 * block + i] * (2 if o < 16 * block else 1))
    return torch.stack(features, -1)


def state_by_hand(K, V, log_G):
    """(state, sum of keys) of degree 2, in float64."""
    phi, V, G = tiled(K.double()), V.double(), log_G.double()
    kept = (G.sum(1, keepdim=True) - G.cumsum(1)).exp()
    phi = phi * kept[..., None]
    return torch.einsum("bthf,bthe->bhfe", phi, V), phi.sum(1)


@pytest.mark.parametrize("deg", [1, 2, 3, 4])
@pytest.mark.parametrize("gates", [True, False])
def test_whole_sequences(deg, gates):
    Q, K, V, G = inputs()
    G = G if gates else None
    expected = by_hand(Q, K, V, G, deg).numpy()
    for chunk_size, switch in ((None, None), (8, None), (T, None), (8, T), (8, 0), (None, 5)):
        out = power.power_retention(Q, K, V, G, deg=deg, chunk_size=chunk_size, switch_over_seq_len=switch)
        assert_close(out, expected, TOLERANCE)
    assert_close(power.power_full(Q, K, V, G, deg=deg, chunk_size=8), expected, TOLERANCE)
    assert_close(power.power_retention(Q, K, V, G, deg=deg, scale=0.01), expected, TOLERANCE)  # scale cancels


@pytest.mark.parametrize("key_size", [16, 32])
@pytest.mark.parametrize("chunk_size", [None, 8, T])
def test_final_state_is_the_packages_and_has_every_token(key_size, chunk_size):
    Q, K, V, G = inputs(key_size=key_size)
    out, (state, keys) = power.power_retention(Q, K, V, G, return_final_state=True, chunk_size=chunk_size)
    assert_close(out, by_hand(Q, K, V, G, 2).numpy(), TOLERANCE)
    expected_state, expected_keys = state_by_hand(K, V, G)
    assert state.dtype == keys.dtype == torch.float32
    assert_close(state, expected_state.numpy())
    assert_close(keys, expected_keys.numpy())


@pytest.mark.parametrize("deg, key_size", [(1, 16), (2, 16), (2, 12), (3, 8), (4, 6)])
@pytest.mark.parametrize("chunk_size", [None, 5, 50])
def test_initial_state_is_gated_and_normalised(deg, key_size, chunk_size):
    Q, K, V, G = inputs(key_size=key_size)
    for cut in (1, 17):
        first, rest = ([x[:, :cut] for x in (Q, K, V, G)], [x[:, cut:] for x in (Q, K, V, G)])
        _, state = power.power_retention(*first, return_final_state=True, deg=deg, chunk_size=chunk_size)
        out, end = power.power_retention(
            *rest, initial_state=state, return_final_state=True, deg=deg, chunk_size=chunk_size
        )
        assert_close(out, by_hand(Q, K, V, G, deg)[:, cut:].numpy(), TOLERANCE)
        _, whole = power.power_retention(Q, K, V, G, return_final_state=True, deg=deg)
        assert_close(end.state, whole.state.double().numpy())
        assert_close(end.sum_of_keys, whole.sum_of_keys.double().numpy())


@pytest.mark.parametrize("deg, key_size", [(1, 16), (2, 16), (2, 12), (3, 8), (4, 6)])
@pytest.mark.parametrize("gates", [True, False])
def test_decoding(deg, key_size, gates):
    """Token by token as a model does: the cache grows until it is folded, and every output is that of the whole."""
    Q, K, V, G = inputs(key_size=key_size)
    G = G if gates else None
    expected = by_hand(Q, K, V, G, deg)
    state = keys = None
    start, folds = 0, 0
    for t in range(T):
        cache = [None if x is None else x[:, start : t + 1] for x in (K, V, G)]
        given = (state, keys)
        out, state, keys = power.power_retention_inference(
            Q[:, t : t + 1], *cache, state, keys, deg=deg, switch_over_seq_len=8
        )
        assert_close(out, expected[:, t : t + 1].numpy(), TOLERANCE)
        if t + 1 - start >= 8:
            start, folds = t + 1, folds + 1
            assert state is not given[0]
        else:
            assert state is given[0] and keys is given[1]
    assert folds == 4


@pytest.mark.parametrize("queries", [1, 3, 9])
@pytest.mark.parametrize("with_state", [False, True])
def test_each_query_has_its_own_gate(queries, with_state):
    Q, K, V, G = inputs(9)
    state = before = None
    if with_state:
        _, *before = inputs(6, seed=1)
        state = power.power_retention(inputs(6, seed=1)[0], *before, return_final_state=True)[1]
    expected = by_hand(Q, K, V, G, 2, before)[:, -queries:]
    out, *same = power.power_retention_inference(Q[:, -queries:], K, V, G, *(state or (None, None)))
    assert_close(out, expected.numpy(), TOLERANCE)
    assert same == [*(state or (None, None))]


def test_state_after_folding_answers_as_state_and_cache_did():
    Q, K, V, G = inputs()
    for switch in (T, T - 1):
        out, state, keys = power.power_retention_inference(Q[:, -1:], K, V, G, switch_over_seq_len=switch)
        expected_state, expected_keys = state_by_hand(K, V, G)
        assert_close(state, expected_state.numpy())
        assert_close(keys, expected_keys.numpy())
        for empty in (None, K[:, :0]):
            again, *same = power.power_retention_inference(Q[:, -1:], empty, empty, None, state, keys)
            assert_close(again, out.double().numpy(), TOLERANCE)
            assert same == [state, keys]
    for switch in (T + 1, None):
        assert power.power_retention_inference(Q[:, -1:], K, V, G, switch_over_seq_len=switch)[1:] == (None, None)


def test_folding_decays_the_state():
    _, *before = inputs(6, seed=1)
    Q, K, V, G = inputs(9)
    state = power.power_retention(inputs(6, seed=1)[0], *before, return_final_state=True)[1]
    _, new, keys = power.power_retention_inference(Q[:, -1:], K, V, G, *state, switch_over_seq_len=9)
    expected = state_by_hand(*(torch.cat(pair, 1) for pair in zip(before, (K, V, G), strict=True)))
    assert_close(new, expected[0].numpy())
    assert_close(keys, expected[1].numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype):
    Q, K, V, G = inputs()
    Q, K, V = (x.to(dtype) for x in (Q, K, V))
    expected = by_hand(Q, K, V, G, 2)
    tolerance = {torch.float16: 4e-4, torch.bfloat16: 2.5e-3}[dtype]
    out, state = power.power_retention(Q, K, V, G, return_final_state=True, chunk_size=8)
    assert out.dtype == dtype and state.state.dtype == torch.float32
    assert_close(out.float(), expected.numpy(), tolerance)
    out, *_ = power.power_retention_inference(Q[:, -1:], K, V, G)
    assert out.dtype == dtype
    assert_close(out.float(), expected[:, -1:].numpy(), tolerance)


@pytest.mark.parametrize("size", [1e-15, 1e8])
def test_range(size):
    Q, K, V, G = inputs()
    expected = by_hand(Q, K, V, G, 4)
    out, *_ = power.power_retention_inference(Q[:, -1:] * size, K, V, G, deg=4)
    assert_close(out, expected[:, -1:].numpy(), TOLERANCE)
    state = power.power_retention(Q, K, V, G, deg=4, return_final_state=True)[1]
    out, *_ = power.power_retention_inference(Q[:, -1:] * size, None, None, None, *state, deg=4)
    assert_close(out, expected[:, -1:].numpy(), TOLERANCE)


def test_gates_that_forget_everything():
    Q, K, V, G = inputs()
    G[:, 5], G[:, 20] = -torch.inf, -torch.inf
    expected = by_hand(Q[:, 20:], K[:, 20:], V[:, 20:], G[:, 20:].clamp(min=-1e3), 2)
    assert_close(power.power_retention(Q, K, V, G)[:, 20:], expected.numpy(), TOLERANCE)
    out, *_ = power.power_retention_inference(Q[:, 20:], K, V, G)
    assert_close(out, expected.numpy(), TOLERANCE)


def test_bad_inputs():
    Q, K, V, G = inputs()
    state, keys = power.power_retention(Q, K, V, G, return_final_state=True)[1]
    one = Q[:, -1:]
    for call, message in (
        (lambda: power.power_retention(Q, K, V, deg=6), "deg is 6; expected 1, 2, 3 or 4"),
        (lambda: power.power_retention(Q, K, V, initial_state=state), "initial_state lacks its sum of keys"),
        (lambda: power.power_retention(Q, K, V, initial_state=(state[:, :, 1:], keys)), "initial_state"),
        (lambda: power.power_retention(Q, K, V, G[:, 1:]), "log_decay"),
        (lambda: power.power_retention(Q, K, V, G + 1), "log_decay"),
        (lambda: power.power_retention(Q, K, V, scale=0.0), "scale"),
        (lambda: power.power_retention(Q, K, V, chunk_size=0), "chunk_size"),
        (lambda: power.power_retention_inference(one, K, V, deg=0), "deg is 0"),
        (lambda: power.power_retention_inference(one, K, V, scale=float("inf")), "scale is inf"),
        (lambda: power.power_retention_inference(one, K, None), "only one of K and V"),
        (lambda: power.power_retention_inference(one, K, V, G, state), "only one of initial_state and sum_of_keys"),
        (lambda: power.power_retention_inference(one, None, None), "K is empty and initial_state is not given"),
        (lambda: power.power_retention_inference(one, None, None, G, state, keys), "log_G has shape"),
        (lambda: power.power_retention_inference(one, K, V, G[:, 1:]), "log_G has shape"),
        (lambda: power.power_retention_inference(Q, K[:, 1:], V[:, 1:]), "Q has 37 tokens; expected 1 to 36"),
        (lambda: power.power_retention_inference(one[:, :, :3], K, V), "Q has 3 heads; expected a multiple of the 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("deg", [1, 2, 4])
@pytest.mark.parametrize("chunk_size", [None, 8])
def test_gradients(deg, chunk_size):
    Q, K, V, G = inputs()

    def in_two_parts(Q, K, V, G):
        first, rest = [x[:, :20] for x in (Q, K, V, G)], [x[:, 20:] for x in (Q, K, V, G)]
        out, state = power.power_retention(*first, return_final_state=True, deg=deg, chunk_size=chunk_size)
        return torch.cat([out, power.power_retention(*rest, state, deg=deg, chunk_size=chunk_size)], 1)

    def whole(Q, K, V, G):
        return power.power_retention(Q, K, V, G, deg=deg, chunk_size=chunk_size)

    def decoding(Q, K, V, G):
        _, *state = power.power_retention_inference(
            Q[:, :20], K[:, :20], V[:, :20], G[:, :20], deg=deg, switch_over_seq_len=1
        )
        return power.power_retention_inference(Q[:, 30:], K[:, 20:], V[:, 20:], G[:, 20:], *state, deg=deg)[0]

    for call in (whole, in_two_parts):
        check_gradients(call, lambda *inputs: by_hand(*inputs, deg), Q, K, V, G)
    check_gradients(decoding, lambda *inputs: by_hand(*inputs, deg)[:, 30:], Q, K, V, G)
