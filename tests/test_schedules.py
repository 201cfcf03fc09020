"""Schedules: tables of expected precisions, and properties over many arguments."""

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest

from lightning_qat.schedules import ByFraction, Cosine, Linear, Schedule, Staircase, as_schedule


@dataclass(frozen=True)
class Grid:
    """Stands in for a grid: a hashable value whose repr evaluates back."""

    name: str


TERNARY, BINARY = Grid("ternary"), Grid("binary")
EXAMPLES: tuple[Schedule, ...] = (
    Staircase({0: 8, 2: 4, 4: 2}),
    Staircase({0: 8, 10: TERNARY, 20: BINARY}),
    Linear(8, 2, duration=6),
    Linear(8, 2, duration=3, begin=4),
    Cosine(6, 1, duration=100, begin=7),
    ByFraction({0.0: 8, 0.25: 4, 0.5: 2}),
    ByFraction({0: 4, 0.1: TERNARY}),
)


@pytest.mark.parametrize(
    ("schedule", "total", "expected"),
    [
        (Staircase({0: 8}), None, [8, 8, 8]),
        (Staircase({0: 8, 2: 4, 4: 2}), None, [8, 8, 4, 4, 2, 2, 2]),
        (Staircase({0: 8, 1: TERNARY, 3: BINARY}), None, [8, TERNARY, TERNARY, BINARY, BINARY]),
        (Linear(8, 2, duration=6), None, [8, 7, 6, 5, 4, 3, 2, 2]),
        (Linear(8, 2, duration=3), None, [8, 6, 4, 2, 2]),
        (Linear(8, 2, duration=1), None, [8, 2, 2]),
        (Linear(4, 2, duration=5), None, [4, 4, 4, 3, 3, 2, 2]),
        (Linear(4, 3, duration=2, begin=2), None, [4, 4, 4, 4, 3, 3]),
        (Cosine(8, 2, duration=6), None, [8, 8, 7, 5, 4, 3, 2, 2]),
        (Cosine(4, 2, duration=4), None, [4, 4, 3, 3, 2, 2]),
        (Cosine(4, 2, duration=4, begin=1), None, [4, 4, 4, 3, 3, 2, 2]),
        (Cosine(8, 1, duration=1), None, [8, 1]),
        (ByFraction({0.0: 8, 0.25: 4, 0.5: 2}), 8, [8, 8, 4, 4, 2, 2, 2, 2]),
        (ByFraction({0.0: 8, 0.25: 4, 0.5: 2}), 7, [8, 8, 4, 4, 2, 2, 2]),
        (ByFraction({0.0: 8, 0.25: 4, 0.5: 2}), 2, [8, 2, 2]),
        (ByFraction({0.0: 8, 0.25: 4, 0.5: 2}), 1, [8, 2]),
        (ByFraction({0.0: 8, 0.1: 4}), 30.0, [8, 8, 8, 4, 4]),
        (ByFraction({0.0: TERNARY, 0.5: BINARY}), 4, [TERNARY, TERNARY, BINARY, BINARY]),
    ],
    ids=repr,
)
def test_table(schedule: Schedule, total: float | None, expected: list[object]) -> None:
    assert [schedule.value_at(position, total) for position in range(len(expected))] == expected
    changes = schedule.changes(total)
    assert [value for _, value in changes] == list(dict.fromkeys(value for _, value in changes))
    assert all(schedule.value_at(position, total) == value for position, value in changes)
    assert all(schedule.value_at(position - 1, total) != value for position, value in changes if position)


@pytest.mark.parametrize("kind", [Linear, Cosine])
@pytest.mark.parametrize("duration", [1, 2, 3, 5, 6, 7, 10, 97, 1000])
@pytest.mark.parametrize("begin", [0, 4])
def test_falls(kind: type[Linear | Cosine], duration: int, begin: int) -> None:
    for start in range(2, 9):
        for end in range(1, start):
            schedule = kind(start, end, duration=duration, begin=begin)
            bits = [schedule.value_at(position) for position in range(begin + duration + 3)]
            assert all(isinstance(value, int) for value in bits)
            assert bits == sorted(bits, reverse=True)
            assert set(bits[: begin + 1]) == {start}
            assert bits[begin + duration - 1] != end
            assert set(bits[begin + duration :]) == {end}
            if duration >= (start - end) * (1 if kind is Linear else 4):
                assert set(bits) == set(range(end, start + 1))


