"""bake() and codes(): from a trained model to plain modules and integer codes."""

import copy
from dataclasses import replace
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_qat.conversion._checks import check_model
from lightning_qat.conversion.baked_input import BAKED_ARGUMENTS, BAKED_INPUT, BakedInput, apply_baked_input
from lightning_qat.conversion.baked_linear import integer_dtypes, multiply_integers
from lightning_qat.conversion.inputs import ARGUMENTS, quantize_inputs
from lightning_qat.conversion.lora import drop_adapter
from lightning_qat.conversion.nested import keep_padded
from lightning_qat.conversion.recompute import keep_activations
from lightning_qat.conversion.sharding import is_sharded
from lightning_qat.conversion.slots import covered_parameters
from lightning_qat.conversion.state import prepared_state, refresh_scales
from lightning_qat.conversion.undo import unprepare
from lightning_qat.conversion.view import (
    INPUT_QUANTIZER,
    TRANSFORMS,
    adapter,
    is_view,
    settled,
    transformed,
    view_names,
    weight_quantizer,
)
from lightning_qat.quantization.quantizer import FakeQuantizer
from lightning_qat.quantization.tensor import QuantizedTensor

__all__ = ["BAKED_INPUT", "CODES", "BakedInput", "apply_baked_input", "bake", "codes", "make_plain"]
CODES: Final = "_quantized_tensors"
"""Where a baked module keeps its QuantizedTensors by parameter name."""
_Module = TypeVar("_Module", bound=nn.Module)


def codes(model: nn.Module) -> dict[str, QuantizedTensor]:
    """Return the integer codes of every quantized weight by dotted parameter name, of a prepared or a baked model.

    A weight that several modules share appears once, under its first name.

    Raises:
        TypeError: if model is no module.
        ValueError: if the model is neither, or its weights are sharded.
    """
    check_model("codes", model)
    _check_whole(model)
    found: dict[str, QuantizedTensor] = {}
    seen: set[object] = set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        baked: dict[str, QuantizedTensor] = vars(module).get(CODES, {})
        for slot in (*baked, *view_names(module)):
            key = id(baked[slot]) if slot in baked else _identity(module, slot)
            if key not in seen:
                seen.add(key)
                found[prefix + slot] = baked[slot] if slot in baked else _codes_of(module, slot)
    is_baked = any(CODES in vars(module) or BAKED_INPUT in module._modules for module in model.modules())
    if not found and prepared_state(model) is None and not is_baked:
        raise ValueError(f"{type(model).__name__} is neither prepared nor baked; call prepare(model, recipe) first")
    return found


def _identity(module: nn.Module, slot: str) -> object:
    """Return what two owners of one tied weight have in common; a weight made of several parts is never tied."""
    parameter = module._parameters.get(slot)
    return (id(module), slot) if parameter is None else id(parameter)


@torch.no_grad()
def _codes_of(module: nn.Module, slot: str) -> QuantizedTensor:
    tensor = weight_quantizer(module, slot).quantize(transformed(module, settled(module, slot)))
    low_rank = adapter(module, slot)
    return tensor if low_rank is None else replace(tensor, dtype=low_rank.dtype)


def _check_whole(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(
                f"{name}: the parameter is sharded (DTensor); load the full checkpoint into a model that is not sharded"
            )


def bake(model: _Module) -> _Module:
    """Return a deep copy made of plain modules that hold the quantized values; the model itself stays as it is.

    The copy computes bit for bit what the prepared model computes in evaluation, works with ``torch.export`` and
    ``torch.save``, and gives its integer codes through :func:`codes`; they are not part of its ``state_dict``. Layers
    with quantized inputs carry a child ``baked_input`` that quantizes them in plain operations.

    Raises:
        TypeError: if model is no module.
        ValueError: if the model is not prepared or has no quantized layer, is sharded, or an input scale was never
            calibrated.
    """
    check_model("bake", model)
    _check_whole(model)
    if any(CODES in vars(module) or BAKED_INPUT in module._modules for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is baked already")
    if not any(is_view(module) or ARGUMENTS in vars(module) for module in model.modules()):
        if prepared_state(model) is not None:
            raise ValueError(f"{type(model).__name__} has no layer that its recipe quantizes; see the report")
        raise ValueError(f"{type(model).__name__} is not prepared; call prepare(model, recipe) before bake()")
    for name, module in model.named_modules():
        quantizer = module._modules.get(INPUT_QUANTIZER)
        if isinstance(quantizer, FakeQuantizer) and quantizer.needs_calibration:
            raise ValueError(
                f"{name}: the scale of its input was never calibrated; call calibrate() or add Calibration()"
            )
    refresh_scales(model)
    _drop_graphs(model)
    baked = copy.deepcopy(model)
    keep_activations(baked)
    values = _quantized_values(baked)
    on_integers = {module: dtypes for module, *_ in values if (dtypes := integer_dtypes(module))}
    for module in baked.modules():
        _bake_input(module)
    for module, slot, *_ in values:
        drop_adapter(module, slot)  # what it adds is in the values
    unprepare(baked)
    for module, slot, value, tensor in values:
        make_plain(module, slot)
        module.register_parameter(slot, value)
        vars(module).setdefault(CODES, {})[slot] = tensor
        if module in on_integers:
            multiply_integers(module, tensor, on_integers[module])
    keep_padded(baked)
    return baked


def _drop_graphs(model: nn.Module) -> None:
    """Let tensors that pruning and weight_norm recompute before each forward be copied: they belong to a graph."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None and name in _recomputed(module):
                vars(module)[name] = value.detach()


def _recomputed(module: nn.Module) -> set[Any]:
    return {getattr(hook, "name", getattr(hook, "_tensor_name", None)) for hook in module._forward_pre_hooks.values()}


def _bake_input(module: nn.Module) -> None:
    """Put a baked input in the place of the hook that fake-quantizes, in the order of the user's own hooks."""
    for key, hook in module._forward_pre_hooks.items():
        if hook is quantize_inputs:
            quantizer, transforms = module._modules.get(INPUT_QUANTIZER), module._modules.get(TRANSFORMS)
            assert quantizer is None or isinstance(quantizer, FakeQuantizer)  # noqa: S101 - prepare() set it
            assert transforms is None or isinstance(transforms, nn.ModuleList)  # noqa: S101
            module.register_module(BAKED_INPUT, BakedInput(quantizer, transforms))
            setattr(module, BAKED_ARGUMENTS, getattr(module, ARGUMENTS))
            module._forward_pre_hooks[key] = apply_baked_input


@torch.no_grad()
def _quantized_values(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter, QuantizedTensor]]:
    shared: dict[object, tuple[nn.Parameter, QuantizedTensor]] = {}
    values = []
    for module in model.modules():
        for slot in view_names(module):
            key = _identity(module, slot)
            if key not in shared:
                weight = _codes_of(module, slot)
                trains = any(parameter.requires_grad for parameter in covered_parameters(module, slot))
                shared[key] = nn.Parameter(weight.dequantize(), requires_grad=trains), weight
            values.append((module, slot, *shared[key]))
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
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):  # spectral_norm's
        for key, hook in list(hooks.items()):
            if getattr(getattr(getattr(hook, "hook", hook), "fn", None), "name", None) == slot:
                del hooks[key]
    for suffix in ("_orig", "_g", "_v"):
        module._parameters.pop(slot + suffix, None)
    for suffix in ("_mask", "_u", "_v"):
        module._buffers.pop(slot + suffix, None)
    module.__dict__.pop(slot, None)
    module._parameters.pop(slot, None)
