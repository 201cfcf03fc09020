"""Naive formulas in float64 that the tests compare with. Nothing here imports the package: it must stay independent."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReferenceGrid:
    """A grid in plain words; `kind` is the class name of the grid that it describes."""

    kind: str
    bits: int = 1
    narrow: bool = False
    symmetric: bool = True
    threshold: float = 0.5
    k: int = 0


def levels(grid: ReferenceGrid) -> list[float]:
    """All levels in units of the step, smallest first."""
    if grid.kind == "Binary":
        return [-1.0, 1.0]
    if grid.kind == "Ternary":
        return [-1.0, 0.0, 1.0]
    half = 2 ** (grid.bits - 1)
    if grid.kind == "HalfInt":
        return [i + 0.5 for i in range(-half, half)]
    return [float(i) for i in range(-half + grid.narrow, half)]


def step_of(grid: ReferenceGrid, scale: Tensor) -> Tensor:
    """The distance between levels."""
    return scale * (math.pi / grid.k if grid.kind == "Pi" else 1.0)


def quantize(x: Tensor, step: Tensor, zero_point: Tensor | float, grid: ReferenceGrid) -> Tensor:
    """Levels q = clamp(round(x / s - o) + o + z, lo, hi)."""
    u = x.double() / step.double()
    if grid.kind == "Binary":
        return torch.where(u >= 0, 1.0, -1.0).double()
    if grid.kind == "Ternary" and grid.threshold != 0.5:
        return (u > grid.threshold).double() - (u < -grid.threshold).double()
    offset = 0.5 if grid.kind == "HalfInt" else 0.0
    lo, *_, hi = levels(grid)
    return (torch.round(u - offset) + offset + zero_point).clamp(lo, hi)


def border_distance(u: Tensor, grid: ReferenceGrid) -> Tensor:
    """Distance from the nearest point where the level changes; u includes the zero point."""
    all_levels = levels(grid)
    middles = [(low + high) / 2 for low, high in itertools.pairwise(all_levels)]
    borders = [-grid.threshold, grid.threshold] if grid.kind == "Ternary" else middles
    return (u.unsqueeze(-1) - torch.tensor(borders, dtype=torch.float64)).abs().amin(-1)


def dequantize(q: Tensor, step: Tensor, zero_point: Tensor | float) -> Tensor:
    """Fake-quantized values (q - z) s."""
    return (q - zero_point) * step.double()


def absmax_scale(grid: ReferenceGrid, amax: Tensor) -> Tensor:
    """The scale that puts amax on the end of a symmetric grid."""
    if grid.kind == "HalfInt":
        return 2 * amax / 2.0**grid.bits
    return amax / (max(levels(grid)) if grid.narrow else -min(levels(grid)))


def absmean_scale(grid: ReferenceGrid, mean: Tensor) -> Tensor:
    """The mean for one and two thirds of a bit, the start of LSQ for more."""
    if grid.kind in ("Binary", "Ternary"):
        return mean
    return 2 * mean / math.sqrt(max(levels(grid)))


def affine_scale(grid: ReferenceGrid, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of an asymmetric grid for a range that is stretched to contain zero."""
    lo, hi = min(levels(grid)), max(levels(grid))
    minimum, maximum = minimum.clamp(max=0.0), maximum.clamp(min=0.0)
    scale = (maximum - minimum) / (hi - lo)
    return scale, torch.round(lo - minimum / scale).clamp(lo, hi)


def percentile(values: Tensor, q: float) -> float:
    """Linear interpolation between the two order statistics around position (n - 1) q / 100."""
    ordered = sorted(values.double().flatten().tolist())
    position = (len(ordered) - 1) * q / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (ordered[above] - ordered[below]) * (position - below))


def squared_error(x: Tensor, step: Tensor, zero_point: Tensor | float, grid: ReferenceGrid) -> float:
    """Sum of squared rounding errors."""
    return float((dequantize(quantize(x, step, zero_point, grid), step, zero_point) - x.double()).square().sum())


def least_error(x: Tensor, grid: ReferenceGrid, candidates: Iterable[tuple[Tensor, Tensor | float]]) -> float:
    """The smallest squared error among candidate (scale, zero point) pairs."""
    return min(squared_error(x, step_of(grid, scale), zero, grid) for scale, zero in candidates)


def divergence(x: Tensor, step: float, grid: ReferenceGrid, bins: int = 256) -> float:
    """KL(P || Q): P a histogram over -amax..amax, Q its mass averaged over the bins that share a level.

    The two bins beside zero count no more than their neighbors, so that zeros after a ReLU do not rule.
    """
    values = x.double().flatten().tolist()
    amax = max(abs(value) for value in values)
    mass = [0] * bins
    for value in values:
        mass[min(int((value / amax + 1) * (bins / 2)), bins - 1)] += 1
    for beside, neighbor in ((bins // 2, bins // 2 + 1), (bins // 2 - 1, bins // 2 - 2)):
        mass[beside] = min(mass[beside], mass[neighbor])
    centers = torch.tensor([((index + 0.5) * 2 / bins - 1) * amax for index in range(bins)], dtype=torch.float64)
    level_of = quantize(centers, torch.tensor(step), 0.0, grid).tolist()
    pooled: dict[float, list[int]] = {}
    for count, level in zip(mass, level_of, strict=True):
        pooled.setdefault(level, []).append(count)
    share = {level: sum(counts) / len(counts) for level, counts in pooled.items()}
    return sum(count * math.log(count / share[level]) for count, level in zip(mass, level_of, strict=True) if count > 0)


def moving_average(values: Iterable[float], momentum: float) -> float:
    """Exponential moving average that starts at the first value."""
    average = math.nan
    for index, value in enumerate(values):
        average = value if index == 0 else momentum * average + (1 - momentum) * value
    return average


def central_difference(function: Callable[[Tensor], Tensor], at: Tensor, width: float = 1e-6) -> Tensor:
    """Derivative of an elementwise (or summed) function by central differences, in float64."""
    return (function(at + width) - function(at - width)) / (2 * width)


def staircase(u: Tensor, temperature: Tensor | float, grid: ReferenceGrid) -> Tensor:
    """The smooth staircase of DSQ in units of the step: a tanh of height one level around each border."""
    half = 1.0 if grid.kind == "Binary" else 0.5
    if grid.kind == "Binary":
        border = torch.zeros_like(u)
    elif grid.kind == "Ternary":
        border = torch.where(u < 0, -grid.threshold, grid.threshold)
    else:
        border = torch.floor(u) + 0.5 if grid.kind != "HalfInt" else torch.floor(u - 0.5) + 1.0
    t = torch.as_tensor(temperature, dtype=torch.float64)
    return border + half * torch.tanh((u - border) / t) / torch.tanh(half / t)


def lsq_surrogate(x: Tensor, step: Tensor, start: Tensor, zero_point: Tensor | float, grid: ReferenceGrid) -> Tensor:
    """x^ as a function of the step, rounding replaced by its shift at `start`, a constant; clipped levels stay."""
    lo, hi = min(levels(grid)), max(levels(grid))
    q = quantize(x, start, zero_point, grid)
    u = x / start + zero_point
    inside = (u >= lo) & (u <= hi)
    return torch.where(inside, (x / step + (q - u)) * step, (q - zero_point) * step)


def walsh_hadamard_matrix(size: int) -> Tensor:
    """H[i, j] = (-1) ** popcount(i & j)."""
    rows = [[(-1.0) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
    return torch.tensor(rows, dtype=torch.float64)
