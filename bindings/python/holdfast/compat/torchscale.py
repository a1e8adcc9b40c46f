"""TorchScale: its RetNet on Holdfast's kernels, layer and decoder, and `retnet_from_state_dict` for its checkpoints.

    out_t = q_t S_t,  S_t = gamma S_{t-1} + (K^-1/2 k_t)^T v_t      gamma_h = 1 - 2^(-5 - h); q and k rotated, in pairs
    y = out_proj(gate(g_proj(x)) * RMS norm of each head of out)    without weight

TorchScale divides the outputs of retention, row by row, before the norm, to keep 16-bit sums small, in each of its
three modes by something else. The norm undoes that but for its eps, and exactly that much is left of it here: rows are
divided by the same numbers. Two of the modes need all weights for them, T x T or chunk x chunk; `row_scale=False`
leaves the division out, and all modes are then linear in time and memory and agree with each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _torch

__all__ = ["MultiScaleRetention", "RelPos", "RetNetConfig", "RetNetDecoder", "RetNetRelPos", "retnet_from_state_dict"]


@dataclass
class RetNetConfig:
    """The fields of TorchScale's configuration that this module heeds, with their defaults. Any object that has them
    will do."""

    decoder_embed_dim: int = 768
    decoder_value_embed_dim: int = 1280
    decoder_retention_heads: int = 3
    decoder_ffn_embed_dim: int = 1280
    decoder_layers: int = 12
    decoder_normalize_before: bool = True
    activation_fn: str = "gelu"
    dropout: float = 0.0
    activation_dropout: float = 0.0
    no_scale_embedding: bool = True
    layernorm_embedding: bool = False
    deepnorm: bool = False
    share_decoder_input_output_embed: bool = False
    no_output_layer: bool = False
    layernorm_eps: float = 1e-6
    chunkwise_recurrent: bool = False
    recurrent_chunk_size: int = 512
    vocab_size: int = -1


@dataclass
class RelPos:
    """What RetNetRelPos tells the layers; TorchScale has tables of sines and masks instead."""

    start: int  # position of the first token
    theta: Tensor  # [K / 2]
    log_decay: Tensor  # [H]
    chunk_size: int


class RetNetRelPos(nn.Module):
    """Positions and decays of a decoder. Its buffers `angle` and `decay` are in TorchScale's checkpoints; values are
    made anew, in float32 whatever the model's type is."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.heads = args.decoder_retention_heads
        self.key_size = args.decoder_embed_dim // args.decoder_retention_heads
        self.recurrent_chunk_size = args.recurrent_chunk_size
        device = torch.get_default_device()
        self.register_buffer("angle", _torch.theta(self.key_size, "retnet", device).repeat_interleave(2))
        self.register_buffer("decay", _torch.log_decay(self.heads, "retnet", device))

    def forward(self, slen: int, activate_recurrent: bool = False, chunkwise_recurrent: bool = False) -> RelPos:
        """Of tokens 0 .. slen - 1, or with activate_recurrent of the last of them alone."""
        return RelPos(
            start=slen - 1 if activate_recurrent else 0,
            theta=_torch.theta(self.key_size, "retnet", self.angle.device),
            log_decay=_torch.log_decay(self.heads, "retnet", self.angle.device),
            chunk_size=self.recurrent_chunk_size,
        )


