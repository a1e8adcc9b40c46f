"""Retention on an NVIDIA GPU by Holdfast, beside its peers there: all in one process, on the same tensors.

    python bench/gpu.py [--shapes 8,2048,32,128,128 ...] [--dtype bf16] [--backward] [--turns 20] [--json FILE]

Holdfast's calls are those of `holdfast.torch`: PyTorch's tensors by DLPack, in the current stream. Beside them, as far
as they are installed: flash-linear-attention's chunk_retention and chunk_simple_gla, mlstm_kernels' chunkwise form with
sigmoid gates (its input gate open, which is retention), and PyTorch's causal FlashAttention, which computes something
else and shows what softmax takes. A product of matrices by cuBLAS and a copy stand for the machine's peaks.

Decays are RetNet's, one per head, which all of them have; a time counts only if the result is right. Each takes its
turn, turn after turn, between two events in the stream; times are the least and the median of all turns. What is absent
or wrong is written down with the reason, and has no time.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import math
import platform
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import holdfast
import holdfast.torch
import torch
from torch import Tensor
from torch.nn import functional as F

# B, T, H, K, V: what flash-linear-attention and mlstm_kernels publish times of, and one of few heads and tokens.
SHAPES = [
    (8, 2048, 32, 128, 128),
    (8, 8192, 32, 128, 128),
    (8, 16384, 32, 128, 128),
    (1, 8192, 96, 128, 128),
    (8, 2048, 32, 256, 256),
    (1, 2048, 8, 64, 64),
]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}

DEVICE = "cuda"

# Relative RMS of the difference from the definition in double, of out and of gradients, above which a result is wrong:
# what a few roundings to 16 bits make, of fp32 to TF32's. The error itself is written down.
TOLERANCES = {"bf16": 2e-2, "f16": 3e-3, "f32": 1e-3}
ROOT = Path(__file__).parents[1]

Run = Callable[[], tuple[Tensor, ...]]  # of out, or of out and the gradients of q, k and v


class Absent(Exception):
    """Why a peer does not take part."""


class Inputs:
    def __init__(self, shape: tuple[int, ...], dtype: str, backward: bool) -> None:
        B, T, H, K, V = shape
        random = torch.Generator(DEVICE).manual_seed(0)

        def rows(size: int) -> Tensor:
            return torch.randn(B, T, H, size, generator=random, device=DEVICE).to(DTYPES[dtype])

        self.shape, self.dtype, self.backward = shape, dtype, backward
        self.q, self.k, self.v, self.dout = rows(K), rows(K), rows(V), rows(V)
        self.log_decay = holdfast.torch.decay(H, device=DEVICE)
        for x in (self.q, self.k, self.v):
            x.requires_grad_(backward)

    def calls(self, forward: Callable[[], Tensor]) -> Run:
        """`forward`, with its gradients where they are wanted."""

        def run() -> tuple[Tensor, ...]:
            out = forward()
            if not self.backward:
                return (out.detach(),)
            return (out.detach(), *torch.autograd.grad(out, (self.q, self.k, self.v), self.dout))

        return run

    def head_first(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def ours(x: Inputs) -> Run:
    return x.calls(lambda: holdfast.torch.retention(x.q, x.k, x.v, x.log_decay))


def installed(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise Absent(f"{module}: {error}") from error
    except AttributeError as error:
        raise Absent(f"{module} has no {name}") from error


def fla_retention(x: Inputs) -> Run:
    chunk_retention = installed("fla.ops.retention", "chunk_retention")
    return x.calls(lambda: chunk_retention(x.q, x.k, x.v)[0])


def fla_simple_gla(x: Inputs) -> Run:
    chunk_simple_gla = installed("fla.ops.simple_gla", "chunk_simple_gla")
    gates = x.log_decay.expand(*x.q.shape[:3]).contiguous()
    return x.calls(lambda: chunk_simple_gla(x.q, x.k, x.v, gates)[0])


def mlstm(x: Inputs) -> Run:
    chunkwise = installed("mlstm_kernels.torch.chunkwise.triton_xl_chunk_siging", "mlstm_siging_chunkwise__xl_chunk")
    B, T, H, *_ = x.shape
    forget = (x.log_decay - torch.log(-torch.expm1(x.log_decay)))[:, None].expand(B, H, T).contiguous()  # its logit
    open_gate = torch.full_like(forget, 30)  # sigmoid: 1
    layout = [t.detach().transpose(1, 2).contiguous() for t in (x.q, x.k, x.v, x.dout)]  # its own, not counted
    q, k, v, dout = (t.requires_grad_(x.backward and n < 3) for n, t in enumerate(layout))

    def run() -> tuple[Tensor, ...]:
        out = chunkwise(q, k, v, open_gate, forget, normalize=False, autocast_kernel_dtype=DTYPES[x.dtype])
        results = (out.detach(),)
        if x.backward:
            results += torch.autograd.grad(out, (q, k, v), dout)
        return tuple(map(x.head_first, results))

    return run


def attention(x: Inputs) -> Run:
    if x.dtype == "f32":
        raise Absent("FlashAttention takes 16 bits")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(*map(x.head_first, (x.q, x.k, x.v)), is_causal=True)
        return x.head_first(out)

    return x.calls(forward)


IMPLEMENTATIONS: dict[str, Callable[[Inputs], Run]] = {
    "Holdfast": ours,
    "FLA chunk_retention": fla_retention,
    "FLA chunk_simple_gla": fla_simple_gla,
    "mlstm_kernels, sigmoid gates": mlstm,
    "PyTorch causal FlashAttention": attention,
}
OTHERS_PROBLEM = {"PyTorch causal FlashAttention"}  # is no retention: not compared


def expected(x: Inputs) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) of the heads that forget fastest and slowest of the first batch entry, in double."""
    results = []
    for h in (0, x.shape[2] - 1):
        q, k, v, dout = (t.detach()[0, :, h].double().requires_grad_(x.backward) for t in (x.q, x.k, x.v, x.dout))
        state, decay, rows = q.new_zeros(q.shape[1], v.shape[1]), x.log_decay[h].double().exp(), []
        for part in range(0, len(q), 256):  # chunks of a formula of their own
            a, b, c = (t[part : part + 256] for t in (q, k, v))
            steps = torch.arange(len(a), device=DEVICE)
            distance = (steps[:, None] - steps).clamp(min=0)
            weights = (a @ b.T * decay**distance).tril()
            rows.append(weights @ c + decay ** (steps[:, None] + 1) * (a @ state))
            state = decay ** len(a) * state + (decay ** (len(a) - 1 - steps[:, None]) * b).T @ c
        out = torch.cat(rows) / math.sqrt(q.shape[1])
        results.append((out.detach(), *(torch.autograd.grad(out, (q, k, v), dout) if x.backward else ())))
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def error(results: tuple[Tensor, ...], right: tuple[Tensor, ...], heads: int) -> float:
    """The largest relative RMS of the differences."""
    worst = 0.0
    for got, want in zip(results, right, strict=True):
        difference = got[0][:, [0, heads - 1]].transpose(0, 1).double() - want
        worst = max(worst, (difference.square().mean() / want.square().mean()).sqrt().item())
    return worst if math.isfinite(worst) else math.inf


