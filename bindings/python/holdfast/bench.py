"""`holdfast bench`: Holdfast beside its peers, on the same inputs and threads.

Every implementation is prepared (layout, best chunk size, compilation), its result is checked, and then they take
turns: some calls of each, turn after turn, so that a machine that changes its pace changes it for all. Ratios are
between the best times. All start from the same inputs, [B, T, H, size], and end with that layout: a peer that wants
another one pays for the conversion; how it stands without that is shown beside it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from . import get_num_threads, info, peers, set_num_threads
from .peers import Absent, Inputs, Peer

Shape = tuple[int, int, int, int, int, int]  # B, T, H, K, V, degree

QUICK: list[Shape] = [(1, 4096, 8, 64, 64, 1), (1, 4096, 8, 128, 128, 1)]
DEFAULT: list[Shape] = [
    *QUICK,
    (1, 4096, 8, 32, 32, 1),
    (1, 4096, 8, 128, 256, 1),
    (1, 4096, 8, 256, 256, 1),
    (1, 4096, 8, 80, 80, 1),
    (4, 1024, 8, 64, 64, 1),
    (1, 1, 8, 64, 64, 1),
    (1, 1, 8, 128, 128, 1),
    (1, 8, 8, 64, 64, 1),
    (1, 16, 8, 64, 64, 1),
    (1, 24, 8, 64, 64, 1),
    (1, 16, 8, 128, 128, 1),
    (1, 256, 8, 64, 64, 1),
    (1, 1024, 8, 32, 32, 1),
    (1, 2048, 8, 64, 64, 1),
    (1, 16384, 8, 64, 64, 1),
    (1, 65536, 8, 64, 64, 1),
    # The heads of RetNet 1.3B, 2.7B and 6.7B.
    (1, 2048, 8, 256, 512, 1),
    (1, 2048, 10, 256, 512, 1),
    (1, 2048, 16, 256, 512, 1),
    # Power retention.
    (1, 4096, 4, 64, 64, 2),
    (1, 16384, 4, 64, 64, 2),
    (1, 1, 4, 64, 64, 2),
]

GRADIENTS: list[Shape] = [*QUICK, (1, 1024, 8, 64, 64, 1), (1, 4096, 4, 64, 64, 2), (1, 512, 4, 64, 64, 2)]

# Agreement of two fp32 implementations of the same sums in different order, relative RMS; measured: below 1e-6.
TOLERANCE = 1e-5
SECONDS_PER_TURN = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `holdfast bench` to `parser`."""
    parser.add_argument("--quick", action="store_true", help="only B1 T4096 H8, K = V = 64 and 128")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shape,
        metavar="B,T,H,K,V[,DEGREE]",
        help="these shapes, e.g. 1,4096,8,64,64, or 1,4096,8,64,64,2 for power retention",
    )
    parser.add_argument(
        "--gradients", action="store_true", help="forward and backward, beside PyTorch's autograd, instead of forward"
    )
    parser.add_argument("--threads", type=positive, help="at work in every implementation (default: one per core)")
    parser.add_argument(
        "--repeats", type=positive, default=5, help="turns of each implementation (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and all times to FILE")


