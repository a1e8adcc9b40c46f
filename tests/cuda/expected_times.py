"""Expected times of the CUDA kernels on GPUs that are not at hand: writes docs/cuda-expected-times.md.

    HOLDFAST_CUDA_STANDIN=build/ci/tests/cuda/libholdfast_cuda_standin.so python tests/cuda/expected_times.py

Two short calls in the interpreter say what a chunk of a head costs; the machine code says how many instructions ptxas
made of each in PTX, and how many blocks fit. The rest is multiplication, spelt out in the page.
"""

import collections
import os
import pathlib
import sys

sys.path[:0] = [str(pathlib.Path(__file__).parent)]
from conftest import CHUNK, Call  # noqa: E402
from device import Device  # noqa: E402
from machine_code import codes, fat_binaries  # noqa: E402
from occupancy import GPUS, blocks_per_multiprocessor  # noqa: E402

SHAPES = [(8, 2048, 32), (1, 8192, 96), (1, 2048, 8)]  # batch entries, tokens, heads
SIZES = {"bf16": (64, 128, 256), "f32": (64, 128)}
REACHED = 0.7  # of a bound: what well-tuned kernels get
LAUNCH = 2.5e-6  # seconds from one kernel to the next in a stream
STEP = 0.6e-6  # seconds of one step of the scan over chunks: a load from device memory behind a store
FP32 = ("fma.rn.f32", "mul.f32", "add.f32", "sub.f32", "neg.f32", "max.f32", "min.f32")

PAGE = """# Expected times on GPUs that were not at hand

No GPU has run these kernels yet. Made by `tests/cuda/expected_times.py` from the assembled code; not one figure is
typed in.

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

{tables}"""


def counted(device, dtype, size, chunks):
    device.reset()
    device.count = True
    device.call(f"cuda_{dtype}_{size}", *Call(dtype, size, [chunks * CHUNK], heads=1).arguments())
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


def main():
    library = os.environ["HOLDFAST_CUDA_STANDIN"]
    device, binaries, tables = Device(library), list(fat_binaries(library)), []
    for dtype, sizes in SIZES.items():
        for size in sizes:
            code = codes(binaries[{"f32": 0, "f16": 4, "bf16": 8}[dtype] + (32, 64, 128, 256).index(size)])
            few, many = counted(device, dtype, size, 2), counted(device, dtype, size, 4)
            for batch, tokens, heads in SHAPES:
                chunks = tokens // CHUNK
                rows = collections.defaultdict(lambda: collections.defaultdict(list))
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
                        rows[title(b.kernel.name)][name].append(
                            (seconds + LAUNCH, by, fit, compiled.registers, b.shared_bytes)
                        )
                lines = [f"### {dtype}, K = V = {size}: B {batch}, T {tokens}, H {heads}\n"]
                lines.append(
                    "| microseconds | "
                    + " | ".join(f"{g} | bound by | blocks | registers" for g in GPUS)
                    + " | shared KB |"
                )
                lines.append("|---" * (4 * len(GPUS) + 2) + "|")
                for kernel, found in rows.items():
                    cells = [kernel]
                    for name in GPUS:
                        launches = found[name]
                        last = launches[-1]
                        time = sum(x[0] for x in launches) * 1e6
                        cells += [f"{time:.0f}", last[1], str(last[2]), str(last[3])]
                    lines.append("| " + " | ".join([*cells, f"{last[4] / 1024:.1f}"]) + " |")
                total = [sum(x[0] for k in rows.values() for x in k[g]) * 1e6 for g in GPUS]
                lines.append("| **all** | " + " | ".join(f"**{t:.0f}** | | | " for t in total) + " | |")
                tables.append("\n".join(lines) + "\n")

    def each(value):
        return ", ".join(f"{value(gpu)} ({name})" for name, gpu in GPUS.items())

    page = PAGE.format(
        mma=f"{each(lambda g: g.mma_cycles)} clocks for one mma.m16n8k16 on one of four tensor cores",
        l2=each(lambda g: f"{g.level2} TB/s"), memory=each(lambda g: f"{g.memory} TB/s"),
        reached=REACHED, launch=LAUNCH * 1e6, step=STEP * 1e6, tables="\n".join(tables),
    )  # fmt: skip
    pathlib.Path(__file__).parents[2].joinpath("docs", "cuda-expected-times.md").write_text(page)


if __name__ == "__main__":
    main()
