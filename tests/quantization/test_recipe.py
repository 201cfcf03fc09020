"""Rules and recipes: values, matching, plain data and back, errors."""

import json
from typing import Any

import numpy as np
import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

import lightning_qat
from lightning_qat import (
    AbsMax,
    Binary,
    Center,
    Clipped,
    ElementwiseScaling,
    Hadamard,
    HalfInt,
    Int,
    LayerSpec,
    Learned,
    LearnedSoft,
    MovingAverage,
    Normalize,
    Percentile,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Pi,
    QuantizerSpec,
    Recipe,
    Rule,
    Soft,
    StraightThrough,
    Ternary,
    recipes,
)
from lightning_qat.quantization.recipe import difference

EVERYTHING = Recipe(
    (
        Rule("head", None),
        Rule("*.a", LayerSpec(QuantizerSpec(Int(4, narrow=True), PerGroup(8), Learned(Percentile(99.5)), Soft(0.5)))),
        Rule("*.b", LayerSpec(QuantizerSpec(Ternary(0.4), PerTensor(), gradient=LearnedSoft(0.3)))),
        Rule("*.c", LayerSpec(QuantizerSpec(Pi(3, 4), gradient=ElementwiseScaling(0.1), scale_dtype="float16"))),
        Rule(
            "*.d",
            LayerSpec(QuantizerSpec(HalfInt(2), gradient=Clipped(1.5)), transforms=(Hadamard(3), Normalize(1e-6))),
        ),
        Rule("*.e", LayerSpec(QuantizerSpec(Binary()), transforms=(Center(),)), types=(nn.Embedding, nn.Linear)),
        Rule(
            "*",
            LayerSpec(
                QuantizerSpec(Int(8, symmetric=False), PerChannel(), AbsMax(), StraightThrough()),
                QuantizerSpec(Int(8), PerTensor(), MovingAverage(0.95)),
            ),
        ),
        Rule("tokens", LayerSpec(input=QuantizerSpec(Int(8), PerToken(), AbsMax()))),
    )
)
ALL = {name: recipes.named(name) for name in recipes.names()} | {"everything": EVERYTHING}
each_recipe = pytest.mark.parametrize("recipe", ALL.values(), ids=ALL)


class Outer:
    class Layer(nn.Linear):
        """A type inside another."""


class Unreachable(nn.Linear):
    """A type that a checkpoint names and that is not imported where it is read."""


@each_recipe
class TestPlainData:
    def test_json(self, recipe: Recipe) -> None:
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe

    def test_yaml(self, recipe: Recipe) -> None:
        assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe

    def test_hydra_node(self, recipe: Recipe) -> None:
        assert instantiate(OmegaConf.create(recipe.to_dict()), _convert_="all") == recipe

    def test_sources_are_kept(self, recipe: Recipe) -> None:
        assert [rule.source for rule in Recipe.from_dict(recipe.to_dict()).rules] == [r.source for r in recipe.rules]

    def test_repr_evaluates(self, recipe: Recipe) -> None:
        names = {name: getattr(lightning_qat, name) for name in lightning_qat.__all__ if hasattr(lightning_qat, name)}
        import torch

        assert eval(repr(recipe), {**names, "torch": torch}) == recipe

    def test_hash(self, recipe: Recipe) -> None:
        assert hash(recipe) == hash(Recipe.from_dict(recipe.to_dict()))


class TestErrorsOfPlainData:
    def test_unknown_class(self) -> None:
        data = {"_target_": "lightning_qat.Recipe", "rules": [{"_target_": "os.system", "match": "rm"}]}
        with pytest.raises(ValueError, match=r"Recipe\.from_dict: 'system' is unknown; known are \['AbsMax'"):
            Recipe.from_dict(data)

    def test_no_recipe(self) -> None:
        with pytest.raises(ValueError, match=r"'lightning_qat\.Int' is not a recipe"):
            Recipe.from_dict({"_target_": "lightning_qat.Int", "bits": 4})

    def test_arguments_of_another_version(self) -> None:
        data = recipes.int4().to_dict()
        data["rules"][0]["spec"]["weight"]["grid"]["bitz"] = 4
        with pytest.raises(ValueError, match=r"Recipe\.from_dict: Int has no argument bitz; it has bits, narrow, symm"):
            Recipe.from_dict(data)

    @pytest.mark.parametrize("data", [None, [], "int4"])
    def test_no_plain_data(self, data: Any) -> None:
        with pytest.raises(ValueError, match=r"is no recipe as plain data; give what to_dict\(\) returned"):
            Recipe.from_dict(data)

    def test_types_inside_of_others(self) -> None:
        recipe = Recipe((Rule("*", None, types=(Outer.Layer,)),))
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert Rule("*", None, types=recipe.to_dict()["rules"][0]["types"]) == recipe.rules[0]

    def test_numbers_of_numpy_become_plain(self) -> None:
        """A checkpoint with others would not load with ``weights_only=True``."""
        spec = QuantizerSpec(Int(4), scale=Percentile(np.float64(99.0)))
        data = Recipe((Rule("*", LayerSpec(spec)),)).to_dict()
        assert yaml.safe_load(yaml.safe_dump(data)) == data

    def test_nothing_is_imported(self) -> None:
        data = Recipe((Rule("*", None, types=(Unreachable,)),)).to_dict()
        assert Recipe.from_dict(data).rules[0].types == (Unreachable,)
        data["rules"][0]["types"] = ["antigravity.Layer"]
        with pytest.raises(ValueError, match=r"module type 'antigravity\.Layer' is not known; import"):
            Recipe.from_dict(data)


