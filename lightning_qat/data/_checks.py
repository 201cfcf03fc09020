"""Argument checks that the data modules share."""


def check_at_least(minimum: int, **values: int) -> None:
    """Raise a ValueError that names the first argument below the minimum, a TypeError for one that is no integer."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r}: expected an integer of at least {minimum}")
        if value < minimum:
            raise ValueError(f"{name}={value}: expected an integer of at least {minimum}")


def check_share(**values: float) -> None:
    """Raise a ValueError that names the first argument outside 0.01 .. 0.5."""
    for name, value in values.items():
        if not 0.01 <= value <= 0.5:
            raise ValueError(f"{name}={value}: expected a share of the whole data in 0.01 .. 0.5, such as 0.1")
