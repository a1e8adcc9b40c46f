"""Stream megabytes of real text through a retention layer, and see how it holds up; then train a language model on it.

The text is the source of the running interpreter's standard library, read as bytes. The layer has fixed random weights:
an embedding of bytes, projections to q, k, v and a decay per token (NumPy), and multi-head retention (Holdfast). It is
run in blocks with the state carried from one to the next, then, on the beginning of the text, in one call and token by
token. The language model has four layers of gated retention; what it makes of files that it has not seen stands beside
gzip and models that count. `make demo` runs this file; PyTorch, where it is installed, takes part, and trains.

    python examples/demo.py [--megabytes 4] [--heads 8] [--size 64] [--minutes 2] [--softmax] [--data PATH ..]
        [--output build/demo]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

# Idle threads of NumPy's OpenBLAS spin for 2^26 cycles after a product, and would take their cores from retention.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import matplotlib

matplotlib.use("Agg")  # draws without a screen

import matplotlib.pyplot as plt
import numpy as np
from holdfast import decay, info, peers, retention, retention_step, set_verbose
from holdfast.bench import usable_cores
from holdfast.peers import Inputs
from tqdm import tqdm

progress = functools.partial(tqdm, leave=False, mininterval=1)

BLOCK = 4096  # tokens in a call when streaming
SAMPLE = 4 * BLOCK  # first tokens, on which the forms are compared
STEPS = 2048  # tokens done one by one
EMBEDDING = 128
# The worst of millions of outputs, over their root mean square: 1e-5 is usual in fp32.
LARGEST_DIFFERENCE = 1e-4
LONGEST_ATTENTION = 8192  # drawn: half a second per call; four times as much for twice the length
PROMPT = "def main(arguments):\n"
GENERATED = 400  # bytes
TRAINING = "--preset demo --context 512 --batch 2 --steps 1000000 --validate-every 0 --save-every 1000000".split()
BF16_PRODUCTS = {"amx_bf16", "avx512_bf16"}  # CPU features with which PyTorch's matrix products are faster in bf16
LONG = ["--context", "4096", "--batch", "1"]  # beside softmax attention, whose time grows with it


def standard_library(size: int) -> np.ndarray:
    """The first `size` bytes of the standard library's modules, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (
        path for path in root.rglob("*.py") if path.relative_to(root).parts[0] not in ("site-packages", "dist-packages")
    )
    text = bytearray()
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        text += path.read_bytes()
        if len(text) >= size:
            return np.frombuffer(bytes(text[:size]), np.uint8)
    sys.exit(
        f"demo: {root} holds {len(text) / 1e6:.1f} MB of sources; expected at least {size / 1e6:.1f} (--megabytes)"
    )


class Projections:
    """What comes before retention: bytes to q, k, v and log_decay, with weights that a seed fixes."""

    def __init__(self, heads: int, size: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)

        def weights(inputs: int, outputs: int) -> np.ndarray:
            return (rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)).astype(np.float32)

        self.heads, self.size = heads, size
        self.embedding = rng.standard_normal((256, EMBEDDING)).astype(np.float32)
        self.q, self.k, self.v = (weights(EMBEDDING, heads * size) for _ in range(3))
        self.gate = weights(EMBEDDING, heads)

    def __call__(self, text: np.ndarray) -> Inputs:
        x = self.embedding[text]
        q, k, v = ((x @ w).reshape(1, len(x), self.heads, self.size) for w in (self.q, self.k, self.v))
        # RetNet's decay of each head, half to one and a half times as strong: the token decides.
        strength = 0.5 + 1 / (1 + np.exp(-(x @ self.gate)))
        return Inputs(q, k, v, (decay(self.heads) * strength)[None])


def blocks(text: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(text), BLOCK):
        yield text[start : start + BLOCK]


