"""Which precision when: pure functions from a position in the run to a bit width or a grid.

A position counts epochs or optimizer steps from 0; which of the two is the caller's choice. A schedule holds no state,
so a resumed run is where an uninterrupted one would be. All are frozen values: comparable, hashable, and `repr`
evaluates back.

    position        0    1    2    3    4    5    6
    Staircase       8    8    4    4    2    2    2     Staircase({0: 8, 2: 4, 4: 2})
    Linear          8    7    6    5    4    3    2     Linear(8, 2, duration=6)
    Cosine          8    8    7    5    4    3    2     Cosine(8, 2, duration=6)
    ByFraction      8    8    4    4    2    2    2     ByFraction({0.0: 8, 0.25: 4, 0.5: 2}), 7 positions in total
"""

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeAlias, cast, final

Precision: TypeAlias = Hashable
"""Bits 1..8 of the same family, or a grid (any hashable value that is no number and no string)."""

Change: TypeAlias = tuple[int, Precision]
"""The first position of a stage and its precision."""

MIN_BITS, MAX_BITS = 1, 8


class Schedule(ABC):
    """The precision at each position of a run; a subclass says where it changes."""

    @abstractmethod
    def changes(self, total: float | None = None) -> tuple[Change, ...]:
        """Return all stages as (first position, precision), ascending, the first at position 0.

        Args:
            total: Length of the run in positions, where it is known.

        Raises:
            ValueError: The schedule needs the length of the run, and it is unknown or infinite.
        """

    @final
    def value_at(self, position: int, total: float | None = None) -> Precision:
        """Return the precision in force at a position: that of the last stage that has begun.

        Args:
            position: Completed epochs or optimizer steps, >= 0.
            total: Length of the run in positions, where it is known.

        Returns:
            Bits or a grid.

        Raises:
            TypeError: `position` is no integer.
            ValueError: `position` is negative, or the length of the run is needed and not given.

        Example:
            >>> schedule = Staircase({0: 8, 2: 4, 4: 2})
            >>> [schedule.value_at(position) for position in range(6)]
            [8, 8, 4, 4, 2, 2]
        """
        _check_count("position", position, minimum=0)
        changes = self.changes(total)
        begun = bisect.bisect_right(changes, position, key=lambda change: change[0])
        if begun == 0:
            raise ValueError(f"{self!r} has no stage at position {position}: its first stage has to begin at 0")
        return changes[begun - 1][1]


@final
@dataclass(frozen=True, repr=False)
class Staircase(Schedule):
    """Given precisions from given positions on.

    Args:
        stages: First position of each stage to its bits or grid. The first stage begins at 0; of two stages with bits
            the later one has fewer. The order in the mapping does not matter.

    Raises:
        TypeError: A position is no integer, or a precision is neither bits nor a grid.
        ValueError: No stage begins at 0, a position is negative, bits are out of range or do not fall.

    Example:
        >>> Staircase({4: 2, 0: 8, 2: 4})
        Staircase({0: 8, 2: 4, 4: 2})
        >>> Staircase({0: 8, 2: 4}).changes()
        ((0, 8), (2, 4))
    """

    stages: Mapping[int, Precision] | tuple[Change, ...]

    def __post_init__(self) -> None:
        """Check the stages and keep them as a sorted tuple."""
        pairs = _pairs("Staircase", self.stages)
        for position, _ in pairs:
            _check_count("Staircase: position", position, minimum=0)
        object.__setattr__(self, "stages", _checked_stages("Staircase", pairs))

    def changes(self, total: float | None = None) -> tuple[Change, ...]:
        """Return the stages; the length of the run is not needed."""
        return cast(tuple[Change, ...], self.stages)

    def __repr__(self) -> str:
        return f"Staircase({dict(self.changes())!r})"


