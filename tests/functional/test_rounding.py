"""Rounding to the levels of each grid."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_qat.functional import round_binary, round_ternary, round_uniform

DTYPES = (torch.float32, torch.float64)


def nearest(value: float, levels: list[float]) -> float:
    return min(levels, key=lambda level: abs(level - value))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_uniform_takes_the_nearest_level(dtype: torch.dtype, offset: float) -> None:
    u = 4 * torch.randn(200, dtype=dtype)
    levels = [index + offset for index in range(-40, 40)]
    assert round_uniform(u, offset).tolist() == [nearest(value, levels) for value in u.tolist()]


def test_uniform_ties_go_to_even() -> None:
    ties = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert round_uniform(ties).tolist() == [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]
    assert round_uniform(ties + 0.5, offset=0.5).tolist() == [-1.5, -1.5, 0.5, 0.5, 2.5, 2.5]


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7])
def test_ternary_compares_with_the_threshold(threshold: float) -> None:
    u = torch.randn(200)
    expected = [0.0 if abs(value) <= threshold else (1.0 if value > 0 else -1.0) for value in u.tolist()]
    assert round_ternary(u, threshold).tolist() == expected


@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.75])
def test_the_threshold_itself_is_zero(threshold: float) -> None:
    assert round_ternary(torch.tensor([threshold, -threshold, 9.0, -9.0]), threshold).tolist() == [0, 0, 1, -1]


def test_binary_has_two_levels() -> None:
    u = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 0.5, -0.5])
    assert round_binary(u).tolist() == [1, 1, 1, -1, 1, -1, 1, -1]


@pytest.mark.parametrize("function", [round_uniform, round_ternary, round_binary, lambda u: round_ternary(u, 0.3)])
def test_the_input_stays_as_it_is(function: Callable[[Tensor], Tensor]) -> None:
    u = torch.randn(20)
    before = u.clone()
    result = function(u)
    result.add_(1)
    assert torch.equal(u, before)
    assert result.dtype == u.dtype
