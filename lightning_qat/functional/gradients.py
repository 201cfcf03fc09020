"""Gradients of rounding: what backward does where the true derivative is zero almost everywhere."""

import functools
import math

import torch
from torch import Tensor

from lightning_qat.functional.application import compiled_for_cpu


def number(bound: Tensor | float) -> Tensor | float:
    """Return a 0-dim tensor on the CPU as a number, which elementwise kernels take ten times faster than a tensor.

    Not while compiling: there a number would be compiled in, and a change of bits would compile anew.
    """
    if isinstance(bound, Tensor) and bound.device.type == "cpu" and not torch.compiler.is_compiling():
        return float(bound)
    return bound


def clipped(u: Tensor, lo: Tensor | float, hi: Tensor | float) -> Tensor:
    """Return u within lo..hi, as a fresh tensor; NaN as NaN or, compiled for a CPU, as lo.

    There each minimum and maximum looks for NaN, which takes as long as the rest of it. A comparison does not.
    """
    if not compiled_for_cpu(u):
        return u.clamp(lo, hi)  # type: ignore[arg-type]  # tensors or numbers, not one of each
    u = torch.where(u > lo, u, lo)
    return torch.where(u < hi, u, hi)


@functools.cache
def _just_outside(lo: float, hi: float, dtype: torch.dtype) -> tuple[float, float]:
    ends = torch.tensor([lo, hi], dtype=dtype), torch.tensor([-math.inf, math.inf], dtype=dtype)
    below, above = torch.nextafter(*ends).tolist()
    return below, above


def within(
    values: Tensor, u: Tensor, lo: Tensor | float, hi: Tensor | float, *, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    r"""Return values where :math:`lo \le u \le hi`, else 0, as a fresh tensor unless one is given.

    Args:
        values: any shape and floating dtype.
        u: the same shape and dtype.
        lo: smallest u to keep, number or 0-dim tensor.
        hi: largest u to keep.
        out: where the result goes, instead of into a fresh tensor; the same shape and dtype.

    >>> within(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.5, -1.0, 0.5]), -1.0, 1.0)
    tensor([0., 2., 3.])
    """
    lo, hi = number(lo), number(hi)
    eager_on_cpu = values.device.type == "cpu" and not torch.compiler.is_compiling()
    if isinstance(lo, Tensor) or isinstance(hi, Tensor) or not eager_on_cpu:
        inside = clipped(u, lo, hi) == u  # compiled for CPUs, & would make numbers of masks
        masked = torch.where(inside, values, 0.0)
        return masked if out is None else out.copy_(masked)
    # One vectorized pass without masks; its bounds are exclusive. torch.where takes thirty times as long.
    bounds = _just_outside(lo, hi, u.dtype)
    gated: Tensor = (
        torch.ops.aten.hardtanh_backward(values, u, *bounds)
        if out is None
        else torch.ops.aten.hardtanh_backward.grad_input(values, u, *bounds, grad_input=out)
    )
    return gated


def elementwise_scaling(
    grad: Tensor, u: Tensor, q: Tensor, lo: Tensor | float, hi: Tensor | float, delta: float
) -> Tensor:
    r"""Return :math:`g (1 + \delta\, sign(g) (u - q) / (hi - lo))` inside lo..hi, else 0.

    Args:
        grad: gradient g with respect to the quantized value.
        u: latent value in units of the scale.
        q: level it was mapped to.
        lo: smallest level.
        hi: largest level.
        delta: strength, non-negative; 0 is the clipped straight-through estimator.

    Source: EWGS, arXiv:2104.00903 eq. 5; the difference is taken on the grid normalized to [0, 1], as in its code.

    >>> one = torch.tensor(1.0)
    >>> elementwise_scaling(one, 0.25 * one, 0 * one, -one, one, delta=0.8)
    tensor(1.1000)
    """
    scaled = grad * (1 + delta * torch.sign(grad) * (u - q) / (hi - lo))
    return within(scaled, u, lo, hi)


def _sech_squared(a: Tensor) -> Tensor:
    """Return 1 - tanh(a)^2 without cancellation: in float32 that difference is 0 from |a| = 9 on, this only from 43."""
    decay = torch.exp(-2 * a.abs())
    return 4 * decay / (1 + decay) ** 2


def staircase_slope(distance: Tensor, half_cell: float, temperature: Tensor | float) -> Tensor:
    r"""Return the derivative of the smooth staircase :math:`h \tanh(d / t) / \tanh(h / t)` with respect to d.

    Args:
        distance: d, signed distance to the border between two levels, within -h..h, in units of the scale.
        half_cell: h, half the distance between two levels.
        temperature: t > 0; large is linear (slope 1), small is a hard step.

    Source: DSQ, arXiv:1908.05033 eq. 3 with k = 1 / t.

    >>> staircase_slope(torch.tensor(0.0), 0.5, 1.0)
    tensor(1.0820)
    """
    k = (1.0 / torch.as_tensor(temperature, dtype=distance.dtype, device=distance.device)).clamp(max=1e30)
    return half_cell * k * _sech_squared(k * distance) / torch.tanh(k * half_cell)


def staircase_temperature_slope(distance: Tensor, half_cell: float, temperature: Tensor) -> Tensor:
    r"""Return the derivative of the smooth staircase :math:`h \tanh(d / t) / \tanh(h / t)` with respect to t.

    Args:
        distance: as in :func:`staircase_slope`.
        half_cell: as in :func:`staircase_slope`.
        temperature: t > 0.

    >>> staircase_temperature_slope(torch.tensor(0.5), 0.5, torch.tensor(1.0)).abs() < 1e-6
    tensor(True)
    """
    k = 1.0 / temperature
    top, bottom = torch.tanh(k * distance), torch.tanh(k * half_cell)
    rise = distance * _sech_squared(k * distance) * bottom - top * half_cell * _sech_squared(k * half_cell)
    return -half_cell * rise / bottom**2 * k**2
