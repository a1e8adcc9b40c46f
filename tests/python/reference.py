"""Retention in float64, token by token as the formula stands, and how far fp32 results may be from it."""

from __future__ import annotations

from typing import Any

import numpy as np

# Relative RMS of the fp32 kernels against this reference; the specification's number for T = 4096, so ample here.
TOLERANCE = 2e-6


def retention(
    q: Any, k: Any, v: Any, log_decay: Any = None, scale: float | None = None, initial_state: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """(out, state) in float64: S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t, out_t = scale q_t S_t. q may have more heads
    than k."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, H, K = k.shape
    group, V = q.shape[2] // H if H else 1, v.shape[3]
    decay = np.ones((B, T, H)) if log_decay is None else np.broadcast_to(np.exp(log_decay, dtype=np.float64), (B, T, H))
    state = np.zeros((B, H, K, V)) if initial_state is None else np.array(initial_state, np.float64)
    out = np.zeros((B, T, H * group, V))
    for t in range(T):
        state = decay[:, t, :, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        out[:, t] = np.einsum("bhd,bhde->bhe", q[:, t], state.repeat(group, axis=1))
    return out * (K**-0.5 if scale is None else scale), state


def assert_close(actual: Any, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Same shape, and a relative RMS difference of at most `tolerance`."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape
    if expected.size:
        error = np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))
        assert error <= tolerance, f"relative RMS {error:.2e}, expected at most {tolerance:.0e}"


def retention_backward(
    dout: Any, q: Any, k: Any, v: Any, log_decay: Any, scale: float, initial_state: Any, dfinal_state: Any
) -> tuple[np.ndarray, ...]:
    """(dq, dk, dv, dlog_decay [B, T, H], dinitial_state) in float64 of `retention`, by the closed forms. q may have
    more heads than k."""
    dout, q, k, v, dstate = (np.asarray(x, np.float64) for x in (dout, q, k, v, dfinal_state))
    B, T, H, K = k.shape
    group = q.shape[2] // H
    decay = np.broadcast_to(np.exp(log_decay, dtype=np.float64), (B, T, H))
    states = [np.array(initial_state, np.float64)]
    for t in range(T):
        states.append(decay[:, t, :, None, None] * states[-1] + k[:, t, :, :, None] * v[:, t, :, None, :])
    dq, dk, dv, dlog_decay = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros((B, T, H))
    for t in reversed(range(T)):
        rows, gradients = (x[:, t].reshape(B, H, group, -1) for x in (q, dout))
        dstate = dstate + scale * np.einsum("bhgd,bhge->bhde", rows, gradients)
        dq[:, t] = scale * np.einsum("bhde,bhge->bhgd", states[t + 1], gradients).reshape(B, H * group, K)
        dk[:, t] = np.einsum("bhde,bhe->bhd", dstate, v[:, t])
        dv[:, t] = np.einsum("bhde,bhd->bhe", dstate, k[:, t])
        dlog_decay[:, t] = decay[:, t] * np.einsum("bhde,bhde->bh", dstate, states[t])
        dstate = decay[:, t, :, None, None] * dstate
    return dq, dk, dv, dlog_decay, dstate
