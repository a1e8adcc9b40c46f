"""rotate(), theta() and head_norm_gate(), and their gradients: values, arrays and exceptions."""

from __future__ import annotations

import holdfast
import numpy as np
import pytest
from exporter import CUDA, ROCM, Exporter
from reference import assert_close

SHAPE = B, T, H, K = 2, 5, 3, 8
TOLERANCES = {"float32": 2e-7, "float16": 4e-4, "bfloat16": 2.5e-3}  # relative RMS: one rounding, and a little


def random(*shape, dtype=np.float32):
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(dtype)


def rotated(x, theta, position, interleaved=False):
    """In float64; position [B, T] or [T]."""
    x = np.asarray(x, np.float64)
    pairs = x.reshape(*x.shape[:-1], -1, 2) if interleaved else x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2)
    angle = np.asarray(position, np.float64)[..., None, None] * np.asarray(theta, np.float64)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
    halves = np.stack([turned.real, turned.imag], axis=-1)
    return (halves if interleaved else halves.swapaxes(-1, -2)).reshape(x.shape)


def normed(x, gate=None, weight=1.0, norm="rms", eps=1e-6):
    x = np.asarray(x, np.float64)
    x = x - x.mean(-1, keepdims=True) if norm == "layer" else x
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
    return y if gate is None else y * gate / (1 + np.exp(-np.asarray(gate, np.float64)))


def gradients(dout, x, gate=None, weight=1.0, norm="rms", eps=1e-6):
    """Of normed(), in float64: (dx, dgate, dweight [B, T, H, V], not summed up)."""
    dout, x = np.asarray(dout, np.float64), np.asarray(x, np.float64)
    x = x - x.mean(-1, keepdims=True) if norm == "layer" else x
    deviation = np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    n, g = x / deviation, np.asarray(0.0 if gate is None else gate, np.float64)
    p = 1 / (1 + np.exp(-g))
    swish = np.ones_like(x) if gate is None else g * p
    u = dout * weight * swish
    dx = u - n * (u * n).mean(-1, keepdims=True)
    dx = dx - u.mean(-1, keepdims=True) if norm == "layer" else dx
    return dx / deviation, dout * weight * n * p * (1 + g * (1 - p)), dout * n * swish


def bfloat16():
    return pytest.importorskip("ml_dtypes").bfloat16


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 1_000_000, -3])
def test_rotate_agrees_with_float64(dtype, interleaved, offset):
    x = random(*SHAPE, dtype=bfloat16() if dtype == "bfloat16" else dtype)
    theta = holdfast.theta(K, "retnet" if interleaved else "rope")
    out = holdfast.rotate(x, theta, offset, interleaved)
    assert type(out) is np.ndarray and out.dtype == x.dtype
    assert_close(out, rotated(x, theta, offset + np.arange(T), interleaved), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [1_000_000, -3])
def test_rotate_backward_turns_the_other_way(dtype, interleaved, offset):
    dout = random(*SHAPE, dtype=bfloat16() if dtype == "bfloat16" else dtype)
    theta = holdfast.theta(K, "retnet" if interleaved else "rope")
    dx = holdfast.rotate_backward(dout, theta, offset, interleaved)
    assert type(dx) is np.ndarray and dx.dtype == dout.dtype
    assert_close(dx, rotated(dout, -theta, offset + np.arange(T), interleaved), TOLERANCES[dtype])
    assert holdfast.rotate_backward(dout, theta, offset, interleaved, dx=dout) is dout
    np.testing.assert_array_equal(dout, dx)


