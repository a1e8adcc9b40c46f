"""Gradients: retention_backward() against closed forms, and against PyTorch's derivatives of all pairs of tokens."""

from __future__ import annotations

import inspect
import re
import threading

import holdfast
import numpy as np
import pytest
import reference
from exporter import Exporter, Namespaced
from holdfast import Gradients, retention, retention_backward
from reference import assert_close
from test_dtypes import BFLOAT16, FLOAT16, KINDS, bfloat16_bits, numbers_of, widened

# Relative RMS against float64: gradients of decays are differences of larger sums.
TOLERANCE = 1e-5


@pytest.fixture
def gradients_of(problem):
    """gradients_of(B, T, H, group, K, V, decay) makes inputs, and gradients of results, as keyword arguments."""

    def make(B, T, H, group, K, V, decay="token"):
        p = problem(B, T, H * group, K, V, decay)
        few = slice(0, H)
        random = np.random.default_rng(7)
        log_decay = p.log_decay if decay is None else p.log_decay[..., few]
        return {
            "dout": random.standard_normal((B, T, H * group, V), np.float32),
            "q": p.q,
            "k": p.k[:, :, few],
            "v": p.v[:, :, few],
            "log_decay": log_decay,
            "initial_state": p.initial_state[:, few],
            "dfinal_state": random.standard_normal((B, H, K, V), np.float32),
        }

    return make


@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("T", [0, 1, 64, 195, 700])
@pytest.mark.parametrize("B, H, group, K, V", [(2, 3, 1, 7, 5), (1, 2, 1, 64, 64), (1, 1, 3, 33, 100)])
def test_agrees_with_the_reference(gradients_of, B, T, H, group, K, V, decay):
    call = gradients_of(B, T, H, group, K, V, decay)
    got = retention_backward(**call)
    *expected, dinitial_state = reference.retention_backward(scale=K**-0.5, **call)
    if decay == "head":
        expected[3] = expected[3].sum((0, 1))
    for name, actual, values in zip(Gradients._fields, got, (*expected, dinitial_state), strict=False):
        assert actual.dtype == np.float32, name
        if values.any():
            assert_close(actual, values, TOLERANCE)
        else:
            np.testing.assert_array_equal(actual, values.astype(np.float32))
    assert got.initial_sum_of_keys is None


@pytest.mark.parametrize("form", ["auto", "parallel", "chunkwise", "recurrent"])
@pytest.mark.parametrize("decay", [None, "head", "token"])
@pytest.mark.parametrize("degree, normalize", [(1, False), (1, True), (2, None), (2, False), (3, False), (4, None)])
def test_agrees_with_pytorch(gradients_of, degree, normalize, decay, form):
    torch = pytest.importorskip("torch")
    call = gradients_of(2, 70, 2, 2, 6, 5, decay)
    del call["initial_state"], call["dfinal_state"]
    if normalize or (normalize is None and degree > 1):  # sums of weights stay away from 0
        call.update(q=np.abs(call["q"]) + 0.1, k=np.abs(call["k"]) + 0.1)
    names = ["q", "k", "v"] if decay is None else ["q", "k", "v", "log_decay"]
    leaves = {name: torch.tensor(call[name], dtype=torch.float64, requires_grad=True) for name in names}
    q, k, v = (leaves[name] for name in ("q", "k", "v"))
    k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    scores = (torch.einsum("bihd,bjhd->bhij", q, k) * 6**-0.5) ** degree
    if decay is not None:
        per_token = leaves["log_decay"].expand(2, 70, 2).repeat_interleave(2, 2)
        until = per_token.cumsum(1).permute(0, 2, 1)
        scores = scores * torch.exp((until[..., :, None] - until[..., None, :]).tril())
    weights = scores.tril()
    if normalize or (normalize is None and degree > 1):
        weights = weights / weights.sum(-1, keepdim=True)
    torch.einsum("bhij,bjhe->bihe", weights, v).backward(torch.tensor(call["dout"], dtype=torch.float64))

    options = {"degree": degree, "normalize": normalize, "form": form}
    out = retention(call["q"], call["k"], call["v"], call["log_decay"], **options)
    got = retention_backward(**call, out=out, **options)
    for name in names:
        assert_close(getattr(got, name), leaves[name].grad.numpy(), TOLERANCE)
    assert all(getattr(got, name) is None for name in Gradients._fields if name not in names)


