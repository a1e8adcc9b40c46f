"""The command `holdfast`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__, info


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments`, those of the process by default; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="holdfast", description="Retention kernels compiled ahead of time.")
    parser.add_argument("--version", action="version", version=f"holdfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    info_parser = commands.add_parser("info", help="what was compiled, and which variants would run here")
    info_parser.add_argument("--json", action="store_true", help="print holdfast.info() as JSON")
    bench_parser = commands.add_parser("bench", help="time Holdfast beside ONNX Runtime and PyTorch")
    if "bench" in arguments[:1]:
        from . import bench  # with its imports, only where it is wanted

        bench.add_arguments(bench_parser)
        return bench.run(parser.parse_args(arguments))
    train_parser = commands.add_parser("train", help="train a language model of bytes (needs PyTorch)")
    generate_parser = commands.add_parser("generate", help="continue a prompt with a trained model (needs PyTorch)")
    plot_parser = commands.add_parser("plot", help="draw the losses of runs (needs matplotlib)")
    # PyTorch's idle threads would spin, on cores that Holdfast's could use. It reads this when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if "train" in arguments[:1]:
            from . import train

            train.add_arguments(train_parser)
            return train.run(train_parser, list(arguments[1:]))
        if "generate" in arguments[:1]:
            from . import generate

            generate.add_arguments(generate_parser)
            return generate.run(parser.parse_args(arguments))
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "tqdm"):
            raise
        sys.exit(f"holdfast {arguments[0]}: {error}")
    if "plot" in arguments[:1]:
        from . import plot

        plot.add_arguments(plot_parser)
        return plot.run(parser.parse_args(arguments))

    args = parser.parse_args(arguments)
    print(json.dumps(info(), indent=2) if args.json else info_text(info()))
    return 0


def info_text(report: dict[str, Any]) -> str:
    """What holdfast.info() returned, for people."""
    gpu_targets = {t for name, backend in report["backends"].items() if name != "cpu" for t in backend["targets"]}
    rows = [("", "variant", "kernel", "dtype", "chunk", "K", "V", "rows", "target", "")]
    for v in report["variants"]:
        mark = "*" if v["selected"] else ""
        key_size, value_size = (str(size or "any") for size in (v["key_size"], v["value_size"]))
        needs = "its backend" if v["target"] in gpu_targets else " ".join(v["missing"])
        note = "" if v["runs_here"] else f"needs {needs}"
        chunk, row_alignment = str(v["chunk"] or ""), str(v["row_alignment"])
        sizes = (key_size, value_size, row_alignment)
        rows.append((mark, v["name"], v["kernel"], v["dtype"], chunk, *sizes, v["target"], note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        [
            f"Holdfast {report['version']}",
            f"CPU features: {' '.join(report['cpu_features'])}",
            *(
                f"Backend {name}: {backend['why_not'] or ', '.join(['available', *backend['devices']])}"
                for name, backend in report["backends"].items()
            ),
            "",
            *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
            "",
            "* runs here on its backend's arrays of its dtype and sizes (any: those that no other * of the kernel has)",
            "whose rows start at multiples of that many bytes; of recurrent for single tokens, or for blocks of chunk",
        ]
    )
