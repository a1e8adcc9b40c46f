"""A CUDA device for kernels on a machine that has none: driver.c under Halide's runtime, and the interpreter of
ptx.py."""

import ctypes
import dataclasses
import functools
import struct
import subprocess
import tempfile

import numpy as np
import ptx
import tools


class Dimension(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int32) for n in ("min", "extent", "stride", "flags")]


class Buffer(ctypes.Structure):
    """halide_buffer_t of a NumPy array, innermost dimension first."""

    _fields_ = [
        ("device", ctypes.c_uint64),
        ("device_interface", ctypes.c_void_p),
        ("host", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("dimensions", ctypes.c_int32),
        ("dim", ctypes.POINTER(Dimension)),
        ("padding", ctypes.c_void_p),
    ]

    @classmethod
    def of(cls, array):
        strides = (array.strides[i] // array.itemsize for i in reversed(range(array.ndim)))
        dims = [Dimension(0, n, s, 0) for n, s in zip(reversed(array.shape), strides, strict=True)]
        code = {"i": 0, "u": 1, "f": 2}[array.dtype.kind]
        buffer = cls(
            host=array.ctypes.data, flags=1, code=code, bits=8 * array.itemsize, lanes=1, dimensions=array.ndim
        )
        buffer.dim = (Dimension * array.ndim)(*dims)
        buffer.keep = array
        return buffer


LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)
ERROR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p)


@functools.cache
def ptx_of(image):
    """The PTX text at an address: as it stands, or in a fat binary, behind the machine code."""
    magic, _, header, size = struct.unpack("<IHHQ", ctypes.string_at(image, 16))
    if magic != 0xBA55ED50:
        return ctypes.string_at(image).decode()
    with tempfile.NamedTemporaryFile(suffix=".fatbin") as file:
        file.write(ctypes.string_at(image, header + size))
        file.flush()
        dump = subprocess.run([tools.find("cuobjdump"), "-ptx", file.name], check=True, capture_output=True, text=True)
    return dump.stdout[dump.stdout.index(".version") :]


@dataclasses.dataclass
class Launched:
    kernel: ptx.Kernel
    grid: tuple
    block: tuple
    shared_bytes: int
    counts: ptx.Counts | None


class Device:
    """`library` holds kernels, Halide's runtime and driver.c. Since the last reset: `launches` are what ran, `fault`
    is what went wrong first; `change`, given to reset, changes PTX before it runs, and without `execute` it does not
    run. With `count` launches are counted (ptx.Counts)."""

    def __init__(self, library, megabytes=64):
        self.library = ctypes.CDLL(
            library, mode=ctypes.RTLD_GLOBAL
        )  # Halide's runtime looks for the driver in the process
        self.size = megabytes << 20
        self.callbacks = LAUNCH(self.launch), ERROR(self.error)
        self.library.halide_set_error_handler(self.callbacks[1])
        self.library.halide_reuse_device_allocations(None, ctypes.c_bool(False))  # memory starts anew with each reset
        self.parsed, self.count = {}, False
        self.reset()

    def reset(self, change=None, execute=True):
        self.memory = ptx.Memory(self.size)
        state = ctypes.c_void_p(self.memory.state.ctypes.data)
        self.library.standin_start(
            ctypes.c_void_p(self.memory.base), state, ctypes.c_size_t(self.size), self.callbacks[0]
        )
        self.change, self.execute, self.fault, self.errors, self.launches = change, execute, None, [], []

    def error(self, _, text):
        self.errors.append(text.decode())

    def launch(self, name, image, grid, block, shared_bytes, parameters):
        try:
            text = ptx_of(image)
            text = self.change(text) if self.change else text
            if text not in self.parsed:
                self.parsed[text] = ptx.kernels(text)
            kernel = self.parsed[text][name.decode()]
            values = [
                int.from_bytes(ctypes.string_at(parameters[i], size), "little")
                for i, (_, size) in enumerate(kernel.parameters)
            ]
            counts = ptx.Counts(self.memory) if self.count else None
            self.launches.append(Launched(kernel, tuple(grid[:3]), tuple(block[:3]), shared_bytes, counts))
            if self.execute:
                ptx.Launch(kernel, tuple(grid[:3]), tuple(block[:3]), shared_bytes, values, self.memory, counts).run()
            return 0
        except Exception as e:  # nothing may pass through C
            self.fault = self.fault or e
            return 719  # launch failure

    def call(self, function, *args):
        """Calls a kernel of the table, with no context of the library: arrays are copied to the device and, when it has
        run, back; raises what went wrong there."""
        buffers = [Buffer.of(a) if isinstance(a, np.ndarray) else a for a in args]
        status = self.run(function, buffers)
        for b in buffers:
            if isinstance(b, Buffer):
                status = status or self.library.halide_copy_to_host(None, ctypes.byref(b))
                self.library.halide_device_free(None, ctypes.byref(b))
        self.check(function, status)

    def call_there(self, function, *args):
        """The same with arrays of any strides, whose memory is copied as it is: as the library calls kernels with
        tensors that are on the device."""
        self.library.halide_cuda_device_interface.restype = ctypes.c_void_p
        buffers, places = [], []
        for a in args:
            if not isinstance(a, np.ndarray):
                buffers.append(a)
                continue
            reach = [(n - 1) * step for n, step in zip(a.shape, a.strides, strict=True)]
            low, high = sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach) + a.itemsize
            host, there, size = ctypes.c_void_p(a.ctypes.data + low), ctypes.c_uint64(), ctypes.c_size_t(high - low)
            assert self.library.cuMemAlloc_v2(ctypes.byref(there), size) == 0
            self.library.cuMemcpyHtoD_v2(there, host, size)
            buffers.append(Buffer.of(a))
            buffers[-1].host, buffers[-1].flags, buffers[-1].device = None, 0, there.value - low
            buffers[-1].device_interface = self.library.halide_cuda_device_interface()
            places.append((host, there, size))
        status = self.run(function, buffers)
        for place in places:
            self.library.cuMemcpyDtoH_v2(*place)
        self.check(function, status)

    def run(self, function, arguments):
        passed = [ctypes.byref(a) if isinstance(a, Buffer) else a for a in arguments]
        status = getattr(self.library, function)(None, *passed)
        if self.fault:
            raise self.fault
        return status

    def check(self, function, status):
        if status or self.errors:
            raise RuntimeError(f"{function}: {status}: {self.errors}")
