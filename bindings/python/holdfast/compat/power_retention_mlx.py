"""Power-Retention-MLX's layer, as a module of PyTorch: MLX arrays are no tensors, and the layer is one of Apple's
framework, so names, arguments and parameters are its, and arrays are tensors.

The semantics are those of power retention, which the package's are not (it multiplies what is written by the gate
instead of decaying the state, divides by the last token's weight alone, and shares one state among the entries of a
batch):

    S_t = exp(log_g_t) S_{t-1} + phi(k_t)^T v_t      s_t = exp(log_g_t) s_{t-1} + phi(k_t)
    y_t = phi(q_t) S_t / phi(q_t) s_t                phi(q).phi(k) = (q.k)^power
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holdfast import state_size

from . import _torch

__all__ = ["PowerRetention"]


class PowerRetention(nn.Module):
    """Power retention of one head.

    Args:
        dim: of x, q, k, v and y.
        power: of q.k, 1 or 2 (there), 3 or 4.
        chunk_size: tokens worked on at a time.
        use_metal_kernels: there, which kernels run; nothing here, the library chooses by where tensors are.

    Calls continue the sequences of the calls before, until `reset_state`: a prompt and then `inference_step` for each
    token, or a sequence cut anywhere. A state of one sequence is continued by as many as x has, each on its own from
    then on. No gradient passes from one call to the next."""

    def __init__(self, dim: int, power: int = 2, chunk_size: int = 128, use_metal_kernels: bool = True) -> None:
        super().__init__()
        if power not in (1, 2, 3, 4):
            raise ValueError(f"power is {power!r}; expected 1, 2, 3 or 4")
        self.dim = dim
        self.power = power
        self.chunk_size = chunk_size
        self.use_metal_kernels = use_metal_kernels
        self.expanded_dim = state_size(dim, power)
        self.w_q = nn.Linear(dim, dim)
        self.w_k = nn.Linear(dim, dim)
        self.w_v = nn.Linear(dim, dim)
        self.reset_state()

    def reset_state(self) -> None:
        """Begin new sequences."""
        self._state: Tensor | None = None  # [B, 1, expanded_dim, dim]
        self._sum_of_keys: Tensor | None = None  # [B, 1, expanded_dim]

    @property
    def state(self) -> Tensor:
        """[B, expanded_dim, dim], float32: what the sequences have left behind. B = 1 zeros where they begin."""
        if self._state is None:
            return torch.zeros(1, self.expanded_dim, self.dim, device=self.w_q.weight.device)
        return self._state[:, 0]

    @property
    def sum_of_keys(self) -> Tensor:
        """[B, expanded_dim], float32."""
        if self._sum_of_keys is None:
            return torch.zeros(1, self.expanded_dim, device=self.w_q.weight.device)
        return self._sum_of_keys[:, 0]

    def forward(self, x: Tensor, log_g: Tensor | None = None) -> Tensor:
        """y [batch, seq, dim] of x [batch, seq, dim]; log_g [batch, seq], each <= 0, or None: no gates."""
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {list(x.shape)}; expected [batch, seq, {self.dim}]")
        if log_g is not None and log_g.shape != x.shape[:2]:
            raise ValueError(f"log_g has shape {list(log_g.shape)}; expected {list(x.shape[:2])}")
        before = (self._state, self._sum_of_keys)
        if before[0] is not None and before[0].shape[0] != x.shape[0]:
            if before[0].shape[0] != 1:
                raise ValueError(
                    f"x has {x.shape[0]} sequences and the state {before[0].shape[0]}; reset_state() begins new ones"
                )
            before = tuple(y.expand(x.shape[0], *y.shape[1:]) for y in before)
        y, state, sum_of_keys = _torch.retention(
            *(w(x).unsqueeze(2) for w in (self.w_q, self.w_k, self.w_v)),
            None if log_g is None else log_g.float().unsqueeze(2),
            degree=self.power,
            normalize=True,
            chunk_size=self.chunk_size,
            initial_state=before[0],
            initial_sum_of_keys=before[1],
            return_state=True,
        )
        self._state, self._sum_of_keys = state.detach(), sum_of_keys.detach()
        return y.squeeze(2)

    def inference_step(self, x: Tensor, log_g: float | Tensor = 0.0) -> Tensor:
        """y of one token: x [dim] or [batch, dim], and y likewise; log_g a number, or [batch]."""
        if x.ndim not in (1, 2):
            raise ValueError(f"x has {x.ndim} dimensions; expected 1, [dim], or 2, [batch, dim]")
        tokens = x if x.ndim == 2 else x.unsqueeze(0)
        gates = torch.as_tensor(log_g, dtype=torch.float32, device=x.device).expand(tokens.shape[0])
        with torch.no_grad():
            y = self(tokens.unsqueeze(1), gates.unsqueeze(1)).squeeze(1)
        return y if x.ndim == 2 else y.squeeze(0)
