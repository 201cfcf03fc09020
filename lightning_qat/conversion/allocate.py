"""allocate_bits(): mixed precision found from data, as a recipe with one rule per layer."""

import copy
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from lightning_qat.conversion._checks import check_model
from lightning_qat.conversion.allocation import Allocation, cheapest
from lightning_qat.conversion.calibrate import default_forward
from lightning_qat.conversion.plan import joined
from lightning_qat.conversion.prepare import prepare
from lightning_qat.conversion.regrid import check_grid, target_grid
from lightning_qat.conversion.sensitivity import Forward, OutputDivergence, Sensitivity, Trial, measure_sensitivity
from lightning_qat.conversion.sharding import is_sharded
from lightning_qat.conversion.slots import covered_parameters
from lightning_qat.conversion.state import layers, prepared_state
from lightning_qat.conversion.view import settled, view_names, weight_quantizer
from lightning_qat.quantization import recipes
from lightning_qat.quantization.grid import Grid
from lightning_qat.quantization.quantizer import FakeQuantizer
from lightning_qat.quantization.recipe import Recipe, Rule
from lightning_qat.quantization.spec import QuantizerSpec

Candidate = int | Grid | Recipe
CANDIDATES: Final = (2, 3, 4, 8)


@final
@dataclass(frozen=True, eq=False)
class Unit:
    """What gets one width: the weights of a layer, and of those that share one with it.

    Args:
        owners: the layers by dotted name.
    """

    owners: dict[str, nn.Module]

    @property
    def slots(self) -> list[tuple[str, nn.Module, str]]:
        """Dotted name of the layer, the layer, and the name of the parameter, of every quantized weight."""
        return [(name, module, slot) for name, module in self.owners.items() for slot in view_names(module)]

    @property
    def num_weights(self) -> int:
        """How many weights there are, shared ones once."""
        parameters = {id(p): p for _, module, slot in self.slots for p in covered_parameters(module, slot)}
        return sum(parameter.numel() for parameter in parameters.values())

    @property
    def quantizer(self) -> FakeQuantizer:
        """One of its quantizers; a rule is for a whole layer, so that all have the same spec."""
        _, module, slot = self.slots[0]
        return weight_quantizer(module, slot)


def allocate_bits(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    average_bits: float,
    candidates: Sequence[Candidate] = CANDIDATES,
    recipe: Recipe | None = None,
    sensitivity: Sensitivity | None = None,
    forward: Forward | None = None,
) -> Recipe:
    """Return a recipe that gives each layer the width at which the model suffers least, for a number of bits.

    Each layer is quantized alone at each candidate width, the change is measured on the batches, and an integer
    program chooses one candidate per layer so that the sum of the changes is least. It takes changes to add up, which
    holds where they are small.

    Args:
        model: float, or prepared; it stays as it is. A copy is measured.
        batches: real inputs, on the model's device; a few are enough.
        average_bits: the most bits of codes per weight, on average over the quantized weights, positive. Scales are not
            counted.
        candidates: two or more: bits (1 to 8, of the family of ``recipe``), grids, or recipes, whose quantizer of the
            weight is taken: ``(2, 3, 4, recipes.int8())``.
        recipe: which layers are quantized, and how apart from their width; by default that of a prepared model, or
            ``recipes.int4()``. Transforms and quantizers of inputs are taken from it.
        sensitivity: what is measured; ``OutputDivergence()`` by default, for models that return logits.
        forward: called with (model, batch); returns the output, or the loss where ``sensitivity`` needs it. By default
            a dict is passed as keywords, and of a tuple or list the first element.

    Returns:
        Rules by exact dotted names, then what ``recipe`` says of other layers.

    Raises:
        TypeError: a candidate of another kind, or a model whose output is no tensor.
        ValueError: no batches, fewer than two candidates, a candidate that a layer cannot have, ``average_bits`` below
            the narrowest candidate, nothing to quantize, a sensitivity that is not finite.

    Source: HAWQ-V3, arXiv:2011.10680 (the integer program), with measured sensitivities.
    """
    check_model("allocate_bits", model)
    check_request(average_bits, candidates)
    check_measure(sensitivity, "allocate_bits")
    state = prepared_state(model)
    if state is not None and recipe is not None and recipe != state.recipe:
        raise ValueError("allocate_bits: the model is prepared by another recipe; leave recipe= out")
    base = state.recipe if state is not None else recipe or recipes.int4()
    if isinstance(batches, Tensor):
        raise TypeError(
            "allocate_bits: batches is one tensor, whose rows would be taken for batches; give a list, [batches]"
        )
    copied = copy.deepcopy(model)
    if state is None:
        prepare(copied, base, arithmetic="simulated")
    try:
        allocation = find_allocation(
            copied, batches, average_bits=average_bits, candidates=tuple(candidates), sensitivity=sensitivity,
            forward=forward,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"allocate_bits: {error}") from error
    return recipe_of(allocation, base, layers(copied))


