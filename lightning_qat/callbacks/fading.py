"""Fading: a teacher's weight falls with the loss of the task, for Distillation."""

from torch import Tensor


def faded(loss: Tensor, weight: float, below: float | None, task: Tensor | None) -> Tensor:
    """Return a weighted loss, times the loss of the task in units of ``below`` where that is less than 1.

    Args:
        loss: of the teacher, a scalar.
        weight: its factor where the task's loss is not below.
        below: positive, in the units of the task's loss. None: the weight stays.
        task: loss of the task on samples that are new, a scalar; no gradient passes. None: they are not new, so that it
            tells how well they are known by heart, and the weight stays.

    Example:
        >>> import torch
        >>> one = torch.ones(())
        >>> [float(faded(one, 4.0, 1.0, torch.tensor(task))) for task in (2.0, 0.25, -1.0)]
        [4.0, 1.0, 0.0]
    """
    if below is None or task is None:
        return weight * loss
    return weight * (task.detach().to(loss.device) / below).clamp(0, 1) * loss
