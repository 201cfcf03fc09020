"""The gradient of a learned scale (LSQ)."""

import functools

import torch
from torch import Tensor

from lightning_qat.functional.points import Point


def lsq_divisor(num_elements: int, num_scales: int, hi: Tensor | float) -> Tensor | float:
    r"""Return :math:`\sqrt{N hi}`, where N of the elements share a scale."""
    sharing = torch.sym_max(1, num_elements // max(1, num_scales))  # an empty batch has a gradient of zero, not 0 / 0
    return torch.sqrt(sharing * hi) if isinstance(hi, Tensor) else _root(sharing, hi)


@functools.cache
def _root(sharing: int, hi: float) -> float:
    """Return the number that operations on tensors give."""
    return float(torch.sqrt(sharing * torch.tensor(hi, dtype=torch.float32)))


def lsq_summands(
    grad: Tensor, point: Point, zero_point: Tensor | None, *, out: Tensor | None = None, room: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return the summands of :func:`lsq_scale_gradient`, in ``out`` or a fresh tensor; ``room`` is overwritten."""
    if zero_point is None:
        return torch.sub(point.q, point.clip(point.u, out=room), out=out).mul_(grad)
    return torch.sub(point.q - zero_point, point.clip(point.u - zero_point, out=room), out=out).mul_(grad)


def lsq_scale_gradient(grad: Tensor, point: Point, zero_point: Tensor | None) -> Tensor:
    r"""Return the gradient of a learned scale, :math:`\sum g (q - u) / \sqrt{N hi}` inside the clip range.

    Outside, the summand is :math:`g (q - z)`; N is the number of elements that share the scale.

    Source: LSQ, arXiv:1902.08153 eq. 3 and section 2.2; with a zero point as in LSQ+, arXiv:2004.09576.
    """
    total = lsq_summands(grad, point, zero_point).sum_to_size(point.step.shape)
    return total / lsq_divisor(grad.numel(), point.step.numel(), point.hi)
