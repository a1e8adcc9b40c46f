"""Layers for PyTorch that stand where a transformer has its attention: `MultiScaleRetention` (RetNet),
`GatedRetention`, `PowerRetention`, `SoftmaxAttention` to compare with, and `CausalSelfAttention`, which takes the place
of nanoGPT's.

All are called alike, `y = layer(x, state)`, x and y [B, T, dim]:

    layer(x)                    a whole sequence, from nothing: training
    state = layer.new_state(B)
    layer(x, state)             any number of tokens, from the state on, which is then that of the last token: a prompt,
                                a piece of a long text, or one token (T = 1), which runs as one step in place
    layer(x, form=...)          "parallel", "chunkwise", "recurrent": the same values to rounding, in another way
    layer(x, cu_seqlens=...)    sequences packed one after the other into B = 1; a state has one row for each of them

A state is a dictionary of tensors whose first axis is the batch. Gradients flow through it where it is not detached.
Its tensors and all decays and angles are float32 whatever the type of the layer. `holdfast.lm` makes models of these
layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .torch import decay, head_norm_gate, retention, retention_step, rotate, state_size, theta

__all__ = [
    "CausalConvolution",
    "CausalSelfAttention",
    "GatedRetention",
    "MultiScaleRetention",
    "PowerRetention",
    "SoftmaxAttention",
]

LayerState: TypeAlias = dict[str, Tensor]
Form: TypeAlias = Literal["auto", "parallel", "chunkwise", "recurrent"]
Rotation: TypeAlias = Literal["retnet", "rope"] | None
Norm: TypeAlias = Literal["rms", "layer"] | None


@dataclass(frozen=True)
class Packed:
    """Where the sequences of a packed row are; layers take it for cu_seqlens, so that a model computes it once."""

    cu_seqlens: Tensor  # [N + 1], int64, on the CPU
    sequence: Tensor  # [T], of each token
    index: Tensor  # [T], of each token in its sequence
    lengths: Tensor  # [N]

    @classmethod
    def of(cls, cu_seqlens: Tensor | Packed | None, x: Tensor) -> Packed | None:
        """For x [1, T, ..]."""
        if cu_seqlens is None or isinstance(cu_seqlens, Packed):
            return cu_seqlens
        cpu = torch.as_tensor(cu_seqlens).to("cpu", torch.int64)
        if cpu.ndim != 1 or len(cpu) < 1:
            raise ValueError(f"cu_seqlens has shape {list(cpu.shape)}; expected [N + 1]")
        if x.shape[0] != 1:
            raise ValueError(f"x has batch {x.shape[0]}; expected 1, of packed sequences (cu_seqlens)")
        lengths = cpu.diff()
        if cpu[0] != 0 or cpu[-1] != x.shape[1] or (lengths < 0).any():
            raise ValueError(f"cu_seqlens is {cpu.tolist()}; expected to rise from 0 to T, {x.shape[1]}")
        sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
        index = torch.arange(x.shape[1]) - cpu[sequence]
        return cls(cpu, *(y.to(x.device) for y in (sequence, index, lengths)))

    def padded(self, x: Tensor) -> Tensor:
        """[N, longest, ..] of x [1, T, ..], zeros at the ends."""
        longest = int(self.cu_seqlens.diff().max()) if len(self.cu_seqlens) > 1 else 0
        out = x.new_zeros((len(self.lengths), longest, *x.shape[2:]))
        return out.index_put((self.sequence, self.index), x[0])


def positions(x: Tensor, state: LayerState | None, packed: Packed | None) -> Tensor | None:
    """Of the tokens of x, [T] or [B, T]; None: 0 to T - 1."""
    if packed is not None:
        return packed.index if state is None else packed.index + state["position"][packed.sequence]
    if state is None:
        return None
    first = state["position"][:, None]
    return first if x.shape[1] == 1 else first + torch.arange(x.shape[1], device=x.device)


def advance(x: Tensor, state: LayerState, packed: Packed | None) -> None:
    state["position"] = state["position"] + (x.shape[1] if packed is None else packed.lengths)


class CausalConvolution(nn.Module):
    """A short convolution along time, each channel by itself: y_t = sum_w weight_w x_{t - w}, w from 0 to width - 1.

    It starts near the identity, but with a look back: a model that has to find the tokens before first learns later.
    State "inputs" [B, width - 1, dim]: the last tokens."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width is {width}; expected at least 1")
        self.dim, self.width = dim, width
        self.weight = nn.Parameter(torch.empty(width, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.normal_(std=0.3)
            self.weight[0] = 1

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.width}"

    def new_state(self, batch: int) -> LayerState:
        return {"inputs": self.weight.new_zeros((batch, self.width - 1, self.dim), dtype=torch.float32)}

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | Packed | None = None
    ) -> Tensor:
        packed, before = Packed.of(cu_seqlens, x), self.width - 1
        weight = self.weight.to(x.dtype)
        if packed is not None:
            return self._packed(x, weight, state, packed)
        if state is None:
            padded = F.pad(x, (0, 0, before, 0))
        else:
            padded = torch.cat([state["inputs"].to(x.dtype), x], 1)
            # A copy: a view would keep all of the tokens.
            state["inputs"] = padded[:, padded.shape[1] - before :].to(torch.float32, copy=True)
        if x.shape[1] == 1:
            return (padded * weight.flip(0)).sum(1, keepdim=True)
        y = padded[:, before:] * weight[0]
        for w in range(1, self.width):
            y = torch.addcmul(y, padded[:, before - w : padded.shape[1] - w], weight[w])
        return y

    def _packed(self, x: Tensor, weight: Tensor, state: LayerState | None, packed: Packed) -> Tensor:
        before, count = self.width - 1, len(packed.lengths)
        rows = x.new_zeros((count, before, self.dim)) if state is None else state["inputs"].to(x.dtype)
        rows = torch.cat([rows.flatten(0, 1), x[0]])  # what came before each sequence, then all tokens

        def row(sequence: Tensor, index: Tensor) -> Tensor:
            token = count * before + packed.cu_seqlens[:-1].to(x.device)[sequence] + index
            return torch.where(index < 0, sequence * before + before + index, token)

        y = x[0] * weight[0]
        for w in range(1, self.width):
            y = torch.addcmul(y, rows[row(packed.sequence, packed.index - w)], weight[w])
        if state is not None:
            last = packed.lengths[:, None] + torch.arange(-before, 0, device=x.device)
            state["inputs"] = rows[row(torch.arange(count, device=x.device)[:, None].expand_as(last), last)].float()
        return y[None]