def find_allocation(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    average_bits: float,
    candidates: tuple[Candidate, ...] = CANDIDATES,
    sensitivity: Sensitivity | None = None,
    forward: Forward | None = None,
    match: str = "*",
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Allocation:
    """Do what :func:`allocate_bits` does with a prepared model, which is as before afterwards; return the whole table.

    Args:
        model: prepared.
        batches: real inputs, on the model's device.
        average_bits: the most bits per weight on average.
        candidates: two or more: bits, grids or recipes.
        sensitivity: what is measured; ``OutputDivergence()`` by default.
        forward: called with (model, batch).
        match: glob over dotted layer names: which layers take part.
        gather: given sums and, last, the number of batches, returns their sums over all processes.

    Raises:
        TypeError: see :func:`allocate_bits`.
        ValueError: see :func:`allocate_bits`.
    """
    check_request(average_bits, candidates)
    measure, found = sensitivity or OutputDivergence(), units(model, match)
    specs = [[_spec(unit, candidate) for candidate in candidates] for unit in found]
    trials = [[_trial(unit, spec) for spec in row] for unit, row in zip(found, specs, strict=True)]
    total, num_batches = measure_sensitivity(model, trials, batches, forward or default_forward, measure)
    if gather is not None:
        sums = gather(torch.cat([total.flatten(), torch.tensor([float(num_batches)])]))
        total, num_batches = sums[:-1].reshape(total.shape), int(sums[-1])
    if not num_batches:
        raise ValueError("no batches were given, and sensitivities are measured on data")
    costs = (total / num_batches).tolist()
    names, sizes = [tuple(unit.owners) for unit in found], [unit.num_weights for unit in found]
    for name, row in zip(names, costs, strict=True):
        if not all(map(math.isfinite, row)):
            raise ValueError(f"{name[0]}: its sensitivities {row} are not finite; look at the model on these batches")
    widths = [[spec.grid.bits_per_weight for spec in row] for row in specs]
    chosen = cheapest(costs, widths, sizes, average_bits)
    return Allocation(
        tuple(names), tuple(sizes), tuple(map(tuple, specs)), tuple(map(tuple, costs)), chosen, float(average_bits),
        measure.label,
    )  # fmt: skip


def check_request(average_bits: float, candidates: Sequence[object]) -> None:
    """Check what needs no model.

    Raises:
        TypeError: a candidate that is neither bits, a grid nor a recipe.
        ValueError: numbers out of range, fewer than two candidates, or one that comes twice.
    """
    if isinstance(average_bits, bool) or not isinstance(average_bits, int | float) or not 0 < average_bits <= 8:
        raise ValueError(f"average_bits={average_bits!r} is not allowed; choose a number above 0, up to 8, such as 3.0")
    if not isinstance(candidates, Sequence) or isinstance(candidates, str):
        raise TypeError(f"candidates={candidates!r} is not a list; give two or more, such as (2, 3, 4, 8)")
    for candidate in candidates:
        if isinstance(candidate, bool) or not isinstance(candidate, int | Grid | Recipe):
            raise TypeError(
                f"candidates: {candidate!r} is neither bits (1 to 8), a grid such as Ternary(), nor a recipe such as "
                "recipes.int8()"
            )
        if isinstance(candidate, int) and not 1 <= candidate <= 8:
            raise ValueError(f"candidates: {candidate} bits are not allowed; choose 1 to 8, a grid or a recipe")
    if len(set(map(repr, candidates))) < max(2, len(candidates)):
        raise ValueError(f"candidates={tuple(candidates)!r} is not allowed; give two or more different ones")


def check_measure(sensitivity: object, who: str) -> None:
    """Check that a sensitivity is one, or None.

    Raises:
        TypeError: a name or a class in its place.
    """
    if sensitivity is not None and not isinstance(sensitivity, Sensitivity):
        raise TypeError(
            f"{who}: sensitivity={sensitivity!r} is not a Sensitivity; give OutputDivergence(), OutputError(), "
            "LossChange() or FisherError()"
        )


def units(model: nn.Module, match: str = "*") -> list[Unit]:
    """Return what gets one width each, in the order of the model: layers, those that share a weight together.

    Args:
        model: prepared.
        match: glob over dotted layer names; layers that share a weight take part if any of them does.

    Raises:
        ValueError: nothing that matches is quantized, or weights are sharded.
    """
    rule = Rule(match, None)
    present = {name: module for name, module in layers(model).items() if view_names(module)}
    groups: list[dict[str, nn.Module]] = []
    for name, module in present.items():
        for slot in view_names(module):
            if is_sharded(settled(module, slot)):
                raise ValueError(
                    f"{joined(name, slot)} is sharded (DTensor); allocate bits on one process, and train by the recipe"
                )
        tied = [group for group in groups if any(_quantizers(module) & _quantizers(each) for each in group.values())]
        merged = {key: each for group in tied for key, each in group.items()} | {name: module}
        position = groups.index(tied[0]) if tied else len(groups)
        groups = [group for group in groups if group not in tied]
        groups.insert(position, merged)
    found = [Unit(group) for group in groups if any(map(rule.matches_name, group))]
    if not found:
        raise ValueError(f"match={match!r} matches no quantized layer; there are {sorted(present)[:8]}")
    return found


def _quantizers(module: nn.Module) -> set[int]:
    return {id(weight_quantizer(module, slot)) for slot in view_names(module)}


def _spec(unit: Unit, candidate: Candidate) -> QuantizerSpec:
    quantizer, (name, module, _) = unit.quantizer, unit.slots[0]
    if not isinstance(candidate, Recipe):
        grid = target_grid(quantizer, candidate)
        for owner, layer, slot in unit.slots:
            check_grid(weight_quantizer(layer, slot), grid, layer, joined(owner, slot))
        return replace(quantizer.spec, grid=grid)
    rule = candidate.rule_for(name, module)
    if rule is None or rule.spec is None or rule.spec.weight is None:
        raise ValueError(f"{name}: a candidate recipe leaves its weight in float; give it a rule for this layer")
    return rule.spec.weight


def _trial(unit: Unit, spec: QuantizerSpec) -> Trial:
    made: dict[int, FakeQuantizer] = {}
    trial: Trial = {}
    for _, module, slot in unit.slots:
        present, weight = weight_quantizer(module, slot), settled(module, slot)
        if id(present) not in made:
            new = FakeQuantizer(spec, tuple(weight.shape), present.layout, name=present.name)
            made[id(present)] = new.to(weight.device).requires_grad_(False)
        trial[module, slot] = made[id(present)]
    return trial


def recipe_of(allocation: Allocation, base: Recipe, modules: dict[str, nn.Module]) -> Recipe:
    """Return an allocation as a recipe: a rule per layer by its exact name, then what the base says of the others.

    Args:
        allocation: of the model.
        base: the recipe that it was found with.
        modules: the model's modules by dotted name.
    """
    rules = []
    for names, spec in zip(allocation.layers, allocation.chosen_specs, strict=True):
        for name in names:
            rule = base.rule_for(name, modules[name])
            assert rule is not None  # noqa: S101 - it is quantized by the base recipe
            assert rule.spec is not None  # noqa: S101
            rules.append(Rule(escaped(name), replace(rule.spec, weight=spec), rule.types))
    taken = {name for names in allocation.layers for name in names}
    used = [base.rule_for(name, module) for name, module in modules.items() if name not in taken and module._parameters]
    return Recipe((*rules, *(rule for rule in base.rules if any(rule is each for each in used))))


def escaped(name: str) -> str:
    """Return a glob that matches a dotted name and nothing else.

    >>> escaped("blocks.0.qkv"), escaped("a[0]")
    ('blocks.0.qkv', 'a[[]0]')
    """
    return re.sub(r"([*?[])", r"[\1]", name) or "*"
