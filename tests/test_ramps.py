"""Numbers that change over a run."""

import math

import pytest

from lightning_qat.schedules import CosineRamp, LinearRamp, QuadraticRamp, Ramp, value_at


def test_values_between_the_ends() -> None:
    linear = LinearRamp(3.0, start=1.0, begin=0.25, until=0.75)
    assert [linear.at(share) for share in (-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 2.0)] == [1.0, 1.0, 1.0, 2.0, 3.0, 3.0, 3.0]
    cosine = CosineRamp(3.0, start=1.0, begin=0.25, until=0.75)
    for share in (0.3, 0.4, 0.6, 0.7):
        assert cosine.at(share) == pytest.approx(2.0 - math.cos(math.pi * (share - 0.25) / 0.5), rel=1e-12)
    quadratic = QuadraticRamp(0.0, start=2.4)
    for share in (0.1, 0.5, 0.9):
        assert quadratic.at(share) == pytest.approx(2.4 * (1.0 - share) ** 2, rel=1e-12)


@pytest.mark.parametrize("kind", [LinearRamp, CosineRamp, QuadraticRamp])
def test_ramps_are_values(kind: type[Ramp]) -> None:
    ramp = kind(0.01, start=0.04, until=0.5)
    assert eval(repr(ramp)) == ramp
    assert hash(eval(repr(ramp))) == hash(ramp)
    assert ramp.extremes == (0.01, 0.04)
    assert (ramp.at(0.0), ramp.at(0.5)) == (0.04, pytest.approx(0.01))
    assert kind(1.0) != kind(2.0)
    falls = [ramp.at(share / 20) for share in range(21)]
    assert falls == sorted(falls, reverse=True)


def test_numbers_stay() -> None:
    assert value_at(0.3, 0.9) == 0.3
    assert value_at(LinearRamp(1.0), 0.25) == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"end": math.nan}, "expected finite numbers"),
        ({"end": 1.0, "start": math.inf}, "expected finite numbers"),
        ({"end": 1.0, "begin": 0.5, "until": 0.5}, "0 <= begin < until <= 1"),
        ({"end": 1.0, "until": 1.5}, "0 <= begin < until <= 1"),
        ({"end": 1.0, "begin": -0.1}, "0 <= begin < until <= 1"),
    ],
)
def test_errors(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"LinearRamp: .*{message}"):
        LinearRamp(**arguments)  # type: ignore[misc]
