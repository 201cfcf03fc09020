"""A linear layer with quantized weight and input as one function that keeps little for backward."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_qat.functional.application import applied, transformed_or_compiled, unaliased
from lightning_qat.functional.fake_quantize import Setting
from lightning_qat.functional.integer import scaled_product
from lightning_qat.functional.levels import cast
from lightning_qat.functional.points import GradientRule, Rounding
from lightning_qat.functional.weight_only_linear import fits, product_weight, weight_gradient, weight_only_linear


@dataclass(frozen=True)
class Pieces:
    """What of a :class:`Setting` is no tensor."""

    rounding: Rounding
    rule: GradientRule
    learned: bool
    no_nan: bool
    softness: float | None

    @classmethod
    def of(cls, setting: Setting) -> "Pieces":
        """Take them from a setting."""
        assert not isinstance(setting.softness, Tensor), "compiled, or on a GPU, soft weights are not fused"  # noqa: S101
        return cls(setting.rounding, setting.rule, setting.learned, setting.no_nan, setting.softness)

    @property
    def needs_input(self) -> bool:
        """Whether the gradients depend on the latent values."""
        return self.learned or self.rule.needs_input


@dataclass(frozen=True)
class Plan:
    """How a fused linear layer computes.

    Args:
        weight: quantization of the weight.
        input: quantization of the input, or None.
        grouped_input: whether the input comes as [..., groups, size].
        integer: whether the forward product runs on integers.
        dtype: dtype of the products and of the result.
    """

    weight: Pieces
    input: Pieces | None
    grouped_input: bool
    integer: bool
    dtype: torch.dtype

    @property
    def keeps_codes(self) -> bool:
        """Whether int8 codes of the input are all that backward needs of it."""
        return self.input is not None and not self.input.needs_input


_Tensors = tuple[Tensor | None, ...]  # scale, zero point, temperature, lo, hi


def _setting(tensors: _Tensors, pieces: Pieces) -> Setting:
    scale, zero_point, temperature, lo, hi = tensors
    assert scale is not None and lo is not None and hi is not None  # noqa: S101, PT018 - fused_linear() passes them
    return Setting(
        scale, zero_point, temperature, lo, hi, pieces.rounding, pieces.rule, pieces.learned, pieces.no_nan,
        softness=pieces.softness,
    )  # fmt: skip


def _tokens(x: Tensor, plan: Plan) -> Tensor:
    return x.flatten(-2) if plan.grouped_input else x


class _FusedLinear(torch.autograd.Function):
    """Fake-quantizes in the forward; backward recomputes from the latent weight and from the input or its codes."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        of_weight, known = _setting(tensors[:5], plan.weight).hoisted(weight), _known(tensors, plan)
        if plan.input is None:
            return F.linear(x, _weight(of_weight, weight, plan, known), _cast(bias, plan)), None
        of_input = _setting(tensors[5:10], plan.input).hoisted(x)
        levels = of_input.levels(x)
        codes = _codes(levels, of_input) if plan.integer or plan.keeps_codes else None
        if plan.integer:
            assert codes is not None  # noqa: S101
            levels = quantized_weight(weight, of_weight, integer=True, dtype=plan.dtype) if known is None else known
            y = unaliased(_integer_linear(codes, levels, bias, of_weight, of_input, plan))
        else:
            values = _tokens(of_input.values(levels, x.dtype), plan).to(plan.dtype)
            y = F.linear(values, _weight(of_weight, weight, plan, known), _cast(bias, plan))
        return y, codes if plan.keeps_codes else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        x, weight, bias, plan, *tensors = inputs
        codes = output[1]
        if codes is not None:
            ctx.mark_non_differentiable(codes)
        ctx.plan, ctx.dtypes = plan, (x.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if codes is None else codes, weight, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        plan: Plan = ctx.plan
        grad = cast(grad, plan.dtype)
        kept, weight, *tensors = ctx.saved_tensors
        of_weight = _setting(tuple(tensors[:5]), plan.weight).not_before(grad)
        of_input = None if plan.input is None else _setting(tuple(tensors[5:10]), plan.input).not_before(grad)
        known = _known(tuple(tensors), plan)
        grad_x, *from_input = _input_gradients(ctx, grad, kept, weight, of_weight, of_input, known)
        rows = grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1])
        grad_weight, *from_weight = _weight_gradients(ctx, rows, kept, weight, of_weight, of_input)
        grad_bias = cast(rows.sum(0), ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
        last = () if known is None else (None,)
        return grad_x, grad_weight, grad_bias, None, *from_weight, *from_input, *last


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, of_weight: Setting, of_input: Setting | None = None, *,
    grouped_input: bool = False, integer: bool = False, dtype: torch.dtype | None = None, known: Tensor | None = None,
) -> Tensor:  # fmt: skip
    r"""Return :math:`\hat x \hat W^T + b` of fake-quantized input and weight, keeping for backward no quantized copy.

    Kept are the latent weight by reference, and of the input its int8 codes where they are all that backward needs (a
    scale that is not learned, straight-through), else the input itself by reference.

    Args:
        x: [..., features], or [..., groups, size] with ``grouped_input``.
        weight: latent weight, [outputs, features] or [outputs, groups, size].
        bias: [outputs] or None.
        of_weight: quantization of the weight; its scale broadcasts to the weight.
        of_input: quantization of the input, or None.
        grouped_input: whether scales of the input extend over groups.
        integer: run the forward product on int8 codes; needs scales per token and per output, symmetric grids, and
            fewer than 2^17 features. The result is the exact product up to the roundings of the epilogue.
        dtype: dtype of the products and of the result; None takes that of x.
        known: what :func:`quantized_weight` returns for the same arguments, computed before; it is kept for backward.
    """
    if of_input is None and fits(of_weight) and not transformed_or_compiled():
        return weight_only_linear(x, weight, bias, of_weight, dtype or x.dtype, known)
    of_weight = of_weight.attached()
    plan = Plan(
        Pieces.of(of_weight), None if of_input is None else Pieces.of(of_input),
        grouped_input, integer, dtype or x.dtype,
    )  # fmt: skip
    tensors = [(s.scale, s.zero_point, s.temperature, s.lo, s.hi) for s in (of_weight, of_input) if s is not None]
    last = () if known is None else (known,)
    y: Tensor = applied(_FusedLinear, x, weight, bias, plan, *(t for five in tensors for t in five), *last)[0]
    return y


