"""Holdfast's functions on PyTorch's tensors, differentiable: `retention`, `power_retention`, `rotate` and
`head_norm_gate`, and `retention_step`, which advances a state in place.

Names, arguments, shapes and formulas are those of `holdfast`, except that there is no `out`: results are new tensors.
Each function is a custom operator, `torch.ops.holdfast.*`, so torch.compile (fullgraph), torch.export, autocast and
torch.func take it as they take PyTorch's own.

Tensors are on the CPU, or on CUDA, where the work is put into the current stream. q, k, v, x and gate are float32,
float16 or bfloat16, and results have their type; log_decay, states, sums of keys, theta and weight are float32. Under
autocast q, k and v are cast to its type, and what is float32 always to float32.

Gradients are those of `holdfast.retention_backward` and `holdfast.head_norm_gate_backward`: of every argument that is a
tensor of floating point, but theta; what needs no gradient costs none. Where that of q or of log_decay is needed, of
degree 1 without normalization on the CPU, `retention` keeps a state every `holdfast.state_interval` tokens for it (not
of packed sequences, nor in state_layout "vk"): but for two a head, at most an eighth of the memory that q, k, v, out
and their gradients take. `rotate`, which is linear, is differentiated any number of times and in forward mode too; to
differentiate the gradients of the others, or them in forward mode, raises NotImplementedError.

Errors name the argument, say what it was and what was expected, as those of `holdfast` do. PyTorch may be missing:
`import holdfast` does not need it.
"""

from __future__ import annotations

from typing import Any, Literal

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "holdfast.torch needs PyTorch, which is not installed: pip install 'holdfast[torch]'", name="torch"
    ) from error

import numpy as np
from torch import Tensor
from torch.autograd import forward_ad

try:
    # What torch.library.register_autograd makes refuses torch.func.grad (PyTorch's issue 170834; 2.13 has it), because
    # it is an autograd.Function, which works above the dispatcher. Below it, one transform at a time, this one does.
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.forward_ad import _set_fwd_grad_enabled
    from torch.autograd.function import _SingleLevelFunction
except ImportError:  # private, and may go
    _SingleLevelFunction = None

import holdfast

from . import (
    _EXPANSIONS,
    _FORMS,
    _NORMALIZE,
    _STATE_LAYOUTS,
    _check_form,
    _cuda_stream,
    _degree,
    _expanded_size,
    _holdfast,
    _integer,
    _offset,
    _option,
)

__all__ = [
    "convert_state",
    "decay",
    "head_norm_gate",
    "power_retention",
    "retention",
    "retention_step",
    "rotate",
    "state_size",
    "theta",
]


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    degree: int = 1,
    normalize: bool | None = None,
    form: Literal["auto", "parallel", "chunkwise", "recurrent"] = "auto",
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
    initial_sum_of_keys: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
    return_weights: bool = False,
    state_layout: Literal["kv", "vk"] = "kv",
    expansion: Literal["tight", "tiled"] = "tight",
) -> Any:
    """Retention of every sequence and head, as `holdfast.retention` says it: q [B, T, H, K], k [B, T, Hk, K],
    v [B, T, Hk, V], log_decay [Hk] or [B, T, Hk], initial_state [N, Hk, D, V], initial_sum_of_keys [N, Hk, D],
    cu_seqlens [N + 1].

        S_t = exp(log_decay_t) S_{t-1} + phi(k_t)^T v_t     S: [D, V], S_0 = initial_state, state = S_T
        s_t = exp(log_decay_t) s_{t-1} + phi(k_t)           s: [D], likewise sum_of_keys, where out is normalized
        out_t = scale^p phi(q_t) S_t                        phi(q).phi(k) = (q.k)^p; for p = 1 phi(x) = x
        out_t = phi(q_t) S_t / phi(q_t) s_t                 where out is normalized

    Returns:
        out [B, T, H, V]; or (out, state), (out, state, sum_of_keys), with the weights [B, H, T, T] last when asked for.
        All but the weights are differentiable, by q, k, v, log_decay, initial_state and initial_sum_of_keys.
    """
    _check_tensors(q=q, k=k, v=v)
    _check_optional_tensors(
        log_decay=log_decay,
        initial_state=initial_state,
        initial_sum_of_keys=initial_sum_of_keys,
        cu_seqlens=cu_seqlens,
    )
    _check_flags(return_state=return_state, return_weights=return_weights)
    if _SingleLevelFunction is None and _forward_mode():
        states = {"initial_state": initial_state, "initial_sum_of_keys": initial_sum_of_keys}
        _check_no_tangents("retention", q=q, k=k, v=v, log_decay=log_decay, **states)
    normalized = _normalized(degree := _degree(degree), normalize)
    for name, value, known in (
        ("form", form, _FORMS), ("state_layout", state_layout, _STATE_LAYOUTS), ("expansion", expansion, _EXPANSIONS)
    ):  # fmt: skip
        _option(name, value, known)
    _check_form(form, return_weights)
    if (dtype := _autocast_dtype(q)) is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        log_decay, initial_state, initial_sum_of_keys = map(_float32, (log_decay, initial_state, initial_sum_of_keys))
    keep_states = (
        torch.is_grad_enabled()
        and (q.requires_grad or (log_decay is not None and log_decay.requires_grad))
        and degree == 1
        and not normalized
        and form in ("auto", "chunkwise")
        and cu_seqlens is None
        and state_layout == "kv"
        and q.device.type == "cpu"
        and (torch.compiler.is_compiling() or min(q.ndim, v.ndim) < 4 or _has_states_inside(q, v))
    )
    out, state, sum_of_keys, weights, _ = torch.ops.holdfast.retention(
        q, k, v, log_decay, initial_state, initial_sum_of_keys, cu_seqlens, _number("scale", scale), degree, normalized,
        form, _chunk_size(chunk_size), return_state, return_weights, state_layout, expansion, keep_states,
    )  # fmt: skip
    results = (out,)
    if return_state:
        results += (state, sum_of_keys) if normalized else (state,)
    if return_weights:
        results += (weights,)
    return results if len(results) > 1 else out


