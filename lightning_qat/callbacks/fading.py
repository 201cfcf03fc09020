"""Fading: a teacher's weight falls with the loss of the task, for Distillation."""

from torch import Tensor


def faded(weight: float, task: Tensor, below: float | None) -> float | Tensor:
    """Return a weight, times the loss of the task in units of ``below`` where that is less than 1.

    Args:
        weight: what it is above.
        task: loss of the task, a scalar; no gradient passes.
        below: positive, in the units of the loss. None: the weight stays.

    Example:
        >>> import torch
        >>> [float(faded(4.0, torch.tensor(loss), 1.0)) for loss in (2.0, 0.25, -1.0)]
        [4.0, 1.0, 0.0]
    """
    return weight if below is None else weight * (task.detach() / below).clamp(0, 1)