@pytest.mark.parametrize("shape", [(T,), (B, T)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_rotate_positions(shape, dtype):
    x, theta = random(*SHAPE), holdfast.theta(K)
    positions = np.random.default_rng(1).integers(0, 1 << 20, shape).astype(dtype)
    assert_close(holdfast.rotate(x, theta, positions=positions), rotated(x, theta, positions), 2e-7)
    assert_close(holdfast.rotate_backward(x, theta, positions=positions), rotated(x, -theta, positions), 2e-7)


def test_rotate_makes_scores_relative():
    q, k, theta = random(1, 9, 1, 64), random(1, 9, 1, 64) + 1, holdfast.theta(64)

    def scores(offset):
        turned = (holdfast.rotate(x, theta, offset).astype(np.float64)[0, :, 0] for x in (q, k))
        return np.einsum("id,jd->ij", *turned)

    assert_close(scores(1_000_000), scores(0), 5e-7)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("weight", [None, (K,), (H, K)])
def test_head_norm_gate_agrees_with_float64(dtype, norm, gated, weight):
    element = bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
    x, gate = random(*SHAPE, dtype=element), random(*SHAPE, dtype=element) if gated else None
    weights = None if weight is None else random(*weight)
    out = holdfast.head_norm_gate(x, gate, weights, norm, eps=1e-3)
    assert type(out) is np.ndarray and out.dtype == x.dtype
    wide = None if gate is None else gate.astype(np.float64)
    assert_close(out, normed(x, wide, 1.0 if weight is None else weights, norm, 1e-3), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("weight", [None, (K,), (H, K)])
def test_head_norm_gate_backward_agrees_with_float64(dtype, norm, gated, weight):
    element = bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
    x, dout = random(*SHAPE, dtype=element), random(1, *SHAPE)[0].astype(element)
    gate = random(*SHAPE, dtype=element)[::-1] if gated else None
    weights = None if weight is None else random(*weight)
    dx, dgate, dweight = holdfast.head_norm_gate_backward(dout, x, gate, weights, norm, eps=1e-3)
    wide = [None if a is None else a.astype(np.float64) for a in (dout, x, gate)]
    want = gradients(*wide, 1.0 if weight is None else weights, norm, 1e-3)
    assert type(dx) is np.ndarray and dx.dtype == x.dtype
    assert_close(dx, want[0], TOLERANCES[dtype] + 2e-7)
    assert (dgate is None) == (not gated) and (dweight is None) == (weight is None)
    if gated:
        assert dgate.dtype == x.dtype
        assert_close(dgate, want[1], TOLERANCES[dtype] + 2e-7)
    if weight:
        assert dweight.dtype == np.float32 and dweight.shape == weight
        assert_close(dweight, want[2].sum((0, 1) if len(weight) == 2 else (0, 1, 2)), 1e-6)


def test_gradients_that_are_wanted():
    x, gate, dout, weight = random(*SHAPE), random(*SHAPE) + 1, random(1, *SHAPE)[0], random(H, K)
    everything = holdfast.head_norm_gate_backward(dout, x, gate, weight)
    for n, name in enumerate(("dx", "dgate", "dweight")):
        alone = holdfast.head_norm_gate_backward(
            dout, x, gate, weight, **{"dx": False, "dgate": False, "dweight": False, name: True}
        )
        assert [d is None for d in alone] == [m != n for m in range(3)]
        np.testing.assert_array_equal(alone[n], everything[n])
        out = np.full_like(everything[n], np.nan)
        assert holdfast.head_norm_gate_backward(dout, x, gate, weight, **{name: out})[n] is out
        np.testing.assert_array_equal(out, everything[n])
    assert holdfast.head_norm_gate_backward(dout, x, dx=False) == (None, None, None)


def test_default_eps():
    x = random(*SHAPE) * np.float32(1e-3)
    assert_close(holdfast.head_norm_gate(x), normed(x, eps=1e-6), 2e-7)


def test_in_place_and_out():
    x, theta, out = random(*SHAPE), holdfast.theta(K), np.zeros(SHAPE, np.float32)
    assert holdfast.rotate(x, theta, 7, out=out) is out
    assert_close(out, rotated(x, theta, 7 + np.arange(T)), 2e-7)
    assert holdfast.rotate(x, theta, 7, out=x) is x
    np.testing.assert_array_equal(x, out)
    gate = random(*SHAPE, dtype=np.float32)
    expected = holdfast.head_norm_gate(x, gate)
    assert holdfast.head_norm_gate(x, gate, out=gate) is gate
    np.testing.assert_array_equal(gate, expected)


def test_views_and_read_only_arrays():
    x = np.broadcast_to(random(1, T, 1, K), SHAPE)
    assert_close(holdfast.rotate(x, holdfast.theta(K)), rotated(x, holdfast.theta(K), np.arange(T)), 2e-7)
    half = random(B, T, H, 2 * K)[..., K:]  # rotation of some of the features
    assert_close(holdfast.rotate(half, holdfast.theta(K)), rotated(half, holdfast.theta(K), np.arange(T)), 2e-7)
    heads_first = random(B, H, T, K).swapaxes(1, 2)
    assert_close(holdfast.head_norm_gate(heads_first), normed(heads_first), 2e-7)


@pytest.mark.parametrize("make", [memoryview, Exporter, lambda x: Exporter(x, versioned=False)])
def test_kinds_of_arrays(make):
    x, theta = random(*SHAPE), holdfast.theta(K)
    np.testing.assert_array_equal(holdfast.rotate(make(x), make(theta)), holdfast.rotate(x, theta))
    np.testing.assert_array_equal(holdfast.head_norm_gate(make(x), make(x)), holdfast.head_norm_gate(x, x))
    np.testing.assert_array_equal(holdfast.rotate_backward(make(x), make(theta)), holdfast.rotate_backward(x, theta))
    weight = random(K)
    got = holdfast.head_norm_gate_backward(make(x), make(x), make(x), make(weight))
    for g, w in zip(got, holdfast.head_norm_gate_backward(x, x, x, weight), strict=True):
        np.testing.assert_array_equal(g, w)


def test_torch():
    torch = pytest.importorskip("torch")
    x, theta = random(*SHAPE), holdfast.theta(K)
    tensor, positions = torch.from_numpy(x).to(torch.bfloat16), torch.arange(T)
    out = holdfast.rotate(tensor, torch.from_numpy(theta), positions=positions)
    assert out.dtype == torch.bfloat16 and out.shape == SHAPE
    assert_close(out.float().numpy(), rotated(tensor.float().numpy(), theta, np.arange(T)), TOLERANCES["bfloat16"])
    out = holdfast.head_norm_gate(torch.from_numpy(x), torch.from_numpy(x), norm="layer")
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x), (K,), eps=1e-6) * torch.nn.functional.silu(
        torch.from_numpy(x)
    )
    torch.testing.assert_close(out, expected)
    with pytest.raises(NotImplementedError, match="gate requires grad"):
        holdfast.head_norm_gate(x, torch.ones(SHAPE, requires_grad=True))


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_gradients_are_those_of_torch(norm):
    torch = pytest.importorskip("torch")
    inputs = [torch.from_numpy(a).requires_grad_() for a in (random(*SHAPE), random(*SHAPE) + 1, random(K))]
    dout = torch.from_numpy(random(1, *SHAPE)[0])
    x, gate, weight = inputs
    norms = {"rms": torch.nn.functional.rms_norm, "layer": torch.nn.functional.layer_norm}
    out = norms[norm](x, (K,), weight=weight, eps=1e-6) * torch.nn.functional.silu(gate)
    want = torch.autograd.grad(out, inputs, dout)
    got = holdfast.head_norm_gate_backward(dout, *(a.detach() for a in inputs), norm)
    for g, w in zip(got, want, strict=True):
        assert type(g) is torch.Tensor
        torch.testing.assert_close(g, w)
    with pytest.raises(NotImplementedError, match="dout requires grad"):
        holdfast.rotate_backward(torch.ones(SHAPE, requires_grad=True), holdfast.theta(K))
    half = torch.from_numpy(random(*SHAPE)).to(torch.bfloat16)
    dx, _, _ = holdfast.head_norm_gate_backward(half, half)
    assert dx.dtype == torch.bfloat16 and holdfast.rotate_backward(half, holdfast.theta(K)).dtype == torch.bfloat16


def test_nothing_to_do():
    for shape in ((0, T, H, K), (B, 0, H, K), (B, T, 0, K)):
        x = np.empty(shape, np.float32)
        assert holdfast.rotate(x, holdfast.theta(K)).shape == shape
        assert holdfast.head_norm_gate(x, x).shape == shape
        assert holdfast.rotate_backward(x, holdfast.theta(K)).shape == shape
        dx, dgate, dweight = holdfast.head_norm_gate_backward(x, x, x, ones(K))
        assert dx.shape == dgate.shape == shape and not dweight.any()


def test_says_what_runs():
    lines = []
    holdfast.set_verbose(lines.append)
    x = random(*SHAPE)
    holdfast.rotate(x, holdfast.theta(K))
    holdfast.head_norm_gate(x)
    assert lines[0].startswith("rotate: rotate_f32_") and "B 2, T 5, H 3, size 8" in lines[0]
    assert lines[1].startswith("head_norm_gate: head_norm_gate_f32_")
    holdfast.rotate_backward(x, holdfast.theta(K))
    holdfast.head_norm_gate_backward(x, x)
    assert lines[2].startswith("rotate_backward: rotate_f32_")
    assert lines[3].startswith("head_norm_gate_backward: head_norm_gate_backward_f32_")


def test_theta():
    for convention, exponents in (("retnet", np.arange(4) / 3), ("rope", np.arange(4) / 4)):
        theta = holdfast.theta(8, convention)
        assert theta.dtype == np.float32
        np.testing.assert_array_equal(theta, (10000.0**-exponents).astype(np.float32))
    np.testing.assert_array_equal(holdfast.theta(2), [1])
    for size in (0, 1, 7, -2):
        with pytest.raises(ValueError, match=f"key_size is {size}; expected an even number, at least 2"):
            holdfast.theta(size)
    with pytest.raises(ValueError, match="convention is 'foo'; expected 'retnet' or 'rope'"):
        holdfast.theta(8, "foo")
    with pytest.raises(TypeError, match="key_size is of type float; expected an int"):
        holdfast.theta(8.0)


def ones(*shape):
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    "error, text, changes",
    [
        (ValueError, "x has 3 dimensions; expected 4, [B, T, H, K]", {"x": ones(T, H, K)}),
        (ValueError, "x [B, T, H, K] has K = 7; expected pairs", {"x": ones(B, T, H, 7)}),
        (ValueError, "theta has 3 elements; expected 4", {"theta": ones(3)}),
        (ValueError, "theta[0] is inf; expected a finite number", {"theta": ones(4) * np.inf}),
        (ValueError, "positions [B, T] has T = 4; expected 5", {"positions": np.zeros((B, 4), np.int64)}),
        (ValueError, "offset is 1 and positions are given", {"offset": 1, "positions": np.zeros(T, np.int64)}),
        (ValueError, "offset is 9223372036854775808; expected an int of 64 bits", {"offset": 1 << 63}),
        (ValueError, "offset is 9223372036854775807; expected positions", {"offset": (1 << 63) - 1}),
        (ValueError, "out [B, T, H, K] has H = 2; expected 3", {"out": ones(B, T, 2, K)}),
        (ValueError, "out is read-only; expected memory", {"out": np.broadcast_to(np.float32(0), SHAPE)}),
        (NotImplementedError, "x has dtype float64; expected float32, float16 or bfloat16", {"x": np.ones(SHAPE)}),
        (NotImplementedError, "positions has dtype float32; expected int32 or int64", {"positions": ones(T)}),
        (NotImplementedError, "x is on device type 10", {"x": Exporter(ones(*SHAPE), device=ROCM)}),
        (NotImplementedError, "x is on a GPU and of type Exporter", {"x": Exporter(ones(*SHAPE), device=CUDA)}),
        (TypeError, "theta is of type NoneType; expected an array", {"theta": None}),
        (TypeError, "offset is of type float; expected an int", {"offset": 1.5}),
    ],
)  # fmt: skip
def test_errors_of_rotate(error, text, changes):
    with pytest.raises(error) as caught:
        holdfast.rotate(**{"x": ones(*SHAPE), "theta": ones(K // 2), **changes})
    assert type(caught.value) is error and text in str(caught.value)


@pytest.mark.parametrize(
    "error, text, changes",
    [
        (ValueError, "x has 3 dimensions; expected 4, [B, T, H, V]", {"x": ones(T, H, K)}),
        (ValueError, "gate [B, T, H, V] has T = 4; expected 5", {"gate": ones(B, 4, H, K)}),
        (ValueError, "gate has dtype float16; expected float32, that of x", {"gate": np.ones(SHAPE, np.float16)}),
        (ValueError, "weight [H, V] has H = 2; expected 3", {"weight": ones(2, K)}),
        (ValueError, "weight has 3 dimensions; expected 1, [V], or 2, [H, V]", {"weight": ones(1, H, K)}),
        (ValueError, "norm is 'batch'; expected 'rms' or 'layer'", {"norm": "batch"}),
        (ValueError, "eps is -1; expected a finite number of at least 0", {"eps": -1}),
        (ValueError, "eps is nan; expected", {"eps": np.nan}),
        (NotImplementedError, "weight has dtype float64; expected float32", {"weight": np.ones(K)}),
        (NotImplementedError, "x is on a GPU and of type Exporter", {"x": Exporter(ones(*SHAPE), device=CUDA)}),
        (TypeError, "eps is of type str; expected a number", {"eps": "1"}),
        (TypeError, "x is of type list; expected an array", {"x": [1.0]}),
    ],
)  # fmt: skip
def test_errors_of_head_norm_gate(error, text, changes):
    with pytest.raises(error) as caught:
        holdfast.head_norm_gate(**{"x": ones(*SHAPE), **changes})
    assert type(caught.value) is error and text in str(caught.value)


@pytest.mark.parametrize(
    "error, text, changes",
    [
        (ValueError, "dout has 3 dimensions; expected 4, [B, T, H, K]", {"dout": ones(T, H, K)}),
        (ValueError, "dout [B, T, H, K] has K = 7; expected pairs", {"dout": ones(B, T, H, 7)}),
        (ValueError, "theta has 3 elements; expected 4, one for each pair of dout", {"theta": ones(3)}),
        (ValueError, "positions [B, T] has T = 4; expected 5, that of dout", {"positions": np.zeros((B, 4), np.int64)}),
        (ValueError, "offset is 9223372036854775808; expected an int of 64 bits", {"offset": 1 << 63}),
        (ValueError, "dx [B, T, H, K] has H = 2; expected 3, that of dout", {"dx": ones(B, T, 2, K)}),
        (ValueError, "dx is read-only; expected memory", {"dx": np.broadcast_to(np.float32(0), SHAPE)}),
        (NotImplementedError, "dout has dtype float64; expected float32, float16", {"dout": np.ones(SHAPE)}),
        (NotImplementedError, "dout is on a GPU and of type Exporter", {"dout": Exporter(ones(*SHAPE), device=CUDA)}),
        (TypeError, "theta is of type NoneType; expected an array", {"theta": None}),
    ],
)  # fmt: skip
def test_errors_of_rotate_backward(error, text, changes):
    with pytest.raises(error) as caught:
        holdfast.rotate_backward(**{"dout": ones(*SHAPE), "theta": ones(K // 2), **changes})
    assert type(caught.value) is error and text in str(caught.value)


@pytest.mark.parametrize(
    "error, text, changes",
    [
        (ValueError, "x has 3 dimensions; expected 4, [B, T, H, V]", {"x": ones(T, H, K)}),
        (ValueError, "dout [B, T, H, V] has T = 4; expected 5, that of x", {"dout": ones(B, 4, H, K)}),
        (ValueError, "dout has dtype float16; expected float32, that of x", {"dout": np.ones(SHAPE, np.float16)}),
        (ValueError, "weight [H, V] has H = 2; expected 3", {"weight": ones(2, K)}),
        (ValueError, "weight has 3 dimensions; expected 1, [V], or 2, [H, V]", {"weight": ones(1, H, K)}),
        (ValueError, "dx [B, T, H, V] has H = 2; expected 3", {"dx": ones(B, T, 2, K)}),
        (ValueError, "dgate is given and gate is None; expected dgate of None", {"gate": None, "dgate": ones(*SHAPE)}),
        (ValueError, "dweight is given and weight is None", {"weight": None, "dweight": ones(K)}),
        (ValueError, "dweight has 1 dimensions; expected 2, [H, V]", {"weight": ones(H, K), "dweight": ones(K)}),
        (ValueError, "norm is 'batch'; expected 'rms' or 'layer'", {"norm": "batch"}),
        (ValueError, "eps is -1; expected a finite number of at least 0", {"eps": -1}),
        (NotImplementedError, "x is on a GPU and of type Exporter", {"x": Exporter(ones(*SHAPE), device=CUDA)}),
        (TypeError, "eps is of type str; expected a number", {"eps": "1"}),
        (TypeError, "dout is of type list; expected an array", {"dout": [1.0]}),
        (TypeError, "dx is of type int; expected an array", {"dx": 1}),
    ],
)  # fmt: skip
def test_errors_of_head_norm_gate_backward(error, text, changes):
    arguments = {"dout": ones(*SHAPE), "x": ones(*SHAPE), "gate": ones(*SHAPE), "weight": ones(K), **changes}
    with pytest.raises(error) as caught:
        holdfast.head_norm_gate_backward(**arguments)
    assert type(caught.value) is error and text in str(caught.value)


def test_outputs_that_overlap():
    x = ones(B, T, H, 2 * K)
    with pytest.raises(ValueError, match="out overlaps x in memory"):
        holdfast.rotate(x[..., :K], holdfast.theta(K), out=x[..., 2 : K + 2])
    with pytest.raises(ValueError, match="out overlaps x in memory"):
        holdfast.head_norm_gate(x[..., :K], out=x[..., 2 : K + 2])
    with pytest.raises(ValueError, match="dx overlaps dout in memory"):
        holdfast.rotate_backward(x[..., :K], holdfast.theta(K), dx=x[..., 2 : K + 2])
    dout = ones(*SHAPE)
    with pytest.raises(ValueError, match="dx overlaps dout in memory"):
        holdfast.head_norm_gate_backward(dout, ones(*SHAPE), dx=dout)
    assert np.all(x == 1)
