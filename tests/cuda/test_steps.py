"""The recurrent kernels of the table for CUDA against the double reference."""

import ctypes
import re

import numpy as np
import ptx
import pytest
from conftest import Call
from rows import RECURRENT
from tolerances import OUT, STATE


class Steps(Call):
    """The same tokens, one by one or some in a call: `state_out` is advanced in place."""

    def __init__(self, row, tokens, size, group=2):
        super().__init__(row, [tokens], heads=2, batch=2, group=group, size=None if row.key_size else size)
        self.state_out[:] = self.state_in

    def take(self, device, t, tokens=1):
        batch, heads, _, K, V = self.state_out.shape
        state = np.ascontiguousarray(self.state_out[:, :, 0])
        if t % 2:  # value-major
            state = np.ascontiguousarray(state.swapaxes(2, 3)).swapaxes(2, 3)
        of_token = np.lib.stride_tricks.as_strided(
            state, (batch, heads, tokens, K, 1, V), (*state.strides[:2], 0, state.strides[2], 0, state.strides[3])
        )
        sums = np.zeros((batch, heads, tokens, V), np.float32)
        every_row = np.lib.stride_tricks.as_strided(
            sums, (batch, heads, tokens, K, 1, V), (*sums.strides[:3], 0, 4 * V, 4)
        )

        def blocks(x):  # of one token: (batch, heads, (group,) tokens, 1, size)
            return np.expand_dims(np.ascontiguousarray(np.moveaxis(x[:, t : t + tokens], 1, -2)), -2)

        k, v, decay = blocks(self.k), blocks(self.v), blocks(self.log_decay[..., None])[..., 0]
        q = blocks(self.q.reshape(batch, -1, heads, self.group, K))
        out = np.zeros((*q.shape[:-1], V), self.out.dtype)
        device.call(self.row.name, q, k, v, decay, ctypes.c_float(self.scale), of_token, every_row, out)
        self.state_out[:, :, 0] = state
        self.out[:, t : t + tokens] = np.moveaxis(out[..., 0, :], -2, 1).reshape(batch, tokens, -1, V)


@pytest.mark.parametrize("row", RECURRENT, ids=str)
def test_matches_reference(device, row):
    steps = Steps(row, 2, (33, 65))
    for t in range(2):
        device.reset()
        steps.take(device, t)
    out, state = steps.errors()
    assert out <= OUT[row.dtype]
    assert state <= STATE["f32"]


@pytest.mark.parametrize("row", RECURRENT, ids=str)
def test_some_tokens_in_a_call(device, row):
    steps = Steps(row, 3, (5, 35), group=1)
    steps.take(device, 0, 3)
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
