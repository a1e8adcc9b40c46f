"""holdfast.compat.torchscale against TorchScale's RetNet written out in float64, all three modes with what each divides
rows by, and its checkpoints."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from gradients import check_gradients
from reference import assert_close

torch = pytest.importorskip("torch")
from holdfast.compat import torchscale  # noqa: E402

B, T, E, V, H = 2, 24, 48, 72, 3
# Of a layer or a model, a chain of up to twenty float32 products, norms and activations, each off by a few 1e-7.
TOLERANCE = 5e-6
EPS = 0.5  # large, so that what the rows are divided by before the norm is seen


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def config(**fields):
    return torchscale.RetNetConfig(
        **{
            "decoder_embed_dim": E,
            "decoder_value_embed_dim": V,
            "decoder_retention_heads": H,
            "decoder_ffn_embed_dim": 64,
            "decoder_layers": 2,
            "recurrent_chunk_size": 8,
            "vocab_size": 40,
            **fields,
        }
    )


def gammas():
    return 1 - 2.0 ** (-5 - torch.arange(H).double())


def heads_of(p, x, start=0):
    """q, k [b, h, t, d], rotated, k scaled, and v [b, h, t, e], in float64."""
    q, k, v = (
        (x.double() @ p[f"{name}_proj.weight"].double().T).unflatten(-1, (H, -1)).transpose(1, 2) for name in "qkv"
    )
    size = q.shape[-1]
    theta = 10000.0 ** -torch.linspace(0, 1, size // 2, dtype=torch.float64)
    turn = torch.polar(torch.ones(()).double(), (start + torch.arange(q.shape[2])).double()[:, None] * theta)
    q, k = (torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turn).flatten(-2) for y in (q, k))
    return q, k * size**-0.5, v


def decays(length):
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (gammas()[:, None, None] ** distance.clamp(min=0)).tril()


def parallel(q, k, v):
    mask = decays(q.shape[2])
    w = q @ k.mT * (mask / mask.sum(-1, keepdim=True).sqrt())
    return w / w.detach().abs().sum(-1, keepdim=True).clamp(1, 5e4) @ v


def chunkwise(q, k, v, size):
    """The way TorchScale computes it: each part is divided by what keeps it small, and then brought to one
    denominator."""
    mask, outs = decays(size), []
    last = mask[:, -1]  # [h, size]
    root = mask.sum(-1, keepdim=True).sqrt()
    state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3]).double()
    for at in range(0, q.shape[2], size):
        qc, kc, vc = (x[:, :, at : at + size] for x in (q, k, v))
        w = qc @ kc.mT * mask / root
        inner = w.detach().abs().sum(-1, keepdim=True).clamp(min=1)
        cross = state.detach().abs().sum(-2, keepdim=True).amax(-1, keepdim=True).clamp(min=1)
        since = gammas()[:, None] ** torch.arange(1, size + 1)
        reach = since[..., None] / (root / last.sum(-1)[:, None, None])
        both = torch.maximum(inner.expand(*inner.shape[:2], size, 1), cross)
        outs.append(
            (w / inner @ v[:, :, at : at + size]) * (inner / both) + (qc * reach) @ (state / cross) * (cross / both)
        )
        gathered = kc.mT @ (vc * (last / last.sum(-1, keepdim=True))[..., None])
        state = state * gammas()[:, None, None] ** size + gathered
    return torch.cat(outs, 2)


def recurrent(q, k, v, memory):
    """One token [b, h, d]; memory is (key-value [b, h, e, d], scale [h]) or None."""
    kv = v[..., :, None] * k[..., None, :]
    scale = torch.ones(H).double()
    if memory is not None:
        scale = memory[1] * gammas() + 1
        kept = (memory[1].sqrt() * gammas() / scale.sqrt())[:, None, None]
        kv = memory[0] * kept + kv / scale.sqrt()[:, None, None]
    return torch.einsum("bhd,bhed->bhe", q, kv), (kv, scale)


def finished(p, x, out, eps, gate=torch.nn.functional.silu):
    """Norm, gate and projection; out [b, h, t, e]."""
    out = out.transpose(1, 2)
    out = (out / ((out * out).mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)
    return (gate(x.double() @ p["g_proj.weight"].double().T) * out) @ p["out_proj.weight"].double().T


def layer_and_input(size=1.0, **options):
    torch.manual_seed(0)
    layer = torchscale.MultiScaleRetention(SimpleNamespace(layernorm_eps=EPS), E, V, H, **options).eval()
    for name, p in layer.named_parameters():
        p *= 6 * size if name[:2] in ("q_", "k_") else 6
    return layer, torch.randn(B, T, E)


@pytest.mark.parametrize("size", [0.2, 1.0, 100.0])  # sums of weights below 1, above, and above 5e4
@pytest.mark.parametrize("gate", ["swish", "gelu"])
def test_parallel(size, gate):
    layer, x = layer_and_input(size, gate_fn=gate)
    p = layer.state_dict()
    assert set(p) == {f"{name}_proj.weight" for name in ("q", "k", "v", "g", "out")}
    gate = {"swish": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}[gate]
    expected = finished(p, x, parallel(*heads_of(p, x)), EPS, gate)
    assert_close(layer(x, torchscale.RetNetRelPos(config())(T)), expected.numpy(), TOLERANCE)


@pytest.mark.parametrize("size", [0.2, 1.0])
@pytest.mark.parametrize("chunk", [4, 8, T])
def test_chunkwise(size, chunk):
    layer, x = layer_and_input(size)
    p = layer.state_dict()
    rel_pos = torchscale.RetNetRelPos(config(recurrent_chunk_size=chunk))(T, chunkwise_recurrent=True)
    expected = finished(p, x, chunkwise(*heads_of(p, x), chunk), EPS)
    assert_close(layer(x, rel_pos, chunkwise_recurrent=True), expected.numpy(), TOLERANCE)


@pytest.mark.parametrize("prompt", [0, 1, 9])
def test_recurrent(prompt):
    layer, x = layer_and_input()
    p = layer.state_dict()
    q, k, v = heads_of(p, x)
    memory, outs = None, []
    for t in range(T):
        out, memory = recurrent(q[:, :, t], k[:, :, t], v[:, :, t], memory)
        outs.append(out)
    expected = finished(p, x, torch.stack(outs, 2), EPS)

    rel_pos, state, outs = torchscale.RetNetRelPos(config()), {}, []
    if prompt:
        outs.append(layer(x[:, :prompt], rel_pos(prompt), incremental_state=state))
    for t in range(prompt, T):
        outs.append(layer(x[:, t : t + 1], rel_pos(t + 1, activate_recurrent=True), incremental_state=state))
    assert_close(torch.cat(outs, 1), expected.numpy(), TOLERANCE)
    assert_close(state["prev_key_value"], memory[0].numpy(), TOLERANCE)
    assert_close(state["scale"], memory[1].numpy())


def test_without_row_scale_all_modes_agree():
    layer, x = layer_and_input(row_scale=False)
    p, rel_pos = layer.state_dict(), torchscale.RetNetRelPos(config())
    q, k, v = heads_of(p, x)
    expected = finished(p, x, q @ k.mT * decays(T) @ v, EPS).numpy()
    assert_close(layer(x, rel_pos(T)), expected, TOLERANCE)
    assert_close(layer(x, rel_pos(T), chunkwise_recurrent=True), expected, TOLERANCE)
    state, outs = {}, []
    for t in range(T):
        outs.append(layer(x[:, t : t + 1], rel_pos(t + 1, activate_recurrent=True), incremental_state=state))
    assert_close(torch.cat(outs, 1), expected, TOLERANCE)


def test_bad_inputs():
    layer, x = layer_and_input()
    rel_pos = torchscale.RetNetRelPos(config())
    with pytest.raises(TypeError, match="rel_pos is of type tuple"):
        layer(x, ((None, None), None))
    with pytest.raises(ValueError, match="x has 23 tokens; expected a multiple of the chunk size, 8"):
        layer(x[:, 1:], rel_pos(23), chunkwise_recurrent=True)
    args = SimpleNamespace(layernorm_eps=EPS)
    with pytest.raises(ValueError, match="embed_dim is 49"):
        torchscale.MultiScaleRetention(args, 49, V, H)
    with pytest.raises(ValueError, match="value_dim is 73"):
        torchscale.MultiScaleRetention(args, E, 73, H)
    with pytest.raises(ValueError, match="gate_fn is 'tanh'"):
        torchscale.MultiScaleRetention(args, E, V, H, gate_fn="tanh")
    with pytest.raises(NotImplementedError, match="multiway"):
        torchscale.MultiScaleRetention(SimpleNamespace(layernorm_eps=EPS, multiway=True), E, V, H)
    with pytest.raises(NotImplementedError, match="moe_freq is 2"):
        torchscale.RetNetDecoder(SimpleNamespace(**vars(config()), moe_freq=2))


def checkpoint(before=True, embedding_norm=False, shared=False):
    """A state dict with TorchScale's names, of random tensors."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    def weight():
        return 1 + torch.randn(E, generator=generator) / 4

    tensors = {"embed_tokens.weight": matrix(40, E) * 7}
    if not shared:
        tensors["output_projection.weight"] = matrix(40, E)
    if embedding_norm:
        tensors["layernorm_embedding.weight"] = weight()
    for n in range(2):
        at = f"layers.{n}"
        for name, rows, columns in (("q", E, E), ("k", E, E), ("v", V, E), ("g", V, E), ("out", E, V)):
            tensors[f"{at}.retention.{name}_proj.weight"] = matrix(rows, columns)
        tensors[f"{at}.retention_layer_norm.weight"] = weight()
        tensors[f"{at}.final_layer_norm.weight"] = weight()
        tensors[f"{at}.ffn.fc1.weight"] = matrix(64, E)
        tensors[f"{at}.ffn.gate.weight"] = matrix(64, E)
        tensors[f"{at}.ffn.fc2.weight"] = matrix(E, 64)
    if before:
        tensors["layer_norm.weight"] = weight()
    tensors["retnet_rel_pos.decay"] = gammas().log().float()
    tensors["retnet_rel_pos.angle"] = torch.zeros(E // H)
    return tensors


def model_by_hand(tensors, tokens, retention, before=True, alpha=1.0, scale=1.0, activation="gelu", eps=1e-6):
    """Logits in float64; retention(p, x) is the layer, of its own parameters."""
    p = {name: x.double() for name, x in tensors.items()}
    act = {"gelu": torch.nn.functional.gelu, "swish": torch.nn.functional.silu, "relu": torch.relu}[activation]

    def norm(x, name):
        return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * p[f"{name}.weight"]

    def around(x, name, block):
        return alpha * x + block(norm(x, name)) if before else norm(alpha * x + block(x), name)

    x = p["embed_tokens.weight"][tokens] * scale
    if "layernorm_embedding.weight" in p:
        x = norm(x, "layernorm_embedding")
    for n in range(2):
        at = f"layers.{n}."
        own = {name.removeprefix(f"{at}retention."): y for name, y in p.items() if name.startswith(f"{at}retention.")}
        x = around(x, f"{at}retention_layer_norm", lambda y, own=own: retention(own, y))

        def feed_forward(y, at=at):
            return act(y @ p[f"{at}ffn.fc1.weight"].T) * (y @ p[f"{at}ffn.gate.weight"].T) @ p[f"{at}ffn.fc2.weight"].T

        x = around(x, f"{at}final_layer_norm", feed_forward)
    x = norm(x, "layer_norm") if before else x
    return x @ p.get("output_projection.weight", p["embed_tokens.weight"]).T


def in_parallel(p, x):
    return finished(p, x, parallel(*heads_of(p, x)), 1e-6)


def tokens_of(length=T):
    return torch.randint(0, 40, (B, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "kind",
    [{}, {"before": False}, {"embedding_norm": True}, {"shared": True}],
    ids=["plain", "after", "norm", "shared"],
)
@pytest.mark.parametrize("prefix", ["", "decoder.", "model.decoder."])
def test_checkpoint(kind, prefix):
    tensors = checkpoint(**kind)
    stored = {f"{prefix}{name}": x for name, x in tensors.items()}
    model = torchscale.retnet_from_state_dict({"model": stored, "args": None} if prefix else stored)
    assert not model.training
    expected = model_by_hand(tensors, tokens_of(), in_parallel, before=kind.get("before", True))
    logits, extra = model(tokens_of())
    assert_close(logits, expected.numpy(), TOLERANCE)
    assert len(extra["inner_states"]) == 3
    assert set(model.state_dict()) == set(tensors) | {"output_projection.weight"}
    features, _ = model(tokens_of(), features_only=True)
    assert_close(model.output_projection(features), logits.double().numpy())


@pytest.mark.parametrize("before", [True, False])
def test_checkpoint_with_options_that_leave_no_trace(before):
    tensors = checkpoint(before=before)
    model = torchscale.retnet_from_state_dict(
        tensors, activation_fn="swish", layernorm_eps=1e-3, no_scale_embedding=False, deepnorm=True
    )
    expected = model_by_hand(
        tensors,
        tokens_of(),
        lambda p, x: finished(p, x, parallel(*heads_of(p, x)), 1e-3),
        before=before,
        alpha=4**0.25,
        scale=E**0.5,
        activation="swish",
        eps=1e-3,
    )
    assert_close(model(tokens_of())[0], expected.numpy(), TOLERANCE)


@pytest.mark.parametrize("length", [16, 19])  # 19: padded to three chunks
def test_model_chunkwise(length):
    tensors = checkpoint()
    model = torchscale.retnet_from_state_dict(tensors, chunkwise_recurrent=True, recurrent_chunk_size=8)
    tokens = tokens_of(24)
    tokens[:, length:] = 0

    def layer(p, x):
        return finished(p, x, chunkwise(*heads_of(p, x), 8), 1e-6)

    expected = model_by_hand(tensors, tokens, layer)[:, :length]
    assert_close(model(tokens[:, :length])[0], expected.numpy(), TOLERANCE)


@pytest.mark.parametrize("prompt", [0, 7])
def test_model_recurrent(prompt):
    tensors = checkpoint()
    model = torchscale.retnet_from_state_dict(tensors)
    tokens = tokens_of()

    def layer(p, x):
        q, k, v = heads_of(p, x)
        memory, outs = None, []
        for t in range(T):
            out, memory = recurrent(q[:, :, t], k[:, :, t], v[:, :, t], memory)
            outs.append(out)
        return finished(p, x, torch.stack(outs, 2), 1e-6)

    expected = model_by_hand(tensors, tokens, layer)
    state, outs = {}, []
    if prompt:
        state["is_first_step"] = True
        outs.append(model(tokens[:, :prompt], state)[0])
        state["is_first_step"] = False
    for t in range(prompt, T):
        outs.append(model(tokens[:, : t + 1], state)[0])
        assert outs[-1].shape[1] == 1
    assert_close(torch.cat(outs, 1), expected.numpy(), TOLERANCE)


def test_modes_differ_by_eps_alone():
    tensors, tokens = checkpoint(), tokens_of()
    scaled = torchscale.retnet_from_state_dict(tensors)(tokens)[0]
    plain = torchscale.retnet_from_state_dict(tensors, row_scale=False)(tokens)[0]
    assert_close(plain, scaled.double().numpy(), 1e-3)  # 1e-6, of mean squares from 1e-3 on


def test_bad_checkpoints():
    tensors = checkpoint()
    name = "layers.1.retention.q_proj.weight"
    with pytest.raises(KeyError, match=name):
        torchscale.retnet_from_state_dict({n: x for n, x in tensors.items() if n != name})
    with pytest.raises(KeyError, match="embed_tokens.weight"):
        torchscale.retnet_from_state_dict({})
    with pytest.raises(ValueError, match=rf"{name} has shape \[48, 47\]; expected \[48, 48\]"):
        torchscale.retnet_from_state_dict({**tensors, name: tensors[name][:, 1:]})
    with pytest.raises(ValueError, match="layers.0.bias"):
        torchscale.retnet_from_state_dict({**tensors, "layers.0.bias": torch.zeros(1)})
    with pytest.raises(NotImplementedError, match="experts"):
        torchscale.retnet_from_state_dict({**tensors, "layers.0.moe_layer.gate.weight": torch.zeros(1)})


@pytest.mark.parametrize("mode", ["parallel", "chunkwise", "recurrent"])
def test_gradients(mode):
    layer, x = layer_and_input()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    rel_pos = torchscale.RetNetRelPos(config())(T)

    def actual(x, *parameters):
        options = {"parallel": {}, "chunkwise": {"chunkwise_recurrent": True}, "recurrent": {"incremental_state": {}}}
        own = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, own, (x, rel_pos), options[mode])

    def expected(x, *parameters):
        p = dict(zip(names, parameters, strict=True))
        q, k, v = heads_of(p, x)
        if mode == "parallel":
            out = parallel(q, k, v)
        elif mode == "chunkwise":
            out = chunkwise(q, k, v, 8)
        else:
            out = q @ k.mT * decays(T) @ v / decays(T).sum(-1, keepdim=True).sqrt()
        return finished(p, x, out, EPS)

    check_gradients(actual, expected, x, *parameters)
