"""Rules of the user that have no effect speak up, and say what to do."""

import pytest
from torch import nn

from lightning_qat import Int, LayerSpec, QuantizerSpec, Recipe, Rule, prepare, recipes
from lightning_qat.conversion.prepare import convert
from lightning_qat.quantization.recipe import difference
from tests.conversion.cases import Table

INT8 = LayerSpec(QuantizerSpec(Int(8)))


def model() -> nn.ModuleDict:
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2)))
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(9, 4),
            "blocks": blocks,
            "lstm": nn.LSTM(4, 4),
            "act": nn.ReLU(),
            "head": nn.Linear(4, 2),
        }
    )


def problem(*rules: Rule) -> str:
    with pytest.raises(ValueError, match="Rule") as error:
        prepare(model(), Recipe((*rules, *recipes.int4().rules)))
    return str(error.value)


class TestErrors:
    def test_no_layer_with_the_nearest_names(self) -> None:
        assert problem(Rule("haed", INT8)) == "Rule('haed', ...): matches no layer; did you mean 'head'?"

    def test_the_model_stays_as_it_was(self) -> None:
        """A corrected recipe is not refused as another one than that of the first try."""
        network = model()
        before = str(network)
        with pytest.raises(ValueError, match="did you mean 'head'"):
            prepare(network, Recipe((Rule("haed", INT8), *recipes.int4().rules)))
        assert str(network) == before
        assert prepare(network, Recipe((Rule("head", INT8), *recipes.int4().rules))).share("quantized") > 0

    def test_no_layer_and_nothing_similar(self) -> None:
        message = problem(Rule("zzz", None))
        assert message == (
            "Rule('zzz', ...): matches no layer; "
            "there are embed, blocks.0.0, blocks.0.1, blocks.1.0, blocks.1.1, lstm, head"
        )

    def test_types(self) -> None:
        message = problem(Rule("embed", INT8))
        assert message == (
            "Rule('embed', ...): matches 'embed' by name, but is not for Embedding; name the types in types=(...)"
        )

    def test_other_types(self) -> None:
        assert "is not for Linear" in problem(Rule("head", INT8, types=(Table,)))

    def test_container(self) -> None:
        message = problem(Rule("blocks", None))
        assert message == (
            "Rule('blocks', ...): matches 'blocks', which holds no weights itself; "
            "for the layers inside write 'blocks.*'"
        )

    def test_module_without_weights(self) -> None:
        assert "'act', which holds no weights itself" in problem(Rule("act", None))

    def test_shadowed(self) -> None:
        message = problem(Rule("h*", INT8), Rule("head", None))
        assert message == "Rule('head', ...): all that it matches is taken by an earlier rule, 'h*'; move it up"

    def test_what_cannot_be_quantized(self) -> None:
        message = problem(Rule("lstm", INT8, types=(nn.LSTM,)))
        assert message == "Rule('lstm', ...): lstm cannot be quantized: LSTM reads its weights as one flat buffer"

    def test_all_problems_at_once(self) -> None:
        assert len(problem(Rule("nothing", None), Rule("blocks", None)).splitlines()) == 2


class TestNoError:
    @pytest.mark.parametrize(
        "rules",
        [
            (Rule("head", None),),
            (Rule("h*", None), Rule("*", INT8)),
            (Rule("*.0.0", INT8), Rule("blocks.*", None)),
            (Rule("embed", INT8, types=(nn.Embedding,)),),
            (Rule("*", INT8, types=(nn.LSTM, nn.Linear)),),
            (Rule("lstm", None),),
            (Rule("blocks.?.1", None),),
        ],
    )
    def test_effect(self, rules: tuple[Rule, ...]) -> None:
        assert prepare(model(), Recipe((*rules, *recipes.int4().rules))).problems == ()

    def test_named_recipes_are_exempt(self) -> None:
        """recipes.piq2() has a rule for convolutions, which this model does not have."""
        rules = (*recipes.piq2().rules, *recipes.piq2().rules)
        assert prepare(model(), Recipe(rules)).problems == ()

    def test_model_without_layers(self) -> None:
        report = convert(nn.Sequential(nn.ReLU()), recipes.int4())
        assert report.problems == ()
        assert report.rows == ()


class TestRoot:
    def test_star_matches_it(self) -> None:
        assert prepare(nn.Linear(4, 4), Recipe((Rule("*", INT8),))).share("quantized") == 0.8

    def test_name_does_not(self) -> None:
        with pytest.raises(ValueError, match=r"Rule\('weight', \.\.\.\): matches no layer; the model is one layer"):
            prepare(nn.Linear(4, 4), Recipe((Rule("weight", INT8),)))

    def test_empty_name_is_refused(self) -> None:
        with pytest.raises(TypeError, match="match='' is not a glob"):
            Rule("", INT8)

    def test_star_with_a_dot_does_not_match_the_first_level(self) -> None:
        report = prepare(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))), Recipe((Rule("*.*", INT8),)))
        assert [row.decision for row in report][:2] == ["float", "quantized"]


def test_difference_ignores_where_rules_come_from() -> None:
    other = Recipe((Rule("head", None), Rule("*", recipes.int4().rules[0].spec)))
    assert difference(recipes.int4(), other).splitlines()[0] == "  + Rule('head', None)"
    assert "- " not in difference(recipes.int4(), other)
