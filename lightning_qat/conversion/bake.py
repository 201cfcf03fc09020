"""bake() and codes(): from a trained model to plain modules and integer codes."""

import copy
from typing import Any, Final, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_qat.conversion.inputs import quantize_inputs
from lightning_qat.conversion.prepare import prepared_state, refresh_scales, unprepare
from lightning_qat.conversion.view import (
    INPUT_QUANTIZER,
    QUANTIZER_SUFFIX,
    TRANSFORMS,
    fake_quantized,
    is_view,
    latent,
    view_names,
)
from lightning_qat.functional.fake_quantize import dequantize, positive_scale, quantize
from lightning_qat.functional.scaling import Sample
from lightning_qat.quantization.quantizer import FakeQuantizer
from lightning_qat.quantization.scale import Bounds
from lightning_qat.quantization.tensor import QuantizedTensor

CODES: Final = "_quantized_tensors"
BAKED_INPUT: Final = "baked_input"
_Module = TypeVar("_Module", bound=nn.Module)


@final
class BakedInput(nn.Module):
    """Quantizes an input with the numbers that training ended with, in plain differentiable-free operations.

    Args:
        quantizer: the trained quantizer of the input, or None.
        transforms: what comes before it.
    """

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, quantizer: FakeQuantizer | None, transforms: nn.ModuleList | None) -> None:
        super().__init__()
        self.transforms = transforms or nn.ModuleList()
        self.spec = None if quantizer is None else quantizer.spec
        if quantizer is None:
            return
        self.grid, self.layout = quantizer.grid, quantizer.layout
        scale = quantizer.scale.detach() if quantizer.stored else None
        if scale is not None and quantizer.learned:
            scale = positive_scale(scale, quantizer.spec.torch_scale_dtype)
        self.register_buffer("scale", None if scale is None else scale.clone())
        self.register_buffer("zero_point", None if quantizer.zero_point is None else quantizer.zero_point.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return the input as the trained layer computes with it."""
        for transform in self.transforms:
            x = transform.input(x)  # type: ignore[operator]
        if self.spec is None:
            return x
        grouped = self.spec.granularity.group(x, self.layout)
        scale, zero_point = self._scale(grouped)
        levels = quantize(grouped, scale, zero_point, lo=self.grid.lo, hi=self.grid.hi, rounding=self.grid)
        values = dequantize(levels, scale, zero_point).to(x.dtype)
        return self.spec.granularity.ungroup(values, tuple(x.shape), self.layout)

    def _scale(self, grouped: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self.spec is not None  # noqa: S101 - forward() looked
        scale, zero_point = self.scale, self.zero_point
        if scale is None:
            wide = grouped if grouped.dtype == torch.float64 else grouped.float()
            dims = self.spec.granularity.dims(wide.dim(), self.layout)
            bounds = Bounds(self.grid, self.grid.lo, self.grid.hi, self.spec.torch_scale_dtype)
            scale, zero_point = self.spec.scale.find(Sample(wide, dims), bounds)
        factor = self.grid.step_factor
        return (scale if factor == 1.0 else scale * factor), zero_point

    def extra_repr(self) -> str:
        """Return the compact form of the spec."""
        return "" if self.spec is None else self.spec.label.replace(self.spec.grid.label, self.grid.label, 1)


def apply_baked_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of baked layers with quantized inputs; a module-level function, so that models pickle."""
    names = ("query", "key", "value") if isinstance(module, nn.MultiheadAttention) else ("input",)
    done: dict[int, Any] = {}

    def once(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in done:
            done[id(x)] = module._modules[BAKED_INPUT](x)  # type: ignore[misc]
        return done[id(x)]

    args = tuple(once(arg) if i < len(names) else arg for i, arg in enumerate(args))
    return args, {key: once(value) if key in names else value for key, value in kwargs.items()}


def codes(model: nn.Module) -> dict[str, QuantizedTensor]:
    """Return the integer codes of every quantized weight by dotted parameter name, of a prepared or a baked model.

    A weight that several modules share appears once, under its first name.

    Raises:
        ValueError: if the model is neither.
    """
    found: dict[str, QuantizedTensor] = {}
    seen: set[int] = set()
    known = False
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        baked: dict[str, QuantizedTensor] = module.__dict__.get(CODES, {})
        known = known or CODES in module.__dict__ or is_view(module)
        for slot, tensor in baked.items():
            if id(tensor) not in seen:
                found[prefix + slot] = tensor
                seen.add(id(tensor))
        for slot in view_names(module):
            if id(latent(module, slot)) not in seen:
                found[prefix + slot] = _codes_of(module, slot)
                seen.add(id(latent(module, slot)))
    if not known and prepared_state(model) is None:
        raise ValueError(f"{type(model).__name__} is neither prepared nor baked; call prepare(model, recipe) first")
    return found


@torch.no_grad()
def _codes_of(module: nn.Module, slot: str) -> QuantizedTensor:
    weight = latent(module, slot).detach()
    transforms: Any = module._modules.get(TRANSFORMS) or ()
    for transform in transforms:
        weight = transform.weight(weight)
    quantizer = module._modules[slot + QUANTIZER_SUFFIX]
    assert isinstance(quantizer, FakeQuantizer)  # noqa: S101
    return quantizer.quantize(weight)


def bake(model: _Module) -> _Module:
    """Return a deep copy made of plain modules that hold the quantized values; the model itself stays as it is.

    The copy computes bit for bit what the prepared model computes in evaluation, works with ``torch.export`` and
    ``torch.save``, and gives its integer codes through :func:`codes`; they are not part of its ``state_dict``. Layers
    with quantized inputs carry a child ``baked_input`` that quantizes them in plain operations.

    Raises:
        ValueError: if the model is not prepared, or an input scale was never calibrated.
    """
    if not any(is_view(module) or INPUT_QUANTIZER in module._modules for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is not prepared; call prepare(model, recipe) before bake()")
    for name, module in model.named_modules():
        quantizer = module._modules.get(INPUT_QUANTIZER)
        if isinstance(quantizer, FakeQuantizer) and quantizer.needs_calibration:
            raise ValueError(
                f"{name}: the scale of its input was never calibrated; call calibrate() or add Calibration()"
            )
    refresh_scales(model)
    baked = copy.deepcopy(model)
    values = _quantized_values(baked)
    inputs = {
        module: BakedInput(module._modules.get(INPUT_QUANTIZER), module._modules.get(TRANSFORMS))  # type: ignore[arg-type]
        for module in baked.modules()
        if any(hook is quantize_inputs for hook in module._forward_pre_hooks.values())
    }
    unprepare(baked)
    for module, slot, value, tensor in values:
        make_plain(module, slot)
        module.register_parameter(slot, value)
        module.__dict__.setdefault(CODES, {})[slot] = tensor
    for module, baked_input in inputs.items():
        module.register_module(BAKED_INPUT, baked_input)
        module.register_forward_pre_hook(apply_baked_input, with_kwargs=True)
    return baked


@torch.no_grad()
def _quantized_values(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter, QuantizedTensor]]:
    shared: dict[int, tuple[nn.Parameter, QuantizedTensor]] = {}
    values = []
    for module in model.modules():
        for slot in view_names(module):
            weight = latent(module, slot)
            if id(weight) not in shared:
                value = nn.Parameter(fake_quantized(module, slot).detach().clone(), requires_grad=weight.requires_grad)
                shared[id(weight)] = value, _codes_of(module, slot)
            values.append((module, slot, *shared[id(weight)]))
    return values


def make_plain(module: nn.Module, slot: str) -> None:
    """Remove what computes a weight before each forward: weight_norm, spectral_norm, pruning, parametrizations."""
    if parametrize.is_parametrized(module, slot):
        kind = type(module)  # deep copies share it: without a class of its own, removal here would break the original
        namespace = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, kind.__bases__, namespace)
        parametrize.remove_parametrizations(module, slot, leave_parametrized=True)
    for key, hook in list(module._forward_pre_hooks.items()):
        if getattr(hook, "name", getattr(hook, "_tensor_name", None)) == slot:
            del module._forward_pre_hooks[key]
    for suffix in ("_orig", "_g", "_v"):
        module._parameters.pop(slot + suffix, None)
    for suffix in ("_mask", "_u", "_v"):
        module._buffers.pop(slot + suffix, None)
    module.__dict__.pop(slot, None)
    module._parameters.pop(slot, None)
