"""The ops on tensors that the modules beside this one are made of, in one place: those of `holdfast.torch`, which have
gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    from ..torch import head_norm_gate, retention, rotate
except ModuleNotFoundError:
    import holdfast

    def _without_gradients(op: Callable[..., Any]) -> Callable[..., Any]:
        """`op` refuses tensors that require gradients; where none are recorded they are as good as any."""

        def call(*arguments: Any, **options: Any) -> Any:
            def plain(x: Any) -> Any:
                return x.detach() if isinstance(x, torch.Tensor) and not torch.is_grad_enabled() else x

            return op(*map(plain, arguments), **{name: plain(x) for name, x in options.items()})

        return call

    head_norm_gate = _without_gradients(holdfast.head_norm_gate)
    retention = _without_gradients(holdfast.retention)
    rotate = _without_gradients(holdfast.rotate)

__all__ = ["head_norm_gate", "log_decay", "norm", "retention", "rotate", "theta"]


def log_decay(num_heads: int, convention: Any, device: torch.device) -> torch.Tensor:
    """`holdfast.decay` as a tensor [num_heads]."""
    from holdfast import decay

    return torch.from_numpy(decay(num_heads, convention)).to(device)


def theta(key_size: int, convention: Any, device: torch.device) -> torch.Tensor:
    """`holdfast.theta` as a tensor [key_size / 2]."""
    from holdfast import theta

    return torch.from_numpy(theta(key_size, convention)).to(device)


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
