"""What a recipe says about every weight of a model; nothing is changed here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from lightning_qat.conversion.slots import Slots, covered_parameters, obstacle, slots_of
from lightning_qat.conversion.view import view_names
from lightning_qat.quantization.recipe import Recipe, Rule
from lightning_qat.quantization.spec import LayerSpec, QuantizerSpec
from lightning_qat.quantization.transform import Transform


@final
@dataclass(frozen=True, eq=False)
class Weight:
    """A weight as one of its owners holds it.

    Args:
        layer: dotted name of the owner.
        module: the owner.
        slot: name of the parameter in it.
        slots: how the owner's weights are read.
        rule: the first rule that matches the owner, or None.
    """

    layer: str
    module: nn.Module
    slot: str
    slots: Slots
    rule: Rule | None

    @property
    def name(self) -> str:
        """Dotted name of the parameter."""
        return joined(self.layer, self.slot)

    @property
    def spec(self) -> LayerSpec | None:
        """What the rule asks for."""
        return self.rule.spec if self.rule else None

    @property
    def reason(self) -> str:
        """Why this owner wants the weight in float; empty if it wants it quantized."""
        if self.rule is None:
            return f"no rule is for {type(self.module).__name__}"
        if self.rule.spec is None:
            return f"rule {self.rule.match!r}"
        stopped = obstacle(self.module)
        if stopped is not None:
            return stopped
        return "only its input is quantized" if self.rule.spec.weight is None else ""

    @property
    def quantized(self) -> bool:
        """Whether the weight is read through the view already."""
        return self.slot in view_names(self.module)


@final
@dataclass(frozen=True, eq=False)
class Decision:
    """One parameter, all its owners, and what becomes of it.

    Args:
        owners: those in which a rule can reach it, in the order of the model.
        elsewhere: dotted names under which other modules hold the same parameter.
    """

    owners: tuple[Weight, ...]
    elsewhere: tuple[str, ...]

    @property
    def reason(self) -> str:
        """Why the weight stays float, or empty: one owner that stays float decides for all."""
        for owner in self.owners:
            if owner.reason and len(self.names) > 1:
                return f"shared by {' and '.join(self.names)}; {owner.name} stays float: {owner.reason}"
            if owner.reason:
                return owner.reason
        if self.elsewhere:
            return f"shared by {' and '.join(self.names)}; {self.elsewhere[0]} is out of reach of rules"
        return ""

    @property
    def names(self) -> tuple[str, ...]:
        """Dotted names of the parameter."""
        return (*(owner.name for owner in self.owners), *self.elsewhere)

    def check(self) -> None:
        """Raise if the owners of a shared weight would quantize it differently.

        Raises:
            ValueError: naming the owners.
        """
        asked = set() if self.reason else {_what_becomes_of_it(owner) for owner in self.owners}
        if len(asked) > 1:
            raise ValueError(
                f"{' and '.join(self.names)} are one weight, but would be quantized differently; give all its owners "
                f"the same weight quantizer and transforms (found: {'; '.join(sorted(str(a[0].label) for a in asked))})"
            )


def _what_becomes_of_it(owner: Weight) -> tuple[QuantizerSpec, int | None, tuple[Transform, ...]]:
    assert owner.spec is not None  # noqa: S101 - decided to be quantized
    assert owner.spec.weight is not None  # noqa: S101
    moving = tuple(transform for transform in applicable(owner) if transform.changes_weight)
    return owner.spec.weight, owner.slots.weight.channel_axis, moving


def applicable(owner: Weight) -> tuple[Transform, ...]:
    """Return the transforms that apply: where the input cannot be reached, only those that leave it alone."""
    assert owner.spec is not None  # noqa: S101
    return tuple(t for t in owner.spec.transforms if not (owner.slots.unreachable and t.changes_input))


def joined(layer: str, slot: str) -> str:
    """Return the dotted name of a parameter of a layer; the root has no name."""
    return f"{layer}.{slot}" if layer else slot


def plan(modules: Mapping[str, nn.Module], recipe: Recipe) -> list[Decision]:
    """Return what the recipe says about every weight that rules can reach, in the order of the model.

    Args:
        modules: the user's modules by dotted name.
        recipe: the rules.

    Raises:
        ValueError: a scripted module that the recipe does not leave in float.
    """
    groups: dict[int, list[Weight]] = {}
    for name, module in modules.items():
        rule = recipe.rule_for(name, module)
        _refuse_scripted(name, module, recipe)
        slots = slots_of(module)
        for slot in slots.names if slots else ():
            covered = covered_parameters(module, slot)
            if covered and slots:
                groups.setdefault(id(covered[0]), []).append(Weight(name, module, slot, slots, rule))
    elsewhere = _other_owners(modules, groups)
    return [Decision(tuple(owners), tuple(elsewhere.get(key, ()))) for key, owners in groups.items()]


def _other_owners(modules: Mapping[str, nn.Module], groups: Mapping[int, list[Weight]]) -> dict[int, list[str]]:
    """Return the names of the same parameters in modules that no rule can reach: ties made by hand."""
    owners = [owner for group in groups.values() for owner in group]
    reached = {(id(o.module), id(p)) for o in owners for p in covered_parameters(o.module, o.slot)}
    originals = {joined(owner.layer, f"parametrizations.{owner.slot}") for owner in owners}
    found: dict[int, list[str]] = {}
    for name, module in modules.items():
        for key, parameter in module._parameters.items() if name not in originals else ():
            if id(parameter) in groups and (id(module), id(parameter)) not in reached:
                found.setdefault(id(parameter), []).append(joined(name, key))
    return found


def _refuse_scripted(name: str, module: nn.Module, recipe: Recipe) -> None:
    if not isinstance(module, torch.jit.ScriptModule) or not any(p.dim() > 1 for p in module.parameters(recurse=False)):
        return
    if not any(rule.spec is None and rule.matches_name(name) for rule in recipe.rules):
        raise ValueError(
            f"{name}: a scripted module cannot be quantized, because TorchScript has compiled how it reads its "
            f"weights; script it after training, or leave it in float with Rule({name!r}, None)"
        )
