"""prepare() and its way back: the functions that make a float model train quantized."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, final

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_qat.conversion.inputs import quantize_inputs
from lightning_qat.conversion.report import FLOAT, QUANTIZED, UNSUPPORTED, ConversionReport, ReportRow, rule_problems
from lightning_qat.conversion.slots import Slots, covered_parameters, obstacle, slots_of
from lightning_qat.conversion.view import (
    INPUT_QUANTIZER,
    QUANTIZER_SUFFIX,
    TRANSFORMS,
    attach,
    detach,
    is_view,
    latent,
    mark_stale,
    view_names,
)
from lightning_qat.quantization.granularity import Layout
from lightning_qat.quantization.quantizer import FakeQuantizer
from lightning_qat.quantization.recipe import DEFAULT_TYPES, Recipe, Rule
from lightning_qat.quantization.spec import LayerSpec, QuantizerSpec

_STATE: Final = "_lightning_qat"


@final
@dataclass
class PreparedState:
    """What a prepared root module remembers: plain attribute, not part of its state_dict."""

    recipe: Recipe
    arithmetic: str
    decisions: dict[str, tuple[str, str, str]] = field(default_factory=dict)


@final
@dataclass
class _Candidate:
    """A weight with one of its owners and what the recipe says."""

    name: str
    module: nn.Module
    slot: str
    slots: Slots
    rule: Rule | None


def prepare(model: nn.Module, recipe: Recipe, *, arithmetic: str = "auto") -> ConversionReport:
    """Make a model train quantized, in place: chosen weights read as fake-quantized, chosen inputs pass a quantizer.

    Parameters, ``state_dict`` keys of the model, tied weights, hooks and classes (``isinstance``) stay; quantizers add
    entries whose keys contain ``quantizer``. Scales of weights are found here; those of inputs by :func:`calibrate`.

    Args:
        model: any module that is not wrapped (DDP, FSDP) yet.
        recipe: which layers get which quantizers.
        arithmetic: ``"simulated"`` (float products of fake-quantized values) or ``"auto"``.

    Returns:
        A report that accounts for every parameter. Preparing again by an equal recipe changes nothing, except that
        layers which are new since are prepared, too.

    Raises:
        ValueError: a rule of the recipe without effect, a spec that does not fit its layer, or another recipe than
            the one the model is prepared by.
        TypeError: a model or recipe of the wrong kind.
    """
    report = convert(model, recipe, arithmetic=arithmetic)
    report.check()
    return report


def convert(model: nn.Module, recipe: Recipe, *, arithmetic: str = "auto") -> ConversionReport:
    """Do what :func:`prepare` does, but leave rules without effect to the report: layers may still come."""
    _check_arguments(model, recipe, arithmetic)
    state = model.__dict__.setdefault(_STATE, PreparedState(recipe, arithmetic))
    if state.recipe != recipe:
        raise ValueError(
            f"{type(model).__name__} is prepared by another recipe; call unprepare() first.\n"
            f"  present: {state.recipe!r}\n  given:   {recipe!r}"
        )
    modules = {_clean(name): module for name, module in model.named_modules() if not _is_ours(name)}
    for group in _grouped(_candidates(modules, recipe)):
        _convert_shared(group, state)
    _convert_remaining_inputs(modules, recipe, state)
    return report_of(model)


def _check_arguments(model: nn.Module, recipe: Recipe, arithmetic: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare: model={type(model).__name__} is not a torch.nn.Module")
    if not isinstance(recipe, Recipe):
        raise TypeError(f"prepare: recipe={recipe!r} is not a Recipe; try recipes.int4() or recipes.named('int4')")
    if arithmetic not in ("auto", "simulated"):
        raise ValueError(f"prepare: arithmetic={arithmetic!r} is not allowed; choose 'auto' or 'simulated'")
    wrapped = next((c.__name__ for c in type(model).__mro__ if c.__name__ in _WRAPPERS), None)
    if wrapped is not None:
        raise ValueError(f"prepare: the model is wrapped in {wrapped}; call prepare() before wrapping it")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"{name}: a lazy parameter has no shape yet; run one forward pass before prepare()")
        if hasattr(parameter, "placements"):
            raise ValueError(
                f"{name}: the parameter is sharded (DTensor); call prepare between building and fully_shard"
            )


_WRAPPERS: Final = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "FSDPModule")


def _clean(name: str) -> str:
    """Return a dotted name without what torch.compile puts between."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _is_ours(name: str) -> bool:
    return any(part.endswith(QUANTIZER_SUFFIX) or part == TRANSFORMS for part in name.split("."))


