"""Checks of constructor arguments."""

from collections.abc import Callable


def check_number(where: str, value: float, allowed: str, *, holds: Callable[[float], bool]) -> None:
    """Refuse what is no number, or one outside the allowed range.

    Args:
        where: class and argument, such as ``"Percentile: percentile"``.
        value: what was given.
        allowed: the range in words.
        holds: whether a number lies in the range; NaN does not.

    Raises:
        ValueError: with the argument, what was given and what is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
        raise ValueError(f"{where}={value!r} is not allowed; choose {allowed}")


def check_positive(where: str, value: float) -> None:
    """Refuse what is not a positive finite number."""
    check_number(where, value, "a value that is positive and finite", holds=lambda v: 0 < v < float("inf"))


def check_flag(where: str, value: bool) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{where}={value!r} is not allowed; choose True or False")


def check_kind(where: str, value: object, kind: type) -> None:
    """Refuse what is no instance of a class.

    Raises:
        TypeError: with the argument, what was given and what is wanted.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{where}={value!r} is not a {kind.__name__}")
