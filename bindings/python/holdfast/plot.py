"""`holdfast plot`: losses of runs of `holdfast train` in one picture."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .extras import require

AXES = {"step": "step", "tokens": "tokens", "seconds": "seconds of training"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders, or their log.jsonl")
    parser.add_argument("--output", type=Path, default=Path("loss.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--x", choices=AXES, default="step", help="against what (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    try:
        draw(args.runs, args.output, args.x)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"holdfast plot: {error}", file=sys.stderr)
        return 1
    width = max(len(str(path)) for path in args.runs)
    for path in args.runs:
        _, _, validations = read(path)
        last = f"{validations[-1]['validation_bits_per_byte']:.3f} bits per byte" if validations else "no validation"
        print(f"{str(path):{width}}  {last}")
    print(f"picture: {args.output}")
    return 0


def lines(file: Path) -> list[dict[str, Any]]:
    """Of a log, but for a last one that has no end: a run that was killed may have been writing it."""
    try:
        text = file.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except ValueError as error:
        raise ValueError(f"{file} is not a log of holdfast train: {error}") from error


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """(the run, its steps, its validations) of a log."""
    file = path / "log.jsonl" if path.is_dir() else path
    entries = lines(file)
    if len(runs := [entry for entry in entries if "run" in entry]) != 1:
        raise ValueError(f"{file} is not a log of holdfast train: it has {len(runs)} lines of a run; expected 1")
    [first] = runs
    steps = [entry for entry in entries if "loss" in entry]
    return first, steps, [entry for entry in entries if "validation_loss" in entry]


def draw(runs: Sequence[Path], path: Path, x: str = "step") -> None:
    """Bits per byte of training, thin, each the mean of a fiftieth of the run, and of validation, with marks."""
    logs = [(run, *read(run)) for run in runs]
    require("matplotlib", "train").use("Agg")  # draws without a screen
    plt = require("matplotlib.pyplot", "train")
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    lowest, highest = [], []
    for number, (run, description, steps, validations) in enumerate(logs):
        config = description["config"]
        attention = config["attention"] if isinstance(config["attention"], str) else ",".join(config["attention"])
        label = f"{run if run.is_dir() else run.parent}: {attention}, {description['parameters'] / 1e6:.1f} M"
        color = f"C{number}"
        where, training = _points(steps, x, "bits_per_byte")
        training = _smooth(training, max(1, len(training) // 50))
        axes.plot(where, training, color=color, alpha=0.5, linewidth=1)
        axes.plot(*_points(validations, x, "validation_bits_per_byte"), "o-", color=color, markersize=4, label=label)
        values = training + [e["validation_bits_per_byte"] for e in validations]
        lowest += [min(values)] if values else []
        highest += [sorted(values)[int(0.97 * (len(values) - 1))]] if values else []
    if lowest:  # the first steps' losses, which are of nothing learnt, would flatten the rest
        axes.set_ylim(0.95 * min(lowest), 1.05 * max(highest))
    axes.set_xlabel(AXES[x])
    axes.set_ylabel("bits per byte; with marks: validation")
    axes.grid(True, alpha=0.25)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _smooth(values: list[float], width: int) -> list[float]:
    """The mean of each value and up to width - 1 before it."""
    return [sum(part) / len(part) for part in (values[max(0, n - width + 1) : n + 1] for n in range(len(values)))]


def _points(entries: list[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    return [entry[x] for entry in entries], [entry[y] for entry in entries]
