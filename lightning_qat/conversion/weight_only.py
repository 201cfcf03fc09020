"""The forward of linear layers in which a plain weight alone is quantized, in eager mode: what training meets most.

Not only operations count: after a product of matrices has emptied the caches, each call of Python takes microseconds.
So what the fused forward asks piece by piece is asked here at once, and whatever is not as usual is left to it.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.conversion.window import kept_in_window
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
    bias, in_window = parameters["bias"], quantizer.window is not None and quantizer.training
    if in_window and not (quantizer.learned or quantizer.spec.gradient.needs_input):
        if not x.is_contiguous():  # there, a product in the graph is off by roundings from one that is not
            return None
        known = _straight_through_in_window(quantizer, weight)
        return None if known is None else F.linear(x, known, bias)
    grouped = quantizer.grouped(weight)
    if in_window:
        found = kept_in_window(quantizer, weight, (False, dtype))  # the fused forward keeps it
        return None if found is None else weight_only_linear(x, grouped, bias, found.setting, dtype, found.values)
    setting = brief_setting(quantizer, grouped)
    return None if setting is None else weight_only_linear(x, grouped, bias, setting, dtype, None)


def _straight_through_in_window(quantizer: FakeQuantizer, weight: nn.Parameter) -> Tensor | None:
    """Return the quantized weight, in the graph: its gradient is that of the weight, and nothing is left to Python."""
    window, kind = quantizer.window, (_IN_GRAPH, weight.dtype, weight.requires_grad)
    found = None if window is None else window.get(quantizer, weight, kind)
    if found is not None:
        return found.values
    grouped = quantizer.grouped(weight)
    setting = brief_setting(quantizer, grouped)
    if setting is None or window is None:
        return None
    with torch.no_grad():
        values = product_weight(setting, grouped, weight.dtype)
    apply: Any = _StraightThrough.apply
    attached: Tensor = apply(weight, values)
    window.keep(quantizer, Quantized(weight, kind, setting, attached, complete=False))
    return attached


def _only_quantizes(quantizer: FakeQuantizer) -> bool:
    return (
        quantizer.enabled
        and quantizer.observer is None
        and not quantizer.stale
        and (quantizer.softness is None or not quantizer.training)
        and not quantizer._forward_hooks
        and not quantizer._forward_pre_hooks
    )
