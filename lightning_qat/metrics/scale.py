"""The scales of a layer at a glance."""

from typing import Any, final

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def scale_summary(scale: Tensor) -> dict[str, Tensor]:
    """Return the smallest, the median and the largest scale.

    Args:
        scale: Scales of a layer, any shape, at least one.

    Returns:
        Scalars under `min`, `median` (of an even number the lower of the two in the middle) and `max`.

    Raises:
        ValueError: There is no scale.

    Example:
        >>> scale_summary(torch.tensor([0.1, 0.4, 0.2]))
        {'min': tensor(0.1000), 'median': tensor(0.2000), 'max': tensor(0.4000)}
    """
    if scale.numel() == 0:
        raise ValueError(f"scale has shape {list(scale.shape)}; expected at least one scale")
    flat = scale.detach().flatten()
    smallest, largest = torch.aminmax(flat)
    return {"min": smallest, "median": flat.median(), "max": largest}


@final
class ScaleSummary(Metric):
    """Smallest, median and largest scale, see `scale_summary`.

    The median needs all scales: each update keeps them (4 bytes each) until `reset`.

    Args:
        kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = ScaleSummary()
        >>> metric.update(torch.tensor([0.1, 0.4, 0.2]))
        >>> metric.compute()
        {'min': tensor(0.1000), 'median': tensor(0.2000), 'max': tensor(0.4000)}
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    scales: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("scales", [], dist_reduce_fx="cat")

    def update(self, scale: Tensor) -> None:
        """Add the scales of a layer."""
        # A copy: a learned scale changes in place while the metric waits.
        self.scales.append(scale.detach().flatten().clone())

    def compute(self) -> dict[str, Tensor]:
        """Return the summary over all updates."""
        return scale_summary(dim_zero_cat(self.scales))
