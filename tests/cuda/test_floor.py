"""The floor of schedules/gpu, as CUDA has it, against the double reference: chunkwise and the recurrent step in every
type, for sizes that no tuned kernel takes."""

import ctypes
import re

import numpy as np
import ptx
import pytest
from conftest import Call
from tolerances import OUT, STATE

DTYPES = ("f32", "f16", "bf16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "lengths"), [((5, 7), [35, 0, 1]), ((33, 17), [33])])
def test_chunkwise_matches_reference(device, dtype, size, lengths):
    call = Call(dtype, size, lengths, batch=2, chunk=32)
    device.call(f"floor_chunkwise_{dtype}", *call.arguments())
    out, state = call.errors()
    assert out <= OUT[dtype]
    assert state <= STATE["f32"]


class Steps(Call):
    """The same tokens one by one: `state_out` is advanced in place."""

    def __init__(self, dtype, size, tokens):
        super().__init__(dtype, size, [tokens], heads=2, batch=2)
        self.state_out[:] = self.state_in

    def take(self, device, kernel, t):
        batch, heads, _, K, V = self.state_out.shape
        state = np.ascontiguousarray(self.state_out[:, :, 0])
        sums = np.zeros((batch, heads, 1, V), np.float32)
        every_row = np.lib.stride_tricks.as_strided(sums, (batch, heads, K, V), (*sums.strides[:2], 0, 4))
        rows = [np.ascontiguousarray(x[:, t]) for x in (self.q, self.k, self.v, self.log_decay)]
        out = np.zeros((batch, heads, V), self.out.dtype)
        device.call(kernel, *rows, ctypes.c_float(self.scale), state, every_row, out)
        self.state_out[:, :, 0], self.out[:, t] = state, out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(5, 7), (33, 65)])
def test_steps_match_reference(device, dtype, size):
    steps = Steps(dtype, size, 3)
    for t in range(3):
        device.reset()
        steps.take(device, f"floor_recurrent_{dtype}", t)
    out, state = steps.errors()
    assert out <= OUT[dtype]
    assert state <= STATE["f32"]


def test_every_store_of_a_step_is_missed(device):
    """The test of the test, with a whole block of columns and a part of one."""
    texts = []
    device.reset(lambda text: texts.append(text) or text)
    Steps("f32", (5, 40), 1).take(device, "floor_recurrent_f32", 0)
    stores = [m.span() for m in re.finditer(r"st\.global\.b32 [^;]*;", texts[0])]
    assert len(stores) >= 3  # state, sum, out
    for start, end in stores:
        device.reset(lambda text, start=start, end=end: text[:start] + text[end:])
        steps = Steps("f32", (5, 40), 1)
        try:
            steps.take(device, "floor_recurrent_f32", 0)
        except ptx.Fault:
            continue
        assert not max(steps.errors()) < 1e-4, texts[0][start:end]
