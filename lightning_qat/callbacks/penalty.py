"""Penalty: a function of a latent weight and its grid, times a number that may change over the run."""

import fnmatch
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, final

from torch import Tensor

from lightning_qat.callbacks.measures import Slot
from lightning_qat.conversion.sharding import is_sharded
from lightning_qat.conversion.view import adapter, latent, transformed
from lightning_qat.functional.levels import quantize
from lightning_qat.schedules import Ramp

QUANTITIES: Final = ("latent", "quantized", "levels", "scale", "lo", "hi", "lower", "upper")
"""What a loss may take by name; see `quantities`."""


@final
@dataclass(frozen=True, repr=False)
class Penalty:
    """A term of `Regularization`: ``weight`` times the sum of ``loss`` over the quantized weights that match.

    Args:
        loss: function of :mod:`lightning_qat.losses` (``grid_distance``, ``bin_regularization``,
            ``oscillation_dampening``, ``sparsity``, ``smoothness``), or any function that takes some of ``latent``,
            ``quantized``, ``levels``, ``scale``, ``lo``, ``hi``, ``lower``, ``upper`` and returns a scalar. Other
            arguments have defaults or come by ``functools.partial``.
        weight: not negative; a number, or a ramp of :mod:`lightning_qat.schedules`, such as ``CosineRamp(1e-3)``.
        match: glob over dotted layer names.

    Raises:
        TypeError: ``loss`` is no function, ``match`` no text.
        ValueError: it takes what a weight does not have, or takes no weight; a weight that is negative or not finite.

    Example:
        >>> from lightning_qat.losses import grid_distance
        >>> Penalty(grid_distance, weight=0.1)
        Penalty(lightning_qat.losses.regularization.grid_distance, weight=0.1, match='*')
    """

    loss: Callable[..., Tensor]
    weight: float | Ramp = field(default=1.0, kw_only=True)
    match: str = field(default="*", kw_only=True)

    def __post_init__(self) -> None:
        """Check the arguments; a ``partial`` that binds nothing, as configs make it, is the function itself."""
        loss = self.loss
        if isinstance(loss, functools.partial) and not loss.args and not loss.keywords:
            object.__setattr__(self, "loss", loss.func)
        if not callable(self.loss):
            raise TypeError(
                f"Penalty: loss={self.loss!r} is not a function, such as lightning_qat.losses.grid_distance"
            )
        least = self.weight.extremes[0] if isinstance(self.weight, Ramp) else self.weight
        if isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least < math.inf:
            raise ValueError(
                f"Penalty: weight={self.weight!r} is not allowed; choose a value not negative, or a ramp such as "
                "CosineRamp(0.01)"
            )
        if not isinstance(self.match, str):
            raise TypeError(f"Penalty: match={self.match!r} is not a glob over layer names, such as '*.feedforward.*'")
        parameters = inspect.signature(self.loss).parameters.values()
        missing = [p.name for p in parameters if p.default is p.empty and p.name not in QUANTITIES]
        if missing or not {"latent"} & set(self.takes):
            raise ValueError(
                f"Penalty: {self.name} takes {missing or [p.name for p in parameters]}; a loss takes latent, and may "
                f"take {', '.join(QUANTITIES[1:])}; bind other arguments with functools.partial"
            )

    def __repr__(self) -> str:
        """Return an expression that evaluates back, where the loss is a function of a module."""
        named = inspect.isfunction(self.loss)
        loss = f"{self.loss.__module__}.{self.loss.__qualname__}" if named else repr(self.loss)
        return f"Penalty({loss}, weight={self.weight!r}, match={self.match!r})"

    @property
    def takes(self) -> tuple[str, ...]:
        """The quantities that the loss takes."""
        return tuple(name for name in inspect.signature(self.loss).parameters if name in QUANTITIES)

    @property
    def name(self) -> str:
        """Name of the loss, for logs and messages."""
        function = self.loss.func if isinstance(self.loss, functools.partial) else self.loss
        return getattr(function, "__name__", type(function).__name__)

    def matches(self, slot: Slot) -> bool:
        """Whether the term holds for a weight."""
        return fnmatch.fnmatchcase(slot.layer, self.match)


def quantities(slot: Slot, names: Iterable[str]) -> dict[str, Any]:
    """Return what penalties take of a weight, in the weight's shape or so that it broadcasts to it.

    ``latent`` is the weight as its quantizer sees it, after transforms and adapters, with gradient; ``scale`` the
    distance of its levels, with gradient where it is learned; ``levels`` where its values fall, in steps of the scale
    without the zero point, between ``lo`` and ``hi``; ``quantized`` = levels * scale; ``lower`` and ``upper`` the
    outermost values. All but the first two are constants.

    Args:
        slot: the weight.
        names: which are wanted.

    Raises:
        ValueError: the weight is a shard.
    """
    low_rank, weight, quantizer = adapter(slot.module, slot.kind), latent(slot.module, slot.kind), slot.quantizer
    if is_sharded(weight):
        raise ValueError(f"Regularization: {slot.layer} is sharded, which is not supported; use one device or DDP")
    weight = transformed(slot.module, weight if low_rank is None else low_rank(weight))
    granularity, layout = quantizer.spec.granularity, quantizer.layout
    grouped, setting = quantizer.setting(weight)
    lo, hi = quantizer.grid.bounds
    zero = setting.zero_point
    step = setting.scale.detach()

    def shaped(tensor: Tensor) -> Tensor:
        if grouped.shape == weight.shape:
            return tensor
        return granularity.ungroup(tensor.expand(grouped.shape), tuple(weight.shape), layout)

    levels = quantize(grouped.detach(), step, zero, lo=lo, hi=hi, rounding=quantizer.grid)
    levels = levels if zero is None else levels - zero
    least, most = (lo, hi) if zero is None else (float((lo - zero).min()), float((hi - zero).max()))
    made: dict[str, Callable[[], Any]] = {
        "latent": lambda: weight,
        "quantized": lambda: shaped(levels * step),
        "levels": lambda: shaped(levels),
        "scale": lambda: shaped(setting.scale),
        "lo": lambda: least,
        "hi": lambda: most,
        "lower": lambda: shaped(step * (lo if zero is None else lo - zero)),
        "upper": lambda: shaped(step * (hi if zero is None else hi - zero)),
    }
    return {name: made[name]() for name in names}
