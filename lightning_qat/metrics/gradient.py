"""The size of gradients that come through a quantizer."""

from typing import Any, final

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_qat.metrics._common import plain_values


def gradient_norm(gradient: Tensor) -> Tensor:
    """Return the Euclidean norm of a gradient.

    Args:
        gradient: Gradient of a latent weight, of a scale or of an input; any shape and floating dtype. Under mixed
            precision divide it by the scale of the loss first.

    Returns:
        A scalar >= 0, float32 or float64.

    Example:
        >>> gradient_norm(torch.tensor([3.0, -4.0]))
        tensor(5.)
    """
    return _sum_of_squares(gradient).sqrt()


@final
class GradientNorm(Metric):
    """Root mean square over updates of the Euclidean norm of a gradient.

    sqrt(mean over updates of ||g||^2): with one update the norm itself. Ranks with equal gradients agree with one rank.

    Args:
        kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = GradientNorm()
        >>> metric.update(torch.tensor([3.0, -4.0]))
        >>> metric.compute()
        tensor(5.)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    squares: Tensor
    num_updates: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("squares", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("num_updates", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, gradient: Tensor) -> None:
        """Add the gradient of one step."""
        self.squares = self.squares + _sum_of_squares(gradient).to(self.squares.dtype)
        self.num_updates = self.num_updates + 1

    def compute(self) -> Tensor:
        """Return the root mean square of the norms."""
        return (self.squares / self.num_updates).sqrt()


def _sum_of_squares(gradient: Tensor) -> Tensor:
    return plain_values(gradient).square().sum()
