"""Scales and temperatures within their bounds, with gradients that live on outside."""

from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lightning_qat.functional.application import applied, compiled_for_cpu
from lightning_qat.functional.gradients import clipped

_LARGE: Final = 1 << 14  # elements from which on a look at all steps is cheaper than one at all values
_LARGEST: Final = 2.0**118
SCALE_FLOOR = 2.0**-100
"""Smallest scale ever used in float32; far below any useful value, far above the subnormals."""


class _Corrected(torch.autograd.Function):
    """A corrected magnitude in the forward, the gradient of the plain magnitude: it stays alive at the bounds."""

    @staticmethod
    def forward(value: Tensor, corrected: Tensor) -> Tensor:
        return corrected.clone()

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (value,) = ctx.saved_tensors
        return magnitude_gradient(value, grad), None


def magnitude_gradient(value: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of a value from that of its corrected magnitude."""
    return torch.where(value < 0, -grad, grad)


def scale_floor(dtype: torch.dtype) -> float:
    """Return the smallest scale that is used where scales are stored in a dtype."""
    return max(SCALE_FLOOR, torch.finfo(dtype).smallest_normal)


def finish_scale(scale: Tensor, dtype: torch.dtype = torch.float32, *, largest: float = _LARGEST) -> Tensor:
    """Make a scale positive and finite, and round it to the dtype it will be stored in; returned in float32 or wider.

    Args:
        scale: non-negative, possibly zero, NaN (becomes the floor) or infinite (becomes ``largest``).
        dtype: storage dtype of the scale; the result is representable in it.
        largest: upper bound, so that the largest level times the scale stays finite.

    >>> finish_scale(torch.tensor([0.0, float("inf"), 0.1]), torch.float16)
    tensor([6.1035e-05, 6.5504e+04, 9.9976e-02])
    """
    floor, largest = scale_floor(dtype), min(largest, torch.finfo(dtype).max)
    if compiled_for_cpu(scale):  # NaN becomes the lower bound
        scale = clipped(scale, floor, largest)
    else:
        scale = torch.nan_to_num(scale, nan=floor).clamp_(floor, largest)
    return scale if dtype in (torch.float32, torch.float64) else scale.to(dtype).float()


def tells_no_nan(step: Tensor, x: Tensor, floor: float) -> bool:
    """Whether a step, found from all of these very values, tells that none is NaN: it is the floor where one is.

    Only where reading a number is possible, and cheaper than the pass over x that it saves.

    Args:
        step: between levels.
        x: the values.
        floor: the smallest step.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if x.device.type != "cpu" or x.numel() < _LARGE or type(step) is not Tensor:
        return False
    return float(step.amin()) > 2 * floor


def positive_scale(scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    r"""Return :math:`max(|s|, floor)` of a learned scale, rounded to ``dtype``, with a gradient that never dies.

    The absolute value reflects a scale that a large step would carry past zero.

    >>> positive_scale(torch.tensor([-0.5, 0.25]))
    tensor([0.5000, 0.2500])
    """
    return attached_scale(scale, detached_scale(scale, dtype))


def detached_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what :func:`positive_scale` does, out of the graph."""
    return finish_scale(scale.detach().abs(), dtype)


def attached_scale(scale: Tensor, detached: Tensor) -> Tensor:
    """Return what :func:`positive_scale` does, given :func:`detached_scale`."""
    found: Tensor = applied(_Corrected, scale, detached)
    return found


def eager_absmax_scale(x: Tensor, dims: tuple[int, ...], divisor: float, largest: float) -> tuple[Tensor, bool]:
    """Return :func:`eager_finished_scale` of the largest absolute values.

    Args:
        x: values on a CPU, out of the graph.
        dims: over which one scale extends.
        divisor: of the largest absolute value.
        largest: upper bound.
    """
    scale = torch.maximum(x.amin(dims, True).neg_(), x.amax(dims, True)).div_(divisor)
    return eager_finished_scale(scale, largest)


def eager_finished_scale(scale: Tensor, largest: float) -> tuple[Tensor, bool]:
    """Return a finished scale, and whether it tells that none of the values that it was found from is NaN.

    In few operations: where the smallest scale is above the floor, no scale is NaN, and only infinities are left.

    Args:
        scale: on a CPU, out of the graph; overwritten.
        largest: upper bound.
    """
    if type(scale) is Tensor and scale.amin().item() > 2 * SCALE_FLOOR:
        return scale.clamp_max_(largest), True
    return finish_scale(scale, largest=largest), False


def eager_positive_scale(scale: Tensor) -> Tensor:
    """Return what :func:`detached_scale` does for float32."""
    return torch.nan_to_num_(scale.detach().abs(), SCALE_FLOOR).clamp_(SCALE_FLOOR, _LARGEST)


def bounded_temperature(temperature: Tensor, least: float, largest: float) -> Tensor:
    r"""Return :math:`|t|` of a learned temperature, clamped, with a gradient that lives on outside the bounds.

    >>> bounded_temperature(torch.tensor([-0.5, 0.0]), 0.03, 1000.0)
    tensor([0.5000, 0.0300])
    """
    corrected = torch.nan_to_num(temperature.detach().abs(), nan=least).clamp(least, largest)
    found: Tensor = applied(_Corrected, temperature, corrected)
    return found
