"""The fused forward of prepared linear layers: the numbers of the view, with little kept for backward.

A view of a module whose ``forward`` is the stock one of ``nn.Linear`` gets :func:`forward` in its place. It quantizes
the input, too, where ours is the last forward pre-hook; the hook stays registered, but leaves the input to the forward.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from lightning_qat.conversion.inputs import in_forward, transform_and_quantize
from lightning_qat.conversion.sharding import is_sharded
from lightning_qat.conversion.view import (
    FUSED_FORWARDS,
    INPUT_QUANTIZER,
    QUANTIZER_SUFFIX,
    TRANSFORMS,
    adapter,
    is_view,
    latent,
    settled,
    transformed,
    weight_quantizer,
)
from lightning_qat.conversion.weight_only import weight_only
from lightning_qat.conversion.window import setting_in_window
from lightning_qat.functional.fake_quantize import Setting
from lightning_qat.functional.fused_linear import fused_linear
from lightning_qat.functional.integer import MAX_FEATURES, integers_are_exact, integers_pay
from lightning_qat.functional.levels import cast
from lightning_qat.functional.recomputed_linear import Origin, recomputed_linear
from lightning_qat.quantization.granularity import PerChannel, PerGroup, PerTensor, PerToken
from lightning_qat.quantization.grid import Grid
from lightning_qat.quantization.low_rank import LowRank
from lightning_qat.quantization.quantizer import FakeQuantizer

ARITHMETIC: Final = "_arithmetic"
"""Where a prepared module keeps how its products are to be computed: auto, simulated or integer."""

_WEIGHT_QUANTIZER: Final = "weight" + QUANTIZER_SUFFIX
_WORTHWHILE: Final = 1 << 14  # elements of a weight from which on integer products are considered


def forward(self: nn.Module, input: Tensor) -> Tensor:
    """Return what ``nn.Linear.forward`` returns for the quantized weight and input, as one function of autograd."""
    if not torch.compiler.is_compiling():
        y = weight_only(self, input)
        if y is not None:
            return y
    own_input = in_forward(self)
    dtype = product_dtype(self, input)
    quantizers = _quantizers(self)
    if _wants_operations() or dtype is None or not _ready(self, quantizers, own_input):
        return _unfused(self, input, own_input)
    integer = own_input and runs_on_integers(self, input.device.type, dtype)
    if not integer and (not torch.is_grad_enabled() or _watched(quantizers)):
        return _unfused(self, input, own_input)
    return _fused(self, input, dtype, own_input=own_input, integer=integer)


def _wants_operations() -> bool:
    """Whether torch.export, or torch.jit.trace (``log_graph`` of loggers), writes down what runs: no fused function."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._get_tracing_state() is not None


def _unfused(module: Any, x: Tensor, own_input: bool) -> Tensor:
    return nn.Linear.forward(module, transform_and_quantize(module, x) if own_input else x)


def _fused(module: Any, x: Tensor, dtype: torch.dtype, *, own_input: bool, integer: bool) -> Tensor:
    linear, weight, of_weight = _weight(module, integer=integer, dtype=dtype)
    if not own_input:
        return linear(cast(x, dtype), weight, module.bias, of_weight)
    for transform in module._modules.get(TRANSFORMS) or ():
        x = transform.input(x)
    quantizer = module._modules.get(INPUT_QUANTIZER)
    if quantizer is None:
        return linear(cast(x, dtype), weight, module.bias, of_weight)
    if _watched(_quantizers(module)):  # hooks see the values, and the product stays what it is
        module.weight, quantizer(x)
    x, of_input = quantizer.setting(x)
    grouped = isinstance(quantizer.spec.granularity, PerGroup)
    return linear(x, weight, module.bias, of_weight, of_input, grouped_input=grouped, integer=integer, dtype=dtype)


def _weight(module: nn.Module, *, integer: bool, dtype: torch.dtype) -> tuple[Callable[..., Tensor], Tensor, Setting]:
    """Return the function that computes the product, the weight for it, and how that is quantized.

    A weight that LoRA corrects is not kept for backward: it is computed again. A compiler gets the plain form.
    """
    quantizer, low_rank = weight_quantizer(module, "weight"), adapter(module, "weight")
    weight = latent(module, "weight")
    if low_rank is None or torch.compiler.is_compiling():
        value = transformed(module, weight if low_rank is None else low_rank(weight))
        if low_rank is not None:
            return fused_linear, *quantizer.setting(value)
        value, setting, known = setting_in_window(quantizer, weight, value, integer=integer, dtype=dtype)
        return partial(fused_linear, known=known), value, setting
    origin = Origin(partial(_merged, module, low_rank), low_rank.sources(weight))
    with torch.no_grad():
        value = origin.compute(*origin.sources)
    return partial(recomputed_linear, origin), *quantizer.setting(value)


def _merged(module: nn.Module, low_rank: LowRank, *sources: Tensor) -> Tensor:
    return transformed(module, low_rank.merge(*sources))


