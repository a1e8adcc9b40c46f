"""holdfast.compat.power_retention_mlx against power retention's formula in float64."""

from __future__ import annotations

import pytest
from gradients import check_gradients
from reference import assert_close

torch = pytest.importorskip("torch")
from holdfast.compat.power_retention_mlx import PowerRetention  # noqa: E402

B, T, D = 3, 21, 12
TOLERANCE = 5e-6  # projections, and quotients of sums that cancel, in float32


@pytest.fixture(autouse=True)
def without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def by_hand(layer, x, log_g=None):
    x = x.double()
    q, k, v = (x @ w.weight.double().T + w.bias.double() for w in (layer.w_q, layer.w_k, layer.w_v))
    G = (torch.zeros(x.shape[:2]) if log_g is None else log_g).double().cumsum(1)
    w = (q @ k.mT) ** layer.power * (G[:, :, None] - G[:, None]).exp()
    w = w.tril()
    return (w @ v / w.sum(-1, keepdim=True)).numpy()


@pytest.mark.parametrize("power", [2, 4])  # odd ones may divide by nearly 0
@pytest.mark.parametrize("gates", [True, False])
@pytest.mark.parametrize("chunk_size", [5, 128])
def test_forward(power, gates, chunk_size):
    layer = PowerRetention(D, power=power, chunk_size=chunk_size)
    assert set(layer.state_dict()) == {f"w_{x}.{y}" for x in "qkv" for y in ("weight", "bias")}
    x, log_g = torch.randn(B, T, D), -torch.rand(B, T) / 10 if gates else None
    assert_close(layer(x, log_g), by_hand(layer, x, log_g), TOLERANCE)


def test_power_1_is_the_quotient_of_the_sums():
    layer = PowerRetention(D, power=1)
    for w in (layer.w_q, layer.w_k):
        w.weight.mul_(0.05)
        w.bias.fill_(1)  # q.k about D: no sum is near 0
    x = torch.randn(B, T, D)
    assert_close(layer(x), by_hand(layer, x), TOLERANCE)


def test_calls_continue_until_reset():
    layer = PowerRetention(D)
    x, log_g = torch.randn(B, T, D), -torch.rand(B, T) / 10
    expected = by_hand(layer, x, log_g)
    assert_close(layer(x[:, :8], log_g[:, :8]), expected[:, :8], TOLERANCE)
    assert_close(layer(x[:, 8:15], log_g[:, 8:15]), expected[:, 8:15], TOLERANCE)
    for t in range(15, T):
        assert_close(layer.inference_step(x[:, t], log_g[:, t]), expected[:, t], TOLERANCE)
    assert layer.state.shape == (B, D * (D + 1) // 2, D) and layer.state.any()
    assert layer.sum_of_keys.shape == (B, D * (D + 1) // 2) and layer.sum_of_keys.any()
    layer.reset_state()
    assert layer.state.shape == (1, layer.expanded_dim, D) and not layer.state.any() and not layer.sum_of_keys.any()
    assert_close(layer(x, log_g), expected, TOLERANCE)


def test_one_token_and_one_gate():
    layer = PowerRetention(D, use_metal_kernels=False)
    x = torch.randn(1, 4, D)
    gates = torch.full((1, 4), -0.25)
    expected = by_hand(layer, x, gates)
    for t in range(4):
        y = layer.inference_step(x[0, t], -0.25)
        assert y.shape == (D,)
        assert_close(y, expected[0, t], TOLERANCE)


def test_a_prompt_is_continued_by_many_each_on_its_own():
    layer = PowerRetention(D)
    x = torch.randn(B, 9, D)
    x[:, :5] = x[:1, :5]
    expected = by_hand(layer, x)
    layer(x[:1, :5])
    for t in range(5, 9):
        assert_close(layer.inference_step(x[:, t]), expected[:, t], TOLERANCE)


def test_bad_inputs():
    with pytest.raises(ValueError, match="power is 5"):
        PowerRetention(D, power=5)
    layer = PowerRetention(D)
    with pytest.raises(ValueError, match=r"x has shape \[3, 12\]; expected \[batch, seq, 12\]"):
        layer(torch.randn(3, D))
    with pytest.raises(ValueError, match=r"log_g has shape \[3, 8\]; expected \[3, 9\]"):
        layer(torch.randn(3, 9, D), torch.zeros(3, 8))
    with pytest.raises(ValueError, match="x has 3 dimensions; expected 1"):
        layer.inference_step(torch.randn(3, 1, D))
    layer(torch.randn(3, 9, D))
    with pytest.raises(ValueError, match="x has 2 sequences and the state 3"):
        layer(torch.randn(2, 9, D))


def test_gradients_do_not_pass_from_call_to_call():
    layer = PowerRetention(D)
    x, log_g = torch.randn(B, T, D), -torch.rand(B, T) / 10

    def actual(x, log_g):
        layer.reset_state()
        return layer(x, log_g)

    def expected(x, log_g):
        q, k, v = (x @ w.weight.double().T + w.bias.double() for w in (layer.w_q, layer.w_k, layer.w_v))
        G = log_g.cumsum(1)
        w = ((q @ k.mT) ** 2 * (G[:, :, None] - G[:, None]).exp()).tril()
        return w @ v / w.sum(-1, keepdim=True)

    check_gradients(actual, expected, x, log_g)
    assert not layer.state.requires_grad and not layer.sum_of_keys.requires_grad
