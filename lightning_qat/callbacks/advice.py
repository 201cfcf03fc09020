"""Advice: what statistics say is wrong, and what to do about it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Bounds:
    """Where statistics become worth a warning.

    Args:
        clip_rate: share of values outside the range of the grid, whose gradient is masked. Of normally distributed
            weights at minimum error some 0.1 % are at 8 bits, 3 % at 4, 25 % at 2 bits and ternary, 45 % at binary.
        oscillation_rate: share of the watched weights that keep changing between two codes.
    """

    clip_rate: float = 0.6
    oscillation_rate: float = 0.5

    def __post_init__(self) -> None:
        for name, value in (("clip_rate", self.clip_rate), ("oscillation_rate", self.oscillation_rate)):
            if not 0 < value <= 1:
                raise ValueError(f"Bounds: {name}={value!r} is not allowed; choose a share in (0, 1]")


def advice(name: str, values: Mapping[str, float], bounds: Bounds) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong, sentence with a remedy) for one quantized tensor.

    Args:
        name: of the tensor, for the sentence.
        values: its statistics.
        bounds: what is too much.

    >>> [problem for problem, _ in advice("fc/weight", {"entropy": 0.0, "clip_rate": 0.1, "collapsed": 0.0}, Bounds())]
    ['dead']
    """
    layer = name.rpartition("/")[0]
    keep = f'or keep the layer in float with Rule("{layer}", None)'
    if values.get("collapsed", 0.0) > 0:
        yield (
            "collapsed",
            f"{name}: {values['collapsed']:.0%} of the scales have collapsed: their outermost level is below 1 % "
            f"of the values. Train scales more slowly, QATCallback(scale_lr_multiplier=0.1), {keep}.",
        )
    elif values["entropy"] == 0:
        yield (
            "dead",
            f"{name}: all codes are equal, so that the layer is dead. Find its scale anew (prepare again, or "
            f"Calibration() for an input), use more bits, {keep}.",
        )
    elif values["clip_rate"] > bounds.clip_rate:
        yield (
            "clipped",
            f"{name}: {values['clip_rate']:.0%} of the values lie outside the range of the grid (bound: "
            f"{bounds.clip_rate:.0%}) and get no gradient. Start from MinimumError() or AbsMax(), lower the learning "
            f"rate of scales with QATCallback(scale_lr_multiplier=0.1), {keep}.",
        )
    if values.get("oscillation_rate", 0.0) > bounds.oscillation_rate:
        yield (
            "oscillating",
            f"{name}: {values['oscillation_rate']:.0%} of the weights oscillate between codes. Lower the learning rate "
            "towards the end (cosine to 0), or add lightning_qat.losses.oscillation_dampening to the loss.",
        )
