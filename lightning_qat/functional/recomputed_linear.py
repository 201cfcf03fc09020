"""A linear layer with fake-quantized weight whose latent weight is computed from other tensors, and not kept."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_qat.functional.application import applied
from lightning_qat.functional.fake_quantize import Setting
from lightning_qat.functional.fused_linear import Pieces, Plan, _FusedLinear


@dataclass(frozen=True, eq=False)
class Origin:
    """How a latent weight is computed.

    Args:
        compute: returns the weight from the sources, [outputs, features]; the same again whenever it is called.
        sources: tensors that are there anyway (parameters, codes of a packed base), or None.
    """

    compute: Callable[..., Tensor]
    sources: tuple[Tensor | None, ...]


class _RecomputedLinear(torch.autograd.Function):
    """What the fused linear function computes; between forward and backward only the sources of the weight are kept."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, compute: Callable[..., Tensor], num_tensors: int,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        return _FusedLinear.forward(x, weight, bias, plan, *tensors[:num_tensors])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        x, weight, bias, plan, compute, num_tensors, *tensors = inputs
        codes = output[1]
        if codes is not None:
            ctx.mark_non_differentiable(codes)
        ctx.plan, ctx.compute, ctx.num_tensors, ctx.shape = plan, compute, num_tensors, weight.shape
        ctx.dtypes = (x.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if codes is None else codes, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needs)
        kept, *tensors = ctx.saved_tensors
        own, sources = tensors[: ctx.num_tensors], tensors[ctx.num_tensors :]
        wanted = needs[6 + ctx.num_tensors :]
        with torch.enable_grad():
            leaves = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(sources, wanted, strict=True)]
            weight = ctx.compute(*leaves).reshape(ctx.shape)
        inner = SimpleNamespace(
            saved_tensors=(kept, weight.detach(), *own), plan=ctx.plan, dtypes=ctx.dtypes,
            needs_input_grad=(needs[0], any(wanted), needs[2], False, *needs[6 : 6 + ctx.num_tensors]),
        )  # fmt: skip
        grad_x, grad_weight, grad_bias, _, *rest = _FusedLinear.backward(inner, grad, None)
        chosen = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(weight, chosen, grad_weight) if chosen else ())
        from_weight = [next(found) if need else None for need in wanted]
        return grad_x, None, grad_bias, None, None, None, *rest, *from_weight


def recomputed_linear(
    origin: Origin, x: Tensor, weight: Tensor, bias: Tensor | None, of_weight: Setting,
    of_input: Setting | None = None, *, grouped_input: bool = False, integer: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    r"""Return what :func:`~lightning_qat.functional.fused_linear.fused_linear` returns, and keep no weight at all.

    Backward computes the weight again from its sources; the gradient :math:`G` of the weight goes on to them, so that
    :math:`W + s B A` gives :math:`dA = s B^T G` and :math:`dB = s G A^T`. At its peak one layer's weight and gradient
    exist, whatever the number of layers.

    Args:
        origin: how the weight is computed.
        x: [..., features], or [..., groups, size] with ``grouped_input``.
        weight: what the origin computes, [outputs, features] or [outputs, groups, size], without gradient.
        bias: [outputs] or None.
        of_weight: quantization of the weight.
        of_input: quantization of the input, or None.
        grouped_input: whether scales of the input extend over groups.
        integer: run the forward product on int8 codes.
        dtype: dtype of the products and of the result; None takes that of x.
    """
    plan = Plan(
        Pieces.of(of_weight), None if of_input is None else Pieces.of(of_input),
        grouped_input, integer, dtype or x.dtype,
    )  # fmt: skip
    tensors: list[Tensor | None] = []
    for setting in (of_weight, of_input):
        if setting is not None:
            tensors += [setting.scale, setting.zero_point, setting.temperature, setting.lo, setting.hi]
    given = x, weight, bias, plan, origin.compute, len(tensors), *tensors, *origin.sources
    y: Tensor = applied(_RecomputedLinear, *given)[0]
    return y
