"""yet-another-retnet: its functions, layers and language model on Holdfast's kernels; the same arguments, parameters
and state dicts.

    out_t = q_t S_t,  S_t = gamma S_{t-1} + (k_t / scale)^T v_t      gamma: `holdfast.decay(H, "linspace")`

The scale divides k, sqrt(K) by default, so that states contain it: [b, h, K, V]. Functions take [b, h, t, d], views as
well as contiguous tensors. float32, float16 and bfloat16; decays, angles and states are in float32 whatever these are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _torch

__all__ = [
    "MultiScaleRetention",
    "MultiheadRetention",
    "RetNet",
    "RetNetDecoder",
    "RetNetDecoderLayer",
    "retention_chunkwise",
    "retention_parallel",
    "retention_recurrent",
    "retnet_1_3b",
    "retnet_2_7b",
    "retnet_6_7b",
]


def retention_parallel(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, need_weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Of whole sequences [b, h, t, d]: (out, weights), weights [b, h, t, t] if they are needed, else None, and then out
    is computed in the form that is fastest."""
    _check(4, query=query, key=key, value=value)
    out, weights = _parallel(*(x.transpose(1, 2) for x in (query, key, value)), scale, need_weights)
    return out.transpose(1, 2), weights


def retention_recurrent(
    query: Tensor, key: Tensor, value: Tensor, prev_state: Tensor | None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Of one token [b, h, d]: (out [b, h, d], state [b, h, d, d]). A `prev_state` of None is zeros; it is not written
    to."""
    _check(3, query=query, key=key, value=value)
    out, state = _continued(*(x.unsqueeze(1) for x in (query, key, value)), prev_state, scale)
    return out.squeeze(1), state


def retention_chunkwise(
    query: Tensor, key: Tensor, value: Tensor, prev_state: Tensor | None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Of one chunk [b, h, t, d], of any length, after those whose state is `prev_state`: (out, state [b, h, d, d])."""
    _check(4, query=query, key=key, value=value)
    out, state = _continued(*(x.transpose(1, 2) for x in (query, key, value)), prev_state, scale)
    return out.transpose(1, 2), state


def _parallel(q: Tensor, k: Tensor, v: Tensor, scale: float | None, need_weights: bool) -> tuple[Tensor, Tensor | None]:
    """Of q, k, v [b, t, h, d]."""
    result = _torch.retention(
        q,
        k,
        v,
        _torch.log_decay(q.shape[2], "linspace", q.device),
        scale=1 / _scale(k, scale),
        form="parallel" if need_weights else "auto",
        return_weights=need_weights,
    )
    return result if need_weights else (result, None)


def _continued(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """Of q, k, v [b, t, h, d]."""
    return _torch.retention(
        q,
        k / _scale(k, scale),  # here, and not in the kernel: the state contains it
        v,
        _torch.log_decay(q.shape[2], "linspace", q.device),
        scale=1.0,
        initial_state=None if state is None else state.float(),
        return_state=True,
    )


def _scale(key: Tensor, scale: float | None) -> float:
    if scale == 0:
        raise ValueError("scale is 0; expected a number to divide by")
    return key.shape[-1] ** 0.5 if scale is None else scale


def _check(rank: int, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.ndim != rank:
            raise ValueError(f"{name} has {x.ndim} dimensions; expected {rank}, [b, h, {'t, ' * (rank == 4)}d]")


def _activation(activation: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if callable(activation):
        return activation
    functions = {"swish": F.silu, "gelu": F.gelu, "relu": F.relu}
    if activation not in functions:
        raise ValueError(f"activation is {activation!r}; expected 'swish', 'gelu', 'relu' or a function")
    return functions[activation]


class MultiScaleRetention(nn.Module):
    """RetNet's layer: projections, rotation, retention, layer norm of each head, gate, projection.

        q, k, v = heads of q_proj(query), k_proj(key), v_proj(value); q and k rotated where relative_position
        y = out_proj(norm(retention(q, k, v)) * activation(g_proj(query)))

    Args:
        embed_dim: of query, key, value and the output; num_heads times a multiple of 8.
        num_heads: H.
        dropout: of the outputs of retention, before the norm, in training.
        relative_position: rotate q and k, interleaved pairs, theta_j = 10000^(-linspace(0, 1, d / 2)_j).
        bias: of the projections.
        batch_first: True; others are not supported.
        activation: of the gate, "swish", "gelu", "relu" or a function.
        group_norm_eps: of the norm.

    `thetas`, of the rotation, is a buffer of state dicts; in 16 bits it is not used, but made anew in float32."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        relative_position: bool = True,
        bias: bool = True,
        batch_first: bool = True,
        activation: str | Callable[[Tensor], Tensor] = "swish",
        group_norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not batch_first:
            raise NotImplementedError("batch_first is False; only True is supported")
        if embed_dim % num_heads or embed_dim // num_heads % 8:
            raise ValueError(f"embed_dim is {embed_dim}; expected num_heads, {num_heads}, times a multiple of 8")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.relative_position = relative_position
        self.bias = bias
        self.activation = _activation(activation)
        self.group_norm_eps = group_norm_eps
        for name in ("q_proj", "k_proj", "v_proj", "g_proj", "out_proj"):
            projection = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
            nn.init.xavier_normal_(projection.weight)
            if bias:
                nn.init.zeros_(projection.bias)
            setattr(self, name, projection)
        thetas = None
        if relative_position:
            thetas = _torch.theta(embed_dim // num_heads, "retnet", device or torch.get_default_device())
            thetas = thetas.repeat_interleave(2).to(dtype or torch.get_default_dtype())
        self.register_buffer("thetas", thetas)

    def forward_parallel(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Of whole sequences [b, n, embed_dim]: (out, weights [b, h, n, n] if they are needed, else None)."""
        out, weights = _parallel(*self._heads(query, key, value, 0), None, need_weights)
        return self._project(out, query), weights

    def forward_chunkwise(
        self, query: Tensor, key: Tensor, value: Tensor, start_idx: int, prev_state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Of n tokens from position start_idx on [b, n, embed_dim]: (out, state [b, h, d, d])."""
        out, state = _continued(*self._heads(query, key, value, start_idx), prev_state, None)
        return self._project(out, query), state

    def forward_recurrent(
        self, query: Tensor, key: Tensor, value: Tensor, seq_idx: int, prev_state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Of the token at position seq_idx [b, embed_dim]: (out, state [b, h, d, d])."""
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        out, state = self.forward_chunkwise(query, key, value, seq_idx, prev_state)
        return out.squeeze(1), state

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        return self.forward_parallel(query, key, value, need_weights)

    def _heads(self, query: Tensor, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1))
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        if self.relative_position:
            theta = self.thetas[::2]
            if theta.dtype != torch.float32:
                theta = _torch.theta(q.shape[-1], "retnet", q.device)
            q, k = (_torch.rotate(x, theta, start, interleaved=True) for x in (q, k))
        return q, k, v

    def _project(self, out: Tensor, query: Tensor) -> Tensor:
        out = F.dropout(out, self.dropout, self.training)
        return self.out_proj(
            _torch.norm(out, self.g_proj(query), self.activation, "layer", self.group_norm_eps).flatten(-2)
        )


MultiheadRetention = MultiScaleRetention  # the layer's first name there


class RetNetDecoderLayer(nn.Module):
    """Retention and a feed-forward block, each with a layer norm and a residual connection; the norm before the block,
    or after it, on what is added."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "swish",
        norm_first: bool = True,
        layer_norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.activation = _activation(activation)
        self.norm_first = norm_first
        self.dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model, eps=layer_norm_eps, **where)
        self.retention = MultiScaleRetention(d_model, nhead, dropout=dropout, activation=self.activation, **where)
        self.norm2 = nn.LayerNorm(d_model, eps=layer_norm_eps, **where)
        self.linear1 = nn.Linear(d_model, dim_feedforward, **where)
        self.linear2 = nn.Linear(dim_feedforward, d_model, **where)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward_parallel(self, x: Tensor) -> Tensor:
        return self._forward(x, self.retention.forward_parallel)[0]

    def forward_recurrent(self, x: Tensor, seq_idx: int, prev_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._forward(x, self.retention.forward_recurrent, seq_idx, prev_state)

    def forward_chunkwise(self, x: Tensor, start_idx: int, prev_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._forward(x, self.retention.forward_chunkwise, start_idx, prev_state)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_parallel(x)

    def _forward(self, x: Tensor, retention: Callable[..., Any], *position_and_state: Any) -> tuple[Tensor, Any]:
        def feed_forward(x: Tensor) -> Tensor:
            return self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))

        before = self.norm1(x) if self.norm_first else x
        y, state = retention(before, before, before, *position_and_state)
        y = self.dropout(y)
        if self.norm_first:
            x = x + y
            return x + feed_forward(self.norm2(x)), state
        x = x + self.norm1(y)
        return x + self.norm2(feed_forward(x)), state


class RetNetDecoder(nn.Module):
    """`num_layers` copies of a layer. States are a list, one of each layer; an empty sequence of them is none."""

    def __init__(self, decoder_layer: RetNetDecoderLayer, num_layers: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.layers = nn.ModuleList([deepcopy(decoder_layer) for _ in range(num_layers)])

    def forward_parallel(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.forward_parallel(x)
        return x

    def forward_recurrent(
        self, x: Tensor, seq_idx: int, prev_states: Sequence[Tensor | None] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        return self._forward("forward_recurrent", x, seq_idx, prev_states)

    def forward_chunkwise(
        self, x: Tensor, start_idx: int, prev_states: Sequence[Tensor | None] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        return self._forward("forward_chunkwise", x, start_idx, prev_states)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_parallel(x)

    def _forward(
        self, form: str, x: Tensor, position: int, prev_states: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor]]:
        before = list(prev_states) or [None] * self.num_layers
        if len(before) != self.num_layers:
            raise ValueError(f"prev_states has {len(before)} elements; expected {self.num_layers}, one of each layer")
        states = []
        for layer, state in zip(self.layers, before, strict=True):
            x, state = getattr(layer, form)(x, position, state)
            states.append(state)
        return x, states


class RetNet(nn.Module):
    """A language model: embedding, decoder, projection to `num_tokens` logits. x [b, n] are tokens, [b] in
    `forward_recurrent`."""

    def __init__(
        self,
        num_tokens: int,
        d_model: int = 512,
        nhead: int = 8,
        num_layers: int = 6,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "swish",
        dim_feedforward: int = 2048,
        norm_first: bool = True,
        layer_norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.d_model = d_model
        self.num_layers = num_layers
        self.embedding = nn.Embedding(num_tokens, d_model, **where)
        layer = RetNetDecoderLayer(
            d_model, nhead, dim_feedforward, dropout, activation, norm_first, layer_norm_eps, **where
        )
        self.decoder = RetNetDecoder(layer, num_layers)
        self.out = nn.Linear(d_model, num_tokens, **where)
        nn.init.xavier_normal_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward_parallel(self, x: Tensor) -> Tensor:
        return self.out(self.decoder.forward_parallel(self.embedding(x)))

    def forward_recurrent(
        self, x: Tensor, seq_idx: int, prev_states: Sequence[Tensor | None] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        x, states = self.decoder.forward_recurrent(self.embedding(x), seq_idx, prev_states)
        return self.out(x), states

    def forward_chunkwise(
        self, x: Tensor, start_idx: int, prev_states: Sequence[Tensor | None] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        x, states = self.decoder.forward_chunkwise(self.embedding(x), start_idx, prev_states)
        return self.out(x), states

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The mean cross entropy of `labels` [b, n]."""
        return F.cross_entropy(self.forward_parallel(inputs).flatten(0, 1), labels.flatten())


def retnet_1_3b(num_tokens: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> RetNet:
    """The paper's model of 1.3 billion parameters."""
    return RetNet(num_tokens, 2048, 8, 24, dim_feedforward=4096, device=device, dtype=dtype)


def retnet_2_7b(num_tokens: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> RetNet:
    """The paper's model of 2.7 billion parameters."""
    return RetNet(num_tokens, 2560, 10, 32, dim_feedforward=5120, device=device, dtype=dtype)


def retnet_6_7b(num_tokens: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> RetNet:
    """The paper's model of 6.7 billion parameters."""
    return RetNet(num_tokens, 4096, 16, 32, dim_feedforward=8192, device=device, dtype=dtype)
