"""What all metrics do to their inputs first."""

import torch
from torch import Tensor


def plain_values(x: Tensor) -> Tensor:
    """Return `x` without its graph, in float32, or in float64 where it already is."""
    values = x.detach()
    return values if values.dtype in (torch.float32, torch.float64) else values.float()
