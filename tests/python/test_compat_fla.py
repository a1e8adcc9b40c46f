"""holdfast.compat.fla against formulas in float64: decays, states and their layout, packed and reversed sequences,
attentions; the RetNet model against a plain one, and its checkpoints."""

from __future__ import annotations

import pytest
from gradients import check_gradients
from reference import assert_close

torch = pytest.importorskip("torch")
from holdfast.compat import fla  # noqa: E402

B, T, H, K, V = 2, 29, 3, 16, 24
# Of a model, a chain of some twenty float32 products, norms and activations, each off by a few 1e-7.
MODEL_TOLERANCE = 5e-6


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def inputs(batch=B):
    generator = torch.Generator().manual_seed(batch)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    q, k, v = normal(batch, T, H, K), normal(batch, T, H, K) + 0.5, normal(batch, T, H, V)
    return q, k, v, -normal(batch, T, H).abs() / 20, normal(batch, H, K, V)


def by_hand(q, k, v, g, scale=None, state=None):
    """(out, state [B, H, K, V]) in float64, token by token; g [B, T, H] or [H]."""
    q, k, v = q.double(), k.double(), v.double()
    gates = torch.zeros(q.shape[:3]).double() if g is None else g.double().expand(q.shape[:3])
    S = torch.zeros(q.shape[0], H, K, V).double() if state is None else state.double()
    outs = []
    for t in range(q.shape[1]):
        S = gates[:, t].exp()[..., None, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append((K**-0.5 if scale is None else scale) * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outs, 1), S


def retnet():
    return (1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))).log()


GLA = {
    "chunk": fla.chunk_simple_gla,
    "chunk_of_7": lambda *args, **options: fla.chunk_simple_gla(*args, **options, chunk_size=7),
    "fused_chunk": fla.fused_chunk_simple_gla,
    "fused_recurrent": fla.fused_recurrent_simple_gla,
}
RETENTION = {
    "chunk": fla.chunk_retention,
    "chunk_of_7": lambda *args, **options: fla.chunk_retention(*args, **options, chunk_size=7),
    "fused_chunk": fla.fused_chunk_retention,
    "fused_recurrent": fla.fused_recurrent_retention,
}


@pytest.mark.parametrize("name", GLA)
@pytest.mark.parametrize("decay", ["g", "g_gamma", None])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_simple_gla(name, decay, scale):
    q, k, v, g, state = inputs()
    given = {"g": g, "g_gamma": retnet().float()}.get(decay)
    options = {decay: given} if decay else {}
    out, none = GLA[name](q, k, v, scale=scale, **options)
    assert none is None
    assert_close(out, by_hand(q, k, v, given, scale)[0].numpy())
    expected, end = by_hand(q, k, v, given, scale, state)
    out, final = GLA[name](q, k, v, scale=scale, initial_state=state, output_final_state=True, **options)
    assert_close(out, expected.numpy())
    assert_close(final, end.numpy())
    out, final = GLA[name](
        q, k, v, scale=scale, initial_state=state.mT, output_final_state=True, state_v_first=True, **options
    )
    assert_close(out, expected.numpy())
    assert_close(final, end.mT.numpy())


@pytest.mark.parametrize("name", RETENTION)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_retention(name, scale):
    q, k, v, _, state = inputs()
    assert_close(RETENTION[name](q, k, v, scale)[0], by_hand(q, k, v, retnet(), scale)[0].numpy())
    expected, end = by_hand(q, k, v, retnet(), scale, state)
    out, final = RETENTION[name](q, k, v, scale, state, True)
    assert_close(out, expected.numpy())
    assert_close(final, end.numpy())
    out, final = RETENTION[name](q, k, v, scale, initial_state=state.mT, output_final_state=True, state_v_first=True)
    assert_close(out, expected.numpy())
    assert_close(final, end.mT.numpy())


def attentions(q, k, g, scale=None):
    G = g.double().expand(q.shape[:3]).cumsum(1).transpose(1, 2)
    scores = torch.einsum("bihk,bjhk->bhij", q.double(), k.double()) * (K**-0.5 if scale is None else scale)
    return (scores * (G[..., :, None] - G[..., None, :]).exp()).tril()