def positive(text: str) -> int:
    """A number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}; expected at least 1")
    return number


def parse_shape(text: str) -> Shape:
    """The numbers of "B,T,H,K,V" or "B,T,H,K,V,DEGREE"."""
    try:
        B, T, H, K, V, *rest = (int(part) for part in text.split(","))
        (degree,) = rest or (1,)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}'; expected B,T,H,K,V such as 1,4096,8,64,64") from None
    if min(B, T, H, K, V, degree) < 1 or degree > 4:
        raise argparse.ArgumentTypeError(f"'{text}'; expected numbers of at least 1, and a degree of at most 4")
    return B, T, H, K, V, degree


def run(args: argparse.Namespace) -> int:
    """Time, print and write what `args` ask for. Returns the exit status: 1 if a result is wrong."""
    threads = args.threads or usable_cores()
    report: dict[str, Any] = {
        "machine": machine(threads),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "results": [],
    }
    print(f"{report['machine']['cpu']}, {threads} of {usable_cores()} cores")
    print(", ".join(f"{name} {version or '(not installed)'}" for name, version in report["versions"].items()))
    threads_before = get_num_threads()
    try:
        for shape in args.shapes or (QUICK if args.quick else GRADIENTS if args.gradients else DEFAULT):
            result = (compare_gradients if args.gradients else compare)(Inputs.random(*shape), threads, args.repeats)
            print_table(result)
            report["results"].append(result)
    finally:
        set_num_threads(threads_before)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwritten to {args.json}")
    wrong = [row["name"] for result in report["results"] for row in result["times"] if not row["correct"]]
    if wrong:
        print(f"\nwrong results: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(threads: int) -> dict[str, Any]:
    """What the times were measured on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return {
        "cpu": name,
        "cores": usable_cores(),
        "threads": threads,
        "cpu_features": info()["cpu_features"],
        "system": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    """Of everything that takes part; None: not installed."""
    found: dict[str, str | None] = {"holdfast": info()["version"], "python": platform.python_version()}
    for name in ("numpy", "onnxruntime", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def compare(x: Inputs, threads: int, turns: int) -> dict[str, Any]:
    """Prepare, check and time everyone on `x`."""
    ready: list[Peer] = []
    absent: list[Absent] = []
    for name, prepare in {
        peers.OURS: lambda: peers.holdfast(x, threads),
        peers.STEPS: lambda: peers.holdfast_steps(x, threads),
        peers.ORT: lambda: peers.onnx_runtime(x, threads),
        peers.EAGER: lambda: peers.torch_chunkwise(x, threads),
        peers.COMPILED: lambda: peers.torch_chunkwise(x, threads, compiled=True),
        peers.PUBLISHED: lambda: peers.torch_published(x, threads),
        peers.PUBLISHED_COMPILED: lambda: peers.torch_published(x, threads, compiled=True),
        peers.ATTENTION: lambda: peers.torch_attention(x, threads),
        peers.SGEMM: lambda: peers.torch_product(x, threads, ready[0]),
    }.items():
        if x.degree == 1 and name in peers.ALL_PUBLISHED:
            continue
        progress(f"preparing {name}")
        peer = prepare()
        (ready if isinstance(peer, Peer) else absent).append(peer)
    return measured(x, threads, turns, ready, absent, check(x, ready))


def compare_gradients(x: Inputs, threads: int, turns: int) -> dict[str, Any]:
    """The same of forward and backward: every gradient is checked against the definition in double, of the heads that
    forget fastest and slowest."""
    dout = peers.aligned(x.v.shape)
    np.random.default_rng(1).standard_normal(dtype=np.float32, out=dout)
    heads = peers.sample(x)
    progress("computing what is right")
    expected = peers.gradient_reference(x, dout, heads)
    progress(f"preparing {peers.OURS}")
    ready, absent = peers.holdfast_gradients(x, dout, threads), []
    for name, compiled in {peers.EAGER: False, peers.COMPILED: True}.items():
        progress(f"preparing {name}")
        peer = peers.torch_gradients(x, dout, threads, compiled)
        (ready if isinstance(peer, Peer) else absent).append(peer)
    errors = {}
    for peer in ready:
        progress(f"checking {peer.name}")
        peer.run()
        result = peer.result()
        if peer.name == peers.FORWARD:
            right = peers.reference(x, heads) if x.degree == 1 else peers.power_reference(x, heads)
            errors[peer.name] = peers.relative_rms(peers.of_heads(result, heads)[:, -right.shape[1] :], right)
            continue
        errors[peer.name] = max(
            peers.relative_rms(peers.of_heads(found, heads), right)
            for found, right in zip(result, expected, strict=True)
        )
    return measured(x, threads, turns, ready, absent, errors)


def measured(
    x: Inputs, threads: int, turns: int, ready: list[Peer], absent: list[Absent], errors: dict[str, float]
) -> dict[str, Any]:
    """What is reported of those that are ready, after they have taken turns."""
    times = take_turns(ready, turns)
    progress("")
    ours = min(times[peers.OURS])
    rows = []
    for peer in ready:
        seconds = times[peer.name]
        best = min(seconds) + peer.layout_seconds
        rows.append(
            {
                "name": peer.name,
                "how": peer.how,
                "correct": errors[peer.name] <= TOLERANCE,
                "relative_error": errors[peer.name],
                "best_ms": best * 1e3,
                "median_ms": (statistics.median(seconds) + peer.layout_seconds) * 1e3,
                "ratio": best / ours,
                "layout_ms": peer.layout_seconds * 1e3,
                "ratio_without_layout": min(seconds) / ours,
                "tried_ms": {setting: value * 1e3 for setting, value in peer.tried.items()},
                "all_ms": [value * 1e3 for value in seconds],
            }
        )
    B, T, H, K, V = x.shape
    return {
        "shape": {"B": B, "T": T, "H": H, "K": K, "V": V, "degree": x.degree},
        "threads": threads,
        "times": rows,
        "absent": [{"name": peer.name, "reason": peer.reason} for peer in absent],
    }


def check(x: Inputs, ready: list[Peer]) -> dict[str, float]:
    """Relative RMS error of everyone against the definition in double, on the heads that forget fastest and slowest; of
    the peers also the difference from Holdfast on all heads, whichever is larger."""
    heads = peers.sample(x)
    expected = peers.reference(x, heads) if x.degree == 1 else peers.power_reference(x, heads)
    errors: dict[str, float] = {}
    ours = np.empty(0)
    for peer in ready:
        progress(f"checking {peer.name}")
        peer.run()
        result = peer.result()
        if peer.error:
            errors[peer.name] = peer.error(result)
            continue
        if peer.name == peers.OURS:
            ours = result.copy()
        rows = peers.of_heads(result, heads)[:, -expected.shape[1] :]
        errors[peer.name] = max(peers.relative_rms(rows, expected), peers.relative_rms(result, ours))
    return errors


def take_turns(ready: list[Peer], turns: int) -> dict[str, list[float]]:
    """Seconds of every timed call. A turn is one call that warms up, then as many as fill SECONDS_PER_TURN."""
    times: dict[str, list[float]] = {peer.name: [] for peer in ready}
    calls = {}
    for turn in range(turns):
        for peer in ready:
            progress(f"turn {turn + 1} of {turns}: {peer.name}")
            if peer.name not in calls:
                calls[peer.name] = max(1, min(100, int(SECONDS_PER_TURN / peers.best_seconds(peer.run, calls=1))))
            peers.settle()
            peer.run()
            for _ in range(calls[peer.name]):
                start = time.perf_counter()
                peer.run()
                times[peer.name].append(time.perf_counter() - start)
    return times


def progress(text: str) -> None:
    """One line that is overwritten, where a person watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def print_table(result: dict[str, Any]) -> None:
    """One shape's times, a line each."""
    print("\n" + " ".join(f"{axis}{size}" for axis, size in result["shape"].items()) + f", {result['threads']} threads")
    width = max(len(row["name"]) for row in result["times"] + result["absent"])
    print(f"{'':{width}}  {'best ms':>9}  {'median':>9}  {'x Holdfast':>10}  {'error':>7}")
    for row in result["times"]:
        how = row["how"] if row["correct"] else f"WRONG RESULT; {row['how']}"
        if row["layout_ms"]:
            how += (
                f"; {row['layout_ms']:.2f} ms of it convert from and to [B, T, H, size], without them"
                f" {row['ratio_without_layout']:.2f} x Holdfast"
            )
        print(
            f"{row['name']:{width}}  {row['best_ms']:9.3f}  {row['median_ms']:9.3f}  {row['ratio']:10.2f}"
            f"  {row['relative_error']:7.0e}  {how}"
        )
    for row in result["absent"]:
        print(f"{row['name']:{width}}  {row['reason']}")
    # The published algorithm as it stands says less than the best that can be made of it.
    for what, names in {"the best peer": peers.SAME, **{name: [name] for name in peers.ALL_PUBLISHED}}.items():
        ratios = [row["ratio"] for row in result["times"] if row["name"] in names and row["correct"]]
        if ratios:
            print(f"{min(ratios):.2f} times as fast as {what}")
