"""Expected times of the CUDA kernels on GPUs that are not at hand: writes docs/cuda-expected-times.md.

    cmake --preset dev -B build/times -DHOLDFAST_TARGETS="cuda;generic"
    cmake --build build/times --target holdfast_cuda_standin
    HOLDFAST_BUILD=build/times python tests/cuda/expected_times.py

Two short calls in the interpreter say what a chunk of a head costs, and one what a step does; the machine code says how
many instructions ptxas made of each in PTX, how many blocks fit, and how many loads a thread waits for at a time. The
rest is multiplication, spelt out in the page.
"""

import collections
import dataclasses
import math
import pathlib
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parent)]
from conftest import Call  # noqa: E402
from device import Device  # noqa: E402
from machine_code import codes, fat_binaries, loads_before_a_store  # noqa: E402
from occupancy import GPUS, blocks_per_multiprocessor  # noqa: E402
from rows import RECURRENT, STANDIN, TUNED, Row  # noqa: E402
from test_steps import Steps  # noqa: E402

SHAPES = [(8, 2048, 32), (1, 8192, 96), (1, 2048, 8)]  # batch entries, tokens, heads
SHAPES_OF_STEPS = [(1, 8), (1, 32), (64, 8), (64, 32)]  # batch entries, heads
SIZES_OF_STEPS = [64, 128, 256]  # K = V
REACHED = 0.7  # of a bound: what well-tuned kernels get
LAUNCH = 2.5e-6  # seconds from one kernel to the next in a stream
LOAD = 0.6e-6  # seconds of a load from device memory behind a store, and of what waits for it
FP32 = ("fma.rn.f32", "mul.f32", "add.f32", "sub.f32", "neg.f32", "max.f32", "min.f32")

PAGE = """# Expected times on GPUs that were not at hand

No GPU has run these kernels yet. Made by `tests/cuda/expected_times.py` from the machine code of the variants in the
table. Typed in are what NVIDIA documents of the GPUs (`tests/cuda/occupancy.py`), the shapes, and three assumptions, at
the head of the script; they are named below. fp16 takes the same instructions as bf16, but for conversions.

**Counted.** Calls of two and of four chunks of one head run in the interpreter of PTX (`tests/cuda/ptx.py`), which
counts what each kernel does: instructions by warp, bytes of shared memory, bytes moved from and to device memory, and
which of those are touched at all. Their difference is what two more chunks cost; everything grows with chunks x heads
x batch entries. ptxas makes fewer instructions of PTX than there are: each kernel's count is multiplied by the ratio
of the two texts.

**Bounds.** For each kernel the largest of: *issue*, four instructions a clock and multiprocessor; *fp32*, the units for
it; *tensor*, {mma};
*shared*, 128 bytes a clock and multiprocessor;
*L2*, all bytes that move, at {l2};
*memory*, each byte touched once, at {memory}.
A kernel with fewer blocks than multiprocessors has only those.

**Expected.** Bounds are met to {reached:.0%}, an assumption: what well-tuned kernels reach; {launch} us for each
launch; a step of the scan over chunks takes {load} us, a load from device memory behind a store, which bounds it where
sequences are few and long. Copies and products of one block do not overlap here; where `blocks` is 1 or 2, less than
{reached:.0%} should surprise nobody.

**Read from it.** In 16 bits every kernel that matters, but for the decays, waits for memory, and most of what moves is
states in fp32: contributions are written, read by the scan, written as states, and read again. Contributions computed
inside the scan, where heads are many, and states stored in the 16 bits in which outputs read them would leave a quarter
of that; sums of decays by halves instead of one by one would take the decays away. Until then FLA should be faster at
long T, many heads and K = V >= 128, by these figures; at short T launches decide.

## Chunkwise forward

Microseconds of a call.

{sums}

## A step

T = 1, states in place, a decay for each head and token, no two queries to a state: two launches, *state* and *outputs*,
of blocks of 32 threads, one for each column of a state. A thread of *state* goes down the rows of its column; *outputs*
only hands on what the sums came to. Everything grows with heads x batch entries: a call of {states} states in the
interpreter says what one costs.

**Bounds.** As above, and *rows*. A warp's instructions go out in their order; the machine code loads a row of the
state, stores it, and only then loads the next, since no load goes before a store that might be to the same place.
`rows` in the second table is how many do go together, counted in the code (`loads_before_a_store` in
`tests/cuda/machine_code.py`). So a block takes {load} us for each row, and as long before the first, for its gate;
blocks that a GPU cannot hold at a time take turns. {load} us is the time of a load from device memory: assumed, as
above, and not divided by {reached:.0%}.

*Memory alone* is a step without that bound: each byte touched once, nearly all of them the state, read and written, at
{reached:.0%} of what memory gives, and {launch} us for each launch.

**Read from it.** Rows, one after the other, bound all steps in the table but the largest on an A100. Where states are
few, a step is as long as K rows, however many heads there are; launches, which should be most of it, are a small part.
With 64 batch entries memory gives an eighth of what it could, up to most of it. Rows have to be loaded some at a time,
before the first of them is stored, or shared out among more threads. Blocks of two warps would help where states are
many: a multiprocessor takes 32 blocks, and twice as many warps. Instructions are far from a bound, but for those of the
kernel for any size, which has K = V = 256: on an H200 they come close to memory alone.

**Not modelled.** States that are left in L2 from the step before, as in a benchmark's loop, where they fit
({level2}): a row takes perhaps half of the time there.
What the host does for a call. Launches for states that are not in place or start from zero, and for gates that are not
given: one more each. A second pass over the state, for queries that share it. Warps that keep each other waiting short
of a bound, and clocks that sink under load.

Microseconds of a step.

{steps}

Of the machine code: instructions that a warp runs for its block, after ptxas; rows that it loads before it stores one;
registers; blocks on a multiprocessor, which takes 32 at most.

{code}

## Chunkwise forward, kernel by kernel

{details}"""