@pytest.mark.parametrize("scale", [None, 0.3])
def test_parallel(scale):
    q, k, v, g, _ = inputs()
    for gates, call in (
        (g, lambda **options: fla.parallel_simple_gla(q, k, v, g, scale, **options)),
        (g[0, 0], lambda **options: fla.parallel_simple_gla(q, k, v, scale=scale, g_gamma=g[0, 0], **options)),
        (retnet(), lambda **options: fla.parallel_retention(q, k, v, scale, **options)),
    ):
        expected = by_hand(q, k, v, gates, scale)[0].numpy()
        out, none = call()
        assert none is None
        assert_close(out, expected)
        out, returned = call(output_attentions=True)
        assert_close(out, expected)
        assert_close(returned, attentions(q, k, gates, scale).numpy())


CU_SEQLENS = [0, 4, 4, 17, T]  # the second one is empty


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences(dtype, reverse):
    q, k, v, g, _ = inputs(1)
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=dtype)
    state = inputs(4)[4]
    outs, ends = [], []
    for n, (start, end) in enumerate(zip(CU_SEQLENS[:-1], CU_SEQLENS[1:], strict=True)):
        own = [x[:, start:end].flip(1) if reverse else x[:, start:end] for x in (q, k, v, g)]
        if start == end:
            ends.append(state[n : n + 1].double())
            continue
        out, last = by_hand(*own, state=state[n : n + 1])
        outs.append(out.flip(1) if reverse else out)
        ends.append(last)
    calls = [lambda: fla.fused_recurrent_simple_gla(q, k, v, g, None, None, state, True, reverse, False, cu_seqlens)]
    if not reverse:
        calls += [
            lambda: fla.chunk_simple_gla(q, k, v, g, None, None, state, True, False, cu_seqlens),
            lambda: fla.chunk_simple_gla(
                q, k, v, g, initial_state=state, output_final_state=True, cu_seqlens_cpu=cu_seqlens
            ),
            lambda: fla.fused_chunk_simple_gla(q, k, v, g, None, None, state, True, cu_seqlens),
        ]
    for call in calls:
        out, final = call()
        assert_close(out, torch.cat(outs, 1).numpy())
        assert_close(final, torch.cat(ends).numpy())


def test_packed_retention():
    q, k, v, _, _ = inputs(1)
    cu_seqlens = torch.tensor(CU_SEQLENS)
    parts = [slice(a, b) for a, b in zip(CU_SEQLENS[:-1], CU_SEQLENS[1:], strict=True) if a < b]
    expected = torch.cat([by_hand(*(x[:, part] for x in (q, k, v)), retnet())[0] for part in parts], 1)
    for call in (
        fla.chunk_retention,
        fla.fused_chunk_retention,
        fla.fused_recurrent_retention,
        fla.parallel_retention,
    ):
        assert_close(call(q, k, v, cu_seqlens=cu_seqlens)[0], expected.numpy())
    weights = fla.parallel_retention(q, k, v, None, True, cu_seqlens)[1]
    expected = torch.zeros(1, H, T, T).double()
    for part in parts:
        expected[:, :, part, part] = attentions(q[:, part], k[:, part], retnet())
    assert_close(weights, expected.numpy())


@pytest.mark.parametrize("call", [fla.fused_recurrent_simple_gla, fla.fused_recurrent_retention])
def test_reverse(call):
    q, k, v, g, state = inputs()
    options = {"g": g} if call is fla.fused_recurrent_simple_gla else {}
    gates = g.flip(1) if options else retnet()
    expected, end = by_hand(*(x.flip(1) for x in (q, k, v)), gates, state=state)
    out, final = call(q, k, v, initial_state=state, output_final_state=True, reverse=True, **options)
    assert_close(out, expected.flip(1).numpy())
    assert_close(final, end.numpy())