class MultiScaleRetention(nn.Module):
    """TorchScale's layer.

    Args:
        args: a RetNetConfig, or anything with its `layernorm_eps`; not `multiway`.
        embed_dim: of x, q and k; num_heads times an even number.
        value_dim: of v and the gate; a multiple of num_heads.
        num_heads: H.
        gate_fn: "swish" or "gelu".
        row_scale: divide the rows before the norm as TorchScale does (see the module)."""

    def __init__(
        self,
        args: Any,
        embed_dim: int,
        value_dim: int,
        num_heads: int,
        gate_fn: str = "swish",
        *,
        row_scale: bool = True,
    ) -> None:
        super().__init__()
        if getattr(args, "multiway", False):
            raise NotImplementedError("args.multiway is set; not supported")
        for name, size in (("embed_dim", embed_dim), ("value_dim", value_dim)):
            if size % num_heads:
                raise ValueError(f"{name} is {size}; expected a multiple of num_heads, {num_heads}")
        self.args = args
        self.embed_dim = embed_dim
        self.value_dim = value_dim
        self.num_heads = num_heads
        self.head_dim = value_dim // num_heads
        self.key_dim = embed_dim // num_heads
        self.gate_fn = _activation("gate_fn", gate_fn, {"swish": F.silu, "gelu": F.gelu})
        self.eps = args.layernorm_eps
        self.row_scale = row_scale
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.v_proj = nn.Linear(embed_dim, value_dim, bias=False)
        self.g_proj = nn.Linear(embed_dim, value_dim, bias=False)
        self.out_proj = nn.Linear(value_dim, embed_dim, bias=False)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)

    def forward(
        self,
        x: Tensor,
        rel_pos: RelPos,
        chunkwise_recurrent: bool = False,
        incremental_state: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """y [B, T, embed_dim] of x [B, T, embed_dim].

        Modes: parallel; chunkwise_recurrent, where T is a multiple of rel_pos.chunk_size; and recurrent, with an
        incremental_state, for any T: a dictionary, empty at the beginning, that is updated: "prev_key_value" [B, H, V,
        K] is the state divided by the root of "scale" [H], the sum of the decays of all tokens so far."""
        if not isinstance(rel_pos, RelPos):
            raise TypeError(
                f"rel_pos is of type {type(rel_pos).__name__}; expected what this module's RetNetRelPos returns"
            )
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1))
        k = self.k_proj(x).unflatten(-1, (self.num_heads, -1))
        v = self.v_proj(x).unflatten(-1, (self.num_heads, -1))
        q, k = (_torch.rotate(y, rel_pos.theta, rel_pos.start, interleaved=True) for y in (q, k))
        if incremental_state is not None:
            out = self._recurrent(q, k, v, rel_pos, incremental_state)
        elif chunkwise_recurrent:
            out = self._chunkwise(q, k, v, rel_pos)
        else:
            out = self._parallel(q, k, v, rel_pos)
        return self.out_proj(_torch.norm(out, self.g_proj(x), self.gate_fn, "rms", self.eps).flatten(-2))

    def _parallel(self, q: Tensor, k: Tensor, v: Tensor, rel_pos: RelPos) -> Tensor:
        if not self.row_scale:
            return _torch.retention(q, k, v, rel_pos.log_decay)
        out, weights = _torch.retention(q, k, v, rel_pos.log_decay, form="parallel", return_weights=True)
        root = _sum_of_decays(rel_pos.log_decay, 0, q.shape[1])[0].sqrt()
        total = weights.detach().float().abs().sum(-1).transpose(1, 2) / root  # [B, T, H]
        return _divided(out, root * total.clamp(1, 5e4))

    def _chunkwise(self, q: Tensor, k: Tensor, v: Tensor, rel_pos: RelPos) -> Tensor:
        size = rel_pos.chunk_size
        if q.shape[1] % size:
            raise ValueError(f"x has {q.shape[1]} tokens; expected a multiple of the chunk size, {size}")
        if not self.row_scale:
            return _torch.retention(q, k, v, rel_pos.log_decay, form="chunkwise", chunk_size=size)
        sums = _sum_of_decays(rel_pos.log_decay, 0, size)[0]  # [size, H]
        root, of_chunk = sums.sqrt(), sums[-1]
        outs, state = [], None
        scale = self.key_dim**-0.5
        for chunk in zip(*(x.split(size, 1) for x in (q, k, v)), strict=True):
            # TorchScale's state is one of scaled keys, divided by the sum of a chunk's decays.
            crossing = torch.ones((), device=q.device)
            if state is not None:
                columns = state.detach().abs().sum(-2).amax(-1) * scale / of_chunk  # [B, H]
                crossing = columns.clamp(min=1)[:, None]
            out, state, weights = _torch.retention(
                *chunk,
                rel_pos.log_decay,
                form="parallel",
                initial_state=state,
                return_state=True,
                return_weights=True,
            )
            within = weights.detach().float().abs().sum(-1).transpose(1, 2) / root
            outs.append(_divided(out, root * torch.maximum(within.clamp(min=1), crossing)))
        return torch.cat(outs, 1)

    def _recurrent(
        self, q: Tensor, k: Tensor, v: Tensor, rel_pos: RelPos, incremental_state: dict[str, Tensor]
    ) -> Tensor:
        before, state = 0, None
        if "prev_key_value" in incremental_state:
            before = incremental_state["scale"].float()
            state = incremental_state["prev_key_value"].float() * before.sqrt()[:, None, None]
        out, state = _torch.retention(
            q,
            k * self.key_dim**-0.5,  # here, and not in the kernel: the state contains it
            v,
            rel_pos.log_decay,
            scale=1.0,
            initial_state=state,
            return_state=True,
            state_layout="vk",
        )
        sums, after = _sum_of_decays(rel_pos.log_decay, before, q.shape[1])
        incremental_state["prev_key_value"] = state / after.sqrt()[:, None, None]
        incremental_state["scale"] = after
        return _divided(out, sums.sqrt()) if self.row_scale else out


