"""Values of retention() and decay()."""

from __future__ import annotations

import inspect

import holdfast
import numpy as np
import pytest
import reference
from reference import assert_close


@pytest.mark.parametrize("decay", [None, "head", "token"])
@pytest.mark.parametrize("T", [0, 1, 63, 64, 65, 195])
@pytest.mark.parametrize("B, H, K, V", [(1, 1, 1, 1), (2, 3, 7, 5), (1, 8, 64, 64), (3, 1, 33, 100), (1, 2, 128, 80)])
def test_agrees_with_the_reference(problem, B, T, H, K, V, decay):
    p = problem(B, T, H, K, V, decay)
    expected, _ = reference.retention(p.q, p.k, p.v, p.log_decay)
    assert_close(holdfast.retention(p.q, p.k, p.v, p.log_decay), expected)

    expected, expected_state = reference.retention(p.q, p.k, p.v, p.log_decay, initial_state=p.initial_state)
    out, state = holdfast.retention(
        p.q, p.k, p.v, p.log_decay, initial_state=p.initial_state, form="chunkwise", return_state=True
    )
    assert_close(out, expected)
    assert_close(state, expected_state)


@pytest.mark.parametrize("B, H", [(0, 2), (2, 0)])
def test_nothing_to_do(problem, B, H):
    p = problem(B, 5, H, 4, 3)
    out, state = holdfast.retention(p.q, p.k, p.v, p.log_decay, return_state=True)
    assert out.shape == (B, 5, H, 3) and state.shape == (B, H, 4, 3)


def test_the_empty_sequence_returns_the_initial_state(problem):
    p = problem(2, 0, 3, 8, 5)
    out, state = holdfast.retention(p.q, p.k, p.v, initial_state=p.initial_state, return_state=True)
    assert out.shape == (2, 0, 3, 5)
    np.testing.assert_array_equal(state, p.initial_state)
    assert state is not p.initial_state and not np.shares_memory(state, p.initial_state)


@pytest.mark.parametrize("cut", [0, 1, 64, 100, 195])
def test_cut_and_continue(problem, cut):
    p = problem(2, 195, 2, 40, 24)
    whole, final = reference.retention(p.q, p.k, p.v, p.log_decay)
    first, state = holdfast.retention(p.q[:, :cut], p.k[:, :cut], p.v[:, :cut], p.log_decay[:, :cut], return_state=True)
    second, state = holdfast.retention(
        p.q[:, cut:], p.k[:, cut:], p.v[:, cut:], p.log_decay[:, cut:], initial_state=state, return_state=True
    )
    assert_close(np.concatenate([first, second], axis=1), whole)
    assert_close(state, final)


@pytest.mark.parametrize("form", ["auto", "parallel", "chunkwise", "recurrent"])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_heads_in_groups(problem, heads, form):
    p = problem(2, 70, 6, 24, 40)
    k, v, decay, state = p.k[:, :, :heads], p.v[:, :, :heads], p.log_decay[:, :, :heads], p.initial_state[:, :heads]
    expected, expected_state = reference.retention(p.q, k, v, decay, initial_state=state)
    out, state = holdfast.retention(p.q, k, v, decay, initial_state=state, return_state=True, form=form)
    assert_close(out, expected)
    assert_close(state, expected_state)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_packed_sequences(problem, dtype):
    p = problem(1, 100, 2, 24, 40)
    starts = np.array([0, 0, 37, 38, 100, 100], dtype)
    states = np.concatenate([p.initial_state] * 5)
    out, final = holdfast.retention(
        p.q, p.k, p.v, p.log_decay, cu_seqlens=starts, initial_state=states, return_state=True
    )
    assert final.shape == states.shape
    for n in range(5):
        part = slice(starts[n], starts[n + 1])
        expected, expected_state = reference.retention(
            p.q[:, part], p.k[:, part], p.v[:, part], p.log_decay[:, part], initial_state=states[n : n + 1]
        )
        assert_close(out[:, part], expected)
        assert_close(final[n : n + 1], expected_state)


