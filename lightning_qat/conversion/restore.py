"""From integer codes back to a runnable model: the way that a written artifact takes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from lightning_qat.conversion.bake import CODES, make_plain
from lightning_qat.conversion.baked_input import (
    BAKED_ARGUMENTS,
    BAKED_INPUT,
    INTEGER_DTYPES,
    BakedInput,
    apply_baked_input,
)
from lightning_qat.conversion.baked_linear import multiply_floats, multiply_integers
from lightning_qat.conversion.nested import keep_padded, restore_nested
from lightning_qat.conversion.slots import slots_of
from lightning_qat.quantization.granularity import Layout
from lightning_qat.quantization.grid import Grid
from lightning_qat.quantization.quantizer import FakeQuantizer
from lightning_qat.quantization.spec import QuantizerSpec
from lightning_qat.quantization.tensor import QuantizedTensor
from lightning_qat.quantization.transform import Transform, TransformModule

_ALIGNMENT: Final = 64  # bytes


@final
@dataclass(frozen=True, eq=False)
class InputDescription:
    """What happens to the input of a baked layer.

    Args:
        transforms: those that change the input, in order.
        spec: quantizer of the input, or None.
        grid: the grid that training ended with, or None.
        layout: how the input is read.
        scale: a stored scale, or None.
        zero_point: a stored zero point, or None.
        integer: dtypes in which the layer multiplies integer codes instead.
    """

    transforms: tuple[Transform, ...]
    spec: QuantizerSpec | None
    grid: Grid | None
    layout: Layout
    scale: Tensor | None
    zero_point: Tensor | None
    integer: tuple[torch.dtype, ...] = ()


def describe_inputs(baked: nn.Module) -> dict[str, InputDescription]:
    """Return what happens to the inputs of a baked model, by the dotted name of the layer."""
    found = {}
    for name, module in baked.named_modules():
        child = module._modules.get(BAKED_INPUT)
        if not isinstance(child, BakedInput):
            continue
        values = [transform.value for transform in child.transforms if isinstance(transform, TransformModule)]
        transforms = tuple(value for value in values if value.changes_input)
        if child.spec is None:
            found[name] = InputDescription(transforms, None, None, Layout(None), None, None)
        else:
            integer = getattr(module, INTEGER_DTYPES, ())
            scale, zero_point = child.scale, child.zero_point
            found[name] = InputDescription(transforms, child.spec, child.grid, child.layout, scale, zero_point, integer)
    return found


def strip_baked(model: nn.Module) -> nn.Module:
    """Make a baked model a plain float one, in place; weights keep their quantized values."""
    for module in list(model.modules()):
        module.__dict__.pop(CODES, None)
        module.__dict__.pop(BAKED_ARGUMENTS, None)
        multiply_floats(module)
        restore_nested(module)
        if isinstance(module._modules.get(BAKED_INPUT), BakedInput):
            del module._modules[BAKED_INPUT]
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is apply_baked_input:
                module._forward_pre_hooks.pop(key)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    return model


def restore_baked(
    model: nn.Module,
    weights: Mapping[str, QuantizedTensor],
    inputs: Mapping[str, InputDescription],
    floats: Mapping[str, Tensor],
    aliases: Mapping[str, str],
) -> nn.Module:
    """Turn a plain float model into what :func:`~lightning_qat.conversion.bake` made, in place.

    Args:
        model: freshly built, with the architecture of the one that was baked; may lie on the meta device.
        weights: quantized weights by dotted parameter name.
        inputs: what happens to inputs, by dotted module name.
        floats: every other entry of the ``state_dict``.
        aliases: names of tied entries and the name under which their values are given.

    Raises:
        ValueError: names or shapes that do not fit, a model that is prepared or baked already.
    """
    modules = dict(model.named_modules())
    _check(model, modules, weights, inputs)
    owned = [name for name in (*weights, *aliases) if aliases.get(name, name) in weights]
    for name in owned:
        owner, _, slot = name.rpartition(".")
        placeholder = _placeholder(modules[owner], slot)
        make_plain(modules[owner], slot)
        modules[owner].register_parameter(slot, placeholder)
    state = _state(model, weights, floats, aliases)
    _check_state(model, state)
    model.load_state_dict(state, assign=True)
    for name in owned:
        owner, _, slot = name.rpartition(".")
        modules[owner].__dict__.setdefault(CODES, {})[slot] = weights[aliases.get(name, name)]
    for name, described in inputs.items():
        modules[name].register_module(BAKED_INPUT, _build_input(modules[name], described))
        slots = slots_of(modules[name])
        setattr(modules[name], BAKED_ARGUMENTS, slots.arguments if slots else ("input",))
        modules[name].register_forward_pre_hook(apply_baked_input, with_kwargs=True)
        if described.integer:
            _multiply_integers(modules[name], name, weights, aliases, described.integer)
    keep_padded(model)
    return model


def _multiply_integers(
    module: nn.Module,
    name: str,
    weights: Mapping[str, QuantizedTensor],
    aliases: Mapping[str, str],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    key = f"{name}.weight" if name else "weight"
    weight = weights.get(aliases.get(key, key))
    if weight is None or type(module).forward is not nn.Linear.forward:
        raise ValueError(f"{name}: integer products are described, but {type(module).__name__} is not nn.Linear")
    device = next(iter(module.parameters())).device
    moved = replace(weight, codes=weight.codes.to(device), scale=weight.scale.to(device))
    multiply_integers(module, moved, dtypes)


def _check(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    weights: Mapping[str, QuantizedTensor],
    inputs: Mapping[str, InputDescription],
) -> None:
    for name, module in modules.items():
        if CODES in module.__dict__ or any(isinstance(m, FakeQuantizer | BakedInput) for m in module.children()):
            raise ValueError(f"{name or type(model).__name__} is prepared or baked already; give a freshly built model")
    missing = [name for name in weights if name.rpartition(".")[0] not in modules]
    missing += [name for name in inputs if name not in modules]
    if missing:
        raise ValueError(f"{type(model).__name__} has no {', '.join(missing[:5])}; it is of another architecture")


def _placeholder(module: nn.Module, slot: str) -> nn.Parameter:
    value: Any = getattr(module, slot, None)
    if not isinstance(value, Tensor):
        raise ValueError(f"{type(module).__name__} has no weight {slot!r}; it is of another architecture")
    return nn.Parameter(value.detach(), requires_grad=getattr(value, "requires_grad", True))


def _state(
    model: nn.Module,
    weights: Mapping[str, QuantizedTensor],
    floats: Mapping[str, Tensor],
    aliases: Mapping[str, str],
) -> dict[str, Tensor]:
    """Return a state_dict of the model in which tied entries are one object, on the devices of the model."""
    present: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    given = {name: tensor.dequantize() for name, tensor in weights.items()} | dict(floats)
    state: dict[str, Tensor] = {}
    for name, value in given.items():
        old = present.get(name)
        if isinstance(old, Tensor) and not old.is_meta:
            value = value.to(old.device)
        value = _aligned(value)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        state[name] = value
    return state | {name: state[first] for name, first in aliases.items()}


def _aligned(value: Tensor) -> Tensor:
    """Return a tensor that begins where torch lets its own begin: from elsewhere, as in a file, products may round.

    On CPUs, products of matrices take other kernels there, whose results differ in the last bit.
    """
    return value.clone() if value.device.type == "cpu" and value.data_ptr() % _ALIGNMENT else value


def _check_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    present = model.state_dict()
    missing, extra = sorted(present.keys() - state.keys()), sorted(state.keys() - present.keys())
    if missing or extra:
        raise ValueError(
            f"{type(model).__name__} is of another architecture: the artifact lacks {missing[:5]} and has {extra[:5]} "
            "in addition"
        )
    for name, value in present.items():
        if isinstance(value, Tensor) and value.shape != state[name].shape:
            raise ValueError(
                f"{name}: the model has shape {tuple(value.shape)}, the artifact {tuple(state[name].shape)}; "
                "build the model with the arguments it was trained with"
            )


def _build_input(module: nn.Module, described: InputDescription) -> BakedInput:
    slots = slots_of(module)
    width = (slots.in_features if slots else None) or 0
    transforms = nn.ModuleList(value.build(width) for value in described.transforms)
    if described.spec is None or described.grid is None:
        return BakedInput(None, transforms)
    quantizer = FakeQuantizer(described.spec, (), described.layout)
    quantizer.set_grid(described.grid)
    with torch.no_grad():
        if described.scale is not None:
            quantizer.scale.copy_(described.scale)
        if described.zero_point is not None and quantizer.zero_point is not None:
            quantizer.zero_point.copy_(described.zero_point)
    return BakedInput(quantizer, transforms).to(next(iter(module.parameters())).device)
