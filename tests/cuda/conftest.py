"""Calls of the chunkwise kernels, and what they should return."""

import ctypes
import pathlib
import sys

import numpy as np
import pytest

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1] / "python")]
import device as cuda_device  # noqa: E402
import ptx  # noqa: E402
import reference  # noqa: E402
from rows import STANDIN  # noqa: E402

NARROW = {"f32": lambda x: x, "f16": lambda x: x.astype(np.float16), "bf16": ptx.round_bf16}
WIDEN = {"f32": lambda x: x, "f16": lambda x: x.astype(np.float32), "bf16": ptx.widen_bf16}


def chunk_table(lengths, longest):
    """(table, number of chunks): generators/chunks.h."""
    count = sum(-(-n // longest) for n in lengths)
    table, chunk, start = np.zeros((count + len(lengths), 4), np.int32), 0, 0
    for sequence, n in enumerate(lengths):
        table[count + sequence, 3] = chunk if n else count + sequence
        for first in range(0, n, longest):
            table[chunk, :3] = start + first, min(longest, n - first), chunk + 1
            chunk += 1
        if n:
            table[chunk - 1, 2] = count + sequence
        start += n
    return table, count


class Call:
    """Inputs of a call of a row: sequences of these lengths one after the other, `heads` heads, gates up to `gate`
    times RetNet's; `size`, (K, V), where the row takes any."""

    def __init__(self, row, lengths, heads=2, batch=1, gate=2.0, seed=1, size=None):
        random, T = np.random.default_rng(seed), sum(lengths)
        self.row, self.dtype, self.lengths = row, row.dtype, lengths
        K, V = size or (row.key_size, row.value_size)

        def normal(*shape):
            return random.standard_normal(shape, np.float32)

        self.q, self.k, self.v = (NARROW[row.dtype](normal(batch, T, heads, n)) for n in (K, K, V))
        decay = np.log1p(-(2.0 ** (-5 - np.arange(heads))))
        self.log_decay = (decay * random.uniform(min(gate, 1), gate, (batch, T, heads))).astype(np.float32)
        self.state_in = normal(batch, heads, len(lengths), K, V)
        self.out = np.zeros((batch, T, heads, V), self.q.dtype)
        self.state_out = np.zeros_like(self.state_in)
        self.scale = K**-0.5

    def arguments(self):
        def heads_first(array):
            return array.transpose(0, 2, 1, 3)

        table, count = chunk_table(self.lengths, self.row.chunk)
        decay = np.ascontiguousarray(self.log_decay.transpose(0, 2, 1))
        rows = [heads_first(a) for a in (self.q, self.k, self.v)]
        scalars = [ctypes.c_int(count), ctypes.c_float(self.scale)]
        return [*rows, decay, self.state_in, table, *scalars, heads_first(self.out), self.state_out]

    def run(self, device):
        device.call(self.row.name, *self.arguments())

    def errors(self):
        """(out, state): relative RMS of the difference from the double reference."""
        start, out, state = 0, np.zeros(self.out.shape), np.zeros(self.state_out.shape)
        q, k, v = (WIDEN[self.dtype](x) for x in (self.q, self.k, self.v))
        for s, n in enumerate(self.lengths):
            t = slice(start, start + n)
            out[:, t], state[:, :, s] = reference.retention(
                q[:, t], k[:, t], v[:, t], self.log_decay[:, t], self.scale, self.state_in[:, :, s]
            )
            start += n

        def error(actual, expected):
            return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))

        return error(WIDEN[self.dtype](self.out).astype(np.float64), out), error(self.state_out, state)


@pytest.fixture(scope="session")
def loaded():
    return cuda_device.Device(STANDIN)


@pytest.fixture
def device(loaded):
    loaded.reset()
    return loaded
