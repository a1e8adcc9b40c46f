"""Text for training, byte by byte: which files, which of them validate, and batches that depend on nothing but seed and
step; and what others make of the same bytes: models of orders 0 to 4, and gzip."""

from __future__ import annotations

import gzip
import hashlib
import math
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["Text", "gzip_bits", "order_bits", "standard_library"]

VALIDATION_SHARE = 20  # one file in so many


def standard_library() -> list[tuple[str, Path]]:
    """(name, path) of the modules of the running interpreter's standard library, in the order of their names; without
    its tests, which not every distribution installs."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in root.rglob("*.py") if _LEFT_OUT.isdisjoint(path.relative_to(root).parts))
    return sorted((path.relative_to(root).as_posix(), path) for path in paths)


_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def files(data: Sequence[str | Path]) -> list[tuple[str, Path]]:
    """(name, path) of the given files, and of all in the given folders but those whose names begin with a dot."""
    found = []
    for given in map(Path, data):
        if given.is_file():
            found.append((given.name, given))
        elif given.is_dir():
            inside = ((path.relative_to(given), path) for path in given.rglob("*"))
            found += sorted(
                (name.as_posix(), path)
                for name, path in inside
                if path.is_file() and not any(part.startswith(".") for part in name.parts)
            )
        else:
            raise FileNotFoundError(f"{given} is neither a file nor a folder")
    return found


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes to validate with, of different files."""

    training: np.ndarray
    validation: np.ndarray
    files: int
    fingerprint: str  # changes with any byte of either

    @classmethod
    def read(cls, data: Sequence[str | Path] = ()) -> Text:
        """Of files and folders; none: the standard library. A file validates where a hash of its name says so, one in
        twenty; where that leaves one side without a byte, for files are few, the last twentieth of each does."""
        named = files(data) if data else standard_library()
        contents = [(name, path.read_bytes()) for name, path in named]
        sides: tuple[list[bytes], list[bytes]] = ([], [])
        for name, text in contents:
            sides[_hash(name.encode()) % VALIDATION_SHARE == 0].append(text)
        if not all(map(any, sides)):
            cuts = [(text, len(text) - len(text) // VALIDATION_SHARE) for _, text in contents]
            sides = [text[:cut] for text, cut in cuts], [text[cut:] for text, cut in cuts]
        training, validation = map(b"".join, sides)
        if len(training) < 2 or len(validation) < 2:
            raise ValueError(f"data has {len(training) + len(validation)} bytes; expected at least 40")
        fingerprint = hashlib.sha256(hashlib.sha256(training).digest() + validation).hexdigest()
        return cls(*(np.frombuffer(x, np.uint8) for x in (training, validation)), len(named), fingerprint)

    def batch(self, seed: int, step: int, sequences: int, length: int) -> np.ndarray:
        """[sequences, length + 1] bytes to train on, from anywhere: the same for the same seed and step."""
        if (last := len(self.training) - length - 1) < 0:
            raise ValueError(
                f"data has {len(self.training)} bytes to train on; expected more than the context, {length}"
            )
        starts = np.random.default_rng([seed, step]).integers(0, last, sequences, endpoint=True)
        return self.training[starts[:, None] + np.arange(length + 1)]

    def windows(self, length: int, bytes: int | None = None) -> list[np.ndarray]:
        """Pieces [length + 1] of the validation bytes, in which each but the first of all is to be predicted once; the
        last piece may be shorter. With `bytes`, about so many, spread evenly."""
        starts = range(0, len(self.validation) - 1, length)
        if bytes is not None and (wanted := max(1, bytes // length)) < len(starts):
            starts = [starts[n * len(starts) // wanted] for n in range(wanted)]
        return [self.validation[start : start + length + 1] for start in starts]


def bits_per_byte(nats: float) -> float:
    return nats / math.log(2)


def _hash(name: bytes) -> int:
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big")


def gzip_bits(text: np.ndarray) -> float:
    """Bits per byte of `gzip -9`."""
    return 8 * len(gzip.compress(text.tobytes(), 9)) / len(text)


def order_bits(training: np.ndarray, text: np.ndarray, orders: Iterable[int]) -> dict[int, float]:
    """Bits per byte of `text` under models of the next byte from the last n, n at most 4, counted in `training` and
    blended by Witten and Bell's rule:

        p_n(b | c) = (count(c b) + followers(c) p_{n-1}(b | all of c but its first)) / (count(c) + followers(c))
    """
    wanted = set(orders)
    probability = np.full(len(text), 1 / 256)
    bits = {}
    for order in range(max(wanted) + 1):
        grams, counts = np.unique(_grams(training, order + 1), return_counts=True)
        contexts, first, followers = np.unique(grams >> np.uint64(8), return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        here = _grams(text, order + 1)
        seen, context = _find(contexts, here >> np.uint64(8))
        known, gram = _find(grams, here)
        count = np.where(known, counts[gram], 0)
        total, distinct = totals[context], followers[context]
        better = (count + distinct * probability[order:]) / (total + distinct)
        probability[order:] = np.where(seen, better, probability[order:])
        if order in wanted:
            bits[order] = float(-np.log2(probability).mean())
    return bits


def _grams(text: np.ndarray, size: int) -> np.ndarray:
    """Each `size` bytes in a row as one number."""
    count = max(0, len(text) - size + 1)
    grams = np.zeros(count, np.uint64)
    for n in range(size):
        grams = grams << np.uint64(8) | text[n : n + count]
    return grams


def _find(among: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(whether it is there, where) of each value."""
    where = np.minimum(np.searchsorted(among, values), len(among) - 1)
    return among[where] == values, where
