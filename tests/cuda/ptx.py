"""An interpreter of PTX, for kernels on machines without a GPU. Slow, strict, and apart from Halide and from the
passes of schedules/cuda: it knows only the PTX manual.

All blocks of a launch run in step, a thread being an element of NumPy arrays. Where threads part, those furthest
behind go on first, or wait at a barrier for the others. Registers hold a NaN, which is no address, until they are set:
LLVM reads such where nothing comes of it. Beside computing, it stops at what a GPU would let pass or leave to chance:

* addresses outside of allocations, not aligned, or read before anything was written there;
* shared memory that two warps touch, one of them writing, without a barrier between; barriers that not all threads
  reach;
* bytes that cp.async has not brought yet: copies land as late as they may, at the wait;
* ldmatrix and mma by less than a whole warp, rows of ldmatrix that are not at 16-byte boundaries.

Not seen: races between lanes of one warp, and between blocks.
"""

import collections
import re

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
REGISTERS = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "f": np.uint32, "rd": np.uint64, "fd": np.uint64}
COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    # true as well where one is not a number
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


class Fault(Exception):
    """What a kernel must not do."""


def widen_bf16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_bf16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    upper = bits >> np.uint32(16)
    rounded = (bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), upper | np.uint32(0x40), rounded).astype(np.uint16)


def round_f16(x):
    with np.errstate(over="ignore"):
        return x.astype(np.float16).view(np.uint16)


