"""Numbers that change over a run: the weight of a penalty, the threshold of freezing, the rate of some weights.

A position is the share of the run that is done, 0 .. 1. A ramp holds no state, so a resumed run is where an
uninterrupted one would be.

    share of the run       0.00   0.25   0.50   0.75   1.00
    LinearRamp(1.0)        0.00   0.25   0.50   0.75   1.00
    CosineRamp(1.0)        0.00   0.15   0.50   0.85   1.00
    QuadraticRamp(1.0)     0.00   0.44   0.75   0.94   1.00
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import final


@dataclass(frozen=True)
class Ramp(ABC):
    """A number that goes from one value to another between two shares of the run; a subclass says along which curve.

    Args:
        end: Value from `until` on, finite.
        start: Value up to `begin`, finite.
        begin: Share of the run at which it begins to change, 0 <= begin < until.
        until: Share of the run at which it has reached `end`, at most 1.

    Raises:
        ValueError: A number is out of range.
    """

    end: float
    start: float = field(default=0.0, kw_only=True)
    begin: float = field(default=0.0, kw_only=True)
    until: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        """Check the arguments."""
        name = type(self).__name__
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ValueError(f"{name}: start={self.start}, end={self.end}; expected finite numbers")
        if not 0 <= self.begin < self.until <= 1:
            raise ValueError(
                f"{name}: begin={self.begin}, until={self.until}; expected shares of the run, 0 <= begin < until <= 1"
            )

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        return min(self.start, self.end), max(self.start, self.end)

    @final
    def at(self, share: float) -> float:
        """Return the value where this share of the run is done.

        Args:
            share: 0 .. 1.

        Example:
            >>> [round(CosineRamp(0.01, start=0.04, until=0.5).at(share), 4) for share in (0.0, 0.25, 0.5, 1.0)]
            [0.04, 0.025, 0.01, 0.01]
        """
        done = min(1.0, max(0.0, (share - self.begin) / (self.until - self.begin)))
        return self.start + (self.end - self.start) * self._curve(done)

    @abstractmethod
    def _curve(self, done: float) -> float:
        """Return how much of the way lies behind, from 0 at `done` = 0 to 1 at `done` = 1."""


@final
class LinearRamp(Ramp):
    """A number that changes at equal pace; arguments as for `Ramp`.

    Example:
        >>> LinearRamp(2.0, begin=0.5).at(0.75)
        1.0
    """

    def _curve(self, done: float) -> float:
        return done


@final
class CosineRamp(Ramp):
    """A number that changes slowly at both ends: start + (end - start) (1 - cos(pi t)) / 2; arguments as for `Ramp`.

    Source: arXiv:2203.11086, for the weight of dampening and for the threshold of freezing.

    Example:
        >>> round(CosineRamp(1.0).at(0.25), 4)
        0.1464
    """

    def _curve(self, done: float) -> float:
        return (1.0 - math.cos(math.pi * done)) / 2.0


@final
class QuadraticRamp(Ramp):
    """A number that changes fast at first: end + (start - end) (1 - t)^2; arguments as for `Ramp`.

    Example:
        >>> QuadraticRamp(0.0, start=2.0).at(0.5)
        0.5
    """

    def _curve(self, done: float) -> float:
        return 1.0 - (1.0 - done) ** 2


def value_at(value: float | Ramp, share: float) -> float:
    """Return a number as it is, and the value of a ramp at a share of the run.

    Example:
        >>> value_at(0.1, 0.5), value_at(LinearRamp(1.0), 0.5)
        (0.1, 0.5)
    """
    return value.at(share) if isinstance(value, Ramp) else value
