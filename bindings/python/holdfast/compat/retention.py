"""The published power-retention package (`import retention`): its functions on Holdfast's kernels.

    w_ij = (q_i.k_j)^deg exp(G_i - G_j)    j <= i, G the inclusive sum of log_G over time
    out_i = sum_j w_ij v_j / sum_j w_ij    from an initial state as if its tokens came before; scale cancels

Tensors are [B, T, H, D], Hq a multiple of Hk. States are float32 [B, Hk, D, V], their sums of keys [B, Hk, D], for deg
2 and key sizes that are multiples of 16 with the features in the order of the package, else each monomial once. Values
are exact, in every form and for every length: docs/compat.md lists what the package computes otherwise.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _torch

__all__ = ["State", "power_full", "power_retention", "power_retention_inference"]


class State(NamedTuple):
    """What a sequence leaves behind: outputs after it need both."""

    state: Tensor  # [B, Hk, D, V]
    sum_of_keys: Tensor  # [B, Hk, D]


def power_retention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_final_state: bool = False,
    deg: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    switch_over_seq_len: int | None = None,
) -> Any:
    """Of whole sequences.

    Args:
        Q: [B, T, Hq, K]; K: [B, T, Hk, K]; V: [B, T, Hk, V].
        log_G: logarithms of the gates, [B, T, Hk], each <= 0. None: no gates.
        initial_state: a `State`, or another pair (state, sum_of_keys). None: none.
        return_final_state: return the final `State` as well.
        deg: power of q.k, 1 to 4.
        scale: finite, not 0; cancels.
        chunk_size: tokens worked on at a time; any T. None: the library's choice.
        switch_over_seq_len: up to this T all T x T weights are computed. None: chunk_size.

    Returns:
        out [B, T, Hq, V], or (out, State)."""
    _check_degree(deg)
    if initial_state is not None and (isinstance(initial_state, Tensor) or len(initial_state) != 2):
        raise ValueError("initial_state lacks its sum of keys; expected a pair (state, sum_of_keys)")
    switch = chunk_size if switch_over_seq_len is None else switch_over_seq_len
    if switch is not None and Q.shape[1] <= switch and Q.device.type == "cpu":
        form = "parallel"  # on a GPU nobody has measured where that is faster
    else:
        form = "auto" if chunk_size is None or Q.device.type != "cpu" else "chunkwise"
    states = initial_state is not None or return_final_state
    state, sum_of_keys = _pair(initial_state)
    result = _torch.retention(
        Q,
        K,
        V,
        None if log_G is None else log_G.float(),
        scale=scale,
        degree=deg,
        normalize=True,
        form=form,
        chunk_size=chunk_size,
        initial_state=state,
        initial_sum_of_keys=sum_of_keys,
        return_state=return_final_state,
        expansion=_expansion(deg, Q.shape[-1]) if states else "tight",
    )
    return (result[0], State(*result[1:])) if return_final_state else result


def power_full(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_final_state: bool = False,
    deg: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
) -> Any:
    """`power_retention` by its older name."""
    return power_retention(Q, K, V, log_G, initial_state, return_final_state, deg, scale, chunk_size)


def power_retention_inference(
    Q: Tensor,
    K: Tensor | None,
    V: Tensor | None,
    log_G: Tensor | None = None,
    initial_state: Tensor | None = None,
    sum_of_keys: Tensor | None = None,
    deg: int = 2,
    scale: float | None = None,
    switch_over_seq_len: int | None = 512,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of the last Tq tokens, from a state and a cache of the tokens after it, which the caller keeps.

    Args:
        Q: [B, Tq, Hq, K], of the last Tq tokens of the cache; without a cache, of any that see the state alone.
        K, V: the cache, [B, Tk, Hk, K] and [B, Tk, Hk, V], Tk >= Tq. None, both: empty.
        log_G: [B, Tk, Hk], the gates of the cache, each <= 0. None: no gates.
        initial_state, sum_of_keys: [B, Hk, D, V] and [B, Hk, D], of the tokens before the cache; not written to. None,
            both: none, and then the cache is not empty.
        deg, scale: as in `power_retention`.
        switch_over_seq_len: from this Tk on the cache is folded into the returned state, and the caller drops it. None:
            never.

    Returns:
        (out [B, Tq, Hq, V], state, sum_of_keys): the states that were given, or, after folding, new ones."""
    _check_degree(deg)
    if scale is not None and (scale == 0 or not math.isfinite(scale)):
        raise ValueError(f"scale is {scale}; expected a finite number other than 0")
    if (K is None) != (V is None):
        raise ValueError("only one of K and V is given; expected both or none")
    if (initial_state is None) != (sum_of_keys is None):
        raise ValueError("only one of initial_state and sum_of_keys is given; expected both or none")
    cached = K is not None and K.shape[1] > 0
    if not cached and initial_state is None:
        raise ValueError("K is empty and initial_state is not given; expected one of them")
    if log_G is not None and (K is None or log_G.shape != K.shape[:3]):
        raise ValueError(f"log_G has shape {list(log_G.shape)}; expected that of the first three axes of K")
    if cached and not 0 < Q.shape[1] <= K.shape[1]:
        raise ValueError(f"Q has {Q.shape[1]} tokens; expected 1 to {K.shape[1]}, the last ones of K")

    q = _within_range(Q)
    since = None  # what the gates of the cache leave of the state, for each query
    out, weight = 0.0, 0.0
    if cached:
        out, weight, since = _of_cache(q, K, V, log_G, deg)
    if initial_state is not None:
        seen, seen_weight = _of_state(q, initial_state.float(), sum_of_keys.float(), deg)
        out = out + (seen if since is None else seen * since)
        weight = weight + (seen_weight if since is None else seen_weight * since)
    out = (out / weight).to(Q.dtype)

    if cached and switch_over_seq_len is not None and K.shape[1] >= switch_over_seq_len:
        state, sum_before = _pair(None if initial_state is None else (initial_state, sum_of_keys))
        _, initial_state, sum_of_keys = _torch.retention(
            K,  # any: there is no call without queries
            K,
            V,
            None if log_G is None else log_G.float(),
            degree=deg,
            normalize=True,
            initial_state=state,
            initial_sum_of_keys=sum_before,
            return_state=True,
            expansion=_expansion(deg, K.shape[-1]),
        )
    return out, initial_state, sum_of_keys


