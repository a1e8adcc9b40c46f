"""`holdfast train`: a language model of bytes, from text to checkpoints; under torchrun on several processes.

What a run does depends on its options alone: batches are drawn from seed and step, and so are dropout's zeros, so that
a run that goes on from a checkpoint has the bits of one that was never interrupted. Only --minutes lets time in.

A run's folder has checkpoint.pt, log.jsonl (a JSON object a line: the run, then steps and validations), and loss.png.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from . import plot, set_num_threads
from .extras import require
from .text import Text, bits_per_byte

torch = require("torch", "train")

from torch import Tensor, distributed  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from .lm import ATTENTIONS, PRESETS, Config, RetentionLM, check_device, load_versioned  # noqa: E402

FORMAT, VERSION = "holdfast checkpoint", 1
STEPS = 1000  # where neither they nor minutes are given
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the model, by option.
CONFIG = (
    "attention", "degree", "chunk_size", "dim", "layers", "heads", "kv_heads", "key_size", "value_size", "ffn",
    "ffn_size", "conv_width", "dropout", "tie_embeddings", "gating",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    group.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files and folders (default: the standard library's sources)",
    )

    group = parser.add_argument_group("model")
    group.add_argument("--preset", default="demo", choices=PRESETS, help="sizes to start from (default: %(default)s)")
    group.add_argument(
        "--attention",
        type=_attentions,
        metavar="|".join(ATTENTIONS),
        help="of all layers, or one for each: retnet,power,...",
    )
    group.add_argument("--degree", type=int, help="of power retention, 2 to 4 (default: 2)")
    group.add_argument("--chunk-size", type=int, help="tokens that a kernel works on at a time (default: its choice)")
    group.add_argument(
        "--disable-gating",
        dest="gating",
        action="store_false",
        default=None,
        help="no decay in gated and power retention",
    )
    for name, meaning in (
        ("dim", "of the model"),
        ("layers", ""),
        ("heads", "of queries"),
        ("kv-heads", "of keys and values (default: as many as heads)"),
        ("key-size", "of a head"),
        ("value-size", "of a head"),
        ("ffn-size", ""),
        ("conv-width", "of a causal convolution before q, k and v; 0: none"),
    ):
        group.add_argument(f"--{name}", type=int, help=meaning)
    group.add_argument("--ffn", choices=("gelu", "swiglu"))
    group.add_argument("--dropout", type=float)
    group.add_argument(
        "--tie-embeddings", action="store_true", default=None, help="the head has the embedding's weights"
    )

    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, help=f"default: {STEPS}; with --minutes, as many as there is time for")
    group.add_argument("--minutes", type=float, help="stop at this time, which the learning rate then follows too")
    group.add_argument("--context", type=int, default=512, help="tokens of a sequence (default: %(default)s)")
    group.add_argument(
        "--batch", type=int, default=8, help="sequences of a step, of all processes together (default: %(default)s)"
    )
    group.add_argument("--accumulate", type=int, default=1, help="parts of a step's batch (default: %(default)s)")
    group.add_argument("--learning-rate", type=float, default=3e-3, help="default: %(default)s")
    group.add_argument(
        "--min-learning-rate", type=float, default=0.05, help="at the end, as a share of it (default: %(default)s)"
    )
    group.add_argument("--warmup", type=float, default=0.05, help="share of the steps (default: %(default)s)")
    group.add_argument("--weight-decay", type=float, default=0.1, help="of AdamW (default: %(default)s)")
    group.add_argument("--beta2", type=float, default=0.95, help="of AdamW (default: %(default)s)")
    group.add_argument("--clip", type=float, default=1.0, help="norm of gradients; 0: any (default: %(default)s)")
    group.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of products, by autocast (default: %(default)s)"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile")
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    group.add_argument("--device", default="cpu", help="cpu, cuda (default: %(default)s)")
    group.add_argument("--threads", type=int, help="of a process (default: PyTorch's choice, and Holdfast's)")
    group.add_argument("--backend", choices=("gloo", "nccl"), help="under torchrun (default: by device)")

    group = parser.add_argument_group("run")
    group.add_argument(
        "--output", type=Path, default=Path("runs/holdfast"), help="folder of the run (default: %(default)s)"
    )
    group.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on from its checkpoint, with its options but for those given here",
    )
    group.add_argument("--stop-at", type=int, metavar="STEP", help="write a checkpoint and stop there")
    group.add_argument("--save-every", type=int, default=500, help="steps (default: %(default)s)")
    group.add_argument("--validate-every", type=int, default=250, help="steps; 0: at the end (default: %(default)s)")
    group.add_argument(
        "--validation-bytes", type=int, default=1 << 16,
        help="of each validation but the last, which is of all (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--log-every", type=int, default=10, help="steps (default: %(default)s)")
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def _attentions(text: str) -> str | tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in ATTENTIONS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(ATTENTIONS)}")
    return names if len(names) > 1 else names[0]


def run(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """What the command does; `parser` knows `arguments`."""
    args = parser.parse_args(arguments)
    checkpoint = None
    try:
        if args.resume is not None:
            checkpoint = read_checkpoint(args.resume)
            args = _with_saved(parser, arguments, checkpoint)
        _check(args)
        with World(args) as world:
            Run(args, world, checkpoint).train()
    except (OSError, ValueError, NotImplementedError) as error:
        print(f"holdfast train: {error}", file=sys.stderr)
        return 1
    return 0


def _with_saved(
    parser: argparse.ArgumentParser, arguments: list[str], checkpoint: dict[str, Any]
) -> argparse.Namespace:
    """The options of a checkpoint, where `arguments` have no other."""
    defaults = vars(parser.parse_args(arguments))
    given = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(defaults, _NOT_GIVEN)))
    named = {name: value for name, value in vars(given).items() if value is not _NOT_GIVEN}
    return argparse.Namespace(**{**defaults, **checkpoint["options"], "output": _folder(given.resume), **named})


def _folder(run: Path) -> Path:
    """Of a run that is named by it, or by its checkpoint."""
    return run if run.is_dir() else run.parent


_NOT_GIVEN = object()


def _check(args: argparse.Namespace) -> None:
    for name, least in (
        ("steps", 1), ("context", 1), ("batch", 1), ("accumulate", 1), ("save_every", 1), ("validate_every", 0),
        ("validation_bytes", 1), ("log_every", 1), ("threads", 1), ("stop_at", 0), ("seed", 0), ("learning_rate", 0),
        ("min_learning_rate", 0), ("clip", 0), ("warmup", 0), ("weight_decay", 0), ("beta2", 0), ("minutes", 0),
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:  # no NaN either
            finite = ", and finite" if isinstance(value, float) else ""
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected at least {least}{finite}")
    if args.minutes == 0:
        raise ValueError("--minutes is 0; expected more than 0")
    if args.beta2 >= 1:
        raise ValueError(f"--beta2 is {args.beta2}; expected less than 1")
    if args.seed >= 2**63:
        raise ValueError(f"--seed is {args.seed}; expected less than 2^63")
    mixers = [args.attention] if isinstance(args.attention, str) else args.attention
    if args.gating is False and mixers and not {"gated", "power"} & set(mixers):
        raise ValueError(f"--disable-gating is given, and --attention {','.join(mixers)} has no gates")


class World:
    """The processes of the run: one, or those that torchrun started."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.size, self.rank = (int(os.environ.get(name, n)) for name, n in (("WORLD_SIZE", "1"), ("RANK", "0")))
        self.distributed = "WORLD_SIZE" in os.environ and distributed.is_torchelastic_launched()
        if not self.distributed:
            self.size, self.rank = 1, 0
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if args.device == "cuda" else args.device
        check_device(device)
        self.device = torch.device(device)
        self.backend = args.backend or ("nccl" if self.device.type == "cuda" else "gloo")
        parts = self.size * args.accumulate
        if args.batch % parts:
            raise ValueError(f"--batch is {args.batch}; expected a multiple of {parts}, processes times --accumulate")
        self.threads = args.threads

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> World:
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.threads or self.distributed:  # processes share the cores, as torchrun has told PyTorch
            set_num_threads(torch.get_num_threads())
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.distributed:
            distributed.init_process_group(self.backend)
        return self

    def __exit__(self, *_: object) -> None:
        if self.distributed:
            distributed.destroy_process_group()

    def total(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if not self.distributed:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(together)
        return together.tolist()


class Run:
    """A run, from its options or from a checkpoint."""

    def __init__(self, args: argparse.Namespace, world: World, checkpoint: dict[str, Any] | None = None) -> None:
        self.args, self.world = args, world
        self.text = Text.read(args.data)
        if len(self.text.training) <= args.context:
            raise ValueError(
                f"data has {len(self.text.training)} bytes to train on; expected more than --context, {args.context}"
            )
        changes = {name: value for name in CONFIG if (value := getattr(args, name)) is not None}
        torch.manual_seed(args.seed)
        self.model = RetentionLM(args.preset, vocab_size=256, **changes).to(world.device)
        self.optimizer = make_optimizer(self.model, args)
        self.step, self.seconds = 0, 0.0
        if checkpoint is not None:
            self._restore(checkpoint)
        self.trained: Any = self.model
        if world.distributed:
            self.trained = DistributedDataParallel(self.model)
        if args.compile:
            self.trained = torch.compile(self.trained)
        self.stopped = False

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["config"] != dataclasses.asdict(self.model.config):
            raise ValueError("the options given make another model than that of the checkpoint")
        if checkpoint["text"] != self.text.fingerprint:
            raise ValueError("the text is not that of the checkpoint; a file has changed, or --data is other")
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]

    def save(self) -> None:
        if not self.world.leads:
            return
        checkpoint = {
            "format": FORMAT,
            "version": VERSION,
            "config": dataclasses.asdict(self.model.config),
            "options": {name: value for name, value in vars(self.args).items() if name not in _OF_ONE_CALL},
            "text": self.text.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        checkpoint["options"]["data"] = [str(Path(path).resolve()) for path in self.args.data]
        path = self.args.output / "checkpoint.pt"
        torch.save(checkpoint, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)  # never half a checkpoint

    def _progress(self) -> float:
        """Of the run, 0 to 1; for all processes together."""
        minutes = self.args.minutes
        done = self.step / (self.args.steps or (STEPS if minutes is None else math.inf))
        if minutes is None:
            return done
        # Clocks differ, and all processes must take the same number of steps at the same learning rates.
        [elapsed] = self.world.total(self.seconds / self.world.size)
        return max(done, min(1.0, elapsed / (60 * minutes)))

    def train(self) -> None:
        args, world = self.args, self.world
        if world.leads:
            args.output.mkdir(parents=True, exist_ok=True)
        before = args.output if args.resume is None else _folder(args.resume)  # which may be another
        log = Log(args.output / "log.jsonl", before / "log.jsonl", self.step, enabled=world.leads)
        with log, self._interruptible():
            if not log.described:
                log.write(self._description())
            with self._bar() as bar:
                progress = self._progress()
                while progress < 1 and not self.stopped and (args.stop_at is None or self.step < args.stop_at):
                    self._one_step(progress, log, bar)
                    progress = self._progress()
                    bar.advance(progress)
                    if progress < 1 and args.validate_every and self.step % args.validate_every == 0:
                        self._validate(log, bar, args.validation_bytes)
                    if self.step % args.save_every == 0:
                        self.save()
                if progress >= 1:
                    self._validate(log, bar, None)
            self.save()
        if world.leads:
            with contextlib.suppress(ModuleNotFoundError):  # without matplotlib there is no picture
                plot.draw([args.output], args.output / "loss.png")

    def _one_step(self, progress: float, log: Log, bar: Any) -> None:
        args, world = self.args, self.world
        start = time.perf_counter()
        rate = learning_rate(args, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(_seed(args.seed, self.step, world.rank))  # dropout's
        rows = self.text.batch(args.seed, self.step, args.batch, args.context)
        tokens = torch.from_numpy(rows.astype("int64"))
        loss = torch.zeros((), device=world.device)
        self.trained.train()
        for n, part in enumerate(tokens.chunk(world.size * args.accumulate)[world.rank :: world.size]):
            last = n == args.accumulate - 1
            with contextlib.nullcontext() if last or not world.distributed else self._no_sync():
                try:
                    part_loss = self.loss(part.to(world.device)) / args.accumulate
                except ValueError as error:  # of a kernel: numbers that overflowed are not a decay
                    raise ValueError(f"step {self.step + 1}: {error}; a smaller --learning-rate may help") from error
                part_loss.backward()
            loss += part_loss.detach()
        limit = args.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.step % args.log_every == 0 or self.step == (args.steps or STEPS):
            [value] = world.total(loss.item() / world.size)
            if not math.isfinite(value):
                raise ValueError(f"the loss is {value} at step {self.step}; a smaller --learning-rate may help")
        else:
            value = None
        self.seconds += time.perf_counter() - start
        if value is not None:
            speed = args.batch * args.context / (time.perf_counter() - start)
            bar.say(loss=f"{value:.3f}", rate=f"{speed / 1e3:.1f}k tokens/s")
            log.write(
                {
                    "step": self.step,
                    "tokens": self.step * args.batch * args.context,
                    "seconds": round(self.seconds, 3),
                    "loss": value,
                    "bits_per_byte": bits_per_byte(value),
                    "gradient_norm": norm.item(),
                    "learning_rate": rate,
                    "tokens_per_second": round(speed, 1),
                }
            )

    def _no_sync(self) -> Any:
        ddp = self.trained
        return getattr(ddp, "_orig_mod", ddp).no_sync()

    def loss(self, rows: Tensor, reduction: str = "mean") -> Tensor:
        """Of predicting each byte of rows [B, T + 1] but the first, in nats."""
        with torch.autocast(self.world.device.type, DTYPES[self.args.dtype], enabled=self.args.dtype != "fp32"):
            logits = (self.trained if self.trained.training else self.model)(rows[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)

    @torch.no_grad()
    def validation_loss(self, bytes: int | None = None) -> float:
        """Nats a byte, of about so many bytes, or of all; each process has its share of the work."""
        self.trained.eval()
        windows = self.text.windows(self.args.context, bytes)
        whole = [w for w in windows if len(w) == self.args.context + 1]
        at_a_time = max(1, 8192 // self.args.context)
        batches = [whole[n : n + at_a_time] for n in range(0, len(whole), at_a_time)]
        batches += [[w] for w in windows if len(w) <= self.args.context]
        nats, count = 0.0, 0
        for batch in batches[self.world.rank :: self.world.size]:
            rows = torch.tensor([w.tolist() for w in batch], device=self.world.device)
            nats += self.loss(rows, "sum").item()
            count += rows[:, 1:].numel()
        nats, count = self.world.total(nats, count)
        self.trained.train()
        return nats / count

    def _validate(self, log: Log, bar: Any, bytes: int | None) -> None:
        start = time.perf_counter()
        loss = self.validation_loss(bytes)
        bits = bits_per_byte(loss)
        log.write(
            {
                "step": self.step,
                "tokens": self.step * self.args.batch * self.args.context,
                "seconds": round(self.seconds, 3),
                "validation_loss": loss,
                "validation_bits_per_byte": bits,
                "of_all": bytes is None,
                "took": round(time.perf_counter() - start, 3),
            }
        )
        of = "all" if bytes is None else "some"
        bar.print(f"step {self.step:,}: {bits:.3f} bits per byte ({loss:.4f} nats) of {of} validation bytes")

    def _description(self) -> dict[str, Any]:
        options = {name: value for name, value in vars(self.args).items() if name not in _OF_ONE_CALL}
        return {
            "run": {name: str(value) if isinstance(value, Path) else value for name, value in options.items()},
            "config": dataclasses.asdict(self.model.config),
            "parameters": self.model.parameters_count,
            "training_bytes": len(self.text.training),
            "validation_bytes": len(self.text.validation),
            "processes": self.world.size,
            "threads": torch.get_num_threads(),
        }

    def _bar(self) -> Bar:
        what = f"{self.model.parameters_count / 1e6:.2f} M parameters"
        return Bar(what, enabled=self.world.leads, quiet=self.args.quiet)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step, with a checkpoint; a second one at once. With several
        processes they end it at once: each would stop at another step."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.stopped = True
            signal.signal(number, before[number])

        before: dict[int, Any] = {}
        if not self.world.distributed:
            with contextlib.suppress(ValueError):  # not in the main thread
                for number in (signal.SIGINT, signal.SIGTERM):
                    before[number] = signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


_OF_ONE_CALL = ("output", "resume", "stop_at")


def _seed(*numbers: int) -> int:
    seed = 0
    for n in numbers:
        seed = (seed * 1_000_003 + n) % 2**63
    return seed


def learning_rate(args: argparse.Namespace, progress: float) -> float:
    """Up linearly over the warm-up, down by a cosine to its share at the end."""
    if progress < args.warmup:
        step = 1 / (args.steps or STEPS)
        return args.learning_rate * (progress + step) / (args.warmup + step)
    done = (progress - args.warmup) / max(1e-9, 1 - args.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return args.learning_rate * (args.min_learning_rate + (1 - args.min_learning_rate) * cosine)


def make_optimizer(model: RetentionLM, args: argparse.Namespace) -> torch.optim.AdamW:
    """Weight decay is of the matrices; not of embeddings, norms, convolutions and gates."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and not any(part in name for part in ("conv", "decay_proj", "embedding", "norm"))
        (matrices if matrix else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, args.beta2), fused=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a run has saved, from its folder or the file. OSError, or ValueError for another file or a later one."""
    return load_versioned(path / "checkpoint.pt" if path.is_dir() else path, FORMAT, VERSION)


def load_model(path: Path | str, device: Any = "cpu") -> RetentionLM:
    """The model of a run, from its folder or checkpoint, to be used."""
    check_device(device)
    checkpoint = read_checkpoint(Path(path))
    model = RetentionLM(Config(**checkpoint["config"])).to(device)
    model.load_state_dict(checkpoint["model"])
    return model.eval()


class Log:
    """A file of JSON objects, a line each. A run that goes on has those of `before` up to its checkpoint."""

    def __init__(self, path: Path, before: Path, step: int, enabled: bool) -> None:
        self.path, self.before, self.step, self.file = path, before, step, None
        self.enabled, self.described = enabled, False

    def __enter__(self) -> Log:
        if self.enabled:
            kept = plot.lines(self.before) if self.step and self.before.exists() else []
            kept = [entry for entry in kept if entry.get("step", 0) <= self.step]
            self.described = any("run" in entry for entry in kept)
            self.file = self.path.open("w")
            self.file.writelines(json.dumps(entry) + "\n" for entry in kept)
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, entry: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()


class Bar:
    """A progress bar from 0 to 1; and lines above it, which a quiet one prints too."""

    def __init__(self, what: str, enabled: bool, quiet: bool) -> None:
        self.enabled, self.bar = enabled, None
        if enabled and not quiet:
            self.bar = require("tqdm", "train").tqdm(
                total=1.0,
                desc=what,
                bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} to go{postfix}",
                mininterval=0.5,
            )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, done: float) -> None:
        if self.bar is not None:
            self.bar.update(min(1.0, done) - self.bar.n)

    def say(self, **values: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(
                ", ".join(f"{name} {value}" if name != "rate" else value for name, value in values.items())
            )

    def print(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        elif self.enabled:
            print(line, flush=True)
