"""Holdfast: retention kernels compiled ahead of time.

`retention` computes, `power_retention` with the defaults of that, and `retention_backward` the gradients;
`retention_step` does one token, with the state in place; `decay` makes RetNet's decays. `rotate` turns queries and keys
by their positions, by the angles of `theta`, and `head_norm_gate` is what follows retention; `rotate_backward` and
`head_norm_gate_backward` are their gradients. `holdfast.torch` has the same for PyTorch, differentiable.
`info` says what was compiled and what would run here; `set_num_threads`, `set_target`, `set_backend` and `set_verbose`
set options for all calls of the process.

Arrays are anything that speaks the buffer protocol (NumPy, memoryview, ctypes, array) or DLPack (PyTorch, JAX, ...),
used where they lie, without a copy. NumPy arrays of ml_dtypes' bfloat16, which speak neither, are known by the name of
their dtype; ml_dtypes itself is not needed. Arrays on a GPU go by DLPack and are computed there: on
CUDA the work is put into the stream that is current for PyTorch's tensors or CuPy's arrays, else into the default one.
All functions may be called from several threads at once, and those that compute let other Python threads run meanwhile.

Errors name the argument, say what it was and what was expected:
    ValueError           a malformed argument, or one that contradicts another: rank, shape, stride, overlap, ...
    NotImplementedError  something that this version does not compute: another dtype, a device of no backend of this
                         build, an array that requires grad, an option that later versions bring
    TypeError            not an array at all, or one that does not share its memory; not a number
    TargetUnavailable    the forced target or backend is unknown or does not run on this machine, or that of the arrays
                         does not (a RuntimeError)
    MemoryError          no memory for results or workspace
    RuntimeError         a fault of the library, or of a GPU's driver
After ValueError, NotImplementedError, TypeError and TargetUnavailable nothing has been written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from operator import index
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np

from . import _holdfast
from ._holdfast import TargetUnavailable

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "BFloat16Array",
    "Gradients",
    "TargetUnavailable",
    "convert_state",
    "decay",
    "get_num_threads",
    "head_norm_gate",
    "head_norm_gate_backward",
    "info",
    "power_retention",
    "retention",
    "retention_backward",
    "retention_step",
    "rotate",
    "rotate_backward",
    "set_backend",
    "set_num_threads",
    "set_target",
    "set_verbose",
    "state_interval",
    "state_size",
    "theta",
]

__version__: str = _holdfast.version()


class SupportsDLPack(Protocol):
    """An array that DLPack can share."""

    def __dlpack__(self, *, stream: None = None) -> Any: ...


Array: TypeAlias = "Buffer | SupportsDLPack"


class BFloat16Array:
    """Results in bfloat16 where the input was neither of NumPy nor of PyTorch nor of the array API: NumPy has no such
    type. It speaks DLPack (`torch.from_dlpack`, `jax.dlpack.from_dlpack`, all functions here), without a copy; `bits`
    is the same memory as a numpy.ndarray of uint16, which ml_dtypes reads as `bits.view(ml_dtypes.bfloat16)`."""

    def __init__(self, bits: np.ndarray) -> None:
        self.bits = bits

    def __dlpack__(self, **options: Any) -> Any:
        return _holdfast.bfloat16_capsule(self.bits, **options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.bits.__dlpack_device__()


def retention(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None = None,
    *,
    scale: float | None = None,
    degree: int = 1,
    normalize: bool | None = None,
    form: Literal["auto", "parallel", "chunkwise", "recurrent"] = "auto",
    chunk_size: int | None = None,
    initial_state: Array | None = None,
    initial_sum_of_keys: Array | None = None,
    cu_seqlens: Array | None = None,
    return_state: bool = False,
    return_weights: bool = False,
    state_interval: int | None = None,
    state_layout: Literal["kv", "vk"] = "kv",
    expansion: Literal["tight", "tiled"] = "tight",
    out: Array | None = None,
) -> Any:
    """Retention of every sequence and head (decay first, then write):

        S_t = exp(log_decay_t) S_{t-1} + phi(k_t)^T v_t     S: [D, V], S_0 = initial_state, state = S_T
        s_t = exp(log_decay_t) s_{t-1} + phi(k_t)           s: [D], likewise sum_of_keys, where out is normalized
        out_t = scale^p phi(q_t) S_t                        phi(q).phi(k) = (q.k)^p; for p = 1 phi(x) = x
        out_t = phi(q_t) S_t / phi(q_t) s_t                 where out is normalized

    With a constant decay per head (`decay`) this is RetNet's retention (Sun et al. 2023, arXiv:2307.08621), with a
    decay per token gated retention, also known as simple gated linear attention; without, linear attention. A sequence
    cut anywhere and continued from the returned state gives the same outputs to rounding.

    Args:
        q: queries [B, T, H, K].
        k: keys [B, T, Hk, K], H a multiple of Hk: head h of q and out has head h // (H // Hk) of everything else.
        v: values [B, T, Hk, V].
        log_decay: natural logarithm of the decay, [Hk] or [B, T, Hk], each <= 0; -infinity forgets all that came
            before. None: no decay.
        scale: multiplies q.k, before the power; finite, not 0. None: K^-1/2.
        degree: p, the power of q.k: 1 to 4.
        normalize: divide by the sum of weights. None: degree > 1.
        form: "parallel" (all T x T weights), "chunkwise" (linear in T), "recurrent" (token by token), or "auto", the
            fastest of them for T and the sizes.
        chunk_size: work on at most this many tokens at a time, at least 1; changes rounding and speed, nothing else.
            None: the library's choice.
        initial_state: [N, Hk, D, V], of N = B sequences or those of cu_seqlens. None: zeros.
        initial_sum_of_keys: [N, Hk, D], where out is normalized; given just when initial_state is.
        cu_seqlens: packed sequences, [N + 1], int32 or int64, on the CPU: sequence s has the tokens cu_seqlens[s] to
            cu_seqlens[s + 1] - 1 of the one batch entry. From 0 to T, never falling.
        return_state: return the final state as well, and the sum of keys where out is normalized.
        return_weights: return the weights as well; form "parallel".
        state_interval: return the states inside the sequences as well, of degree 1 without normalization on the CPU: of
            each sequence those after 0, state_interval, 2 state_interval, .. tokens and after all, one sequence after
            the other. `retention_backward` need not compute them again; `state_interval()` is what suits it.
        state_layout: of the states: "kv", [.., D, V], or "vk", [.., V, D].
        expansion: order of the D features of expanded keys, degree 2 and more: "tight", each monomial once, or "tiled",
            degree 2 and K a multiple of 16 (holdfast.h: HOLDFAST_EXPANSION_TILED).
        out: written in place and returned itself, [B, T, H, V].

    Returns:
        out [B, T, H, V]; or (out, state), (out, state, sum_of_keys), with `states` [M, Hk, D, V] or the weights
        [B, H, T, T] last when asked for: of each sequence T / state_interval, rounded up, and one more.
        New arrays are of q's kind: torch.Tensor for a torch.Tensor, what from_dlpack of its namespace makes for other
        arrays of the array API, else numpy.ndarray. In bfloat16 `out` is a numpy.ndarray where q is one, of q's dtype,
        and where none of these applies a BFloat16Array.

    q, k, v, out and weights have one dtype: float32, float16 or bfloat16. log_decay, states and sums of keys are
    float32. Sums are in float32 whatever the dtype, and out is rounded once, to the nearest. All arrays are on one
    device, of any strides but with a contiguous last axis (log_decay and cu_seqlens: any strides), also negative or 0
    (inputs). On CUDA the call returns when its work is in the stream. Inputs may be read-only and may share memory;
    `out` may not share memory with any of them. B, T and H may be 0. Results are the same bits from call to call and
    for any number of threads.

    Raises: see the module. A positive or NaN decay is a ValueError.
    """
    options = None
    if not _same((degree, normalize, form, return_weights, state_layout, expansion, state_interval), _DEFAULTS):
        return_weights = _option("return_weights", return_weights, _FLAGS)
        options = _options(q, degree, normalize, form, return_weights, state_layout, expansion, state_interval)
        _check_form(form, return_weights, state_interval)
    if (device := _gpu(q)) is not None:
        _check_no_states(state_interval)
        results = _on_gpu(q, k, v, return_state, out, options, cu_seqlens, "BT")
        stream = _cuda_stream(q) if device in _CUDA else 0
    else:
        results, stream = (out, None, None, None, None), 1
    new_out, new_state, new_sum, _, new_weights = results
    result = _holdfast.forward(
        q, k, v, log_decay, scale, chunk_size, initial_state, return_state, new_out, new_state, stream,
        initial_sum_of_keys, cu_seqlens, options, new_sum, new_weights, None,
    )  # fmt: skip
    if not isinstance(result, tuple):
        return _like(q, result) if new_out is None else result
    made = tuple(_like(q, x) if given is None else x for x, given in zip(result, results, strict=True) if x is not None)
    return made


def power_retention(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None = None,
    *,
    scale: float | None = None,
    degree: int = 2,
    normalize: bool = True,
    form: Literal["auto", "parallel", "chunkwise", "recurrent"] = "auto",
    chunk_size: int | None = None,
    initial_state: Array | None = None,
    initial_sum_of_keys: Array | None = None,
    cu_seqlens: Array | None = None,
    return_state: bool = False,
    return_weights: bool = False,
    state_layout: Literal["kv", "vk"] = "kv",
    expansion: Literal["tight", "tiled"] = "tight",
    out: Array | None = None,
) -> Any:
    """`retention` with the defaults of power retention (Kumar et al. 2025, arXiv:2507.04239): weights are powers of
    q.k, of degree 2 to 4, divided by their sum:

        out_t = sum_{s <= t} w_ts v_s / sum_{s <= t} w_ts
        w_ts = (q_t.k_s)^p exp(log_decay_{s+1} + .. + log_decay_t)

    The sum of weights stands where softmax has its own, and beside a state a sum of keys. A normalized out does not
    depend on `scale`. An odd degree keeps the sign of q.k, and the sum of weights may vanish: out is then infinite or
    not a number.

    Args:
        q: queries [B, T, H, K].
        k: keys [B, T, Hk, K], H a multiple of Hk.
        v: values [B, T, Hk, V].
        log_decay: [Hk] or [B, T, Hk], each <= 0. None: no decay.
        initial_state: [N, Hk, D, V], D of `state_size`: (K + p - 1)! / (p! (K - 1)!) of the tight expansion.
        initial_sum_of_keys: [N, Hk, D].
        cu_seqlens: [N + 1]; without, N = B.

    The others, and more of these, as for `retention`.

    Returns:
        out [B, T, H, V]; with return_state (out, state, sum_of_keys), of the shapes of the initial ones; with
        return_weights the weights [B, H, T, T] last, w_ts divided by their sum. Where out is not normalized there is no
        sum of keys, and the weights are scale^p w_ts.

    Raises: as `retention`.
    """
    return retention(
        q, k, v, log_decay, scale=scale, degree=degree, normalize=normalize, form=form, chunk_size=chunk_size,
        initial_state=initial_state, initial_sum_of_keys=initial_sum_of_keys, cu_seqlens=cu_seqlens,
        return_state=return_state, return_weights=return_weights, state_layout=state_layout, expansion=expansion,
        out=out,
    )  # fmt: skip


class Gradients(NamedTuple):
    """Of a loss, for the arguments of `retention` of these names, and of their shapes; None for what was not wanted."""

    q: Any
    k: Any
    v: Any
    log_decay: Any
    initial_state: Any
    initial_sum_of_keys: Any


def retention_backward(
    dout: Array | None,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None = None,
    *,
    out: Array | None = None,
    scale: float | None = None,
    degree: int = 1,
    normalize: bool | None = None,
    form: Literal["auto", "parallel", "chunkwise", "recurrent"] = "auto",
    chunk_size: int | None = None,
    initial_state: Array | None = None,
    initial_sum_of_keys: Array | None = None,
    dfinal_state: Array | None = None,
    dfinal_sum_of_keys: Array | None = None,
    cu_seqlens: Array | None = None,
    states: Array | None = None,
    state_interval: int | None = None,
    wanted: Iterable[str] | None = None,
    gradients: Gradients | None = None,
    state_layout: Literal["kv", "vk"] = "kv",
    expansion: Literal["tight", "tiled"] = "tight",
) -> Gradients:
    """Gradients of `retention`: of a loss whose derivatives by its results are given. From the last token to the first,
    with a_t = exp(log_decay_t) and J(x) the derivative of phi at x, [D, K] (degree 1: the identity):

        dn_t = scale^p dout_t,  dm_t = 0                    of phi(q_t) S_t and phi(q_t) s_t
        dn_t = dout_t / m_t,    dm_t = -(out_t . dout_t) / m_t      where out is normalized, m_t = phi(q_t) s_t
        dS_t = a_{t+1} dS_{t+1} + phi(q_t)^T dn_t           from dfinal_state, which stands for a_{T+1} dS_{T+1}
        ds_t = a_{t+1} ds_{t+1} + phi(q_t) dm_t             likewise from dfinal_sum_of_keys
        q_t: J(q_t)^T (S_t dn_t + s_t dm_t)
        k_t: J(k_t)^T (dS_t v_t + ds_t)
        v_t: dS_t^T phi(k_t)
        log_decay_t: a_t (<dS_t, S_{t-1}> + <ds_t, s_{t-1}>)        of a decay per head: the sum over batch and time
        initial_state: a_1 dS_1                             initial_sum_of_keys: a_1 ds_1

    Nothing but `out` has to be kept from the forward call, and that only where it is normalized: states are computed
    again, chunk by chunk (holdfast.h: holdfast_backward says where, and how much memory it takes). With the `states`
    that it returned a fifth of the time is saved. The gradients are
    the same in every form, to rounding. Those of the two parts of a sequence that is cut are those of the whole, if the
    second part's of its initial state and sum of keys are given to the first part as those of its final ones.

    Args:
        dout: gradient of out, [B, T, H, V]. None: zeros.
        q, k, v, log_decay: as they were given to `retention`, and so scale, degree, normalize, initial_state,
            initial_sum_of_keys and cu_seqlens.
        out: what `retention` returned; needed where it is normalized, else checked if it is given, but not read.
        form: "parallel" computes from all T x T weights, for a degree above 1 or normalization where there are no
            states; all else is chunkwise. "auto": the library's choice.
        chunk_size: work on at most this many tokens at a time; changes rounding, speed and memory, nothing else.
        dfinal_state: gradient of the final state, [N, Hk, D, V]. None: zeros.
        dfinal_sum_of_keys: gradient of the final sum of keys, [N, Hk, D], where out is normalized. None: zeros.
        states, state_interval: what `retention` returned for that interval, [M, Hk, D, V].
        wanted: names of fields of Gradients; the others cost nothing. None: all that are given.
            "initial_state" (and "initial_sum_of_keys") may be wanted where zeros stood for them.
        gradients: arrays that are written in place and returned themselves, such as those of the call before: new
            memory takes a tenth longer. What is None here is made, if it is wanted; what is given is wanted.
        state_layout: of states and their gradients: "kv", [.., D, V], or "vk", [.., V, D].
        expansion: order of the features of states and their gradients, as in `retention`.

    Returns:
        Gradients, whose arrays are new and of q's kind, as from `retention`, unless they are given: those of q, k and v
        of their dtype, rounded once from float32, the others float32.

    Arrays are as for `retention`: dout and out have the dtype of q, k and v. Results are the same bits from call to
    call, for any number of threads, and whatever else is wanted, but that a gradient of states makes a degree above 1
    go by chunks.

    Raises: see the module. A positive or NaN decay is a ValueError.
    """
    given = (q, k, v, log_decay, initial_state, initial_sum_of_keys)
    into = (None,) * len(given)
    if gradients is not None:
        if not isinstance(gradients, Iterable):
            raise TypeError(f"gradients is of type {type(gradients).__name__}; expected Gradients, or None")
        into = tuple(gradients)
    if len(into) != len(given):
        raise ValueError(f"gradients has {len(into)} arrays; expected {len(given)}, those of Gradients")
    if wanted is None:
        bits = sum(1 << n for n, x in enumerate(given) if x is not None)
    else:
        if isinstance(wanted, str) or not isinstance(wanted, Iterable):  # a str would be one of letters
            raise TypeError(
                f"wanted is of type {type(wanted).__name__}; expected several names of fields of Gradients, or None"
            )
        bits = 0
        for name in wanted:
            if name not in Gradients._fields:
                expected = ", ".join(map(repr, Gradients._fields))
                raise ValueError(f"wanted has {name!r}; expected names of {expected}")
            bits |= 1 << Gradients._fields.index(name)
    options = None
    if not _same((degree, normalize, form, False, state_layout, expansion, state_interval), _DEFAULTS):
        options = _options(q, degree, normalize, form, False, state_layout, expansion, state_interval)
    stream = 1
    if (device := _gpu(q)) is not None:
        _check_no_states(state_interval)
        into = _gradients_on_gpu(q, k, v, log_decay, into, bits, options, cu_seqlens)
        stream = _cuda_stream(q) if device in _CUDA else 0
    results = _holdfast.backward(
        dout, q, k, v, log_decay, out, scale, chunk_size, initial_state, initial_sum_of_keys, dfinal_state,
        dfinal_sum_of_keys, cu_seqlens, bits, into if any(x is not None for x in into) else None, options, stream,
        states,
    )  # fmt: skip
    return Gradients(*(x if x is None or x is there else _like(q, x) for x, there in zip(results, into, strict=True)))


def retention_step(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    state: Array,
    sum_of_keys: Array | None = None,
    *,
    scale: float | None = None,
    degree: int = 1,
    normalize: bool | None = None,
    state_layout: Literal["kv", "vk"] = "kv",
    expansion: Literal["tight", "tiled"] = "tight",
    out: Array | None = None,
) -> Any:
    """One token of `retention`, the state updated in place (decay first, then write): what a model does for each token
    that it generates.

        state <- exp(log_decay) state + phi(k)^T v
        sum_of_keys <- exp(log_decay) sum_of_keys + phi(k)      where out is normalized
        out = scale^p phi(q) state                              or phi(q) state / phi(q) sum_of_keys

    Args:
        q: queries [B, H, K].
        k: keys [B, Hk, K], H a multiple of Hk: head h of q and out has head h // (H // Hk) of everything else.
        v: values [B, Hk, V].
        log_decay: natural logarithm of the decay, [Hk] or [B, Hk], each <= 0; -infinity forgets all that came before.
            None: no decay.
        state: [B, Hk, D, V], read and written.
        sum_of_keys: [B, Hk, D], read and written: given just where out is normalized.
        scale: multiplies q.k, before the power; finite, not 0. None: K^-1/2.
        degree: p, the power of q.k: 1 to 4.
        normalize: divide by the sum of weights. None: degree > 1.
        state_layout: of the state: "kv", [.., D, V], or "vk", [.., V, D].
        expansion: order of the D features of expanded keys, as for `retention`.
        out: written in place and returned itself, [B, H, V].

    Returns:
        out [B, H, V]: a new array of q's kind, as from `retention`, unless `out` is given.

    Arrays are as for `retention`; neither `state`, `sum_of_keys` nor `out` may share memory with another one. Results
    are those of `retention` with T = 1, on the CPU to the bit. `out` spares the making of an array, which takes as long
    as a small step.

    Raises: see the module. A positive or NaN decay is a ValueError. After an error other than MemoryError and
    RuntimeError the state is as it was.
    """
    options = _STEP
    if not _same((degree, normalize, state_layout, expansion), _STEP_DEFAULTS):
        options = (
            _degree(degree),
            _option("normalize", normalize, _NORMALIZE),
            _option("state_layout", state_layout, _STATE_LAYOUTS),
            _option("expansion", expansion, _EXPANSIONS),
        )
    stream, given = 1, out
    if (device := _gpu(q)) is not None:
        given = _on_gpu(q, k, v, False, out, None, None, "B")[0]
        stream = _cuda_stream(q) if device in _CUDA else 0
    result = _holdfast.step(q, k, v, log_decay, state, scale, given, stream, sum_of_keys, *options)
    return _like(q, result) if given is None else result


def state_size(key_size: int, degree: int = 1, expansion: Literal["tight", "tiled"] = "tight") -> int:
    """D, the rows of a state and the size of a sum of keys, for keys of `key_size` elements: of the tight expansion
    (K + p - 1)! / (p! (K - 1)!), of the tiled one, which is of degree 2 and for multiples of 16, 128 (K/16) (K/16 + 1).

    Raises: TypeError for a key_size that is not an int; ValueError where there is no such expansion."""
    if expansion not in _EXPANSIONS:
        raise ValueError(f"expansion is {expansion!r}; expected 'tight' or 'tiled'")
    elements, power = _integer("key_size", key_size), _degree(degree)
    if size := _holdfast.state_size(elements, power, _EXPANSIONS[expansion]) if 0 < elements < 2**31 else 0:
        return size
    raise ValueError(
        f"key_size is {key_size}, degree {degree} and expansion {expansion!r}; expected at least 1, 1 to 4, and "
        "for 'tiled' degree 2 and a multiple of 16"
    )


def state_interval(key_size: int, value_size: int, dtype: Any = np.float32) -> int:
    """The `state_interval` that suits gradients of `retention`: the least power of two with which `states`, but for two
    of a head, are at most an eighth of what q, k, v, out and their gradients take, and at least 256, or 128 where a
    state takes more than 32 KiB. For keys and values of such sizes and rows of `dtype`, of 32 or 16 bits: NumPy's,
    PyTorch's, or what makes one of NumPy's.

    Raises: ValueError for sizes below 1 and other types."""
    size = getattr(dtype, "itemsize", None)
    if (bytes_of_element := size if isinstance(size, int) else np.dtype(dtype).itemsize) not in (2, 4):
        raise ValueError(f"dtype is {dtype!r}; expected one of 32 or 16 bits")
    sizes = _integer("key_size", key_size), _integer("value_size", value_size)
    if interval := _holdfast.state_interval(*sizes, bytes_of_element == 4) if 0 < max(sizes) < 2**31 else 0:
        return interval
    raise ValueError(f"key_size is {key_size} and value_size {value_size}; expected at least 1, below 2^31")


def convert_state(
    state: Array,
    key_size: int,
    expansion: Literal["tight", "tiled"],
    *,
    out: Array | None = None,
) -> Any:
    """A state [N, Hk, D, V] or sum of keys [N, Hk, D] of degree 2 in the other order of features, the tight one or the
    tiled one of the published power-retention package. What it is in now follows from D.

        phi(q) state = phi'(q) out                          to rounding, phi' the expansion of that order

    Args:
        state: float32, on the CPU.
        key_size: K, a multiple of 16.
        expansion: the order that is wanted.
        out: written in place and returned itself; shares no memory with state.

    Returns:
        out [N, Hk, D', V] or [N, Hk, D'], D' = state_size(key_size, 2, expansion): a new array of state's kind, unless
        `out` is given.

    Raises: ValueError for a D that is none of key_size, and see the module."""
    state_size(key_size, 2, expansion)  # where there is none, an error
    result = _holdfast.convert_state(key_size, state, _EXPANSIONS[expansion], out)
    return _like(state, result) if out is None else result


def rotate(
    x: Array,
    theta: Array,
    offset: int = 0,
    interleaved: bool = False,
    *,
    positions: Array | None = None,
    out: Array | None = None,
) -> Any:
    """Rotary position embedding (RoPE, the rotary half of xPos): turns each pair j of features of each token and head.

        angle = theta_j position
        out_0 = x_0 cos(angle) - x_1 sin(angle)
        out_1 = x_1 cos(angle) + x_0 sin(angle)

    The angle is exact for every position of 64 bits and every theta; cos and sin are off by 1.7e-7 at most. The product
    is in float32 and rounded once.

    Args:
        x: queries or keys [B, T, H, K], K even.
        theta: [K/2], how far each pair turns from one position to the next, in radians (`theta`); float32.
        offset: position of the first token, of 64 bits, also negative.
        interleaved: pairs are features 2 j and 2 j + 1; else j and j + K/2.
        positions: of each token, [T] or [B, T], int64 or int32. None: offset + t.
        out: written in place and returned itself, [B, T, H, K]; may be x.

    Returns:
        out [B, T, H, K]: a new array of x's kind, as from `retention`, unless `out` is given.

    x and out have one dtype: float32, float16 or bfloat16. All arrays are on one device, of any strides but with a
    contiguous last axis (positions: any strides). `out` may be exactly x, and shares no memory with anything else.

    Raises: see the module; TypeError for an offset that is not an int, ValueError for one beyond 64 bits.
    """
    given, stream = _out_on_gpu(x, out)
    result = _holdfast.rotate(x, theta, _offset(offset), positions, bool(interleaved), given, stream)
    return _like(x, result) if given is None else result


def rotate_backward(
    dout: Array,
    theta: Array,
    offset: int = 0,
    interleaved: bool = False,
    *,
    positions: Array | None = None,
    dx: Array | None = None,
) -> Any:
    """The gradient of `rotate` with respect to x: turns each pair by the opposite angle.

        angle = theta_j position
        dx_0 = dout_0 cos(angle) + dout_1 sin(angle)
        dx_1 = dout_1 cos(angle) - dout_0 sin(angle)

    As exact as `rotate`, at every position.

    Args:
        dout: gradient of out [B, T, H, K].
        theta, offset, interleaved, positions: as `rotate` got them.
        dx: written in place and returned itself, [B, T, H, K]; may be dout.

    Returns:
        dx [B, T, H, K]: a new array of dout's kind, as from `retention`, unless `dx` is given.

    dout and dx have one dtype: float32, float16 or bfloat16. All arrays are on one device, of any strides but with a
    contiguous last axis (positions: any strides). `dx` may be exactly dout, and shares no memory with anything else.

    Raises: as `rotate`.
    """
    given, stream = _out_on_gpu(dout, dx, "dout")
    result = _holdfast.rotate_backward(dout, theta, _offset(offset), positions, bool(interleaved), given, stream)
    return _like(dout, result) if given is None else result


def head_norm_gate(
    x: Array,
    gate: Array | None = None,
    weight: Array | None = None,
    norm: Literal["rms", "layer"] = "rms",
    eps: float = 1e-6,
    *,
    out: Array | None = None,
) -> Any:
    """The norm of each head after retention, then the swish gate, row by row of V features:

        y = x / sqrt(mean(x^2) + eps)                        norm "rms"
        y = (x - mean(x)) / sqrt(variance(x) + eps)          norm "layer"; the variance of the row, divided by V
        out = y weight gate / (1 + exp(-gate))

    Args:
        x: outputs of retention [B, T, H, V].
        gate: [B, T, H, V]. None: no gate.
        weight: float32, [V] for all heads or [H, V]. None: ones.
        norm: "rms" (RetNet's reference) or "layer" (layer norm of each head: group norm).
        eps: added to the mean square, or to the variance; finite, at least 0.
        out: written in place and returned itself, [B, T, H, V]; may be x or gate.

    Returns:
        out [B, T, H, V]: a new array of x's kind, as from `retention`, unless `out` is given.

    x, gate and out have one dtype: float32, float16 or bfloat16. All is computed in float32 and rounded once; rows far
    from 0 lose nothing. All arrays are on one device, of any strides but with a contiguous last axis. `out` may be
    exactly x or gate, and shares no memory with anything else.

    Raises: see the module.
    """
    layer_norm, eps = _norm(norm, eps)
    given, stream = _out_on_gpu(x, out)
    result = _holdfast.head_norm_gate(x, gate, weight, layer_norm, eps, given, stream)
    return _like(x, result) if given is None else result


def head_norm_gate_backward(
    dout: Array,
    x: Array,
    gate: Array | None = None,
    weight: Array | None = None,
    norm: Literal["rms", "layer"] = "rms",
    eps: float = 1e-6,
    *,
    dx: Array | bool = True,
    dgate: Array | bool = True,
    dweight: Array | bool = True,
) -> tuple[Any, Any, Any]:
    """The gradients of `head_norm_gate`. With n = y / d the row normed by d = sqrt(mean(x^2) + eps), for norm "layer"
    sqrt(variance(x) + eps), p = 1 / (1 + exp(-gate)) and s = gate p, of every row of V features:

        u = dout weight s
        dx = (u - n mean(u n)) / d                           norm "rms"
        dx = (u - mean(u) - n mean(u n)) / d                 norm "layer"
        dgate = dout weight n p (1 + gate (1 - p))
        dweight = sum of dout n s                            over all tokens and entries; of a weight [V] over heads too

    Nothing of the call of `head_norm_gate` is needed but its arguments.

    Args:
        dout: gradient of out [B, T, H, V].
        x, gate, weight, norm, eps: as `head_norm_gate` got them.
        dx, dgate, dweight: True: wanted, where there is such an argument. False: not wanted, and costs nothing. Or an
            array that is written in place and returned itself.

    Returns:
        (dx, dgate, dweight), each of the shape of what it is the gradient of: new arrays of x's kind, as from
        `retention`, unless they are given; None for what is not wanted or not there.

    dout, x, gate, dx and dgate have one dtype: float32, float16 or bfloat16; weight and dweight are float32. All is
    computed in float32, and dx and dgate are rounded once. All arrays are on one device, of any strides but with a
    contiguous last axis. Gradients share no memory with anything else.

    Raises: see the module.
    """
    layer_norm, eps = _norm(norm, eps)
    there = ((dx, x), (dgate, gate), (dweight, weight))
    wanted = [None if d is False or (d is True and of is None) else d for d, of in there]
    _, stream = _out_on_gpu(x, True)
    if _gpu(x) is not None and any(d is True for d in wanted):
        library = _library("x", x, True)
        shapes = [(x.shape, x.dtype)] * 2 + [(getattr(weight, "shape", ()), library.float32)]
        wanted = [
            library.empty(tuple(shape), dtype=dtype, device=x.device) if d is True else d
            for d, (shape, dtype) in zip(wanted, shapes, strict=True)
        ]
    results = _holdfast.head_norm_gate_backward(dout, x, gate, weight, layer_norm, eps, tuple(wanted), stream)
    dx, dgate, dweight = (_like(x, r) if d is True else r for r, d in zip(results, wanted, strict=True))
    return dx, dgate, dweight


def theta(key_size: int, convention: Literal["retnet", "rope"] = "retnet") -> np.ndarray:
    """Angles from one position to the next, for `rotate`: theta [key_size / 2], float32, computed in float64.

    retnet: theta_j = 10000^(-x_j), x = linspace(0, 1, key_size / 2) (RetNet's reference, with interleaved pairs)
    rope:   theta_j = 10000^(-2 j / key_size) (most others, with halves)

    Raises: TypeError for a key_size that is not an int; ValueError for one that is not even or below 2, or an unknown
    convention.
    """
    size = _integer("key_size", key_size)
    if size < 2 or size % 2:
        raise ValueError(f"key_size is {size}; expected an even number, at least 2")
    if convention == "retnet":
        exponents = np.linspace(0, 1, size // 2)
    elif convention == "rope":
        exponents = np.arange(size // 2) * 2 / size
    else:
        raise ValueError(f"convention is {convention!r}; expected 'retnet' or 'rope'")
    return (10000.0**-exponents).astype(np.float32)


def decay(num_heads: int, convention: Literal["retnet", "linspace"] = "retnet") -> np.ndarray:
    """Constant decays of RetNet's heads: log_decay [num_heads] = log gamma, float32, computed in float64.

    retnet:   gamma_h = 1 - 2^(-5 - h), h = 0, 1, ... (the paper)
    linspace: gamma_h = 1 - exp(x_h), x = linspace(log 1/32, log 1/512, num_heads) (the reference implementation)

    Raises: TypeError for a num_heads that is not an int; ValueError for a negative one, or an unknown convention.
    """
    heads = _integer("num_heads", num_heads)
    if heads < 0:
        raise ValueError(f"num_heads is {heads}; expected at least 0")
    if convention == "retnet":
        forgotten = np.exp2(-5.0 - np.arange(heads))
    elif convention == "linspace":
        forgotten = np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), heads))
    else:
        raise ValueError(f"convention is {convention!r}; expected 'retnet' or 'linspace'")
    return np.log1p(-forgotten).astype(np.float32)


def info() -> dict[str, Any]:
    """What was compiled into this library, and what would run here.

    version:      of the library
    cpu_features: of this machine, those that the library knows
    backends:     {name: {"compiled", "available", "why_not", "devices": their names, "targets": of its own}}: "cpu",
                  "cuda", "metal", "opencl", "vulkan". Looking for GPUs loads their drivers
    targets:      best first: [{"name", "runs_here", "missing": CPU features that it lacks, or why its backend does not
                  run}]
    variants:     best target first: [{"name", "kernel", "dtype", "chunk", "key_size", "value_size", "target",
                  "row_alignment", "round_operands", "degree", "runs_here", "missing", "selected"}]; chunk 0: the kernel
                  has none; sizes and degree 0: any; row_alignment: all rows of q, k, v and out start at multiples of so
                  many bytes, or another variant runs; round_operands: products read weights and states rounded to
                  dtype; selected: calls of the kernel with these sizes and such rows run it, of "recurrent" for
                  single tokens or for blocks of chunk (set_target and HOLDFAST_TARGET are heeded)

    A wrong HOLDFAST_TARGET is no error here: the backend "cpu" is not available then, and says why.
    """
    variants, why_not = _holdfast.variants()
    backends = _holdfast.backends()
    backends["cpu"].update(available=not why_not, why_not=why_not)
    targets = {
        v["target"]: {"name": v["target"], **{key: v[key] for key in ("runs_here", "missing")}} for v in variants
    }
    return {
        "version": __version__,
        "cpu_features": _holdfast.cpu_features().split(),
        "backends": backends,
        "targets": list(targets.values()),
        "variants": variants,
    }


def set_num_threads(threads: int) -> None:
    """At most this many threads work on a call, the calling one included. 0, the default: one per core that the process
    may use. For all calls that begin after this one, of all threads. A forked process (multiprocessing's "fork") has
    one thread whatever is set. ValueError unless 0 <= threads <= 256."""
    if not isinstance(threads, int):
        raise TypeError(f"threads is of type {type(threads).__name__}; expected int")
    _holdfast.set_num_threads(threads)


def get_num_threads() -> int:
    """What set_num_threads has set; 0: one per core that the process may use."""
    return _holdfast.get_num_threads()


def set_target(target: str | None) -> None:
    """Force the target ("avx512", "avx2", "generic", ...: `info`) whose variants run. None goes back to the default:
    the environment variable HOLDFAST_TARGET where it is set, read once, else the best that this machine runs. For all
    calls that begin after this one, of all threads.

    Raises: TargetUnavailable for an unknown name or a target that does not run here; the option then stays as it was.
    With a wrong HOLDFAST_TARGET, the calls that would use it raise it."""
    if not isinstance(target, str | None):
        raise TypeError(f"target is of type {type(target).__name__}; expected str or None")
    _holdfast.set_target(target)


def set_backend(backend: str | None) -> None:
    """Force the backend ("cpu", "cuda", "metal", "opencl", "vulkan": `info`) whose best target runs, also for arrays on
    the CPU, which are copied to the GPU and back then. None goes back to the default: that of the arrays' device. For
    all calls that begin after this one, of all threads.

    Raises: TargetUnavailable for an unknown name or a backend that cannot run here; the option then stays as it was."""
    if not isinstance(backend, str | None):
        raise TypeError(f"backend is of type {type(backend).__name__}; expected str or None")
    _holdfast.set_backend(backend)


def set_verbose(listener: Callable[[str], object] | None) -> None:
    """Call `listener` with one line for each kernel call: which variant runs, why, and on what. None, the default:
    silence. It is called before the work begins, by the thread that made the call; what it raises is reported to
    sys.unraisablehook and does not stop the call. For all calls that begin after this one, of all threads."""
    if not (listener is None or callable(listener)):
        raise TypeError(f"listener is of type {type(listener).__name__}; expected a function that takes a str, or None")
    _holdfast.set_verbose(listener)


_DEFAULTS = (1, None, "auto", False, "kv", "tight", None)
_STEP_DEFAULTS = (1, None, "kv", "tight")

# As in holdfast.h.
_NORMALIZE = {None: 0, False: 1, True: 2}
_FLAGS = {False: False, True: True}
_FORMS = {"auto": 0, "parallel": 1, "chunkwise": 2, "recurrent": 3}
_STATE_LAYOUTS = {"kv": 0, "vk": 1}
_EXPANSIONS = {"tight": 0, "tiled": 1}
_STEP = (1, 0, 0, 0)  # _STEP_DEFAULTS


def _option(name: str, value: Any, numbers: dict[Any, int]) -> int:
    try:
        return numbers[value]
    except (KeyError, TypeError):
        expected = ", ".join(map(repr, numbers))
        raise ValueError(f"{name} is {value!r}; expected one of {expected}") from None


def _integer(name: str, value: Any, otherwise: str = "") -> int:
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"{name} is of type {type(value).__name__}; expected an int{otherwise}") from None


def _same(options: tuple, defaults: tuple) -> bool:
    try:
        return options == defaults
    except Exception:  # of arrays, which are neither: whoever reads that option names it
        return False


def _degree(degree: Any) -> int:
    try:
        if degree in (1, 2, 3, 4):
            return int(degree)
    except Exception:  # an array is neither in there nor not
        pass
    raise ValueError(f"degree is {degree!r}; expected 1, 2, 3 or 4")


def _key_size(q: Any) -> int:
    """Of an array on a GPU. Of others only the module knows it: not all have a shape."""
    return int(q.shape[-1]) if getattr(q, "shape", ()) else 1


def _expanded_size(key_size: int, degree: int, expansion: str) -> int:
    """D of holdfast.h: features of an expanded key."""
    if expansion == "tiled":
        return 128 * (key_size // 16) * (key_size // 16 + 1)
    size = 1
    for factor in range(degree):  # of whole numbers each time: key_size may be a symbol of PyTorch's
        size = size * (key_size + factor) // (factor + 1)
    return size


def _options(
    q: Any,
    degree: Any,
    normalize: Any,
    form: Any,
    return_weights: bool,
    state_layout: Any,
    expansion: Any,
    state_interval: int | None,
) -> tuple[int, int, int, int, int, int, bool, bool, int]:
    """The options of a call as numbers: Options of module.cpp."""
    power, normalized = _degree(degree), _option("normalize", normalize, _NORMALIZE)
    return (
        power,
        normalized,
        _option("form", form, _FORMS),
        _option("state_layout", state_layout, _STATE_LAYOUTS),
        _option("expansion", expansion, _EXPANSIONS),
        0 if power == 1 else _expanded_size(_key_size(q), power, expansion),
        normalized == 2 or (normalized == 0 and power > 1),
        return_weights,
        _state_interval(state_interval),
    )


def _state_interval(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool):
        raise TypeError("state_interval is of type bool; expected an int, or None")
    if (interval := _integer("state_interval", value, ", or None")) < 1 or interval >= 1 << 63:
        raise ValueError(f"state_interval is {interval}; expected at least 1, below 2^63, or None")
    return interval


def _check_form(form: str, return_weights: bool, state_interval: int | None = None) -> None:
    """That it has what is wanted beside out and states."""
    if return_weights and form != "parallel":
        raise ValueError(f"return_weights is True and form is {form!r}; expected 'parallel'")
    if state_interval is not None and form in ("parallel", "recurrent"):
        raise ValueError(f"state_interval is {state_interval} and form is {form!r}; expected 'chunkwise' or 'auto'")


def _check_no_states(state_interval: int | None) -> None:
    if state_interval is not None:
        raise NotImplementedError(f"state_interval is {state_interval} and q is on a GPU; expected None")


_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_GPUS = (*_CUDA, 4, 7, 8)  # kDLOpenCL, kDLVulkan, kDLMetal


def _gpu(q: Any) -> int | None:
    """DLPack's type of the GPU that q is on; None where it is not, or does not say."""
    if isinstance(q, np.ndarray) or getattr(q, "is_cpu", None) is True or not hasattr(q, "__dlpack_device__"):
        return None  # is_cpu: PyTorch's, and quicker
    try:
        device = int(q.__dlpack_device__()[0])
    except Exception:  # the library says what is wrong
        return None
    return device if device in _GPUS else None


def _cuda_stream(q: Any) -> int:
    """The stream that is current for q's library, as DLPack numbers them: 1 is the default one."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(q, torch.Tensor):
        return torch.cuda.current_stream(q.device).cuda_stream or 1
    if cupy is not None and isinstance(q, cupy.ndarray):
        return cupy.cuda.get_current_stream().ptr or 1
    return 1


def _library(name: str, x: Any, needed: bool) -> Any:
    """What makes new arrays where x is, a GPU; None where nothing does."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return torch
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    if needed:
        raise NotImplementedError(
            f"{name} is on a GPU and of type {type(x).__name__}, of which no new array can be made; "
            "expected an array of the array API"
        )
    return None


def _offset(offset: int) -> int:
    first = _integer("offset", offset)
    if not -(2**63) <= first < 2**63:
        raise ValueError(f"offset is {first}; expected an int of 64 bits")
    return first


def _norm(norm: str, eps: float) -> tuple[bool, float]:
    """Whether it is layer norm, and eps."""
    if norm not in ("rms", "layer"):
        raise ValueError(f"norm is {norm!r}; expected 'rms' or 'layer'")
    if isinstance(eps, bool) or not isinstance(eps, (int, float, np.integer, np.floating)):
        raise TypeError(f"eps is of type {type(eps).__name__}; expected a number")
    return norm == "layer", float(eps)


def _out_on_gpu(x: Any, out: Any, name: str = "x") -> tuple[Any, int]:
    """(out, stream) of a call whose out has the shape of x: on a GPU made by x's library, if it is not given."""
    if (device := _gpu(x)) is None:
        return out, 1
    if out is None:
        out = _library(name, x, True).empty(tuple(x.shape), dtype=x.dtype, device=x.device)
    return out, _cuda_stream(x) if device in _CUDA else 0


def _on_gpu(
    q: Any, k: Any, v: Any, return_state: bool, out: Any, options: tuple | None, cu_seqlens: Any, axes: str
) -> tuple[Any, Any, Any, None, Any]:
    """(out, state, sum of keys, None, weights), made where q is by q's own library if they are wanted and not given."""
    if (library := _library("q", q, out is None or return_state)) is None:
        return out, None, None, None, None
    _check_ranks(q, k, v, axes)
    *rows, h, key_size = q.shape
    state, sum_of_keys = _shapes_of_states(q, k, v, options, cu_seqlens)
    *_, sums, weights, _ = options or (False, False, 0)

    def new(shape: tuple[int, ...], dtype: Any, wanted: bool) -> Any:
        return library.empty(shape, dtype=dtype, device=q.device) if wanted else None

    return (
        new((*rows, h, v.shape[-1]), q.dtype, True) if out is None else out,
        new(state, library.float32, return_state),
        new(sum_of_keys, library.float32, return_state and sums),
        None,
        new((rows[0], h, rows[-1], rows[-1]), q.dtype, weights),
    )


def _gradients_on_gpu(
    q: Any, k: Any, v: Any, log_decay: Any, into: tuple, bits: int, options: tuple | None, cu_seqlens: Any
) -> tuple:
    """`into`, with what is wanted and not given made where q is by q's own library."""
    missing = [bits >> n & 1 and x is None for n, x in enumerate(into)]
    if (library := _library("q", q, any(missing))) is None:
        return into
    _check_ranks(q, k, v, "BT")
    decays = getattr(log_decay, "shape", (*q.shape[:2], k.shape[-2]))
    shapes = (q.shape, k.shape, v.shape, decays, *_shapes_of_states(q, k, v, options, cu_seqlens))
    return tuple(
        library.empty(tuple(shape), dtype=q.dtype if n < 3 else library.float32, device=q.device) if miss else x
        for n, (x, shape, miss) in enumerate(zip(into, shapes, missing, strict=True))
    )


def _check_ranks(q: Any, k: Any, v: Any, axes: str) -> None:
    before = ", ".join(axes)
    for name, x, last in (("q", q, "H, K"), ("k", k, "Hk, K"), ("v", v, "Hk, V")):
        rank = len(getattr(x, "shape", ()))
        if rank != len(axes) + 2:
            raise ValueError(f"{name} has {rank} dimensions; expected {len(axes) + 2}, [{before}, {last}]")


def _shapes_of_states(q: Any, k: Any, v: Any, options: tuple | None, cu_seqlens: Any) -> tuple[tuple, tuple]:
    """Those of a state and of a sum of keys."""
    key_heads, value_size = k.shape[-2], v.shape[-1]
    _, _, _, value_major, _, expanded, *_ = options or (1, 0, 0, 0, 0, 0)
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    size = expanded or q.shape[-1]
    state = (sequences, key_heads, value_size, size) if value_major else (sequences, key_heads, size, value_size)
    return state, (sequences, key_heads, size)


def _like(q: Any, result: np.ndarray) -> Any:
    """The result as an array of q's kind, in the same memory. Results in uint16 are the bits of bfloat16."""
    bfloat16 = result.dtype == np.uint16
    if isinstance(q, np.ndarray):
        return result.view(q.dtype) if bfloat16 else result
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    if torch is not None and isinstance(q, torch.Tensor):
        return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16) if bfloat16 else torch.from_numpy(result)
    exporter = BFloat16Array(result) if bfloat16 else result
    if hasattr(q, "__array_namespace__"):
        return q.__array_namespace__().from_dlpack(exporter)
    return exporter
