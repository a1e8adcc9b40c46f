"""The recurrent kernels of the table for CUDA, token by token, against the double reference."""

import ctypes
import re

import numpy as np
import ptx
import pytest
from conftest import Call
from rows import RECURRENT
from tolerances import OUT, STATE


class Steps(Call):
    """The same tokens one by one: `state_out` is advanced in place."""

    def __init__(self, row, tokens, size):
        super().__init__(row, [tokens], heads=2, batch=2, group=2, size=None if row.key_size else size)
        self.state_out[:] = self.state_in

    def take(self, device, t):
        batch, heads, _, K, V = self.state_out.shape
        state = np.ascontiguousarray(self.state_out[:, :, 0])
        if t % 2:  # value-major
            state = np.ascontiguousarray(state.swapaxes(2, 3)).swapaxes(2, 3)
        of_token = np.lib.stride_tricks.as_strided(
            state, (batch, heads, 1, K, 1, V), (*state.strides[:2], 0, state.strides[2], 0, state.strides[3])
        )
        sums = np.zeros((batch, heads, 1, V), np.float32)
        every_row = np.lib.stride_tricks.as_strided(
            sums, (batch, heads, 1, K, 1, V), (*sums.strides[:2], 4 * V, 0, 4 * V, 4)
        )
        q, k, v, decay = (np.ascontiguousarray(x[:, t]) for x in (self.q, self.k, self.v, self.log_decay))
        out = np.zeros((batch, heads, self.group, V), self.out.dtype)
        one = (-3, -2)  # a block of one token
        q = np.expand_dims(q.reshape(batch, heads, self.group, K), one)
        k, v, decay = np.expand_dims(k, one), np.expand_dims(v, one), np.expand_dims(decay, (-2, -1))
        written = np.expand_dims(out, one)
        device.call(self.row.name, q, k, v, decay, ctypes.c_float(self.scale), of_token, every_row, written)
        self.state_out[:, :, 0], self.out[:, t] = state, out.reshape(self.out[:, t].shape)


@pytest.mark.parametrize("row", RECURRENT, ids=str)
def test_matches_reference(device, row):
    steps = Steps(row, 2, (33, 65))
    for t in range(2):
        device.reset()
        steps.take(device, t)
    out, state = steps.errors()
    assert out <= OUT[row.dtype]
    assert state <= STATE["f32"]


@pytest.mark.parametrize("row", [r for r in RECURRENT if r.dtype == "f32" and not r.key_size], ids=str)
def test_every_store_is_missed(device, row):
    """The test of the test, with a whole block of columns and a part of one."""
    texts = []
    device.reset(lambda text: texts.append(text) or text)
    Steps(row, 1, (5, 40)).take(device, 0)
    stores = [m.span() for m in re.finditer(r"st\.global\.b32 [^;]*;", texts[0])]
    assert len(stores) >= 3  # state, sum, out
    for start, end in stores:
        device.reset(lambda text, start=start, end=end: text[:start] + text[end:])
        steps = Steps(row, 1, (5, 40))
        try:
            steps.take(device, 0)
        except ptx.Fault:
            continue
        assert not max(steps.errors()) < 1e-4, texts[0][start:end]