class _Layer(nn.Module):
    """What the layers have in common: projections, convolution, rotation, position."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None,
        key_size: int | None,
        value_size: int | None,
        conv_width: int,
        rotation: Rotation,
        bias: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"heads is {heads}, kv_heads {kv_heads}; expected a multiple of kv_heads")
        if key_size is None and dim % heads:
            raise ValueError(f"dim is {dim}; expected a multiple of heads, {heads}, or a key_size")
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads
        self.key_size = dim // heads if key_size is None else key_size
        self.value_size = self.key_size if value_size is None else value_size
        if rotation not in ("retnet", "rope", None):
            raise ValueError(f"rotation is {rotation!r}; expected 'retnet', 'rope' or None")
        if rotation and self.key_size % 2:
            raise ValueError(f"key_size is {self.key_size}; expected an even number, to rotate pairs")
        self.rotation = rotation
        if conv_width < 0:
            raise ValueError(f"conv_width is {conv_width}; expected at least 0")
        self.conv = CausalConvolution(dim, conv_width) if conv_width > 1 else None
        self.q_proj = nn.Linear(dim, heads * self.key_size, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * self.key_size, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * self.value_size, bias=bias)
        self.out_proj = nn.Linear(heads * self.value_size, dim, bias=bias)
        # Made by _apply, and again whenever the layer moves.
        self.register_buffer("theta", None, persistent=False)
        self.register_buffer("log_decay", None, persistent=False)
        self._make_constants(self.q_proj.weight.device)

    def _make_constants(self, device: torch.device) -> None:
        """Constants, in float32 whatever the layer is converted to: in bfloat16 a decay of 1 - 2^-9 is 1."""
        if self.rotation:
            self.theta = theta(self.key_size, self.rotation).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Layer:
        super()._apply(fn, recurse)
        self._make_constants(self.q_proj.weight.device)
        return self

    def new_state(self, batch: int) -> LayerState:
        """The state of `batch` sequences of which there is no token yet."""
        device = self.q_proj.weight.device
        state = {"position": torch.zeros(batch, dtype=torch.int64, device=device)}
        return state if self.conv is None else {**state, **self.conv.new_state(batch)}

    def _project(
        self, x: Tensor, state: LayerState | None, packed: Packed | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(what the projections read, q, k, v), rotated, [B, T, heads, size]."""
        _check(x, state, packed, self.dim)
        h = x if self.conv is None else self.conv(x, state, cu_seqlens=packed)
        q = self.q_proj(h).unflatten(-1, (self.heads, self.key_size))
        k = self.k_proj(h).unflatten(-1, (self.kv_heads, self.key_size))
        v = self.v_proj(h).unflatten(-1, (self.kv_heads, self.value_size))
        if self.rotation:
            where, pairs = positions(x, state, packed), self.rotation == "retnet"
            q = rotate(q, self.theta, interleaved=pairs, positions=where)
            k = rotate(k, self.theta, interleaved=pairs, positions=where)
        return h, q, k, v


