"""A linear layer with fake-quantized weight in eager mode: the fused function where it is short."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_qat.functional.fake_quantize import Setting, cast


class WeightOnlyLinear(torch.autograd.Function):
    """What the fused linear function computes, of a weight whose quantization has nothing to learn.

    Not only operations count: after a product of matrices has emptied the caches, a line of Python takes microseconds.
    So all that is no tensor of the graph comes in one object, which stays with the context, and nothing is looked up.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, setting: Setting, dtype: torch.dtype,
        known: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.setting, ctx.x_dtype, ctx.bias_dtype = setting, x.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, setting.scale, known)  # the scale for those who count or check what is kept
        values = product_weight(setting, weight, dtype) if known is None else known
        return F.linear(x, values, None if bias is None else cast(bias, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _, known = ctx.saved_tensors
        needs, rows = ctx.needs_input_grad, grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if needs[0]:
            grad_x = cast(grad @ (product_weight(ctx.setting, weight, grad.dtype) if known is None else known), ctx.x_dtype)
        if needs[1]:
            grad_weight = weight_gradient(rows, x, weight)
            if ctx.setting.needs_input:
                grad_weight = ctx.setting.gradients(grad_weight, weight, (True, False, False))[0]
        if needs[2]:
            grad_bias = cast(rows.sum(0), ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


def product_weight(setting: Setting, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the fake-quantized values of a weight as a float product takes them, [outputs, features] in a dtype."""
    values = setting.fake_quantized(weight)
    return cast(values if values.dim() == 2 else values.flatten(1), dtype)


def weight_gradient(rows: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of a weight from those of the outputs, [tokens, outputs], and the inputs."""
    gradient = cast(rows.t() @ (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])), weight.dtype)
    return gradient if weight.dim() == 2 else gradient.reshape(weight.shape)
