"""The kernels of the table for CUDA that compute gradients of retention, against the formulas of holdfast.h, token by
token in double."""

import ctypes
import itertools
import math
import re

import numpy as np
import ptx
import pytest
from conftest import NARROW, WIDEN, chunk_table
from rows import CHUNKWISE_BACKWARD, PARALLEL_BACKWARD, POWER_BACKWARD

# Of a relative root mean square: products of sums in fp32, one rounding to 16 bits.
TOLERANCES = {"f32": 2e-6, "f16": 4e-4, "bf16": 3e-3}


def monomials(K, degree):
    """Factors of each feature in the tight order, and its weight."""
    ordered = sorted(itertools.combinations_with_replacement(range(K), degree), key=lambda m: m[::-1])
    orders = [math.factorial(degree) / math.prod(map(math.factorial, map(m.count, set(m)))) for m in ordered]
    return ordered, np.sqrt(orders)


def expand(x, degree):
    """(phi(x), J(x)) of one row."""
    ordered, weight = monomials(len(x), degree)
    phi, jacobian = np.empty(len(ordered)), np.zeros((len(ordered), len(x)))
    for f, factors in enumerate(ordered):
        phi[f] = weight[f] * np.prod(x[list(factors)])
        for s, d in enumerate(factors):
            jacobian[f, d] += weight[f] * np.prod(x[[a for n, a in enumerate(factors) if n != s]])
    return phi, jacobian


class Gradient:
    """`batch` entries, or packed sequences of `lengths`, `heads` heads of keys, `group` of queries to each; arrays as
    kernels want them, states [B, H, N, D, V]. What is not among `wanted` (q, k, v, g and s, of states) keeps what it
    holds."""

    def __init__(
        self, dtype, T, K, V, degree, normalized, heads=1, group=2, states=1, batch=1, lengths=(), wanted="qkvgs"
    ):
        random = np.random.default_rng(3)
        self.dtype, self.degree, self.normalized, self.scale = dtype, degree, normalized, 0.5
        self.lengths, self.wants = list(lengths) or [T], wanted
        T, N = sum(self.lengths), len(self.lengths)

        def rows(*shape, low=-1.0):
            return NARROW[dtype](random.uniform(low, 1, (batch, *shape)).astype(np.float32))

        low = 0.3 if normalized else -1.0  # sums of weights stay away from 0
        self.q, self.k, self.v = rows(heads, group, T, K, low=low), rows(heads, T, K, low=low), rows(heads, T, V)
        self.dout = rows(heads, group, T, V)
        self.log_decay = random.uniform(-0.2, -0.01, (batch, heads, T)).astype(np.float32)
        D = len(monomials(K, degree)[0])
        of_states, of_keys = (2, batch, heads, N, D, V), (2, batch, heads, N, D)
        self.state, self.dstate = states * random.standard_normal(of_states).astype(np.float32)
        self.keys, self.dkeys = states * random.uniform(0.5, 1, of_keys).astype(np.float32)
        self.out = np.zeros_like(self.dout)
        self.results = [np.full_like(x, 7) for x in (self.q, self.k, self.v, self.log_decay, self.state, self.keys)]
        self.wanted = [np.zeros(x.shape) for x in self.results]
        for b, (start, n) in itertools.product(
            range(batch), zip(np.cumsum([0, *self.lengths]), range(N), strict=False)
        ):
            self.expect(b, slice(start, start + self.lengths[n]), n)

    def numbers(self, of="qkvgs"):
        """scale, and which of these gradients are wanted."""
        return [ctypes.c_float(self.scale), *(ctypes.c_int(name in self.wants) for name in of)]

    def expect(self, b, tokens, n):
        """What sequence n should have."""
        rows = (self.q[b, :, :, tokens], self.k[b, :, tokens], self.v[b, :, tokens], self.dout[b, :, :, tokens])
        q, k, v, dout = (WIDEN[self.dtype](x).astype(np.float64) for x in rows)
        heads, group, T, _ = q.shape
        dq, dk, dv, dlog_decay = (
            result[(b, slice(None), *([slice(None)] if result is self.wanted[0] else []), tokens)]
            for result in self.wanted[:4]
        )
        for h in range(heads):
            decay = np.exp(self.log_decay[b, h, tokens].astype(np.float64))
            states, sums = [self.state[b, h, n].astype(np.float64)], [self.keys[b, h, n].astype(np.float64)]
            of_keys = [expand(x, self.degree) for x in k[h]]
            of_queries = [[expand(x, self.degree) for x in rows] for rows in q[h]]
            for t in range(T):
                phi = of_keys[t][0]
                states.append(decay[t] * states[-1] + np.outer(phi, v[h, t])), sums.append(decay[t] * sums[-1] + phi)
            dS, ds = self.dstate[b, h, n].astype(np.float64), self.dkeys[b, h, n].astype(np.float64) * self.normalized
            for t in reversed(range(T)):
                for g in range(group):
                    phi, jacobian = of_queries[g][t]
                    dn, dm = self.scale**self.degree * dout[h, g, t], 0.0
                    if self.normalized:
                        total = phi @ sums[t + 1]
                        out = NARROW[self.dtype]((phi @ states[t + 1] / total).astype(np.float32))
                        self.out[b, h, g, tokens.start + t] = out
                        dn, dm = dout[h, g, t] / total, -(WIDEN[self.dtype](out) @ dout[h, g, t]) / total
                    dq[h, g, t] = jacobian.T @ (states[t + 1] @ dn + sums[t + 1] * dm)
                    dS, ds = dS + np.outer(phi, dn), ds + phi * dm
                phi, jacobian = of_keys[t]
                dk[h, t], dv[h, t] = jacobian.T @ (dS @ v[h, t] + ds), dS.T @ phi
                dlog_decay[h, t] = decay[t] * ((dS * states[t]).sum() + ds @ sums[t])
                dS, ds = decay[t] * dS, decay[t] * ds
            self.wanted[4][b, h, n], self.wanted[5][b, h, n] = dS, ds

    def errors(self, count):
        """Of so many of dq, dk, dv, dlog_decay, the gradient of the initial state, and that of its sum of keys:
        relative RMS over what is allowed."""
        for n, (got, want) in enumerate(list(zip(self.results, self.wanted, strict=True))[:count]):
            if "qkvgss"[n] not in self.wants:
                assert (got == np.full_like(got, 7)).all(), f"{n} is not wanted, and was written"
                continue
            got = WIDEN[self.dtype](got) if n < 3 else got
            error = np.sqrt(np.mean((got.astype(np.float64) - want) ** 2) / np.mean(want**2))
            yield error / TOLERANCES[self.dtype if n < 3 else "f32"]

    def expect_right(self, count):
        errors = list(self.errors(count))
        assert all(error <= 1 for error in errors), errors  # not of a NaN


