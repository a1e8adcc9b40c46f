"""flash-linear-attention: its functions for retention and simple gated linear attention, its RetNet layer and language
model on Holdfast's kernels, and `retnet_from_state_dict` for checkpoints of that model.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t      out_t = scale q_t S_t      scale: K^-1/2 by default, on q.k

Functions take [B, T, H, K] and return (out, final state) or (out, attentions), None where it is not asked for.
Retention's g is log(1 - 2^(-5 - h)) for head h. States are float32, [N, H, K, V], or with state_v_first [N, H, V, K].
Of packed sequences (cu_seqlens [N + 1], B = 1) each has its own state. Options that this module does not know are a
TypeError, not ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _torch

__all__ = [
    "CausalLMOutput",
    "MultiScaleRetention",
    "RetNetConfig",
    "RetNetForCausalLM",
    "RetNetModel",
    "chunk_retention",
    "chunk_simple_gla",
    "fused_chunk_retention",
    "fused_chunk_simple_gla",
    "fused_recurrent_retention",
    "fused_recurrent_simple_gla",
    "parallel_retention",
    "parallel_simple_gla",
    "retnet_from_state_dict",
]


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Simple gated linear attention.

    Args:
        q, k: [B, T, H, K]; v: [B, T, H, V].
        g: log decays per token, [B, T, H], each <= 0.
        g_gamma: log decays per head, [H]; one of g and g_gamma, or none: no decay.
        scale: on q.k. None: K^-1/2.
        initial_state: [N, H, K, V], or with state_v_first [N, H, V, K]. None: zeros.
        output_final_state: return the state after the last token, else None.
        cu_seqlens: packed sequences, [N + 1]; cu_seqlens_cpu: the same on the CPU, where the kernels want it.
        chunk_size: tokens worked on at a time, any number. None: the library's choice.

    Returns:
        (out [B, T, H, V], final state)."""
    return _linear(
        "chunkwise",
        q,
        k,
        v,
        _decays(g, g_gamma),
        scale,
        initial_state,
        output_final_state,
        state_v_first,
        cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu,
        chunk_size,
    )


def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_simple_gla` by another name: there another kernel."""
    return chunk_simple_gla(q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens)


def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_simple_gla`, token by token. reverse: from each sequence's last token to its first, whose state is the
    final one."""
    decays = _decays(g, g_gamma)
    if not reverse:
        return _linear(
            "auto", q, k, v, decays, scale, initial_state, output_final_state, state_v_first, cu_seqlens, None
        )
    # All sequences backwards are the packed row backwards, and their states in the other order.
    q, k, v = (x.flip(1) for x in (q, k, v))
    if g is not None:
        decays = decays.flip(1)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens[-1] - cu_seqlens.flip(0)
        initial_state = None if initial_state is None else initial_state.flip(0)
    out, state = _linear(
        "auto", q, k, v, decays, scale, initial_state, output_final_state, state_v_first, cu_seqlens, None
    )
    return out.flip(1), state.flip(0) if state is not None and cu_seqlens is not None else state


def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    g_gamma: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `chunk_simple_gla`: (out, attentions), which are [B, H, T, T], with scale and decays, 0 after the diagonal and
    between packed sequences. Without them out is computed in the form that is fastest."""
    result = _torch.retention(
        q,
        k,
        v,
        _decays(g, g_gamma),
        scale=scale,
        form="parallel" if output_attentions else "auto",
        cu_seqlens=_on_cpu(cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu),
        return_weights=output_attentions,
    )
    return result if output_attentions else (result, None)


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """RetNet's retention: `chunk_simple_gla` with its decays."""
    return chunk_simple_gla(
        q,
        k,
        v,
        None,
        _retnet(q),
        scale,
        initial_state,
        output_final_state,
        state_v_first,
        cu_seqlens,
        chunk_size=chunk_size,
    )