def _candidates(modules: dict[str, nn.Module], recipe: Recipe) -> list[_Candidate]:
    """Return every weight that is not prepared yet, of a type that some rule could be for."""
    types = tuple({kind for rule in recipe.rules for kind in rule.types} | set(DEFAULT_TYPES) | {nn.Embedding})
    found = []
    for name, module in modules.items():
        if is_view(module) or not isinstance(module, types) or obstacle(module):
            continue
        slots = slots_of(module)
        assert slots is not None  # noqa: S101 - obstacle() looked
        found += [_Candidate(name, module, slot, slots, recipe.rule_for(name, module)) for slot in slots.names]
    return found


def _grouped(candidates: list[_Candidate]) -> list[list[_Candidate]]:
    """Group the owners of one parameter: a tied weight gets one decision."""
    groups: dict[int, list[_Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(id(latent(candidate.module, candidate.slot)), []).append(candidate)
    return list(groups.values())


def _spec(candidate: _Candidate) -> LayerSpec | None:
    return candidate.rule.spec if candidate.rule else None


def _convert_shared(owners: list[_Candidate], state: PreparedState) -> None:
    specs = [_spec(owner) for owner in owners]
    for owner, spec in zip(owners, specs, strict=True):
        if spec is None or spec.weight is None:
            reason = f"rule {owner.rule.match!r}" if owner.rule else "no rule matches"
            reason = "weight stays float, input only" if spec is not None else reason
            if len(owners) > 1:
                reason = f"tied to {owner.name}.{owner.slot}, which stays float ({reason})"
            for each in owners:
                _decide(state, each, FLOAT, reason)
            return
    if len({spec.weight for spec in specs if spec}) > 1:
        names = ", ".join(f"{owner.name}.{owner.slot}" for owner in owners)
        raise ValueError(
            f"{names}: one shared weight would get different quantizers; give all its owners the same rule"
        )
    quantizer: FakeQuantizer | None = None
    for owner, spec in zip(owners, specs, strict=True):
        assert spec is not None  # noqa: S101 - the loop above returned otherwise
        quantizer = _convert_weight(owner, spec, quantizer)
        _decide(state, owner, QUANTIZED, _detail(owner, spec))


def _detail(owner: _Candidate, spec: LayerSpec) -> str:
    assert spec.weight is not None  # noqa: S101
    if _input_reachable(owner.module) or not (spec.input or any(t.changes_input for t in spec.transforms)):
        return spec.label
    kept = tuple(transform for transform in spec.transforms if not transform.changes_input)
    return f"{LayerSpec(spec.weight, transforms=kept).label} (weight only)"


def _decide(state: PreparedState, owner: _Candidate, decision: str, detail: str) -> None:
    name = f"{owner.name}.{owner.slot}" if owner.name else owner.slot
    state.decisions[name] = (decision, detail, owner.rule.match if owner.rule else "")


def _input_reachable(module: nn.Module) -> bool:
    return type(module).__name__ != "NonDynamicallyQuantizableLinear"  # attention reads out_proj's weight directly


def _convert_weight(owner: _Candidate, spec: LayerSpec, shared: FakeQuantizer | None) -> FakeQuantizer:
    assert spec.weight is not None  # noqa: S101
    where = f"{owner.name}.{owner.slot}" if owner.name else owner.slot
    weight = latent(owner.module, owner.slot)
    _check_layer(owner, spec, where)
    quantizer = shared or _new_quantizer(spec.weight, weight, owner.slots.weight, where)
    owner.module.register_module(owner.slot + QUANTIZER_SUFFIX, quantizer)
    transforms = [t for t in spec.transforms if _input_reachable(owner.module) or not t.changes_input]
    if transforms and TRANSFORMS not in owner.module._modules:
        built = [transform.build(owner.slots.in_features or 0) for transform in transforms]
        owner.module.register_module(TRANSFORMS, nn.ModuleList(built).to(weight.device))
    _add_input(owner, spec)
    names = (*view_names(owner.module), owner.slot)
    if is_view(owner.module):
        detach(owner.module)
    attach(owner.module, names)
    if TRANSFORMS in owner.module._modules:
        quantizer.stale = True
    if not weight.is_meta and quantizer.stale:
        _find_weight_scale(owner.module, owner.slot)
    owner.module.register_load_state_dict_post_hook(_refresh_after_load)
    return quantizer


def _new_quantizer(spec: QuantizerSpec, weight: Tensor, layout: Layout, where: str) -> FakeQuantizer:
    quantizer = FakeQuantizer(spec, tuple(weight.shape), layout, name=where).to(weight.device)
    quantizer.stale = True
    return quantizer


def _check_layer(owner: _Candidate, spec: LayerSpec, where: str) -> None:
    assert spec.weight is not None  # noqa: S101
    module, grid = owner.module, spec.weight.grid
    if getattr(module, "padding_idx", None) is not None and not grid.has_zero:
        raise ValueError(f"{where}: padding_idx needs a zero row, but {grid!r} has no zero; use a grid with zero")
    if owner.slot + "_mask" in module._buffers and not grid.has_zero:
        raise ValueError(f"{where}: pruned weights cannot stay zero on {grid!r}; use a grid with zero (Int, Ternary)")
    if spec.input is not None and owner.slots.input is None:
        raise ValueError(
            f"{where}: the input of {type(module).__name__} holds indices; use LayerSpec(weight=...) alone"
        )
    moving = [transform for transform in spec.transforms if transform.changes_input]
    if moving and owner.slots.in_features is None:
        raise ValueError(
            f"{where}: {moving[0]!r} acts on the input of linear layers only, not of {type(module).__name__}; "
            "restrict the rule with types=(nn.Linear,)"
        )


def _add_input(owner: _Candidate, spec: LayerSpec) -> None:
    module = owner.module
    if not _input_reachable(module) or INPUT_QUANTIZER in module._modules or owner.slots.input is None:
        return
    moving = any(transform.changes_input for transform in spec.transforms)
    if spec.input is not None:
        device = latent(module, owner.slot).device
        quantizer = FakeQuantizer(spec.input, (), owner.slots.input, name=f"{owner.name}.input").to(device)
        module.register_module(INPUT_QUANTIZER, quantizer)
    if spec.input is not None or moving:
        module.register_forward_pre_hook(quantize_inputs, with_kwargs=True)


def _convert_remaining_inputs(modules: dict[str, nn.Module], recipe: Recipe, state: PreparedState) -> None:
    """Quantize inputs of layers whose weight stays in float by their spec."""
    for name, module in modules.items():
        rule = recipe.rule_for(name, module)
        if is_view(module) or rule is None or rule.spec is None or rule.spec.weight is not None or obstacle(module):
            continue
        slots = slots_of(module)
        if slots is None or slots.input is None:
            raise ValueError(f"{name}: the input of {type(module).__name__} holds indices and cannot be quantized")
        owner = _Candidate(name, module, slots.names[0], slots, rule)
        _add_input(owner, rule.spec)
        _decide(state, owner, FLOAT, rule.spec.label)


def _find_weight_scale(module: nn.Module, slot: str) -> None:
    quantizer = module._modules[slot + QUANTIZER_SUFFIX]
    assert isinstance(quantizer, FakeQuantizer)  # noqa: S101
    weight = latent(module, slot).detach()
    transforms: Any = module._modules.get(TRANSFORMS) or ()
    for transform in transforms:
        weight = transform.weight(weight)
    quantizer.find_scale(weight)


def refresh_scales(model: nn.Module) -> None:
    """Find the weight scales anew that a float checkpoint, ``to_empty`` or an initializer made stale."""
    for module in model.modules():
        for slot in view_names(module):
            quantizer = module._modules[slot + QUANTIZER_SUFFIX]
            if isinstance(quantizer, FakeQuantizer) and quantizer.stale and not latent(module, slot).is_meta:
                _find_weight_scale(module, slot)


def _refresh_after_load(module: nn.Module, incompatible_keys: Any) -> None:
    refresh_scales(module)


def quantizers(model: nn.Module) -> dict[str, FakeQuantizer]:
    """Return the quantizers of a model by dotted name; a shared one appears once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantizer)}


def prepared_state(model: nn.Module) -> PreparedState | None:
    """Return what a prepared root module remembers, or None."""
    state: PreparedState | None = model.__dict__.get(_STATE)
    return state


def report_of(model: nn.Module) -> ConversionReport:
    """Return the report of a prepared model, as it is now.

    Raises:
        ValueError: if the model is not prepared.
    """
    state = prepared_state(model)
    if state is None:
        raise ValueError(f"{type(model).__name__} is not prepared; call prepare(model, recipe)")
    modules = {_clean(name): module for name, module in model.named_modules() if not _is_ours(name)}
    rows, seen = [], set()
    for name, module in modules.items():
        for slot in _slot_names(module):
            covered = [p for p in covered_parameters(module, slot) if id(p) not in seen]
            seen.update(map(id, covered))
            if covered:
                rows.append(_slot_row(name, module, slot, sum(p.numel() for p in covered), state))
    for name, parameter in model.named_parameters():
        if id(parameter) not in seen and not _is_ours(name):
            rows.append(_other_row(_clean(name), parameter, modules))
    return ConversionReport(tuple(rows), rule_problems(state.recipe.rules, modules))


def _slot_names(module: nn.Module) -> tuple[str, ...]:
    slots = None if obstacle(module) else slots_of(module)
    return view_names(module) or (slots.names if slots and isinstance(module, (*DEFAULT_TYPES, nn.Embedding)) else ())


def _slot_row(name: str, module: nn.Module, slot: str, numel: int, state: PreparedState) -> ReportRow:
    full = f"{name}.{slot}" if name else slot
    kind = type(module).__name__
    quantizer = module._modules.get(slot + QUANTIZER_SUFFIX)
    decision, detail, rule = state.decisions.get(full, (FLOAT, "no rule matches", ""))
    if isinstance(quantizer, FakeQuantizer):
        if decision != QUANTIZED:
            decision, detail, rule = QUANTIZED, "prepared before", ""
        return ReportRow(full, kind, numel, decision, detail, rule, quantizer.grid.bits_per_weight)
    return ReportRow(full, kind, numel, decision, detail, rule)


def _other_row(name: str, parameter: nn.Parameter, modules: dict[str, nn.Module]) -> ReportRow:
    owner = modules[name.rpartition(".")[0]]
    kind = type(owner).__name__
    if parameter.dim() < 2:
        return ReportRow(name, kind, parameter.numel(), FLOAT, "one-dimensional")
    reason = obstacle(owner)
    if reason is not None:
        return ReportRow(name, kind, parameter.numel(), UNSUPPORTED, reason)
    return ReportRow(name, kind, parameter.numel(), FLOAT, f"no rule matches {kind}")


def unprepare(model: nn.Module) -> nn.Module:
    """Give back the plain float model with its latent weights, in place; a model that is not prepared stays as it is.

    Raises:
        RuntimeError: if a class was put on top of a prepared module since (``fully_shard``).
    """
    for module in list(model.modules()):
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is quantize_inputs:
                module._forward_pre_hooks.pop(key)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, hook in list(module._load_state_dict_post_hooks.items()):
            if hook is _refresh_after_load:
                module._load_state_dict_post_hooks.pop(key)
        if is_view(module):
            detach(module)
        for name in [n for n, child in module._modules.items() if isinstance(child, FakeQuantizer) or n == TRANSFORMS]:
            del module._modules[name]
        module.__dict__.pop(_STATE, None)
    return model


@contextmanager
def float_weights(model: nn.Module) -> Iterator[None]:
    """Turn quantization of weights and inputs off inside the context: the model computes with its latent weights."""
    present = list(quantizers(model).values())
    before = [quantizer.enabled for quantizer in present]
    try:
        for quantizer in present:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, enabled in zip(present, before, strict=True):
            quantizer.enabled = enabled


__all__ = [
    "convert",
    "float_weights",
    "mark_stale",
    "prepare",
    "quantizers",
    "refresh_scales",
    "report_of",
    "unprepare",
]
