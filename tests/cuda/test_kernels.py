"""Every row of the table for CUDA against the double reference: partial chunks, packed sequences, empty ones, several
heads and batch entries."""

import ctypes
import itertools
import os

import numpy as np
import pytest
from conftest import Call, chunk_table
from rows import CHUNKWISE, smallest
from tolerances import OUT, STATE

# Each row gets one of these in turn, rows of large sizes, which take long, the first: lengths, heads of keys, batch
# entries, heads of queries for each of keys.
LARGE, LARGE_ROW = ([66], 1, 1, 1), 128 * 256
CALLS = [
    ([70, 0, 130, 1], 2, 1, 1),
    ([66], 2, 1, 3),
    ([1, 63, 64, 65], 1, 2, 1),
    ([130, 0, 6], 1, 1, 2),
    ([2], 1, 1, 1),
]


def cases():
    turns = itertools.cycle(CALLS)
    for row in CHUNKWISE:
        large = row.key_size * row.value_size >= LARGE_ROW
        yield pytest.param(row, *(LARGE if large else next(turns)), id=row.name)


@pytest.mark.parametrize(("row", "lengths", "heads", "batch", "group"), list(cases()))
def test_matches_reference(device, row, lengths, heads, batch, group):
    call = Call(row, lengths, heads, batch, size=None if row.key_size else (5, 19), group=group)
    call.run(device)
    out, state = call.errors()
    assert out <= OUT[row.dtype]
    assert state <= STATE[row.dtype if row.round_operands else "f32"]


@pytest.mark.parametrize("row", [r for r in [smallest("bf16")] if r], ids=str)
def test_same_bits_again(device, row):
    first, second = (Call(row, [70]) for _ in range(2))
    for call in (first, second):
        device.reset()
        call.run(device)
    assert first.out.tobytes() == second.out.tobytes()
    assert first.state_out.tobytes() == second.state_out.tobytes()


@pytest.mark.parametrize("row", [r for r in map(smallest, ("f32", "f16", "bf16")) if r], ids=str)
def test_strides_that_are_no_multiple_of_16_bytes_are_refused(device, row):
    """The library gives such calls to another variant."""
    assert row.row_alignment * (4 if row.dtype == "f32" else 2) == 16
    call = Call(row, [70], heads=1)
    arguments = call.arguments()
    padded = np.zeros((1, 1, 1, 70, row.key_size + 1), call.q.dtype)[..., : row.key_size]
    with pytest.raises(RuntimeError, match="q.stride.1"):
        device.call(row.name, padded, *arguments[1:])


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 64), (130, 64), (70, 32)])
def test_chunk_table(device, tokens, chunk):
    """Of one sequence, behind it zeros for what a call leaves out."""
    table, count = chunk_table([tokens], chunk)
    made = np.full(table.size + 13, 7, np.int32)
    numbers = chunk, count, count + 1, 0, 0, 0, tokens, count
    device.call("chunk_table_cuda", *map(ctypes.c_int, numbers), made)
    assert (made[: table.size].reshape(table.shape) == table).all()
    assert (made[table.size :] == 0).all()


LENGTHS = [0, 70, 64, 0, 1, 128, 0]


