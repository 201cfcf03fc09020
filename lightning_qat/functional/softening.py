"""The staircase of rounding with slopes in the place of jumps."""

import functools

import torch
from torch import Tensor

from lightning_qat.functional.application import compiled_for_cpu
from lightning_qat.functional.gradients import clipped, number
from lightning_qat.functional.points import Rounding


@functools.lru_cache(maxsize=64)
def _flat(softness: float, half_cell: float) -> float:
    """Return how much of a slope lies below its level, in the numbers of float32 tensors."""
    return float(half_cell * (1 / torch.tensor(softness, dtype=torch.float32, device="cpu") - 1))


def soft_levels_(
    u: Tensor, softness: Tensor | float, *, lo: Tensor | float, hi: Tensor | float, rounding: Rounding
) -> Tensor:
    r"""Replace values in units of the scale by values on their way from themselves to their levels.

    Between two levels with the border b in their middle: :math:`b + (u - b) / \rho`, bounded by the levels. At
    softness :math:`\rho = 1` this is u within lo..hi; as it goes to 0 it becomes the staircase. Beyond the outermost
    levels it is those.

    Args:
        u: latent values in units of the scale, without NaN, any shape.
        softness: 0-dim or a number, in (0, 1].
        lo: smallest level, less the zero point where there is one; a number, or broadcastable to u.
        hi: largest level, likewise; a tensor where lo is one.
        rounding: of a grid whose borders lie in the middle between its levels.

    Source: the proximal map of PARQ, arXiv:2503.15748 section 3 (there with recomputed levels, and applied to the
    parameters by the optimizer; here in the forward, with a scale that may be learned).

    >>> from lightning_qat.quantization import Int
    >>> u = torch.tensor([0.125, 0.375, 0.75, 3.0])
    >>> [soft_levels_(u.clone(), s, lo=-2.0, hi=1.0, rounding=Int(2)).tolist() for s in (1.0, 0.5)]
    [[0.125, 0.375, 0.75, 1.0], [0.0, 0.25, 1.0, 1.0]]
    """
    u = clipped(u, lo, hi) if compiled_for_cpu(u) else u.clamp_(lo, hi)  # type: ignore[arg-type]
    q = rounding.round_(u.clone())
    past, softness, half = u.sub_(q), number(softness), rounding.half_cell  # past its level, up to half a cell
    # |b + (u - b) / rho - q|, which the level bounds from below, with the sign of u - q
    if isinstance(softness, float):  # in one pass
        torch.ops.aten.softshrink.out(past.div_(softness), _flat(softness, half), out=past)
        return past.add_(q)
    return past.abs().div_(softness).add_(half * (1 - 1 / softness)).relu_().copysign_(past).add_(q)
