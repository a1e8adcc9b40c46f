"""The accuracy that the project holds, over T = 4096, K = V = 64, 8 heads of RetNet decay: the algorithm with the
roundings of the CUDA kernels, run on the processor (the interpreter would take minutes), and beside it the
interpreted kernel on a part."""

import ctypes

import numpy as np
import pytest
from conftest import WIDEN, Call
from device import Buffer
from rows import TUNED, Row
from tolerances import OUT, STATE


def host(dtype):
    return Row("chunkwise", f"host_{dtype}", dtype, 64, 64, 64, "host", 1, True)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_long_sequence(device, dtype):
    call = Call(host(dtype), [4096], heads=8, gate=1.0)
    buffers = [Buffer.of(a) if hasattr(a, "shape") else a for a in call.arguments()]
    passed = [ctypes.byref(b) if isinstance(b, Buffer) else b for b in buffers]
    assert getattr(device.library, f"host_{dtype}")(*passed) == 0
    out, state = call.errors()
    print(f"{dtype}: out {out:.2e}, state {state:.2e}")
    assert out <= OUT[dtype]
    assert state <= STATE[dtype]


@pytest.mark.parametrize("row", [r for r in TUNED if r.round_operands and r.key_size == r.value_size == 64], ids=str)
def test_the_device_rounds_as_the_processor_does(device, row):
    """Same algorithm, same operands: all that differs is the order of sums, and so a few roundings that fall the
    other way."""
    on_host, cuda = Call(host(row.dtype), [130]), Call(row, [130])
    buffers = [Buffer.of(a) if hasattr(a, "shape") else a for a in on_host.arguments()]
    passed = [ctypes.byref(b) if isinstance(b, Buffer) else b for b in buffers]
    assert getattr(device.library, on_host.row.name)(*passed) == 0
    cuda.run(device)
    a, b = (WIDEN[row.dtype](c.out) for c in (on_host, cuda))
    assert np.mean(a != b) < 0.02
    assert np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2)) < OUT[row.dtype] / 5