@pytest.mark.parametrize("lengths", [[5], LENGTHS, [3] * 64, [*LENGTHS * 9, 200, 0, 65], [*[0] * 130, 1]], ids=len)
def test_packed_chunk_table(device, lengths):
    """As many calls of 64 sequences as it takes: runtime/src/gpu.cpp."""
    table, count = chunk_table(lengths, 64)
    made = np.full(table.size + 13, 7, np.int32)
    tokens = np.cumsum(lengths)
    chunks = np.cumsum([-(-n // 64) for n in lengths])
    first = 0, 0
    for before in range(0, len(lengths), 64):
        ends = [[x[min(s, len(x) - 1)] for s in range(before, before + 64)] for x in (tokens, chunks)]
        numbers = 64, count, len(table), before, *first, *ends[0], *ends[1]
        device.call("packed_chunk_table_cuda", *(ctypes.c_int(int(n)) for n in numbers), made)
        first = ends[0][-1], ends[1][-1]
    assert (made[: table.size].reshape(table.shape) == table).all()
    assert (made[table.size :] == 0).all()


def value_major(states):
    """The same, with the features of keys innermost in memory."""
    return np.ascontiguousarray(states.swapaxes(-1, -2)).swapaxes(-1, -2)


ANY = [row for row in CHUNKWISE if row.dtype == "f32" and not row.key_size]


@pytest.mark.parametrize("row", [r for r in [smallest("f32"), *ANY] if r], ids=str)
def test_value_major_states(device, row):
    call = Call(row, [66, 0], heads=1, size=None if row.key_size else (5, 19))
    call.state_in, call.state_out = map(value_major, (call.state_in, call.state_out))
    call.run(device)
    out, state = call.errors()
    assert out <= OUT["f32"]
    assert state <= STATE["f32"]


def backwards(array):
    """The same in the opposite order of memory, but for rows."""
    turned = (*(slice(None, None, -1) for _ in array.shape[:-1]), slice(None))
    return np.ascontiguousarray(array[turned])[turned]


@pytest.mark.parametrize("row", [r for r in [smallest("f32"), smallest("f16"), *ANY] if r], ids=str)
def test_negative_strides(device, row):
    call = Call(row, [66], heads=2, batch=2, size=None if row.key_size else (5, 19))
    for name in ("q", "k", "v", "out", "state_in", "state_out"):
        setattr(call, name, backwards(getattr(call, name)))
    arguments = call.arguments()
    assert all(np.shares_memory(a, b) for a, b in zip(arguments[-2:], (call.out, call.state_out), strict=True))
    device.call_there(row.name, *arguments)
    out, state = call.errors()
    assert out <= OUT[row.dtype]
    assert state <= STATE[row.dtype if row.round_operands else "f32"]


def features(x, order):
    """Of keys, by their definition in holdfast.h, row by row."""
    K = x.shape[-1]
    if order == "tight":
        return np.stack([x[..., a] * x[..., b] * (1 if a == b else 2**0.5) for b in range(K) for a in range(b + 1)], -1)
    blocks = [(o, Y, i) for Y in range(K // 16) for o in range(16 * (Y + 1)) for i in range(16)]
    return np.stack([x[..., o] * x[..., 16 * Y + i] * (2 if o < 16 * Y else 1) for o, Y, i in blocks], -1)


@pytest.mark.parametrize("order", ["tiled", "tight", "same"])
def test_convert_state(device, order):
    """Of two batch entries and two heads: from one layout to the other."""
    x = np.random.default_rng(1).standard_normal((2, 2, 2, 32)).swapaxes(-1, -2)  # [B, H, K, V], each column a key
    states = {kind: features(x.swapaxes(-1, -2), kind).swapaxes(-1, -2) for kind in ("tight", "tiled")}
    given, wanted = {"tiled": ("tight", "tiled"), "tight": ("tiled", "tight"), "same": ("tight", "tight")}[order]
    made = value_major(np.full(states[wanted].shape, 7, np.float32))
    number = ctypes.c_int(["same", "tiled", "tight"].index(order))
    device.call("convert_state_cuda", np.ascontiguousarray(states[given], np.float32), number, made)
    np.testing.assert_allclose(made, states[wanted], rtol=1e-6)


@pytest.mark.parametrize("order", ["tiled", "tight"])
def test_convert_gradient_of_state(device, order):
    """By the transpose of the way back: <converted gradient, state> is <gradient, state converted back>."""
    random = np.random.default_rng(2)
    sizes = {"tight": 32 * 33 // 2, "tiled": 128 * 2 * 3}
    given, wanted = ("tight", "tiled") if order == "tiled" else ("tiled", "tight")
    gradient, state = (random.standard_normal((2, 2, sizes[x], 3)).astype(np.float32) for x in (given, wanted))
    made, back = (np.full((2, 2, sizes[x], 3), 7, np.float32) for x in (wanted, given))
    numbers = {"tiled": (3, 2), "tight": (4, 1)}  # FeatureOrder of generators/expansion.h
    of_gradient, of_state = map(ctypes.c_int, numbers[order])
    device.call("convert_state_cuda", gradient, of_gradient, made)
    device.call("convert_state_cuda", state, of_state, back)
    products = [(a.astype(np.float64) * b).sum((2, 3)) for a, b in ((made, state), (gradient, back))]
    np.testing.assert_allclose(*products, rtol=1e-4, atol=1e-4)
    assert (made != 7).all()


@pytest.mark.parametrize(
    "part",
    [lambda a: a[:2, :, ::2, 1:36], lambda a: a[:, :1, :, ::3].swapaxes(-1, -2)],
    ids=["rows", "columns"],
)
def test_rows_of_16_bits_are_cleared(device, part):
    """And nothing between them; of more elements than a block of threads has."""
    memory, between = np.full((3, 2, 19, 40), 7, np.uint16), np.ones((3, 2, 19, 40), bool)
    part(between)[...] = False
    device.call_there("clear_16_cuda", part(memory))
    assert (part(memory) == 0).all() and (memory[between] == 7).all()


def test_what_is_run_is_what_readme_says():
    """TESTED in cmake/targets.cmake; the recurrent kernels are in test_steps.py, parallel in test_parallel.py, those of
    gradients in test_gradients.py."""
    tested = ["chunkwise", "chunkwise_backward", "recurrent", "parallel", "parallel_backward", "power_backward"]
    assert os.environ["HOLDFAST_TESTED"].split() == tested