def peak_megabytes() -> float:
    """Most memory that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def stream(text: np.ndarray, project: Projections) -> np.ndarray:
    """The whole text in blocks, the state carried; returns what comes out for the first SAMPLE tokens."""
    state, first, seconds = None, [], 0.0
    report_at = [len(text) * part // 8 for part in (1, 2, 4, 8)]
    lines = []
    start, done = time.perf_counter(), 0
    with progress(total=len(text), unit="token", unit_scale=True, desc="streaming") as bar:
        for block in blocks(text):
            x = project(block)
            before = time.perf_counter()
            out, state = retention(x.q, x.k, x.v, x.log_decay, initial_state=state, return_state=True)
            seconds += time.perf_counter() - before
            if done < SAMPLE:
                first.append(out)
            done += len(block)
            bar.update(len(block))
            if done >= report_at[0]:
                report_at = [tokens for tokens in report_at if tokens > done] or [len(text) + 1]
                lines.append((done, done / (time.perf_counter() - start), done / seconds, peak_megabytes()))
    print("in blocks, state carried:")
    print(f"  {'tokens':>10}  {'tokens/s':>10}  {'retention alone':>15}  {'peak memory':>11}")
    for tokens, whole, alone, peak in lines:
        print(f"  {tokens:10,}  {whole:10,.0f}  {alone:15,.0f}  {peak:8.0f} MB")
    return np.concatenate(first, axis=1)[:, :SAMPLE]


def token_by_token(x: Inputs, steps: int) -> np.ndarray:
    """The first `steps` tokens with a call each, the state in place: what generation does."""
    B, _, H, K, V = x.shape
    state, out = np.zeros((B, H, K, V), np.float32), np.empty((B, steps, H, V), np.float32)
    start = time.perf_counter()
    for t in progress(range(steps), unit="token", desc="token by token"):
        retention_step(x.q[:, t], x.k[:, t], x.v[:, t], x.log_decay[:, t], state, out=out[:, t])
    print(f"token by token: {steps / (time.perf_counter() - start):,.0f} tokens/s in retention, {steps:,} tokens")
    return out


def largest_difference(result: np.ndarray, expected: np.ndarray) -> float:
    """Over the root mean square of `expected`."""
    return float(np.abs(np.subtract(result, expected, dtype=np.float64)).max() / np.sqrt(np.mean(np.square(expected))))


def compare_forms(in_blocks: np.ndarray, x: Inputs) -> None:
    """The forms against each other and the definition in double."""
    tokens, steps = in_blocks.shape[1], min(STEPS, in_blocks.shape[1])
    one_call = retention(x.q, x.k, x.v, x.log_decay)
    single = token_by_token(x, steps)
    heads = sorted({0, x.shape[2] - 1})  # that forget fastest and slowest
    expected = peers.reference(x, [(0, h) for h in heads])
    differences = {
        "blocks, one call": largest_difference(in_blocks, one_call),
        "blocks, token by token": largest_difference(in_blocks[:, :steps], single),
        "blocks, double reference": largest_difference(in_blocks[0][:, heads], expected.swapaxes(0, 1)),
        "token by token, double reference": largest_difference(single[0][:, heads], expected[:, :steps].swapaxes(0, 1)),
    }
    print(f"largest difference, over the root mean square of the outputs ({tokens:,} tokens; {steps:,} one by one):")
    for name, difference in differences.items():
        print(f"  {name:34} {difference:.1e}")
    print("  (one by one, the state is rounded to fp32 at each token; in blocks, once in a chunk)")
    if not max(differences.values()) < LARGEST_DIFFERENCE:
        sys.exit(f"demo: the forms differ by more than {LARGEST_DIFFERENCE}: something is wrong")


def explain_variant(x: Inputs) -> None:
    """Which compiled variant runs on inputs like these, and why: the library says so itself at each call."""
    set_verbose(print)
    retention(x.q, x.k, x.v, x.log_decay)
    set_verbose(None)
    report = info()
    print(f"  this CPU has {' '.join(report['cpu_features'])}")
    for target in report["targets"]:
        if not target["runs_here"]:
            lacks = "this CPU lacks " if target["name"] in report["backends"]["cpu"]["targets"] else ""
            print(f"  not {target['name']}: {lacks}{' '.join(target['missing'])}")


class TorchChunkwise:
    """PyTorch's chunkwise form, with the chunks that suit it best on one block of this layer; absent: a reason."""

    def __init__(self, x: Inputs) -> None:
        self.absent = peers.missing("torch")
        if not self.absent:
            import torch

            torch.set_num_threads(usable_cores())
            best, _ = peers.fastest_chunkwise(x, (*peers.TOKENS_AT_A_TIME, x.shape[1]))
            self.chunk, self.at_a_time, self.version = best.chunk, best.at_a_time, torch.__version__

    def __call__(self, x: Inputs) -> peers.TorchChunkwise:
        return peers.TorchChunkwise(x, self.chunk, self.at_a_time)