@pytest.mark.parametrize("expansion", ["tight", "tiled"])
@pytest.mark.parametrize("state_layout", ["kv", "vk"])
def test_a_cut_sequence_hands_over_gradients_of_its_states(gradients_of, state_layout, expansion):
    call = gradients_of(1, 90, 2, 1, 16, 8)
    del call["initial_state"], call["dfinal_state"]
    options = {"degree": 2, "state_layout": state_layout, "expansion": expansion}
    rows = ("q", "k", "v", "log_decay")
    out = retention(*(call[name] for name in rows), **options)
    whole = retention_backward(**call, out=out, **options)
    first, second = ({name: x[:, part] for name, x in call.items()} for part in (slice(0, 40), slice(40, 90)))
    _, state, sums = retention(*(first[name] for name in rows), return_state=True, **options)
    states = {"initial_state": state, "initial_sum_of_keys": sums}
    tail = retention_backward(**second, out=out[:, 40:], **states, **options)
    assert tail.initial_state.shape == state.shape and tail.initial_sum_of_keys.shape == sums.shape
    head = retention_backward(
        **first,
        out=out[:, :40],
        dfinal_state=tail.initial_state,
        dfinal_sum_of_keys=tail.initial_sum_of_keys,
        **options,
    )
    for name in rows:
        together = np.concatenate([getattr(head, name), getattr(tail, name)], axis=1)
        assert_close(together, getattr(whole, name), TOLERANCE)


def test_packed_sequences(gradients_of):
    call = gradients_of(1, 150, 2, 2, 24, 16)
    starts = [0, 60, 60, 61, 150]
    states = np.random.default_rng(3).standard_normal((2, 4, 2, 24, 16), np.float32)
    call.update(initial_state=states[0], dfinal_state=states[1])
    packed = retention_backward(**call, cu_seqlens=np.array(starts))
    for n, (begin, end) in enumerate(zip(starts, starts[1:], strict=False)):
        part = {name: x[n : n + 1] if "state" in name else x[:, begin:end] for name, x in call.items()}
        alone = retention_backward(**part)
        for name in ("q", "k", "v", "log_decay"):
            np.testing.assert_array_equal(getattr(packed, name)[:, begin:end], getattr(alone, name))
        np.testing.assert_array_equal(packed.initial_state[n : n + 1], alone.initial_state)


