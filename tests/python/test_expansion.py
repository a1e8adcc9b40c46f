"""Sizes and orders of the features of expanded keys."""

from __future__ import annotations

import holdfast
import numpy as np
import pytest


def test_state_size() -> None:
    assert holdfast.state_size(64) == 64
    assert [holdfast.state_size(64, p) for p in (2, 3, 4)] == [2080, 45760, 766480]
    assert [holdfast.state_size(k, 2, "tiled") for k in (32, 64, 128)] == [768, 2560, 9216]


@pytest.mark.parametrize(
    ("key_size", "degree", "expansion"),
    [(0, 2, "tight"), (64, 0, "tight"), (64, 5, "tight"), (24, 2, "tiled"), (32, 3, "tiled"), (32, 2, "other")],
)
def test_no_such_expansion(key_size: int, degree: int, expansion: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        holdfast.state_size(key_size, degree, expansion)  # type: ignore[arg-type]


def test_sizes_that_are_no_numbers() -> None:
    assert holdfast.state_size(4, 2.0) == 10  # type: ignore[arg-type]  # as retention takes it
    with pytest.raises(TypeError, match="^key_size is of type float; expected an int$"):
        holdfast.state_size(4.0, 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^key_size is of type float; expected an int$"):
        holdfast.convert_state(np.zeros((1, 1, 136, 3), np.float32), 16.0, "tiled")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^degree is 1.5; expected 1, 2, 3 or 4$"):
        holdfast.state_size(4, 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^key_size is {2**70}, degree 2"):
        holdfast.state_size(2**70, 2)


def test_conversion_keeps_the_product() -> None:
    rng = np.random.default_rng(0)
    x, K = rng.standard_normal(48), 48
    tight = rng.standard_normal((2, 1, holdfast.state_size(K, 2), 5)).astype(np.float32)
    phi_tight = [x[a] * x[b] * (1 if a == b else 2**0.5) for b in range(K) for a in range(b + 1)]
    phi_tiled = [
        x[o] * x[16 * block + i] for block in range(K // 16) for o in range(16 * (block + 1)) for i in range(16)
    ]
    tiled = holdfast.convert_state(tight, K, "tiled")
    expected = np.einsum("f,nhfe->nhe", phi_tight, tight)
    np.testing.assert_allclose(np.einsum("f,nhfe->nhe", phi_tiled, tiled), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(holdfast.convert_state(tiled, K, "tight"), tight, rtol=1e-6)
    sums = holdfast.convert_state(tight[..., 0], K, "tiled")
    np.testing.assert_array_equal(sums, tiled[..., 0])


def test_conversion_refuses() -> None:
    zeros = np.zeros((1, 1, 2080, 3), np.float32)
    with pytest.raises(ValueError, match=r"^state \[N, Hk, D, V\] has D = 7; expected 2080"):
        holdfast.convert_state(zeros[:, :, :7], 64, "tiled")
    with pytest.raises(ValueError, match=r"^out \[N, Hk, D, V\] has V = 2; expected 3, that of state$"):
        holdfast.convert_state(zeros, 64, "tiled", out=np.zeros((1, 1, 2560, 2), np.float32))
    with pytest.raises(ValueError, match="^out overlaps state in memory; expected separate memory$"):
        holdfast.convert_state(zeros, 64, "tight", out=zeros)
    with pytest.raises(ValueError, match="dimensions"):
        holdfast.convert_state(np.zeros((7, 3), np.float32), 64, "tiled")
    with pytest.raises(TypeError, match="state is of type float; expected an array"):
        holdfast.convert_state(1.5, 64, "tiled")
    with pytest.raises(NotImplementedError, match="^state has dtype bfloat16; expected float32"):
        holdfast.convert_state(holdfast.BFloat16Array(np.zeros((1, 1, 2080, 3), np.uint16)), 64, "tiled")
