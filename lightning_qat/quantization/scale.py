"""Scales: how the step between levels is found."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_qat.functional.bounded import finish_scale
from lightning_qat.functional.scaling import (
    Sample,
    absmax_to_scale,
    absolute_percentile,
    entropy_scale,
    minimum_error_scale,
    range_to_scale,
    signed_percentiles,
)
from lightning_qat.quantization._checks import check_number, check_positive
from lightning_qat.quantization.grid import Grid


@dataclass(frozen=True, eq=False)
class Bounds:
    """A grid with its bounds as numbers or tensors, and the dtype in which scales are stored."""

    grid: Grid
    lo: Tensor | float
    hi: Tensor | float
    dtype: torch.dtype = torch.float32


class Scale(ABC):
    """Finds (scale, zero point or None) for a sample of values, shaped to broadcast to it."""

    recomputed: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    takes_zero_point: ClassVar[bool] = True

    @abstractmethod
    def find(self, sample: Sample, bounds: Bounds) -> tuple[Tensor, Tensor | None]:
        """Return the scale and the zero point, both with kept dimensions."""

    @property
    def label(self) -> str:
        """Compact name used in logs."""
        return type(self).__name__.lower()


@final
@dataclass(frozen=True)
class AbsMax(Scale):
    """The largest absolute value falls on the end of the grid; recomputed in every forward.

    Source: arXiv:1712.05877; the formula of each grid is in its docstring.
    """

    recomputed: ClassVar[bool] = True

    @override
    def find(self, sample: Sample, bounds: Bounds) -> tuple[Tensor, Tensor | None]:
        if bounds.grid.symmetric:
            return absmax_to_scale(sample.largest(), bounds.grid, bounds.lo, bounds.hi, bounds.dtype), None
        return range_to_scale(*sample.range(), bounds.grid, bounds.lo, bounds.hi, bounds.dtype)


@final
@dataclass(frozen=True)
class AbsMean(Scale):
    r"""A multiple of the mean absolute value (binary, ternary) or of :math:`2 mean / \sqrt{hi}`; recomputed every time.

    Args:
        multiple: the factor, positive and finite. LSQ's start is wide for few levels: the least error of Gaussian
            values is at 1.53 (ternary), 0.76 (``HalfInt(2)``), 0.66 (``Int(2)``), 0.65 (``Int(3)``).

    Raises:
        ValueError: multiple out of range.

    Source: BitNet, arXiv:2310.11453, arXiv:2402.17764; LSQ's start, arXiv:1902.08153; a multiple
    of the mean, there as the threshold: ternary weight networks, arXiv:1605.04711.
    """

    recomputed: ClassVar[bool] = True
    takes_zero_point: ClassVar[bool] = False

    multiple: float = 1.0

    def __post_init__(self) -> None:
        check_positive("AbsMean: multiple", self.multiple)

    @override
    def find(self, sample: Sample, bounds: Bounds) -> tuple[Tensor, Tensor | None]:
        largest = torch.finfo(sample.values.dtype).max / 256
        scale = bounds.grid.absmean_scale(sample.mean(), bounds.hi) * self.multiple
        return finish_scale(scale, bounds.dtype, largest=largest), None


@final
@dataclass(frozen=True)
class Percentile(Scale):
    """A percentile of the absolute values in the place of their maximum; found once and stored.

    Args:
        percentile: in (0, 100]; 100 equals AbsMax. On a grid with zero point both tails are cut.

    Raises:
        ValueError: percentile outside (0, 100], or at most 50 on a grid with a zero point (raised by the spec).
    """

    percentile: float = 99.9

    def __post_init__(self) -> None:
        check_number("Percentile: percentile", self.percentile, "a value in (0, 100]", holds=lambda p: 0 < p <= 100)

    @override
    def find(self, sample: Sample, bounds: Bounds) -> tuple[Tensor, Tensor | None]:
        if bounds.grid.symmetric:
            amax = absolute_percentile(sample, self.percentile)
            limits = -amax, amax
        else:
            limits = signed_percentiles(sample, self.percentile)
        return range_to_scale(*limits, bounds.grid, bounds.lo, bounds.hi, bounds.dtype)

    @property
    @override
    def label(self) -> str:
        return f"percentile{self.percentile:g}"


@final
@dataclass(frozen=True)
class MinimumError(Scale):
    """The scale of least squared error, found by search and stored.

    Source: the search of OCS/ACIQ-style post-training quantization (arXiv:1901.09504), with least-squares steps.
    """

    @override
    def find(self, sample: Sample, bounds: Bounds) -> tuple[Tensor, Tensor | None]:
        return minimum_error_scale(sample, bounds.grid, bounds.dtype)

    @property
    @override
    def label(self) -> str:
        return "mse"


@final
@dataclass(frozen=True)
class Entropy(Scale):
    """The scale of least Kullback-Leibler divergence between histograms, found by search and stored.

    For 4 bits and more; among fewer levels the divergence tells little, and ``MinimumError()`` serves better.

    Source: TensorRT's entropy calibration (S. Migacz, GTC 2017); deviations: see ``entropy_scale``.
    """

    @override
    def find(self, sample: Sample, bounds: Bounds) -> tuple[Tensor, Tensor | None]:
        return entropy_scale(sample, bounds.grid, bounds.dtype)


@final
@dataclass(frozen=True)
class MovingAverage(Scale):
    """The exponential moving average of the absolute maximum over calibration batches, then stored.

    It moves while calibrating only, never in training or evaluation. A weight counts as one batch.

    Args:
        momentum: share of the past in the average, in [0, 1).

    Raises:
        ValueError: momentum outside [0, 1).
    """

    momentum: float = 0.9
    takes_zero_point: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("MovingAverage: momentum", self.momentum, "a value in [0, 1)", holds=lambda m: 0 <= m < 1)

    @override
    def find(self, sample: Sample, bounds: Bounds) -> tuple[Tensor, Tensor | None]:
        if sample.average_amax is None:
            return AbsMax().find(sample, bounds)
        amax = sample.average_amax
        return range_to_scale(-amax, amax, bounds.grid, bounds.lo, bounds.hi, bounds.dtype)


@final
@dataclass(frozen=True)
class Learned(Scale):
    """A parameter trained by the LSQ gradient; a zero point, where the grid has one, is found once and stays.

    Args:
        init: how the start value is found.

    Source: LSQ, arXiv:1902.08153; deviation: started at the least squared error instead of 2 mean / sqrt(hi).
    """

    init: Scale = field(default_factory=MinimumError)
    learned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.init, Scale) or self.init.learned:
            raise ValueError(f"Learned: init={self.init!r} is not allowed; choose a scale that is not learned")

    @property
    def takes_zero_point(self) -> bool:  # type: ignore[override]
        """A zero point needs an initialization that finds one."""
        return self.init.takes_zero_point

    @override
    def find(self, sample: Sample, bounds: Bounds) -> tuple[Tensor, Tensor | None]:
        return self.init.find(sample, bounds)

    @property
    @override
    def label(self) -> str:
        return f"learned({self.init.label})"