def counted(device, row, chunks):
    device.reset()
    device.count = True
    Call(row, [chunks * row.chunk], heads=1).run(device)
    return device.launches


def difference(few, many):
    """What two more chunks cost."""
    warps = collections.Counter(many.counts.warps)
    warps.subtract(few.counts.warps)

    def more(value):
        return value(many.counts) - value(few.counts)

    touched = more(lambda c: int(c.read.sum()) + int(c.written.sum()))
    return warps, more(lambda c: c.shared), more(lambda c: c.moved), touched


def bounds(gpu, launched, code, cost, repeats, blocks):
    warps, shared, moved, touched = cost
    ratio = sum(code.instructions.values()) / len(launched.kernel.code)
    clock = gpu.gigahertz * 1e9 * min(gpu.multiprocessors, blocks) * 4  # of all schedulers together
    mma = sum(n for name, n in warps.items() if name.startswith("mma"))
    return {
        name: repeats * value
        for name, value in {
            "issue": ratio * sum(warps.values()) / clock,
            "fp32": sum(warps[i] for i in FP32) * gpu.ffma_cycles / clock,
            "tensor": mma * gpu.mma_cycles / clock,
            "shared": shared / 32 / clock,
            "L2": moved / (gpu.level2 * 1e12),
            "memory": touched / (gpu.memory * 1e12),
        }.items()
    }


def title(name):
    for part, words in (
        ("decay", "decays"),
        ("contribution", "contributions"),
        ("state_out", "final states"),
        ("state_s1", "initial states"),
        ("state_s2", "scan over chunks"),
        ("out_s1", "outputs"),
    ):
        if part in name:
            return words
    return name


def expected(row, code, few, many, shape):
    """{kernel: {GPU: (seconds, what bounds them, blocks on a multiprocessor, registers, bytes of shared memory)}}"""
    batch, tokens, heads = shape
    chunks = tokens // row.chunk
    kernels = collections.defaultdict(dict)
    for a, b in zip(few, many, strict=True):
        for name, gpu in GPUS.items():
            compiled = code[gpu.architecture][b.kernel.name]
            blocks = b.grid[0] * batch * heads
            if a.grid[0] != b.grid[0]:
                blocks = blocks * chunks // 4
            limits = bounds(gpu, b, compiled, difference(a, b), chunks / 2 * batch * heads, blocks)
            if not any(limits.values()):
                limits = {"launch": 0.0}
            by = max(limits, key=limits.get)
            seconds = limits[by] / REACHED
            if "state_s2" in b.kernel.name and chunks * LOAD > seconds:
                by, seconds = "steps", chunks * LOAD
            fit = blocks_per_multiprocessor(gpu, b, compiled)
            before = kernels[title(b.kernel.name)].get(name, (0,))[0]
            kernels[title(b.kernel.name)][name] = (
                before + seconds + LAUNCH,
                by,
                fit,
                compiled.registers,
                b.shared_bytes,
            )
    return kernels


