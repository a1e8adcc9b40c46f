"""holdfast.compat.yet_another_retnet against formulas in float64: decays, what the scale does, layouts, weights, the
layer and the model in their three forms."""

from __future__ import annotations

import pytest
from gradients import check_gradients
from reference import assert_close

torch = pytest.importorskip("torch")
from holdfast.compat import yet_another_retnet as yar  # noqa: E402

B, H, T, D = 2, 4, 19, 16
# Of a model, a chain of some twenty float32 products, norms and activations, each off by a few 1e-7.
MODEL_TOLERANCE = 5e-6


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def inputs(values=D):
    generator = torch.Generator().manual_seed(values)
    return (
        torch.randn(B, H, T, D, generator=generator),
        torch.randn(B, H, T, D, generator=generator) + 0.5,
        torch.randn(B, H, T, values, generator=generator),
    )


def gammas(heads=H):
    x = torch.linspace(0, 1, heads, dtype=torch.float64)
    return 1 - torch.exp((1 - x) * torch.tensor(1 / 32).double().log() + x * torch.tensor(1 / 512).double().log())


def weights(q, k, scale):
    """gamma^(i - j) q_i.(k_j / scale), j <= i, of q, k [b, h, t, d]."""
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    decay = gammas(q.shape[1])[:, None, None] ** distance.clamp(min=0) * (distance >= 0)
    return q.double() @ (k.double() / scale).mT * decay


def final_state(k, v, scale):
    """[b, h, d of k, d of v]"""
    state = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=torch.float64)
    for t in range(k.shape[2]):
        update = (k[:, :, t].double() / scale)[..., :, None] * v[:, :, t].double()[..., None, :]
        state = gammas(k.shape[1])[:, None, None] * state + update
    return state


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("values", [D, 24])
def test_parallel(scale, values):
    q, k, v = inputs(values)
    expected = weights(q, k, scale or D**0.5)
    out, none = yar.retention_parallel(q, k, v, scale)
    assert none is None
    assert_close(out, (expected @ v.double()).numpy())
    out, returned = yar.retention_parallel(q, k, v, scale, need_weights=True)
    assert_close(returned, expected.numpy())
    assert_close(out, (expected @ v.double()).numpy())


@pytest.mark.parametrize("scale", [None, 3.0])
def test_recurrent_and_chunkwise(scale):
    q, k, v = inputs()
    expected = (weights(q, k, scale or D**0.5) @ v.double()).numpy()
    outs, state = [], None
    for t in range(T):
        out, state = yar.retention_recurrent(q[:, :, t], k[:, :, t], v[:, :, t], state, scale)
        assert out.shape == (B, H, D)
        outs.append(out)
    assert_close(torch.stack(outs, 2), expected)
    assert_close(state, final_state(k, v, scale or D**0.5).numpy())

    for chunk in (4, T, 50):  # 4: the last one is shorter
        outs, state = [], None
        for start in range(0, T, chunk):
            out, state = yar.retention_chunkwise(*(x[:, :, start : start + chunk] for x in (q, k, v)), state, scale)
            outs.append(out)
        assert_close(torch.cat(outs, 2), expected)
        assert_close(state, final_state(k, v, scale or D**0.5).numpy())


def test_states_of_16_bits_are_taken():
    q, k, v = (x.half() for x in inputs())
    _, state = yar.retention_chunkwise(q, k, v, None)
    assert state.dtype == torch.float32
    out, _ = yar.retention_recurrent(q[:, :, 0], k[:, :, 0], v[:, :, 0], state.half())
    assert out.dtype == torch.float16


def test_bad_inputs():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="query has 3 dimensions; expected 4"):
        yar.retention_parallel(q[0], k, v)
    with pytest.raises(ValueError, match="value has 4 dimensions; expected 3"):
        yar.retention_recurrent(q[:, :, 0], k[:, :, 0], v, None)
    with pytest.raises(ValueError, match="scale is 0"):
        yar.retention_chunkwise(q, k, v, None, 0)
    with pytest.raises(ValueError, match="initial_state"):
        yar.retention_chunkwise(q, k, v, torch.zeros(B, H, D, D + 1))
    with pytest.raises(NotImplementedError, match="float64"):
        yar.retention_parallel(q.double(), k.double(), v.double())
    with pytest.raises(ValueError, match="embed_dim is 36"):
        yar.MultiScaleRetention(36, 4)
    with pytest.raises(ValueError, match="embed_dim is 24"):
        yar.MultiScaleRetention(24, 4)
    with pytest.raises(NotImplementedError, match="batch_first"):
        yar.MultiScaleRetention(32, 4, batch_first=False)
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        yar.MultiScaleRetention(32, 4, activation="tanh")
    with pytest.raises(ValueError, match="prev_states has 1 elements; expected 2"):
        yar.RetNet(9, 32, 4, 2).forward_recurrent(torch.zeros(1, dtype=torch.int64), 0, [None])


