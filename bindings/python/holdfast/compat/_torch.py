"""The ops on tensors that the modules beside this one are made of, in one place: those of `holdfast.torch`, which have
gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import holdfast
from holdfast import torch as _ops

__all__ = ["head_norm_gate", "load", "log_decay", "norm", "retention", "rotate", "theta"]


def _on_any_rows(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op for tensors of any strides: it wants its last axis contiguous."""

    def rows(x: Any) -> Any:
        return x.contiguous() if isinstance(x, torch.Tensor) and x.ndim > 0 and x.stride(-1) != 1 else x

    def call(*arguments: Any, **options: Any) -> Any:
        return op(*map(rows, arguments), **{name: rows(x) for name, x in options.items()})

    return call


retention = _on_any_rows(_ops.retention)
rotate = _on_any_rows(_ops.rotate)
head_norm_gate = _on_any_rows(_ops.head_norm_gate)


def log_decay(num_heads: int, convention: Any, device: torch.device) -> torch.Tensor:
    """`holdfast.decay` as a tensor [num_heads]."""
    return torch.from_numpy(holdfast.decay(num_heads, convention)).to(device)


def theta(key_size: int, convention: Any, device: torch.device) -> torch.Tensor:
    """`holdfast.theta` as a tensor [key_size / 2]."""
    return torch.from_numpy(holdfast.theta(key_size, convention)).to(device)


def norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    kind: Any,
    eps: float,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The norm of each head of x [B, T, H, V], times activation(gate): one kernel where that is the swish gate."""
    gate = gate.reshape(x.shape)
    if activation is torch.nn.functional.silu:
        return head_norm_gate(x, gate, weight, kind, eps)
    return head_norm_gate(x, None, weight, kind, eps) * activation(gate)


def load(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """All parameters from `weights`, each in the type that it has there; the model is for inference then."""
    own = model.state_dict()
    if missing := own.keys() - weights.keys():
        raise KeyError(f"state_dict lacks {', '.join(sorted(missing))}")
    if unknown := weights.keys() - own.keys():
        raise ValueError(f"state_dict has {', '.join(sorted(unknown))}, which the model has not")
    for name, x in own.items():
        if x.shape != weights[name].shape:
            raise ValueError(f"{name} has shape {list(weights[name].shape)}; expected {list(x.shape)}")
    model.load_state_dict(weights, assign=True)
    model.eval()
