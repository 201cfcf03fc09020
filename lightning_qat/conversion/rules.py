"""What is wrong with rules of the user: they have no effect."""

import difflib
from collections.abc import Mapping

from torch import nn

from lightning_qat.conversion.slots import obstacle
from lightning_qat.quantization.recipe import Rule


def rule_problems(rules: tuple[Rule, ...], modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return in words which rules match nothing, or only what earlier rules take; rules of named recipes are exempt.

    Args:
        rules: in order.
        modules: the user's modules by dotted name.
    """
    problems = []
    for index, rule in enumerate(rules):
        problem = None if rule.source else _problem(index, rules, modules)
        if problem is not None:
            problems.append(f"Rule({rule.match!r}, ...): {problem}")
    return tuple(problems)


def _problem(index: int, rules: tuple[Rule, ...], modules: Mapping[str, nn.Module]) -> str | None:
    rule = rules[index]
    by_name = [name for name in modules if rule.matches_name(name)]
    if not by_name:
        return f"matches no layer; {_similar(rule.match, modules)}"
    holding = [name for name in by_name if modules[name]._parameters]
    if not holding:
        return (
            f"matches {by_name[0]!r}, which holds no weights itself; for the layers inside write "
            f"{by_name[0] + '.*' if by_name[0] else '*'!r}"
        )
    matched = [name for name in holding if rule.matches_type(modules[name])]
    if not matched:
        kinds = sorted({type(modules[name]).__name__ for name in holding})
        return f"matches {holding[0]!r} by name, but is not for {' and '.join(kinds)}; name the types in types=(...)"
    first = [next(i for i, r in enumerate(rules) if r.matches(name, modules[name])) for name in matched]
    if all(i < index for i in first):
        earlier = rules[min(first)]
        return f"all that it matches is taken by an earlier rule, {earlier.match!r}; move it up"
    if rule.spec is not None and rule.spec.weight is not None:
        reasons = [obstacle(modules[name]) for name in matched]
        return f"{matched[0]} cannot be quantized: {reasons[0]}" if all(reasons) else None
    return None


def _similar(match: str, modules: Mapping[str, nn.Module]) -> str:
    names = [name for name, module in modules.items() if name and module._parameters]
    if not names:
        return "the model is one layer, whose name is empty: '*' matches it"
    near = difflib.get_close_matches(match.strip("*."), names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(names[:8])}"
