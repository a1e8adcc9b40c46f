"""What NVIDIA documents of two GPUs, and how many blocks of a kernel a multiprocessor of theirs holds at a time."""

import dataclasses


@dataclasses.dataclass
class Gpu:
    architecture: str
    multiprocessors: int
    gigahertz: float
    shared_kilobytes: int  # of a multiprocessor
    memory: float  # TB/s
    level2: float  # TB/s
    level2_megabytes: int
    mma_cycles: float  # of one mma.m16n8k16 on one of the four tensor cores of a multiprocessor
    ffma_cycles: int  # of one fp32 instruction of a warp on one of the four schedulers


GPUS = {
    # 312 TFLOP/s in 16 bits: 1024 fused products a clock and multiprocessor.
    "A100": Gpu("80", 108, 1.41, 164, 2.0, 4.5, 40, 8, 2),
    # 989 TFLOP/s by wgmma; mma.sync reaches about five eighths of that.
    "H200": Gpu("90", 132, 1.75, 228, 4.8, 5.5, 50, 6.4, 1),
}


def blocks_per_multiprocessor(gpu, launched, code):
    x, y, z = launched.block
    warps = -(-x * y * z // 32)
    registers = -(-code.registers * 32 // 256) * 256 * warps  # given out 256 at a time
    shared = -(-(launched.shared_bytes + 1024) // 128) * 128  # 1 KB is the driver's
    return min(65536 // registers, gpu.shared_kilobytes * 1024 // shared, 64 // warps, 32)