def test_value_major_states(problem):
    p = problem(2, 70, 2, 24, 40)
    given = np.ascontiguousarray(p.initial_state.swapaxes(2, 3))
    out, state = holdfast.retention(p.q, p.k, p.v, p.log_decay, initial_state=p.initial_state, return_state=True)
    vk_out, vk = holdfast.retention(
        p.q, p.k, p.v, p.log_decay, initial_state=given, return_state=True, state_layout="vk"
    )
    np.testing.assert_array_equal(vk_out, out)
    np.testing.assert_array_equal(vk, state.swapaxes(2, 3))
    assert vk.flags.c_contiguous


@pytest.mark.parametrize("normalize", [None, False, True])
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_parallel_form_with_its_weights(problem, degree, normalize):
    p = problem(2, 70, 4, 24, 40)
    q, k = np.abs(p.q) + np.float32(0.1), np.abs(p.k) + np.float32(0.1)  # sums of weights stay away from 0
    decays = np.cumsum(p.log_decay[:, :, :2], axis=1, dtype=np.float64)
    scores = np.einsum("bihd,bjhd->bhij", q.astype("d"), k[:, :, :2].astype("d").repeat(2, axis=2)) * 24**-0.5
    gates = np.exp(np.minimum(decays[:, :, None] - decays[:, None], 0)).transpose(0, 3, 1, 2).repeat(2, axis=1)
    expected = np.tril(scores**degree * gates)
    if normalize or (normalize is None and degree > 1):
        expected /= expected.sum(axis=3, keepdims=True)
    options = {"degree": degree, "normalize": normalize, "form": "parallel", "return_weights": True}
    out, weights = holdfast.retention(q, k[:, :, :2], p.v[:, :, :2], p.log_decay[:, :, :2], **options)
    assert_close(weights, expected)
    assert_close(out, np.einsum("bhij,bjhe->bihe", expected, p.v[:, :, :2].astype("d").repeat(2, axis=2)))


def test_parallel_form_returns_weights_last(problem):
    p = problem(1, 20, 2, 16, 8)
    options = {"normalize": True, "form": "parallel", "return_state": True, "return_weights": True}
    out, state, sum_of_keys, weights = holdfast.retention(p.q, p.k, p.v, p.log_decay, **options)
    _, expected = reference.retention(p.q, p.k, p.v, p.log_decay)
    assert_close(state, expected)
    _, expected = reference.retention(p.q, p.k, np.ones((1, 20, 2, 1)), p.log_decay)
    assert_close(sum_of_keys, expected[..., 0])
    assert out.shape == p.v.shape and weights.shape == (1, 2, 20, 20)


@pytest.mark.parametrize("expansion", ["tight", "tiled"])
def test_parallel_form_takes_and_hands_over_states_of_degree_2(problem, expansion):
    p = problem(1, 300, 4, 16, 8)
    few, options = slice(0, 2), {"degree": 2, "expansion": expansion}
    rows = [p.q, p.k[:, :, few], p.v[:, :, few], p.log_decay[:, :, few]]
    expected = holdfast.retention(*rows, **options)
    first, rest = [x[:, :200] for x in rows], [x[:, 200:] for x in rows]
    out, state, sums = holdfast.retention(*first, form="parallel", return_state=True, **options)
    assert_close(out, expected[:, :200])
    for form in ("auto", "parallel"):
        out = holdfast.retention(*rest, form=form, initial_state=state, initial_sum_of_keys=sums, **options)
        assert_close(out, expected[:, 200:])


