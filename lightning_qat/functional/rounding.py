"""Rounding of values in units of the scale to the levels of a grid."""

import torch
from torch import Tensor


def round_uniform(u: Tensor, offset: float = 0.0) -> Tensor:
    r"""Round to the nearest level of a uniform grid, :math:`round(u - o) + o`, ties to even.

    Args:
        u: values in units of the scale, any shape.
        offset: shift of the levels against the integers, 0 or 0.5.

    Source: arXiv:1712.05877 (offset 0), arXiv:2502.02631 section 3.2 (offset 0.5).

    >>> round_uniform(torch.tensor([0.4, 0.5, 1.5, -0.6]))
    tensor([ 0.,  0.,  2., -1.])
    >>> round_uniform(torch.tensor([0.4, -0.2, 1.2]), offset=0.5)
    tensor([ 0.5000, -0.5000,  1.5000])
    """
    return round_uniform_(u.clone(), offset)


def round_uniform_(u: Tensor, offset: float = 0.0) -> Tensor:
    """Round in place as :func:`round_uniform` does."""
    return u.sub_(offset).round_().add_(offset) if offset else u.round_()


def round_ternary(u: Tensor, threshold: float = 0.5) -> Tensor:
    r"""Map to -1, 0 or 1: the sign of u where :math:`|u|` exceeds the threshold, else 0.

    Args:
        u: values in units of the scale, any shape.
        threshold: where 0 ends, in units of the scale, positive.

    Source: arXiv:2402.17764 (0.5), arXiv:1605.04711 (other thresholds).

    >>> round_ternary(torch.tensor([0.4, 0.6, -2.0]))
    tensor([ 0.,  1., -1.])
    """
    return round_ternary_(u.clone(), threshold)


def round_ternary_(u: Tensor, threshold: float = 0.5) -> Tensor:
    """Round in place as :func:`round_ternary` does."""
    return u.copy_(torch.gt(u, threshold).to(u.dtype) - torch.lt(u, -threshold).to(u.dtype))


def round_binary(u: Tensor) -> Tensor:
    """Map to the sign of u, with +1 at zero (of either sign): exactly two levels.

    Source: arXiv:2310.11453 eq. 2; ``torch.sign`` would give a third level at zero.

    >>> round_binary(torch.tensor([0.0, -0.0, 0.3, -1e-30]))
    tensor([ 1.,  1.,  1., -1.])
    """
    return round_binary_(u.clone())


def round_binary_(u: Tensor) -> Tensor:
    """Round in place as :func:`round_binary` does."""
    return u.floor_().clamp_(-1.0, 0.0).mul_(2.0).add_(1.0)
