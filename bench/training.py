"""A training step of a language model by Holdfast beside the same model whose retention is PyTorch's.

    python bench/training.py [--preset 10m] [--attention retnet] [--context 4096] [--batch 1] [--turns 5]

One model takes turns: with Holdfast's kernels; with PyTorch's chunkwise form in place of `retention` alone, or, for
"power", the chunked algorithm that Buckman, Gelada and Zhang publish; and with PyTorch in place of rotation, norm and
gate as well. PyTorch gets the chunk size that suits it best. Least time of each, and of what all have in common: the
step without retention.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `holdfast train` has it

import holdfast
import holdfast.nn
import torch
from holdfast.bench import usable_cores
from holdfast.lm import ATTENTIONS, PRESETS, RetentionLM
from holdfast.peers import CHUNKS, POWER_CHUNKS, functional_segment, power_segment, settle
from torch import Tensor
from torch.nn import functional as F


def chunkwise(chunk: int, segment: Callable[..., Any]) -> Callable[..., Tensor]:
    """`holdfast.torch.retention` of whole sequences from nothing, by PyTorch."""

    def retention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *, degree: int, **_: Any) -> Tensor:
        B, T, H, K = q.shape
        V, group = v.shape[3], H // k.shape[2]
        if log_decay is None:
            log_decay = q.new_zeros(k.shape[2])
        log_decay = log_decay.expand(B, T, -1).repeat_interleave(group, 2)
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)

        def chunked(x: Tensor) -> Tensor:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -T % chunk))
            return x.unflatten(1, (-1, chunk)).movedim((1, 0, 3, 2), (0, 1, 2, 3)).flatten(1, 2).contiguous()

        q, k, v, log_decay = map(chunked, (q, k, v, log_decay))
        size = (K, V) if degree == 1 else (holdfast.state_size(K, 2, "tiled"), V + 1)
        out = q.new_empty((*q.shape[:-1], V))
        segment(q, k, v, log_decay, K**-0.5, q.new_zeros(B * H, *size), out)
        return out.unflatten(1, (B, H)).movedim((0, 1, 2, 3), (1, 0, 3, 2)).flatten(1, 2)[:, :T]

    return retention


def rotate(x: Tensor, theta: Tensor, *, interleaved: bool, positions: Tensor | None) -> Tensor:
    angle = torch.arange(x.shape[1], device=x.device)[:, None] * theta
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def head_norm_gate(x: Tensor, gate: Tensor | None, weight: Tensor | None, norm: str, eps: float) -> Tensor:
    y = F.rms_norm(x, x.shape[-1:], None, eps) if norm == "rms" else F.layer_norm(x, x.shape[-1:], None, None, eps)
    y = y if weight is None else y * weight
    return y if gate is None else y * F.silu(gate)


@contextlib.contextmanager
def replaced(**functions: Callable[..., Any]) -> Iterator[None]:
    """Functions of holdfast.nn, for a while."""
    kept = {name: getattr(holdfast.nn, name) for name in functions}
    for name, function in functions.items():
        setattr(holdfast.nn, name, function)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(holdfast.nn, name, function)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="10m")
    parser.add_argument("--attention", choices=ATTENTIONS[:3], default="retnet")
    parser.add_argument("--value-size", type=int, help="of a head (default: the preset's)")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()

    cores = usable_cores()
    torch.set_num_threads(cores)
    holdfast.set_num_threads(cores)
    torch.manual_seed(0)
    model = RetentionLM(args.preset, attention=args.attention, value_size=args.value_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
    rows = torch.randint(model.config.vocab_size, (args.batch, args.context + 1))

    def step() -> float:
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def seconds(**functions: Callable[..., Any]) -> tuple[float, float]:
        with replaced(**functions):
            settle()
            start = time.perf_counter()
            loss = step()
            return time.perf_counter() - start, loss

    power = args.attention == "power"
    segment = power_segment if power else functional_segment
    tried = {}
    for chunk in POWER_CHUNKS if power else (*CHUNKS, 256):
        candidate = chunkwise(chunk, segment)
        tried[chunk] = min(seconds(retention=candidate)[0] for _ in range(2))
    chunk = min(tried, key=tried.__getitem__)
    theirs = chunkwise(chunk, segment)
    variants: dict[str, dict[str, Callable[..., Any]]] = {
        "Holdfast": {},
        "PyTorch's retention": {"retention": theirs},
        "PyTorch alone": {"retention": theirs, "rotate": rotate, "head_norm_gate": head_norm_gate},
        "no retention": {"retention": lambda q, k, v, *_, **__: v.repeat_interleave(q.shape[2] // v.shape[2], 2)},
    }
    best, losses = dict.fromkeys(variants, float("inf")), {}
    for _ in range(args.turns):
        for name, functions in variants.items():
            taken, losses[name] = seconds(**functions)
            best[name] = min(best[name], taken)
    print(
        f"a step of {model.parameters_count / 1e6:.1f} M parameters, {args.attention}, {args.batch} x {args.context} "
        f"tokens, fp32, {cores} threads, PyTorch {torch.__version__}, its chunks {chunk}:"
    )
    for name, value in best.items():
        print(f"  {name:20} {1e3 * value:8.0f} ms  {value / best['Holdfast']:5.2f}  loss {losses[name]:.5f}")
    common = best["no retention"]
    ratio = (best["PyTorch's retention"] - common) / max(1e-9, best["Holdfast"] - common)
    print(f"retention alone, forward and backward: {ratio:.1f} times as fast as PyTorch's")


if __name__ == "__main__":
    main()
