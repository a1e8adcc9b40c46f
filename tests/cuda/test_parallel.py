"""The parallel kernel of the table for CUDA, with all that it can be asked for, against plain formulas."""

import ctypes

import numpy as np
import pytest
from conftest import NARROW, WIDEN, Call
from rows import PARALLEL
from tolerances import OUT, STATE


def phi(x):
    """The features of degree 2, in the tight order."""
    last, first = np.array([(b, a) for b in range(x.shape[-1]) for a in range(b + 1)]).T
    return x[..., first] * x[..., last] * np.where(first == last, 1, 2**0.5)


class Parallel(Call):
    def __init__(self, row, degree, normalized):
        super().__init__(row, [35], size=(5, 7), group=2)
        self.degree, self.normalized = degree, normalized
        random = np.random.default_rng(2)
        batch, heads, _, K, V = self.state_in.shape
        D = K if degree == 1 else K * (K + 1) // 2
        if normalized:  # sums of weights stay away from 0
            self.q, self.k = (NARROW[row.dtype](np.abs(WIDEN[row.dtype](x)) + 0.1) for x in (self.q, self.k))
        self.state_in = random.standard_normal((batch, heads, 1, D, V), np.float32)
        self.keys_in = random.uniform(0.5, 1, (batch, heads, 1, D)).astype(np.float32)
        self.state_out = np.zeros((batch, heads, 1, K, V), np.float32)
        self.keys_out = np.zeros((batch, heads, 1, K), np.float32)
        self.weights = np.zeros((batch, heads, 2, 35, 1, 35), self.out.dtype)

    def run(self, device):
        q, k, v, decay, state_in, *_, out, state_out = self.arguments()
        numbers = [*map(ctypes.c_int, (0, self.degree, self.normalized)), ctypes.c_float(self.scale)]
        outputs = [out, state_out, self.keys_out, self.weights]
        device.call(self.row.name, q, k, v, decay, state_in, self.keys_in, *numbers, *outputs)

    def expected(self):
        """(out, weights, state, sum of keys), the last two of degree 1."""
        q, k, v = (WIDEN[self.dtype](x).astype(np.float64) for x in (self.q, self.k, self.v))
        k_of_q, v_of_q = k.repeat(self.group, axis=2), v.repeat(self.group, axis=2)
        until = np.cumsum(self.log_decay.astype(np.float64), axis=1).transpose(0, 2, 1)  # [B, H, T]
        gates = np.tril(np.exp(np.minimum(until[..., :, None] - until[..., None, :], 0))).repeat(self.group, axis=1)
        weights = (self.scale * np.einsum("bihd,bjhd->bhij", q, k_of_q)) ** self.degree * gates
        features = self.scale * q if self.degree == 1 else phi(self.scale * q)
        features = features * np.exp(until).transpose(0, 2, 1).repeat(self.group, axis=2)[..., None]
        state, keys = (x[:, :, 0].repeat(self.group, axis=1) for x in (self.state_in, self.keys_in))
        out = np.einsum("bhij,bjhe->bihe", weights, v_of_q) + np.einsum("bihf,bhfe->bihe", features, state)
        if self.normalized:
            sums = weights.sum(-1) + np.einsum("bihf,bhf->bhi", features, keys)
            out, weights = out / sums.transpose(0, 2, 1)[..., None], weights / sums[..., None]
        kept = k * np.exp(until[..., -1:] - until).transpose(0, 2, 1)[..., None]
        total = np.exp(until[..., -1])[..., None]
        if self.degree > 1:
            return out, weights, None, None
        state = self.state_in[:, :, 0] * total[..., None] + np.einsum("bthd,bthe->bhde", kept, v)
        return out, weights, state, self.keys_in[:, :, 0] * total + kept.sum(1).reshape(total.shape[0], -1, k.shape[-1])

    def errors(self):
        out, weights, state, keys = self.expected()

        def error(actual, expected):
            return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))

        of_weights = WIDEN[self.dtype](self.weights).astype(np.float64).reshape(weights.shape)
        errors = [error(WIDEN[self.dtype](self.out).astype(np.float64), out), error(of_weights, weights)]
        if state is not None:
            errors += [error(self.state_out[:, :, 0], state), error(self.keys_out[:, :, 0], keys)]
        return errors


@pytest.mark.parametrize("degree, normalized", [(1, True), (2, False)])
@pytest.mark.parametrize("row", PARALLEL, ids=str)
def test_matches_formulas(device, row, degree, normalized):
    call = Parallel(row, degree, normalized)
    if degree > 1:  # value-major
        states = call.state_in, call.state_out
        call.state_in, call.state_out = (x.swapaxes(-1, -2).copy().swapaxes(-1, -2) for x in states)
    call.run(device)
    errors = call.errors()
    assert max(errors[:2]) <= OUT[row.dtype]
    assert max(errors[2:], default=0) <= STATE["f32"]