def compare_torch(text: np.ndarray, project: Projections, torch_chunkwise: TorchChunkwise) -> None:
    """The same blocks of the same layer by PyTorch, the state carried, in turns with Holdfast."""
    if torch_chunkwise.absent:
        print(f"{peers.EAGER}: {torch_chunkwise.absent}")
        return
    state = their_state = None
    ours = theirs = 0.0
    for block in progress(list(blocks(text)), unit="block", desc=peers.EAGER):
        x = project(block)
        peer = torch_chunkwise(x)
        if their_state is not None:
            peer.state = their_state
        peers.settle()
        start = time.perf_counter()
        out, state = retention(x.q, x.k, x.v, x.log_decay, initial_state=state, return_state=True)
        ours += time.perf_counter() - start
        peers.settle()
        start = time.perf_counter()
        peer.load()
        their_state = peer.run()
        peer.store()
        theirs += time.perf_counter() - start
    print(
        f"the same retention of {len(text):,} tokens by PyTorch {torch_chunkwise.version}, in the layout it likes best"
    )
    print(f"(conversions counted), and chunks of {torch_chunkwise.chunk}, {torch_chunkwise.at_a_time} at a time:")
    print(
        f"  Holdfast {ours:.2f} s, PyTorch {theirs:.2f} s: {theirs / ours:.2f} times as long; "
        f"largest difference in the last block {largest_difference(peer.result(), out):.1e}"
    )


def draw(text: np.ndarray, project: Projections, torch_chunkwise: TorchChunkwise, path: Path) -> None:
    """Time of one call against its length, log-log."""
    cores = usable_cores()
    seconds: dict[str, dict[int, float]] = {peers.OURS: {}, peers.EAGER: {}, peers.ATTENTION: {}}
    for length in progress([2**n for n in range(8, 17) if 2**n <= len(text)], unit="length", desc="drawing"):
        x = project(text[:length])
        seconds[peers.OURS][length] = peers.best_seconds(peers.holdfast(x, cores).run)
        if not torch_chunkwise.absent:
            seconds[peers.EAGER][length] = peers.best_seconds(torch_chunkwise(x).run)
            if length <= LONGEST_ATTENTION:
                seconds[peers.ATTENTION][length] = peers.best_seconds(peers.torch_attention(x, cores).run, calls=2)

    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for (name, times), marker in zip(seconds.items(), "osD", strict=True):
        if times:
            axes.loglog(list(times), [1e3 * value for value in times.values()], marker + "-", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("length in tokens")
    axes.set_ylabel("time of one call in milliseconds")
    alone = f"; Holdfast alone, PyTorch is {torch_chunkwise.absent}" if torch_chunkwise.absent else ""
    axes.set_title(f"{project.heads} heads, K = V = {project.size}, fp32, {cores} threads{alone}", fontsize=10)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"picture of time against length: {path}{alone}")


def command(*arguments: str) -> None:
    """`holdfast` as a user calls it, in a process of its own: PyTorch's threads wait there as they are told to."""
    sys.stdout.flush()
    if status := subprocess.run([sys.executable, "-m", "holdfast", *arguments]).returncode:
        sys.exit(status)


def train(output: Path, minutes: float, data: list[str], *options: str) -> float:
    """Train a language model; returns the bits per byte of the validation files."""
    dtype = "bf16" if BF16_PRODUCTS.intersection(info()["cpu_features"]) else "fp32"
    arguments = [*TRAINING, "--dtype", dtype, "--minutes", str(minutes), "--output", str(output), *options]
    if data:
        arguments += ["--data", *data]
    command("train", *arguments)
    log = (output / "log.jsonl").read_text().splitlines()
    return json.loads(log[-1])["validation_bits_per_byte"]