def chunkwise_backward(device, row, T, **how):
    call = Gradient(row.dtype, T, *((row.key_size, row.value_size) if row.key_size else (5, 7)), 1, False, **how)
    table, count = chunk_table(call.lengths, row.chunk)
    inputs = [call.q, call.k, call.v, call.log_decay, call.state, call.dout, call.dstate, table, ctypes.c_int(count)]
    device.call(row.name, *inputs, *call.numbers(), *call.results[:5])
    return call


@pytest.mark.parametrize("row", CHUNKWISE_BACKWARD, ids=str)
def test_chunkwise_backward(device, row):
    chunkwise_backward(device, row, row.chunk + 3).expect_right(5)


SMALL = [row for row in CHUNKWISE_BACKWARD if row.dtype == "f32" and not row.key_size]
EDGES = [
    {"heads": 2, "group": 1, "batch": 2},
    {"lengths": (33, 0, 1, 40), "heads": 2},
    *({"wanted": "qkvgs".replace(left_out, "")} for left_out in "qkvgs"),
    {"wanted": "s"},
    {"wanted": "q"},
]


@pytest.mark.parametrize("how", EDGES, ids=str)
@pytest.mark.parametrize("row", SMALL, ids=str)
def test_chunkwise_backward_of_several_and_of_some(device, row, how):
    chunkwise_backward(device, row, row.chunk + 3, **how).expect_right(5)


def powers(rows):
    """With what they are called. Types differ in how rows are read and written: degree 2 stands for all."""
    return [(row, *how) for row in rows for how in ((2, True), (3, False)) if row.dtype == "f32" or how[0] == 2]


