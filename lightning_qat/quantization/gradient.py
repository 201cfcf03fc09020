"""Gradients: what backward does with rounding."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Final, final

from torch import Tensor
from typing_extensions import override

from lightning_qat.functional.gradients import (
    elementwise_scaling,
    staircase_slope,
    staircase_temperature_slope,
    within,
)
from lightning_qat.functional.points import Point
from lightning_qat.quantization._checks import check_number, check_positive

TEMPERATURE_RANGE: Final = (0.03, 1000.0)
"""Learned temperatures stay within: below, the slope underflows inside the cells; above, it is 1 within float32."""


class Gradient(ABC):
    """How the gradient g with respect to the quantized value reaches the latent value."""

    needs_input: ClassVar[bool] = True
    learned_temperature: ClassVar[bool] = False

    @property
    def only_clips(self) -> bool:
        """Whether the gradient passes the inside of the clip range as it is."""
        return False

    @abstractmethod
    def input_gradient(self, grad: Tensor, point: Point) -> Tensor:
        """Return the gradient with respect to the latent value."""

    def temperature_gradient(self, grad: Tensor, point: Point) -> Tensor:
        """Return the summands of the temperature's gradient, in units of the scale."""
        raise AssertionError(f"{self!r} has no temperature to learn")

    @property
    def label(self) -> str:
        """Compact name used in logs."""
        return type(self).__name__.lower()


@final
@dataclass(frozen=True)
class StraightThrough(Gradient):
    """g everywhere. Source: arXiv:1308.3432."""

    needs_input: ClassVar[bool] = False

    @property
    @override
    def only_clips(self) -> bool:
        return True

    @override
    def input_gradient(self, grad: Tensor, point: Point) -> Tensor:
        return grad

    @property
    @override
    def label(self) -> str:
        return "ste"


@final
@dataclass(frozen=True)
class Clipped(Gradient):
    r"""g inside the clip range lo..hi, or where :math:`|x|` <= threshold if one is given; else 0.

    Args:
        threshold: bound in units of x, positive; None takes the grid's own clip range.

    Source: arXiv:1602.02830 eq. 4 (threshold 1), arXiv:1902.08153 eq. 5 (clip range).
    """

    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_positive("Clipped: threshold", self.threshold)

    @property
    @override
    def only_clips(self) -> bool:
        return self.threshold is None

    @override
    def input_gradient(self, grad: Tensor, point: Point) -> Tensor:
        return point.clip(grad) if self.threshold is None else within(grad, point.x, -self.threshold, self.threshold)


@final
@dataclass(frozen=True)
class Soft(Gradient):
    """g times the slope of a smooth staircase of tanh, inside lo..hi; else 0.

    Args:
        temperature: positive; large approaches :class:`Clipped`, small a hard step. The slope is above zero in float32
            everywhere inside the range for temperatures of 0.012 and more (0.024 for ``Binary``).

    Source: DSQ, arXiv:1908.05033 eq. 3-6 with k = 1 / temperature.
    """

    temperature: float = 0.5

    def __post_init__(self) -> None:
        check_positive("Soft: temperature", self.temperature)

    @override
    def input_gradient(self, grad: Tensor, point: Point) -> Tensor:
        distance = point.rounding.border_distance(point.u)
        slope = staircase_slope(distance, point.rounding.half_cell, self.temperature)
        return point.clip(slope.mul_(grad))


@final
@dataclass(frozen=True)
class LearnedSoft(Gradient):
    r"""As :class:`Soft`, with a temperature that is a parameter.

    The temperature's gradient is the derivative of the staircase, summed and divided by :math:`\sqrt{N hi}` as LSQ does
    for scales (our choice: without it the step would depend on the size of the layer).

    Args:
        temperature: start value, 0.03 to 1000; training does not leave this range.

    Raises:
        ValueError: temperature outside 0.03..1000.

    Source: DSQ, arXiv:1908.05033 section 3.2.
    """

    temperature: float = 0.5
    learned_temperature: ClassVar[bool] = True

    def __post_init__(self) -> None:
        least, largest = TEMPERATURE_RANGE
        allowed = f"a value from {least} to {largest:g}"
        check_number("LearnedSoft: temperature", self.temperature, allowed, holds=lambda t: least <= t <= largest)

    @override
    def input_gradient(self, grad: Tensor, point: Point) -> Tensor:
        assert point.temperature is not None  # noqa: S101 - set by the quantizer that owns this rule
        distance = point.rounding.border_distance(point.u)
        slope = staircase_slope(distance, point.rounding.half_cell, point.temperature)
        return point.clip(slope.mul_(grad))

    @override
    def temperature_gradient(self, grad: Tensor, point: Point) -> Tensor:
        assert point.temperature is not None  # noqa: S101
        distance = point.rounding.border_distance(point.u)
        slope = staircase_temperature_slope(distance, point.rounding.half_cell, point.temperature)
        return point.clip(slope.mul_(grad))


@final
@dataclass(frozen=True)
class ElementwiseScaling(Gradient):
    r"""EWGS: :math:`g (1 + \delta\, sign(g) (u - q) / (hi - lo))` inside lo..hi, else 0.

    Args:
        delta: strength, not negative; 0 equals :class:`Clipped`.

    Source: arXiv:2104.00903 eq. 5 (constant delta; the Hessian-based schedule is not built in).
    """

    delta: float = 0.1

    def __post_init__(self) -> None:
        allowed = "a value that is finite and not negative"
        check_number("ElementwiseScaling: delta", self.delta, allowed, holds=lambda delta: 0 <= delta < float("inf"))

    @override
    def input_gradient(self, grad: Tensor, point: Point) -> Tensor:
        return elementwise_scaling(grad, point.u, point.q, point.lo, point.hi, self.delta)

    @property
    @override
    def label(self) -> str:
        return "ewgs"