@pytest.mark.parametrize("state_layout", ["kv", "vk"])
@pytest.mark.parametrize("starts", [None, [0, 0, 70, 195]])
@pytest.mark.parametrize("interval", [1, 64, 1000])
def test_states_that_the_forward_kept(gradients_of, interval, starts, state_layout):
    call = gradients_of(2 if starts is None else 1, 195, 2, 3, 16, 8)
    initial, dstate = call.pop("initial_state"), call.pop("dfinal_state")
    lengths = [195] * 2 if starts is None else np.diff(starts)
    if starts is not None:
        initial, dstate = np.repeat(initial, len(lengths), 0), np.repeat(dstate, len(lengths), 0)
    if state_layout == "vk":
        initial, dstate = (np.ascontiguousarray(x.swapaxes(2, 3)) for x in (initial, dstate))
    same = {"initial_state": initial, "state_layout": state_layout, "cu_seqlens": starts and np.array(starts)}
    dout = call.pop("dout")
    out, state, states = retention(**call, **same, return_state=True, state_interval=interval)
    np.testing.assert_array_equal(out, retention(**call, **same, form="chunkwise", chunk_size=min(interval, 32)))
    counts = [-(-length // interval) + 1 for length in lengths]
    assert states.shape == (sum(counts), *initial.shape[1:]) and states.dtype == np.float32
    ends = np.cumsum(counts)
    np.testing.assert_array_equal(states[ends - counts], initial)
    np.testing.assert_array_equal(states[ends - 1], state)
    start = 0 if starts is None else starts[-2]
    if lengths[-1] > interval:
        one = {name: x[-1:, start : start + interval] for name, x in call.items()}
        _, after = retention(**one, initial_state=initial[-1:], state_layout=state_layout, return_state=True)
        assert_close(states[ends[-1] - counts[-1] + 1], after[0].astype("f8"), TOLERANCE)
    got = retention_backward(dout, **call, **same, dfinal_state=dstate, states=states, state_interval=interval)
    wanted = retention_backward(dout, **call, **same, dfinal_state=dstate)
    for actual, values in zip(got[:5], wanted[:5], strict=True):
        assert_close(actual, values.astype("f8"), TOLERANCE)


def test_states_that_are_refused(gradients_of):
    call = gradients_of(1, 70, 2, 1, 16, 8)
    del call["dfinal_state"]
    dout = call.pop("dout")
    for interval, error, text in (
        (0, ValueError, "state_interval is 0; expected at least 1, below 2^63, or None"),
        (1 << 63, ValueError, "expected at least 1, below 2^63, or None"),
        (2.5, TypeError, "state_interval is of type float; expected an int, or None"),
        (True, TypeError, "state_interval is of type bool; expected an int, or None"),
    ):
        with pytest.raises(error, match=re.escape(text)):
            retention(**call, state_interval=interval)
    with pytest.raises(ValueError, match="state_interval is 32 and form is 'parallel'; expected 'chunkwise'"):
        retention(**call, form="parallel", state_interval=32)
    for normalize, text in ((False, "not normalized"), (True, "normalized"), (None, "normalized")):
        with pytest.raises(NotImplementedError, match=f"states is given and out, of degree 2, is {text}; expected"):
            retention(**{**call, "initial_state": None}, degree=2, normalize=normalize, state_interval=32)
    with pytest.raises(NotImplementedError, match="states is given and out, of degree 1, is normalized"):
        retention(**{**call, "initial_state": None}, normalize=True, state_interval=32)
    _, states = retention(**call, state_interval=32)
    with pytest.raises(ValueError, match=re.escape("states [M, Hk, D, V] has M = 4; expected 5")):
        retention_backward(dout, **call, states=states, state_interval=20)
    with pytest.raises(ValueError, match="state_interval is 0 and states is given; expected at least 1"):
        retention_backward(dout, **call, states=states)
    with pytest.raises(ValueError, match="state_interval is 32 and states is None; expected 0"):
        retention_backward(dout, **call, state_interval=32)
    with pytest.raises(TypeError, match="states is of type int; expected an array"):
        retention_backward(dout, **call, states=3, state_interval=32)


def test_the_interval_that_suits_gradients():
    assert [holdfast.state_interval(n, n) for n in (1, 64, 128, 256)] == [256, 256, 128, 256]
    assert [holdfast.state_interval(n, n, "f2") for n in (64, 128, 256)] == [256, 256, 512]
    assert holdfast.state_interval(256, 512, np.float32) == 512
    with pytest.raises(ValueError, match="key_size is 0 and value_size 4; expected at least 1"):
        holdfast.state_interval(0, 4)
    with pytest.raises(ValueError, match="expected one of 32 or 16 bits"):
        holdfast.state_interval(4, 4, np.float64)
    torch = pytest.importorskip("torch")
    assert holdfast.state_interval(128, 128, torch.bfloat16) == 256


def test_gradient_of_the_state_alone(gradients_of):
    call = gradients_of(2, 70, 2, 2, 16, 8)
    zeros = retention_backward(**call | {"dout": np.zeros_like(call["dout"])})
    got = retention_backward(**call | {"dout": None})
    assert not got.q.any()
    for actual, expected in zip(got[:5], zeros, strict=False):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_what_is_wanted(gradients_of):
    call = gradients_of(2, 70, 2, 1, 16, 8)
    everything = retention_backward(**call)
    for wanted in ([], ["q"], ("k", "v"), {"log_decay", "initial_state"}, iter(["v", "q"])):
        names = list(wanted)
        some = retention_backward(**call, wanted=names)
        for name in Gradients._fields:
            if name in names:
                np.testing.assert_array_equal(getattr(some, name), getattr(everything, name))
            else:
                assert getattr(some, name) is None
    del call["initial_state"]
    assert retention_backward(**call).initial_state is None
    assert retention_backward(**call, wanted=["initial_state"]).initial_state.shape == (2, 2, 16, 8)


def test_given_arrays_are_written_and_returned(gradients_of):
    call = gradients_of(2, 70, 2, 2, 16, 8)
    everything = retention_backward(**call)
    wide = np.full((2, 70, 4, 20), np.nan, np.float32)
    given = Gradients(wide[..., 2:18], None, np.full_like(call["v"], np.nan), None, None, None)
    found = retention_backward(**call, gradients=given)
    assert found.q is given.q and found.v is given.v
    for result, expected in zip(found, everything, strict=True):
        np.testing.assert_array_equal(result, expected)
    assert np.isnan(wide[..., :2]).all() and np.isnan(wide[..., 18:]).all()

    given = Gradients(*map(np.empty_like, everything[:5]), None)
    found = retention_backward(**call, gradients=given, wanted=())
    assert all(result is there for result, there in zip(found, given, strict=True))
    for result, expected in zip(found, everything, strict=True):
        np.testing.assert_array_equal(result, expected)

    one = given._replace(q=None, log_decay=None, initial_state=None)
    found = retention_backward(**call, gradients=one, wanted=["q"])
    assert found.k is one.k and found.log_decay is None and found.initial_state is None
    np.testing.assert_array_equal(found.q, everything.q)


@pytest.mark.parametrize(
    "name, array, error",
    [
        ("k", np.zeros((2, 70, 2, 15), np.float32), "dk"),
        ("v", np.zeros((2, 70, 2, 8), np.float64), "dv"),
        ("log_decay", np.zeros(2, np.float32), "dlog_decay"),
        ("q", np.broadcast_to(np.float32(0), (2, 70, 2, 16)), "dq is read-only"),
    ],
)
def test_given_arrays_that_are_refused(gradients_of, name, array, error):
    given = Gradients(*(None,) * 6)._replace(**{name: array})
    with pytest.raises((ValueError, NotImplementedError), match=error):
        retention_backward(**gradients_of(2, 70, 2, 1, 16, 8), gradients=given)


def test_given_arrays_are_six(gradients_of):
    with pytest.raises(ValueError, match="gradients has 5 arrays; expected 6, those of Gradients"):
        retention_backward(**gradients_of(2, 70, 2, 1, 16, 8), gradients=(None,) * 5)


@pytest.mark.parametrize("dtype, kind", KINDS)
def test_16_bits(gradients_of, dtype, kind):
    call = gradients_of(1, 70, 2, 2, 24, 16)
    make = {"float16": FLOAT16, "bfloat16": BFLOAT16}[dtype][kind][0]
    rows = ("dout", "q", "k", "v")
    arrays = dict(call)
    for name in rows:
        stored = bfloat16_bits(call[name]) if dtype == "bfloat16" else np.ascontiguousarray(call[name]).astype("f2")
        call[name] = widened(stored) if dtype == "bfloat16" else stored.astype("f4")
        arrays[name] = make(np.ascontiguousarray(stored))
    expected = reference.retention_backward(scale=24**-0.5, **call)
    got = retention_backward(**arrays)
    for actual, values in zip(got[:3], expected[:3], strict=True):
        assert_close(numbers_of(dtype, kind, actual), values, {"float16": 4e-4, "bfloat16": 2.5e-3}[dtype])
    for actual, values in zip(got[3:5], expected[3:], strict=True):
        assert_close(np.asarray(actual), values, TOLERANCE)


def test_kinds_of_arrays(gradients_of):
    call = gradients_of(1, 20, 2, 1, 8, 8)
    expected = retention_backward(**call)
    views = {name: memoryview(x) for name, x in call.items()}
    for got in (retention_backward(**views), retention_backward(**{n: Exporter(x) for n, x in call.items()})):
        for name in Gradients._fields[:5]:
            assert isinstance(getattr(got, name), np.ndarray)
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    got = retention_backward(**{n: Namespaced(x) for n, x in call.items()})
    assert all(isinstance(x, Namespaced) for x in got[:5])
    torch = pytest.importorskip("torch")
    got = retention_backward(**{n: torch.from_numpy(np.ascontiguousarray(x)) for n, x in call.items()})
    for name in Gradients._fields[:5]:
        assert isinstance(getattr(got, name), torch.Tensor)
        np.testing.assert_array_equal(getattr(got, name).numpy(), getattr(expected, name))


def test_inputs_are_borrowed_and_read_only(gradients_of):
    call = gradients_of(1, 20, 2, 1, 8, 8)
    whole = np.zeros((1, 20, 2, 32), np.float32)
    whole[..., :8], whole[..., 8:16], whole[..., 16:24] = call["q"], call["k"], call["v"]
    expected = retention_backward(**call)
    call.update(q=whole[..., :8], k=whole[..., 8:16], v=whole[..., 16:24])
    for x in call.values():
        x.flags.writeable = False
    got = retention_backward(**call)
    for actual, values in zip(got[:5], expected[:5], strict=True):
        np.testing.assert_array_equal(actual, values)


def test_other_threads_run_meanwhile(gradients_of):
    call = gradients_of(1, 2000, 4, 1, 64, 64)
    expected, results = retention_backward(**call), [None] * 4

    def work(n):
        results[n] = retention_backward(**call)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got in results:
        for actual, values in zip(got[:5], expected[:5], strict=True):
            np.testing.assert_array_equal(actual, values)


def test_bitwise_equal_for_any_number_of_threads(gradients_of):
    call = gradients_of(2, 500, 3, 1, 32, 32, "head")
    results = []
    for threads in (0, 1, 3, 8):
        holdfast.set_num_threads(threads)
        results.append(retention_backward(**call))
    for got in results[1:]:
        for actual, values in zip(got[:5], results[0][:5], strict=True):
            np.testing.assert_array_equal(actual, values)


def test_the_listener_hears_of_it(gradients_of):
    lines = []
    holdfast.set_verbose(lines.append)
    retention_backward(**gradients_of(1, 40, 1, 1, 64, 64))
    assert len(lines) == 1 and lines[0].startswith("backward: chunkwise_backward_f32"), lines


def test_refusals(gradients_of):
    call = gradients_of(2, 5, 3, 1, 8, 6)

    def refused(error, text, **changes):
        with pytest.raises(error) as caught:
            retention_backward(**{**call, **changes})
        assert type(caught.value) is error and text in str(caught.value), str(caught.value)

    refused(TypeError, "q is of type NoneType; expected an array", q=None)
    refused(TypeError, "dout is of type list; expected an array", dout=[1.0])
    refused(ValueError, "dout [B, T, H, V] has T = 4; expected 5, that of out", dout=call["dout"][:, :4])
    refused(ValueError, "k [B, T, Hk, K] has K = 7; expected 8, that of q", k=call["k"][..., :7])
    refused(ValueError, "dfinal_state [N, Hk, D, V] has N = 1", dfinal_state=call["dfinal_state"][:1])
    refused(ValueError, "out is None; expected a tensor [B, T, H, V]", normalize=True, initial_state=None)
    refused(ValueError, "wanted has 'x'; expected names of 'q', 'k'", wanted=["q", "x"])
    refused(TypeError, "wanted is of type int; expected several names of fields of Gradients, or None", wanted=3)
    refused(TypeError, "wanted is of type str; expected several names of fields of Gradients", wanted="q")
    refused(TypeError, "wanted is of type str; expected", wanted="log_decay")
    refused(TypeError, "gradients is of type int; expected Gradients, or None", gradients=3)
    refused(ValueError, "dlog_decay is given and log_decay is None", log_decay=None, wanted=["log_decay"])
    refused(ValueError, "dinitial_sum_of_keys is given and out, of degree 1, is", wanted=["initial_sum_of_keys"])
    for out, error, text in (
        ("text", TypeError, "out is of type str; expected an array"),
        (call["dout"].astype("f8"), NotImplementedError, "out has dtype float64"),
        (call["dout"][:, :4], ValueError, "out [B, T, H, V] has T = 4; expected 5, that of q"),
    ):  # not read, but checked
        refused(error, text, out=out)
    refused(ValueError, "degree is 5; expected 1, 2, 3 or 4", degree=5)
    refused(ValueError, "form is 'fast'; expected one of", form="fast")
    refused(ValueError, "log_decay[0, 0, 0] is 1; expected a number <= 0", log_decay=np.ones((2, 5, 3), np.float32))
    refused(NotImplementedError, "dout has dtype float64; expected float32", dout=call["dout"].astype("f8"))
    refused(ValueError, "dout has dtype float16; expected float32, that of q", dout=call["dout"].astype("f2"))


def test_the_signature_is_the_specified_one():
    assert " ".join(inspect.signature(retention_backward).parameters) == (
        "dout q k v log_decay out scale degree normalize form chunk_size initial_state initial_sum_of_keys "
        "dfinal_state dfinal_sum_of_keys cu_seqlens states state_interval wanted gradients state_layout expansion"
    )