ACTIVATIONS = {"swish": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "relu": torch.relu}


def layer_by_hand(parameters, query, key, value, heads, rotate=True, activation="swish", eps=1e-6):
    """(out, weights) in float64, from the parameters of a state dict."""

    def linear(name, x):
        y = x.double() @ parameters[f"{name}.weight"].double().T
        return y + parameters[f"{name}.bias"].double() if f"{name}.bias" in parameters else y

    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = split(linear("q_proj", query)), split(linear("k_proj", key)), split(linear("v_proj", value))
    if rotate:
        size = q.shape[-1]
        theta = 10000.0 ** -torch.linspace(0, 1, size // 2, dtype=torch.float64)
        turn = torch.polar(torch.ones(()).double(), torch.arange(q.shape[2]).double()[:, None] * theta)
        q, k = (torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2) for x in (q, k))
    w = weights(q, k, q.shape[-1] ** 0.5)
    out = (w @ v).transpose(1, 2)
    out = (out - out.mean(-1, keepdim=True)) / (out.var(-1, keepdim=True, correction=0) + eps).sqrt()
    return linear("out_proj", out.flatten(-2) * ACTIVATIONS[activation](linear("g_proj", query))), w


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("activation", ["swish", "gelu", "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_layer(rotate, activation, bias):
    torch.manual_seed(0)
    layer = yar.MultiScaleRetention(64, H, relative_position=rotate, bias=bias, activation=activation).eval()
    names = {f"{p}_proj.{x}" for p in ("q", "k", "v", "g", "out") for x in (["weight", "bias"] if bias else ["weight"])}
    assert set(layer.state_dict()) == names | ({"thetas"} if rotate else set())
    for projection in (layer.q_proj, layer.out_proj) if bias else ():
        torch.nn.init.normal_(projection.bias)
    query, key, value = torch.randn(3, B, T, 64)
    expected, w = layer_by_hand(layer.state_dict(), query, key, value, H, rotate, activation)
    out, returned = layer.forward_parallel(query, key, value, need_weights=True)
    assert_close(out, expected.numpy(), MODEL_TOLERANCE)
    assert_close(returned, w.numpy(), MODEL_TOLERANCE)
    assert_close(layer(query, key, value)[0], expected.numpy(), MODEL_TOLERANCE)

    state, outs = None, []
    for t in range(T):
        out, state = layer.forward_recurrent(query[:, t], key[:, t], value[:, t], t, state)
        outs.append(out)
    assert_close(torch.stack(outs, 1), expected.numpy(), MODEL_TOLERANCE)
    state, outs = None, []
    for t in range(0, T, 7):
        out, state = layer.forward_chunkwise(*(x[:, t : t + 7] for x in (query, key, value)), t, state)
        outs.append(out)
    assert_close(torch.cat(outs, 1), expected.numpy(), MODEL_TOLERANCE)


def test_thetas_come_from_the_state_dict_but_not_in_16_bits():
    torch.manual_seed(0)
    layer = yar.MultiheadRetention(32, 4)
    x = torch.randn(1, T, 32)
    before = layer(x, x, x)[0]
    layer.load_state_dict({**layer.state_dict(), "thetas": layer.thetas * 0})
    still = layer(x, x, x)[0]
    assert not torch.allclose(before, still)
    plain = yar.MultiScaleRetention(32, 4, relative_position=False)
    plain.load_state_dict({name: p for name, p in layer.state_dict().items() if name != "thetas"})
    assert torch.equal(still, plain(x, x, x)[0])

    half = yar.MultiScaleRetention(32, 4).bfloat16()
    far = torch.randn(1, 2, 32).bfloat16()
    expected, _ = layer_by_hand(half.state_dict(), far, far, far, 4)
    out, _ = half.forward_chunkwise(far, far, far, 5000, None)  # scores depend on differences of positions alone
    assert_close(out.float(), expected.numpy(), 3e-2)  # ten roundings to 8 bits; angles in bfloat16 give 1


def test_dropout_is_of_training():
    torch.manual_seed(0)
    layer = yar.MultiScaleRetention(32, 4, dropout=0.5)
    x = torch.randn(1, T, 32)
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])
    layer.eval()
    assert torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


