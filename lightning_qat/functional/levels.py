"""From values to levels, and back."""

import torch
from torch import Tensor

from lightning_qat.functional.application import compiled_for_cpu
from lightning_qat.functional.gradients import clipped, number
from lightning_qat.functional.points import Rounding


def widened(x: Tensor) -> Tensor:
    """Return x in the dtype of the arithmetic."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def units(x: Tensor, scale: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return x in units of the scale, NaN replaced by zero; infinities by the largest finite numbers, or not."""
    u = torch.div(widened(x), scale, out=out)
    if torch.compiler.is_compiling():  # compiled for CPUs, nan_to_num() looks at one number at a time
        return torch.where(u == u, u, 0.0)
    return torch.nan_to_num_(u)


def levels_(
    u: Tensor, zero_point: Tensor | None, *, lo: Tensor | float, hi: Tensor | float, rounding: Rounding
) -> Tensor:
    """Replace values in units of the scale by their levels."""
    if zero_point is None and compiled_for_cpu(u):
        # Bounds are levels and rounding is monotone: the order does not matter, and gradients clip the same values.
        return rounding.round_(clipped(u, lo, hi))
    u = rounding.round_(u)
    if zero_point is not None:
        u = u.add_(zero_point)
    # clamp takes tensors or numbers, not one of each; bounds are tensors where bit widths change during a run
    return u.clamp_(number(lo), number(hi))  # type: ignore[arg-type]


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, *, lo: Tensor | float, hi: Tensor | float, rounding: Rounding
) -> Tensor:
    r"""Return the levels :math:`q = clamp(round(x / s - o) + o + z, lo, hi)`, as floating point numbers.

    Args:
        x: latent values in any floating dtype; the arithmetic is float32, or float64 for float64 input.
        scale: positive step s, broadcastable to x.
        zero_point: integer z as floating point, broadcastable to x, or None for a symmetric grid.
        lo: smallest level, in units of the scale.
        hi: largest level, in units of the scale.
        rounding: the grid's rounding; it holds the offset o.

    Non-finite values are defined: NaN maps to the level nearest to zero, infinities to the outermost levels.

    Source: ONNX QuantizeLinear (order of operations), arXiv:1712.05877 eq. 1.
    """
    return levels_(units(x, scale), zero_point, lo=lo, hi=hi, rounding=rounding)


def dequantize_(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Replace levels by the values they stand for, as :func:`dequantize` does."""
    return q.mul_(scale) if zero_point is None else q.sub_(zero_point).mul_(scale)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    r"""Return :math:`(q - z) s`.

    >>> dequantize(torch.tensor([-2.0, 1.0]), torch.tensor(0.5), None)
    tensor([-1.0000,  0.5000])
    """
    return q * scale if zero_point is None else (q - zero_point) * scale


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to the dtype of the latent values, saturating where float16 would overflow.

    >>> narrow(torch.tensor([1.0, -1e6]), torch.float16)
    tensor([ 1.0000e+00, -6.5504e+04], dtype=torch.float16)
    """
    if dtype == torch.float16:
        values = values.clamp(-65504.0, 65504.0)
    return cast(values, dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a dtype, without calling torch where it has it: after a large product each call is a cache miss."""
    return x if x.dtype == dtype else x.to(dtype)