def quantized_weight(weight: Tensor, of_weight: Setting, *, integer: bool, dtype: torch.dtype) -> Tensor:
    """Return what the product takes of a weight: int8 codes, or fake-quantized values; [outputs, features].

    Args:
        weight: latent weight, [outputs, features] or [outputs, groups, size].
        of_weight: quantization of the weight.
        integer: codes for integer products; those of half-integer grids are twice as large as their levels.
        dtype: of the values.
    """
    if not integer:
        return product_weight(of_weight, weight, dtype)
    levels = of_weight.levels(weight)
    return (levels.mul_(2.0) if of_weight.rounding.offset else levels).to(torch.int8)


def _known(tensors: _Tensors, plan: Plan) -> Tensor | None:
    """Return the quantized weight where it was given, after the tensors of the settings."""
    number = 5 if plan.input is None else 10
    return tensors[number] if len(tensors) > number else None


def _cast(bias: Tensor | None, plan: Plan) -> Tensor | None:
    return None if bias is None else cast(bias, plan.dtype)


def _weight(setting: Setting, weight: Tensor, plan: Plan, known: Tensor | None) -> Tensor:
    """Return the weight as a float product sees it."""
    if known is None:
        return quantized_weight(weight, setting, integer=False, dtype=plan.dtype)
    if not plan.integer:
        return known
    levels = known.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    levels = levels.mul_(0.5) if setting.rounding.offset else levels
    return setting.values(levels.reshape(weight.shape), weight.dtype).flatten(1).to(plan.dtype)


def _codes(levels: Tensor, setting: Setting) -> Tensor:
    offset = setting.rounding.offset
    return (levels - offset if offset else levels).to(torch.int8)


def _values(kept: Tensor, setting: Setting | None, plan: Plan, dtype: torch.dtype) -> Tensor:
    """Return the input as the product in the forward saw it: [..., features] in the dtype of the products."""
    if setting is None:
        return kept
    if plan.keeps_codes:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        offset = setting.rounding.offset
        levels = kept.to(wide).add_(offset) if offset else kept.to(wide)
    else:
        levels = setting.levels(kept)
    return _tokens(setting.values(levels, dtype), plan).to(plan.dtype)


def _integer_linear(
    codes: Tensor, levels: Tensor, bias: Tensor | None, of_weight: Setting, of_input: Setting, plan: Plan
) -> Tensor:
    scale = of_weight.scale * 0.5 if of_weight.rounding.offset else of_weight.scale
    tokens = codes.reshape(-1, codes.shape[-1])
    token_scale = of_input.scale.expand(*codes.shape[:-1], 1).reshape(-1, 1)
    y = scaled_product(tokens, levels, token_scale, scale.reshape(1, -1), bias, dtype=plan.dtype)
    return y.reshape(*codes.shape[:-1], levels.shape[0])


def _input_gradients(
    ctx: Any, grad: Tensor, kept: Tensor, weight: Tensor, of_weight: Setting, of_input: Setting | None,
    known: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of the input and of the five tensors of its quantization."""
    needs = ctx.needs_input_grad
    if not (needs[0] or (of_input is not None and (needs[9] or needs[11]))):
        return (None,) * (1 if of_input is None else 6)
    inner = cast(grad @ _weight(of_weight, weight, ctx.plan, known), ctx.dtypes[0])
    if of_input is None:
        return (inner,)
    inner = inner.reshape(kept.shape)
    if ctx.plan.keeps_codes:
        return inner, *(None,) * 5
    grad_x, scale, temperature = of_input.gradients(inner, kept, (needs[0], needs[9], needs[11]))
    return grad_x, scale, None, temperature, None, None


def _weight_gradients(
    ctx: Any, grad: Tensor, kept: Tensor, weight: Tensor, of_weight: Setting, of_input: Setting | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the weight and of the five tensors of its quantization."""
    needs = ctx.needs_input_grad
    if not (needs[1] or needs[4] or needs[6]):
        return (None,) * 6
    x = _values(kept, of_input, ctx.plan, ctx.dtypes[0])
    inner = weight_gradient(grad, x, weight)
    if not of_weight.needs_input:
        return inner if needs[1] else None, *(None,) * 5
    grad_weight, scale, temperature = of_weight.gradients(inner, weight, (needs[1], needs[4], needs[6]))
    return grad_weight, scale, None, temperature, None, None