def test_linear_formula() -> None:
    for start, end, duration, begin in ((8, 2, 60, 0), (8, 3, 13, 5), (5, 1, 9, 2)):
        schedule = Linear(start, end, duration=duration, begin=begin)
        for position in range(begin + duration + 5):
            elapsed = min(max(position - begin, 0), duration)
            assert schedule.value_at(position) == start - (start - end) * elapsed // duration


def test_cosine_formula() -> None:
    for start, end, duration, begin in ((8, 2, 60, 0), (8, 3, 13, 5), (5, 1, 9, 2), (8, 1, 1001, 0)):
        schedule = Cosine(start, end, duration=duration, begin=begin)
        for position in range(begin + duration + 5):
            time = min(max((position - begin) / duration, 0), 1)
            exact = end + (start - end) * (1 + math.cos(math.pi * time)) / 2
            assert schedule.value_at(position) == math.ceil(exact - 1e-9)


def test_linear_intervals_are_equal() -> None:
    starts = [position for position, _ in Linear(8, 2, duration=6000).changes()]
    assert starts == [0, 1000, 2000, 3000, 4000, 5000, 6000]


@pytest.mark.parametrize("total", [1, 7, 10, 60, 100, 1000, 12345])
def test_fractions_are_decimal(total: int) -> None:
    """55 % of 100 is 55: the binary value of 0.55, a little more, must not decide."""
    for percent in range(1, 100):
        first = -(-percent * total // 100)
        assert ByFraction({0.0: 8, percent / 100: 4}).changes(total)[-1] == (first, 4)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_values(schedule: Schedule) -> None:
    for twin in (eval(repr(schedule)), copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        assert repr(twin) == repr(schedule)
        assert twin.changes(1000) == schedule.changes(1000)
    assert len(set(EXAMPLES)) == len(EXAMPLES)
    with pytest.raises(FrozenInstanceError):
        schedule.stages = {}  # type: ignore[attr-defined]


def test_mappings_are_normalized() -> None:
    stages = {4: 2, 0: 8, 2: 4}
    schedule = Staircase(stages)
    assert schedule == Staircase({0: 8, 2: 4, 4: 2}) == Staircase(((0, 8), (2, 4), (4, 2)))
    stages[6] = 1
    assert schedule.changes() == ((0, 8), (2, 4), (4, 2))
    assert ByFraction({0.5: 2, 0: 8}) == ByFraction({0.0: 8, 0.5: 2})
    assert repr(ByFraction({0.5: 2, 0: 8})) == "ByFraction({0.0: 8, 0.5: 2})"


def test_as_schedule() -> None:
    for schedule in EXAMPLES:
        assert as_schedule(schedule) is schedule
    assert as_schedule({0: 8, 2: TERNARY}) == Staircase({0: 8, 2: TERNARY})


@pytest.mark.parametrize("wrong", [8, None, "linear", [8, 4], ((0, 8), (2, 4))])
def test_as_schedule_errors(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a mapping like .* Staircase, Linear, Cosine, ByFraction"):
        as_schedule(wrong)


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ({}, ValueError, "no stage begins at 0"),
        ({1: 8, 2: 4}, ValueError, r"no stage begins at 0 in \{1: 8, 2: 4\}"),
        ({-1: 8, 0: 4}, ValueError, r"position=-1; expected an integer >= 0"),
        ({0: 8, 1.5: 4}, TypeError, "position=1.5 is a float"),
        ({0: 8, "2": 4}, TypeError, "position='2' is a str"),
        ({False: 8, 2: 4}, TypeError, "position=False is a bool"),
        ({0: 9}, ValueError, "stage 0: 9 bits; expected bits 1..8 or a grid"),
        ({0: 8, 2: 0}, ValueError, "stage 2: 0 bits"),
        ({0: 8, 2: 4.0}, TypeError, "stage 2: 4.0; expected bits"),
        ({0: True}, TypeError, "stage 0: True"),
        ({0: "int4"}, TypeError, "stage 0: 'int4'"),
        ({0: None}, TypeError, "stage 0: None"),
        ({0: Grid}, TypeError, "expected bits 1..8 or a grid"),
        ({0: {}}, TypeError, "stage 0"),
        ({0: 4, 2: 8}, ValueError, "stage 2 has 8 bits after 4; bits can only fall"),
        ({0: 4, 2: TERNARY, 3: 8}, ValueError, "stage 3 has 8 bits after 4"),
        ({0: 8, 2: 4, 4: 4}, ValueError, "stage 4 repeats 4 and has no effect"),
        ({0: TERNARY, 2: TERNARY}, ValueError, "stage 2 repeats .*ternary.* no effect"),
        (((0, 8), (0, 4)), ValueError, "two stages begin at the same place"),
        ([(0, 8)], TypeError, "expected a mapping like"),
        (8, TypeError, "expected a mapping like"),
    ],
)
def test_staircase_errors(stages: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Staircase(stages)


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ({0.5: 4}, ValueError, "no stage begins at 0"),
        ({0.0: 8, 1.0: 4}, ValueError, "fraction 1.0 is not in 0 <= f < 1; for epochs or steps use Staircase"),
        ({0.0: 8, -0.5: 4}, ValueError, "fraction -0.5"),
        ({0.0: 8, math.nan: 4}, ValueError, "fraction nan"),
        ({0.0: 8, "0.5": 4}, TypeError, "fraction '0.5' is a str"),
        ({False: 8}, TypeError, "fraction False is a bool"),
        ({0.0: 4, 0.5: 8}, ValueError, "bits can only fall"),
        ({0.0: 8, 0.5: "int4"}, TypeError, "stage 0.5: 'int4'"),
    ],
)
def test_fraction_errors(stages: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ByFraction(stages)


@pytest.mark.parametrize("total", [None, math.inf, -1, 0, 0.5, 10.5, math.nan])
def test_fractions_need_the_length_of_the_run(total: float | None) -> None:
    with pytest.raises(ValueError, match="set max_epochs or max_steps of the Trainer"):
        ByFraction({0.0: 8, 0.5: 4}).value_at(0, total)


@pytest.mark.parametrize("kind", [Linear, Cosine])
def test_fall_errors(kind: type[Linear | Cosine]) -> None:
    for start, end in ((4, 4), (2, 8), (9, 2)):
        with pytest.raises(ValueError, match=rf"start={start}, end={end}; expected 1 <= end < start <= 8"):
            kind(start, end, duration=5)
    with pytest.raises(ValueError, match="end=0; expected an integer >= 1"):
        kind(8, 0, duration=5)
    with pytest.raises(ValueError, match="duration=0; expected an integer >= 1"):
        kind(8, 2, duration=0)
    with pytest.raises(ValueError, match="begin=-1"):
        kind(8, 2, duration=5, begin=-1)
    with pytest.raises(TypeError, match=r"duration=0.5 is a float"):
        kind(8, 2, duration=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"start=.*ternary.* is a Grid"):
        kind(TERNARY, 2, duration=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_position_errors(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match="position=-1; expected an integer >= 0"):
        schedule.value_at(-1, 100)
    with pytest.raises(TypeError, match=r"position=1.0 is a float"):
        schedule.value_at(1.0, 100)  # type: ignore[arg-type]


def test_a_schedule_of_ones_own() -> None:
    @dataclass(frozen=True)
    class Late(Schedule):
        def changes(self, total: float | None = None) -> tuple[tuple[int, int], ...]:
            return ((5, 4),)

    assert as_schedule(Late()).value_at(5) == 4
    with pytest.raises(ValueError, match="no stage at position 4: its first stage has to begin at 0"):
        Late().value_at(4)
