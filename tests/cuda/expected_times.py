"""Expected times of the CUDA kernels on GPUs that are not at hand: writes docs/cuda-expected-times.md.

    HOLDFAST_BUILD=build/ci python tests/cuda/expected_times.py

Two short calls in the interpreter say what a chunk of a head costs; the machine code says how many instructions ptxas
made of each in PTX, and how many blocks fit. The rest is multiplication, spelt out in the page.
"""

import collections
import pathlib
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parent)]
from conftest import Call  # noqa: E402
from device import Device  # noqa: E402
from machine_code import codes, fat_binaries  # noqa: E402
from occupancy import GPUS, blocks_per_multiprocessor  # noqa: E402
from rows import STANDIN, TUNED  # noqa: E402

SHAPES = [(8, 2048, 32), (1, 8192, 96), (1, 2048, 8)]  # batch entries, tokens, heads
REACHED = 0.7  # of a bound: what well-tuned kernels get
LAUNCH = 2.5e-6  # seconds from one kernel to the next in a stream
STEP = 0.6e-6  # seconds of one step of the scan over chunks: a load from device memory behind a store
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
it;
*tensor*, {mma};
*shared*, 128 bytes a clock and multiprocessor;
*L2*, all bytes that move, at {l2};
*memory*, each byte touched once, at {memory}. A kernel with fewer blocks than multiprocessors has only those.

**Expected.** Bounds are met to {reached:.0%}, an assumption: what well-tuned kernels reach; {launch} us for each
launch; a step of the scan over chunks takes {step} us, which bounds it where sequences are few and long. Copies and
products of one block do not overlap here; where `blocks` is 1 or 2, less than {reached:.0%} should surprise nobody.

**Read from it.** In 16 bits every kernel that matters, but for the decays, waits for memory, and most of what moves is
states in fp32: contributions are written, read by the scan, written as states, and read again. Contributions computed
inside the scan, where heads are many, and states stored in the 16 bits in which outputs read them would leave a quarter
of that; sums of decays by halves instead of one by one would take the decays away. Until then FLA should be faster at
long T, many heads and K = V >= 128, by these figures; at short T launches decide.

## All

Microseconds of a call.

{sums}

## Where they go

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
            if "state_s2" in b.kernel.name and chunks * STEP > seconds:
                by, seconds = "steps", chunks * STEP
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
    heading = f"| type | K | V | B | T | H | {' | '.join(GPUS)} |\n{'|---' * (6 + len(GPUS))}|"

    def each(value):
        return ", ".join(f"{value(gpu)} ({name})" for name, gpu in GPUS.items())

    page = PAGE.format(
        mma=f"{each(lambda g: g.mma_cycles)} clocks for one mma.m16n8k16 on one of four tensor cores",
        l2=each(lambda g: f"{g.level2} TB/s"), memory=each(lambda g: f"{g.memory} TB/s"),
        reached=REACHED, launch=LAUNCH * 1e6, step=STEP * 1e6,
        sums="\n".join([heading, *sums]), details="\n".join(details),
    )  # fmt: skip
    pathlib.Path(__file__).parents[2].joinpath("docs", "cuda-expected-times.md").write_text(page)


if __name__ == "__main__":
    main()