def power_backward(device, row, degree, normalized, **how):
    """Of one sequence, as the library calls it."""
    call = Gradient(row.dtype, 9, 5, 7, degree, normalized, **how)
    state, keys, dstate, dkeys, of_state, of_keys = (
        x[:, :, 0] for x in (call.state, call.keys, call.dstate, call.dkeys, *call.results[4:])
    )
    numbers = [ctypes.c_int(degree), ctypes.c_int(normalized), *call.numbers("qkvgss")]
    rows = [call.q, call.k, call.v, call.log_decay, state, keys, call.out, call.dout, dstate, dkeys]
    device.call(row.name, *rows, *numbers, *call.results[:4], of_state, of_keys)
    return call


@pytest.mark.parametrize("row, degree, normalized", powers(POWER_BACKWARD), ids=str)
def test_power_backward(device, row, degree, normalized):
    power_backward(device, row, degree, normalized).expect_right(6 if normalized else 5)


@pytest.mark.parametrize("how", [EDGES[0], {"wanted": "qvs"}, {"wanted": "kg"}, {"wanted": "q"}], ids=str)
@pytest.mark.parametrize("row", [row for row in POWER_BACKWARD if row.dtype == "f32"], ids=str)
def test_power_backward_of_several_and_of_some(device, row, how):
    power_backward(device, row, 2, True, **how).expect_right(6)


def parallel_backward(device, row, degree, normalized, **how):
    call = Gradient(row.dtype, row.chunk + 3, 5, 7, degree, normalized, states=0, **how)
    numbers = [ctypes.c_int(degree), ctypes.c_int(normalized), *call.numbers("qkvg")]
    device.call(row.name, call.q, call.k, call.v, call.log_decay, call.out, call.dout, *numbers, *call.results[:4])
    return call


@pytest.mark.parametrize("row, degree, normalized", powers(PARALLEL_BACKWARD), ids=str)
def test_parallel_backward(device, row, degree, normalized):
    parallel_backward(device, row, degree, normalized).expect_right(4)


@pytest.mark.parametrize("how", [EDGES[0], {"wanted": "qv"}, {"wanted": "kg"}], ids=str)
@pytest.mark.parametrize("row", [row for row in PARALLEL_BACKWARD if row.dtype == "f32"], ids=str)
def test_parallel_backward_of_several_and_of_some(device, row, how):
    parallel_backward(device, row, 2, True, **how).expect_right(4)


def unnoticed(device, run, pattern):
    """The test of the test: of the instructions that match those without which the results are right all the same."""
    texts = []
    device.reset(lambda text: texts.append(text) or text)
    assert run()
    text = max(texts, key=len)
    places = [m.span() for m in re.finditer(pattern, text)]
    assert places
    found = []
    for start, end in places:
        device.reset(lambda other, start=start, end=end: other[:start] + other[end:] if other == text else other)
        try:
            if run():
                found.append(text[start:end])
        except ptx.Fault:
            continue
    return found


@pytest.mark.parametrize("row", SMALL, ids=str)
def test_every_store_of_chunkwise_backward_is_missed(device, row):
    def run():
        return all(error <= 1 for error in chunkwise_backward(device, row, row.chunk + 3).errors(5))

    assert unnoticed(device, run, r"st\.global\S+ [^;]*;") == []


def sums_of(device, gradients):
    sums = np.full(gradients.shape[1], 7, np.float32)
    device.call("sum_decays_cuda", gradients, sums)
    return np.abs(sums - gradients.astype(np.float64).sum((0, 2))).max()


def test_decays_per_head_are_summed(device):
    """Of [batch, heads, tokens]: more heads than a block of threads has, more tokens than a partial sum."""
    random = np.random.default_rng(1)
    for shape in (3, 40, 600), (1, 1, 1), (2, 3, 256), (1, 2, 257):
        device.reset()
        assert sums_of(device, random.uniform(-1, 1, shape).astype(np.float32)) < 1e-4, shape
    texts = []
    device.reset(lambda text: texts.append(text) or text)
    gradients = random.uniform(-1, 1, (2, 3, 300)).astype(np.float32)
    sums_of(device, gradients)
    stores = [m.span() for m in re.finditer(r"st\.global\S+ [^;]*;", texts[0])]
    assert len(stores) >= 2  # partial sums, sums
    for start, end in stores:
        device.reset(lambda text, start=start, end=end: text[:start] + text[end:])
        try:
            assert not sums_of(device, gradients) < 1e-2, texts[0][start:end]
        except ptx.Fault:
            continue
