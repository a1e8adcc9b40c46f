"""holdfast.torch: values and gradients against formulas in float64, and what PyTorch does with operators of its own."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import holdfast
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import holdfast.torch as ht  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

# Relative RMS against formulas in float64, of inputs that are rounded before. Gradients in fp32: the specification's
# number. In 16 bits a result is rounded once, and a gradient has what comes of a rounded out besides.
OUT = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 2.5e-3}
STATE = 4e-6  # of any type
GRADIENT = {torch.float32: 1e-5, torch.float16: 8e-4, torch.bfloat16: 5e-3}

INPUTS = ("q", "k", "v", "log_decay", "initial_state", "initial_sum_of_keys")


# ---- Formulas -------------------------------------------------------------------------------------------------------


def phi(x, degree):
    """The tight expansion: phi(x).phi(y) = (x.y)^degree."""
    monomials = itertools.combinations_with_replacement(range(x.shape[-1]), degree)
    features = []
    for factors in sorted(monomials, key=lambda m: m[::-1]):
        orders = math.factorial(degree) / math.prod(math.factorial(factors.count(f)) for f in set(factors))
        features.append(math.sqrt(orders) * x[..., list(factors)].prod(-1))
    return torch.stack(features, -1)


def retention(
    q, k, v, log_decay=None, *, scale=None, degree=1, normalize=None, initial_state=None, initial_sum_of_keys=None,
    cu_seqlens=None,
):  # fmt: skip
    """(out, state, sum of keys) in float64, token by token as the formula stands."""
    if cu_seqlens is not None:
        parts = []
        for n, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            tokens, of = slice(begin, end), slice(n, n + 1)
            decay = log_decay[:, tokens] if log_decay is not None and log_decay.ndim == 3 else log_decay
            parts.append(
                retention(
                    q[:, tokens], k[:, tokens], v[:, tokens], decay, scale=scale, degree=degree, normalize=normalize,
                    initial_state=None if initial_state is None else initial_state[of],
                    initial_sum_of_keys=None if initial_sum_of_keys is None else initial_sum_of_keys[of],
                )
            )  # fmt: skip
        outs, states, sums = zip(*parts, strict=True)
        return torch.cat(outs, 1), torch.cat(states), torch.cat(sums)
    normalize = degree > 1 if normalize is None else normalize
    (B, T, H, K), (Hk, V) = q.shape, v.shape[2:]
    queries, keys = phi(q, degree), phi(k, degree)
    decay = torch.zeros(B, T, Hk, dtype=q.dtype) if log_decay is None else log_decay.expand(B, T, Hk)
    state = torch.zeros(B, Hk, keys.shape[-1], V, dtype=q.dtype) if initial_state is None else initial_state
    total = torch.zeros(B, Hk, keys.shape[-1], dtype=q.dtype) if initial_sum_of_keys is None else initial_sum_of_keys
    outs = []
    for t in range(T):
        a = decay[:, t].exp()
        state = a[..., None, None] * state + keys[:, t, :, :, None] * v[:, t, :, None, :]
        total = a[..., None] * total + keys[:, t]
        out = torch.einsum("bhd,bhde->bhe", queries[:, t], state.repeat_interleave(H // Hk, 1))
        if normalize:
            out = out / torch.einsum("bhd,bhd->bh", queries[:, t], total.repeat_interleave(H // Hk, 1))[..., None]
        else:
            out = out * (K**-0.5 if scale is None else scale) ** degree
        outs.append(out)
    return torch.stack(outs, 1) if outs else v.new_zeros(B, 0, H, V), state, total


def rotated(x, theta, offset=0, interleaved=False, positions=None):
    positions = torch.arange(x.shape[1]) + offset if positions is None else positions
    angle = positions.double()[..., None, None] * theta.double()
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    pair = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
    return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)


def normed(x, gate=None, weight=None, norm="rms", eps=1e-6):
    x = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if gate is None else y * gate * torch.sigmoid(gate)


# ---- Problems -------------------------------------------------------------------------------------------------------


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash((shape, seed)) % 2**31)).to(dtype)


def problem(
    *, B=2, T=40, H=2, Hk=2, K=8, V=6, decay="token", degree=1, state=False, sequences=None, dtype=torch.float32,
    **options,
):  # fmt: skip
    """Inputs by name. Decays are weak, so that what is carried from chunk to chunk matters. Queries and keys of power
    retention point the same way: where a sum of weights is close to 0 gradients are of any size, and so is their
    rounding."""
    normalize = options.get("normalize", degree > 1)
    shift = 1 if normalize else 0
    N, D = (len(sequences) - 1 if sequences else B), holdfast.state_size(K, degree)
    p = {
        "q": (normal(B, T, H, K, seed=1) + shift).to(dtype),
        "k": (normal(B, T, Hk, K, seed=2) + shift).to(dtype),
        "v": normal(B, T, Hk, V, seed=3).to(dtype),
        "log_decay": {"token": -normal(B, T, Hk).abs() / 100, "head": ht.decay(Hk), None: None}[decay],
    }
    if state:
        p["initial_state"] = normal(N, Hk, D, V)
        if normalize:
            p["initial_sum_of_keys"] = phi(normal(N, Hk, K, seed=4) + 1, degree)
    if sequences:
        p["cu_seqlens"] = torch.tensor(sequences)
    return p, {"degree": degree, **options}


def leaves(p, names=INPUTS, dtype=None):
    """The same inputs as leaves that require grad."""
    return {
        name: x.detach().to(dtype or x.dtype).clone().requires_grad_() if name in names and x is not None else x
        for name, x in p.items()
    }


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    if expected.numel():
        actual, expected = actual.detach().double(), expected.detach().double()
        error = ((actual - expected).square().mean() / expected.square().mean().clamp(min=1e-300)).sqrt().item()
        assert error <= tolerance, f"relative RMS {error:.2e}, expected at most {tolerance:.0e}"


def check(p, options, dtype=torch.float32):
    """Values and every gradient of ht.retention with all results, against the formula's."""
    mine, exact = leaves(p), leaves(p, dtype=torch.float64)
    formula = {name: x for name, x in options.items() if name in ("scale", "degree", "normalize")}
    expected = retention(**exact, **formula)
    results = ht.retention(**mine, **options, return_state=True)
    expected = expected[: len(results)]
    assert results[0].dtype == dtype and all(x.dtype == torch.float32 for x in results[1:])
    assert_close(results[0], expected[0], OUT[dtype])
    for actual, wanted in zip(results[1:], expected[1:], strict=True):
        assert_close(actual, wanted, OUT[torch.float32])
    weights = [normal(*x.shape, seed=10 + n).to(x.dtype) for n, x in enumerate(results)]
    torch.autograd.backward(results, weights)
    used = [(x, w.double()) for x, w in zip(expected, weights, strict=True) if x.requires_grad]  # of no tokens: not all
    torch.autograd.backward(*zip(*used, strict=True))
    for name in INPUTS:
        if mine.get(name) is not None:
            wanted = torch.zeros_like(exact[name]) if exact[name].grad is None else exact[name].grad
            assert mine[name].grad.dtype == mine[name].dtype
            rounded = name in "qkv" or len(results) == 3  # normalized: gradients come from out as it is kept, rounded
            assert_close(mine[name].grad, wanted, GRADIENT[dtype if rounded else torch.float32])


