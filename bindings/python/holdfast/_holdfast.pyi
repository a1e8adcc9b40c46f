"""The compiled part of the package. Private: use holdfast."""

from collections.abc import Callable
from typing import Any

import numpy as np

class TargetUnavailable(RuntimeError):
    """The forced target (HOLDFAST_TARGET, set_target) or backend is unknown, or this machine cannot
    run it, or that of the arrays."""

def forward(
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    scale: float | None,
    chunk_size: int | None,
    initial_state: Any,
    return_state: bool,
    out: Any,
    final_state: Any,
    stream: int,
    initial_sum_of_keys: Any,
    cu_seqlens: Any,
    options: tuple[int, int, int, int, int, int, bool, bool, int] | None,
    final_sum_of_keys: Any,
    weights: Any,
    states: Any,
    /,
) -> Any: ...
def backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    out: Any,
    scale: float | None,
    chunk_size: int | None,
    initial_state: Any,
    initial_sum_of_keys: Any,
    dfinal_state: Any,
    dfinal_sum_of_keys: Any,
    cu_seqlens: Any,
    wanted: int,
    given: tuple[Any, Any, Any, Any, Any, Any] | None,
    options: tuple[int, int, int, int, int, int, bool, bool, int] | None,
    stream: int,
    states: Any,
    /,
) -> tuple[Any, Any, Any, Any, Any, Any]: ...
def bfloat16_capsule(bits: np.ndarray, /, **options: Any) -> Any: ...
def step(
    q: Any,
    k: Any,
    v: Any,
    log_decay: Any,
    state: Any,
    scale: float | None,
    out: Any,
    stream: int,
    sum_of_keys: Any,
    degree: int,
    normalize: int,
    state_layout: int,
    expansion: int,
    /,
) -> Any: ...
def convert_state(key_size: int, state: Any, expansion: int, out: Any, /) -> Any: ...
def state_size(key_size: int, degree: int, expansion: int, /) -> int: ...
def state_interval(key_size: int, value_size: int, wide: bool, /) -> int: ...
def rotate(x: Any, theta: Any, offset: int, positions: Any, interleaved: bool, out: Any, stream: int, /) -> Any: ...
def rotate_backward(
    dout: Any, theta: Any, offset: int, positions: Any, interleaved: bool, dx: Any, stream: int, /
) -> Any: ...
def head_norm_gate(x: Any, gate: Any, weight: Any, layer_norm: bool, eps: float, out: Any, stream: int, /) -> Any: ...
def head_norm_gate_backward(
    dout: Any,
    x: Any,
    gate: Any,
    weight: Any,
    layer_norm: bool,
    eps: float,
    gradients: tuple[Any, Any, Any],
    stream: int,
    /,
) -> tuple[Any, Any, Any]: ...
def backends() -> dict[str, dict[str, Any]]: ...
def variants() -> tuple[list[dict[str, Any]], str]: ...
def version() -> str: ...
def cpu_features() -> str: ...
def set_num_threads(threads: int, /) -> None: ...
def get_num_threads() -> int: ...
def set_backend(backend: str | None, /) -> None: ...
def set_target(target: str | None, /) -> None: ...
def set_cuda_allocator(allocate: Callable[[int, int, int], Any] | None, /) -> None: ...
def set_verbose(listener: Callable[[str], object] | None, /) -> None: ...