@pytest.mark.parametrize("degree, normalize", [(1, True), (2, None), (2, False), (3, False), (4, True)])
def test_power(problem, degree, normalize):
    """Against all pairs of tokens; and cut in two, the second part token by token."""
    p = problem(2, 70, 2, 8, 5)
    log_decay, scale = -np.abs(np.float32(p.log_decay)), 0.5
    out, state, *sums = holdfast.retention(
        p.q, p.k, p.v, log_decay, scale=scale, degree=degree, normalize=normalize, return_state=True
    )
    until = np.cumsum(np.broadcast_to(log_decay, p.q.shape[:3]).astype(np.float64), 1).transpose(0, 2, 1)
    weights = (scale * np.einsum("bihd,bjhd->bhij", *(np.float64(x) for x in (p.q, p.k)))) ** degree
    weights *= np.tril(np.exp(np.minimum(until[..., :, None] - until[..., None, :], 0)))
    normalized = degree > 1 if normalize is None else normalize
    sum_of_weights = weights.sum(-1)[..., None] if normalized else np.ones((*weights.shape[:3], 1))
    expected = (np.einsum("bhij,bjhe->bhie", weights, p.v) / sum_of_weights).transpose(0, 2, 1, 3)
    spread = (np.einsum("bhij,bjhe->bhie", np.abs(weights), np.abs(p.v)) / np.abs(sum_of_weights)).transpose(0, 2, 1, 3)
    if degree % 2 and normalized:  # a sum that nearly vanishes is far from any number of terms
        spread *= (np.abs(weights).sum(-1)[..., None] / np.abs(sum_of_weights)).transpose(0, 2, 1, 3)
    assert np.all(np.abs(out - expected) <= 2e-5 * spread)
    assert len(sums) == normalized
    assert state.shape == (2, 2, holdfast.state_size(8, degree), 5)

    first = (x[:, :60] for x in (p.q, p.k, p.v, np.broadcast_to(log_decay, p.q.shape[:3])))
    _, state, *sums = holdfast.retention(
        *first, scale=scale, degree=degree, normalize=normalize, return_state=True, form="chunkwise"
    )
    for t in range(60, 70):
        rows = (x[:, t] for x in (p.q, p.k, p.v, np.broadcast_to(log_decay, p.q.shape[:3])))
        token = holdfast.retention_step(*rows, state, *sums, scale=scale, degree=degree, normalize=normalize)
        assert np.all(np.abs(token - expected[:, t]) <= 2e-5 * spread[:, t])


FORMS = ["auto", "parallel", "chunkwise", "recurrent"]


@pytest.mark.parametrize("form", FORMS)
def test_by_hand(form):
    # Two tokens of one head, K = 2, V = 1, decay 1/2, scale 1:
    #   S_1 = [1 2]^T 3 = [3 6]^T             out_1 = [1 1] S_1 = 9
    #   S_2 = S_1 / 2 + [4 0]^T 5 = [21.5 3]^T  out_2 = [2 -1] S_2 = 40
    q = np.array([[1, 1], [2, -1]], "f").reshape(1, 2, 1, 2)
    k = np.array([[1, 2], [4, 0]], "f").reshape(1, 2, 1, 2)
    v = np.array([3, 5], "f").reshape(1, 2, 1, 1)
    half = np.log([0.5], dtype="f")
    out, state = holdfast.retention(q, k, v, half, scale=1, form=form, return_state=True)
    assert_close(out[0, :, 0, 0], np.array([9, 40]), 1e-6)
    assert_close(state[0, 0, :, 0], np.array([21.5, 3]), 1e-6)

    # Degree 2, divided by the sum of weights: w_11 = 3^2, w_21 = (2 - 2)^2 / 2, w_22 = 8^2; and of
    # q = k = 1, without a decay.
    out = holdfast.retention(q, k, v, half, degree=2, form=form)
    assert_close(out[0, :, 0, 0], np.array([3, 5]), 1e-6)
    ones = np.ones((1, 2, 1, 1), "f")
    out, state, keys = holdfast.retention(ones, ones, v, degree=2, form=form, return_state=True)
    assert_close(out[0, :, 0, 0], np.array([3, 4]), 1e-6)
    assert_close(state[0, 0, :, 0], np.array([8]), 1e-6)
    assert_close(keys[0, 0], np.array([2]), 1e-6)


@pytest.mark.parametrize("degree, normalize", [(1, False), (1, True), (2, True), (2, False), (3, False), (4, True)])
@pytest.mark.parametrize("form", FORMS)
def test_decode_after_prefill(problem, form, degree, normalize):
    T, prompt = 50, 43
    p = problem(2, T, 3, 6, 5)
    if (
        normalize
    ):  # else what is divided by may nearly vanish: the sum of weights of an odd degree, and of small (q.k)^4
        p.q, p.k = np.abs(p.q), np.abs(p.k)
    options = {"degree": degree, "normalize": normalize}
    whole, *carried = holdfast.retention(p.q, p.k, p.v, p.log_decay, form="chunkwise", return_state=True, **options)
    head = [x[:, :prompt] for x in (p.q, p.k, p.v, p.log_decay)]
    out, *states = holdfast.retention(*head, form=form, return_state=True, **options)
    tokens = [holdfast.retention_step(*(x[:, t] for x in (p.q, p.k, p.v, p.log_decay)), *states, **options)
              for t in range(prompt, T)]  # fmt: skip
    assert_close(np.concatenate([out, np.stack(tokens, axis=1)], axis=1), whole.astype("d"), 1e-5)
    for state, expected in zip(states, carried, strict=True):
        assert_close(state, expected.astype("d"), 1e-5)


