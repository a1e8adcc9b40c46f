"""The compiled part of the package. Private: use holdfast."""

from collections.abc import Callable
from typing import Any

import numpy as np

class TargetUnavailable(RuntimeError):
    """The forced target (HOLDFAST_TARGET or set_target) is unknown, or this machine cannot run it."""

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
    /,
) -> Any: ...
def bfloat16_capsule(bits: np.ndarray, /, **options: Any) -> Any: ...
def variants() -> tuple[list[dict[str, Any]], str]: ...
def version() -> str: ...
def cpu_features() -> str: ...
def set_num_threads(threads: int, /) -> None: ...
def get_num_threads() -> int: ...
def set_target(target: str | None, /) -> None: ...
def set_verbose(listener: Callable[[str], object] | None, /) -> None: ...