def _check(x: Tensor, state: LayerState | None, packed: Packed | None, dim: int) -> None:
    if x.ndim != 3 or x.shape[2] != dim:
        raise ValueError(f"x has shape {list(x.shape)}; expected [B, T, {dim}]")
    if state is not None:
        wanted = x.shape[0] if packed is None else len(packed.lengths)
        if len(state["position"]) != wanted:
            raise ValueError(f"state is of {len(state['position'])} sequences; expected {wanted}, as many as x has")


class _Retention(_Layer):
    """What the layers of retention have in common: the kernel, its state, and norm and gate after it."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None,
        key_size: int | None,
        value_size: int | None,
        conv_width: int,
        rotation: Rotation,
        degree: int,
        normalize: bool,
        norm: Norm,
        norm_weight: bool,
        eps: float,
        swish_gate: bool,
        chunk_size: int | None,
    ) -> None:
        sizes = {"kv_heads": kv_heads, "key_size": key_size, "value_size": value_size}
        super().__init__(dim, heads, **sizes, conv_width=conv_width, rotation=rotation)
        if norm not in ("rms", "layer", None):
            raise ValueError(f"norm is {norm!r}; expected 'rms', 'layer' or None")
        if norm_weight and norm is None:
            raise ValueError("norm_weight is True and norm None; expected a norm to be weighted")
        self.features = state_size(self.key_size, degree)
        self.degree, self.normalize, self.chunk_size = degree, normalize, chunk_size
        self.norm, self.eps = norm, eps
        self.g_proj = nn.Linear(dim, heads * self.value_size, bias=False) if swish_gate else None
        self.norm_weight = nn.Parameter(torch.ones(heads, self.value_size)) if norm_weight else None

    def new_state(self, batch: int) -> LayerState:
        state, device = super().new_state(batch), self.q_proj.weight.device
        zeros = {"dtype": torch.float32, "device": device}
        state["state"] = torch.zeros((batch, self.kv_heads, self.features, self.value_size), **zeros)
        if self.normalize:
            state["sum_of_keys"] = torch.zeros((batch, self.kv_heads, self.features), **zeros)
        return state

    def _log_decay(self, h: Tensor) -> Tensor | None:
        """[Hk] or [B, T, Hk], of what the projections read."""
        return self.log_decay

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        form: Form = "auto",
        cu_seqlens: Tensor | Packed | None = None,
    ) -> Tensor:
        """y [B, T, dim] of x [B, T, dim]; see the module."""
        packed = Packed.of(cu_seqlens, x)
        h, q, k, v = self._project(x, state, packed)
        log_decay = self._log_decay(h)
        options: dict[str, Any] = {"degree": self.degree, "normalize": self.normalize}
        one = state is not None and x.shape[1] == 1 and packed is None and form in ("auto", "recurrent")
        if one and not torch.is_grad_enabled():
            step_decay = log_decay[:, 0] if log_decay is not None and log_decay.ndim == 3 else log_decay
            sum_of_keys = state.get("sum_of_keys")
            out = retention_step(q[:, 0], k[:, 0], v[:, 0], step_decay, state["state"], sum_of_keys, **options)[:, None]
        else:
            options.update(form=form, chunk_size=self.chunk_size)
            if packed is not None:
                options["cu_seqlens"] = packed.cu_seqlens
            if state is None:
                out = retention(q, k, v, log_decay, **options)
            else:
                options.update(initial_state=state["state"], initial_sum_of_keys=state.get("sum_of_keys"))
                out, state["state"], *sums = retention(q, k, v, log_decay, return_state=True, **options)
                if sums:
                    [state["sum_of_keys"]] = sums
        if state is not None:
            advance(x, state, packed)
        gate = None if self.g_proj is None else self.g_proj(x).unflatten(-1, (self.heads, self.value_size))
        if self.norm is not None:
            weight = None if self.norm_weight is None else self.norm_weight.float()
            out = head_norm_gate(out, gate, weight, self.norm, self.eps)
        elif gate is not None:
            out = out * F.silu(gate)
        return self.out_proj(out.flatten(-2))


class MultiScaleRetention(_Retention):
    """RetNet's layer (Sun et al. 2023, arXiv:2307.08621): a constant decay for each head, queries and keys rotated in
    pairs, the norm of each head, a swish gate.

        S_t = gamma_h S_{t-1} + k_t^T v_t        out_t = K^-1/2 q_t S_t        y = out_proj(norm(out) swish(g_proj(x)))

    Args:
        dim: of x and y.
        heads: H.
        kv_heads: of keys, values and decays, a divisor of heads. None: H.
        key_size: K. None: dim / heads.
        value_size: V. None: 2 K, as in the paper.
        decay: convention of gamma: "retnet", "linspace", or "none", no decay.
        rotation: convention of angles: "retnet" (pairs of neighbours), "rope" (halves), None.
        norm: of each head: "rms" (the reference), "layer" (the paper's group norm), None.
        norm_weight: with weights [H, V].
        eps: of the norm.
        swish_gate: with the gate.
        conv_width: of a CausalConvolution of what q, k and v are made from. 0: none.
        chunk_size: as in `holdfast.retention`."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        key_size: int | None = None,
        value_size: int | None = None,
        decay: Literal["retnet", "linspace", "none"] = "retnet",
        rotation: Rotation = "retnet",
        norm: Norm = "rms",
        norm_weight: bool = False,
        eps: float = 1e-6,
        swish_gate: bool = True,
        conv_width: int = 0,
        chunk_size: int | None = None,
    ) -> None:
        if decay not in ("retnet", "linspace", "none"):
            raise ValueError(f"decay is {decay!r}; expected 'retnet', 'linspace' or 'none'")
        self.decay = decay
        if value_size is None:
            value_size = 2 * (dim // max(heads, 1) if key_size is None else key_size)
        super().__init__(
            dim, heads, kv_heads=kv_heads, key_size=key_size, value_size=value_size, conv_width=conv_width,
            rotation=rotation, degree=1, normalize=False, norm=norm, norm_weight=norm_weight, eps=eps,
            swish_gate=swish_gate, chunk_size=chunk_size,
        )  # fmt: skip

    def _make_constants(self, device: torch.device) -> None:
        super()._make_constants(device)
        if self.decay != "none":
            self.log_decay = decay(self.kv_heads, self.decay).to(device)


class _Gated(_Retention):
    """Decays that the token decides: log_decay = log sigmoid(decay_proj(x) + offset), in float32 also under autocast.

    The offset is a buffer, not a bias: who initialises all biases of a model with 0 does not make it forget at once."""

    def __init__(self, *arguments: Any, gating: bool, offset: Callable[[int], Tensor], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.decay_proj = nn.Linear(self.dim, self.kv_heads) if gating else None
        self.make_offset = offset
        if gating:
            self.register_buffer("decay_offset", offset(self.kv_heads))
            nn.init.normal_(self.decay_proj.weight, std=0.02)
            nn.init.zeros_(self.decay_proj.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Gated:
        """The offset stays float32, and is made where a layer of the meta device gets its memory."""
        offset = None if self.decay_proj is None else self.decay_offset
        super()._apply(fn, recurse)
        if offset is not None:
            device = self.decay_proj.weight.device
            self.decay_offset = (self.make_offset(self.kv_heads) if offset.is_meta else offset).to(device)
        return self

    def _log_decay(self, h: Tensor) -> Tensor | None:
        if self.decay_proj is None:
            return None
        with torch.autocast(h.device.type, enabled=False):
            logits = F.linear(h.float(), self.decay_proj.weight.float(), self.decay_proj.bias.float())
            return F.logsigmoid(logits + self.decay_offset)


class GatedRetention(_Gated):
    """Retention whose decay the token decides, also known as simple gated linear attention; norm and swish gate as in
    MultiScaleRetention. The decays start as RetNet's.

        S_t = a_t S_{t-1} + k_t^T v_t        a_t = sigmoid(decay_proj(x_t) + offset_h), one for each head
        out_t = K^-1/2 q_t S_t               y = out_proj(norm(out) swish(g_proj(x)))

    Args: those of MultiScaleRetention but for decay, and
        value_size: V. None: K.
        rotation: None by default.
        gating: False: no decay."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        key_size: int | None = None,
        value_size: int | None = None,
        gating: bool = True,
        rotation: Rotation = None,
        norm: Norm = "rms",
        norm_weight: bool = False,
        eps: float = 1e-6,
        swish_gate: bool = True,
        conv_width: int = 0,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(
            dim, heads, kv_heads=kv_heads, key_size=key_size, value_size=value_size, conv_width=conv_width,
            rotation=rotation, degree=1, normalize=False, norm=norm, norm_weight=norm_weight, eps=eps,
            swish_gate=swish_gate, chunk_size=chunk_size, gating=gating, offset=_retnet_logits,
        )  # fmt: skip


class PowerRetention(_Gated):
    """Power retention (Kumar et al. 2025, arXiv:2507.04239): weights are powers of q.k, divided by their sum as
    those of softmax are.

        out_t = sum_{s <= t} w_ts v_s / sum_{s <= t} w_ts        w_ts = (q_t.k_s)^p a_{s+1} .. a_t
        a_t = sigmoid(decay_proj(x_t) + offset), near 0.999 at the start        y = out_proj(out)

    Args: those of GatedRetention, and
        degree: p, 2 to 4. An odd one may divide by 0.
        kv_heads: for H, Hk times smaller states.
        rotation: "rope" by default.
        norm, swish_gate: none by default: out is a mean of values already."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        degree: int = 2,
        kv_heads: int | None = None,
        key_size: int | None = None,
        value_size: int | None = None,
        gating: bool = True,
        rotation: Rotation = "rope",
        norm: Norm = None,
        norm_weight: bool = False,
        eps: float = 1e-6,
        swish_gate: bool = False,
        conv_width: int = 0,
        chunk_size: int | None = None,
    ) -> None:
        if degree not in (2, 3, 4):
            raise ValueError(f"degree is {degree!r}; expected 2, 3 or 4")
        super().__init__(
            dim, heads, kv_heads=kv_heads, key_size=key_size, value_size=value_size, conv_width=conv_width,
            rotation=rotation, degree=degree, normalize=True, norm=norm, norm_weight=norm_weight, eps=eps,
            swish_gate=swish_gate, chunk_size=chunk_size, gating=gating, offset=_weak_logits,
        )  # fmt: skip


def _retnet_logits(heads: int) -> Tensor:
    """logit(gamma_h), gamma_h = 1 - 2^(-5 - h)."""
    return torch.tensor([math.log(2.0 ** (5 + h) - 1) for h in range(heads)])


def _weak_logits(heads: int) -> Tensor:
    """logit(0.999)."""
    return torch.full((heads,), math.log(999))


class SoftmaxAttention(_Layer):
    """Causal softmax attention by PyTorch, called as the other layers are: to compare them with, and to mix with them.

    State: "keys", "values" [B, room, Hk, size]: those of all tokens, and room for more. It grows with the text."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        key_size: int | None = None,
        value_size: int | None = None,
        rotation: Rotation = "rope",
        conv_width: int = 0,
    ) -> None:
        super().__init__(
            dim, heads, kv_heads=kv_heads, key_size=key_size, value_size=value_size, conv_width=conv_width,
            rotation=rotation,
        )  # fmt: skip

    def new_state(self, batch: int) -> LayerState:
        state, device = super().new_state(batch), self.q_proj.weight.device
        for name, size in (("keys", self.key_size), ("values", self.value_size)):
            state[name] = torch.zeros((batch, 0, self.kv_heads, size), dtype=torch.float32, device=device)
        return state

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        form: Form = "auto",
        cu_seqlens: Tensor | Packed | None = None,
    ) -> Tensor:
        """y [B, T, dim] of x [B, T, dim]; see the module. There is one form: the others' names are accepted."""
        if form not in ("auto", "parallel", "chunkwise", "recurrent"):
            raise ValueError(f"form is {form!r}; expected 'auto', 'parallel', 'chunkwise' or 'recurrent'")
        packed = Packed.of(cu_seqlens, x)
        _, q, k, v = self._project(x, state, packed)
        if packed is not None:
            q, k, v = (packed.padded(y) for y in (q, k, v))
        if state is None:
            out = self._attention(q, k, v, None)  # what is padded stands at the end, where no other token looks
        else:
            keys, values, mask = self._remember(k, v, state)
            out = self._attention(q, keys.to(q.dtype), values.to(q.dtype), mask)
            advance(x, state, packed)
        if packed is not None:
            out = out[packed.sequence, packed.index][None]
        return self.out_proj(out.flatten(-2))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        grouped = self.heads != self.kv_heads
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
        return out.transpose(1, 2)

    def _remember(self, k: Tensor, v: Tensor, state: LayerState) -> tuple[Tensor, Tensor, Tensor]:
        """Write keys and values behind those of the state; returns all of them, and which of them each token sees."""
        B, T = k.shape[:2]
        where = state["position"][:, None] + torch.arange(T, device=k.device)
        needed = int(state["position"].max()) + T if B else 0
        rows = (torch.arange(B, device=k.device)[:, None], where)
        for name, new in (("keys", k), ("values", v)):
            old = state[name]
            if old.shape[1] < needed:  # twice what there is, so that tokens one by one do not copy all of it each time
                old = F.pad(old, (0, 0, 0, 0, 0, max(needed, 2 * old.shape[1]) - old.shape[1]))
            if torch.is_grad_enabled():
                state[name] = old.index_put(rows, new.float())
            else:
                state[name] = old.index_put_(rows, new.float())
        mask = torch.arange(needed, device=k.device) <= where[..., None]
        return state["keys"][:, :needed], state["values"][:, :needed], mask[:, None]


class CausalSelfAttention(nn.Module):
    """Takes the place of the class of that name in nanoGPT's model.py: `model.CausalSelfAttention = this class`, or
    `functools.partial(this class, attention="retnet")`. It is made from the same config (n_embd, n_head, bias, dropout)
    and called as `y = layer(x)`; c_attn and c_proj are nanoGPT's, so that its checkpoints load but for the gates.

    Args:
        config: anything with n_embd, n_head, and, where they are to be other than False and 0, bias and dropout.
        attention: "power" (PowerRetention without rotation: nanoGPT adds positions), "gated" or "retnet" (retention
            with decays of the token, or constant ones, and the norm of each head).
        degree: of "power".
        gating: decays of the token; False: none. Not for "retnet".
        chunk_size: as in `holdfast.retention`."""

    def __init__(
        self,
        config: Any,
        attention: Literal["power", "gated", "retnet"] = "power",
        degree: int = 2,
        gating: bool = True,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if attention not in ("power", "gated", "retnet"):
            raise ValueError(f"attention is {attention!r}; expected 'power', 'gated' or 'retnet'")
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd is {config.n_embd}; expected a multiple of n_head, {config.n_head}")
        self.n_head, self.n_embd, self.attention = config.n_head, config.n_embd, attention
        self.degree, self.chunk_size = degree if attention == "power" else 1, chunk_size
        bias = getattr(config, "bias", False)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=bias)
        self.c_gate = nn.Linear(config.n_embd, config.n_head) if gating and attention != "retnet" else None
        self.resid_dropout = nn.Dropout(getattr(config, "dropout", 0.0))
        self.register_buffer("constants", None, persistent=False)
        self._make_constants(self.c_attn.weight.device)

    def _make_constants(self, device: torch.device) -> None:
        """RetNet's decays, or the offset of the gates (see _Gated), in float32 whatever the layer is converted to."""
        make = {"retnet": decay, "gated": _retnet_logits, "power": _weak_logits}[self.attention]
        self.constants = make(self.n_head).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CausalSelfAttention:
        super()._apply(fn, recurse)
        self._make_constants(self.c_attn.weight.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """y [B, T, n_embd] of x [B, T, n_embd]."""
        q, k, v = (y.unflatten(-1, (self.n_head, -1)) for y in self.c_attn(x).chunk(3, -1))
        if self.attention == "retnet":
            log_decay = self.constants
        elif self.c_gate is None:
            log_decay = None
        else:
            with torch.autocast(x.device.type, enabled=False):
                logits = F.linear(x.float(), self.c_gate.weight.float(), self.c_gate.bias.float())
                log_decay = F.logsigmoid(logits + self.constants)
        out = retention(q, k, v, log_decay, degree=self.degree, chunk_size=self.chunk_size)
        if self.attention != "power":
            out = head_norm_gate(out)
        return self.resid_dropout(self.c_proj(out.flatten(-2)))