# ---- Retention: values and gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [None, "head", "token"])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("degree, normalize", [(1, False), (1, True), (2, True), (2, False), (3, True)])
def test_gradients(degree, normalize, state, decay):
    check(*problem(K=5, V=7, degree=degree, normalize=normalize, state=state, decay=decay, chunk_size=16))


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("form", ["auto", "parallel", "chunkwise", "recurrent"])
def test_forms(form, degree):
    check(*problem(T=21, degree=degree, form=form, state=degree == 1))


@pytest.mark.parametrize("degree", [1, 2])
def test_groups(degree):
    check(*problem(H=6, Hk=2, K=6, degree=degree, state=True))


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("state", [False, True])
def test_packed_sequences(state, degree):
    check(*problem(B=1, T=70, K=6, degree=degree, state=state, sequences=[0, 33, 33, 70]))


@pytest.mark.parametrize("T", [0, 1])
def test_few_tokens(T):
    check(*problem(T=T, state=True))


@pytest.mark.parametrize("T", [1, 128, 256, 257, 600])
@pytest.mark.parametrize("state_layout", ["kv", "vk"])
def test_states_are_kept_for_gradients(T, state_layout):
    given, _ = problem(T=T, K=6, V=6, state=True)  # of equal sizes: a state in either layout
    lines = []
    holdfast.set_verbose(lines.append)
    for what, needs in (("q", True), ("log_decay", True), ("k", False)):
        lines.clear()
        ht.retention(**leaves(given, (what,)), state_layout=state_layout).square().sum().backward()
        kept = needs and state_layout == "kv" and T > 256
        assert (", states every 256 tokens" in lines[0], ", given every 256" in lines[1]) == (kept, kept), lines
    lines.clear()
    with torch.no_grad():
        ht.retention(**leaves(given, ("q",)))
    assert "states every" not in lines[0]


def test_tuned_sizes():
    check(*problem(B=1, T=300, H=2, Hk=1, K=64, V=64, state=True))