def _of_cache(q: Tensor, K: Tensor, V: Tensor, log_G: Tensor | None, deg: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of weighted values [B, Tq, Hq, V] and of weights [B, Tq, Hq, 1], and what the gates leave of a state [B, Tq,
    Hq, 1]. A few rows of weights: nothing for a kernel of whole sequences."""
    Tq, Hq, Tk, Hk = *q.shape[1:3], *K.shape[1:3]
    if Hq % Hk:
        raise ValueError(f"Q has {Hq} heads; expected a multiple of the {Hk} of K")
    weights = torch.einsum("bihgd,bjhd->bhgij", q.unflatten(2, (Hk, -1)), K.float()) ** deg
    later = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).triu(Tk - Tq + 1)
    weights = weights.masked_fill(later, 0.0)
    since = None
    if log_G is not None:
        # In float64, as in the kernels; below -1e4 a gate is 0 either way, and -inf - -inf would be no number.
        G = log_G.double().clamp(min=-1e4).cumsum(1).transpose(1, 2)  # [B, Hk, Tk]
        gap = (G[:, :, Tk - Tq :, None] - G[:, :, None, :]).masked_fill(later, 0.0)
        weights = weights * gap.exp().float()[:, :, None]
        since = G[:, :, Tk - Tq :].exp().float().transpose(1, 2).repeat_interleave(Hq // Hk, dim=2)[..., None]
    out = torch.einsum("bhgij,bjhe->bihge", weights, V.float()).flatten(2, 3)
    return out, weights.sum(-1).flatten(1, 2).transpose(1, 2)[..., None], since


def _of_state(q: Tensor, state: Tensor, sum_of_keys: Tensor, deg: int) -> tuple[Tensor, Tensor]:
    """phi(q) S [B, Tq, Hq, V] and phi(q) s [B, Tq, Hq, 1]: keys of zero leave a state as it is."""
    shape = (q.shape[0], q.shape[1], state.shape[1])

    def seen(state: Tensor) -> Tensor:
        k, v = (torch.zeros(size, device=q.device).expand(*shape, size) for size in (q.shape[-1], state.shape[-1]))
        expansion: Any = _expansion(deg, q.shape[-1])
        return _torch.retention(
            q, k, v, scale=1.0, degree=deg, normalize=False, initial_state=state, expansion=expansion
        )

    return seen(state), seen(sum_of_keys[..., None])


def _within_range(Q: Tensor) -> Tensor:
    """Q in float32, each row divided by a power of two, which is exact and cancels: powers of q.k stay in range."""
    q = Q.float()
    exponent = torch.frexp(q.detach().abs().amax(-1, keepdim=True)).exponent.clamp(-126, 126)
    return q * torch.ldexp(torch.ones_like(exponent, dtype=q.dtype), -exponent)


def _pair(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if pair is None else (pair[0].float(), pair[1].float())


def _expansion(deg: int, key_size: int) -> Any:
    return "tiled" if deg == 2 and key_size % 16 == 0 else "tight"


def _check_degree(deg: int) -> None:
    if deg not in (1, 2, 3, 4):
        raise ValueError(f"deg is {deg!r}; expected 1, 2, 3 or 4")
