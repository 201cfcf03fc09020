"""Finding scales: ranges, percentiles, error search and entropy, on tensors or on histograms."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from lightning_qat.functional.application import compiled_for_cpu
from lightning_qat.functional.bounded import finish_scale
from lightning_qat.functional.gradients import number
from lightning_qat.functional.levels import dequantize, quantize
from lightning_qat.functional.points import Rounding

_CHUNK = 1 << 18  # elements searched at a time by each thread: the temporaries then stay in the cache
_ACCELERATOR_CHUNK = 1 << 26
_COARSE = tuple(2.0 ** (-k / 4) for k in range(21))
_FINE = tuple(2.0 ** (k / 16) for k in (-2, -1, 1, 2))
_FINEST = tuple(2.0 ** (k / 32) for k in (-1, 1))
_AROUND_MEAN = (0.7, 1.0, 1.4)
_LEAST_SQUARES_STEPS = 3
_SLACK = 1e-5  # a least-squares step is exact, so it may look worse by what rounding adds to the sum of errors


class GridLike(Rounding, Protocol):
    """What a search needs to know of a grid."""

    @property
    def symmetric(self) -> bool:
        """Whether there is no zero point."""

    @property
    def lo(self) -> float:
        """Smallest level."""

    @property
    def hi(self) -> float:
        """Largest level."""

    @property
    def step_factor(self) -> float:
        """Step between levels in units of the scale."""

    def absmax_scale(self, amax: Tensor, lo: Tensor | float, hi: Tensor | float) -> Tensor:
        """Return the scale that puts amax on the end of the grid."""

    def absmean_scale(self, mean: Tensor, hi: Tensor | float) -> Tensor:
        """Return the scale that suits a mean absolute value."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Values to find a scale for: a tensor, or the centers of a histogram with counts.

    Args:
        values: grouped tensor.
        dims: dimensions over which one scale extends.
        counts: how often each value occurs, the shape of values; None means once.
        limits: exact (min, max) where values are only bin centers.
        average_amax: moving average of the absolute maximum over batches.
    """

    values: Tensor
    dims: tuple[int, ...]
    counts: Tensor | None = None
    limits: tuple[Tensor, Tensor] | None = None
    average_amax: Tensor | None = None

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest value of each group."""
        if self.limits is not None:
            return self.limits
        if self._empty():  # any scale will do
            zero = self.values.sum(self.dims, keepdim=True)
            return zero, zero
        return self.values.amin(self.dims, keepdim=True), self.values.amax(self.dims, keepdim=True)

    def _empty(self) -> bool:
        empty: Any = self.values.numel() == 0  # of a compiler it may be an expression, of torch.jit.trace a tensor
        return guard_or_false(empty) if torch.compiler.is_compiling() else bool(empty)

    def largest(self) -> Tensor:
        """Return the largest absolute value of each group, NaN where there is one."""
        bare = self.limits is None and self.values.dtype == torch.float32
        if bare and compiled_for_cpu(self.values) and not self._empty():
            # Magnitudes have the order of their bits, NaN the last: integers need no look for NaN at each step.
            bits = self.values.view(torch.int32).bitwise_and(0x7FFFFFFF)
            return bits.amax(self.dims, keepdim=True).view(torch.float32)
        minimum, maximum = self.range()
        return torch.maximum(-minimum, maximum)

    def finite(self) -> "Sample":
        """Return the values alone in float32 or float64, zero where they are not finite."""
        wide = self.values if self.values.dtype == torch.float64 else self.values.float()
        return Sample(torch.nan_to_num(wide, posinf=0.0, neginf=0.0), self.dims)

    def mean(self) -> Tensor:
        """Return the mean absolute value of each group."""
        if self.counts is None:
            total = self.values.abs().sum(self.dims, keepdim=True)
            return total.div_(max(1, self.values.numel() // max(1, total.numel())))
        weight = self.counts.sum(self.dims, keepdim=True).clamp(min=1)
        return ((self.values.abs() * self.counts).sum(self.dims, keepdim=True) / weight).float()


def range_to_scale(
    minimum: Tensor, maximum: Tensor, grid: GridLike, lo: Tensor | float, hi: Tensor | float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return (scale, zero point or None) for a range of values, the range stretched to contain 0.

    Args:
        minimum: smallest value per group.
        maximum: largest value per group.
        grid: the grid.
        lo: its smallest level, as number or tensor.
        hi: its largest level.
        dtype: storage dtype of the scale.
    """
    if grid.symmetric:
        return absmax_to_scale(torch.maximum(-minimum, maximum), grid, lo, hi, dtype), None
    largest, lo, hi = torch.finfo(minimum.dtype).max / 256, number(lo), number(hi)
    minimum, maximum = torch.nan_to_num(minimum.clamp(max=0)), torch.nan_to_num(maximum.clamp(min=0))
    scale = finish_scale(maximum / (hi - lo) - minimum / (hi - lo), dtype, largest=largest)
    return scale, torch.round(lo - minimum / scale).clamp(lo, hi)  # type: ignore[arg-type]


def absmax_to_scale(
    amax: Tensor, grid: GridLike, lo: Tensor | float, hi: Tensor | float, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """Return the finished scale of a symmetric grid for the largest absolute value per group."""
    return finish_scale(grid.absmax_scale(amax, number(lo), hi), dtype, largest=torch.finfo(amax.dtype).max / 256)


def absolute_percentile(sample: Sample, percentile: float) -> Tensor:
    """Return a percentile of the absolute values of each group, linearly interpolated.

    Args:
        sample: the values.
        percentile: in (0, 100].
    """
    if sample.counts is not None:
        return _histogram_percentile(sample.values.abs(), sample.counts, percentile)
    return _sorted_percentile(sample.values.abs(), sample.dims, percentile)


def signed_percentiles(sample: Sample, percentile: float) -> tuple[Tensor, Tensor]:
    """Return the (100 - percentile)th and the percentile-th value of each group."""
    if sample.counts is not None:
        return (
            -_histogram_percentile(-sample.values, sample.counts, percentile),
            _histogram_percentile(sample.values, sample.counts, percentile),
        )
    return (
        -_sorted_percentile(-sample.values, sample.dims, percentile),
        _sorted_percentile(sample.values, sample.dims, percentile),
    )


def _rows(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """Move the reduced dimensions to the end and flatten: [groups, elements]; and the kept-dims shape."""
    kept = [d for d in range(x.dim()) if d not in dims]
    shape = tuple(1 if d in dims else n for d, n in enumerate(x.shape))
    return x.permute(*kept, *dims).reshape(math.prod(x.shape[d] for d in kept), -1), shape


def _sorted_percentile(x: Tensor, dims: tuple[int, ...], percentile: float) -> Tensor:
    rows, shape = _rows(x, dims)
    ordered = rows.sort(dim=-1).values
    position = (rows.shape[-1] - 1) * percentile / 100
    below = min(int(position), rows.shape[-1] - 1)
    above = min(below + 1, rows.shape[-1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], position - below).reshape(shape)


def _histogram_percentile(values: Tensor, counts: Tensor, percentile: float) -> Tensor:
    order = values.flatten().argsort()
    cumulative = counts.flatten()[order].cumsum(0)
    index = torch.searchsorted(cumulative, cumulative[-1:] * (percentile / 100)).clamp(max=order.numel() - 1)
    return values.flatten()[order][index]


class _Best:
    """The best scale so far per group, by squared error."""

    def __init__(self, sample: Sample, grid: GridLike, dtype: torch.dtype) -> None:
        self.sample, self.grid, self.dtype = sample, grid, dtype
        self.minimum, self.maximum = sample.range()
        self.scale, self.zero_point = range_to_scale(self.minimum, self.maximum, grid, grid.lo, grid.hi, dtype)
        self.error, _ = self._error(self.scale, self.zero_point)

    def _error(self, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        values, step = self.sample.values, scale * self.grid.step_factor
        levels = quantize(values, step, zero_point, lo=self.grid.lo, hi=self.grid.hi, rounding=self.grid)
        square = dequantize(levels, step, zero_point).sub_(values).square_()
        square = square if self.sample.counts is None else square * self.sample.counts
        return torch.nan_to_num(square.sum(self.sample.dims, keepdim=True)), levels

    def consider(self, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Keep a scale where its error is lower, and return its error."""
        error, _ = self._error(scale, zero_point)
        self._take(error < self.error, error, scale, zero_point)
        return error

    def _take(self, better: Tensor, error: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
        self.error, self.scale = torch.where(better, error, self.error), torch.where(better, scale, self.scale)
        if zero_point is not None and self.zero_point is not None:
            self.zero_point = torch.where(better, zero_point, self.zero_point)

    def shrink_while_useful(self, factors: tuple[float, ...]) -> None:
        """Consider falling multiples of AbsMax until no smaller one can be better in any group.

        What is clipped at a scale is clipped at smaller ones, too, and what is not errs by at most one step. So the
        error at all smaller scales is at least the present one minus one squared step per value.
        """
        counts = self.sample.counts
        count: Tensor | float = self.sample.values.numel() / max(1, self.scale.numel())
        count = count if counts is None else counts.sum(self.sample.dims, keepdim=True)
        for factor in factors:
            scale, zero_point = self.shrink(factor)
            least = self.consider(scale, zero_point) - count * (scale * self.grid.step_factor).square()
            if self.grid.symmetric and bool(((least > self.error) | (self.error == 0)).all()):
                return

    def shrink(self, factor: Tensor | float) -> tuple[Tensor, Tensor | None]:
        return range_to_scale(
            self.minimum * factor, self.maximum * factor, self.grid, self.grid.lo, self.grid.hi, self.dtype
        )

    def others(self) -> Iterator[Tensor]:
        """Yield candidates beyond multiples of AbsMax: the scale that clips nothing, and some near the mean."""
        amax = torch.maximum(self.maximum / self.grid.hi, self.minimum / self.grid.lo)
        yield self._finish(amax / self.grid.step_factor)
        mean = self.grid.absmean_scale(self.sample.mean(), self.grid.hi)
        for factor in _AROUND_MEAN:
            yield self._finish(mean * factor)

    def _finish(self, scale: Tensor) -> Tensor:
        return finish_scale(scale, self.dtype).to(self.scale.dtype)

    def refine(self, steps: int) -> None:
        """Try the least-squares scale for the present levels, <x, q> / <q, q>, some times."""
        _, levels = self._error(self.scale, self.zero_point)
        for _ in range(steps):
            scale = self._least_squares(levels)
            error, new = self._error(scale, self.zero_point)
            better = error < self.error * (1 + _SLACK)
            levels = torch.where(better, new, levels)
            self._take(better, error, scale, self.zero_point)

    def _least_squares(self, levels: Tensor) -> Tensor:
        levels = levels if self.zero_point is None else levels - self.zero_point
        weighted = levels if self.sample.counts is None else levels * self.sample.counts
        dims = self.sample.dims
        top = (torch.nan_to_num(self.sample.values) * weighted).sum(dims, keepdim=True)
        bottom = (levels * weighted).sum(dims, keepdim=True) * self.grid.step_factor
        return self._finish(torch.where((bottom > 0) & (top > 0), top / bottom, self.scale))


def _search(sample: Sample, grid: GridLike, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    best = _Best(sample, grid, dtype)
    start = best.scale
    for candidate in best.others() if grid.symmetric else ():
        best.consider(candidate, None)
    best.shrink_while_useful(_COARSE[1:])
    for factors in (_FINE, _FINEST):
        middle = best.scale / start
        for factor in factors:
            best.consider(*best.shrink(middle * factor))
    best.refine(_LEAST_SQUARES_STEPS)
    return best.scale, best.zero_point


def _chunks(sample: Sample) -> Iterator[Sample]:
    values, counts = sample.values, sample.counts
    size = _CHUNK * torch.get_num_threads() if values.device.type == "cpu" else _ACCELERATOR_CHUNK
    if 0 in sample.dims or values.numel() <= size or counts is not None:
        yield sample
        return
    rows = max(1, size * values.shape[0] // values.numel())
    for chunk in values.split(rows):
        yield Sample(chunk, sample.dims)


def minimum_error_scale(sample: Sample, grid: GridLike, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    r"""Return the scale (and zero point) that minimizes the squared error :math:`\sum (\hat x - x)^2` of each group.

    Multiples of the AbsMax scale from 1 down to 1/32, the scale that clips nothing and multiples of the AbsMean scale,
    then finer multiples around the best, then least-squares steps :math:`s = \langle x, q \rangle / \langle q, q
    \rangle`, each kept only where it lowers the error. For ``Binary`` the result is the exact optimum, the mean
    absolute value.
    """
    parts = [_search(chunk, grid, dtype) for chunk in _chunks(sample)]
    zero_points = [zero for _, zero in parts if zero is not None]
    return torch.cat([scale for scale, _ in parts]), torch.cat(zero_points) if zero_points else None


def entropy_scale(sample: Sample, grid: GridLike, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    r"""Return the multiple of the AbsMax scale with the smallest divergence :math:`KL(P \| Q)` of each group.

    P is the histogram of the values, Q the same mass averaged over the bins that share a level.

    Source: TensorRT's entropy calibration (S. Migacz, GTC 2017); deviations: values beyond the range
    stay in the outermost level instead of being dropped, and mass is averaged over empty bins, too, because the
    histograms of small groups are mostly empty. As there, the bins beside zero count no more than their neighbors.
    """
    centers, mass = _histogram(sample)
    minimum, maximum = (part.reshape(-1, 1) for part in sample.range())
    best_scale, best_zero = range_to_scale(minimum, maximum, grid, grid.lo, grid.hi, dtype)
    best = torch.full_like(best_scale, math.inf)
    for factor in _COARSE:
        scale, zero = range_to_scale(minimum * factor, maximum * factor, grid, grid.lo, grid.hi, dtype)
        divergence = _divergence(centers, mass, scale * grid.step_factor, zero, grid)
        better = divergence < best
        best, best_scale = torch.where(better, divergence, best), torch.where(better, scale, best_scale)
        best_zero = None if zero is None or best_zero is None else torch.where(better, zero, best_zero)
    shape = sample.range()[0].shape
    return best_scale.reshape(shape), None if best_zero is None else best_zero.reshape(shape)


def _histogram(sample: Sample, bins: int = 256) -> tuple[Tensor, Tensor]:
    """Return (bin centers, mass) per group, [groups, bins]."""
    rows, _ = _rows(torch.nan_to_num(sample.values.float()), sample.dims)
    weight = torch.ones_like(rows) if sample.counts is None else sample.counts.reshape(1, -1)
    amax = rows.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    index = ((rows / amax + 1) * (bins / 2)).long().clamp(0, bins - 1)
    mass = weight.new_zeros(rows.shape[0], bins).scatter_add_(1, index, weight)
    # Exact zeros, as after a ReLU, cost nothing on any grid; spread over the cell of zero they would rule the choice.
    middle = bins // 2
    mass[:, middle] = torch.minimum(mass[:, middle], mass[:, middle + 1])
    mass[:, middle - 1] = torch.minimum(mass[:, middle - 1], mass[:, middle - 2])
    centers = (torch.arange(bins, dtype=torch.float32, device=rows.device) + 0.5) * (2 / bins) - 1
    return centers * amax, mass


def _divergence(centers: Tensor, mass: Tensor, step: Tensor, zero: Tensor | None, grid: GridLike) -> Tensor:
    levels = quantize(centers.float(), step, zero, lo=grid.lo, hi=grid.hi, rounding=grid)
    index = torch.floor(levels - grid.lo).long()
    num_levels = int(grid.hi - grid.lo) + 1
    pooled = torch.zeros(mass.shape[0], num_levels, dtype=mass.dtype, device=mass.device)
    share = pooled.scatter_add(1, index, mass) / pooled.scatter_add(1, index, torch.ones_like(mass)).clamp(min=1)
    ratio = torch.where(mass > 0, mass / share.gather(1, index).clamp(min=1e-12), 1.0)
    return (mass * ratio.log()).sum(-1, keepdim=True)