@final
@dataclass(frozen=True)
class Linear(Schedule):
    """Bits that fall one by one at equal intervals.

    bits(p) = start - floor((start - end) * (p - begin) / duration), held at `start` before `begin` and at `end` from
    `begin + duration` on. With duration >= start - end every width between is used.

    Args:
        start: Bits at first, `end` + 1 .. 8.
        end: Bits at last, 1 .. `start` - 1.
        duration: Positions from `begin` until `end` is reached, >= 1.
        begin: Position at which the fall begins, >= 0; the first drop comes one interval later.

    Raises:
        TypeError: An argument is no integer.
        ValueError: An argument is out of range, or `start` is not above `end`.

    Example:
        >>> Linear(8, 2, duration=6, begin=1).changes()
        ((0, 8), (2, 7), (3, 6), (4, 5), (5, 4), (6, 3), (7, 2))
    """

    start: int
    end: int
    duration: int = field(kw_only=True)
    begin: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_fall("Linear", self.start, self.end, self.duration, self.begin)

    def changes(self, total: float | None = None) -> tuple[Change, ...]:
        """Return the stages; the length of the run is not needed."""
        drops = self.start - self.end
        delays = (-(-drop * self.duration // drops) for drop in range(1, drops + 1))
        return _fall(self.start, self.begin, delays)


@final
@dataclass(frozen=True)
class Cosine(Schedule):
    """Bits that fall slowly at both ends and fast in between: long stages at the widest and at the narrowest grids.

    bits(p) = ceil(end + (start - end) * (1 + cos(pi * t)) / 2) with t = (p - begin) / duration clipped to 0 .. 1.

    Args:
        start: Bits at first, `end` + 1 .. 8.
        end: Bits at last, 1 .. `start` - 1.
        duration: Positions from `begin` until `end` is reached, >= 1.
        begin: Position at which the fall begins, >= 0; the first drop comes later.

    Raises:
        TypeError: An argument is no integer.
        ValueError: An argument is out of range, or `start` is not above `end`.

    Example:
        >>> Cosine(8, 2, duration=60).changes()
        ((0, 8), (17, 7), (24, 6), (30, 5), (37, 4), (44, 3), (60, 2))
    """

    start: int
    end: int
    duration: int = field(kw_only=True)
    begin: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_fall("Cosine", self.start, self.end, self.duration, self.begin)

    def changes(self, total: float | None = None) -> tuple[Change, ...]:
        """Return the stages; the length of the run is not needed."""
        drops = self.start - self.end
        # Solved for the position: rounding in cos() next to a whole number of bits would move the drop by a position.
        times = (math.acos(1 - 2 * drop / drops) / math.pi for drop in range(1, drops + 1))
        return _fall(self.start, self.begin, (math.ceil(time * self.duration - 1e-9) for time in times))


@final
@dataclass(frozen=True, repr=False)
class ByFraction(Schedule):
    """Given precisions from given fractions of the run on.

    A stage begins at the first position p with p / total >= its fraction. Where several begin at the same position of
    a short run, the last of them counts.

    Args:
        stages: Fraction in 0 <= f < 1 to bits or grid. The first stage begins at 0; of two stages with bits the later
            one has fewer. The order in the mapping does not matter.

    Raises:
        TypeError: A fraction is no number, or a precision is neither bits nor a grid.
        ValueError: No stage begins at 0, a fraction is out of range, bits are out of range or do not fall.

    Example:
        >>> ByFraction({0.0: 8, 0.25: 4, 0.5: 2}).changes(total=1000)
        ((0, 8), (250, 4), (500, 2))
    """

    stages: Mapping[float, Precision] | tuple[tuple[float, Precision], ...]

    def __post_init__(self) -> None:
        """Check the stages and keep them as a sorted tuple."""
        pairs = _pairs("ByFraction", self.stages)
        for fraction, _ in pairs:
            if isinstance(fraction, bool) or not isinstance(fraction, int | float):
                raise TypeError(f"ByFraction: fraction {fraction!r} is a {type(fraction).__name__}; expected a number")
            if not 0 <= fraction < 1:
                raise ValueError(
                    f"ByFraction: fraction {fraction!r} is not in 0 <= f < 1; for epochs or steps use Staircase"
                )
        floats = tuple((float(fraction), value) for fraction, value in pairs)
        object.__setattr__(self, "stages", _checked_stages("ByFraction", floats))

    def changes(self, total: float | None = None) -> tuple[Change, ...]:
        """Return the stages of a run of `total` positions, which has to be known."""
        if total is None or not 1 <= total < math.inf or total != int(total):
            raise ValueError(
                f"ByFraction needs the length of the run, and it is {total!r}: "
                "set max_epochs or max_steps of the Trainer, or give positions with Staircase"
            )
        stages = cast(tuple[tuple[float, Precision], ...], self.stages)
        # Through the decimal text: 0.55 of 100 is 55, while 0.55 * 100 is 55.00000000000001 and would begin at 56.
        positions = (math.ceil(Fraction(repr(fraction)) * int(total)) for fraction, _ in stages)
        return tuple(dict(zip(positions, (value for _, value in stages), strict=True)).items())

    def __repr__(self) -> str:
        return f"ByFraction({dict(self.stages)!r})"


def as_schedule(schedule: Mapping[int, Precision] | Schedule) -> Schedule:
    """Return a schedule as it is, and a mapping of positions as a `Staircase`.

    Args:
        schedule: A schedule, or a mapping like `{0: 8, 2: 4, 4: 2}`.

    Returns:
        A schedule.

    Raises:
        TypeError: It is neither.
        ValueError: The mapping is no valid `Staircase`.

    Example:
        >>> as_schedule({0: 8, 2: 4, 4: 2})
        Staircase({0: 8, 2: 4, 4: 2})
    """
    if isinstance(schedule, Schedule):
        return schedule
    if not isinstance(schedule, Mapping):
        raise TypeError(
            f"schedule={schedule!r}; expected a mapping like {{0: 8, 2: 4, 4: 2}} or one of "
            "Staircase, Linear, Cosine, ByFraction"
        )
    return Staircase(schedule)


def _check_count(name: str, value: object, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; expected an integer >= {minimum}")
    if value < minimum:
        raise ValueError(f"{name}={value!r}; expected an integer >= {minimum}")


def _check_fall(name: str, start: int, end: int, duration: int, begin: int) -> None:
    for argument, value in (("start", start), ("end", end), ("duration", duration)):
        _check_count(f"{name}: {argument}", value, minimum=1)
    _check_count(f"{name}: begin", begin, minimum=0)
    if not MIN_BITS <= end < start <= MAX_BITS:
        raise ValueError(
            f"{name}: start={start}, end={end}; expected {MIN_BITS} <= end < start <= {MAX_BITS} bits. "
            "For grids of different families use Staircase or ByFraction"
        )


def _fall(start: int, begin: int, delays: Iterable[int]) -> tuple[Change, ...]:
    """Return one drop of one bit after each delay; where drops share a position, the last of them counts."""
    stages: dict[int, Precision] = {0: start}
    stages.update({begin + delay: start - drop for drop, delay in enumerate(delays, start=1)})
    return tuple(stages.items())


def _pairs(name: str, stages: object) -> tuple[tuple[Any, object], ...]:
    if isinstance(stages, Mapping):
        return tuple(stages.items())
    if isinstance(stages, tuple) and all(isinstance(stage, tuple) and len(stage) == 2 for stage in stages):
        return stages
    raise TypeError(f"{name}: stages={stages!r}; expected a mapping like {{0: 8, ...}}")


def _checked_stages(name: str, pairs: Iterable[tuple[float, object]]) -> tuple[tuple[float, Precision], ...]:
    """Return the stages in order, each of which has to change something."""
    ordered = tuple(sorted(pairs, key=lambda pair: pair[0]))
    if not ordered or ordered[0][0] != 0:
        raise ValueError(f"{name}: no stage begins at 0 in {dict(ordered)!r}; add the precision to start with")
    if len(dict(ordered)) < len(ordered):
        raise ValueError(f"{name}: two stages begin at the same place in {ordered!r}; keep one of them")
    before: object = None
    bits_before = MAX_BITS + 1
    for key, value in ordered:
        _check_precision(f"{name}: stage {key!r}", value)
        if value == before:
            raise ValueError(f"{name}: stage {key!r} repeats {value!r} and has no effect; remove it")
        if isinstance(value, int) and value >= bits_before:
            raise ValueError(f"{name}: stage {key!r} has {value} bits after {bits_before}; bits can only fall")
        bits_before = value if isinstance(value, int) else bits_before
        before = value
    return ordered


def _check_precision(name: str, value: object) -> None:
    allowed = f"expected bits {MIN_BITS}..{MAX_BITS} or a grid, for example Ternary()"
    if isinstance(value, bool | float | complex | str | bytes | type | None) or not isinstance(value, Hashable):
        raise TypeError(f"{name}: {value!r}; {allowed}")
    if isinstance(value, int) and not MIN_BITS <= value <= MAX_BITS:
        raise ValueError(f"{name}: {value!r} bits; {allowed}")