@pytest.mark.parametrize("scale", [1, -0.25])
def test_scale(scale):
    check(*problem(scale=scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("degree", [1, 2])
def test_16_bits(dtype, degree):
    check(*problem(degree=degree, state=True, dtype=dtype), dtype)


def test_power_retention_is_retention():
    p, _ = problem(degree=2)
    torch.testing.assert_close(ht.retention(**p, degree=2.0), ht.retention(**p, degree=2), rtol=0, atol=0)
    torch.testing.assert_close(ht.power_retention(**p), ht.retention(**p, degree=2), rtol=0, atol=0)
    out, state, sum_of_keys = ht.power_retention(**p, degree=3, return_state=True)
    assert state.shape[2] == sum_of_keys.shape[2] == ht.state_size(8, 3) == 120
    arrays = {name: x.numpy() for name, x in p.items()}
    np.testing.assert_array_equal(holdfast.power_retention(**arrays), ht.power_retention(**p).numpy())
    plain = ht.power_retention(**p, normalize=False)
    torch.testing.assert_close(plain, ht.retention(**p, degree=2, normalize=False), rtol=0, atol=0)


@pytest.mark.parametrize("expansion", ["tight", "tiled"])
def test_layouts_of_states(expansion):
    p, options = problem(K=16, degree=2)
    out, state, sums = ht.retention(**p, **options, return_state=True, expansion=expansion)
    turned = ht.retention(**p, **options, return_state=True, expansion=expansion, state_layout="vk")
    torch.testing.assert_close(turned[1].mT, state)
    assert state.shape[2] == sums.shape[2] == ht.state_size(16, 2, expansion)

    def last(state, layout):  # a function of the state alone
        later = {name: x[:, :3] if name != "log_decay" else None for name, x in p.items()}
        return ht.retention(
            **later, **options, initial_state=state, initial_sum_of_keys=sums, state_layout=layout, expansion=expansion
        ).square().sum()  # fmt: skip

    straight = torch.func.grad(lambda s: last(s, "kv"))(state)
    torch.testing.assert_close(torch.func.grad(lambda s: last(s, "vk"))(turned[1]).mT, straight)


def test_convert_state():
    p, options = problem(K=16, degree=2)
    _, tight, _ = ht.retention(**p, **options, return_state=True)
    _, tiled, _ = ht.retention(**p, **options, return_state=True, expansion="tiled")
    torch.testing.assert_close(ht.convert_state(tiled, 16, "tight"), tight)


def test_weights_have_no_gradient():
    p, options = problem(T=9)
    p = leaves(p)
    out, weights = ht.retention(**p, **options, form="parallel", return_weights=True)
    assert not weights.requires_grad and weights.shape == (2, 2, 9, 9)
    torch.testing.assert_close(torch.einsum("bhij,bjhe->bihe", weights, p["v"]), out)
    out.sum().backward()


def test_only_gradients_that_are_needed(monkeypatch):
    asked = []
    backward = holdfast.retention_backward
    monkeypatch.setattr(
        holdfast,
        "retention_backward",
        lambda dout, *a, wanted, **o: (
            asked.append(wanted if dout is not None else ("state", *wanted)) or backward(dout, *a, wanted=wanted, **o)
        ),
    )
    p, options = problem(state=True)
    for names in (("k",), ("log_decay", "q"), ("initial_state",), INPUTS[:5]):
        mine = leaves(p, names)
        ht.retention(**mine, **options).sum().backward()
        assert asked.pop() == tuple(name for name in INPUTS if name in names) and not asked
    out, state = ht.retention(**leaves(p, ("v",)), **options, return_state=True)
    state.sum().backward()  # of the state alone
    assert asked == [("state", "v")]


def test_gradient_of_the_state_alone():
    p, options = problem(state=True)
    mine, exact = leaves(p), leaves(p, dtype=torch.float64)
    ht.retention(**mine, **options, return_state=True)[1].square().sum().backward()
    retention(**exact)[1].square().sum().backward()
    for name in ("k", "v", "log_decay", "initial_state"):
        assert_close(mine[name].grad, exact[name].grad, GRADIENT[torch.float32])
    assert not mine["q"].grad.any()


def test_views_in_and_gradients_of_any_strides():
    p, options = problem()
    heads_first = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in p.items()}
    expected = ht.retention(**p, **options)
    torch.testing.assert_close(ht.retention(**heads_first, **options), expected, rtol=0, atol=0)
    mine, again = leaves(p), leaves(p)
    ht.retention(**mine, **options).sum().backward()  # strides of 0
    out = ht.retention(**again, **options)
    out.backward(torch.ones(*out.shape[:2], out.shape[3], out.shape[2]).mT)
    for name in ("q", "k", "v", "log_decay"):
        torch.testing.assert_close(mine[name].grad, again[name].grad, rtol=0, atol=0)


def test_results_are_new_tensors():
    p, options = problem(T=0, state=True)
    out, state = ht.retention(**p, **options, return_state=True)
    torch.testing.assert_close(state, p["initial_state"], rtol=0, atol=0)
    assert state.data_ptr() != p["initial_state"].data_ptr()


# ---- A step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step(degree, dtype):
    p, options = problem(H=4, Hk=2, T=12, degree=degree, dtype=dtype)
    out, *states = ht.retention(**p, **options, return_state=True)
    mine = [torch.zeros_like(x) for x in states]
    for t in range(12):
        token = ht.retention_step(p["q"][:, t], p["k"][:, t], p["v"][:, t], p["log_decay"][:, t], *mine, degree=degree)
        assert token.dtype == dtype
        assert_close(token, out[:, t], 2 * OUT[dtype])
    for x, expected in zip(mine, states, strict=True):
        assert_close(x, expected, OUT[torch.float32])


@pytest.mark.parametrize("expansion", ["tight", "tiled"])
def test_layouts_of_a_steps_state(expansion):
    p, _ = problem(K=16, T=1, degree=2)
    token = [p[name][:, 0] for name in ("q", "k", "v", "log_decay")]
    _, state, sums = ht.power_retention(**p, return_state=True, state_layout="vk", expansion=expansion)
    mine, mine_sums = torch.zeros_like(state), torch.zeros_like(sums)
    ht.retention_step(*token, mine, mine_sums, degree=2, state_layout="vk", expansion=expansion)
    torch.testing.assert_close(mine, state)
    torch.testing.assert_close(mine_sums, sums)
    arrays = [np.zeros_like(x) for x in (state, sums)]
    holdfast.retention_step(*token, *arrays, degree=2, state_layout="vk", expansion=expansion)
    np.testing.assert_array_equal(arrays[0], mine.numpy())


def test_a_step_is_seen_by_autograd():
    p, options = problem(T=1, state=True)
    state = p["initial_state"]
    out = ht.retention(**leaves(p, ("q",)), **options)  # keeps the state
    ht.retention_step(p["q"][:, 0], p["k"][:, 0], p["v"][:, 0], None, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_step_has_no_gradient():
    p, _ = problem(T=1, state=True)
    token = {name: p[name][:, 0] for name in ("q", "k", "v", "log_decay")}
    token["state"] = p["initial_state"]
    for name in token:
        mine = leaves(token, (name,))
        with pytest.raises(NotImplementedError, match=rf"^{name} requires grad, and retention_step"):
            ht.retention_step(**mine)
        with torch.no_grad():
            ht.retention_step(**mine)
    with torch.inference_mode():
        ht.retention_step(**{name: x.clone() for name, x in token.items()})


# ---- Rotation, norm and gate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("positions", [None, "each", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate(interleaved, positions, dtype):
    x, theta = normal(2, 5, 3, 8, dtype=dtype), ht.theta(8)
    where = {"offset": 100} if positions is None else {"positions": torch.arange(10 if positions == "batch" else 5) * 7}
    if positions == "batch":
        where["positions"] = where["positions"].reshape(2, 5)
    mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    out = ht.rotate(mine, theta, interleaved=interleaved, **where)
    expected = rotated(exact, theta, interleaved=interleaved, **where)
    assert_close(out, expected, OUT[dtype])
    dout = normal(*out.shape, seed=10, dtype=dtype)
    out.backward(dout)
    expected.backward(dout.double())
    assert_close(mine.grad, exact.grad, OUT[dtype])


def test_rotate_twice_differentiable():
    x, theta = normal(1, 3, 1, 4).requires_grad_(), ht.theta(4)
    (dx,) = torch.autograd.grad(ht.rotate(x, theta, 5).pow(3).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.square().sum(), x)
    y = x.detach().double().requires_grad_()
    (dy,) = torch.autograd.grad(rotated(y, theta, 5).pow(3).sum(), y, create_graph=True)
    (ddy,) = torch.autograd.grad(dy.square().sum(), y)
    assert_close(ddx, ddy, GRADIENT[torch.float32])


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("weight", [None, (8,), (3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_head_norm_gate(norm, gated, weight, dtype):
    p = {"x": normal(2, 5, 3, 8, dtype=dtype)}
    if gated:
        p["gate"] = normal(2, 5, 3, 8, seed=1, dtype=dtype)
    if weight:
        p["weight"] = normal(*weight)
    mine, exact = leaves(p, tuple(p)), leaves(p, tuple(p), torch.float64)
    out, expected = ht.head_norm_gate(**mine, norm=norm, eps=1e-3), normed(**exact, norm=norm, eps=1e-3)
    assert out.dtype == dtype
    assert_close(out, expected, OUT[dtype])
    dout = normal(*out.shape, seed=10, dtype=dtype)
    out.backward(dout)
    expected.backward(dout.double())
    for name in p:
        assert mine[name].grad.dtype == mine[name].dtype
        assert_close(mine[name].grad, exact[name].grad, GRADIENT[mine[name].dtype])


# ---- Derivatives as PyTorch takes them ------------------------------------------------------------------------------


def gradcheck(call, p):
    """torch.autograd.gradcheck of call(**p) by every tensor of floating point. Differences of fp32 results at points
    2 eps apart, divided by that, are off by 1e-7 / eps, and by eps^2 where a function is curved: 3e-5 both. The
    tolerance leaves room for a few terms, and sees a hundredth of a gradient (the test below)."""
    names = [name for name, x in p.items() if x.is_floating_point()]
    others = {name: x for name, x in p.items() if name not in names}
    leaves = [p[name].clone().requires_grad_() for name in names]

    def of_leaves(*leaves):
        return call(**dict(zip(names, leaves, strict=True)), **others)

    return torch.autograd.gradcheck(of_leaves, leaves, eps=5e-3, atol=1e-3, rtol=1e-3)


def tiny(**changes):
    """A problem for hundreds of calls. Decays stay below 0, and sums of weights above it, when eps is added."""
    p, options = problem(**{"B": 1, "T": 3, "K": 2, "V": 2, "state": True, **changes})
    p = {name: x for name, x in p.items() if x is not None}
    if "log_decay" in p:
        p["log_decay"] = 10 * p["log_decay"] - 0.1
    if changes.get("normalize"):
        p |= {name: p[name].abs() + 0.5 for name in ("q", "k", "initial_sum_of_keys")}
    return p, options


in_fp32 = pytest.mark.filterwarnings("ignore:Input #.* requires gradient and is not a double precision")


@in_fp32
@pytest.mark.parametrize(
    "changes",
    [
        {"decay": None, "H": 4}, {"decay": "head"}, {"form": "parallel"}, {"form": "recurrent", "scale": -0.7},
        {"normalize": True}, {"degree": 2}, {"degree": 2, "normalize": False, "chunk_size": 2}, {"degree": 3, "T": 2},
        {"sequences": [0, 2, 2, 3], "chunk_size": 1},
    ],
    ids=str,
)  # fmt: skip
def test_gradcheck(changes):
    p, options = tiny(**changes)
    assert gradcheck(lambda **p: ht.retention(**p, **options, return_state=True), p)


@in_fp32
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_gradcheck_of_what_stands_around(norm):
    p = {"x": normal(1, 2, 2, 4), "gate": normal(1, 2, 2, 4, seed=1), "weight": normal(2, 4)}
    assert gradcheck(lambda **p: ht.head_norm_gate(**p, norm=norm, eps=0.1), p)
    assert gradcheck(lambda x: ht.rotate(x, ht.theta(4), 5, norm == "rms"), {"x": p["x"]})


@in_fp32
@pytest.mark.parametrize("name", INPUTS)
def test_gradcheck_sees_a_wrong_gradient(name, monkeypatch):
    """One that is a hundredth too large."""
    backward = holdfast.retention_backward

    def wrong(*arguments, **options):
        gradients = backward(*arguments, **options)
        return gradients._replace(**{name: 1.01 * getattr(gradients, name)})

    monkeypatch.setattr(holdfast, "retention_backward", wrong)
    p, options = tiny(degree=2)
    message = rf"Jacobian mismatch for output \d with respect to input {list(p).index(name)},"
    with pytest.raises(RuntimeError, match=message):
        gradcheck(lambda **p: ht.retention(**p, **options, return_state=True), p)


@pytest.mark.parametrize("degree", [1, 2])
def test_func(degree):
    p, options = problem(T=9, degree=degree)
    inputs = tuple(p[name] for name in ("q", "k", "v", "log_decay"))
    exact = tuple(x.double() for x in inputs)

    def loss(q, k, v, log_decay, of=ht.retention):
        result = of(q, k, v, log_decay, **options)
        return (result[0] if of is retention else result).square().sum()

    everything = (0, 1, 2, 3)
    expected = torch.func.grad(lambda *x: loss(*x, of=retention), everything)(*exact)
    for actual, wanted in zip(torch.func.grad(loss, everything)(*inputs), expected, strict=True):
        assert_close(actual, wanted, GRADIENT[torch.float32])
    out, pull = torch.func.vjp(lambda *x: ht.retention(*x, **options), *inputs)
    for actual, wanted in zip(pull(2 * out), expected, strict=True):
        assert_close(actual, wanted, GRADIENT[torch.float32])


def test_func_grad_of_what_stands_around():
    x, gate, theta = normal(1, 4, 2, 8), normal(1, 4, 2, 8, seed=1), ht.theta(8)
    actual = torch.func.grad(lambda x, g: ht.head_norm_gate(ht.rotate(x, theta), g).square().sum(), (0, 1))(x, gate)
    expected = torch.func.grad(lambda x, g: normed(rotated(x, theta), g).square().sum(), (0, 1))(
        x.double(), gate.double()
    )
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, GRADIENT[torch.float32])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_func_vmap():
    p, options = problem(B=3, T=5, state=True)
    inputs = tuple(p[name] for name in ("q", "k", "v"))

    def one(q, k, v, log_decay=p["log_decay"][0]):
        return ht.retention(q[None], k[None], v[None], log_decay[None], **options)[0]

    each = torch.stack([one(*x) for x in zip(*inputs, strict=True)])
    torch.testing.assert_close(torch.func.vmap(one)(*inputs), each)
    per_sample = torch.func.vmap(torch.func.grad(lambda *x: one(*x).square().sum()))(*inputs)
    mine = leaves(p)
    sum(one(*x).square().sum() for x in zip(*(mine[name] for name in ("q", "k", "v")), strict=True)).backward()
    torch.testing.assert_close(per_sample, mine["q"].grad)


def test_func_grad_within_compile():
    p, options = problem(T=5)

    def loss(q):
        return ht.retention(q, p["k"], p["v"], p["log_decay"], **options).square().sum()

    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p["q"]), torch.func.grad(loss)(p["q"]))
    torch._dynamo.reset()


def tangent(f, *inputs):
    """The derivative of f along ones, by torch.autograd.forward_ad."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*(forward_ad.make_dual(x, torch.ones_like(x)) for x in inputs))).tangent


grad, jvp = torch.func.grad, torch.func.jvp
along = {"func": lambda f: lambda x: jvp(f, (x,), (torch.ones_like(x),))[1], "dual": lambda f: lambda x: tangent(f, x)}


def of_square(f):
    return lambda x: f(x).square().sum()


SECOND = {  # of a function that has one value
    "grad of grad": lambda f: grad(of_square(grad(f))),
    "hessian": torch.func.hessian,
    "jacrev of grad": lambda f: torch.func.jacrev(grad(f)),
    "jacfwd of jacfwd": lambda f: torch.func.jacfwd(torch.func.jacfwd(f)),
    "grad of jvp": lambda f: grad(along["func"](f)),
    "jvp of grad": lambda f: along["func"](grad(f)),
    "jvp of jvp": lambda f: along["func"](along["func"](f)),
    "dual of grad": lambda f: along["dual"](grad(f)),
}
FORWARD = {**along, "jacfwd": torch.func.jacfwd, "jvp without grad": lambda f: torch.no_grad()(along["func"](f))}


@pytest.mark.parametrize("name", [*SECOND, *FORWARD, "grad of grad of grad"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_rotate_has_all_derivatives(name):
    theta = ht.theta(4)
    known = {**SECOND, **FORWARD, "grad of grad of grad": lambda f: grad(of_square(grad(of_square(grad(f)))))}
    x = normal(1, 3, 2, 4)
    actual = known[name](lambda x: ht.rotate(x, theta, 5).pow(3).sum())(x)
    expected = known[name](lambda x: rotated(x, theta, 5).pow(3).sum())(x.double())
    assert expected.any()
    assert_close(actual, expected, GRADIENT[torch.float32])


def functions():
    """Of one tensor [1, 3, 2, 4], with one value."""
    p, _ = problem(B=1, T=3, K=4, V=4)
    return {
        "retention": lambda x: ht.retention(**{**p, "q": x}).square().sum(),
        "head_norm_gate": lambda x: ht.head_norm_gate(x).pow(3).sum(),
    }


@pytest.mark.parametrize("function", functions())
@pytest.mark.parametrize("name", ["autograd", *SECOND, *FORWARD])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_derivatives_that_are_not_there(name, function):
    """They are errors, and never zeros."""
    f, x = functions()[function], normal(1, 3, 2, 4)
    reverse = f"the gradients of {function} are differentiated, and second derivatives are not implemented"
    with pytest.raises(NotImplementedError, match=f"{reverse}|{function} is differentiated in forward mode"):
        if name == "autograd":
            x.requires_grad_()
            (dx,) = torch.autograd.grad(f(x), x, create_graph=True)
            dx.square().sum().backward()
        else:
            {**SECOND, **FORWARD}[name](f)(x)


@pytest.mark.parametrize("name", ["grad of grad", "func", "hessian"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_derivatives_within_compile(name):
    derivative, theta, x = {**SECOND, **FORWARD}[name], ht.theta(4), normal(1, 3, 2, 4)

    def turned(x):
        return ht.rotate(x, theta, 5).pow(3).sum()

    def compiled(f):
        torch._dynamo.reset()
        return torch.compile(derivative(f), fullgraph=True, backend="aot_eager")

    torch.testing.assert_close(compiled(turned)(x), derivative(turned)(x))
    for f in functions().values():
        with pytest.raises(Exception, match="second derivatives are not implemented|forward mode, which is not impl"):
            compiled(f)(x)
    torch._dynamo.reset()


def test_func_grad_keeps_the_history_of_others():
    """Of tensors that require grad outside of it."""
    p, options = problem(T=5)
    k = p["k"].requires_grad_()
    out, _ = torch.func.vjp(lambda q: ht.retention(**{**p, "q": q}, **options), p["q"])
    out.square().sum().backward()
    (expected,) = torch.autograd.grad(ht.retention(**p, **options).square().sum(), k)
    torch.testing.assert_close(k.grad, expected)
    dq = torch.func.grad(lambda q: ht.retention(**{**p, "q": q}, **options).square().sum())(p["q"])
    with pytest.raises(NotImplementedError, match="the gradients of retention are differentiated"):
        dq.sum().backward()

    theta, x, factor = ht.theta(8), normal(2, 5, 3, 8), normal(2, 5, 3, 8, seed=1).requires_grad_()
    derivatives = []
    for turn, y, z in ((ht.rotate, x, factor), (rotated, x.double(), factor.detach().double().requires_grad_())):
        torch.func.grad(lambda y, z=z, turn=turn: turn(y * z, theta).pow(3).sum())(y).sum().backward()
        derivatives.append(z.grad)
    assert_close(*derivatives, GRADIENT[torch.float32])


def test_func_heeds_no_grad():
    """That within a transform: what is computed there is a constant for it."""
    x, theta = normal(1, 3, 2, 4), ht.theta(4)

    def f(x):
        with torch.no_grad():
            y = ht.rotate(x, theta)
        return (x * y).sum()

    torch.testing.assert_close(grad(f)(x), ht.rotate(x, theta))
    with torch.no_grad():
        torch.testing.assert_close(grad(lambda x: ht.rotate(x, theta)[0, 0, 0, 0])(x)[0, 0, 0], torch.eye(4)[0])


@pytest.mark.parametrize("name", ["q", "state", "log_decay"])
def test_a_step_refuses_tangents_and_vmap(name):
    p, _ = problem(T=1, state=True)
    token = {name: p[name][:, 0] for name in ("q", "k", "v", "log_decay")} | {"state": p["initial_state"]}

    def step(x):
        return ht.retention_step(**{**token, name: x})

    for derivative in along.values():
        with pytest.raises(NotImplementedError, match=f"^{name} has a tangent, and retention_step has no derivative"):
            derivative(step)(token[name])
    with pytest.raises(NotImplementedError, match="^retention_step is called under vmap, which is not implemented"):
        torch.func.vmap(step)(token[name][None])


# ---- torch.library, torch.compile, torch.export, autocast -----------------------------------------------------------


def operators():
    """(operator, arguments) of every operator, as opcheck wants them: it differentiates by what requires grad."""
    p, _ = problem(T=6, K=4, V=3, state=True)
    packed, _ = problem(B=1, T=6, K=4, V=3, H=4, degree=2, state=True, sequences=[0, 2, 6])
    ops, x, gate = torch.ops.holdfast, normal(2, 5, 3, 8), normal(2, 5, 3, 8, seed=1)

    def inputs(p, requires_grad=True):
        p = leaves(p) if requires_grad else p
        return tuple(p.get(name) for name in (*INPUTS, "cu_seqlens"))

    first = (None, 1, False, "auto", None, True, False, "kv", "tight", False)
    weights = (0.5, 1, False, "parallel", 4, False, True, "kv", "tight", False)
    second = (None, 2, True, "chunkwise", 4, True, False, "vk", "tight", False)
    packed_vk = {**packed, "initial_state": packed["initial_state"].mT.contiguous()}
    dout, dstate, dsum = normal(1, 6, 4, 3), normal(2, 2, 3, 10), normal(2, 2, 10)
    some, backward = [True, True, True, False, True, False], (None, 1, False, "auto", None, "kv", "tight")
    out, _, sum_of_keys = ht.power_retention(**packed, return_state=True)
    token = tuple(x[:, 0] for x in inputs(p, False)[:4])
    return {
        "retention": (ops.retention, (*inputs(p), *first)),
        "retention with states": (ops.retention, (*inputs(p), *first[:-1], True)),
        "retention with weights": (ops.retention, (*inputs({**p, "log_decay": None}), *weights)),
        "power retention": (ops.retention, (*inputs(packed_vk), *second)),
        "backward": (
            ops.retention_backward,
            (normal(2, 6, 2, 3), None, None, *inputs(p, False), None, None, *backward, some),
        ),
        "backward with states": (
            ops.retention_backward,
            (normal(2, 6, 2, 3), None, None, *inputs(p, False), None,
             ops.retention(*inputs(p, False), *first[:-1], True)[4], *backward, some),
        ),
        "power backward": (
            ops.retention_backward,
            (dout, dstate, dsum, *inputs(packed_vk, False), out, None, *second[:5], "vk", "tight", 6 * [True]),
        ),
        "step": (ops.retention_step, (*token, p["initial_state"], None, None, 1, False, "kv", "tight")),
        "power step": (
            ops.retention_step,
            (*(x[:, 0] for x in inputs(packed, False)[:4]), packed["initial_state"][:1].clone(),
             sum_of_keys[:1].clone(), None, 2, True, "kv", "tight"),
        ),
        "rotate": (ops.rotate, (x.clone().requires_grad_(), ht.theta(8), 3, True, None)),
        "rotate positions": (ops.rotate, (x.clone().requires_grad_(), ht.theta(8), 0, False, torch.arange(5))),
        "head_norm_gate": (
            ops.head_norm_gate,
            (*leaves({0: x, 1: gate, 2: normal(3, 8)}, (0, 1, 2)).values(), "layer", 1e-5),
        ),
        "head_norm_gate alone": (ops.head_norm_gate, (x.clone().requires_grad_(), None, None, "rms", 1e-5)),
        "norm backward": (
            ops.head_norm_gate_backward,
            (normal(2, 5, 3, 8, seed=2), x, gate, normal(8), "rms", 1e-5, [True, False, True]),
        ),
    }  # fmt: skip


OPERATORS = (
    "retention", "retention with states", "retention with weights", "power retention", "backward",
    "backward with states", "power backward", "step", "power step", "rotate", "rotate positions", "head_norm_gate",
    "head_norm_gate alone", "norm backward",
)  # fmt: skip


def test_all_operators_are_checked():
    assert tuple(operators()) == OPERATORS
    checked = {operator._qualified_op_name for operator, _ in operators().values()}
    assert checked == {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("holdfast::")}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    operator, arguments = operators()[name]
    done = torch.library.opcheck(operator.default, arguments)
    assert set(done.values()) == {"SUCCESS"}


class Layer(torch.nn.Module):
    """A layer of RetNet."""

    def __init__(self, degree=1, size=16, heads=2):
        super().__init__()
        self.degree, self.heads = degree, heads
        self.project = torch.nn.Linear(size, 4 * size, bias=False)
        self.back = torch.nn.Linear(size, size, bias=False)
        self.weight = torch.nn.Parameter(torch.ones(size // heads))
        self.register_buffer("theta", ht.theta(size // heads))
        self.register_buffer("log_decay", ht.decay(heads))

    def projected(self, x, offset=0):
        q, k, v, gate = self.project(x).unflatten(-1, (4, self.heads, -1)).unbind(-3)
        return ht.rotate(q, self.theta, offset), ht.rotate(k, self.theta, offset), v, gate

    def forward(self, x):
        q, k, v, gate = self.projected(x)
        out = ht.retention(q, k, v, self.log_decay, degree=self.degree)
        return self.back(ht.head_norm_gate(out, gate, self.weight).flatten(-2))

    def step(self, x, state, offset):
        q, k, v, gate = self.projected(x, offset)
        out = ht.retention_step(q[:, 0], k[:, 0], v[:, 0], self.log_decay, state)
        return self.back(ht.head_norm_gate(out[:, None], gate, self.weight).flatten(-2))


@pytest.fixture
def layer():
    torch.manual_seed(0)
    yield Layer
    torch._dynamo.reset()


def gradients(module, x, call=None):
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = (module if call is None else call)(x)
    out.float().square().sum().backward()
    return [out, x.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(layer, backend, degree):
    module = layer(degree)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for T in (12, 20):  # another T: with sizes that are symbols
        x = normal(2, T, 16)
        for actual, expected in zip(gradients(module, x, compiled), gradients(module, x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_compiled_autograd(layer):
    x, theta = normal(1, 300, 2, 8), ht.theta(8)

    def loss(x):
        turned = ht.rotate(x, theta)
        return ht.head_norm_gate(ht.retention(turned, turned, x), x).square().sum()

    expected, actual = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss(expected).backward()
    y = loss(actual)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: y.backward(), backend="aot_eager")()
    torch.testing.assert_close(actual.grad, expected.grad)


def test_compile_step(layer):
    module = layer()
    x, state, expected_state = normal(2, 6, 16), torch.zeros(2, 2, 8, 8), torch.zeros(2, 2, 8, 8)
    compiled = torch.compile(module.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for t in range(6):
            out = compiled(x[:, t : t + 1], state, t)
            torch.testing.assert_close(out, module.step(x[:, t : t + 1], expected_state, t))
            torch.testing.assert_close(state, expected_state)
        torch.testing.assert_close(out, module(x)[:, 5:], rtol=1e-4, atol=1e-5)


def test_compile_helpers():
    compiled = torch.compile(
        lambda x: x[: ht.state_size(2, 2)] * ht.decay(3) + ht.theta(6), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(torch.ones(5)), ht.decay(3) + ht.theta(6))


def test_export(layer):
    module, x = layer(2), normal(2, 12, 16)
    exported = torch.export.export(module, (x,), dynamic_shapes=({1: torch.export.Dim("T", min=2, max=64)},))
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert {"holdfast.rotate.default", "holdfast.retention.default", "holdfast.head_norm_gate.default"} <= names
    for T in (12, 31):
        y = normal(2, T, 16)
        torch.testing.assert_close(exported.module()(y), module(y))

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = module

        def forward(self, x, state):
            return self.layer.step(x, state, 0)

    module, state = layer(), torch.zeros(2, 2, 8, 8)
    with torch.no_grad():
        exported = torch.export.export(Step(), (x[:, :1], state)).run_decompositions({})
        out = exported.module()(x[:, :1], state)
        torch.testing.assert_close(out, module(x[:, :1]))
    assert state.any()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("degree", [1, 2])
def test_autocast(layer, degree, compiled):
    module, x = layer(degree), normal(2, 12, 16)
    call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    seen = []
    holdfast.set_verbose(seen.append)
    with torch.autocast("cpu", torch.bfloat16):
        mine = gradients(module, x, call)
    kernels = [line for line in seen if line.startswith(("forward", "retention"))] or seen
    assert any("bf16" in line for line in kernels)
    assert mine[0].dtype == torch.bfloat16 and mine[1].dtype == torch.float32
    for actual, expected in zip(mine, gradients(module, x), strict=True):
        assert_close(actual, expected, 0.05)  # of several products in bf16


def test_autocast_casts_what_is_float32_always():
    p, options = problem(degree=2, state=True)
    expected = ht.retention(**{n: x.bfloat16() if n in "qkv" else x for n, x in p.items()}, **options)
    mixed = {**p, "q": p["q"].bfloat16(), "initial_state": p["initial_state"].double()}
    token = [p[name][:, 0] for name in ("q", "k", "v")]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ht.retention(**mixed, **options), expected, rtol=0, atol=0)
        out = ht.retention_step(*token, p["log_decay"][:, 0].double(), torch.zeros(2, 2, 8, 6))
        gated = ht.head_norm_gate(p["v"], p["v"].bfloat16(), torch.ones(6).bfloat16())
        turned = ht.rotate(p["q"], ht.theta(8).double())
    assert out.dtype == torch.bfloat16 and gated.dtype == turned.dtype == torch.float32
    with pytest.raises(NotImplementedError, match="k has dtype"):
        ht.retention(**{**p, "k": p["k"].double()}, **options)


def test_meta_tensors():
    q, state = torch.empty(2, 5, 4, 8, device="meta", dtype=torch.float16), torch.empty(2, 2, 8, 8, device="meta")
    out, final = ht.retention(q, q[:, :, :2], q[:, :, :2], initial_state=state, return_state=True)
    assert out.device.type == "meta" and out.dtype == torch.float16 and out.shape == q.shape
    assert final.shape == state.shape and final.dtype == torch.float32


def test_training_reaches_the_formulas_losses(layer):
    """Ten steps of a layer, and of the same with formulas for operators."""

    class Formula(Layer):
        def forward(self, x):
            q, k, v, gate = self.project(x).unflatten(-1, (4, self.heads, -1)).unbind(-3)
            q, k = rotated(q, self.theta), rotated(k, self.theta)
            out = retention(q, k, v, self.log_decay)[0]
            return self.back(normed(out, gate, self.weight).flatten(-2))

    mine, exact = layer(), Formula().double()
    exact.load_state_dict(mine.state_dict())
    x, y = normal(2, 30, 16), normal(2, 30, 16, seed=1)
    losses = []
    for module, given, wanted in ((mine, x, y), (exact, x.double(), y.double())):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            loss = (module(given) - wanted).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    np.testing.assert_allclose(losses[:10], losses[10:], rtol=1e-5)
    assert losses[9] < losses[0]


def all_of_them(p, options, move):
    """(values, gradients) of every operator, of tensors that `move` has moved."""
    values, gradients = [], []

    def differentiate(call, p, names):
        p = leaves(p, names)
        results = call(**p)
        results = results if isinstance(results, tuple) else (results,)
        values.extend(results)
        seeds = [move(normal(*x.shape, seed=10 + n)) for n, x in enumerate(results)]
        gradients.extend(torch.autograd.grad(results, [p[name] for name in names], seeds))

    p = {name: move(x) for name, x in p.items()}
    theta, weight = move(ht.theta(8)), move(normal(8))
    differentiate(lambda **p: ht.retention(**p, **options, return_state=True), p, [x for x in INPUTS if x in p])
    differentiate(lambda x: ht.rotate(x, theta, 5), {"x": p["q"]}, ["x"])
    differentiate(ht.head_norm_gate, {"x": p["q"], "gate": p["k"], "weight": weight}, ["x", "gate", "weight"])
    states = [move(p[name]) for name in INPUTS[4:] if name in p]
    token = [p[name][:, 0] for name in INPUTS[:4]]
    values += [ht.retention_step(*token, *states, degree=options["degree"]), *states]
    return values, gradients


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("degree", [1, 2])
def test_cuda(degree):
    """In the current stream, forward and back: inputs get there late in it, so that another one would find NaN."""
    p, options = problem(degree=degree, state=True)

    def on_gpu(x):
        there = torch.full_like(x, math.nan, device="cuda")
        torch.cuda._sleep(2_000_000)  # cycles
        return there.copy_(x if x.is_cuda else x.pin_memory(), non_blocking=True)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        actual = all_of_them(p, options, on_gpu)
    stream.synchronize()
    expected = all_of_them(p, options, torch.clone)
    for mine, exact, tolerance in zip(actual, expected, (OUT, GRADIENT), strict=True):
        for x, wanted in zip(mine, exact, strict=True):
            assert x.is_cuda
            assert_close(x.cpu(), wanted, tolerance[torch.float32])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("K, V", [(64, 64), (128, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tuned_on_cuda(K, V, dtype):
    """Of 16 bits, on tensor cores."""
    name = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    of_any_size = (K, V, dtype) == (128, 256, torch.float32)  # none was tuned
    expected = f"chunkwise_{name}_c32_k0_v0_cuda" if of_any_size else f"chunkwise_{name}_c64_k{K}_v{V}_cuda"
    if expected not in [variant["name"] for variant in holdfast.info()["variants"]]:
        pytest.skip(f"this build has no {expected}")
    p, options = problem(B=1, T=200, K=K, V=V, state=True, dtype=dtype)
    lines = []
    holdfast.set_verbose(lines.append)
    there = {key: x.cuda() for key, x in p.items()}
    out, state = ht.retention(**there, **options, return_state=True)
    assert f" {expected} " in lines[0], lines
    exact, exact_state, _ = retention(**{key: x.double() for key, x in p.items()})
    assert_close(out.cpu(), exact, OUT[dtype])
    assert_close(state.cpu(), exact_state, STATE)


# ---- Errors ---------------------------------------------------------------------------------------------------------


def ones(*shape):
    return torch.ones(shape)


@pytest.mark.parametrize(
    "error, text, changes",
    [
        (TypeError, "q is of type ndarray; expected a torch.Tensor", {"q": np.ones((2, 5, 2, 8), np.float32)}),
        (TypeError, "log_decay is of type float; expected a torch.Tensor, or None", {"log_decay": 0.5}),
        (ValueError, "q has 3 dimensions; expected 4, [B, T, H, K]", {"q": ones(2, 5, 8)}),
        (ValueError, "v has 3 dimensions; expected 4, [B, T, Hk, V]", {"v": ones(2, 5, 8)}),
        (ValueError, "k [B, T, Hk, K] has Hk = 4; expected a divisor of 2, the H of q", {"k": ones(2, 5, 4, 8)}),
        (ValueError, "v [B, T, Hk, V] has T = 4; expected 5", {"v": ones(2, 4, 2, 6)}),
        (ValueError, "k has stride 8 on its last axis", {"k": ones(2, 5, 8, 8)[..., :2].mT}),
        (ValueError, "log_decay[0, 0, 0] is 1; expected a number <= 0", {"log_decay": ones(2, 5, 2)}),
        (ValueError, "initial_state [N, Hk, D, V] has D = 7; expected 8", {"initial_state": ones(2, 2, 7, 6)}),
        (NotImplementedError, "q has dtype float64; expected float32, float16", {"q": ones(2, 5, 2, 8).double()}),
        (NotImplementedError, "log_decay has dtype bfloat16; expected float32", {"log_decay": -ones(2).bfloat16()}),
        (ValueError, "form is 'fast'; expected one of 'auto'", {"form": "fast"}),
        (ValueError, "degree is 5; expected 1, 2, 3 or 4", {"degree": 5}),
        (ValueError, "degree is tensor([1, 2]); expected 1, 2, 3 or 4", {"degree": torch.tensor([1, 2])}),
        (ValueError, "normalize is 'yes'; expected one of", {"normalize": "yes"}),
        (ValueError, "state_layout is 'vv'; expected one of 'kv', 'vk'", {"state_layout": "vv"}),
        (ValueError, "expansion is 'loose'; expected one of 'tight', 'tiled'", {"expansion": "loose"}),
        (ValueError, "return_state is 1; expected False or True", {"return_state": 1}),
        (ValueError, "return_weights is True and form is 'auto'; expected 'parallel'", {"return_weights": True}),
        (TypeError, "scale is of type str; expected a number", {"scale": "1"}),
        (ValueError, "scale is 0; expected", {"scale": 0}),
        (ValueError, "scale is 1e+39; expected", {"scale": 1e39}),
        (ValueError, "chunk_size is 0; expected at least 1, or None", {"chunk_size": 0}),
        (TypeError, "chunk_size is of type float; expected an int, or None", {"chunk_size": 2.5}),
        (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 5])}),
        (ValueError, "cu_seqlens [N + 1] has N + 1 = 0; expected at least 2",
         {"cu_seqlens": torch.zeros(0, dtype=torch.int64)}),
        (ValueError, "cu_seqlens has 0 dimensions; expected 1, [N + 1]", {"cu_seqlens": torch.tensor(5)}),
    ],
)  # fmt: skip
def test_errors(error, text, changes):
    p, _ = problem(T=5)
    with pytest.raises(error) as caught:
        ht.retention(**{**p, **changes})
    assert type(caught.value) is error and text in str(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "kind, text",
    [
        ("strided", "nested"),
        ("jagged", "nested"),
        ("sparse_coo", "of layout torch.sparse_coo"),
    ],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensors_that_are_no_arrays(kind, text, requires_grad):
    x = ones(2, 5, 2, 8)
    if kind == "sparse_coo":
        odd = x.to_sparse().requires_grad_(requires_grad)
    else:
        parts, layout = [ones(5, 2, 8), ones(3, 2, 8)], getattr(torch, kind)
        odd = torch.nested.nested_tensor(parts, layout=layout, requires_grad=requires_grad)
    calls = {
        "q": lambda: ht.retention(odd, odd, odd),
        "k": lambda: ht.retention(x, odd, x),
        "log_decay": lambda: ht.retention(x, x, x, odd),
        "state": lambda: ht.retention_step(x[0], x[0], x[0], None, odd),
        "x": lambda: ht.rotate(odd, ht.theta(8)),
        "gate": lambda: ht.head_norm_gate(x, odd),
    }
    for name, call in calls.items():
        with pytest.raises(NotImplementedError) as caught:
            call()
        assert str(caught.value) == f"{name} is {text}; expected a tensor of layout torch.strided, not nested"


def test_chunk_size_beyond_64_bits():
    x = normal(1, 5, 2, 8)
    torch.testing.assert_close(ht.retention(x, x, x, chunk_size=2**70), ht.retention(x, x, x, chunk_size=2**63 - 1))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_wrong_type_is_said_where_states_are_kept_too(name):
    p, _ = problem(T=129)
    for changed in (p[name].double(), p[name].double().requires_grad_(), p[name].int()):
        tensors = {**p, name: changed, "log_decay": p["log_decay"].clone().requires_grad_()}
        with pytest.raises(NotImplementedError) as caught:
            ht.retention(**tensors)
        assert str(caught.value).startswith(f"{name} has dtype {str(changed.dtype)[6:]}; expected float32")


@pytest.mark.parametrize(
    "error, text, call",
    [
        (TypeError, "state is of type NoneType; expected a torch", lambda x: ht.retention_step(x, x, x, x, None)),
        (ValueError, "q has 4 dimensions; expected 3, [B, H, K]", lambda x: ht.retention_step(x, x, x, None, x)),
        (ValueError, "state [B, Hk, D, V] has D = 2; expected 8",
         lambda x: ht.retention_step(x[0], x[0], x[0], None, x)),
        (ValueError, "degree is 0; expected 1", lambda x: ht.retention_step(x[0], x[0], x[0], None, x, degree=0)),
        (TypeError, "theta is of type NoneType; expected a torch.Tensor", lambda x: ht.rotate(x, None)),
        (TypeError, "offset is of type float; expected an int", lambda x: ht.rotate(x, x, 0.5)),
        (ValueError, f"offset is {2**63}; expected an int of 64 bits", lambda x: ht.rotate(x, ht.theta(8), 2**63)),
        (ValueError, f"offset is {-(2**70)}; expected an int", lambda x: ht.rotate(x, ht.theta(8), -(2**70))),
        (ValueError, "interleaved is 2; expected False or True", lambda x: ht.rotate(x, ht.theta(8), 0, 2)),
        (ValueError, "theta", lambda x: ht.rotate(x, ht.theta(6))),
        (ValueError, "x has 3 dimensions; expected 4", lambda x: ht.rotate(x[0], ht.theta(8))),
        (NotImplementedError, "theta requires grad, and rotate has no gradient of it",
         lambda x: ht.rotate(x, ht.theta(8).requires_grad_()).sum().backward()),
        (NotImplementedError, "theta has a tangent, and rotate has no derivative by it",
         lambda x: tangent(lambda theta: ht.rotate(x, theta), ht.theta(8))),
        (NotImplementedError, "state has a tangent, and convert_state has no derivative",
         lambda x: tangent(lambda x: ht.convert_state(x, 16, "tiled"), torch.ones(1, 1, 136, 2))),
        (ValueError, "norm is 'max'; expected 'rms' or 'layer'", lambda x: ht.head_norm_gate(x, norm="max")),
        (TypeError, "eps is of type NoneType; expected a number", lambda x: ht.head_norm_gate(x, eps=None)),
        (ValueError, "eps is -1", lambda x: ht.head_norm_gate(x, eps=-1)),
        (NotImplementedError, "weight has dtype float16; expected float32",
         lambda x: ht.head_norm_gate(x, None, x[0, 0, 0].half())),
        (NotImplementedError, "requires grad; expected q.detach(), or holdfast.torch",
         lambda x: holdfast.retention(x.clone().requires_grad_(), x, x)),
    ],
)  # fmt: skip
def test_errors_of_the_others(error, text, call):
    with pytest.raises(error) as caught:
        call(ones(2, 2, 2, 8))
    assert type(caught.value) is error and text in str(caught.value)


def test_without_what_is_private_of_pytorch():
    """Gradients then come by torch.library.register_autograd."""
    script = """
import sys, torch
sys.modules["torch._functorch.utils"] = None
import holdfast.torch as ht
assert ht._SingleLevelFunction is None
q, gate = (torch.linspace(-1, 2, 24).reshape(1, 3, 2, 4).requires_grad_() for _ in range(2))
theta = ht.theta(4)
out = ht.head_norm_gate(ht.retention(ht.rotate(q, theta), ht.rotate(q, theta), q, ht.decay(2)), gate)
out.square().sum().backward()
print([*q.grad.flatten().tolist(), *gate.grad.flatten().tolist()])
functions = [lambda x: ht.retention(x, x, x), ht.head_norm_gate, lambda x: ht.rotate(x, theta)]
for f in functions[: 2 if ht._SingleLevelFunction else 3]:
    try:
        torch.func.jvp(f, (q.detach(),), (q.detach(),))
        print("dropped")
    except NotImplementedError as error:
        assert "forward mode" in str(error)
"""
    without = script.replace('sys.modules["torch._functorch.utils"] = None', "").replace("is None", "is not None")
    printed = [
        subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True).stdout
        for text in (script, without)
    ]
    assert printed[0] == printed[1] and len(printed[0].split(",")) == 48


def test_without_pytorch():
    script = """
import sys
sys.modules["torch"] = None
import holdfast, numpy
holdfast.retention(*numpy.ones((3, 1, 2, 1, 4), "f"))
try:
    import holdfast.torch
except ModuleNotFoundError as error:
    print(error)
"""
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert printed == "holdfast.torch needs PyTorch, which is not installed: pip install 'holdfast[torch]'\n"