def fused(a, b, c):
    """a * b + c, rounded once: the product is exact in double; the sum is, but for ties that double rounds first."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


class Kernel:
    """One .entry of a module: `parameters` are (name, bytes), `code` is (guard, operation, operands)."""

    def __init__(self, name, parameters, body):
        self.name, self.parameters, self.code, self.labels = name, parameters, [], {}
        body = re.sub(r"([\w,}])\s*\n\s*(?=[{%])", r"\1 ", body)  # an instruction on several lines
        for line in body.split("\n"):
            line = re.sub(r"^\{ \.reg \.b16 tmp; (.*) \}$", r"\1", line.strip())  # half of a register
            if line.endswith(":"):
                self.labels[line[:-1]] = len(self.code)
            elif line and not line.startswith("."):
                instruction = re.fullmatch(r"(?:@(!?%p\d+)\s+)?([\w.:]+)\s*(.*?);", line)
                if not instruction:
                    raise Fault(f"{name}: unknown: {line}")
                guard, operation, operands = instruction.groups()
                operands = [o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", operands)]
                self.code.append((guard, operation.split("."), operands, line))


def kernels(text):
    """The kernels of a PTX module by name."""
    entry = r"\.entry (\w+)\((.*?)\)\s*(?:\.\w+[^\n]*\n)*\{(.*?)^\}"
    text, result = re.sub(r"//[^\n]*", "", text), {}
    for name, parameters, body in re.findall(entry, text, re.S | re.M):
        sizes = re.findall(r"\.param \.[a-z](\d+)\s.*?(\w+_param_\d+)", parameters)
        result[name] = Kernel(name, [(p, int(bits) // 8) for bits, p in sizes], body)
    return result


class Memory:
    """Device memory: bytes from `base` on, and of each of them 0 (not allocated), 1 (allocated) or 2 (written)."""

    def __init__(self, size):
        self.bytes, self.state = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        self.base = self.bytes.ctypes.data


class Shared:
    """Shared memory of many blocks: `size` bytes each, tracked in units of two bytes."""

    def __init__(self, blocks, size):
        self.size = size
        self.stride = (size + 127) // 128 * 128
        units = blocks * self.stride // 2
        self.bytes = np.zeros(2 * units, np.uint8)
        self.written, self.pending = np.zeros(units, bool), np.zeros(units, bool)
        self.writer, self.write_epoch = np.full(units, -1), np.full(units, -1)
        self.reader, self.read_epoch = np.full(units, -1), np.full(units, -1)


class Counts:
    """What a launch has done: warps that ran each instruction; bytes moved, those of one address in one warp once,
    and bytes of device memory touched, each once."""

    def __init__(self, memory):
        self.warps = collections.Counter()
        self.shared = self.moved = 0
        self.read, self.written = np.zeros((2, len(memory.bytes)), bool)


class Launch:
    """A launch of a kernel; `counts`, if given, is filled."""

    lanes_at_once = 8192

    def __init__(self, kernel, grid, block, shared_bytes, parameters, memory, counts=None):
        self.counts = counts
        self.kernel, self.block, self.grid, self.memory = kernel, block, grid, memory
        self.parameters = dict(zip((name for name, _ in kernel.parameters), parameters, strict=True))
        self.shared_bytes = shared_bytes
        self.line = ""

    def run(self):
        threads = int(np.prod(self.block))
        blocks = int(np.prod(self.grid))
        step = max(1, self.lanes_at_once // threads)
        for first in range(0, blocks, step):
            self.run_blocks(np.arange(first, min(first + step, blocks)), threads)

    def fault(self, what):
        raise Fault(f"{self.kernel.name}: {what}: {self.line}")

    def run_blocks(self, blocks, threads):
        n = len(blocks) * threads
        thread = np.arange(n) % threads
        self.n, self.block_of = n, np.arange(n) // threads
        self.warp = (thread // 32).astype(np.int64)
        self.warp_of_all = self.block_of * (-(-threads // 32)) + self.warp
        self.shared = Shared(len(blocks), self.shared_bytes)
        self.epoch = np.zeros(len(blocks), np.int64)
        self.pending, self.groups = [], []
        self.registers = {}
        x, y, _ = self.block
        b = blocks[self.block_of]
        for axis, value in zip("xyz", (thread % x, thread // x % y, thread // (x * y)), strict=True):
            self.registers["%tid." + axis] = value.astype(np.uint32)
        gx, gy, _ = self.grid
        for axis, value in zip("xyz", (b % gx, b // gx % gy, b // (gx * gy)), strict=True):
            self.registers["%ctaid." + axis] = value.astype(np.uint32)
        for axis, size, count in zip("xyz", self.block, self.grid, strict=True):
            self.registers["%ntid." + axis] = np.full(n, size, np.uint32)
            self.registers["%nctaid." + axis] = np.full(n, count, np.uint32)
        code, labels = self.kernel.code, self.kernel.labels
        end = len(code)
        at, together = np.zeros(n, np.int64), 0  # where threads are; where all are, else None
        waits = np.zeros(n, bool)  # at a barrier
        with np.errstate(all="ignore"):
            while True:
                if together is None:
                    if waits.all():
                        self.fault("some threads of a block only")
                    here = int(at[~waits].min())
                    active = (at == here) & ~waits
                    if active.all():
                        together = here
                if together is not None:
                    here, active = together, np.ones(n, bool)
                if here >= end:
                    if waits.any():
                        self.fault("some threads of a block only")
                    return
                guard, operation, operands, self.line = code[here]
                mask = active
                if guard:
                    value = self.value(guard.lstrip("!"), 1)
                    mask = active & (~value if guard[0] == "!" else value)
                self.active, self.mask, self.full = active, mask, bool(mask.all())
                if (
                    operation[0] in ("bar", "barrier") and together is None
                ):  # the others may stand further on, and come back
                    at[active & ~mask] = here + 1
                    waits |= mask
                    there = waits & (at == here)
                    whole = np.bincount(self.block_of[there], minlength=len(blocks)) == threads
                    self.mask = there & whole[self.block_of]
                    if self.mask.any():
                        self.op_bar(operation, operands)
                        at[self.mask], waits = here + 1, waits & ~self.mask
                    continue
                if operation[0] == "ret":
                    after, where = mask, end
                elif operation[0] == "bra":
                    after, where = mask, labels[operands[0]]
                else:
                    if mask.any():
                        method = getattr(self, "op_" + operation[0], None)
                        if method is None:
                            self.fault("unknown instruction")
                        method(operation, operands)
                        if self.counts:
                            self.counts.warps[".".join(operation)] += len(np.unique(self.warp_of_all[mask]))
                    after, where = None, None
                if together is not None:
                    if after is None or not after.any():
                        together = here + 1
                    elif after.all():
                        together = where
                    else:
                        at[:] = here + 1
                        at[after] = where
                        together = None
                else:
                    at[active] = here + 1
                    if after is not None:
                        at[after] = where

    # Operands

    def value(self, name, bits):
        if name[0] == "%":
            if name in self.registers:
                return self.registers[name]
            dtype = REGISTERS[re.match(r"%([a-z]+)", name).group(1)]
            if dtype is np.bool_:
                self.fault(f"{name} is read before it is set")
            return np.full(self.n, np.iinfo(dtype).max, dtype)
        if bits == 1:
            return np.full(self.n, int(name) != 0)
        number = int(name[2:], 16) if name[:2] in ("0f", "0F") else int(name.rstrip("U"), 0)
        return np.full(self.n, number & (2**bits - 1), UNSIGNED[bits])

    def typed(self, name, kind):
        """The operand as numbers of a PTX type such as s32, f32 or pred."""
        if kind == "pred":
            return self.value(name, 1)
        bits = int(kind[1:])
        value = self.value(name, bits)
        if value.dtype.itemsize * 8 != bits:
            value = value.astype(UNSIGNED[bits])
        return value.view(
            SIGNED[bits]
            if kind[0] == "s"
            else {16: np.float16, 32: np.float32, 64: np.float64}[bits]
            if kind[0] == "f"
            else UNSIGNED[bits]
        )

    def put(self, name, value):
        dtype = REGISTERS[re.match(r"%([a-z]+)", name).group(1)]
        if value.dtype.kind == "f":
            value = value.view(UNSIGNED[value.dtype.itemsize * 8])
        if value.dtype.kind == "i":
            value = value.view(UNSIGNED[value.dtype.itemsize * 8])
        value = value.astype(dtype, copy=False)
        if not self.full:
            value = np.where(self.mask, value, self.registers.get(name, np.zeros(self.n, dtype)))
        self.registers[name] = value

    @staticmethod
    def names(operand):
        return [name.strip() for name in operand.strip("{}").split(",")]

    def address(self, operand):
        name, offset = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand).groups()
        return (self.value(name, 64).astype(np.int64) + int(offset or 0))[self.mask]

    # Arithmetic

    def arithmetic(self, operation, operands, compute):
        kind = operation[-1]
        self.put(operands[0], compute(*(self.typed(o, kind) for o in operands[1:])))

    def op_add(self, operation, operands):
        self.arithmetic(operation, operands, lambda a, b: a + b)

    def op_sub(self, operation, operands):
        self.arithmetic(operation, operands, lambda a, b: a - b)

    def op_mul(self, operation, operands):
        self.product(operation, operands, None)

    def op_mad(self, operation, operands):
        self.product(operation, operands[:3], operands[3])

    def product(self, operation, operands, added):
        kind = operation[-1]
        a, b = self.typed(operands[1], kind), self.typed(operands[2], kind)
        wide = kind[0] + str(2 * int(kind[1:]))
        if "wide" in operation:
            kind = wide
            a, b = (x.astype((SIGNED if kind[0] == "s" else UNSIGNED)[int(kind[1:])]) for x in (a, b))
        if "hi" in operation:
            a, b = (x.astype(np.int64 if kind[0] == "s" else np.uint64) for x in (a, b))
            result = (a * b >> 32).astype(UNSIGNED[32]).view((SIGNED if kind[0] == "s" else UNSIGNED)[32])
        else:
            result = a * b
        self.put(operands[0], result + self.typed(added, kind) if added else result)

    def op_fma(self, operation, operands):
        self.arithmetic(operation, operands, fused)

    def op_div(self, operation, operands):
        def divide(a, b):
            if a.dtype.kind == "f":
                return a / b
            sign = np.sign(a.astype(np.int64)) * np.sign(b.astype(np.int64))
            return (sign * (abs(a.astype(np.int64)) // abs(b.astype(np.int64)))).astype(a.dtype)

        self.arithmetic(operation, operands, divide)

    def op_rem(self, operation, operands):
        self.arithmetic(operation, operands, lambda a, b: np.fmod(a, b))

    def op_min(self, operation, operands):
        self.arithmetic(operation, operands, np.fmin)

    def op_max(self, operation, operands):
        self.arithmetic(operation, operands, np.fmax)

    def op_neg(self, operation, operands):
        self.arithmetic(operation, operands, lambda a: -a)

    def op_abs(self, operation, operands):
        self.arithmetic(operation, operands, np.abs)

    def op_ex2(self, operation, operands):
        self.arithmetic(operation, operands, np.exp2)

    def op_rcp(self, operation, operands):
        self.arithmetic(operation, operands, lambda a: np.float32(1) / a)

    def op_sqrt(self, operation, operands):
        self.arithmetic(operation, operands, np.sqrt)

    def op_and(self, operation, operands):
        self.arithmetic(operation, operands, lambda a, b: a & b)

    def op_or(self, operation, operands):
        self.arithmetic(operation, operands, lambda a, b: a | b)

    def op_xor(self, operation, operands):
        self.arithmetic(operation, operands, lambda a, b: a ^ b)

    def op_not(self, operation, operands):
        self.arithmetic(operation, operands, lambda a: ~a)

    def shift(self, operation, operands, by):
        a, count = self.typed(operands[1], operation[-1]), self.typed(operands[2], "u32")
        bits = a.dtype.itemsize * 8
        shifted = by(a, np.minimum(count, bits - 1).astype(a.dtype))
        beyond = np.zeros_like(a) if a.dtype.kind == "u" else shifted
        self.put(operands[0], np.where(count < bits, shifted, beyond))

    def op_shl(self, operation, operands):
        self.shift(operation, operands, lambda a, n: a << n)

    def op_shr(self, operation, operands):
        self.shift(operation, operands, lambda a, n: a >> n)

    def op_bfe(self, operation, operands):
        a, position, length = (self.typed(o, "u32") for o in operands[1:])
        self.put(operands[0], (a >> position) & ((np.uint32(1) << length) - np.uint32(1)))

    def op_prmt(self, operation, operands):
        a, b, select = (self.typed(o, "u32").astype(np.uint64) for o in operands[1:])
        both, result = a | b << np.uint64(32), np.zeros(self.n, np.uint64)
        for i in range(4):
            byte = (select >> np.uint64(4 * i)) & np.uint64(7)
            result |= ((both >> byte * np.uint64(8)) & np.uint64(255)) << np.uint64(8 * i)
        self.put(operands[0], result.astype(np.uint32))

    def op_selp(self, operation, operands):
        a, b = (self.typed(o, operation[-1]) for o in operands[1:3])
        self.put(operands[0], np.where(self.value(operands[3], 1), a, b))

    def op_setp(self, operation, operands):
        a, b = (self.typed(o, operation[-1]) for o in operands[1:3])
        self.put(operands[0], COMPARE[operation[1]](a, b))

    def op_mov(self, operation, operands):
        target, source = operands
        kind = operation[-1]
        bits = 1 if kind == "pred" else int(kind[1:])
        if target[0] == "{":
            value, parts = self.value(source, bits), self.names(target)
            part = bits // len(parts)
            for i, name in enumerate(parts):
                if name == "tmp":
                    continue
                shifted = value >> UNSIGNED[bits](part * i)
                self.put(name, (shifted & UNSIGNED[bits](2**part - 1)).astype(UNSIGNED[part]))
        elif source[0] == "{":
            parts = self.names(source)
            part = bits // len(parts)
            total = np.zeros(self.n, UNSIGNED[bits])
            for i, name in enumerate(parts):
                total |= self.value(name, part).astype(UNSIGNED[bits]) << UNSIGNED[bits](part * i)
            self.put(target, total)
        else:
            self.put(target, self.value(source, bits))

    def op_cvt(self, operation, operands):
        to, of = operation[-2], operation[-1]
        if to in ("f16x2", "bf16x2"):
            narrow = round_bf16 if to[0] == "b" else round_f16
            high, low = (narrow(self.typed(o, "f32")).astype(np.uint32) for o in operands[1:])
            return self.put(operands[0], high << np.uint32(16) | low)
        if of == "f16":
            x = self.typed(operands[1], "u16").view(np.float16).astype(np.float32)
        elif of == "bf16":
            x = widen_bf16(self.typed(operands[1], "u16"))
        else:
            x = self.typed(operands[1], of)
        if x.dtype.kind == "f":
            for rounding in operation[1:-2]:
                x = ROUND.get(rounding, lambda x: x)(x)
            if "sat" in operation:
                x = np.clip(x, 0, 1)
        if to == "f16":
            result = round_f16(x)
        elif to == "bf16":
            result = round_bf16(x)
        elif to[0] == "f":
            result = x.astype(np.float32)
        else:
            bits = int(to[1:])
            dtype = (SIGNED if to[0] == "s" else UNSIGNED)[bits]
            if x.dtype.kind == "f":
                limits = np.iinfo(dtype)
                x = np.clip(np.nan_to_num(x.astype(np.float64)), limits.min, limits.max)
            result = x.astype(dtype)
            if REGISTERS[re.match(r"%([a-z]+)", operands[0]).group(1)]().itemsize * 8 > bits and to[0] == "s":
                result = result.astype(np.int32)
        self.put(operands[0], result)

    def op_cvta(self, operation, operands):
        self.put(operands[0], self.value(operands[1], 64))

    # Memory

    def op_ld(self, operation, operands):
        bits = int(operation[-1][1:])
        names = self.names(operands[0])
        if operation[1] == "param":
            name, offset = re.fullmatch(r"\[(\w+)(?:\+(\d+))?\]", operands[1]).groups()
            for i, register in enumerate(names):
                value = self.parameters[name] >> 8 * (int(offset or 0) + i * bits // 8)
                self.put(register, np.full(self.n, value & (2**bits - 1), UNSIGNED[bits]))
            return
        size = bits // 8 * len(names)
        load = self.load_shared if operation[1] == "shared" else self.load_global
        data = load(self.address(operands[1]), size, np.flatnonzero(self.mask)).view(UNSIGNED[bits])
        for i, register in enumerate(names):
            value = np.zeros(self.n, UNSIGNED[bits])
            value[self.mask] = data[:, i]
            if operation[-1][0] == "s" and bits < 32:
                value = value.view(SIGNED[bits]).astype(np.int32)
            self.put(register, value)

    def op_st(self, operation, operands):
        bits = int(operation[-1][1:])
        values = [
            self.value(name, bits).astype(UNSIGNED[bits], copy=False)[self.mask] for name in self.names(operands[1])
        ]
        data = np.ascontiguousarray(np.stack(values, axis=1)).view(np.uint8)
        address = self.address(operands[0])
        if operation[1] == "shared":
            self.store_shared(address, data, np.flatnonzero(self.mask))
        else:
            index = self.in_global(address, data.shape[1])
            self.memory.bytes[index], self.memory.state[index] = data, 2
            if self.counts:
                self.counts.written[index] = True
                self.counts.moved += data.size

    def in_global(self, address, size):
        if (address % size).any():
            self.fault(f"an address that is no multiple of {size}")
        index = (address - self.memory.base)[:, None] + np.arange(size)
        if index.min() < 0 or index.max() >= len(self.memory.bytes) or not self.memory.state[index].all():
            self.fault("outside of all allocations")
        return index

    def load_global(self, address, size, threads):
        index = self.in_global(address, size)
        if (self.memory.state[index] != 2).any():
            self.fault("reads device memory that nothing has written")
        if self.counts:
            self.counts.read[index] = True
            self.counts.moved += self.distinct(address, size, threads)
        return self.memory.bytes[index]

    def distinct(self, address, size, threads):
        """Bytes, where lanes of a warp that read the same count once."""
        return size * len(np.unique(np.stack([self.warp_of_all[threads], address]), axis=1).T)

    def units(self, address, size, threads):
        if (address % size).any():
            self.fault(f"an address that is no multiple of {size}")
        if address.min() < 0 or address.max() + size > self.shared.size:
            self.fault(f"outside of the {self.shared.size} bytes of shared memory")
        if self.counts:
            self.counts.shared += self.distinct(address, size, threads)
        first = address + self.block_of[threads] * self.shared.stride
        return first, first[:, None] // 2 + np.arange(max(1, size // 2))

    def load_shared(self, address, size, threads):
        first, unit = self.units(address, size, threads)
        s, warp, epoch = self.shared, self.warp[threads][:, None], self.epoch[self.block_of[threads]][:, None]
        if s.pending[unit].any():
            self.fault("reads what cp.async has not brought yet")
        if not s.written[unit].all():
            self.fault("reads shared memory that nothing has written")
        if ((s.write_epoch[unit] == epoch) & (s.writer[unit] != warp)).any():
            self.fault("race: another warp wrote this since the last barrier")
        again = s.read_epoch[unit] == epoch
        s.reader[unit] = np.where(again & (s.reader[unit] != warp), -2, warp)
        s.reader[unit] = np.where(s.reader[unit] != warp, -2, s.reader[unit])  # two warps in this very instruction
        s.read_epoch[unit] = epoch
        return s.bytes[first[:, None] + np.arange(size)]

    def claim(self, address, size, threads):
        """Whether these threads may write here."""
        first, unit = self.units(address, size, threads)
        s, warp, epoch = self.shared, self.warp[threads][:, None], self.epoch[self.block_of[threads]][:, None]
        if ((s.read_epoch[unit] == epoch) & (s.reader[unit] != warp)).any():
            self.fault("race: another warp read this since the last barrier")
        if ((s.write_epoch[unit] == epoch) & (s.writer[unit] != warp)).any():
            self.fault("race: another warp wrote this since the last barrier")
        s.writer[unit], s.write_epoch[unit] = warp, epoch
        if (s.writer[unit] != warp).any():
            self.fault("race: two warps write this")
        return first, unit

    def store_shared(self, address, data, threads):
        first, unit = self.claim(address, data.shape[1], threads)
        self.shared.bytes[first[:, None] + np.arange(data.shape[1])] = data
        self.shared.written[unit] = True

    def op_cp(self, operation, operands):
        if operation[2] in ("ca", "cg"):
            if operands[2] != "16":
                self.fault("a copy of other than 16 bytes")
            threads = np.flatnonzero(self.mask)
            first, unit = self.claim(self.address(operands[0]), 16, threads)
            self.shared.pending[unit] = True
            self.pending.append((first, unit, self.load_global(self.address(operands[1]), 16, threads), threads))
            return
        if not self.full:
            self.fault("some threads only")
        if operation[2] == "commit_group":
            self.groups.append(self.pending)
            self.pending = []
        else:
            while len(self.groups) > int(operands[0]):
                for first, unit, data, threads in self.groups.pop(0):
                    s = self.shared
                    s.bytes[first[:, None] + np.arange(16)] = data
                    s.written[unit], s.pending[unit] = True, False
                    s.writer[unit] = self.warp[threads][:, None]
                    s.write_epoch[unit] = self.epoch[self.block_of[threads]][:, None]

    def op_bar(self, operation, operands):
        arrived = np.bincount(self.block_of[self.mask], minlength=len(self.epoch))
        everyone = np.bincount(self.block_of, minlength=len(self.epoch))
        if ((arrived > 0) & (arrived < everyone)).any():
            self.fault("some threads of a block only")
        self.epoch[arrived > 0] += 1

    op_barrier = op_bar

    # Tensor cores

    def whole_warps(self):
        if self.n % 32:
            self.fault("a block that is not made of whole warps")
        warps = self.mask.reshape(-1, 32)
        if (warps.any(1) != warps.all(1)).any():
            self.fault("some lanes of a warp only")
        return np.flatnonzero(warps.all(1))

    def op_ldmatrix(self, operation, operands):
        warps = self.whole_warps()
        names = self.names(operands[0])
        address = np.zeros(self.n, np.int64)
        address[self.mask] = self.address(operands[1])
        for matrix, name in enumerate(names):
            # lanes 8 m .. 8 m + 7 have the addresses of the rows of matrix m
            lanes = (warps[:, None] * 32 + matrix * 8 + np.arange(8)).ravel()
            rows = self.load_shared(address[lanes], 16, lanes).view(np.uint16).reshape(-1, 8, 8)
            if "trans" in operation:
                rows = rows.transpose(0, 2, 1)
            value = np.zeros(self.n, np.uint32)
            value.reshape(-1, 32)[warps] = np.ascontiguousarray(rows).view(np.uint32).reshape(-1, 32)
            self.put(name, value)

    def op_mma(self, operation, operands):
        if operation[3] != "m16n8k16" or operation[4:6] != ["row", "col"]:
            self.fault("unknown instruction")
        warps = self.whole_warps()
        widen = widen_bf16 if operation[7] == "bf16" else (lambda u: u.view(np.float16).astype(np.float32))

        def lanes(name):
            return self.value(name, 32).reshape(-1, 32)[warps]

        def half(register, h):
            return widen((register >> np.uint32(16 * h) & np.uint32(0xFFFF)).astype(np.uint16))

        d, a, b, c = (self.names(o) for o in operands)
        group, member = np.arange(32) // 4, np.arange(32) % 4
        A, B, C = (np.zeros((len(warps), m, n)) for m, n in ((16, 16), (16, 8), (16, 8)))
        for r, name in enumerate(a):
            for h in range(2):
                A[:, group + 8 * (r % 2), 2 * member + h + 8 * (r // 2)] = half(lanes(name), h)
        for r, name in enumerate(b):
            for h in range(2):
                B[:, 2 * member + h + 8 * r, group] = half(lanes(name), h)
        for r, name in enumerate(c):
            C[:, group + 8 * (r // 2), 2 * member + r % 2] = lanes(name).view(np.float32)
        D = (A @ B + C).astype(np.float32)
        for r, name in enumerate(d):
            value = np.zeros(self.n, np.uint32)
            value.reshape(-1, 32)[warps] = D[:, group + 8 * (r // 2), 2 * member + r % 2].view(np.uint32)
            self.put(name, value)