def language_model(output: Path, minutes: float, data: list[str]) -> None:
    """Train, compare what a byte takes with other models of the same files, write, and see that the forms agree."""
    from holdfast.text import Text, gzip_bits, order_bits

    text = Text.read(data)
    print(
        f"a language model of bytes, {minutes:g} minutes on {len(text.training):,} bytes of {text.files:,} files; "
        f"{len(text.validation):,} bytes, of other files, validate"
    )
    bits = {"retention": train(output / "model", minutes, data)}
    counted = order_bits(text.training, text.validation, (0, 3))
    bits |= {f"order {order}, counted in the same training files": value for order, value in counted.items()}
    bits["gzip -9 of the validation files"] = gzip_bits(text.validation)
    print("bits per byte of the validation files:")
    for name, value in bits.items():
        print(f"  {name:45} {value:.3f}")
    print(f"{GENERATED} bytes after the prompt, as they come (holdfast generate {output / 'model'}):")
    command("generate", str(output / "model"), "--prompt", PROMPT, "--bytes", str(GENERATED))
    compare_steps(output / "model", text.validation[:1024])


def compare_steps(run: Path, text: np.ndarray) -> None:
    """What a text gives in one call, and half of it in one call and then byte by byte."""
    import torch
    from holdfast.train import load_model

    model, tokens, half = load_model(run), torch.tensor(text.tolist())[None], len(text) // 2
    with torch.no_grad():
        expected = model(tokens, form="parallel")
        state = model.new_state(1)
        parts = [model(tokens[:, :half], state)]
        parts += [model(tokens[:, n : n + 1], state) for n in range(half, len(text))]
    difference = largest_difference(torch.cat(parts, 1).numpy(), expected.numpy())
    print(f"logits of {half} bytes in one call and {len(text) - half} one by one, against the parallel form of all:")
    print(f"  largest difference, over the root mean square: {difference:.1e}")
    if not difference < LARGEST_DIFFERENCE:
        sys.exit("demo: the forms differ: something is wrong")


def compare_softmax(output: Path, minutes: float, data: list[str]) -> None:
    """The same model with PyTorch's softmax attention, given the same time, at a length where that matters."""
    print(f"at a context of {LONG[1]} bytes, {minutes:g} minutes each:")
    for attention in ("gated", "softmax"):
        bits = train(output / attention, minutes, data, *LONG, "--attention", attention)
        print(f"  {attention:10} {bits:.3f} bits per byte of the validation files")
    command("plot", str(output / "gated"), str(output / "softmax"), "--output", str(output / "softmax.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--megabytes", type=float, default=4, help="2^20 bytes each, of text to stream (default: %(default)s)"
    )
    parser.add_argument("--heads", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=64, help="of keys and values of a head (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=2, help="to train the language model for; 0: none (default: %(default)s)"
    )
    parser.add_argument(
        "--softmax",
        action="store_true",
        help="train it, and one with softmax attention, at a context of 4096 bytes too",
    )
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="PATH",
        help="files and folders for the language model (default: the standard library's sources)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("build/demo"), help="folder of pictures and runs (default: %(default)s)"
    )
    args = parser.parse_args()

    text = standard_library(int(args.megabytes * 2**20))
    project = Projections(args.heads, args.size)
    print(
        f"{len(text):,} bytes of the standard library of Python {sys.version.split()[0]}, a token each; "
        f"{args.heads} heads of {args.size}"
    )
    explain_variant(project(text[:BLOCK]))
    in_blocks = stream(text, project)
    compare_forms(in_blocks, project(text[:SAMPLE]))
    torch_chunkwise = TorchChunkwise(project(text[:BLOCK]))
    compare_torch(text[: 64 * BLOCK], project, torch_chunkwise)
    draw(text, project, torch_chunkwise, args.output / "time_against_length.png")
    if torch_chunkwise.absent:
        print(f"no language model is trained: PyTorch is {torch_chunkwise.absent}")
        return
    if args.minutes:
        language_model(args.output, args.minutes, args.data)
        if args.softmax:
            compare_softmax(args.output, args.minutes, args.data)


if __name__ == "__main__":
    main()