def milliseconds(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def compare(shape: tuple[int, ...], dtype: str, backward: bool, turns: int) -> dict[str, Any]:
    x = Inputs(shape, dtype, backward)
    right = expected(x)
    rows: list[dict[str, Any]] = []
    ready: dict[str, Run] = {}
    for name, prepare in IMPLEMENTATIONS.items():
        row: dict[str, Any] = {"name": name}
        rows.append(row)
        try:
            run = prepare(x)
            results = run()
            if name not in OTHERS_PROBLEM:
                row["error"] = error(results, right, shape[2])
                if not row["error"] <= TOLERANCES[dtype]:
                    row["why_not"] = f"wrong: relative error {row['error']:.2e}; expected at most {TOLERANCES[dtype]}"
                    continue
            ready[name] = run
        except Absent as why:
            row["why_not"] = str(why)
        except Exception as failure:  # of a peer on this machine: written down
            if name == "Holdfast":
                raise
            row["why_not"] = f"{type(failure).__name__}: {failure}".splitlines()[0]
        results = ()
    times: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(turns + 3):  # the first ones warm up
        for name, run in ready.items():
            taken = milliseconds(run)
            if turn >= 3:
                times[name].append(taken)
    for row in rows:
        if row["name"] in times:
            row["ms"], row["median_ms"] = min(times[row["name"]]), statistics.median(times[row["name"]])
    return {"shape": dict(zip("BTHKV", shape, strict=True)), "dtype": dtype, "backward": backward, "times": rows}


def peaks(dtype: str, turns: int) -> dict[str, float]:
    """What the machine does at most: TFLOP/s of a product of matrices by cuBLAS, TB/s of a copy, read and written."""
    n = 8192
    a, b, out = (torch.randn(n, n, device=DEVICE).to(DTYPES[dtype]) for _ in range(3))
    product = min(milliseconds(lambda: torch.mm(a, b, out=out)) for _ in range(turns))
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = min(milliseconds(lambda: target.copy_(source)) for _ in range(turns))
    return {"matmul_TFLOP/s": 2 * n**3 / product / 1e9, "copy_TB/s": 2 * source.numel() / copy / 1e9}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_gpu() -> None:
    cuda = holdfast.info()["backends"]["cuda"]
    if not torch.cuda.is_available():
        sys.exit(f"no CUDA device: PyTorch {torch.__version__} finds none (Holdfast: {cuda['why_not'] or 'finds one'})")
    if not cuda["available"]:
        sys.exit(f"no CUDA device that Holdfast can use: {cuda['why_not']}")


def shape_of(text: str) -> tuple[int, ...]:
    numbers = tuple(map(int, text.split(",")))
    if len(numbers) != 5 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,T,H,K,V")
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES, metavar="B,T,H,K,V")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--backward", action="store_true", help="forward and all gradients, instead of forward")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--json", type=Path, help="default: bench/record/<the GPU>/gpu-<dtype>[-backward].json")
    args = parser.parse_args()
    require_gpu()

    properties = torch.cuda.get_device_properties(0)
    machine = re.sub(r"\W+", "-", properties.name.lower()).strip("-")
    name = f"gpu-{args.dtype}{'-backward' if args.backward else ''}.json"
    path = args.json or ROOT / "bench" / "record" / machine / name
    report: dict[str, Any] = {
        "machine": {
            "gpu": properties.name,
            "sm": f"{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_GB": properties.total_memory / 1e9,
            "cuda": torch.version.cuda,
            "system": platform.platform(),
        },
        "versions": {
            "holdfast": holdfast.info()["version"],
            **{p: version(p) for p in ("torch", "triton", "flash-linear-attention", "mlstm_kernels")},
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "peaks": peaks(args.dtype, args.turns),
        "results": [],
    }
    print(f"{properties.name}, {report['versions']}, peaks {report['peaks']}")
    for shape in args.shapes:
        result = compare(shape, args.dtype, args.backward, args.turns)
        report["results"].append(result)
        print(f"\n{result['shape']}, {args.dtype}{', forward and backward' if args.backward else ''}")
        ours_ms = result["times"][0].get("ms")
        for row in result["times"]:
            if "ms" not in row:
                print(f"  {row['name']:30} {row['why_not']}")
            else:
                ratio = f"{row['ms'] / ours_ms:6.2f}" if ours_ms else ""
                print(f"  {row['name']:30} {row['ms']:9.3f} ms, median {row['median_ms']:9.3f}  {ratio}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {path}")
    if any("wrong" in row.get("why_not", "") for result in report["results"] for row in result["times"][:1]):
        sys.exit("Holdfast's result is wrong")


if __name__ == "__main__":
    main()
