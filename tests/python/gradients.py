"""How tests compare gradients with those of a formula in float64."""

from __future__ import annotations

from typing import Any

from reference import assert_close

TOLERANCE = 1e-5  # relative RMS, the specification's number


def check_gradients(actual: Any, expected: Any, *tensors: Any) -> None:
    """The gradients of actual(*tensors), in float32, are those of expected(*tensors) in float64; both return a tensor,
    or a tuple of them. The gradients of what they return are random."""
    import torch

    gradients = []
    for call, dtype in ((actual, torch.float32), (expected, torch.float64)):
        with torch.enable_grad():
            leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
            out = call(*leaves)
            out = out if isinstance(out, tuple) else (out,)
            random = torch.Generator().manual_seed(0)
            seeds = [torch.randn(x.shape, generator=random).to(x.dtype) for x in out]
            gradients.append(torch.autograd.grad(out, leaves, seeds))
    for x, y in zip(*gradients, strict=True):
        assert_close(x, y.numpy(), TOLERANCE)
