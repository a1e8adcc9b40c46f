"""PyGPUkit's retention: its names and layout, for arrays of any kind.

    S_t = gamma S_{t-1} + k_t^T v_t      per head; S [head_dim, head_dim], from zeros
    out_t = q_t S_t                      no scale

Q, K and V are [num_heads, T, head_dim] or [B, num_heads, T, head_dim]. Arrays are used where they lie and results are
of Q's kind, as in `holdfast.retention`; an array that has no swapaxes (a memoryview, a bare exporter of DLPack) is
taken as a NumPy array. States are float32 whatever the type of Q, K and V. Tensors have gradients as in
`holdfast.torch`.
"""

from __future__ import annotations

import sys
from operator import index
from typing import Any

import numpy as np

import holdfast

__all__ = [
    "retention_chunkwise",
    "retention_init_decay",
    "retention_init_state",
    "retention_parallel",
    "retention_recurrent",
]


def retention_init_decay(num_heads: int) -> np.ndarray:
    """gamma [num_heads], float32: gamma_h = 1 - 2^(-5 - h). From the 21st head on float32 rounds it to 1."""
    heads = index(num_heads)
    if heads < 0:
        raise ValueError(f"num_heads is {heads}; expected at least 0")
    return (1 - np.exp2(-5.0 - np.arange(heads))).astype(np.float32)


def retention_init_state(num_heads: int, head_dim: int, dtype: Any = "float32") -> np.ndarray:
    """Zeros [num_heads, head_dim, head_dim], for `retention_recurrent`. float32 whatever `dtype`, the type of Q, K and
    V ("float32", "float16", "bfloat16"): a state in 16 bits would lose what each token adds to it."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype).removeprefix("torch."))
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}; expected float32, float16 or bfloat16")
    return np.zeros((index(num_heads), index(head_dim), index(head_dim)), np.float32)


def retention_parallel(Q: Any, K: Any, V: Any, gamma: Any) -> Any:
    """Of whole sequences: out_i = sum over j <= i of gamma^(i - j) (q_i.k_j) v_j, in the form that is fastest.

    Args:
        Q, K, V: [num_heads, T, head_dim] or [B, num_heads, T, head_dim].
        gamma: [num_heads], each from 0 to 1 (`retention_init_decay`).

    Returns:
        out, of Q's shape, but for V's last extent."""
    return _whole(Q, K, V, gamma)


def retention_chunkwise(Q: Any, K: Any, V: Any, gamma: Any, chunk_size: int = 512) -> Any:
    """`retention_parallel` in time linear in T, on at most `chunk_size` tokens at a time; the last chunk may be
    shorter. Results depend on it by rounding alone."""
    return _whole(Q, K, V, gamma, form="chunkwise", chunk_size=chunk_size)


def retention_recurrent(Q: Any, K: Any, V: Any, gamma: Any, state: Any) -> tuple[Any, Any]:
    """One token, or some, from a state.

    Args:
        Q, K, V: of one token [num_heads, head_dim], or of T tokens [num_heads, T, head_dim]; with a state of a batch
            [B, num_heads, head_dim] or [B, num_heads, T, head_dim].
        gamma: [num_heads], each from 0 to 1.
        state: [num_heads, head_dim, head_dim] or [B, num_heads, head_dim, head_dim], float32; not written to.

    Returns:
        (out, new_state), of the shapes of Q (V's last extent) and state."""
    state = _array("state", state, (3, 4))
    batch = state.ndim == 4
    Q, K, V = (_array(name, x, (2 + batch, 3 + batch)) for name, x in (("Q", Q), ("K", K), ("V", V)))
    one = Q.ndim == 2 + batch
    q, k, v = (_time_before_heads(x[..., None, :] if one else x, batch) for x in (Q, K, V))
    out, new = _retention(q, k, v, gamma, initial_state=state if batch else state[None], return_state=True)
    out = out.swapaxes(1, 2)
    out = out[:, :, 0] if one else out
    return (out, new) if batch else (out[0], new[0])


def _whole(Q: Any, K: Any, V: Any, gamma: Any, **options: Any) -> Any:
    Q, K, V = (_array(name, x, (3, 4)) for name, x in (("Q", Q), ("K", K), ("V", V)))
    batch = Q.ndim == 4
    q, k, v = (_time_before_heads(x, batch) for x in (Q, K, V))
    out = _retention(q, k, v, gamma, **options).swapaxes(1, 2)
    return out if batch else out[0]


def _retention(q: Any, k: Any, v: Any, gamma: Any, initial_state: Any = None, **options: Any) -> Any:
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    arrays = [k, v, _log_decay(gamma), initial_state]
    if torch is None or not isinstance(q, torch.Tensor):
        op = holdfast.retention
    else:
        from ._torch import retention as op

        arrays = [None if x is None else torch.as_tensor(x, device=q.device) for x in arrays]
    k, v, log_decay, initial_state = arrays
    return op(q, k, v, log_decay, scale=1.0, initial_state=initial_state, **options)


def _array(name: str, x: Any, ranks: tuple[int, int]) -> Any:
    """x, or a NumPy array in its memory where it is none that can be viewed with axes swapped."""
    if not hasattr(x, "swapaxes"):
        x = np.from_dlpack(x) if hasattr(x, "__dlpack__") else np.asarray(x)
    if x.ndim not in ranks:
        raise ValueError(f"{name} has {x.ndim} dimensions; expected {ranks[0]} or {ranks[1]}")
    return x


def _time_before_heads(x: Any, batch: bool) -> Any:
    """[B, T, H, D] of [B, H, T, D] or [H, T, D]."""
    return (x if batch else x[None]).swapaxes(1, 2)


def _log_decay(gamma: Any) -> Any:
    """log gamma, in float32 from float64 where that is at hand."""
    torch = sys.modules.get("torch")
    tensor = torch is not None and isinstance(gamma, torch.Tensor)
    if tensor and gamma.device.type != "cpu":
        return gamma.double().log().float()
    if not tensor and hasattr(gamma, "__array_namespace__") and not isinstance(gamma, np.ndarray):
        xp = gamma.__array_namespace__()
        return xp.log(xp.astype(gamma, xp.float32))
    values = gamma.detach().double().numpy() if tensor else np.asarray(gamma, np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("gamma has an element outside of 0 .. 1, or NaN")
    if tensor:
        return gamma.double().log().float()
    with np.errstate(divide="ignore"):  # 0 forgets everything
        return np.log(values).astype(np.float32)
