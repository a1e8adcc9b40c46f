"""`holdfast generate`: continue a prompt with a model that `holdfast train` has made, byte by byte as they come."""

from __future__ import annotations

import argparse
import codecs
import sys
import time
from pathlib import Path

from .extras import require

torch = require("torch", "torch")

from .train import load_model  # noqa: E402


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or its checkpoint")
    parser.add_argument("--prompt", default="import ", help="default: %(default)r")
    parser.add_argument("--prompt-file", type=Path, help="its bytes are the prompt")
    parser.add_argument("--bytes", type=int, default=400, help="to generate (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest byte (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="choose among the k likeliest")
    parser.add_argument("--top-p", type=float, help="choose among the likeliest of this probability together")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    try:
        prompt = args.prompt.encode() if args.prompt_file is None else args.prompt_file.read_bytes()
        if not prompt:
            raise ValueError("the prompt is empty; expected at least one byte")
        model = load_model(args.run, args.device)
        if model.config.vocab_size > 256:
            raise ValueError(f"{args.run} has a vocabulary of {model.config.vocab_size}; expected bytes, at most 256")
        stream(model, prompt, args)
    except (OSError, ValueError) as error:
        print(f"holdfast generate: {error}", file=sys.stderr)
        return 1
    return 0


def stream(model: torch.nn.Module, prompt: bytes, args: argparse.Namespace) -> None:
    """Text goes to stdout as it comes, what it took to stderr."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several bytes
    sys.stdout.write(prompt.decode(errors="replace"))
    sys.stdout.flush()
    state = model.new_state(1)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    start = time.perf_counter()
    first = None
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    for token in model.stream([list(prompt)], args.bytes, **options, generator=generator, state=state):
        if first is None:
            first, size = time.perf_counter(), state.nbytes
        sys.stdout.write(decoder.decode(bytes([token.item()])))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", True) + "\n")
    sys.stdout.flush()
    if first is None:
        return
    done = time.perf_counter()
    report = f"prompt: {len(prompt):,} bytes, {len(prompt) / (first - start):,.0f} a second"
    if args.bytes > 1:
        report += f"; generated: {args.bytes:,} bytes, {(args.bytes - 1) / (done - first):,.0f} a second"
    report += f"; state: {size:,} bytes after the prompt, {state.nbytes:,} at the end"
    print(report, file=sys.stderr)
