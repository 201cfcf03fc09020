"""Named recipes: what each does to a model, arguments, names, errors."""

import inspect
import re

import pytest
import torch
from torch import nn

from lightning_qat import (
    AbsMax,
    AbsMean,
    Center,
    Clipped,
    Hadamard,
    Int,
    LayerSpec,
    Learned,
    MinimumError,
    Normalize,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
    StraightThrough,
    codes,
    prepare,
    recipes,
)

LEVELS = {
    "int8": 256,
    "int4": 16,
    "int3": 8,
    "int2": 4,
    "ternary": 3,
    "ternary_a8": 3,
    "binary": 2,
    "w8a8": 256,
    "w4a8": 16,
    "bitnet": 3,
    "bitnet1": 2,
    "piq3": 8,
    "piq2": 4,
    "seq2": 4,
}
WITH_INPUTS = {"w8a8", "w4a8", "ternary_a8", "bitnet", "bitnet1"}
GROUPED = [name for name in LEVELS if not name.startswith("bitnet")]


def spec_of(name: str) -> LayerSpec:
    spec = recipes.named(name).rules[0].spec
    assert spec is not None
    return spec


def test_names() -> None:
    assert recipes.names() == tuple(sorted(LEVELS))
    assert set(recipes.__all__) == {*LEVELS, "named", "names"}


@pytest.mark.parametrize("name", LEVELS)
class TestEveryRecipe:
    def test_number_of_levels(self, name: str) -> None:
        spec = spec_of(name)
        assert spec.weight is not None
        assert spec.weight.grid.num_levels == LEVELS[name]
        layer = nn.Linear(512, 256)
        nn.init.normal_(layer.weight)
        prepare(layer, recipes.named(name))
        assert codes(layer)["weight"].codes.unique().numel() == LEVELS[name]

    def test_inputs(self, name: str) -> None:
        inputs = spec_of(name).input
        expected = QuantizerSpec(Int(8, narrow=True), PerToken(), AbsMax(), StraightThrough())
        assert inputs == (expected if name in WITH_INPUTS else None)

    def test_default_types_are_covered(self, name: str) -> None:
        model = nn.ModuleDict(
            {
                "linear": nn.Linear(4, 4),
                "conv": nn.Conv2d(2, 2, 2),
                "transposed": nn.ConvTranspose1d(2, 2, 2),
                "attention": nn.MultiheadAttention(4, 2),
                "embed": nn.Embedding(4, 4),
                "norm": nn.LayerNorm(4),
            }
        )
        decisions = {row.name: row.decision for row in prepare(model, recipes.named(name)) if "bias" not in row.name}
        assert decisions == {
            "linear.weight": "quantized",
            "conv.weight": "quantized",
            "transposed.weight": "quantized",
            "attention.in_proj_weight": "quantized",
            "attention.out_proj.weight": "quantized",
            "embed.weight": "float",
            "norm.weight": "float",
        }

    def test_rules_name_their_recipe(self, name: str) -> None:
        assert {rule.source for rule in recipes.named(name).rules} == {name}

    def test_source_is_cited(self, name: str) -> None:
        assert re.search(r"Source: .*arXiv:\d{4}\.\d{5}", inspect.getdoc(getattr(recipes, name)) or "")


def test_default_of_everything() -> None:
    spec = spec_of("int4")
    assert spec == LayerSpec(QuantizerSpec(Int(4), PerChannel(), Learned(MinimumError()), Clipped()))


@pytest.mark.parametrize("name", GROUPED)
def test_groups_and_scale_dtype(name: str) -> None:
    recipe = recipes.named(name, group_size=4, scale_dtype="float16")
    for rule in recipe.rules:
        assert rule.spec is not None
        assert rule.spec.weight is not None
        assert rule.spec.weight.granularity == PerGroup(4)
        assert rule.spec.weight.scale_dtype == "float16"


@pytest.mark.parametrize(
    ("name", "step"), [("int3", 0.55 * 2 / 3**0.5), ("int2", 1.0), ("seq2", 0.6 * 2 / 1.5**0.5), ("ternary", 1.3),
                       ("ternary_a8", 1.3)],
)  # fmt: skip
def test_scales_of_few_levels_follow_the_weights(name: str, step: float) -> None:
    model = nn.Sequential(nn.Linear(24, 6, bias=False))
    prepare(model, recipes.named(name))
    spec = spec_of(name).weight
    assert spec is not None
    assert (spec.granularity, spec.gradient) == (PerChannel(), Clipped())
    for factor in (1.0, 2.0):  # nothing is stored: the scale is found anew
        weight = model[0]._parameters["weight"]
        assert weight is not None
        weight.data *= factor
        expected = step * weight.detach().double().abs().mean(1, keepdim=True)
        torch.testing.assert_close(codes(model)["0.weight"].scale.double(), expected, rtol=1e-6, atol=0.0)
    assert [key for key, _ in model.named_parameters()] == ["0.weight"]


@pytest.mark.parametrize(("name", "transforms"), [("bitnet", ()), ("bitnet1", (Center(),))])
def test_bitnet(name: str, transforms: tuple[Center, ...]) -> None:
    spec = spec_of(name)
    assert spec.weight is not None
    assert (spec.weight.granularity, spec.weight.scale) == (PerTensor(), AbsMean())
    assert spec.transforms == transforms
    linear, others = recipes.named(name, normalize=Normalize()).rules
    assert linear.types == (nn.Linear,)
    assert linear.spec is not None
    assert linear.spec.transforms == (*transforms, Normalize())
    assert others.spec is not None
    assert others.spec.transforms == transforms


def test_piq2_rotates_linear_layers_only() -> None:
    linear, others = recipes.piq2(seed=3).rules
    assert linear.types == (nn.Linear,)
    assert linear.spec is not None
    assert linear.spec.transforms == (Hadamard(3),)
    assert others.spec is not None
    assert others.spec.transforms == ()
    assert nn.Linear not in others.types


class TestErrors:
    def test_name(self) -> None:
        with pytest.raises(ValueError, match=r"'int5' is not a recipe; choose one of .*; did you mean 'int[0-9]'\?"):
            recipes.named("int5")

    def test_no_name(self) -> None:
        with pytest.raises(ValueError, match=r"\['int4'\] is not a recipe; choose one of"):
            recipes.named(["int4"])  # type: ignore[arg-type]

    def test_nothing_near(self) -> None:
        with pytest.raises(ValueError, match=r"choose one of binary, bitnet, .*, w8a8$"):
            recipes.named("qqqqqqqq")

    def test_argument(self) -> None:
        with pytest.raises(TypeError, match=r"\('int4', \.\.\.\): groups is no argument .*; it takes group_size"):
            recipes.named("int4", groups=3)

    def test_value(self) -> None:
        with pytest.raises(ValueError, match="PerGroup: size=0"):
            recipes.named("int4", group_size=0)
        with pytest.raises(ValueError, match="scale_dtype='float8'"):
            recipes.named("int4", scale_dtype="float8")

    def test_normalize(self) -> None:
        with pytest.raises(TypeError, match="LayerSpec: transforms"):
            recipes.bitnet(normalize=True)
