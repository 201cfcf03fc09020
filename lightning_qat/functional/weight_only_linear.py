"""A linear layer with fake-quantized weight in eager mode: the fused function where it is short."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qat.functional.application import differentiable_once
from lightning_qat.functional.bounded import magnitude_gradient
from lightning_qat.functional.fake_quantize import Setting
from lightning_qat.functional.levels import cast


class _WeightOnlyLinear(torch.autograd.Function):
    """What the fused linear function computes, of a weight whose setting :func:`fits`.

    Not only operations count: after a product of matrices has emptied the caches, a line of Python takes microseconds.
    So all that is no tensor of the graph comes in one object, which stays with the context, and nothing is looked up.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parameter: Tensor | None, setting: Setting,
        dtype: torch.dtype, known: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.setting, ctx.x_dtype, ctx.bias_dtype = setting, x.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, known, parameter, setting.scale)  # the scale for those who count what is kept
        values = product_weight(setting, weight, dtype) if known is None else known
        return F.linear(x, values, None if bias is None else cast(bias, dtype))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        setting, (x, weight, known, parameter, _) = ctx.setting, ctx.saved_tensors
        needs, rows = ctx.needs_input_grad, grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = grad_scale = None
        shared = needs[0] and needs[1] and not needs[3] and known is None and setting.only_clips  # weight / scale
        if shared:
            grad_weight = weight_gradient(rows, x, weight)
            known = _flat(cast(setting.clip_(grad_weight, weight), grad.dtype))
        if needs[0]:
            grad_x = cast(grad @ (product_weight(setting, weight, grad.dtype) if known is None else known), ctx.x_dtype)
        if (needs[1] or needs[3]) and not shared:
            grad_weight = weight_gradient(rows, x, weight)
            if setting.needs_input:
                grad_weight, grad_scale, _ = setting.gradients(grad_weight, weight, (needs[1], needs[3], False))
            if grad_scale is not None:
                grad_scale = magnitude_gradient(parameter, grad_scale)
        if needs[2]:
            grad_bias = cast(rows.sum(0), ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, grad_scale, None, None, None


def weight_only_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, setting: Setting, dtype: torch.dtype, known: Tensor | None
) -> Tensor:  # fmt: skip
    """Return what :func:`~lightning_qat.functional.fused_linear.fused_linear` does without quantized input.

    Args:
        x: [..., features].
        weight: latent weight, [outputs, features] or [outputs, groups, size].
        bias: [outputs] or None.
        setting: quantization of the weight, which :func:`fits`.
        dtype: dtype of the product.
        known: the quantized weight, or None.
    """
    apply: Any = _WeightOnlyLinear.apply
    y: Tensor = apply(x, weight, bias, setting.parameter, setting, dtype, known)
    return y


def fits(setting: Setting) -> bool:
    """Whether nothing of a setting is in the graph, but for the parameter of a learned scale."""
    return setting.temperature is None and (setting.parameter is not None or not setting.learned)


def product_weight(setting: Setting, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the fake-quantized values of a weight as a float product takes them, [outputs, features] in a dtype."""
    return _flat(setting.fake_quantized(weight, dtype))


def _flat(values: Tensor) -> Tensor:
    return values if values.dim() == 2 else values.flatten(1)


def weight_gradient(rows: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of a weight from those of the outputs, [tokens, outputs], and the inputs."""
    gradient = cast(rows.t() @ (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])), weight.dtype)
    return gradient if weight.dim() == 2 else gradient.reshape(weight.shape)