@pytest.mark.parametrize("scale", [1, -0.25, np.float32(3)])
def test_scale(problem, scale):
    p = problem(1, 70, 2, 16, 8)
    expected, _ = reference.retention(p.q, p.k, p.v, p.log_decay, scale=scale)
    assert_close(holdfast.retention(p.q, p.k, p.v, p.log_decay, scale=scale), expected)


@pytest.mark.parametrize("chunk_size", [1, 7, np.int64(64), 10**30])
def test_chunk_size_does_not_matter(problem, chunk_size):
    p = problem(1, 150, 2, 64, 64)
    expected, _ = reference.retention(p.q, p.k, p.v, p.log_decay)
    assert_close(holdfast.retention(p.q, p.k, p.v, p.log_decay, chunk_size=chunk_size), expected)


def test_a_decay_of_minus_infinity_forgets(problem):
    p = problem(1, 150, 2, 64, 64)
    p.log_decay[:, 70] = -np.inf
    whole = holdfast.retention(p.q, p.k, p.v, p.log_decay, initial_state=p.initial_state)
    afresh, _ = reference.retention(p.q[:, 70:], p.k[:, 70:], p.v[:, 70:], p.log_decay[:, 70:])
    assert_close(whole[:, 70:], afresh)


def test_bitwise_equal_for_any_number_of_threads(problem):
    p = problem(2, 195, 4, 64, 64)
    results = []
    for threads in (0, 1, 3, 8):
        holdfast.set_num_threads(threads)
        results.append(holdfast.retention(p.q, p.k, p.v, p.log_decay, return_state=True))
    for out, state in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(state, results[0][1])


def test_the_signature_is_the_specified_one():
    names = {
        holdfast.retention: "q k v log_decay scale degree normalize form chunk_size initial_state initial_sum_of_keys "
        "cu_seqlens return_state return_weights state_interval state_layout expansion out",
        holdfast.retention_step: "q k v log_decay state sum_of_keys scale degree normalize state_layout expansion out",
        holdfast.rotate: "x theta offset interleaved positions out",
        holdfast.head_norm_gate: "x gate weight norm eps out",
        holdfast.decay: "num_heads convention",
        holdfast.theta: "key_size convention",
        holdfast.info: "",
    }
    for function, expected in names.items():
        assert list(inspect.signature(function).parameters) == expected.split()


def test_decay_retnet():
    log_decay = holdfast.decay(8)
    assert log_decay.dtype == np.float32
    np.testing.assert_array_equal(log_decay, np.log1p(-(2.0 ** -np.arange(5, 13))).astype(np.float32))
    np.testing.assert_array_equal(log_decay, holdfast.decay(8, convention="retnet"))
    assert np.all(holdfast.decay(50) < 0)  # 1 - 2^-54 is 1 even in float64; its logarithm is not 0


def test_decay_linspace():
    gamma = np.exp(holdfast.decay(6, "linspace").astype(np.float64))
    np.testing.assert_allclose(np.log(1 - gamma), np.linspace(np.log(1 / 32), np.log(1 / 512), 6), rtol=1e-5)


def test_decay_of_no_heads():
    assert holdfast.decay(0).shape == holdfast.decay(0, "linspace").shape == (0,)


def test_decay_refuses():
    with pytest.raises(ValueError, match="num_heads is -1; expected at least 0"):
        holdfast.decay(-1)
    with pytest.raises(ValueError, match="convention is 'foo'; expected 'retnet' or 'linspace'"):
        holdfast.decay(4, "foo")
    with pytest.raises(TypeError, match="num_heads is of type float; expected an int"):
        holdfast.decay(4.5)
