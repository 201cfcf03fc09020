"""prepare(): what makes a float model train quantized. Its way back is in ``undo.py``."""

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_qat.conversion._checks import check_model
from lightning_qat.conversion.coverage import report_of
from lightning_qat.conversion.fused import ARITHMETIC, may_run_on_integers
from lightning_qat.conversion.inputs import ARGUMENTS, quantize_inputs
from lightning_qat.conversion.nested import keep_padded
from lightning_qat.conversion.plan import Decision, Weight, applicable, joined, plan
from lightning_qat.conversion.report import ConversionReport
from lightning_qat.conversion.rules import rule_problems
from lightning_qat.conversion.sharding import is_sharded
from lightning_qat.conversion.state import (
    PreparedState,
    layers,
    prepared_state,
    quantizers,
    refresh_after_load,
    refresh_scales,
    remember,
    uncompiled,
)
from lightning_qat.conversion.tuners import refuse_tuners
from lightning_qat.conversion.undo import float_weights, unprepare
from lightning_qat.conversion.view import (
    INPUT_QUANTIZER,
    QUANTIZER_SUFFIX,
    TRANSFORMS,
    attach,
    detach,
    mark_stale,
    settled,
    view_names,
    weight_quantizer,
    zero_problem,
)
from lightning_qat.functional.integer import measure_integers
from lightning_qat.quantization.quantizer import FakeQuantizer
from lightning_qat.quantization.recipe import Recipe, difference
from lightning_qat.quantization.spec import LayerSpec
from lightning_qat.quantization.transform import Transform

__all__ = [
    "PreparedState",
    "convert",
    "float_weights",
    "mark_stale",
    "prepare",
    "prepared_state",
    "quantizers",
    "refresh_scales",
    "report_of",
    "unprepare",
]
_WRAPPERS: Final = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "FSDPModule")
_ARITHMETIC: Final = ("auto", "simulated", "integer")


def prepare(model: nn.Module, recipe: Recipe, *, arithmetic: str = "auto") -> ConversionReport:
    """Make a model train quantized, in place: chosen weights read as fake-quantized, chosen inputs pass a quantizer.

    Parameters, ``state_dict`` keys of the model, tied weights, hooks and classes (``isinstance``) stay; quantizers add
    entries whose keys contain ``quantizer``. Scales of weights are found here; those of inputs by :func:`calibrate`.

    From now on ``layer.weight`` is a fresh tensor at each read. Assigning a Parameter to it, ``reset_parameters()``,
    ``load_state_dict()``, optimizers and pruning act on the latent weight; writing into what was read
    (``layer.weight.data.mul_(2)``, ``nn.init.zeros_(layer.weight)``) is lost. Initialize before this call.

    Args:
        model: any module that is not wrapped (DDP, FSDP) yet.
        recipe: which layers get which quantizers.
        arithmetic: how layers with quantized input multiply. ``"simulated"``: float products of fake-quantized
            values. ``"integer"``: int8 codes, summed in 32 bits, wherever scales and grids allow it; the report names
            the layers that do not. ``"auto"``: integers where that is also faster, measured once per device and dtype.

    Returns:
        A report that accounts for every parameter. Preparing again by an equal recipe changes nothing, except that
        layers which are new since are prepared, too.

    Raises:
        ValueError: a rule of the recipe without effect, a spec that does not fit its layer, another recipe than the
            one the model is prepared by, or layers of peft (:func:`~lightning_qat.adopt_peft` takes those).
        TypeError: a model or recipe of the wrong kind.

    After one of these errors the model is as it was.
    """
    _check_arguments(model, recipe, arithmetic)
    _check_prepared(model, recipe, arithmetic)
    ConversionReport((), rule_problems(recipe.rules, layers(model))).check()
    return convert(model, recipe, arithmetic=arithmetic)


@torch.inference_mode(False)  # scales that are born in it could never train
def convert(model: nn.Module, recipe: Recipe, *, arithmetic: str = "auto") -> ConversionReport:
    """Do what :func:`prepare` does, but leave rules without effect to the report: layers may still come."""
    _check_arguments(model, recipe, arithmetic)
    _check_prepared(model, recipe, arithmetic)
    decisions = plan(layers(model), recipe)
    refuse_tuners(model, decisions)
    built = [parts for decision in decisions for parts in _build(decision)]
    if built:  # a model that is prepared already may be wrapped since
        _check_unwrapped(model, [parts.owner for parts in built])
    for parts in built:
        _attach(parts)
        setattr(parts.owner.module, ARITHMETIC, arithmetic)
    if arithmetic == "auto" and any(may_run_on_integers(parts.owner.module) for parts in built):
        measure_integers()  # here, because nothing can be measured while torch.compile traces
    keep_padded(model)
    refresh_scales(model)
    remember(model, PreparedState(recipe, arithmetic))
    return report_of(model)


def _check_arguments(model: nn.Module, recipe: Recipe, arithmetic: str) -> None:
    check_model("prepare", model)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"prepare: recipe={recipe!r} is not a Recipe; try recipes.int4() or recipes.named('int4')")
    if arithmetic not in _ARITHMETIC:
        raise ValueError(f"prepare: arithmetic={arithmetic!r} is not allowed; choose one of {_ARITHMETIC}")
    if isinstance(uncompiled(model), FakeQuantizer):
        raise TypeError("prepare: the model is a FakeQuantizer itself; give the module whose weights it quantizes")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"{name}: a lazy parameter has no shape yet; run one forward pass before prepare()")


