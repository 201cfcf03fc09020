"""OutputLoss: how the outputs of a student and of its teacher are compared, for Distillation."""

import inspect
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from lightning_qat.losses._common import full_precision, masked_mean
from lightning_qat.quantization._checks import check_number, check_positive

TEMPERATURE: Final = 1.0
_FEW: Final = 256  # classes up to which topk() takes up to four times as long as two passes and a copy
Loss = Callable[..., Tensor]


def temperature_rise(
    logits: Tensor, *, max_odds: float, temperature: float = TEMPERATURE, mask: Tensor | None = None
) -> Tensor:
    """Return the factor by which a temperature rises so that a teacher is not too sure, a scalar of at least 1.

    At temperature T the logarithm of the odds of the first choice against the second is their distance / T. The factor
    takes the mean of that over positions down to the logarithm of ``max_odds``, where it is above.

    Args:
        logits: of the teacher, `[..., classes]`, two classes or more; any floating dtype.
        max_odds: geometric mean of the odds from which on the temperature rises, above 1.
        temperature: that the logits are divided by anyway, positive.
        mask: which positions count, `[...]`; all by default.

    Raises:
        ValueError: fewer than two classes.

    Example:
        >>> import torch
        >>> sure, unsure = torch.tensor([[9.0, 0.0, -1.0]]), torch.tensor([[2.0, 0.0, -1.0]])
        >>> [round(float(temperature_rise(each, max_odds=90.0)), 4) for each in (sure, unsure)]
        [2.0001, 1.0]
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"Distillation: max_odds={max_odds} needs two classes; outputs are {list(logits.shape)}")
    first, second = (full_precision(each) for each in _two_largest(logits.detach()))
    distance = torch.nan_to_num(first - second, nan=0.0, posinf=0.0)  # a single choice has no odds
    return (masked_mean(distance, mask) / (temperature * math.log(max_odds))).clamp(min=1.0)


def _two_largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    if logits.shape[-1] > _FEW:
        return logits.topk(2, dim=-1).values.unbind(-1)  # type: ignore[return-value]
    largest, index = logits.max(dim=-1, keepdim=True)
    return largest.squeeze(-1), logits.scatter(-1, index, -math.inf).amax(dim=-1)


class OutputLoss:
    """A loss with the options that it takes; on samples that come again, a teacher that is too sure is softened.

    Args:
        loss: function of (student, teacher) outputs.
        temperature: given to a loss that takes one.
        max_odds: see :func:`temperature_rise`; None: nothing rises. The loss must take a temperature, and as ours do
            multiply by its square.
        takes_mask: whether a mask will be given.

    Raises:
        ValueError: values out of range, an option that the loss does not take.
    """

    def __init__(self, loss: Loss, temperature: float, max_odds: float | None, *, takes_mask: bool) -> None:
        check_positive("Distillation: temperature", temperature)
        if max_odds is not None:
            where, allowed = "Distillation: max_odds", "a finite number above 1, or None"
            check_number(where, max_odds, allowed, holds=lambda odds: 1 < odds < math.inf)
        taken = parameters(loss)
        if takes_mask and "mask" not in taken:
            raise ValueError(f"Distillation: mask has no effect: {name_of(loss)} does not take one")
        for option, value, default in (("temperature", temperature, TEMPERATURE), ("max_odds", max_odds, None)):
            if value != default and "temperature" not in taken:
                raise ValueError(f"Distillation: {option}={value} has no effect: {name_of(loss)} takes no temperature")
        self.loss, self.temperature, self.max_odds = loss, temperature, max_odds
        self._options = {"temperature": temperature} if "temperature" in taken else {}

    def __call__(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None, *, repeated: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the loss, and the temperature that it was found at where that might have risen, else None.

        Args:
            student: outputs.
            teacher: the same shape.
            mask: which positions count, or None.
            repeated: whether the samples were in the run before.
        """
        options: dict[str, Any] = self._options if mask is None else {**self._options, "mask": mask}
        if self.max_odds is None or not repeated:
            return self.loss(student, teacher, **options), None
        rise = temperature_rise(teacher, max_odds=self.max_odds, temperature=self.temperature, mask=mask)
        student, teacher = full_precision(student) / rise, full_precision(teacher) / rise  # 16 bits would round
        return rise.square() * self.loss(student, teacher, **options), rise * self.temperature


def parameters(loss: Loss) -> set[str]:
    """Return the names of what a loss takes."""
    return set(inspect.signature(loss).parameters)


def name_of(value: Any) -> str:
    """Return how a value is written in messages and configs."""
    named = inspect.isfunction(value) or inspect.isbuiltin(value)
    return f"{value.__module__}.{value.__qualname__}" if named else repr(value)