@dataclasses.dataclass
class Step:
    """A step by a row of the table, counted for some states."""

    row: Row
    size: int  # K and V
    code: dict  # machine_code.codes
    launches: list
    states: int

    def parts(self):
        """Of each launch its name, the launch, and {GPU: machine code}."""
        for launched in self.launches:
            found = {name: self.code[gpu.architecture][launched.kernel.name] for name, gpu in GPUS.items()}
            yield "state" if "state_and_sum" in launched.kernel.name else "outputs", launched, found

    def times(self, name, batch, heads):
        """Of each launch on a GPU: (seconds, what bounds them, seconds by memory alone)."""
        gpu, more = GPUS[name], batch * heads / self.states
        for part, launched, found in self.parts():
            counts, blocks = launched.counts, math.prod(launched.grid) * more
            touched = int(counts.read.sum()) + int(counts.written.sum())
            cost = counts.warps, counts.shared, counts.moved, touched
            limits = bounds(gpu, launched, found[name], cost, more, blocks)
            seconds = {by: limit / REACHED for by, limit in limits.items()}
            turns = math.ceil(blocks / (blocks_per_multiprocessor(gpu, launched, found[name]) * gpu.multiprocessors))
            rows = self.size / loads_before_a_store(found[name]) if part == "state" else 0
            seconds["rows"] = turns * (1 + rows) * LOAD
            by = max(seconds, key=seconds.get)
            yield seconds[by] + LAUNCH, by if seconds[by] > LAUNCH else "launch", seconds["memory"] + LAUNCH

    def lines_of_times(self):
        for batch, heads in SHAPES_OF_STEPS:
            cells = []
            for name in GPUS:
                times = list(self.times(name, batch, heads))
                took, alone = (f"{sum(t[i] for t in times) * 1e6:.0f}" for i in (0, 2))
                cells += [took, max(times)[1], alone]
            yield [self.row.dtype, self.size, self.size, batch, heads, *cells]

    def lines_of_code(self):
        for part, launched, found in self.parts():
            cells = []
            for name, compiled in found.items():
                of_ptx = sum(launched.counts.warps.values()) / math.prod(launched.grid)
                ran = of_ptx * sum(compiled.instructions.values()) / len(launched.kernel.code)
                loads = loads_before_a_store(compiled) if part == "state" else ""
                fit = blocks_per_multiprocessor(GPUS[name], launched, compiled)
                cells += [f"{ran:.0f}", loads, compiled.registers, fit]
            sizes = f"{self.row.key_size}x{self.row.value_size}" if self.row.key_size else "any"
            yield [self.row.dtype, self.size, sizes, part, *cells]


def step(device, dtype, size):
    row = next(r for r in RECURRENT if r.dtype == dtype and r.key_size in (size, 0))  # the tuned ones come first
    call = Steps(row, 1, (size, size), group=1)
    device.reset()
    device.count = True
    call.take(device, 0)
    (binary,) = fat_binaries(row.library)
    return Step(row, size, codes(binary), device.launches, math.prod(call.state_out.shape[:2]))


def table(heads, lines):
    head, *rest = (f"| {' | '.join(map(str, line))} |" for line in (heads, *lines))
    return "\n".join([head, "|---" * len(heads) + "|", *rest])


def main():
    device, sums, details = Device(STANDIN), [], []
    for row in (r for r in TUNED if r.dtype != "f16"):
        (binary,) = fat_binaries(row.library)
        code = codes(binary)
        few, many = counted(device, row, 2), counted(device, row, 4)
        times = {shape: expected(row, code, few, many, shape) for shape in SHAPES}
        for (batch, tokens, heads), kernels in times.items():
            totals = [f"{sum(k[g][0] for k in kernels.values()) * 1e6:.0f}" for g in GPUS]
            sizes = f"{row.dtype} | {row.key_size} | {row.value_size} | {batch} | {tokens} | {heads}"
            sums.append(f"| {sizes} | {' | '.join(totals)} |")
        batch, tokens, heads = SHAPES[0]
        columns = " | ".join(f"{g} | bound by | blocks | registers" for g in GPUS)
        details += [
            f"### {row.dtype}, K = {row.key_size}, V = {row.value_size}: B {batch}, T {tokens}, H {heads}\n",
            f"| microseconds | {columns} | shared KB |",
            "|---" * (4 * len(GPUS) + 2) + "|",
        ]
        for kernel, found in times[SHAPES[0]].items():
            cells = [f"{t * 1e6:.0f} | {by} | {fit} | {registers}" for t, by, fit, registers, _ in found.values()]
            shared = next(iter(found.values()))[4]
            details.append(f"| {kernel} | {' | '.join(cells)} | {shared / 1024:.1f} |")
        details.append("")
    steps = [step(device, dtype, size) for dtype in ("f32", "bf16") for size in SIZES_OF_STEPS]
    times, code = (
        [f"{name}{column}" for name in GPUS for column in columns]
        for columns in (["", " bound by", " memory alone"], [" instructions", " rows", " registers", " blocks"])
    )
    heading = f"| type | K | V | B | T | H | {' | '.join(GPUS)} |\n{'|---' * (6 + len(GPUS))}|"

    def each(value):
        return ", ".join(f"{value(gpu)} ({name})" for name, gpu in GPUS.items())

    page = PAGE.format(
        mma=f"{each(lambda g: g.mma_cycles)} clocks for one mma.m16n8k16 on one of four tensor cores",
        l2=each(lambda g: f"{g.level2} TB/s"), memory=each(lambda g: f"{g.memory} TB/s"),
        reached=REACHED, launch=LAUNCH * 1e6, load=LOAD * 1e6,
        sums="\n".join([heading, *sums]), details="\n".join(details), states=steps[0].states,
        level2=", ".join(f"{name}: {gpu.level2_megabytes} MB" for name, gpu in GPUS.items()),
        steps=table(["type", "K", "V", "B", "H", *times], [line for s in steps for line in s.lines_of_times()]),
        code=table(["type", "K = V", "compiled for", "of", *code], [line for s in steps for line in s.lines_of_code()]),
    )  # fmt: skip
    pathlib.Path(__file__).parents[2].joinpath("docs", "cuda-expected-times.md").write_text(page)


if __name__ == "__main__":
    main()