def _check_unwrapped(model: nn.Module, owners: list[Weight]) -> None:
    for owner in owners:
        if is_sharded(settled(owner.module, owner.slot)):
            raise ValueError(
                f"{owner.name}: the parameter is sharded already (DTensor); call prepare between building and "
                "fully_shard"
            )
    wrapped = next((c.__name__ for c in type(model).__mro__ if c.__name__ in _WRAPPERS), None)
    if wrapped is not None:
        raise ValueError(f"prepare: the model is wrapped in {wrapped}; call prepare() before wrapping it")


def _check_prepared(model: nn.Module, recipe: Recipe, arithmetic: str) -> None:
    """Refuse another recipe than the model, or a part of it, is prepared by."""
    for name, module in layers(model).items():
        state = prepared_state(module)
        if state is None:
            continue
        where = name or type(module).__name__
        if state.recipe != recipe:
            raise ValueError(
                f"{where} is prepared by another recipe; call unprepare() first, or use its recipe\n"
                f"{difference(state.recipe, recipe)}"
            )
        if state.arithmetic != arithmetic:
            raise ValueError(
                f"{where} is prepared with arithmetic={state.arithmetic!r}, given is {arithmetic!r}; unprepare() first"
            )


@final
@dataclass(frozen=True, eq=False)
class _Parts:
    """What a weight's owner gets."""

    owner: Weight
    weight: FakeQuantizer | None
    input: FakeQuantizer | None
    transforms: tuple[Transform, ...]


def _build(decision: Decision) -> list[_Parts]:
    """Make the quantizers of a decision; the model is not touched, so that an error leaves it as it was."""
    decision.check()
    shared = next((weight_quantizer(o.module, o.slot) for o in decision.owners if o.quantized), None)
    if shared is not None and decision.reason:
        raise ValueError(f"{shared.name} is quantized already, but now it would stay float: {decision.reason}")
    parts = []
    for owner in decision.owners:
        spec = owner.spec
        if spec is None or owner.quantized or (decision.reason and spec.weight is not None):
            continue
        _check(owner, spec)
        if spec.weight is not None and shared is None:
            shape = tuple(settled(owner.module, owner.slot).shape)
            shared = FakeQuantizer(spec.weight, shape, owner.slots.weight, name=owner.name)
        parts.append(_Parts(owner, shared, _input_quantizer(owner, spec), applicable(owner)))
    return parts


def _check(owner: Weight, spec: LayerSpec) -> None:
    module, name, kind = owner.module, owner.name, type(owner.module).__name__
    if spec.input is not None and owner.slots.input is None:
        raise ValueError(
            f"{owner.layer or kind}: the input of {kind} cannot be quantized: {owner.slots.no_input}; "
            "use LayerSpec(weight=...) for this layer"
        )
    moving = [transform for transform in spec.transforms if transform.changes_input]
    if moving and owner.slots.in_features is None:
        raise ValueError(
            f"{owner.layer or kind}: {moving[0]!r} acts on inputs of linear layers, and {kind} is none; "
            "restrict the rule with types=(nn.Linear,)"
        )
    problem = zero_problem(spec.weight.grid, applicable(owner)) if spec.weight else None
    if problem and getattr(module, "padding_idx", None) is not None:
        raise ValueError(f"{name}: the row of padding_idx cannot stay zero, because {problem}")
    if problem and owner.slot + "_mask" in module._buffers:
        raise ValueError(f"{name}: pruned weights cannot stay zero, because {problem}")


def _input_quantizer(owner: Weight, spec: LayerSpec) -> FakeQuantizer | None:
    if spec.input is None or owner.slots.input is None or owner.slots.unreachable:
        return None
    return FakeQuantizer(spec.input, (), owner.slots.input, name=joined(owner.layer, "input"))


def _attach(parts: _Parts) -> None:
    """Give a module what was built for it. A module with several weights comes once for each of them."""
    module, slot, slots = parts.owner.module, parts.owner.slot, parts.owner.slots
    device, names = settled(module, slot).device, view_names(module)
    if parts.transforms and TRANSFORMS not in module._modules:
        built = [transform.build(slots.in_features or 0) for transform in parts.transforms]
        _register(module, TRANSFORMS, nn.ModuleList(built), device)
    if parts.input is not None and INPUT_QUANTIZER not in module._modules:
        _register(module, INPUT_QUANTIZER, parts.input, device)
    if ARGUMENTS not in vars(module) and (parts.input or any(t.changes_input for t in parts.transforms)):
        setattr(module, ARGUMENTS, slots.arguments)
        module.register_forward_pre_hook(quantize_inputs, with_kwargs=True)
    if parts.weight is None:
        return
    _register(module, slot + QUANTIZER_SUFFIX, parts.weight, device)
    if names:
        detach(module)
    else:
        module.register_load_state_dict_post_hook(refresh_after_load)
    attach(module, (*names, slot))


def _register(module: nn.Module, name: str, child: nn.Module, device: torch.device) -> None:
    module.register_module(name, child.to(device).train(module.training))