class TestRule:
    @pytest.mark.parametrize(
        ("match", "name", "expected"),
        [
            ("*", "", True),
            ("*", "a.b", True),
            ("a.*", "a.b.c", True),
            ("a.*", "a", False),
            ("*.b", "a.b", True),
            ("a", "a.b", False),
            ("layers.[0-3].*", "layers.2.q", True),
            ("layers.?.q", "layers.12.q", False),
            ("A", "a", False),
        ],
    )
    def test_names(self, match: str, name: str, expected: bool) -> None:
        assert Rule(match, None).matches_name(name) == expected

    def test_types(self) -> None:
        spec = LayerSpec(QuantizerSpec(Int(4)))
        assert Rule("*", spec).matches("x", nn.Linear(2, 2))
        assert Rule("*", spec).matches("x", Unreachable(2, 2))
        assert Rule("*", spec).matches("x", nn.ConvTranspose3d(1, 1, 1))
        assert Rule("*", spec).matches("x", nn.MultiheadAttention(2, 1))
        assert not Rule("*", spec).matches("x", nn.Embedding(2, 2))
        assert Rule("*", spec, types=(nn.Embedding,)).matches("x", nn.Embedding(2, 2))
        assert not Rule("*", spec, types=(nn.Embedding,)).matches("x", nn.Linear(2, 2))

    def test_float_rule_is_for_all_types_unless_some_are_named(self) -> None:
        assert Rule("*", None).matches("x", nn.LSTM(2, 2))
        assert not Rule("*", None, types=(nn.Linear,)).matches("x", nn.LSTM(2, 2))

    def test_types_by_name(self) -> None:
        rule = Rule("*", None, types=["torch.nn.Embedding", nn.Linear])
        assert rule.types == (nn.Embedding, nn.Linear)
        assert Rule("*", None, types=(f"{__name__}.Unreachable",)).types[0].__name__ == "Unreachable"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"match": ""}, r"Rule: match='' is not a glob over module names, such as '\*\.attention\.\*'"),
            ({"match": None}, r"Rule: match=None is not a glob"),
            ({"spec": Int(4)}, r"Rule\('x'\): spec=Int\(bits=4.*\) is neither a LayerSpec nor None"),
            ({"types": nn.Linear}, r"Rule\('x'\): types=<class .*> is not a tuple of module types, such as \(nn\.Emb"),
            ({"types": ()}, r"Rule\('x'\): types=\(\) is not a tuple of module types"),
            ({"types": (int,)}, r"Rule\('x'\): types=\(<class 'int'>,\) is not a tuple of module types"),
        ],
    )
    def test_wrong_type(self, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(TypeError, match=message):
            Rule(**{"match": "x", "spec": None, **arguments})

    @pytest.mark.parametrize("name", ["torch.nn.Linaer", "no_such_package.Layer", "Linear"])
    def test_wrong_name(self, name: str) -> None:
        with pytest.raises(ValueError, match=rf"types='{name}' cannot be imported; give the dotted"):
            Rule("x", None, types=(name,))


class TestRecipe:
    def test_first_match_decides(self) -> None:
        first, second = Rule("a*", None), Rule("*", LayerSpec(QuantizerSpec(Int(4))))
        recipe = Recipe((first, second))
        assert recipe.rule_for("ab", nn.Linear(2, 2)) is first
        assert recipe.rule_for("b", nn.Linear(2, 2)) is second
        assert recipe.rule_for("b", nn.Embedding(2, 2)) is None

    def test_list_of_rules(self) -> None:
        assert Recipe([Rule("a", None)]).rules == (Rule("a", None),)

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="no rules are given; to train in float leave the callback out"):
            Recipe(())
        with pytest.raises(TypeError, match=r"is not a tuple of Rule; to splice in a recipe use \*recipe\.rules"):
            Recipe((Rule("a", None), recipes.int4()))

    def test_source_does_not_count(self) -> None:
        assert Recipe((Rule("*", None, source="a"),)) == Recipe((Rule("*", None),))

    def test_difference(self) -> None:
        lines = difference(recipes.int4(), Recipe((Rule("head", None), *recipes.int4().rules))).splitlines()
        assert lines[0] == "  + Rule('head', None)"
        assert lines[1].startswith("    Rule('*', LayerSpec(")
        assert difference(recipes.int4(), recipes.int4()).count("\n") == 0


class TestLayerSpec:
    @pytest.mark.parametrize("transform", [Center(), Hadamard(1)])
    def test_transform_of_a_weight_that_stays_float(self, transform: Center | Hadamard) -> None:
        inputs = QuantizerSpec(Int(8), PerToken(), AbsMax())
        with pytest.raises(ValueError, match=r"LayerSpec: .* transforms the weight, too, but weight=None"):
            LayerSpec(input=inputs, transforms=(transform,))
        LayerSpec(input=inputs, transforms=(Normalize(),))
