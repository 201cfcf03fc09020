"""The staircase of rounding with slopes in the place of jumps."""

import torch
from torch import Tensor

from lightning_qat.functional.fake_quantize import Rounding, narrow, quantize


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
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    q = quantize(x, scale, zero_point, lo=lo, hi=hi, rounding=rounding)
    u = torch.nan_to_num(wide / scale)
    u = (u if zero_point is None else u + zero_point).clamp(lo, hi)
    side = torch.sign(u - q)
    border = q + rounding.half_cell * side
    soft = torch.where(side > 0, torch.maximum(border + (u - border) / softness, q), q)
    soft = torch.where(side < 0, torch.minimum(border + (u - border) / softness, q), soft)
    steps = soft if zero_point is None else soft - zero_point
    return narrow(steps * scale, x.dtype)
