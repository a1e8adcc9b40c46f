"""holdfast.nn: each layer against its formula in float64, values and gradients; its forms, states and packed sequences
against each other."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from holdfast import nn as hn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

DIM, HEADS, T = 32, 4, 23
# Of outputs, over their root mean square: a few roundings to fp32 behind each other. Of gradients: sums of them.
OUT, GRADIENT = 1e-5, 1e-4
# Where power retention divides by a sum of weights that happens to be small, as it is for the few features of these
# heads, that sum's rounding counts for more.
POWER_OUT = 5e-5

LAYERS = {
    "retnet": lambda: hn.MultiScaleRetention(DIM, HEADS),
    "retnet, layer norm": lambda: hn.MultiScaleRetention(
        DIM,
        HEADS,
        kv_heads=2,
        key_size=16,
        value_size=8,
        norm="layer",
        norm_weight=True,
        decay="linspace",
        conv_width=4,
    ),
    "retnet, bare": lambda: hn.MultiScaleRetention(
        DIM, HEADS, decay="none", rotation=None, norm=None, swish_gate=False
    ),
    "retnet, gate alone": lambda: hn.MultiScaleRetention(DIM, HEADS, rotation="rope", norm=None),
    "gated": lambda: hn.GatedRetention(DIM, HEADS, conv_width=4),
    "gated, groups": lambda: hn.GatedRetention(DIM, HEADS, kv_heads=1, value_size=24, rotation="retnet", chunk_size=5),
    "gated, no gating": lambda: hn.GatedRetention(DIM, HEADS, gating=False, conv_width=2),
    "power": lambda: hn.PowerRetention(DIM, HEADS, conv_width=4),
    "power, groups": lambda: hn.PowerRetention(DIM, HEADS, kv_heads=2, norm="rms", swish_gate=True),
    "power, degree 4": lambda: hn.PowerRetention(DIM, HEADS, degree=4, gating=False, rotation=None),
    "softmax": lambda: hn.SoftmaxAttention(DIM, HEADS, conv_width=3),
    "softmax, groups": lambda: hn.SoftmaxAttention(DIM, HEADS, kv_heads=2, value_size=12, rotation=None),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Of PyTorch: for sizes like these more of them take longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=LAYERS, scope="module")
def layer(request):
    """With weights that leave nothing at a value where it does not show."""
    torch.manual_seed(0)
    made = LAYERS[request.param]()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "conv" in name or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "decay_proj" in name:
                parameter.copy_(torch.randn_like(parameter))
    return made


def inputs(batch: int = 2, length: int = T) -> torch.Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1))


# ---- Formulas --------------------------------------------------------------------------------------------------------


def convolved(conv: hn.CausalConvolution, x: torch.Tensor) -> torch.Tensor:
    weight = conv.weight.to(x.dtype)
    shifted = [F.pad(x, (0, 0, w, 0))[:, : x.shape[1]] for w in range(conv.width)]
    return sum(weight[w] * shifted[w] for w in range(conv.width))


def turned(x: torch.Tensor, convention: str) -> torch.Tensor:
    """By complex multiplication."""
    time, size = torch.arange(x.shape[1], dtype=torch.float64), x.shape[-1]
    pairs = torch.arange(size // 2, dtype=torch.float64)
    exponents = pairs / (size // 2 - 1) if convention == "retnet" else 2 * pairs / size
    turn = torch.polar(torch.ones(1, dtype=torch.float64), time[:, None] * 10000.0**-exponents)[:, None]
    if convention == "retnet":
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
    half = torch.complex(*x.chunk(2, -1)) * turn
    return torch.cat([half.real, half.imag], -1)


def formula(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """y of a copy of the layer in float64, from all T x T weights."""
    h = x if layer.conv is None else convolved(layer.conv, x)
    q = layer.q_proj(h).unflatten(-1, (layer.heads, -1))
    k = layer.k_proj(h).unflatten(-1, (layer.kv_heads, -1))
    v = layer.v_proj(h).unflatten(-1, (layer.kv_heads, -1))
    if layer.rotation:
        q, k = turned(q, layer.rotation), turned(k, layer.rotation)
    group, length = layer.heads // layer.kv_heads, x.shape[1]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    products = torch.einsum("bthd,bshd->bhts", q, k) / layer.key_size**0.5
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    if isinstance(layer, hn.SoftmaxAttention):
        weights = products.masked_fill(~mask, -math.inf).softmax(-1)
        return layer.out_proj(torch.einsum("bhts,bshe->bthe", weights, v).flatten(-2))
    a = torch.zeros(x.shape[0], length, layer.kv_heads, dtype=x.dtype)
    if isinstance(layer, hn.MultiScaleRetention):
        n = torch.arange(layer.kv_heads, dtype=torch.float64)
        if layer.decay == "retnet":
            a = a + torch.log(1 - 2.0 ** (-5 - n))
        elif layer.decay == "linspace":
            ends = [math.log(1 / 32), math.log(1 / 512)]
            a = a + torch.log(1 - torch.linspace(*ends, layer.kv_heads, dtype=torch.float64).exp())
    elif layer.decay_proj is not None:
        n = torch.arange(layer.kv_heads, dtype=torch.float64)
        gamma = 1 - 2.0 ** (-5 - n) if isinstance(layer, hn.GatedRetention) else torch.full_like(n, 0.999)
        a = torch.sigmoid(layer.decay_proj(h) + torch.log(gamma / (1 - gamma))).log()
    total = a.cumsum(1).transpose(1, 2).repeat_interleave(group, 1)
    gaps = (total[..., :, None] - total[..., None, :]).masked_fill(~mask, -math.inf)
    weights = products**layer.degree * gaps.exp()
    out = torch.einsum("bhts,bshe->bthe", weights, v)
    if isinstance(layer, hn.PowerRetention):
        out = out / weights.sum(-1).transpose(1, 2)[..., None]
    if layer.norm == "layer":
        out = out - out.mean(-1, keepdim=True)
    if layer.norm:
        out = out / (out.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    if layer.norm_weight is not None:
        out = out * layer.norm_weight
    if layer.g_proj is not None:
        gate = layer.g_proj(x).unflatten(-1, (layer.heads, -1))
        out = out * gate * torch.sigmoid(gate)
    return layer.out_proj(out.flatten(-2))


def tolerance(layer: torch.nn.Module) -> float:
    return POWER_OUT if isinstance(layer, hn.PowerRetention) else OUT


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"relative RMS {error:.2e}, expected at most {tolerance:.0e}"


def test_formula(layer):
    """Values, and the gradients of the input and of all weights."""
    double = copy.deepcopy(layer).double()
    x = inputs().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y, expected = layer(x), formula(double, x64)
    assert_close(y, expected, tolerance(layer))
    loss = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], loss)
    theirs = torch.autograd.grad(expected, [x64, *double.parameters()], loss.double())
    for gradient, their in zip(gradients, theirs, strict=True):
        assert_close(gradient, their, GRADIENT)


# ---- Forms, states, packed sequences ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("form", ["parallel", "chunkwise", "recurrent"])
def test_forms(layer, form):
    x = inputs()
    expected = layer(x)
    assert_close(layer(x, form=form), expected, tolerance(layer))
    state = layer.new_state(2)
    y = torch.cat([layer(x[:, :9], state, form=form), layer(x[:, 9:], state, form=form)], 1)
    assert_close(y, expected, tolerance(layer))


@torch.no_grad()
def test_states(layer):
    """Pieces of every kind, one token and none among them; the tokens are counted."""
    x = inputs()
    expected = layer(x)
    state, parts, start = layer.new_state(2), [], 0
    for length in (1, 7, 0, 1, 1, 2, T - 12):
        parts.append(layer(x[:, start : start + length], state))
        start += length
    assert start == T and state["position"].tolist() == [T, T]
    assert_close(torch.cat(parts, 1), expected, tolerance(layer))
    assert {x.shape[0] for x in state.values()} == {2}


@torch.no_grad()
@torch.no_grad()
def test_a_state_keeps_no_memory_but_its_own(layer):
    """Nor does it when a long text has come before: what it holds is what it says it is."""
    held = []
    for tokens in (T, 50 * T):
        state = layer.new_state(1)
        layer(torch.ones(1, tokens, DIM), state)
        held.append(sum(x.untyped_storage().nbytes() for x in state.values()))
        assert held[-1] == sum(x.nbytes for x in state.values())
    assert held[0] == held[1] or isinstance(layer, hn.SoftmaxAttention)


def test_one_step_does_not_touch_copies(layer):
    x, state = inputs(), layer.new_state(2)
    layer(x[:, :5], state)
    kept = {name: y.clone() for name, y in state.items()}
    y = layer(x[:, 5:6], state)
    assert torch.equal(layer(x[:, 5:6], {name: y.clone() for name, y in kept.items()}), y)
    assert state["position"].tolist() == [6, 6] and kept["position"].tolist() == [5, 5]


@torch.no_grad()
def test_packed(layer):
    """Three texts, one of them empty, packed in two pieces; then a step of all at once."""
    x = inputs(3, T)
    lengths = [(9, 0, 4), (2, 5, T - 10)]
    expected = [layer(x[n : n + 1, : a + b + 1])[0] for n, (a, b) in enumerate(zip(*lengths, strict=True))]
    state, parts, done = layer.new_state(3), [[], [], []], [0, 0, 0]
    for piece in lengths:
        row = torch.cat([x[n, done[n] : done[n] + length] for n, length in enumerate(piece)])[None]
        y = layer(row, state, cu_seqlens=torch.tensor([0, *piece]).cumsum(0, dtype=torch.int32))
        for n, part in enumerate(y[0].split(list(piece))):
            parts[n].append(part)
            done[n] += piece[n]
    y = layer(torch.stack([x[n, done[n]] for n in range(3)])[:, None], state)
    for n in range(3):
        assert_close(torch.cat([*parts[n], y[n]]), expected[n], tolerance(layer))
    alone = layer(torch.cat([x[0, :9], x[2, :4]])[None], cu_seqlens=torch.tensor([0, 9, 13]))
    assert_close(alone, torch.cat([layer(x[:1, :9]), layer(x[2:, :4])], 1), tolerance(layer))


def test_gradient_through_states(layer):
    """A text in two pieces has the gradients of the whole."""
    x = inputs()
    weights = [p for p in layer.parameters() if p.requires_grad]
    expected = torch.autograd.grad(layer(x).square().sum(), weights)
    state = layer.new_state(2)
    y = torch.cat([layer(x[:, :22], state), layer(x[:, 22:], state)], 1)  # one token is no step in place here
    gradients = torch.autograd.grad(y.square().sum(), weights)
    owners = [name.split(".")[0] for name, _ in layer.named_parameters()]
    for owner in set(owners):  # weight and bias as one: a bias may be a number that has cancelled out
        part = [n for n, name in enumerate(owners) if name == owner]
        ours, whole = (torch.cat([x[n].flatten() for n in part]) for x in (gradients, expected))
        assert_close(ours, whole, GRADIENT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half(layer, dtype):
    """Of a layer that is converted; its constants and states stay in float32, and its copy in float32 is near."""
    converted = copy.deepcopy(layer).to(dtype)
    assert {b.dtype for b in converted.buffers()} <= {torch.float32}
    x = inputs().to(dtype)
    y = converted(x)
    assert y.dtype == dtype
    assert_close(y, copy.deepcopy(converted).float()(x.float()), 3e-2 if dtype == torch.bfloat16 else 4e-3)
    state = converted.new_state(2)
    parts = [converted(x[:, :20], state), *(converted(x[:, t : t + 1], state) for t in range(20, T))]
    assert {s.dtype for s in state.values()} == {torch.float32, torch.int64}
    assert_close(torch.cat(parts, 1), y, 3e-2 if dtype == torch.bfloat16 else 4e-3)


def test_autocast(layer):
    x = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, layer(x), 3e-2)
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    layer.zero_grad()


def test_compile(layer):
    x = inputs()
    torch.compiler.reset()  # it counts the layers before as other versions of this one
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x), OUT)


def test_checkpoint_and_meta(layer):
    """Constants are not in checkpoints, but for the offset of gates, and made where a layer of the meta device gets its
    memory."""
    names = set(layer.state_dict())
    assert not names & {"theta", "log_decay"}
    make = next(make for name, make in LAYERS.items() if set(make().state_dict()) == names)
    with torch.device("meta"):
        empty = make()
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    empty.to_empty(device="cpu")
    made = dict(empty.named_buffers())
    assert all(b.device.type == "cpu" for b in made.values())
    fresh = dict(make().named_buffers())
    assert made.keys() == fresh.keys() and all(torch.equal(made[name], fresh[name]) for name in fresh)


# ---- Single layers ---------------------------------------------------------------------------------------------------


def test_gates_start():
    torch.manual_seed(0)
    power, gated = hn.PowerRetention(DIM, HEADS), hn.GatedRetention(DIM, HEADS)
    h = inputs()
    assert (power._log_decay(h).exp() - 0.999).abs().max() < 5e-4
    expected = 1 - 2.0 ** (-5 - torch.arange(HEADS))
    assert torch.allclose(gated._log_decay(h).exp(), expected.expand(2, T, HEADS), atol=1e-2)
    for layer in (power, gated):  # as nanoGPT initialises a model
        torch.nn.init.zeros_(layer.decay_proj.bias)
    assert (power._log_decay(h).exp() - 0.999).abs().max() < 5e-4


def test_constants():
    layer = hn.MultiScaleRetention(DIM, 8).to(torch.bfloat16)
    expected = torch.log(1 - 2.0 ** (-5 - torch.arange(8, dtype=torch.float64)))
    assert layer.log_decay.double() == pytest.approx(expected, rel=1e-6)  # in bfloat16 gamma would be 1 from head 4 on


GPT = SimpleNamespace(n_embd=DIM, n_head=HEADS, bias=True, dropout=0.0, block_size=64)


@pytest.mark.parametrize("attention", ["power", "gated", "retnet"])
@pytest.mark.parametrize("gating", [True, False])
def test_causal_self_attention(attention, gating):
    """nanoGPT's layer by its formula, but for the weights; and its checkpoint loads."""
    torch.manual_seed(0)
    layer = hn.CausalSelfAttention(GPT, attention, gating=gating)
    theirs = {
        f"{name}.{part}": torch.randn(rows, DIM)[:, 0 if part == "bias" else slice(None)]
        for name, rows in (("c_attn", 3 * DIM), ("c_proj", DIM))
        for part in ("weight", "bias")
    }
    missing, unexpected = layer.load_state_dict(theirs, strict=False)
    gated = gating and attention != "retnet"
    assert not unexpected and set(missing) == ({"c_gate.weight", "c_gate.bias"} if gated else set())
    x = inputs()
    double = copy.deepcopy(layer).double()
    q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in double.c_attn(x.double()).split(DIM, -1))
    weights = (q @ k.mT / (DIM // HEADS) ** 0.5) ** (2 if attention == "power" else 1)
    gamma = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=torch.float64))
    gamma = torch.full_like(gamma, 0.999) if attention == "power" else gamma
    logits = torch.log(gamma / (1 - gamma)).expand(2, T, HEADS)
    if gated:
        logits = logits + double.c_gate(x.double())
    total = F.logsigmoid(logits).cumsum(1).transpose(1, 2)
    if attention == "retnet" or gating:
        weights = weights * (total[..., :, None] - total[..., None, :]).exp()
    weights = weights.tril()
    out = weights @ v
    if attention == "power":
        out = out / weights.sum(-1, keepdim=True)
    else:
        out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    y = layer(x)
    assert_close(y, double.c_proj(out.transpose(1, 2).flatten(-2)), OUT)
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_causal_self_attention_in_nanogpt():
    """Made as nanoGPT makes it, initialised as nanoGPT does, the gates still start near 0.999."""
    config = SimpleNamespace(n_embd=DIM, n_head=HEADS, bias=False, dropout=0.1)
    layer = hn.CausalSelfAttention(config)
    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    assert layer.c_attn.bias is None and layer.resid_dropout.p == 0.1
    gates = torch.sigmoid(layer.c_gate(inputs()) + layer.constants)
    assert (gates - 0.999).abs().max() < 5e-4
    converted = layer.to(torch.bfloat16)
    assert converted.constants.dtype == torch.float32 and converted(inputs().bfloat16()).isfinite().all()


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hn.MultiScaleRetention(30, 4), "dim is 30; expected a multiple of heads, 4"),
        (lambda: hn.MultiScaleRetention(32, 4, kv_heads=3), "kv_heads 3; expected a multiple of kv_heads"),
        (lambda: hn.MultiScaleRetention(32, 0), "heads is 0"),
        (lambda: hn.MultiScaleRetention(36, 4), "key_size is 9; expected an even number"),
        (lambda: hn.MultiScaleRetention(32, 4, norm="group"), "norm is 'group'; expected 'rms', 'layer' or None"),
        (lambda: hn.MultiScaleRetention(32, 4, norm=None, norm_weight=True), "norm_weight is True and norm None"),
        (lambda: hn.MultiScaleRetention(32, 4, decay="xpos"), "decay is 'xpos'"),
        (lambda: hn.GatedRetention(32, 4, rotation="xpos"), "rotation is 'xpos'"),
        (lambda: hn.PowerRetention(32, 4, degree=5), "degree is 5; expected 2, 3 or 4"),
        (lambda: hn.PowerRetention(32, 4, degree=1), "degree is 1; expected 2, 3 or 4"),
        (lambda: hn.GatedRetention(32, 4, conv_width=-3), "conv_width is -3; expected at least 0"),
        (lambda: hn.CausalConvolution(32, 0), "width is 0; expected at least 1"),
        (lambda: hn.CausalSelfAttention(GPT, "softmax"), "attention is 'softmax'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_inputs(layer):
    x = inputs()
    for call, message in (
        (lambda: layer(x[0]), r"x has shape \[23, 32\]; expected \[B, T, 32\]"),
        (lambda: layer(x[..., :5]), r"x has shape \[2, 23, 5\]"),
        (lambda: layer(x, layer.new_state(3)), "state is of 3 sequences; expected 2"),
        (lambda: layer(x, form="fast"), "form is 'fast'"),
        (lambda: layer(x, cu_seqlens=torch.tensor([0, T])), "x has batch 2; expected 1"),
        (lambda: layer(x[:1], cu_seqlens=torch.tensor([0, 5])), "expected to rise from 0 to T, 23"),
        (lambda: layer(x[:1], cu_seqlens=torch.tensor([0, 9, 5, T])), "expected to rise"),
        (lambda: layer(x[:1], cu_seqlens=torch.tensor([[0, T]])), "cu_seqlens has shape"),
        (lambda: layer(x[:1], layer.new_state(2), cu_seqlens=torch.tensor([0, T])), "state is of 2 sequences"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
