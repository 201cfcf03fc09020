"""Recipes: ordered rules that say which layer gets which quantizers."""

import dataclasses
import difflib
import fnmatch
import functools
import pkgutil
import sys
from dataclasses import dataclass, field
from typing import Any, Final, final

from torch import nn

from lightning_qat.quantization import gradient, granularity, grid, scale, spec, transform
from lightning_qat.quantization.spec import LayerSpec

CONVOLUTIONS: Final = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
DEFAULT_TYPES: Final[tuple[type[nn.Module], ...]] = (nn.Linear, *CONVOLUTIONS, nn.MultiheadAttention)
"""What a rule applies to if it does not say otherwise; embeddings and norms need ``types=``."""


@final
@dataclass(frozen=True)
class Rule:
    """What the layers of some names and types get; None leaves them in float.

    Args:
        match: glob over dotted module names, such as ``"*.attention.*"``; ``*`` also matches dots.
        spec: quantizers, or None for float.
        types: module types (subclasses included), in configs as dotted names. A rule with ``spec=None`` and default
            types matches every type.
        source: the named recipe a rule comes from; only rules without one must match something. It does not count
            when rules are compared.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a dotted name that is no module type.
    """

    match: str
    spec: LayerSpec | None
    types: tuple[type[nn.Module], ...] = DEFAULT_TYPES
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match:
            raise TypeError(f"Rule: match={self.match!r} is not a glob over module names, such as '*.attention.*'")
        if self.spec is not None and not isinstance(self.spec, LayerSpec):
            raise TypeError(f"Rule({self.match!r}): spec={self.spec!r} is neither a LayerSpec nor None")
        if isinstance(self.types, list | tuple):  # as YAML gives it
            types = tuple(_import_type(kind) if isinstance(kind, str) else kind for kind in self.types)
            object.__setattr__(self, "types", types)
        kinds = self.types if isinstance(self.types, tuple) else ()
        if not kinds or not all(isinstance(t, type) and issubclass(t, nn.Module) for t in kinds):
            raise TypeError(
                f"Rule({self.match!r}): types={self.types!r} is not a tuple of module types, such as (nn.Embedding,)"
            )

    def matches_name(self, name: str) -> bool:
        """Whether the glob matches a dotted module name."""
        return fnmatch.fnmatchcase(name, self.match)

    def matches_type(self, module: nn.Module) -> bool:
        """Whether the module is of a type that the rule is for."""
        return (self.spec is None and self.types == DEFAULT_TYPES) or isinstance(module, self.types)

    def matches(self, name: str, module: nn.Module) -> bool:
        """Whether the rule applies to a module."""
        return self.matches_name(name) and self.matches_type(module)

    def __repr__(self) -> str:
        """Leave out what is default, so that messages stay short; evaluates back."""
        types = "" if self.types == DEFAULT_TYPES else f", types=({', '.join(map(_dotted, self.types))},)"
        source = f", source={self.source!r}" if self.source else ""
        return f"Rule({self.match!r}, {self.spec!r}{types}{source})"


@final
@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules; the first that matches a layer decides. Mixed precision is several rules.

    Args:
        rules: the rules in order.

    Raises:
        TypeError: anything but rules.
        ValueError: no rules.
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if isinstance(self.rules, list):
            object.__setattr__(self, "rules", tuple(self.rules))
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise TypeError(
                f"Recipe: rules={self.rules!r} is not a tuple of Rule; to splice in a recipe use *recipe.rules"
            )
        if not self.rules:
            raise ValueError("Recipe: no rules are given; to train in float leave the callback out")

    def rule_for(self, name: str, module: nn.Module) -> Rule | None:
        """Return the first rule that matches, or None."""
        return next((rule for rule in self.rules if rule.matches(name, module)), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, readable as YAML or JSON and as a Hydra node."""
        return {"_target_": "lightning_qat.Recipe", "rules": [to_plain(rule) for rule in self.rules]}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Recipe":
        """Return the recipe that :meth:`to_dict` described. Nothing is imported or executed.

        Raises:
            ValueError: an unknown class or argument, or data of something else.
        """
        if not isinstance(data, dict):
            raise ValueError(f"Recipe.from_dict: {data!r} is no recipe as plain data; give what to_dict() returned")
        recipe = from_plain(data)
        if not isinstance(recipe, Recipe):
            raise ValueError(f"Recipe.from_dict: {data.get('_target_')!r} is not a recipe")
        return recipe


def difference(present: Recipe, given: Recipe) -> str:
    """Return in lines how two recipes differ: rules of the first with ``-``, of the second with ``+``."""
    before, after = ([repr(dataclasses.replace(r, source="")) for r in recipe.rules] for recipe in (present, given))
    lines = difflib.ndiff(before, after)
    return "\n".join(f"  {line}" for line in lines if not line.startswith("?"))


def _import_type(dotted: str) -> Any:
    try:
        return pkgutil.resolve_name(dotted)
    except (ImportError, AttributeError, ValueError):
        raise ValueError(
            f"Rule: types={dotted!r} cannot be imported; give the dotted name of a module type, such as "
            "'torch.nn.Embedding'"
        ) from None


def _dotted(kind: type) -> str:
    if getattr(nn, kind.__name__, None) is kind:
        return f"torch.nn.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def to_plain(value: Any) -> Any:
    """Return a recipe or any piece of one as plain data, readable as YAML or JSON and as a Hydra node."""
    if isinstance(value, type):
        return _dotted(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"_target_": f"lightning_qat.{type(value).__name__}", **fields}
    if isinstance(value, float):  # as numpy's float64 is, which neither YAML nor torch.load would read
        return float(value)
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


@functools.cache
def _registry() -> dict[str, type]:
    pieces = [*vars(grid).values(), *vars(granularity).values(), *vars(scale).values(), *vars(gradient).values()]
    pieces += [*vars(transform).values(), *vars(spec).values(), Rule, Recipe]
    return {kind.__name__: kind for kind in pieces if isinstance(kind, type) and dataclasses.is_dataclass(kind)}


def _resolve_type(dotted: str) -> type[nn.Module]:
    parts = dotted.split(".")
    for length in range(len(parts) - 1, 0, -1):  # classes may lie in classes
        kind: Any = sys.modules.get(".".join(parts[:length]))  # only what is imported already: data must not run code
        for name in parts[length:]:
            kind = getattr(kind, "__dict__", {}).get(name)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            return kind
    module = dotted.rpartition(".")[0]
    raise ValueError(f"Recipe.from_dict: module type {dotted!r} is not known; import {module!r} first")


def from_plain(value: Any) -> Any:
    """Undo :func:`to_plain`. Nothing is imported or executed.

    Raises:
        ValueError: an unknown class or argument.
    """
    if isinstance(value, list | tuple):
        return tuple(from_plain(item) for item in value)
    if not isinstance(value, dict):
        return value
    fields = {str(key): item for key, item in value.items()}
    name = str(fields.pop("_target_", "")).rpartition(".")[2]
    kind = _registry().get(name)
    if kind is None:
        raise ValueError(f"Recipe.from_dict: {name!r} is unknown; known are {sorted(_registry())}")
    allowed = [each.name for each in dataclasses.fields(kind)]
    if unknown := [key for key in fields if key not in allowed]:
        raise ValueError(f"Recipe.from_dict: {name} has no argument {', '.join(unknown)}; it has {', '.join(allowed)}")
    if kind is Rule:
        fields["types"] = tuple(_resolve_type(dotted) for dotted in fields.get("types", map(_dotted, DEFAULT_TYPES)))
    return kind(**{key: item if key == "types" else from_plain(item) for key, item in fields.items()})
