"""The tuned CUDA kernels against the double reference: partial chunks, packed sequences, empty ones, several heads and
batch entries; every type and size that has tensor-core or FFMA code of its own."""

import numpy as np
import pytest
from conftest import Call
from tolerances import OUT, STATE


@pytest.mark.parametrize(
    ("dtype", "size", "lengths", "heads", "batch"),
    [
        ("f16", 32, [70, 0, 130, 1], 2, 1),
        ("f16", 64, [129], 1, 2),
        ("f16", 128, [65], 1, 1),
        ("f16", 256, [3], 1, 1),
        ("bf16", 32, [1, 63, 64, 65], 1, 2),
        ("bf16", 64, [130, 0, 6], 2, 1),
        ("bf16", 128, [2], 1, 1),
        ("bf16", 256, [66], 1, 1),
        ("f32", 32, [70, 0, 5], 2, 1),
        ("f32", 64, [65], 1, 2),
        ("f32", 128, [3], 1, 1),
    ],
)
def test_matches_reference(device, dtype, size, lengths, heads, batch):
    call = Call(dtype, size, lengths, heads, batch)
    device.call(f"cuda_{dtype}_{size}", *call.arguments())
    out, state = call.errors()
    assert out <= OUT[dtype]
    assert state <= STATE[dtype]


def test_same_bits_again(device):
    first, second = (Call("bf16", 64, [70]) for _ in range(2))
    for call in (first, second):
        device.reset()
        device.call("cuda_bf16_64", *call.arguments())
    assert first.out.tobytes() == second.out.tobytes()
    assert first.state_out.tobytes() == second.state_out.tobytes()


def test_strides_that_are_no_multiple_of_16_bytes_are_refused(device):
    call = Call("f16", 32, [70], heads=1)
    arguments = call.arguments()
    padded = np.zeros((1, 70, 1, 33), np.float16).transpose(0, 2, 1, 3)[..., :32]
    with pytest.raises(RuntimeError, match="q.stride.1"):
        device.call("cuda_f16_32", padded, *arguments[1:])