def power_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    degree: int = 2,
    normalize: bool = True,
    form: Literal["auto", "parallel", "chunkwise", "recurrent"] = "auto",
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
    initial_sum_of_keys: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
    return_weights: bool = False,
    state_layout: Literal["kv", "vk"] = "kv",
    expansion: Literal["tight", "tiled"] = "tight",
) -> Any:
    """`retention` with the defaults of power retention, as `holdfast.power_retention` says it: q [B, T, H, K],
    k [B, T, Hk, K], v [B, T, Hk, V], log_decay [Hk] or [B, T, Hk], initial_state [N, Hk, D, V], initial_sum_of_keys
    [N, Hk, D], cu_seqlens [N + 1]. Weights are powers of q.k, divided by their sum:

        out_t = sum_{s <= t} w_ts v_s / sum_{s <= t} w_ts
        w_ts = (q_t.k_s)^p exp(log_decay_{s+1} + .. + log_decay_t)

    Returns:
        out [B, T, H, V]; or (out, state, sum_of_keys), with the weights [B, H, T, T] last when asked for. All but the
        weights are differentiable, as those of `retention`.
    """
    return retention(
        q, k, v, log_decay, scale=scale, degree=degree, normalize=normalize, form=form, chunk_size=chunk_size,
        initial_state=initial_state, initial_sum_of_keys=initial_sum_of_keys, cu_seqlens=cu_seqlens,
        return_state=return_state, return_weights=return_weights, state_layout=state_layout, expansion=expansion,
    )  # fmt: skip


def retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    sum_of_keys: Tensor | None = None,
    *,
    scale: float | None = None,
    degree: int = 1,
    normalize: bool | None = None,
    state_layout: Literal["kv", "vk"] = "kv",
    expansion: Literal["tight", "tiled"] = "tight",
) -> Tensor:
    """One token of `retention`, the state updated in place, as `holdfast.retention_step` says it: q [B, H, K],
    k [B, Hk, K], v [B, Hk, V], log_decay [Hk] or [B, Hk], state [B, Hk, D, V], sum_of_keys [B, Hk, D].

        state <- exp(log_decay) state + phi(k)^T v
        sum_of_keys <- exp(log_decay) sum_of_keys + phi(k)      where out is normalized
        out = scale^p phi(q) state                              or phi(q) state / phi(q) sum_of_keys

    Not differentiable, for the state it starts from is gone: tensors that require grad are refused, but in no_grad().

    Returns: out [B, H, V], a new tensor.
    """
    _check_tensors(q=q, k=k, v=v, state=state)
    _check_optional_tensors(log_decay=log_decay, sum_of_keys=sum_of_keys)
    normalized = _normalized(degree := _degree(degree), normalize)
    if state_layout != "kv" or expansion != "tight":
        _option("state_layout", state_layout, _STATE_LAYOUTS)
        _option("expansion", expansion, _EXPANSIONS)
    if torch.is_grad_enabled():
        _check_no_grad(q=q, k=k, v=v, log_decay=log_decay, state=state, sum_of_keys=sum_of_keys)
    if _forward_mode():
        _check_no_tangents("retention_step", q=q, k=k, v=v, log_decay=log_decay, state=state, sum_of_keys=sum_of_keys)
    if (dtype := _autocast_dtype(q)) is not None:
        q, k, v, log_decay = q.to(dtype), k.to(dtype), v.to(dtype), _float32(log_decay)
    return torch.ops.holdfast.retention_step(
        q, k, v, log_decay, state, sum_of_keys, _number("scale", scale), degree, normalized, state_layout, expansion
    )


def rotate(
    x: Tensor,
    theta: Tensor,
    offset: int = 0,
    interleaved: bool = False,
    *,
    positions: Tensor | None = None,
) -> Tensor:
    """Rotary position embedding, as `holdfast.rotate` says it: x [B, T, H, K], theta [K/2], positions [T] or [B, T].

        angle = theta_j position
        out_0 = x_0 cos(angle) - x_1 sin(angle)
        out_1 = x_1 cos(angle) + x_0 sin(angle)

    Returns: out [B, T, H, K], a new tensor, differentiable by x, any number of times, in both modes.
    """
    _check_tensors(x=x, theta=theta)
    _check_optional_tensors(positions=positions)
    _check_flags(interleaved=interleaved)
    if _SingleLevelFunction is None and _forward_mode():
        _check_no_tangents("rotate", x=x, theta=theta)
    if not isinstance(offset, torch.SymInt) and not (isinstance(offset, int) and torch.compiler.is_compiling()):
        offset = _offset(offset)  # of a symbol nothing is asked: that would bind it
    if _autocast_dtype(x) is not None:
        theta = theta.float()
    return torch.ops.holdfast.rotate(x, theta, offset, interleaved, positions)


def head_norm_gate(
    x: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    norm: Literal["rms", "layer"] = "rms",
    eps: float = 1e-6,
) -> Tensor:
    """The norm of each head after retention, then the swish gate, as `holdfast.head_norm_gate` says it: x and gate
    [B, T, H, V], weight [V] or [H, V].

        y = x / sqrt(mean(x^2) + eps)                        norm "rms"
        y = (x - mean(x)) / sqrt(variance(x) + eps)          norm "layer"; the variance of the row, divided by V
        out = y weight gate / (1 + exp(-gate))

    Under autocast a gate of another type is cast to that of x.

    Returns: out [B, T, H, V], a new tensor, differentiable by x, gate and weight.
    """
    _check_tensors(x=x)
    _check_optional_tensors(gate=gate, weight=weight)
    if _SingleLevelFunction is None and _forward_mode():
        _check_no_tangents("head_norm_gate", x=x, gate=gate, weight=weight)
    if norm not in ("rms", "layer"):
        raise ValueError(f"norm is {norm!r}; expected 'rms' or 'layer'")
    if _autocast_dtype(x) is not None:
        gate, weight = None if gate is None else gate.to(x.dtype), _float32(weight)
    if (number := _number("eps", eps)) is None:
        raise TypeError("eps is of type NoneType; expected a number")
    return torch.ops.holdfast.head_norm_gate(x, gate, weight, norm, number)


