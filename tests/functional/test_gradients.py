"""Gradients of rounding against finite differences of what they are derivatives of."""

import pytest
import torch

from lightning_qat.functional import elementwise_scaling, staircase_slope, staircase_temperature_slope
from tests import _reference as ref

DOUBLE = torch.float64


@pytest.mark.parametrize("delta", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("lo", "hi"), [(-8.0, 7.0), (-1.0, 1.0), (-2.0, 1.0)])
def test_elementwise_scaling_is_the_derivative_of_its_definition(delta: float, lo: float, hi: float) -> None:
    """Its antiderivative for a constant g: g x + delta |g| (x - x_q)^2 / 2 on the grid normalized to [0, 1]."""
    u = torch.empty(300, dtype=DOUBLE).uniform_(lo - 2, hi + 2)
    q = torch.round(u).clamp(lo, hi)
    grad = torch.randn_like(u)
    width = hi - lo

    def antiderivative(at: torch.Tensor) -> torch.Tensor:
        normalized, level = at / width, q / width
        return width * (grad * normalized + delta * grad.abs() * (normalized - level) ** 2 / 2)

    expected = torch.where((u >= lo) & (u <= hi), ref.central_difference(antiderivative, u), 0.0)
    bounds = torch.tensor(lo, dtype=DOUBLE), torch.tensor(hi, dtype=DOUBLE)
    torch.testing.assert_close(elementwise_scaling(grad, u, q, *bounds, delta), expected, rtol=1e-6, atol=1e-8)


def test_elementwise_scaling_turns_with_the_sign_of_the_gradient() -> None:
    """It amplifies steps that leave the level and damps those that return: not the always-amplifying rule (trap 31)."""
    u, q, one = torch.tensor([0.25, 0.25]), torch.zeros(2), torch.tensor(1.0)
    up, down = elementwise_scaling(torch.tensor([1.0, -1.0]), u, q, -one, one, delta=0.8).tolist()
    assert (up, down) == pytest.approx((1.1, -0.9))


@pytest.mark.parametrize("half_cell", [0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.012, 0.03, 0.1, 0.5, 2.0, 100.0])
def test_staircase_slopes_are_derivatives(half_cell: float, temperature: float) -> None:
    distance = torch.linspace(-half_cell, half_cell, 101, dtype=DOUBLE)
    t = torch.full_like(distance, temperature)

    def stair(d: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return half_cell * torch.tanh(d / t) / torch.tanh(half_cell / t)

    expected = ref.central_difference(lambda d: stair(d, t), distance, width=1e-6 * temperature)
    torch.testing.assert_close(staircase_slope(distance, half_cell, temperature), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(staircase_slope(distance, half_cell, t[:1]), expected, rtol=1e-5, atol=1e-5)
    expected = ref.central_difference(lambda t: stair(distance, t), t, width=1e-5 * temperature)
    torch.testing.assert_close(staircase_temperature_slope(distance, half_cell, t[:1]), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("half_cell", "temperature"), [(0.5, 0.012), (1.0, 0.024), (0.5, 0.4)])
def test_slope_is_alive_in_float32_from_the_stated_temperature_on(half_cell: float, temperature: float) -> None:
    distance = torch.linspace(-half_cell, half_cell, 1001)
    slope = staircase_slope(distance, half_cell, temperature)
    assert (slope > 0).all()
    expected = staircase_slope(distance.double(), half_cell, temperature)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-4, atol=0.0)


def test_slope_of_large_temperatures_is_one() -> None:
    distance = torch.linspace(-0.5, 0.5, 11)
    torch.testing.assert_close(staircase_slope(distance, 0.5, 1e3), torch.ones(11), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("temperature", [1e-45, 1e-20, 1e-6, 1e6, 1e38])
def test_slopes_of_extreme_temperatures_are_finite(temperature: float) -> None:
    distance = torch.linspace(-0.5, 0.5, 11)
    assert torch.isfinite(staircase_slope(distance, 0.5, temperature)).all()


def test_staircase_integrates_to_one_level() -> None:
    """The smooth staircase climbs exactly one level per cell, whatever its temperature."""
    distance = torch.linspace(-0.5, 0.5, 20001, dtype=DOUBLE)
    for temperature in (0.05, 0.5, 5.0):
        area = torch.trapezoid(staircase_slope(distance, 0.5, temperature), distance)
        assert area.item() == pytest.approx(1.0, abs=1e-5)