def _sum_of_decays(log_decay: Tensor, before: Tensor | int, length: int) -> tuple[Tensor, Tensor]:
    """The sum of gamma^i over all tokens up to each of `length`, [length, H], and up to the last one, [H]; `before` is
    that of the tokens before."""
    g = log_decay.double()
    t = torch.arange(1, length + 1, device=g.device)[:, None]
    sums = torch.expm1(t * g) / torch.expm1(g) + torch.exp(t * g) * before
    return sums.float(), sums[-1].float()


def _divided(out: Tensor, rows: Tensor) -> Tensor:
    """out [B, T, H, V] by rows [T, H] or [B, T, H], in out's type."""
    return (out / rows[..., None]).to(out.dtype)


def _activation(name: str, value: str, functions: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    if value not in functions:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, functions))}")
    return functions[value]


class _GLU(nn.Module):
    def __init__(self, args: Any) -> None:
        super().__init__()
        functions = {"swish": F.silu, "gelu": F.gelu, "relu": F.relu}
        self.activation = _activation("activation_fn", args.activation_fn, functions)
        self.dropout = nn.Dropout(args.dropout)
        self.activation_dropout = nn.Dropout(args.activation_dropout)
        self.fc1 = nn.Linear(args.decoder_embed_dim, args.decoder_ffn_embed_dim, bias=False)
        self.fc2 = nn.Linear(args.decoder_ffn_embed_dim, args.decoder_embed_dim, bias=False)
        self.gate = nn.Linear(args.decoder_embed_dim, args.decoder_ffn_embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.fc1(x).float()).to(x.dtype) * self.gate(x)
        return self.dropout(self.fc2(self.activation_dropout(hidden)))


class _Layer(nn.Module):
    def __init__(self, args: Any, row_scale: bool) -> None:
        super().__init__()
        size, eps = args.decoder_embed_dim, args.layernorm_eps
        self.normalize_before = args.decoder_normalize_before
        self.alpha = (2.0 * args.decoder_layers) ** 0.25 if args.deepnorm else 1.0
        self.dropout = nn.Dropout(args.dropout)
        self.retention = MultiScaleRetention(
            args, size, args.decoder_value_embed_dim, args.decoder_retention_heads, row_scale=row_scale
        )
        self.retention_layer_norm = nn.RMSNorm(size, eps)
        self.ffn = _GLU(args)
        self.final_layer_norm = nn.RMSNorm(size, eps)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        def around(x: Tensor, norm: nn.Module, block: Callable[[Tensor], Tensor]) -> Tensor:
            if self.normalize_before:
                return x * self.alpha + block(norm(x))
            return norm(x * self.alpha + block(x))

        x = around(x, self.retention_layer_norm, lambda y: self.dropout(self.retention(y, **options)))
        return around(x, self.final_layer_norm, self.ffn)