def product_dtype(module: nn.Module, x: Tensor) -> torch.dtype | None:
    """Return the dtype that the product would have, or None where that is better left to ``nn.Linear``."""
    weight, low_rank = module._parameters.get("weight"), adapter(module, "weight")
    dtype = low_rank.dtype if low_rank else x.dtype if weight is None else weight.dtype
    if torch.float64 not in (x.dtype, dtype) and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return dtype if x.dtype == dtype and x.is_floating_point() else None


def _quantizers(module: nn.Module) -> list[FakeQuantizer]:
    modules = module._modules
    weight, input_ = modules.get(_WEIGHT_QUANTIZER), modules.get(INPUT_QUANTIZER)
    if input_ is None and isinstance(weight, FakeQuantizer):  # most often
        return [weight]
    return [quantizer for quantizer in (weight, input_) if isinstance(quantizer, FakeQuantizer)]


def _ready(module: nn.Module, quantizers: list[FakeQuantizer], own_input: bool) -> bool:
    """Whether the quantizers do nothing else than quantize, and the weight is all there.

    While a weight is soft, products are those of floats, where codes of the input cost more time than they save; and a
    softness in a tensor, of compiled code and on GPUs, does not go with the constants of the fused function.
    """
    parameter = module._parameters.get("weight")
    if parameter is not None and is_sharded(parameter):
        return False
    for quantizer in quantizers:  # a loop: what all() takes would be one more function
        only_quantizes = quantizer.enabled and quantizer.observer is None and not quantizer.stale
        softness = quantizer.present_softness
        fusable = softness is None or (isinstance(softness, float) and not own_input)
        if not (only_quantizes and fusable) and (own_input or not quantizer.layout.is_input):
            return False
    return True


def _watched(quantizers: list[FakeQuantizer]) -> bool:
    """Whether hooks wait for what a quantizer returns."""
    for quantizer in quantizers:  # noqa: SIM110 - what any() takes would be one more function
        if quantizer._forward_hooks or quantizer._forward_pre_hooks:
            return True
    return False


def runs_on_integers(module: nn.Module, device: str, dtype: torch.dtype) -> bool:
    """Whether the products of a prepared layer are computed on integers.

    Args:
        module: a view with a fused forward.
        device: type of the device, such as ``"cpu"``.
        dtype: dtype of the product otherwise.
    """
    arithmetic = module.__dict__.get(ARITHMETIC, "simulated")
    if arithmetic == "simulated" or float_reason(module) is not None:
        return False
    if arithmetic == "integer":
        return integers_are_exact(device)
    return may_run_on_integers(module) and integers_pay(device, dtype)


def may_run_on_integers(module: nn.Module) -> bool:
    """Whether integer products are possible in a layer, and the layer is large enough for them to pay."""
    layer: Any = module  # reading a weight under spectral_norm would be a step of its power iteration
    return float_reason(module) is None and bool(layer.in_features * layer.out_features >= _WORTHWHILE)


def float_reason(module: nn.Module) -> str | None:
    """Return why the products of a layer cannot run on integers, or None."""
    quantizer: Any = module._modules.get(INPUT_QUANTIZER)
    if quantizer is None or not is_view(module):
        return "only one of weight and input is quantized"
    if not in_forward(module):
        return "the layer computes in a forward of its own, or another hook follows ours"
    weight = weight_quantizer(module, "weight")
    family, of_input = weight.family, quantizer.family  # the grids would make torch.compile depend on their bits
    if not (family.symmetric and of_input.symmetric):
        return "a zero point"
    if not isinstance(weight.spec.granularity, PerTensor | PerChannel):
        return "scales of the weight per group"
    if not isinstance(quantizer.spec.granularity, PerTensor | PerToken):
        return "scales of the input per group"
    if of_input.offset or (family.offset and not fits_int8(weight.grid)):
        return "levels that are no 8-bit integers"
    layer: Any = module
    return "sums that could exceed 32 bits" if layer.in_features >= MAX_FEATURES else None


def fits_int8(grid: Grid) -> bool:
    """Whether the levels of a grid, half-integers doubled, are 8-bit integers."""
    factor = 2 if grid.offset else 1
    return factor * grid.lo >= -128 and factor * grid.hi <= 127


def arithmetic_label(module: nn.Module) -> str | None:
    """Return how the products of a layer with quantized input run where its weight lies now, for the report."""
    if module._modules.get(INPUT_QUANTIZER) is None or not is_view(module):
        return None
    reason = float_reason(module)
    if reason is not None:
        return f"float products: {reason}" if vars(module).get(ARITHMETIC) == "integer" else "float products"
    low_rank = adapter(module, "weight")
    weight = settled(module, "weight") if low_rank is None else latent(module, "weight")
    dtype = low_rank.dtype if low_rank else weight.dtype
    return "integer products" if runs_on_integers(module, weight.device.type, dtype) else "float products"


FUSED_FORWARDS[nn.Linear.forward] = forward
