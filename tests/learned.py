"""Recipes by name with a learned scale, where the named one recomputes it."""

from lightning_qat import LayerSpec, QuantizerSpec, Recipe, Rule, recipes


def learned(name: str) -> Recipe:
    """Return a recipe for weights alone with the grid of a named one."""
    spec = recipes.named(name).rules[0].spec
    assert spec is not None
    assert spec.weight is not None
    return Recipe((Rule("*", LayerSpec(QuantizerSpec(spec.weight.grid))),))
