"""The kernels of the table for CUDA that compute gradients of retention, against the formulas of holdfast.h, token by
token in double."""

import ctypes
import itertools
import math

import numpy as np
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
    """One batch entry, `heads` heads of keys, `group` of queries to each; arrays as kernels want them."""

    def __init__(self, dtype, T, K, V, degree, normalized, heads=1, group=2, states=1):
        random = np.random.default_rng(3)
        self.dtype, self.degree, self.normalized, self.scale = dtype, degree, normalized, 0.5

        def rows(*shape, low=-1.0):
            return NARROW[dtype](random.uniform(low, 1, (1, *shape)).astype(np.float32))

        low = 0.3 if normalized else -1.0  # sums of weights stay away from 0
        self.q, self.k, self.v = rows(heads, group, T, K, low=low), rows(heads, T, K, low=low), rows(heads, T, V)
        self.dout = rows(heads, group, T, V)
        self.log_decay = random.uniform(-0.2, -0.01, (1, heads, T)).astype(np.float32)
        D = len(monomials(K, degree)[0])
        self.state, self.dstate = states * random.standard_normal((2, 1, heads, D, V)).astype(np.float32)
        self.keys, self.dkeys = states * random.uniform(0.5, 1, (2, 1, heads, D)).astype(np.float32)
        self.out = np.zeros_like(self.dout)
        self.results = [np.zeros_like(x) for x in (self.q, self.k, self.v, self.log_decay, self.state, self.keys)]
        self.wanted = self.expected()

    def expected(self):
        q, k, v, dout = (WIDEN[self.dtype](x)[0].astype(np.float64) for x in (self.q, self.k, self.v, self.dout))
        heads, group, T, _ = q.shape
        results = [np.zeros(x.shape[1:]) for x in self.results]
        dq, dk, dv, dlog_decay, dstate, dkeys = results
        for h in range(heads):
            decay = np.exp(self.log_decay[0, h].astype(np.float64))
            states, sums = [self.state[0, h].astype(np.float64)], [self.keys[0, h].astype(np.float64)]
            of_keys = [expand(x, self.degree) for x in k[h]]
            of_queries = [[expand(x, self.degree) for x in rows] for rows in q[h]]
            for t in range(T):
                phi = of_keys[t][0]
                states.append(decay[t] * states[-1] + np.outer(phi, v[h, t])), sums.append(decay[t] * sums[-1] + phi)
            dS, ds = self.dstate[0, h].astype(np.float64), self.dkeys[0, h].astype(np.float64) * self.normalized
            for t in reversed(range(T)):
                for g in range(group):
                    phi, jacobian = of_queries[g][t]
                    dn, dm = self.scale**self.degree * dout[h, g, t], 0.0
                    if self.normalized:
                        total = phi @ sums[t + 1]
                        out = NARROW[self.dtype]((phi @ states[t + 1] / total).astype(np.float32))
                        self.out[0, h, g, t] = out
                        dn, dm = dout[h, g, t] / total, -(WIDEN[self.dtype](out) @ dout[h, g, t]) / total
                    dq[h, g, t] = jacobian.T @ (states[t + 1] @ dn + sums[t + 1] * dm)
                    dS, ds = dS + np.outer(phi, dn), ds + phi * dm
                phi, jacobian = of_keys[t]
                dk[h, t], dv[h, t] = jacobian.T @ (dS @ v[h, t] + ds), dS.T @ phi
                dlog_decay[h, t] = decay[t] * ((dS * states[t]).sum() + ds @ sums[t])
                dS, ds = decay[t] * dS, decay[t] * ds
            dstate[h], dkeys[h] = dS, ds
        return results

    def expect_right(self, count):
        """Of so many of dq, dk, dv, dlog_decay, the gradient of the initial state, and that of its sum of keys."""
        for n, (got, want) in enumerate(list(zip(self.results, self.wanted, strict=True))[:count]):
            got = WIDEN[self.dtype](got) if n < 3 else got
            error = np.sqrt(np.mean((got[0].astype(np.float64) - want) ** 2) / np.mean(want**2))
            assert error <= TOLERANCES[self.dtype if n < 3 else "f32"], n


WANTED = [ctypes.c_int(1)] * 4


@pytest.mark.parametrize("row", CHUNKWISE_BACKWARD, ids=str)
def test_chunkwise_backward(device, row):
    T, size = row.chunk + 3, (row.key_size, row.value_size) if row.key_size else (5, 7)
    call = Gradient(row.dtype, T, *size, 1, False)
    table, count = chunk_table([T], row.chunk)
    state, dstate, dstate_in = (x[:, :, None] for x in (call.state, call.dstate, call.results[4]))
    numbers = [ctypes.c_int(count), ctypes.c_float(call.scale), *WANTED]
    inputs = [call.q, call.k, call.v, call.log_decay, state, call.dout, dstate, table]
    device.call(row.name, *inputs, *numbers, *call.results[:4], dstate_in)
    call.expect_right(5)


def powers(rows):
    """With what they are called. Types differ in how rows are read and written: degree 2 stands for all."""
    return [(row, *how) for row in rows for how in ((2, True), (3, False)) if row.dtype == "f32" or how[0] == 2]


@pytest.mark.parametrize("row, degree, normalized", powers(POWER_BACKWARD), ids=str)
def test_power_backward(device, row, degree, normalized):
    call = Gradient(row.dtype, 9, 5, 7, degree, normalized)
    numbers = [ctypes.c_int(degree), ctypes.c_int(normalized), ctypes.c_float(call.scale), *WANTED]
    rows, states = [call.q, call.k, call.v, call.log_decay], [call.state, call.keys]
    gradients = [call.dout, call.dstate, call.dkeys]
    device.call(row.name, *rows, *states, call.out, *gradients, *numbers, *call.results)
    call.expect_right(6 if normalized else 5)


@pytest.mark.parametrize("row, degree, normalized", powers(PARALLEL_BACKWARD), ids=str)
def test_parallel_backward(device, row, degree, normalized):
    call = Gradient(row.dtype, row.chunk + 3, 5, 7, degree, normalized, states=0)
    numbers = [ctypes.c_int(degree), ctypes.c_int(normalized), ctypes.c_float(call.scale), *WANTED]
    device.call(row.name, call.q, call.k, call.v, call.log_decay, call.out, call.dout, *numbers, *call.results[:4])
    call.expect_right(4)
