"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import holdfast
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def default_settings() -> Iterator[None]:
    """Undo what a test sets for the process."""
    yield
    holdfast.set_num_threads(0)
    holdfast.set_target(None)
    holdfast.set_backend(None)
    holdfast.set_verbose(None)


@pytest.fixture
def problem() -> Callable[..., SimpleNamespace]:
    """problem(B, T, H, K, V, decay="token") makes seeded inputs q, k, v, log_decay, initial_state, and an `out` full
    of sevens. Decays are weak, so that what is carried from chunk to chunk matters."""

    def make(B: int, T: int, H: int, K: int, V: int, decay: str | None = "token") -> SimpleNamespace:
        random = np.random.default_rng([B, T, H, K, V])

        def normal(*shape: int) -> np.ndarray:
            return random.standard_normal(shape, np.float32)

        log_decay = {"token": -np.abs(normal(B, T, H)) / 100, "head": holdfast.decay(H), None: None}[decay]
        return SimpleNamespace(
            q=normal(B, T, H, K),
            k=normal(B, T, H, K),
            v=normal(B, T, H, V),
            log_decay=log_decay,
            initial_state=normal(B, H, K, V),
            out=np.full((B, T, H, V), 7, np.float32),
        )

    return make