def model_by_hand(parameters, tokens, heads, layers, norm_first):
    """Logits in float64."""
    p = {name: x.double() for name, x in parameters.items()}

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    x = p["embedding.weight"][tokens]
    for n in range(layers):
        at = f"decoder.layers.{n}."

        def retention(x, at=f"{at}retention."):
            own = {name.removeprefix(at): y for name, y in p.items() if name.startswith(at)}
            return layer_by_hand(own, x, x, x, heads)[0]

        def feed_forward(x, at=at):
            x = torch.nn.functional.silu(x @ p[f"{at}linear1.weight"].T + p[f"{at}linear1.bias"])
            return x @ p[f"{at}linear2.weight"].T + p[f"{at}linear2.bias"]

        if norm_first:
            x = x + retention(norm(x, f"{at}norm1"))
            x = x + feed_forward(norm(x, f"{at}norm2"))
        else:
            x = x + norm(retention(x), f"{at}norm1")
            x = x + norm(feed_forward(x), f"{at}norm2")
    return x @ p["out.weight"].T + p["out.bias"]


@pytest.mark.parametrize("norm_first", [True, False])
def test_model(norm_first):
    torch.manual_seed(0)
    model = yar.RetNet(50, 64, 4, 3, dim_feedforward=96, norm_first=norm_first).eval()
    tokens = torch.randint(0, 50, (B, T))
    expected = model_by_hand(model.state_dict(), tokens, 4, 3, norm_first)
    assert_close(model.forward_parallel(tokens), expected.numpy(), MODEL_TOLERANCE)

    states, outs = [], []
    for t in range(T):
        out, states = model.forward_recurrent(tokens[:, t], t, states)
        outs.append(out)
    assert_close(torch.stack(outs, 1), expected.numpy(), MODEL_TOLERANCE)
    states, outs = (), []
    for t in range(0, T, 7):
        out, states = model.forward_chunkwise(tokens[:, t : t + 7], t, states)
        outs.append(out)
    assert_close(torch.cat(outs, 1), expected.numpy(), MODEL_TOLERANCE)

    labels = torch.randint(0, 50, (B, T))
    probability = expected.softmax(-1).gather(-1, labels[..., None])
    assert float(model(tokens, labels)) == pytest.approx(float(-probability.log().mean()), rel=1e-5)


@pytest.mark.parametrize(
    "make, size, width, layers",
    [(yar.retnet_1_3b, 2048, 4096, 24), (yar.retnet_2_7b, 2560, 5120, 32), (yar.retnet_6_7b, 4096, 8192, 32)],
)
def test_presets(make, size, width, layers):
    model = make(1000, device="meta")
    layer = 5 * (size * size + size) + 2 * size * width + size + width + 4 * size
    assert sum(p.numel() for p in model.parameters()) == layers * layer + 1000 * (2 * size + 1)
    assert {layer.retention.num_heads for layer in model.decoder.layers} == {size // 256}


@pytest.mark.parametrize("activation", ["swish", "gelu"])
def test_gradients(activation):
    torch.manual_seed(0)
    layer = yar.MultiScaleRetention(64, H, activation=activation)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def actual(query, key, value, *parameters):
        own = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, own, (query, key, value))[0]

    def expected(query, key, value, *parameters):
        return layer_by_hand(dict(zip(names, parameters, strict=True)), query, key, value, H, True, activation)[0]

    check_gradients(actual, expected, *torch.randn(3, B, T, 64), *parameters)
    q, k, v = inputs()
    check_gradients(
        lambda q, k, v: yar.retention_chunkwise(q, k, v, None),
        lambda q, k, v: (weights(q, k, D**0.5) @ v, final_state(k, v, D**0.5)),
        q,
        k,
        v,
    )
