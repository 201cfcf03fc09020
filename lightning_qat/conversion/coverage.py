"""report_of(): where every parameter of a prepared model went."""

import math

import torch
from torch import nn

from lightning_qat.conversion.fused import arithmetic_label
from lightning_qat.conversion.plan import Decision, Weight, applicable, joined, plan
from lightning_qat.conversion.report import FLOAT, ONE_DIMENSIONAL, QUANTIZED, UNSUPPORTED, ConversionReport, ReportRow
from lightning_qat.conversion.rules import rule_problems
from lightning_qat.conversion.slots import covered_parameters, obstacle
from lightning_qat.conversion.state import layers, prepared_state
from lightning_qat.conversion.view import INPUT_QUANTIZER, adapter, weight_quantizer
from lightning_qat.quantization.recipe import Rule


def report_of(model: nn.Module) -> ConversionReport:
    """Return the report of a prepared model, as it is now.

    Raises:
        ValueError: if the model is not prepared.
    """
    state = prepared_state(model)
    if state is None:
        raise ValueError(f"{type(model).__name__} is not prepared; call prepare(model, recipe)")
    modules = layers(model)
    seen: set[int] = set()
    rows = []
    for decision in plan(modules, state.recipe):
        owner = decision.owners[0]
        covered = [p for p in covered_parameters(owner.module, owner.slot) if id(p) not in seen]
        seen.update(map(id, covered))
        rows.append(_weight_row(decision, covered))
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                rows.append(_other_row(joined(name, key), parameter, module, state.recipe.rule_for(name, module)))
    return ConversionReport(tuple(rows), rule_problems(state.recipe.rules, modules))


def _weight_row(decision: Decision, covered: list[nn.Parameter]) -> ReportRow:
    owner = next((each for each in decision.owners if each.quantized), decision.owners[0])
    kind, low_rank = type(decision.owners[0].module).__name__, adapter(owner.module, owner.slot)
    numel = sum(parameter.numel() for parameter in covered) if low_rank is None else math.prod(low_rank.shape)
    rule = owner.rule.match if owner.rule else ""
    name = decision.names[0]
    if owner.quantized:
        bits = weight_quantizer(owner.module, owner.slot).grid.bits_per_weight
        return ReportRow(name, kind, numel, QUANTIZED, _how(owner) + _ties(decision), rule, bits)
    stopped = owner.spec is not None and owner.spec.weight is not None and obstacle(owner.module) is not None
    kept = UNSUPPORTED if stopped else FLOAT
    return ReportRow(name, kind, numel, kept, decision.reason, rule, 8.0 * covered[0].element_size())


def _how(owner: Weight) -> str:
    """Describe the quantizers as they are now: a schedule may have changed their grids."""
    parts = [f"weight {weight_quantizer(owner.module, owner.slot).extra_repr()}"]
    inputs = owner.module._modules.get(INPUT_QUANTIZER)
    parts += [] if inputs is None else [f"input {inputs.extra_repr()}"]
    if owner.spec is not None:
        parts += [transform.label for transform in applicable(owner)]
        skipped = owner.spec.input is not None or len(applicable(owner)) < len(owner.spec.transforms)
        arithmetic = arithmetic_label(owner.module)
        parts += [] if arithmetic is None else [arithmetic]
        parts += ["weight only, its input is out of reach"] if owner.slots.unreachable and skipped else []
    return ", ".join(parts)


def _ties(decision: Decision) -> str:
    return f", also {' and '.join(decision.names[1:])}" if len(decision.names) > 1 else ""


def _other_row(name: str, parameter: nn.Parameter, owner: nn.Module, rule: Rule | None) -> ReportRow:
    kind, bits, match = type(owner).__name__, 8.0 * parameter.element_size(), rule.match if rule else ""
    if parameter.dim() < 2:
        return ReportRow(name, kind, parameter.numel(), FLOAT, ONE_DIMENSIONAL, match, bits)
    if rule is not None and rule.spec is None:
        return ReportRow(name, kind, parameter.numel(), FLOAT, f"rule {rule.match!r}", match, bits)
    known = isinstance(owner, nn.RNNBase | torch.jit.ScriptModule)
    reason = obstacle(owner) if known else f"a parameter of {kind} itself, which no rule can reach"
    return ReportRow(name, kind, parameter.numel(), UNSUPPORTED, reason or "", match, bits)