class RetNetDecoder(nn.Module):
    """TorchScale's decoder, without experts, layers that are dropped, and fairscale's wrappers.

    Args:
        args: a RetNetConfig, or anything with its fields.
        embed_tokens: an nn.Embedding.
        output_projection: a module, or None: made as `args` says.
        row_scale: see the module."""

    def __init__(
        self,
        args: Any,
        embed_tokens: nn.Embedding | None = None,
        output_projection: nn.Module | None = None,
        *,
        row_scale: bool = True,
    ) -> None:
        super().__init__()
        for name in ("moe_freq", "drop_path_rate", "checkpoint_activations", "fsdp", "multiway", "xpos_rel_pos"):
            if getattr(args, name, None):
                raise NotImplementedError(f"args.{name} is {getattr(args, name)!r}; not supported")
        size, eps = args.decoder_embed_dim, args.layernorm_eps
        self.args = args
        self.embed_dim = size
        self.embed_scale = 1.0 if args.no_scale_embedding else math.sqrt(size)
        self.dropout = nn.Dropout(args.dropout)
        self.embed_tokens = embed_tokens
        if output_projection is None and not args.no_output_layer and args.vocab_size > 0:
            output_projection = nn.Linear(size, args.vocab_size, bias=False)
            if args.share_decoder_input_output_embed:
                output_projection.weight = embed_tokens.weight
            else:
                nn.init.normal_(output_projection.weight, std=size**-0.5)
        self.output_projection = output_projection
        self.layernorm_embedding = nn.RMSNorm(size, eps) if args.layernorm_embedding else None
        self.layers = nn.ModuleList(_Layer(args, row_scale) for _ in range(args.decoder_layers))
        self.num_layers = len(self.layers)
        self.layer_norm = nn.RMSNorm(size, eps) if args.decoder_normalize_before else None
        self.retnet_rel_pos = RetNetRelPos(args)
        self.chunkwise_recurrent = args.chunkwise_recurrent
        self.recurrent_chunk_size = args.recurrent_chunk_size
        if args.deepnorm:
            with torch.no_grad():
                for name, p in self.named_parameters():
                    if any(part in name for part in ("fc1", "fc2", "out_proj", "v_proj")):
                        p /= (8.0 * args.decoder_layers) ** 0.25

    def forward(
        self,
        prev_output_tokens: Tensor,
        incremental_state: dict[Any, Any] | None = None,
        features_only: bool = False,
        token_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """(logits or, with features_only, features, {"inner_states": of each layer}) of tokens [B, T].

        With an incremental_state, a dictionary that is empty at the beginning, only the last token is computed, after
        those of the calls before; or all of them, where incremental_state["is_first_step"] is true: a prompt.
        Chunkwise, T need not be a multiple of the chunk."""
        length = prev_output_tokens.shape[1]
        first = incremental_state is not None and incremental_state.get("is_first_step", False)
        last_alone = incremental_state is not None and not first
        if token_embeddings is None:
            token_embeddings = self.embed_tokens(prev_output_tokens[:, -1:] if last_alone else prev_output_tokens)
        x = self.embed_scale * token_embeddings
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        x = self.dropout(x)
        chunkwise = self.chunkwise_recurrent and incremental_state is None
        if chunkwise:
            x = F.pad(x, (0, 0, 0, -length % self.recurrent_chunk_size))
        rel_pos = self.retnet_rel_pos(length, last_alone, chunkwise)
        inner_states = [x]
        for index, layer in enumerate(self.layers):
            state = None if incremental_state is None else incremental_state.setdefault(index, {})
            x = layer(x, rel_pos=rel_pos, chunkwise_recurrent=chunkwise, incremental_state=state)
            inner_states.append(x)
        x = x[:, :length] if chunkwise else x
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        if not features_only and self.output_projection is not None:
            x = self.output_projection(x)
        return x, {"inner_states": inner_states}


def retnet_from_state_dict(state_dict: dict[str, Any], *, row_scale: bool = True, **config: Any) -> RetNetDecoder:
    """The decoder of a checkpoint of TorchScale's RetNetDecoder, in eval mode: of its state dict, of one with a prefix
    before all names ("decoder.", "model.decoder.", ...), or of a fairseq checkpoint, which has it as "model".

    Sizes and heads follow from the tensors. activation_fn ("gelu"), layernorm_eps (1e-6), no_scale_embedding (True),
    deepnorm and recurrent_chunk_size leave no trace, and are RetNetConfig's defaults unless they are given in `config`.

    Raises: KeyError where a tensor is missing, ValueError for tensors that are not of that model or of other sizes."""
    weights = state_dict["model"] if isinstance(state_dict.get("model"), dict) else state_dict
    end = "embed_tokens.weight"
    prefixes = [name.removesuffix(end) for name in weights if name.endswith(end)]
    if not prefixes:
        raise KeyError("state_dict lacks embed_tokens.weight")
    weights = {name.removeprefix(prefixes[0]): x for name, x in weights.items() if name.startswith(prefixes[0])}
    weights.pop("version", None)
    if unknown := [name for name in weights if "moe_layer" in name or ".A." in name or ".B." in name]:
        raise NotImplementedError(f"state_dict has {unknown[0]}; experts and multiway are not supported")
    vocabulary, size = weights[end].shape
    first = "layers.0."
    inferred = {
        "decoder_embed_dim": size,
        "decoder_value_embed_dim": weights[f"{first}retention.v_proj.weight"].shape[0],
        "decoder_retention_heads": weights["retnet_rel_pos.decay"].shape[0],
        "decoder_ffn_embed_dim": weights[f"{first}ffn.fc1.weight"].shape[0],
        "decoder_layers": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers.")),
        "decoder_normalize_before": "layer_norm.weight" in weights,
        "layernorm_embedding": "layernorm_embedding.weight" in weights,
        "no_output_layer": False,
        "vocab_size": vocabulary,
    }
    shared = "output_projection.weight" not in weights
    if config.pop("share_decoder_input_output_embed", shared) and shared:
        weights["output_projection.weight"] = weights[end]
    args = RetNetConfig(**{**config, **inferred}, share_decoder_input_output_embed=shared)
    decoder = RetNetDecoder(args, nn.Embedding(vocabulary, size), row_scale=row_scale)
    _torch.load(decoder, weights)
    if shared:
        decoder.output_projection.weight = decoder.embed_tokens.weight
    return decoder
