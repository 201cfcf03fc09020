"""A named recipe with learned scales, which recipes had down from 3 bits, and which peers have."""

from lightning_qat import LayerSpec, QuantizerSpec, Recipe, Rule


def with_learned_scale(recipe: Recipe) -> Recipe:
    """Return a recipe of the same grid, granularity and inputs, with weights whose scale is learned."""
    spec = recipe.rules[0].spec
    assert spec is not None
    assert spec.weight is not None
    weight = QuantizerSpec(spec.weight.grid, spec.weight.granularity)
    return Recipe((Rule("*", LayerSpec(weight, spec.input)),))