@torch.compiler.assume_constant_result
def decay(
    num_heads: int,
    convention: Literal["retnet", "linspace"] = "retnet",
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """`holdfast.decay`: constant decays of RetNet's heads, log_decay [num_heads]."""
    return torch.from_numpy(holdfast.decay(num_heads, convention)).to(device or torch.get_default_device())


@torch.compiler.assume_constant_result
def theta(
    key_size: int,
    convention: Literal["retnet", "rope"] = "retnet",
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """`holdfast.theta`: angles from one position to the next for `rotate`, theta [key_size / 2]."""
    return torch.from_numpy(holdfast.theta(key_size, convention)).to(device or torch.get_default_device())


@torch.compiler.assume_constant_result
def state_size(key_size: int, degree: int = 1, expansion: Literal["tight", "tiled"] = "tight") -> int:
    """`holdfast.state_size`: D, the rows of a state and the size of a sum of keys."""
    return holdfast.state_size(key_size, degree, expansion)


def convert_state(state: Tensor, key_size: int, expansion: Literal["tight", "tiled"]) -> Tensor:
    """`holdfast.convert_state`, of tensors on the CPU: a state [N, Hk, D, V] or sum of keys [N, Hk, D] of degree 2 in
    the other order of features.

        phi(q) state = phi'(q) out                          to rounding, phi' the expansion of that order

    For exchange with other programs: it is no operator, and not differentiable.

    Returns: out [N, Hk, D', V] or [N, Hk, D'], D' = state_size(key_size, 2, expansion), a new tensor.
    """
    _check_tensors(state=state)
    if _forward_mode():
        _check_no_tangents("convert_state", state=state)
    return holdfast.convert_state(state, key_size, expansion)


_DEVICES = ("cpu", "cuda")

# ---- Arguments ------------------------------------------------------------------------------------------------------


def _check_tensors(**arguments: Any) -> None:
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is of type {type(x).__name__}; expected a torch.Tensor")
        if x.is_nested or x.layout is not torch.strided:
            _refuse_layout(name, x)


def _check_optional_tensors(**arguments: Any) -> None:
    for name, x in arguments.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is of type {type(x).__name__}; expected a torch.Tensor, or None")
        if x.is_nested or x.layout is not torch.strided:
            _refuse_layout(name, x)


def _refuse_layout(name: str, x: Tensor) -> None:
    kind = "nested" if x.is_nested else f"of layout {x.layout}"
    raise NotImplementedError(f"{name} is {kind}; expected a tensor of layout torch.strided, not nested")


def _check_flags(**arguments: Any) -> None:
    for name, x in arguments.items():
        if not isinstance(x, bool):
            raise ValueError(f"{name} is {x!r}; expected False or True")


def _check_no_grad(**arguments: Tensor | None) -> None:
    for name, x in arguments.items():
        if x is not None and x.requires_grad:
            raise NotImplementedError(
                f"{name} requires grad, and retention_step, which overwrites the state, has no gradient; expected "
                f"{name}.detach(), torch.no_grad(), or retention()"
            )


def _forward_mode() -> bool:
    """Whether tensors may have tangents."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def _check_no_tangents(function: str, **arguments: Tensor | None) -> None:
    """Where no autograd.Function sees them: they would be dropped."""
    for name, x in arguments.items():
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{name} has a tangent, and {function} has no derivative in forward mode")


def _normalized(degree: int, normalize: bool | None) -> bool:
    return (degree > 1, False, True)[_option("normalize", normalize, _NORMALIZE)]


def _number(name: str, value: Any) -> float | None:
    if value is None or isinstance(value, float):
        return value
    if isinstance(value, bool) or not isinstance(value, int | np.integer | np.floating | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name} is of type {type(value).__name__}; expected a number")
    return float(value)


def _chunk_size(value: Any) -> int | None:
    if value is None:
        return None
    if (size := _integer("chunk_size", value, ", or None")) < 1:
        raise ValueError(f"chunk_size is {size}; expected at least 1, or None")
    return min(size, 2**63 - 1)  # any bound beyond is as good


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts to where x is; None where it is off."""
    device = x.device.type  # of "meta" autocast knows nothing
    return torch.get_autocast_dtype(device) if device in _DEVICES and torch.is_autocast_enabled(device) else None


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


# ---- Operators ------------------------------------------------------------------------------------------------------
#
# As they are registered here a call of retention_step costs 4 microseconds; by torch.library.custom_op it costs 50.

_LIBRARY = torch.library.Library("holdfast", "DEF")


def _define(schema: str, kernel: Any, fake: Any) -> None:
    """Register an operator, its kernel, and what makes its results without computing them."""
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    name = schema[: schema.index("(")]
    for device in _DEVICES:
        _LIBRARY.impl(name, kernel, device.upper())
    torch.library.register_fake(f"holdfast::{name}", fake, lib=_LIBRARY)


def _define_gradient(name: str, save: Any, differentiate: Any, push: Any = None) -> None:
    """Register save(ctx, inputs, output), which follows a call, differentiate(ctx, *gradients of results), and, for
    forward mode, push(ctx, *tangents of inputs)."""
    if _SingleLevelFunction is None:
        torch.library.register_autograd(f"holdfast::{name}", differentiate, setup_context=save, lib=_LIBRARY)
        return
    operator = getattr(torch.ops.holdfast, name).default

    def compute(keys: torch.DispatchKeySet, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

    def forward(ctx: Any, call: tuple, *inputs: Any) -> Any:
        keys, grad, tangents = call
        # PyTorch has turned recording off, for this transform. Those around it lie below, and come by here as well.
        with torch.set_grad_enabled(grad), _set_fwd_grad_enabled(tangents):
            results = compute(keys, *inputs)
        save(ctx, inputs, results)
        return results

    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, *differentiate(ctx, *gradients)

    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        if push is None:
            raise NotImplementedError(
                f"{name} is differentiated in forward mode, which is not implemented; expected reverse mode: "
                "backward(), or grad, vjp and jacrev of torch.func"
            )
        return push(ctx, *tangents)

    methods = {"forward": forward, "backward": backward, "jvp": jvp}
    # PyTorch's compiled autograd asks for this of what is differentiated; as autograd.Function has it.
    methods["_compiled_autograd_key"] = lambda ctx: (ctx._autograd_function_id,)
    function = type(
        f"holdfast_{name}", (_SingleLevelFunction,), {name: staticmethod(method) for name, method in methods.items()}
    )

    def kernel(keys: torch.DispatchKeySet, *inputs: Any) -> Any:
        grad = torch.is_grad_enabled()
        tangents = _forward_mode() or torch._C._are_functorch_transforms_active()  # compiled, a level does not show
        if tangents or (grad and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)):
            with enable_single_level_autograd_function():
                return function.apply((keys, grad, torch._C._is_fwd_grad_enabled()), *inputs)
        return compute(keys, *inputs)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _wanted(ctx: Any, count: int) -> list[bool]:
    """Of the first inputs, which need a gradient. The keys before them need none."""
    return list(ctx.needs_input_grad[_SingleLevelFunction is not None :][:count])


def _plain(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same memory without a history: below autograd tensors still say that they require grad."""
    return [x.detach() if x is not None and x.requires_grad else x for x in tensors]


def _rows(*tensors: Tensor | None) -> list[Tensor | None]:
    """Gradients come with any strides, 0 for those of a sum; the kernels need the last axis contiguous."""
    return [x if x is None or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _stream(x: Tensor) -> int:
    return _cuda_stream(x) if x.is_cuda else 1


def _workspace(bytes: int, device: int, stream: int) -> Tensor | None:
    """Memory of a call on CUDA, PyTorch's: a graph that is being captured keeps it, streams get it in turn. None where
    the call is not in PyTorch's current stream, which is the one that its allocator minds."""
    if not torch.cuda.is_available() or (torch.cuda.current_stream(device).cuda_stream or 1) != stream:
        return None
    return torch.empty(bytes, dtype=torch.uint8, device=f"cuda:{device}")


_holdfast.set_cuda_allocator(_workspace)


def _retention_results(
    q, k, v, log_decay, initial_state, initial_sum_of_keys, cu_seqlens, scale, degree, normalize, form, chunk_size,
    return_state, return_weights, state_layout, expansion, keep_states,
):  # fmt: skip
    """(out, state, sum of keys, weights, states), not computed; those that are not wanted are empty."""
    for name, x, axes in (("q", q, "H, K"), ("k", k, "Hk, K"), ("v", v, "Hk, V")):
        if x.ndim != 4:
            raise ValueError(f"{name} has {x.ndim} dimensions; expected 4, [B, T, {axes}]")
    B, T, H, K = q.shape
    Hk, V = v.shape[2:]
    if cu_seqlens is not None and cu_seqlens.ndim != 1:
        raise ValueError(f"cu_seqlens has {cu_seqlens.ndim} dimensions; expected 1, [N + 1]")
    if cu_seqlens is not None and cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens [N + 1] has N + 1 = 0; expected at least 2")
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    D = _expanded_size(K, degree, expansion)
    state = (Hk, D, V) if state_layout == "kv" else (Hk, V, D)
    if keep_states:
        interval = _interval(q, v)
        kept = B * ((T + interval - 1) // interval + 1)
    return (
        q.new_empty((B, T, H, V)),
        q.new_empty((N, *state) if return_state else (0,), dtype=torch.float32),
        q.new_empty((N, Hk, D) if return_state and normalize else (0,), dtype=torch.float32),
        q.new_empty((B, H, T, T) if return_weights else (0,)),
        q.new_empty((kept, *state) if keep_states else (0,), dtype=torch.float32),
    )


def _has_states_inside(q: Tensor, v: Tensor) -> bool:
    """Whether there are tokens enough for a state to be kept between the first and the last one."""
    return q.shape[1] > 128 and q.shape[1] > _interval(q, v)  # none is shorter; the library refuses odd shapes itself


def _interval(q: Tensor, v: Tensor) -> int:
    """Tokens from one state that is kept for the gradient to the next."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        dtype = str(q.dtype).removeprefix("torch.")
        raise NotImplementedError(f"q has dtype {dtype}; expected float32, float16 or bfloat16")
    return holdfast.state_interval(int(q.shape[3]), int(v.shape[3]), q.dtype)


def _retention_kernel(
    q, k, v, log_decay, initial_state, initial_sum_of_keys, cu_seqlens, scale, degree, normalize, form, chunk_size,
    return_state, return_weights, state_layout, expansion, keep_states,
):  # fmt: skip
    results = _retention_results(
        q, k, v, log_decay, initial_state, initial_sum_of_keys, cu_seqlens, scale, degree, normalize, form, chunk_size,
        return_state, return_weights, state_layout, expansion, keep_states,
    )  # fmt: skip
    out, state, sum_of_keys, weights, states = results
    options = (
        degree, _NORMALIZE[normalize], _FORMS[form], _STATE_LAYOUTS[state_layout], _EXPANSIONS[expansion],
        _expanded_size(q.shape[3], degree, expansion), normalize, return_weights, _interval(q, v) if keep_states else 0,
    )  # fmt: skip
    q, k, v, log_decay, initial_state, initial_sum_of_keys = _plain(
        q, k, v, log_decay, initial_state, initial_sum_of_keys
    )
    _holdfast.forward(
        q, k, v, log_decay, scale, chunk_size, initial_state, return_state, out, state if return_state else None,
        _stream(q), initial_sum_of_keys, cu_seqlens, options, sum_of_keys if return_state and normalize else None,
        weights if return_weights else None, states if keep_states else None,
    )  # fmt: skip
    return results


_define(
    "retention(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? initial_sum_of_keys, "
    "Tensor? cu_seqlens, float? scale, int degree, bool normalize, str form, int? chunk_size, bool return_state, "
    "bool return_weights, str state_layout, str expansion, bool keep_states) "
    "-> (Tensor out, Tensor state, Tensor sum_of_keys, Tensor weights, Tensor states)",
    _retention_kernel,
    _retention_results,
)


def _retention_gradients(
    dout, dstate, dsum_of_keys, q, k, v, log_decay, initial_state, initial_sum_of_keys, cu_seqlens, out, states, scale,
    degree, normalize, form, chunk_size, state_layout, expansion, wanted,
):  # fmt: skip
    """Gradients, not computed; those that are not wanted are empty."""
    inputs = (q, k, v, log_decay, initial_state, initial_sum_of_keys)
    return tuple(x.new_empty(x.shape) if want else q.new_empty((0,)) for x, want in zip(inputs, wanted, strict=True))


_INPUTS = ("q", "k", "v", "log_decay", "initial_state", "initial_sum_of_keys")


def _retention_backward_kernel(
    dout, dstate, dsum_of_keys, q, k, v, log_decay, initial_state, initial_sum_of_keys, cu_seqlens, out, states, scale,
    degree, normalize, form, chunk_size, state_layout, expansion, wanted,
):  # fmt: skip
    dout, dstate, dsum_of_keys = _rows(*_plain(dout, dstate, dsum_of_keys))
    q, k, v, log_decay, initial_state, initial_sum_of_keys, out, states = _plain(
        q, k, v, log_decay, initial_state, initial_sum_of_keys, out, states
    )
    gradients = holdfast.retention_backward(
        dout, q, k, v, log_decay, out=out, scale=scale, degree=degree, normalize=normalize, form=form,
        chunk_size=chunk_size, initial_state=initial_state, initial_sum_of_keys=initial_sum_of_keys,
        dfinal_state=dstate, dfinal_sum_of_keys=dsum_of_keys, cu_seqlens=cu_seqlens,
        states=states, state_interval=None if states is None else _interval(q, v),
        wanted=tuple(name for name, want in zip(_INPUTS, wanted, strict=True) if want), state_layout=state_layout,
        expansion=expansion,
    )  # fmt: skip
    return tuple(q.new_empty((0,)) if x is None else x for x in gradients)


_define(
    "retention_backward(Tensor? dout, Tensor? dstate, Tensor? dsum_of_keys, Tensor q, Tensor k, Tensor v, "
    "Tensor? log_decay, Tensor? initial_state, Tensor? initial_sum_of_keys, Tensor? cu_seqlens, Tensor? out, "
    "Tensor? states, float? scale, int degree, bool normalize, str form, int? chunk_size, str state_layout, "
    "str expansion, bool[] wanted) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dlog_decay, Tensor dinitial_state, "
    "Tensor dinitial_sum_of_keys)",
    _retention_backward_kernel,
    _retention_gradients,
)


def _save_retention(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, scale, degree, normalize, form, chunk_size, return_state, _, state_layout, expansion, keep_states = inputs
    out, state, sum_of_keys, weights, states = output
    ctx.save_for_backward(*tensors, out if normalize else None, states if keep_states else None)
    ctx.options = (scale, degree, normalize, form, chunk_size, state_layout, expansion)
    ctx.set_materialize_grads(False)
    empty = [x for x, there in ((state, return_state), (sum_of_keys, return_state and normalize)) if not there]
    ctx.mark_non_differentiable(*empty, weights, states)


def _differentiate_retention(ctx: Any, dout, dstate, dsum_of_keys, *_):
    *tensors, out, states = ctx.saved_tensors
    wanted = _wanted(ctx, len(_INPUTS))
    gradients = torch.ops.holdfast.retention_backward(
        dout, dstate, dsum_of_keys, *tensors, out, states, *ctx.options, wanted
    )
    # And none for cu_seqlens and the ten options.
    return *(x if want else None for x, want in zip(gradients, wanted, strict=True)), *(None,) * 11


_define_gradient("retention", _save_retention, _differentiate_retention)


def _define_no_gradient(name: str) -> None:
    """To differentiate that operator, which computes gradients of `name`, is an error that says so."""

    def differentiate(ctx: Any, *gradients: Any) -> None:
        raise NotImplementedError(
            f"the gradients of {name} are differentiated, and second derivatives are not implemented; expected a loss "
            "that has first derivatives of it alone"
        )

    _define_gradient(f"{name}_backward", lambda ctx, inputs, output: None, differentiate)


_define_no_gradient("retention")


def _step_results(
    q, k, v, log_decay, state, sum_of_keys, scale, degree, normalize, state_layout, expansion
):  # fmt: skip
    for name, x, axes in (("q", q, "H, K"), ("v", v, "Hk, V")):
        if x.ndim != 3:
            raise ValueError(f"{name} has {x.ndim} dimensions; expected 3, [B, {axes}]")
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


def _step_kernel(
    q, k, v, log_decay, state, sum_of_keys, scale, degree, normalize, state_layout, expansion
):  # fmt: skip
    out = _step_results(q, k, v, log_decay, state, sum_of_keys, scale, degree, normalize, state_layout, expansion)
    q, k, v, log_decay, mine, my_sum = _plain(q, k, v, log_decay, state, sum_of_keys)
    _holdfast.step(
        q, k, v, log_decay, mine, scale, out, _stream(q), my_sum, degree, _NORMALIZE[normalize],
        _STATE_LAYOUTS[state_layout], _EXPANSIONS[expansion],
    )  # fmt: skip
    # So that autograd notices where it has kept what was here before.
    torch.autograd.graph.increment_version([state] if sum_of_keys is None else [state, sum_of_keys])
    return out


_define(
    "retention_step(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor(a!) state, Tensor(b!)? sum_of_keys, "
    "float? scale, int degree, bool normalize, str state_layout, str expansion) -> Tensor",
    _step_kernel,
    _step_results,
)


def _step_batched(*_: Any) -> None:
    raise NotImplementedError(
        "retention_step is called under vmap, which is not implemented for it: it writes to the state; expected the "
        "batch as that of its arguments"
    )


_LIBRARY.impl("retention_step", _step_batched, "FuncTorchBatched")


def _like_x(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


def _rotate_kernel(x, theta, offset, interleaved, positions):
    out = x.new_empty(x.shape)
    x, theta = _plain(x, theta)
    _holdfast.rotate(x, theta, offset, positions, interleaved, out, _stream(x))
    return out


_define(
    "rotate(Tensor x, Tensor theta, SymInt offset, bool interleaved, Tensor? positions) -> Tensor",
    _rotate_kernel,
    _like_x,
)


def _save_rotate(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, theta, ctx.offset, ctx.interleaved, positions = inputs
    ctx.save_for_backward(theta, positions)
    ctx.save_for_forward(theta, positions)
    ctx.set_materialize_grads(False)


def _differentiate_rotate(ctx: Any, dout: Tensor):
    theta, positions = ctx.saved_tensors
    if _wanted(ctx, 2)[1]:
        raise NotImplementedError("theta requires grad, and rotate has no gradient of it; expected theta.detach()")
    if dout is None:
        return (None,) * 5
    # The transpose of a rotation turns back.
    [dout] = _rows(dout)
    dx = torch.ops.holdfast.rotate(dout, -theta, ctx.offset, ctx.interleaved, positions)
    return dx, None, None, None, None


def _push_rotate(ctx: Any, dx: Tensor | None, dtheta: Tensor | None, *_: Any) -> Tensor:
    theta, positions = ctx.saved_tensors
    if dtheta is not None:
        raise NotImplementedError("theta has a tangent, and rotate has no derivative by it; expected theta.detach()")
    [dx] = _rows(dx)
    return torch.ops.holdfast.rotate(dx, theta, ctx.offset, ctx.interleaved, positions)


_define_gradient("rotate", _save_rotate, _differentiate_rotate, _push_rotate)


def _head_norm_gate_kernel(x, gate, weight, norm, eps):
    out = x.new_empty(x.shape)
    x, gate, weight = _plain(x, gate, weight)
    _holdfast.head_norm_gate(x, gate, weight, norm == "layer", eps, out, _stream(x))
    return out


_define(
    "head_norm_gate(Tensor x, Tensor? gate, Tensor? weight, str norm, float eps) -> Tensor",
    _head_norm_gate_kernel,
    _like_x,
)


def _head_norm_gate_gradients(dout, x, gate, weight, norm, eps, wanted):
    return tuple(
        y.new_empty(y.shape) if want else x.new_empty((0,)) for y, want in zip((x, gate, weight), wanted, strict=True)
    )


def _head_norm_gate_backward_kernel(dout, x, gate, weight, norm, eps, wanted):
    [dout] = _rows(*_plain(dout))
    x, gate, weight = _plain(x, gate, weight)
    gradients = _head_norm_gate_gradients(dout, x, gate, weight, norm, eps, wanted)
    dx, dgate, dweight = (y if want else False for y, want in zip(gradients, wanted, strict=True))
    holdfast.head_norm_gate_backward(dout, x, gate, weight, norm, eps, dx=dx, dgate=dgate, dweight=dweight)
    return gradients


_define(
    "head_norm_gate_backward(Tensor dout, Tensor x, Tensor? gate, Tensor? weight, str norm, float eps, bool[] wanted) "
    "-> (Tensor dx, Tensor dgate, Tensor dweight)",
    _head_norm_gate_backward_kernel,
    _head_norm_gate_gradients,
)


def _save_head_norm_gate(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.norm, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_head_norm_gate(ctx: Any, dout: Tensor):
    wanted = _wanted(ctx, 3)
    gradients = torch.ops.holdfast.head_norm_gate_backward(dout, *ctx.saved_tensors, ctx.norm, ctx.eps, wanted)
    return *(y if want else None for y, want in zip(gradients, wanted, strict=True)), None, None


_define_gradient("head_norm_gate", _save_head_norm_gate, _differentiate_head_norm_gate)
_define_no_gradient("head_norm_gate")
