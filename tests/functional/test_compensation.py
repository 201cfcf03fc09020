"""Compensated rounding against the update of GPTQ as the paper writes it down, in float64."""

import pytest
import torch
from torch import Tensor

from lightning_qat.functional.compensation import (
    Levels,
    compensated_levels,
    least_squares_scale,
    moved_into_cells,
    output_error,
)
from lightning_qat.quantization import Binary, Grid, HalfInt, Int, Ternary

GRIDS: list[Grid] = [Int(2), Int(4), HalfInt(2), Ternary(), Binary()]


def layer(features: int, outputs: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    x = torch.randn(4 * features, features, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(outputs, features, generator=generator, dtype=torch.float64), x.T @ x / len(x)


def spread(grid: Grid, weight: Tensor, scale: float = 0.7) -> Levels:
    return Levels(torch.full_like(weight, scale), None, *grid.bounds, grid)


def nearest(weight: float, grid: Grid, scale: float) -> float:
    """The level next to a weight, by looking at all of them."""
    offset = grid.offset
    lo, hi = grid.bounds
    if isinstance(grid, Binary):
        return 1.0 if weight >= 0 else -1.0
    candidates = [lo + i for i in range(round(hi - lo) + 1)]
    assert all((level - offset).is_integer() for level in candidates)
    return min(candidates, key=lambda level: abs(weight / scale - level))


def reference(weight: Tensor, gram: Tensor, grid: Grid, scale: float, damping: float) -> Tensor:
    """Optimal brain surgeon, one weight at a time, with the inverse of the remaining Hessian recomputed each time."""
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    order = torch.argsort(gram.diagonal(), descending=True).tolist()
    found = torch.zeros_like(weight)
    for row in range(len(weight)):
        rest = weight[row].clone()
        for position, column in enumerate(order):
            left = order[position:]
            inverse = torch.linalg.inv(hessian[left][:, left])
            found[row, column] = nearest(float(rest[column]), grid, scale)
            error = (rest[column] - found[row, column] * scale) / inverse[0, 0]
            rest[left] -= error * inverse[0]
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_levels_are_those_of_the_paper(grid: Grid) -> None:
    weight, gram = layer(12)
    found = compensated_levels(weight, gram, spread(grid, weight))
    assert torch.equal(found, reference(weight, gram, grid, 0.7, 0.01))


def test_blocks_of_columns_change_nothing() -> None:
    weight, gram = layer(150, outputs=2)
    found = compensated_levels(weight, gram, spread(Int(3), weight))
    assert torch.equal(found, reference(weight, gram, Int(3), 0.7, 0.01))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_outputs_are_nearer_than_by_rounding_to_nearest(grid: Grid) -> None:
    weight, gram = layer(32, outputs=16)
    levels = spread(grid, weight)
    found = levels.values(compensated_levels(weight, gram, levels))
    plain = levels.values(levels.of(weight))
    assert output_error(weight, found, gram).sum() < 0.9 * output_error(weight, plain, gram).sum()


def test_uncorrelated_inputs_leave_nothing_to_compensate() -> None:
    weight, _ = layer(8)
    levels = spread(Int(3), weight)
    assert torch.equal(compensated_levels(weight, torch.eye(8, dtype=torch.float64), levels), levels.of(weight))


def test_output_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    weight, rounded = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    expected = ((x @ (weight - rounded).T) ** 2).mean(0)
    assert torch.allclose(output_error(weight, rounded, x.T @ x / 50)[:, 0], expected)


def test_refitted_scale_is_the_best() -> None:
    weight, gram = layer(10)
    steps = torch.round(weight)
    scale = least_squares_scale(weight, steps, gram)
    at_best = output_error(weight, steps * scale, gram)
    for factor in (0.99, 1.01):
        assert (output_error(weight, steps * scale * factor, gram) > at_best).all()


@pytest.mark.parametrize("grid", [*GRIDS, Ternary(0.7)], ids=str)
def test_moved_weights_round_to_what_was_chosen(grid: Grid) -> None:
    weight, gram = layer(24, outputs=8)
    levels = spread(grid, weight)
    chosen = compensated_levels(weight, gram, levels)
    moved = moved_into_cells(weight, chosen, levels)
    assert torch.equal(levels.of(moved), chosen)
    inside = (weight - levels.values(chosen)).abs() <= 0.98 * grid.half_cell * 0.7
    kept = inside & (levels.of(weight) == chosen)
    assert torch.equal(moved[kept], weight[kept])


def test_inputs_that_are_always_zero() -> None:
    weight, gram = layer(6)
    levels = spread(Int(2), weight)
    assert torch.equal(compensated_levels(weight, torch.zeros_like(gram), levels), levels.of(weight))


def test_dependent_inputs_are_damped() -> None:
    weight, _ = layer(6)
    found = compensated_levels(weight, torch.ones(6, 6, dtype=torch.float64), spread(Int(2), weight), damping=1e-12)
    assert torch.isfinite(found).all()


def test_inputs_that_are_not_finite() -> None:
    weight, gram = layer(6)
    gram[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not all finite"):
        compensated_levels(weight, gram, spread(Int(2), weight))