def fused_chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_retention` by another name: there another kernel."""
    return chunk_retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens, state_v_first=state_v_first)


def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """RetNet's retention: `fused_recurrent_simple_gla` with its decays."""
    return fused_recurrent_simple_gla(
        q, k, v, None, _retnet(q), scale, initial_state, output_final_state, reverse, state_v_first, cu_seqlens
    )


def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """RetNet's retention: `parallel_simple_gla` with its decays."""
    return parallel_simple_gla(q, k, v, None, scale, output_attentions, cu_seqlens, g_gamma=_retnet(q))


def _linear(
    form: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    state_v_first: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor | None]:
    result = _torch.retention(
        q,
        k,
        v,
        log_decay,
        scale=scale,
        form=form,
        chunk_size=chunk_size,
        initial_state=None if initial_state is None else initial_state.float(),
        cu_seqlens=_on_cpu(cu_seqlens),
        return_state=output_final_state,
        state_layout="vk" if state_v_first else "kv",
    )
    return result if output_final_state else (result, None)


def _decays(g: Tensor | None, g_gamma: Tensor | None) -> Tensor | None:
    if g is not None and g_gamma is not None:
        raise ValueError("g and g_gamma are both given; expected one of them, or none")
    for name, x, shape in (("g", g, "[B, T, H]"), ("g_gamma", g_gamma, "[H]")):
        if x is not None:
            if x.ndim != len(shape.split(",")):
                raise ValueError(f"{name} has {x.ndim} dimensions; expected {len(shape.split(','))}, {shape}")
            return x.float()
    return None


def _retnet(q: Tensor) -> Tensor:
    return _torch.log_decay(q.shape[2] if q.ndim == 4 else 0, "retnet", q.device)


def _on_cpu(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.cpu()


class CausalLMOutput(NamedTuple):
    """What RetNetForCausalLM returns."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: list[dict[str, Any]] | None


@dataclass
class RetNetConfig:
    """The fields of the configuration of that name which this module heeds, with their defaults."""

    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_heads: int = 8
    num_kv_heads: int | None = None
    expand_k: float = 1.0
    expand_v: float = 2.0
    hidden_ratio: int | None = 2
    intermediate_size: int | None = None
    attn_mode: str = "chunk"
    hidden_act: str = "swish"
    use_output_gate: bool = True
    elementwise_affine: bool = True
    norm_eps: float = 1e-6
    fuse_norm: bool = True
    tie_word_embeddings: bool = False
    vocab_size: int = 32000

    def feed_forward_size(self) -> int:
        """intermediate_size, or 2/3 of hidden_ratio hidden sizes, up to a multiple of 256."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3) // 256) * 256


class MultiScaleRetention(nn.Module):
    """That library's RetNet layer: projections, rotation of halves, retention, RMS norm of each head, gate, projection.

        q, k, v = heads of q_proj(x), k_proj(x), v_proj(x); q and k rotated, theta_j = 10000^(-2 j / K)
        y = o_proj(norm(retention(q, k, v)) * gate_fn(g_proj(x)))

    `mode` names a kernel there, "chunk", "fused_chunk", "parallel" or "fused_recurrent"; here the form is chosen by the
    library. Heads of keys and values may be fewer (num_kv_heads): they are repeated, since each head of queries has a
    decay of its own. Convolutions and feature maps are not supported. The norm's weight is `g_norm_swish_gate.weight`
    where that library fuses norm and gate, else `g_norm.weight`."""

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_short_conv: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        fuse_norm: bool = True,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("chunk", "fused_chunk", "parallel", "fused_recurrent"):
            raise ValueError(f"mode is {mode!r}; expected 'chunk', 'fused_chunk', 'parallel' or 'fused_recurrent'")
        if feature_map is not None or use_short_conv:
            raise NotImplementedError("feature_map and use_short_conv are not supported; expected None and False")
        gates = {"swish": F.silu, "silu": F.silu, "gelu": F.gelu, "relu": F.relu, "sigmoid": torch.sigmoid}
        if gate_fn not in gates:
            raise ValueError(f"gate_fn is {gate_fn!r}; expected one of {', '.join(map(repr, gates))}")
        self.mode = mode
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        # A quotient of two sizes times the second may be a little less than the first.
        self.key_dim, self.value_dim = (int(hidden_size * expand + 1e-6) for expand in (expand_k, expand_v))
        for name, size in (("expand_k", self.key_dim), ("expand_v", self.value_dim)):
            if size % num_heads:
                raise ValueError(f"{name} makes {size} features; expected a multiple of num_heads, {num_heads}")
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads is {num_kv_heads}; expected a divisor of num_heads, {num_heads}")
        self.head_k_dim, self.head_v_dim = self.key_dim // num_heads, self.value_dim // num_heads
        self.norm_eps = norm_eps
        self.gate_fn = gates[gate_fn]
        self.layer_idx = layer_idx
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.head_k_dim * self.num_kv_heads, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.head_v_dim * self.num_kv_heads, bias=False)
        self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False) if use_output_gate else None
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)
        fused = gate_fn == "swish" and fuse_norm and use_output_gate
        self._norm_name = "g_norm_swish_gate" if fused else "g_norm"
        # Only the weight of it is used.
        setattr(self, self._norm_name, nn.RMSNorm(self.head_v_dim, norm_eps, elementwise_affine))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: list[dict[str, Any]] | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, None, list[dict[str, Any]] | None]:
        """(y, None, past_key_values) of hidden_states [B, T, hidden_size].

        past_key_values: a list with a dictionary of each layer, which this one reads at `layer_idx` (0 where it has
        none) and, with use_cache, replaces: {"recurrent_state": [N, H, K, V], "position": tokens so far, [N] after
        packed sequences}; an empty list is a beginning.
        attention_mask: None, or [B, T] without zeros: batches of different lengths are packed, with cu_seqlens."""
        if attention_mask is not None and not attention_mask.all():
            raise NotImplementedError(
                "attention_mask has zeros; expected sequences of one length, or packed by cu_seqlens"
            )
        index = self.layer_idx or 0
        if use_cache and past_key_values is None:
            past_key_values = []
        if past_key_values is not None:
            past_key_values.extend({} for _ in range(index + 1 - len(past_key_values)))
        past = past_key_values[index] if past_key_values is not None else {}
        start = past.get("position", 0)

        q = self.q_proj(hidden_states).unflatten(-1, (self.num_heads, -1))
        k = self.k_proj(hidden_states).unflatten(-1, (self.num_kv_heads, -1))
        v = self.v_proj(hidden_states).unflatten(-1, (self.num_kv_heads, -1))
        theta = _torch.theta(self.head_k_dim, "rope", q.device)
        added, positions = q.shape[1], None
        if cu_seqlens is not None:
            added = cu_seqlens.diff().to(q.device)
            first = start - cu_seqlens[:-1].to(q.device)  # position minus place in the row
            positions = torch.arange(q.shape[1], device=q.device) + first.repeat_interleave(added)
        elif isinstance(start, Tensor):
            positions = start[:, None] + torch.arange(q.shape[1], device=q.device)
        q, k = (_torch.rotate(x, theta, start if positions is None else 0, positions=positions) for x in (q, k))
        if self.num_kv_heads < self.num_heads:
            k, v = (x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2) for x in (k, v))
        out, state = _linear(
            "auto",
            q,
            k,
            v,
            _retnet(q),
            None,
            past.get("recurrent_state"),
            use_cache,
            False,
            cu_seqlens,
            None,
        )
        if use_cache:
            past_key_values[index] = {"recurrent_state": state, "position": start + added}

        weight = getattr(self, self._norm_name).weight
        weight = None if weight is None else weight.float()
        if self.g_proj is None:
            out = _torch.head_norm_gate(out, None, weight, "rms", self.norm_eps)
        else:
            out = _torch.norm(out, self.g_proj(hidden_states), self.gate_fn, "rms", self.norm_eps, weight)
        return self.o_proj(out.flatten(-2)), None, past_key_values


class _FeedForward(nn.Module):
    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        size = config.feed_forward_size()
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Block(nn.Module):
    def __init__(self, config: RetNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = MultiScaleRetention(
            mode=config.attn_mode,
            hidden_size=config.hidden_size,
            expand_k=config.expand_k,
            expand_v=config.expand_v,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            use_output_gate=config.use_output_gate,
            gate_fn=config.hidden_act,
            elementwise_affine=config.elementwise_affine,
            norm_eps=config.norm_eps,
            fuse_norm=config.fuse_norm,
            layer_idx=layer_idx,
        )
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = _FeedForward(config)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        x = x + self.attn(self.attn_norm(x), **options)[0]
        return x + self.mlp(self.mlp_norm(x))


class RetNetModel(nn.Module):
    """Embedding, blocks and norm: hidden states [B, T, hidden_size] of tokens [B, T]."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        if config.hidden_act not in ("swish", "silu"):
            raise NotImplementedError(f"hidden_act is {config.hidden_act!r}; expected 'swish'")
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Block(config, n) for n in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, input_ids: Tensor, **options: Any) -> Tensor:
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, **options)
        return self.norm(x)


class RetNetForCausalLM(nn.Module):
    """The language model, with the parameters' names of that library's."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        self.config = config
        self.model = RetNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: list[dict[str, Any]] | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> CausalLMOutput:
        """Logits [B, T, vocab_size] of tokens [B, T] that follow those of past_key_values, and with labels [B, T]
        (those of input_ids; -100: none) the mean cross entropy of each following token."""
        if use_cache and past_key_values is None:
            past_key_values = []
        x = self.model(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
        )
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss, logits, past_key_values if use_cache else None)


def retnet_from_state_dict(state_dict: dict[str, Tensor], **config: Any) -> RetNetForCausalLM:
    """The model of a checkpoint of that library's RetNetForCausalLM (`torch.load`, or safetensors' load_file), in eval
    mode.

    Sizes follow from the tensors. The number of heads does where the norm has a weight, else `num_heads` is needed;
    norm_eps and hidden_act leave no trace, and are that library's defaults unless they are given. `config`: any field
    of `RetNetConfig`, most simply all of the checkpoint's config.json (those that this module does not heed are passed
    over).

    Raises: KeyError where a tensor is missing, ValueError for tensors that are not of that model or of other sizes."""
    weights = {name: x for name, x in state_dict.items() if not name.endswith("rotary.inv_freq")}
    for name in ("use_short_conv", "feature_map", "attn", "attnres_block_size"):
        if config.get(name):
            raise NotImplementedError(f"{name} is {config[name]!r}; not supported")
    known = {field.name for field in fields(RetNetConfig)}
    vocabulary, hidden = weights["model.embeddings.weight"].shape
    first = "model.layers.0.attn."
    key, value = weights[f"{first}q_proj.weight"].shape[0], weights[f"{first}o_proj.weight"].shape[1]
    norm = weights.get(f"{first}g_norm_swish_gate.weight", weights.get(f"{first}g_norm.weight"))
    heads = config.get("num_heads") or (value // norm.shape[0] if norm is not None else None)
    if heads is None:
        raise ValueError("num_heads is not given, and the norm has no weight that tells it")
    inferred = {
        "hidden_size": hidden,
        "vocab_size": vocabulary,
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")),
        "num_heads": heads,
        "num_kv_heads": weights[f"{first}k_proj.weight"].shape[0] * heads // key,
        "expand_k": key / hidden,
        "expand_v": value / hidden,
        "intermediate_size": weights["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "use_output_gate": f"{first}g_proj.weight" in weights,
        "elementwise_affine": norm is not None,
        "fuse_norm": f"{first}g_norm.weight" not in weights,
        "tie_word_embeddings": "lm_head.weight" not in weights,
    }
    given = {name: x for name, x in config.items() if name in known and name not in inferred}
    model = RetNetForCausalLM(RetNetConfig(**inferred, **given))
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embeddings.weight"]
    _torch.load(model, weights)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embeddings.weight
    return model
