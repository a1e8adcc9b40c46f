"""The accuracy that the project holds, over T = 4096, K = V = 64, 8 heads of RetNet decay: the algorithm with the
roundings of the CUDA kernels, run on the processor (the interpreter would take minutes), and beside it the
interpreted kernel on a part."""

import ctypes

import pytest
from conftest import Call
from device import Buffer
from tolerances import OUT, STATE


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_long_sequence(device, dtype):
    call = Call(dtype, 64, [4096], heads=8, gate=1.0)
    buffers = [Buffer.of(a) if hasattr(a, "shape") else a for a in call.arguments()]
    passed = [ctypes.byref(b) if isinstance(b, Buffer) else b for b in buffers]
    assert getattr(device.library, f"host_{dtype}")(*passed) == 0
    out, state = call.errors()
    print(f"{dtype}: out {out:.2e}, state {state:.2e}")
    assert out <= OUT[dtype]
    assert state <= STATE[dtype]


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_the_device_rounds_as_the_processor_does(device, dtype):
    """Same algorithm, same operands: all that differs is the order of sums, and so a few roundings that fall the
    other way."""
    import numpy as np
    from conftest import WIDEN

    host, cuda = (Call(dtype, 64, [130]) for _ in range(2))
    buffers = [Buffer.of(a) if hasattr(a, "shape") else a for a in host.arguments()]
    passed = [ctypes.byref(b) if isinstance(b, Buffer) else b for b in buffers]
    assert getattr(device.library, f"host_{dtype}")(*passed) == 0
    device.call(f"cuda_{dtype}_64", *cuda.arguments())
    a, b = (WIDEN[dtype](c.out) for c in (host, cuda))
    assert np.mean(a != b) < 0.02
    assert np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2)) < OUT[dtype] / 5