def test_16_bits():
    q, k, v, g, state = inputs()
    q, k, v = (x.bfloat16() for x in (q, k, v))
    out, final = fla.chunk_simple_gla(q, k, v, g.bfloat16(), initial_state=state.bfloat16(), output_final_state=True)
    assert out.dtype == torch.bfloat16 and final.dtype == torch.float32
    expected, end = by_hand(q, k, v, g.bfloat16(), state=state.bfloat16())
    assert_close(out.float(), expected.numpy(), 2.5e-3)
    assert_close(final, end.numpy())


def test_bad_inputs():
    q, k, v, g, state = inputs()
    with pytest.raises(ValueError, match="g and g_gamma are both given"):
        fla.chunk_simple_gla(q, k, v, g, retnet())
    with pytest.raises(ValueError, match="g has 4 dimensions; expected 3"):
        fla.chunk_simple_gla(q, k, v, g[..., None])
    with pytest.raises(ValueError, match="g_gamma has 3 dimensions; expected 1"):
        fla.parallel_simple_gla(q, k, v, g_gamma=g)
    with pytest.raises(ValueError, match="cu_seqlens"):
        fla.chunk_retention(q, k, v, cu_seqlens=torch.tensor([0, T]))
    with pytest.raises(ValueError, match="initial_state"):
        fla.chunk_retention(q[:1], k[:1], v[:1], initial_state=state, cu_seqlens=torch.tensor([0, T]))
    with pytest.raises(ValueError, match="log_decay"):
        fla.fused_recurrent_simple_gla(q, k, v, -g)
    for options in ({"head_first": False}, {"transpose_state_layout": True}):
        with pytest.raises(TypeError, match="unexpected keyword"):
            fla.fused_recurrent_retention(q, k, v, **options)
    for options, error, message in (
        ({"mode": "other"}, ValueError, "mode is 'other'"),
        ({"use_short_conv": True}, NotImplementedError, "use_short_conv"),
        ({"num_heads": 5}, ValueError, "expand_k makes 64 features"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads is 3"),
        ({"gate_fn": "tanh"}, ValueError, "gate_fn is 'tanh'"),
    ):
        with pytest.raises(error, match=message):
            fla.MultiScaleRetention(**{"hidden_size": 64, "num_heads": 4, **options})
    layer = fla.MultiScaleRetention(hidden_size=64, num_heads=4)
    with pytest.raises(NotImplementedError, match="attention_mask has zeros"):
        layer(torch.zeros(1, 2, 64), torch.tensor([[0, 1]]))


def checkpoint(
    hidden=48, heads=3, kv_heads=3, expand_k=1.0, expand_v=2.0, layers=2, vocabulary=40, fused=True, tied=False
):
    """A state dict with that library's names, of random tensors."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    def weight(size):
        return 1 + torch.randn(size, generator=generator) / 4

    key, value = int(hidden * expand_k), int(hidden * expand_v)
    tensors = {"model.embeddings.weight": matrix(vocabulary, hidden) * 7, "model.norm.weight": weight(hidden)}
    if not tied:
        tensors["lm_head.weight"] = matrix(vocabulary, hidden)
    for n in range(layers):
        at = f"model.layers.{n}"
        tensors[f"{at}.attn_norm.weight"] = weight(hidden)
        tensors[f"{at}.attn.q_proj.weight"] = matrix(key, hidden)
        tensors[f"{at}.attn.k_proj.weight"] = matrix(key * kv_heads // heads, hidden)
        tensors[f"{at}.attn.v_proj.weight"] = matrix(value * kv_heads // heads, hidden)
        tensors[f"{at}.attn.g_proj.weight"] = matrix(value, hidden)
        tensors[f"{at}.attn.o_proj.weight"] = matrix(hidden, value)
        tensors[f"{at}.attn.{'g_norm_swish_gate' if fused else 'g_norm'}.weight"] = weight(value // heads)
        tensors[f"{at}.attn.rotary.inv_freq"] = torch.zeros(key // heads // 2)  # of older checkpoints
        tensors[f"{at}.mlp_norm.weight"] = weight(hidden)
        tensors[f"{at}.mlp.gate_proj.weight"] = matrix(80, hidden)
        tensors[f"{at}.mlp.up_proj.weight"] = matrix(80, hidden)
        tensors[f"{at}.mlp.down_proj.weight"] = matrix(hidden, 80)
    return tensors


def model_by_hand(tensors, tokens, heads, kv_heads, layers=2, eps=1e-6):
    """Logits in float64."""
    p = {name: x.double() for name, x in tensors.items()}

    def norm(x, weight):
        return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weight

    def rotate(x):
        half = x.shape[-1] // 2
        theta = 10000.0 ** (-torch.arange(half).double() / half)
        angle = (torch.arange(x.shape[1]).double()[:, None] * theta)[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    x = p["model.embeddings.weight"][tokens]
    for n in range(layers):
        at = f"model.layers.{n}"
        y = norm(x, p[f"{at}.attn_norm.weight"])
        q, k, v = (
            (y @ p[f"{at}.attn.{name}_proj.weight"].T).unflatten(-1, (count, -1))
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = rotate(q), rotate(k)
        k, v = (z.repeat_interleave(heads // kv_heads, 2) for z in (k, v))
        distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        gamma = 1 - 2.0 ** (-5 - torch.arange(heads).double())
        w = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
        w = (w * gamma[:, None, None] ** distance.clamp(min=0)).tril()
        weight = p.get(f"{at}.attn.g_norm_swish_gate.weight", p.get(f"{at}.attn.g_norm.weight"))
        o = norm(torch.einsum("bhij,bjhe->bihe", w, v), weight).flatten(-2)
        gate = y @ p[f"{at}.attn.g_proj.weight"].T
        x = x + (o * gate * gate.sigmoid()) @ p[f"{at}.attn.o_proj.weight"].T
        y = norm(x, p[f"{at}.mlp_norm.weight"])
        gate = y @ p[f"{at}.mlp.gate_proj.weight"].T
        x = x + (gate * gate.sigmoid() * (y @ p[f"{at}.mlp.up_proj.weight"].T)) @ p[f"{at}.mlp.down_proj.weight"].T
    return norm(x, p["model.norm.weight"]) @ p.get("lm_head.weight", p["model.embeddings.weight"]).T


@pytest.mark.parametrize(
    "sizes",
    [{}, {"heads": 4, "kv_heads": 2}, {"expand_k": 0.5, "expand_v": 1.0}, {"fused": False}, {"tied": True}],
)
def test_checkpoint(sizes):
    tensors = checkpoint(**sizes)
    heads = sizes.get("heads", 3)
    model = fla.retnet_from_state_dict(tensors)
    assert not model.training
    tokens = torch.randint(0, 40, (B, T), generator=torch.Generator().manual_seed(1))
    expected = model_by_hand(tensors, tokens, heads, sizes.get("kv_heads", heads))
    assert_close(model(tokens).logits, expected.numpy(), MODEL_TOLERANCE)
    loss = model(tokens, labels=tokens).loss
    probability = expected[:, :-1].softmax(-1).gather(-1, tokens[:, 1:, None])
    assert float(loss) == pytest.approx(float(-probability.log().mean()), rel=1e-5)
    assert {name for name in tensors if "inv_freq" not in name} | {"lm_head.weight"} == set(model.state_dict())

    out = model(tokens[:, :11], use_cache=True)  # a prompt, and then token by token
    outs = [out.logits]
    for t in range(11, T):
        out = model(tokens[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        outs.append(out.logits)
    assert_close(torch.cat(outs, 1), expected.numpy(), MODEL_TOLERANCE)

    row = torch.cat([tokens[:1, :9], tokens[1:, :13]], 1)  # two prompts, packed, and then three tokens of each
    out = model(row, cu_seqlens=torch.tensor([0, 9, 22]), use_cache=True)
    assert_close(out.logits[:, :9], expected[:1, :9].numpy(), MODEL_TOLERANCE)
    assert_close(out.logits[:, 9:], expected[1:, :13].numpy(), MODEL_TOLERANCE)
    for length in (1, 2):
        following = torch.cat([tokens[:1, 8 + length :][:, :length], tokens[1:, 12 + length :][:, :length]])
        out = model(following, past_key_values=out.past_key_values, use_cache=True)
        assert_close(out.logits[0], expected[0, 8 + length :][:length].numpy(), MODEL_TOLERANCE)
        assert_close(out.logits[1], expected[1, 12 + length :][:length].numpy(), MODEL_TOLERANCE)
    out = model(row[:, 3:6], cu_seqlens=torch.tensor([0, 2, 3]), past_key_values=out.past_key_values, use_cache=True)
    assert out.past_key_values[0]["position"].tolist() == [14, 17]


@pytest.mark.parametrize("mode", ["chunk", "fused_chunk", "parallel", "fused_recurrent"])
def test_layer_in_each_mode(mode):
    torch.manual_seed(0)
    layer = fla.MultiScaleRetention(mode, hidden_size=48, num_heads=3, layer_idx=0)
    other = fla.MultiScaleRetention("chunk", hidden_size=48, num_heads=3, use_output_gate=False)
    x = torch.randn(B, T, 48)
    y, none, cache = layer(x)
    assert none is None and cache is None
    again, _, cache = layer(x, use_cache=True)
    assert_close(again, y.double().numpy(), MODEL_TOLERANCE)
    assert cache[0]["recurrent_state"].shape == (B, 3, 16, 32) and cache[0]["position"] == T
    names = {"q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "g_norm_swish_gate"}
    assert {name.split(".")[0] for name in layer.state_dict()} == names
    assert {name.split(".")[0] for name in other.state_dict()} == names - {"g_proj", "g_norm_swish_gate"} | {"g_norm"}
    assert other(x)[0].shape == x.shape


def test_bad_checkpoints():
    tensors = checkpoint()
    name = "model.layers.1.attn.q_proj.weight"
    with pytest.raises(KeyError, match=name):
        fla.retnet_from_state_dict({n: x for n, x in tensors.items() if n != name})
    with pytest.raises(ValueError, match="model.layers.0.attn.q_conv1d.weight"):
        fla.retnet_from_state_dict({**tensors, "model.layers.0.attn.q_conv1d.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"{name} has shape \[48, 47\]; expected \[48, 48\]"):
        fla.retnet_from_state_dict({**tensors, name: tensors[name][:, 1:]})
    plain = {n: x for n, x in tensors.items() if "g_norm" not in n}
    with pytest.raises(ValueError, match="num_heads is not given"):
        fla.retnet_from_state_dict(plain)
    assert fla.retnet_from_state_dict(plain, num_heads=3).config.elementwise_affine is False
    with pytest.raises(NotImplementedError, match="use_short_conv"):
        fla.retnet_from_state_dict(tensors, use_short_conv=True)
    model = fla.retnet_from_state_dict(tensors, norm_eps=1.0, model_type="retnet")
    tokens = torch.arange(T)[None]
    expected = model_by_hand(tensors, tokens, 3, 3, eps=1.0)
    assert_close(model(tokens).logits, expected.numpy(), MODEL_TOLERANCE)


@pytest.mark.parametrize("call", [fla.chunk_simple_gla, fla.fused_recurrent_simple_gla])
def test_gradients(call):
    q, k, v, g, state = inputs()
    check_gradients(
        lambda q, k, v, g, state: call(q, k, v, g, initial_state=state, output_final_state=True),
        lambda q, k, v, g, state: by_hand(q, k, v, g, state=state),
        q,
        k,
        v,
        g,
        state,
    )
    check_gradients(
        lambda q, k, v, g: fla.parallel_simple_gla(q, k, v, g)[0], lambda q, k, v, g: by_hand(q, k, v, g)[0], q, k, v, g
    )


def test_gradients_of_the_model():
    tensors = checkpoint(heads=4, kv_heads=2)
    model = fla.retnet_from_state_dict(tensors)
    names, parameters = zip(*model.named_parameters(), strict=True)
    tokens = torch.randint(0, 40, (B, T), generator=torch.Generator().manual_seed(1))
    check_gradients(
        lambda *p: torch.func.functional_call(model, dict(zip(names, p, strict=True)), (tokens,)).logits,
        lambda *p: model_by_hand(dict(zip(names, p, strict=True)), tokens, 4, 2),
        *parameters,
    )
