"""The staircase of rounding with slopes in the place of jumps."""

import torch
from torch import Tensor

from lightning_qat.functional.fake_quantize import Setting
from lightning_qat.functional.gradients import number
from lightning_qat.functional.levels import narrow, quantize
from lightning_qat.functional.points import Rounding


def soft_values(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, softness: Tensor, *, lo: Tensor, hi: Tensor, rounding: Rounding
) -> Tensor:
    r"""Return x on its way from the identity to its fake-quantized value, in the dtype of x.

    Between two levels with the border b in their middle, in units of the scale:
    :math:`b + (u - b) / \rho`, bounded by the levels. At softness :math:`\rho = 1` this is u within lo..hi; as it goes
    to 0 it becomes the staircase. Beyond the outermost levels it is those.

    Args:
        x: latent values, any shape.
        scale: positive step, broadcastable to x.
        zero_point: broadcastable to x, or None.
        softness: 0-dim, in (0, 1].
        lo: smallest level.
        hi: largest level.
        rounding: of a grid whose borders lie in the middle between its levels.

    Source: the proximal map of PARQ, arXiv:2503.15748 section 3 (there with recomputed levels, and applied to the
    parameters by the optimizer; here in the forward, with a scale that may be learned).

    >>> from lightning_qat.quantization import Int
    >>> x, bounds = torch.tensor([0.125, 0.375, 0.75, 3.0]), {"lo": torch.tensor(-2.0), "hi": torch.tensor(1.0)}
    >>> [soft_values(x, torch.ones(1), None, torch.tensor(s), rounding=Int(2), **bounds).tolist() for s in (1.0, 0.5)]
    [[0.125, 0.375, 0.75, 1.0], [0.0, 0.25, 1.0, 1.0]]
    """
    u = torch.nan_to_num_((x if x.dtype in (torch.float32, torch.float64) else x.float()) / scale)
    if zero_point is not None:
        u.add_(zero_point)
    q = quantize(x, scale, zero_point, lo=lo, hi=hi, rounding=rounding)
    # how far past its level, up to half a cell; clamp takes tensors or numbers, not one of each
    past = u.clamp_(number(lo), number(hi)).sub_(q)  # type: ignore[arg-type]
    # |b + (u - b) / rho - q|, which the level bounds from below
    soft = past.abs().div_(softness).add_(rounding.half_cell * (1 - 1 / softness)).relu_().copysign_(past).add_(q)
    return narrow((soft if zero_point is None else soft.sub_(zero_point)).mul_(scale), x.dtype)


@torch.no_grad()
def softened(x: Tensor, setting: Setting, softness: Tensor) -> Tensor:
    """Return :func:`soft_values` of x, piece by piece, for the scale and the grid of a setting."""
    softness, out = softness.to(x.device), torch.empty_like(x)
    bounds = {"lo": setting.lo, "hi": setting.hi}
    for part, rows in setting.parts(x):
        out[rows] = soft_values(x[rows], part.scale, part.zero_point, softness, **bounds, rounding=setting.rounding)
    return out
