"""The forward of linear layers in which a plain weight alone is quantized, in eager mode: what training meets most.

Not only operations count: after a product of matrices has emptied the caches, each call of Python takes microseconds.
So what the fused forward asks piece by piece is asked here at once, and whatever is not as usual is left to it.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.conversion.window import kept_in_window
from lightning_qat.functional.application import differentiable_once
from lightning_qat.functional.fake_quantize import Setting
from lightning_qat.functional.weight_only_linear import product_weight, weight_only_linear
from lightning_qat.quantization.brief import brief_setting
from lightning_qat.quantization.quantizer import FakeQuantizer
from lightning_qat.quantization.window import Quantized

_WEIGHT_QUANTIZER: Final = "weight_quantizer"
_IN_GRAPH: Final = "in the graph"


class _StraightThrough(torch.autograd.Function):
    """The values of a weight in its place. Backward needs nothing, so it may run once for each micro-batch."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Clipped(torch.autograd.Function):
    """The same, where the gradient of the weight only is clipped.

    What autograd saves it frees in the first backward, so the weight stays here, and with it the look at its version.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, grouped: Tensor, setting: Setting) -> Tensor:
        ctx.grouped, ctx.version, ctx.setting = grouped, grouped._version, setting
        return values

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grouped = ctx.grouped
        if grouped._version != ctx.version:
            raise RuntimeError(
                "a weight was changed in place between forward and backward of an accumulation window; call backward() "
                "before the optimizer's step, or leave the forward out of accumulation_window()"
            )
        found = ctx.setting.gradients(grad.reshape(grouped.shape), grouped, (True, False, False))[0]
        return found.reshape(grad.shape), None, None, None


def weight_only(module: nn.Module, x: Tensor) -> Tensor | None:
    """Return what the fused forward returns, or None where that is to be asked. Not while compiling."""
    modules, parameters = module._modules, module._parameters
    weight, quantizer = parameters.get("weight"), modules.get(_WEIGHT_QUANTIZER)
    # A Parameter is neither sharded nor masked; where there is one module, there are no inputs, transforms, adapters.
    if type(weight) is not nn.Parameter or type(quantizer) is not FakeQuantizer or len(modules) != 1:
        return None
    dtype = weight.dtype
    if x.dtype != dtype or not weight.is_cpu or "bias" not in parameters or not _only_quantizes(quantizer):
        return None
    if torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return None
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace cannot write down what is fused
        return None
    bias = parameters["bias"]
    if quantizer.window is None or not quantizer.training:
        grouped = quantizer.grouped(weight)
        setting = brief_setting(quantizer, grouped)
        return None if setting is None else weight_only_linear(x, grouped, bias, setting, dtype, None)
    kind: tuple[Any, ...] = False, dtype, quantizer.present_softness
    if quantizer.learned or not quantizer.spec.gradient.only_clips:
        found = kept_in_window(quantizer, weight, kind) or _quantized(quantizer, weight, kind)
        if found is None:
            return None
        return weight_only_linear(x, quantizer.grouped(weight), bias, found.setting, dtype, found.values)
    if not x.is_contiguous():  # there, a product in the graph is off by roundings from one that is not
        return None
    kind = _IN_GRAPH, weight.requires_grad, *kind
    found = quantizer.window.get(quantizer, weight, kind) or _quantized(quantizer, weight, kind)
    return None if found is None else F.linear(x, found.values, bias)


def _quantized(quantizer: FakeQuantizer, weight: nn.Parameter, kind: tuple[Any, ...]) -> Quantized | None:
    """Quantize a weight for a window; in the graph, all products are those of a float layer, without Python."""
    grouped, in_graph = quantizer.grouped(weight), kind[0] is _IN_GRAPH
    setting = brief_setting(quantizer, grouped)
    if setting is None or quantizer.window is None:
        return None
    with torch.no_grad():
        values = product_weight(setting, grouped, weight.dtype)
    values = _attached(weight, values, grouped, setting) if in_graph else values
    found = Quantized(weight, kind, setting, values, complete=not in_graph)
    quantizer.window.keep(quantizer, found)
    return found


def _attached(weight: Tensor, values: Tensor, grouped: Tensor, setting: Setting) -> Tensor:
    function: Any = _Clipped if setting.only_clips else _StraightThrough
    kept = (grouped.detach(), setting) if setting.only_clips else ()
    found: Tensor = function.apply(weight, values, *kept)
    return found


def _only_quantizes(quantizer: FakeQuantizer) -> bool:
    return (
        quantizer.enabled
        and quantizer.observer is None
        and not quantizer.stale
        and not quantizer._forward_hooks
        and not quantizer._forward_pre_hooks
    )
