"""The one place that computes codes and fake-quantized values, and their gradients."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lightning_qat.functional.application import applied, compiled_for_cpu, unaliased
from lightning_qat.functional.bounded import attached_scale
from lightning_qat.functional.gradients import number, within
from lightning_qat.functional.kernels import run, wanted
from lightning_qat.functional.learned_scale import lsq_divisor, lsq_summands
from lightning_qat.functional.levels import cast, dequantize_, levels_, narrow, units, widened
from lightning_qat.functional.points import GradientRule, Point, Rounding
from lightning_qat.functional.scratch import Scratch
from lightning_qat.functional.softening import soft_levels_

_LARGE: Final = 1 << 20  # elements from which on a compiled kernel for the forward earns the time of its call
_PIECE: Final = 1 << 18  # elements that either handles at a time on CPU: their temporaries stay in the cache
_WORTHWHILE: Final = 1 << 16  # elements from which on a compiled kernel for backward earns the time of its call


@dataclass(frozen=True, eq=False)
class Setting:
    """All that fake quantization of a tensor depends on; the fields are the arguments of :func:`fake_quantize`."""

    scale: Tensor
    zero_point: Tensor | None
    temperature: Tensor | None
    lo: Tensor
    hi: Tensor
    rounding: Rounding
    rule: GradientRule
    learned: bool
    no_nan: bool = False
    """Whether x is known to hold no NaN, so that none is looked for."""
    ends: tuple[float, float] | None = None
    """Both bounds as numbers, in eager mode: to read them from tensors takes longer."""

    parameter: Tensor | None = None
    """Where the gradient of a scale goes that was learned, but is out of the graph."""

    softness: Tensor | float | None = None
    """Where rounding has not set in wholly: how soft it is. The gradients are those of hard rounding."""

    def attached(self) -> "Setting":
        """Return the same with a learned scale in the graph."""
        if self.parameter is None:
            return self
        return self._scaled(attached_scale(self.parameter, self.scale), None)

    def _scaled(self, scale: Tensor, parameter: Tensor | None) -> "Setting":
        """Return the same with another scale; of ``replace()`` compiled code would check a hundred things each time."""
        tensors = self.zero_point, self.temperature, self.lo, self.hi
        rest = self.no_nan, self.ends, parameter, self.softness
        return Setting(scale, *tensors, self.rounding, self.rule, self.learned, *rest)

    @property
    def needs_input(self) -> bool:
        """Whether the gradients depend on x."""
        return self.learned or self.rule.needs_input

    @property
    def only_clips(self) -> bool:
        """Whether the gradient of x is that of the values within the bounds, zero outside: levels do not count."""
        return self.rule.only_clips and self.needs_input

    @property
    def _fields(self) -> tuple[Any, ...]:
        tensors = self.scale, self.zero_point, self.temperature, self.lo, self.hi
        return *tensors, self.rounding, self.rule, self.learned

    def _key(self, x: Tensor) -> tuple[Any, ...]:
        """Return what a compiled kernel depends on, beside the values of tensors."""
        return x.dim(), x.dtype, self.zero_point is None, self.rounding, self.rule, self.learned

    def levels(self, x: Tensor) -> Tensor:
        """Return :func:`quantize` of x."""
        u = self._units(x, self.scale)
        return levels_(u, self.zero_point, lo=self.lo, hi=self.hi, rounding=self.rounding)

    def _units(self, x: Tensor, scale: Tensor, *, out: Tensor | None = None) -> Tensor:
        return torch.div(widened(x), scale, out=out) if self.no_nan else units(x, scale, out=out)

    def fake_quantized(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return what the nearest levels of x stand for, in the dtype of x; converted to another where one is given."""
        if wanted(x, _LARGE) and not isinstance(self.softness, float):
            key = self.softness is None, dtype, *self._key(x)
            return run(_values, x.device.type, key, x, dtype, self.softness, *self._fields)
        values = self._fake_quantized(x)
        return values if dtype is None else cast(values, dtype)

    def _fake_quantized(self, x: Tensor) -> Tensor:
        if self.ends is not None and self.zero_point is None and x.dtype == self.scale.dtype and x.numel() <= _PIECE:
            # What follows below, in fewer calls: after a product of matrices, each takes microseconds.
            u = torch.div(x, self.scale)
            return self._valued_(u if self.no_nan else torch.nan_to_num_(u), self.scale, None)
        whole = torch.compiler.is_compiling() or x.numel() <= _PIECE or x.device.type != "cpu"
        if whole or x.dtype != self.scale.dtype:
            return narrow(self._valued_(self._units(x, self.scale), self.scale, self.zero_point), x.dtype)
        out = torch.empty_like(x)
        for rows, scale, zero_point in self._pieces(x):
            self._valued_(self._units(x[rows], scale, out=out[rows]), scale, zero_point)
        return out

    def _valued_(self, u: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Replace values in units of a scale by what their levels stand for."""
        if self.softness is not None:
            lo, hi = self.ends or (number(self.lo), number(self.hi))
            if zero_point is not None:  # to take it off the bounds spares two roundings of what lies between integers
                lo, hi = self.lo - zero_point, self.hi - zero_point
            return soft_levels_(u, self.softness, lo=lo, hi=hi, rounding=self.rounding).mul_(scale)
        if self.ends is not None and zero_point is None:  # in few calls
            return self.rounding.round_(u).clamp_(*self.ends).mul_(scale)
        levels = levels_(u, zero_point, lo=self.lo, hi=self.hi, rounding=self.rounding)
        return dequantize_(levels, scale, zero_point)

    def values(self, levels: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what levels stand for, in the dtype of the latent values; the levels are overwritten."""
        return narrow(dequantize_(levels, self.scale, self.zero_point), dtype)

    def not_before(self, grad: Tensor) -> "Setting":
        """Return the same for use in backward, where a compiler waits with it until the gradient is there.

        What does not depend on a gradient the partitioner of torch.compile computes in the forward, and keeps: what is
        to be computed anew. So the scale waits for one number of the gradient, times zero as an integer, which is exact
        for every number, infinity and NaN.
        """
        if not torch.compiler.is_compiling():
            return self
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[grad.element_size()]
        zero = (grad.reshape(-1)[:1].view(bits) & 0).sum()
        return self._scaled(self.scale + zero, self.parameter).hoisted()

    def hoisted(self, x: Tensor | None = None) -> "Setting":
        """Return the same, with a scale that compiled code computes once, where all elements that share it need it.

        Compiled for CPUs, what precedes a scale would be computed anew for every few values: the result might overlap
        its inputs, for all the compiler of C++ knows. A view with strides makes torch.compile write the scale out.

        Args:
            x: large values that the scale was just found from: each row is then quantized before the next one is read.
                The compiler joins their loops where that over scales takes one at a time; vectors of uint32 it has not.
        """
        if not compiled_for_cpu(self.scale):
            return self
        scale, shape = self.scale.contiguous(), self.scale.shape
        if x is not None and statically_known_true(x.numel() >= _LARGE) and scale.dtype == torch.float32:
            scale = scale.view(torch.int32).to(torch.uint32).view(torch.float32)
        strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]  # stride() is unknown in a traced backward
        return self._scaled(scale.as_strided(shape, strides), self.parameter)

    def gradients(self, grad: Tensor, x: Tensor, needs: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
        """Return the gradients with respect to x, scale and temperature, each or None where it is not needed.

        Args:
            grad: gradient with respect to the fake-quantized value, the shape of x.
            x: latent values.
            needs: which of the three are wanted.
        """
        if wanted(x, _WORTHWHILE):
            return run(_gradients, x.device.type, (needs, *self._key(x)), grad, x, needs, *self._fields)
        if self.only_clips and not (needs[1] and self.learned):
            return self._clipped(grad, x) if needs[0] else None, None, None
        out = torch.empty_like(x) if needs[0] else None
        sums: Tensor | None = None
        total = torch.zeros_like(self.temperature) if needs[2] and self.temperature is not None else None
        scratch = Scratch()
        for part, rows in self.parts(x):
            scratch.begin(shared=rows is not ...)
            wide, point = widened(_taken(grad, rows)), part._point(_taken(x, rows), scratch)
            if out is not None:
                self._input_gradient(wide, point, _taken(out, rows))
            if total is not None:
                total.add_((self.rule.temperature_gradient(wide, point) * part.scale).sum())
            if needs[1] and self.learned:
                room = scratch.take(point.u, point.u)
                summands = lsq_summands(wide, point, part.zero_point, out=point.q, room=room)
                found = cast(summands.sum_to_size(part.scale.shape), self.scale.dtype)
                if rows is not ...:
                    sums = torch.zeros_like(self.scale) if sums is None else sums
                    (sums[rows] if found.shape != sums.shape else sums).add_(found)
                else:
                    sums = found
        return out, self._divided(sums, x, self.scale.numel()), self._divided(total, x, 1)

    def clip_(self, grad: Tensor, x: Tensor) -> Tensor:
        """Overwrite the gradient of the values of x by that of x, where :attr:`only_clips`; return those values.

        Both begin with x in units of the scale, and memory of the values holds that first.
        """
        plain = self.zero_point is None and grad.dtype == x.dtype == self.scale.dtype
        if self.ends is None or not plain or wanted(x, _WORTHWHILE):
            clipped, values = self.gradients(grad, x, (True, False, False))[0], self.fake_quantized(x)
            assert clipped is not None  # noqa: S101 - it is wanted
            grad.copy_(clipped)
            return values
        if x.numel() <= _PIECE:
            u = self._units(x, self.scale)
            within(grad, u, *self.ends, out=grad)
            return self._valued_(u, self.scale, None)
        values = torch.empty_like(x)
        for rows, scale, _ in self._pieces(x):
            u, part = self._units(x[rows], scale, out=values[rows]), grad[rows]
            within(part, u, *self.ends, out=part)
            self._valued_(u, scale, None)
        return values

    def _clipped(self, grad: Tensor, x: Tensor) -> Tensor:
        out, room = torch.empty_like(x), grad.dtype == x.dtype == self.scale.dtype and not torch.compiler.is_compiling()
        for rows, scale, zero_point in self._pieces(x):
            part = _taken(out, rows)  # holds x in units of the scale first, where it has room
            u = self._units(_taken(x, rows), scale, out=part if room else None)
            self._clip(widened(_taken(grad, rows)), u if zero_point is None else u.add_(zero_point), part)
        return out

    def _clip(self, grad: Tensor, u: Tensor, out: Tensor) -> None:
        lo, hi = self.ends or (self.lo, self.hi)
        if grad.dtype == u.dtype == out.dtype:
            within(grad, u, lo, hi, out=out)
        else:
            out.copy_(within(grad, u, lo, hi))

    def _input_gradient(self, grad: Tensor, point: Point, out: Tensor) -> None:
        if self.only_clips:
            self._clip(grad, point.u, out)
            return
        inner = self.rule.input_gradient(grad, point)
        out.copy_(point.clip(inner) if self.learned else inner)

    def _divided(self, total: Tensor | None, x: Tensor, num_scales: int) -> Tensor | None:
        """Return a sum of gradients divided as that of learned scales is."""
        hi = self.hi if self.ends is None else self.ends[1]
        return None if total is None else total / lsq_divisor(x.numel(), num_scales, hi)

    def _point(self, x: Tensor, scratch: Scratch) -> Point:
        wide = widened(x)
        u = units(wide, self.scale, out=scratch.take(wide, self.scale))
        copied = scratch.take(u, u)
        q = u.clone() if copied is None else copied.copy_(u)
        lo, hi = self.ends or (self.lo, self.hi)
        q = levels_(q, self.zero_point, lo=lo, hi=hi, rounding=self.rounding)
        u = u if self.zero_point is None else u.add_(self.zero_point)
        return Point(wide, u, q, self.scale, lo, hi, self.rounding, self.temperature)

    def parts(self, x: Tensor) -> Iterator[tuple["Setting", Any]]:
        """Split along the first dimension where temporaries of the whole size would be slow: on CPU, in eager mode."""
        for rows, scale, zero_point in self._pieces(x):
            yield (self if scale is self.scale else replace(self, scale=scale, zero_point=zero_point)), rows

    def _pieces(self, x: Tensor) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        whole = torch.compiler.is_compiling() or x.device.type != "cpu" or x.dim() == 0
        num_rows = 1 if whole else max(1, _PIECE * x.shape[0] // max(1, x.numel()))
        if whole or num_rows >= x.shape[0]:
            yield ..., self.scale, self.zero_point
            return
        split = self.scale.dim() == x.dim() and self.scale.shape[0] == x.shape[0]
        for start in range(0, x.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            zero_point = self.zero_point[rows] if split and self.zero_point is not None else self.zero_point
            yield rows, (self.scale[rows] if split else self.scale), zero_point


def _taken(x: Tensor, rows: Any) -> Tensor:
    return x if rows is ... else x[rows]


def _values(x: Tensor, dtype: torch.dtype | None, softness: Tensor | None, *fields: Any) -> Tensor:
    return replace(Setting(*fields), softness=softness).fake_quantized(x, dtype)


def _gradients(grad: Tensor, x: Tensor, needs: Any, *fields: Any) -> tuple[Tensor | None, ...]:
    return Setting(*fields).gradients(grad, x, needs)


class _FakeQuantize(torch.autograd.Function):
    """Exact forward; gradients by rule. Backward recomputes from the latent tensor, which is kept by reference."""

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, zero_point: Tensor | None, temperature: Tensor | None, lo: Tensor, hi: Tensor,
        rounding: Rounding, rule: GradientRule, learned: bool, no_nan: bool, softness: Tensor | float | None,
    ) -> Tensor:  # fmt: skip
        setting = Setting(
            scale, zero_point, temperature, lo, hi, rounding, rule, learned, no_nan, softness=softness
        )  # fmt: skip
        return unaliased(setting.hoisted(x).fake_quantized(x))

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, zero_point, temperature, lo, hi, rounding, rule, learned, _, _ = inputs
        ctx.rounding, ctx.rule, ctx.learned = rounding, rule, learned  # type: ignore[attr-defined]
        if learned or rule.needs_input:
            ctx.save_for_backward(x, scale, zero_point, temperature, lo, hi)
        else:
            ctx.save_for_backward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing refuses to unpack a tensor again
        if not saved:
            return (grad, *(None,) * 10)
        x, scale, zero_point, temperature, lo, hi = saved
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        setting = Setting(scale, zero_point, temperature, lo, hi, ctx.rounding, ctx.rule, ctx.learned)
        grad_x, grad_scale, grad_temperature = setting.not_before(grad).gradients(grad, x, needs)
        return (grad_x, grad_scale, None, grad_temperature, *(None,) * 7)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, lo: Tensor, hi: Tensor, rounding: Rounding,
    rule: GradientRule, learned: bool = False, temperature: Tensor | None = None, no_nan: bool = False,
    softness: Tensor | float | None = None,
) -> Tensor:  # fmt: skip
    r"""Fake-quantize: :math:`\hat x = (q - z) s` with q as in :func:`quantize`, in the dtype of x.

    Args:
        x: latent values, any floating dtype and shape that scale broadcasts to.
        scale: positive step in float32, broadcastable to x.
        zero_point: as in :func:`quantize`.
        lo: smallest level, 0-dim tensor.
        hi: largest level, 0-dim tensor.
        rounding: the grid.
        rule: how the gradient passes the rounding.
        learned: whether scale takes the LSQ gradient; the clip mask then applies to the gradient of x, too.
        temperature: parameter of a rule that learns one, shape [1].
        no_nan: whether x is known to hold no NaN, so that none is looked for.
        softness: how soft the rounding is, as in :func:`~lightning_qat.functional.softening.soft_levels_`, or None.
    """
    tensors = x, scale, zero_point, temperature, lo, hi
    y: Tensor = applied(_FakeQuantize, *tensors, rounding, rule, learned, no_nan, softness)
    return y
