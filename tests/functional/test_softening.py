"""The softened staircase: the identity at 1, rounding towards 0, PARQ's formula between."""

import pytest
import torch
from torch import Tensor

from lightning_qat.functional.levels import quantize
from lightning_qat.functional.softening import soft_values
from lightning_qat.quantization import Binary, Grid, HalfInt, Int, Pi, Ternary

GRIDS: list[Grid] = [Int(2), Int(4), Int(3, narrow=True), HalfInt(2), Ternary(), Binary(), Pi(3, 4)]
X = torch.linspace(-3, 3, 241, dtype=torch.float64)
SCALE = torch.tensor([0.37], dtype=torch.float64)


def soft(grid: Grid, softness: float, x: Tensor = X, zero_point: Tensor | None = None) -> Tensor:
    lo, hi = (torch.tensor(bound, dtype=torch.float64) for bound in grid.bounds)
    return soft_values(x, SCALE, zero_point, torch.tensor(softness), lo=lo, hi=hi, rounding=grid)


def reference(u: float, levels: list[float], softness: float) -> float:
    """The interval between two levels, its middle, and a line of slope 1 / softness through it."""
    if u <= levels[0] or u >= levels[-1]:
        return levels[0] if u <= levels[0] else levels[-1]
    below = max(level for level in levels if level <= u)
    above = min(level for level in levels if level > u)
    middle = (below + above) / 2
    return min(max(middle + (u - middle) / softness, below), above)


@pytest.mark.parametrize("softness", [1.0, 0.6, 0.1])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_formula(grid: Grid, softness: float) -> None:
    lo, hi = grid.bounds
    levels = [-1.0, 1.0] if isinstance(grid, Binary) else [lo + i for i in range(round(hi - lo) + 1)]
    expected = [reference(float(u), levels, softness) * float(SCALE) for u in X / SCALE]
    assert torch.allclose(soft(grid, softness), torch.tensor(expected, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_limits(grid: Grid) -> None:
    lo, hi = (bound * float(SCALE) for bound in grid.bounds)
    assert torch.allclose(soft(grid, 1.0), X.clamp(lo, hi))
    levels = quantize(X, SCALE, None, lo=grid.lo, hi=grid.hi, rounding=grid)
    borders = ((X / SCALE - levels).abs() - grid.half_cell).abs() < 1e-6
    assert torch.allclose(soft(grid, 1e-9)[~borders], (levels * SCALE)[~borders])


def test_zero_point() -> None:
    grid, zero_point = Int(2, symmetric=False), torch.ones(1, dtype=torch.float64)
    expected = [(reference(float(u) + 1, [-2.0, -1.0, 0.0, 1.0], 0.5) - 1) * float(SCALE) for u in X / SCALE]
    found = soft(grid, 0.5, zero_point=zero_point)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64))


def test_dtype_and_values_that_are_not_finite() -> None:
    x = torch.tensor([float("nan"), float("inf"), 0.1], dtype=torch.bfloat16)
    found = soft(Int(3), 0.5, x)
    assert found.dtype == torch.bfloat16
    assert torch.isfinite(found).all()
