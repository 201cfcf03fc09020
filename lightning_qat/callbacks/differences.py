"""How two recipes differ, piece by piece."""

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

from lightning_qat.quantization.recipe import Recipe, Rule


def differences(present: Recipe, given: Recipe, names: tuple[str, str]) -> tuple[str, ...]:
    """Return one line for each piece in which two recipes differ; none where they quantize alike.

    Where a rule comes from (``source``) does not count.

    Args:
        present: a recipe.
        given: another recipe.
        names: what to call the two.

    >>> from lightning_qat.quantization import recipes
    >>> print(*differences(recipes.int4(), recipes.int2(group_size=32), ("a", "b")), sep=chr(10))
    rule '*': weight.grid.bits: a 4, b 2
    rule '*': weight.granularity: a PerChannel(), b PerGroup(size=32)
    rule '*': weight.scale: a Learned(init=MinimumError()), b AbsMean(multiple=0.5)
    """
    before, after = ([dataclasses.replace(rule, source="") for rule in recipe.rules] for recipe in (present, given))
    lines: list[str] = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "replace" and j - i == m - k:
            for old, new in zip(before[i:j], after[k:m], strict=True):
                lines += _between_rules(old, new, names)
        elif kind != "equal":
            lines += [f"only {names[0]}: {_short(rule)}" for rule in before[i:j]]
            lines += [f"only {names[1]}: {_short(rule)}" for rule in after[k:m]]
    return tuple(lines)


def _between_rules(old: Rule, new: Rule, names: tuple[str, str]) -> Iterator[str]:
    if old.match != new.match or old.spec is None or new.spec is None or old.types != new.types:
        yield f"{names[0]} {_short(old)}, {names[1]} {_short(new)}"
    else:
        for path, first, second in _fields(old.spec, new.spec):
            yield f"rule {old.match!r}: {path}: {names[0]} {first!r}, {names[1]} {second!r}"


def _fields(first: Any, second: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the fields in which two values differ, as deep as both are of one type."""
    if first == second:
        return
    if not dataclasses.is_dataclass(first) or type(first) is not type(second):
        yield path, first, second
        return
    for field in dataclasses.fields(first):
        inner = f"{path}.{field.name}" if path else field.name
        yield from _fields(getattr(first, field.name), getattr(second, field.name), inner)


def _short(rule: Rule) -> str:
    types = f", types=({', '.join(kind.__name__ for kind in rule.types)})" if "types=" in repr(rule) else ""
    return f"Rule({rule.match!r}, {'None' if rule.spec is None else rule.spec.label}{types})"
