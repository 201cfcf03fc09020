"""prepare(): arguments, repetition, errors that leave the model as it was."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_qat import (
    FakeQuantizer,
    Hadamard,
    Int,
    LayerSpec,
    Normalize,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantizerSpec,
    Recipe,
    Rule,
    codes,
    prepare,
    recipes,
    unprepare,
)
from lightning_qat.conversion.prepare import convert, prepared_state, quantizers, report_of
from lightning_qat.conversion.view import is_view, latent
from tests.conversion.cases import (
    STORED,
    TOKENS,
    WEIGHT,
    absmax_int4,
    absmax_int8_tokens,
    network,
    recipe_for,
)

INPUT_ONLY = recipe_for(LayerSpec(input=TOKENS))


class TestRepetition:
    def test_equal_recipe_changes_nothing(self) -> None:
        model = network()
        first = prepare(model, recipes.int4())
        with torch.no_grad():
            model[0].weight_quantizer.scale.mul_(2.0)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        parameters, hooks = list(map(id, model.parameters())), count_hooks(model)
        assert prepare(model, recipes.int4()) == first
        assert list(map(id, model.parameters())) == parameters
        assert count_hooks(model) == hooks
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_where_a_rule_comes_from_does_not_count(self) -> None:
        model = network()
        first = prepare(model, recipes.int4())
        assert prepare(model, Recipe((Rule("*", LayerSpec(QuantizerSpec(Int(4)))),))).rows == first.rows

    def test_other_recipe_shows_the_difference(self) -> None:
        model = network()
        prepare(model, Recipe((Rule("2", None), *recipes.int4().rules)))
        with pytest.raises(ValueError, match=r"Sequential is prepared by another recipe; call unprepare") as error:
            prepare(model, Recipe((Rule("2", None), *recipes.int8().rules)))
        lines = str(error.value).splitlines()
        assert lines[1].strip() == "Rule('2', None)"
        assert lines[2].lstrip().startswith("- Rule('*', LayerSpec(weight=QuantizerSpec(grid=Int(bits=4,")
        assert lines[3].lstrip().startswith("+ Rule('*', LayerSpec(weight=QuantizerSpec(grid=Int(bits=8,")

    def test_other_recipe_of_a_part(self) -> None:
        model = nn.ModuleDict({"part": network(), "rest": nn.Linear(4, 4)})
        prepare(model["part"], recipes.int4())
        with pytest.raises(ValueError, match=r"part is prepared by another recipe"):
            prepare(model, recipes.int8())
        assert not is_view(model["rest"])

    def test_same_recipe_of_a_part(self) -> None:
        model = nn.ModuleDict({"part": network(), "rest": nn.Linear(4, 4)})
        prepare(model["part"], recipes.int4())
        report = prepare(model, recipes.int4())
        assert [row.decision for row in report][:3] == ["quantized"] * 3
        assert report.rows[0].detail == report.rows[2].detail == "weight int4:channel:learned(mse):clipped"

    def test_other_arithmetic(self) -> None:
        model = network()
        prepare(model, recipes.int4())
        with pytest.raises(ValueError, match="prepared with arithmetic='auto', given is 'simulated'"):
            prepare(model, recipes.int4(), arithmetic="simulated")

    def test_layers_that_are_new(self) -> None:
        model = network()
        prepare(model, recipes.w8a8())
        model.append(nn.Linear(4, 4))
        scale = codes(model)["0.weight"].scale
        report = prepare(model, recipes.w8a8())
        assert [row.decision for row in report][:3] == ["quantized"] * 3
        assert torch.equal(codes(model)["0.weight"].scale, scale)
        assert count_hooks(model) == 3

    def test_again_after_unprepare(self) -> None:
        model = network()
        prepare(model, recipes.int4())
        unprepare(model)
        prepare(model, recipes.w8a8())
        assert prepared_state(model).recipe == recipes.w8a8()


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


class TestArguments:
    def test_model(self) -> None:
        with pytest.raises(TypeError, match=r"prepare: model=3 is not a torch\.nn\.Module"):
            prepare(3, recipes.int4())

    def test_recipe(self) -> None:
        with pytest.raises(TypeError, match=r"recipe='int4' is not a Recipe; try recipes\.int4\(\) or recipes\.named"):
            prepare(network(), "int4")

    def test_arithmetic(self) -> None:
        with pytest.raises(ValueError, match=r"arithmetic='fast' is not allowed; choose one of \('auto', 'simulated'"):
            prepare(network(), recipes.int4(), arithmetic="fast")

    def test_quantizer(self) -> None:
        with pytest.raises(TypeError, match="is a FakeQuantizer itself"):
            prepare(FakeQuantizer(WEIGHT, (2, 2)), recipes.int4())

    def test_wrapped(self) -> None:
        with pytest.raises(ValueError, match=r"wrapped in DataParallel; call prepare\(\) before wrapping"):
            prepare(nn.DataParallel(network()), recipes.int4())

    @pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
    def test_lazy(self) -> None:
        with pytest.raises(ValueError, match=r"0\.weight: a lazy parameter has no shape yet; run one forward"):
            prepare(nn.Sequential(nn.LazyLinear(3)), recipes.int4())


class TestErrorsLeaveTheModelAlone:
    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (
                LayerSpec(QuantizerSpec(Int(4), PerGroup(4))),
                r"1\.weight: in_features=6 is not a multiple of group_size=4; choose one of \[1, 2, 3, 6\], or exclude "
                r"the layer with Rule\(\"1\", None\)",
            ),
            (
                LayerSpec(WEIGHT, QuantizerSpec(Int(8), PerGroup(3), TOKENS.scale)),
                "groups of an input exist for",
            ),
            (
                LayerSpec(WEIGHT, transforms=(Hadamard(),)),
                r"2: Hadamard\(seed=0\) acts on inputs of linear layers",
            ),
            (LayerSpec(WEIGHT, TOKENS, (Normalize(),)), r"2: Normalize\(eps=1e-05\) acts on inputs of linear layers"),
        ],
    )
    def test_error(self, spec: LayerSpec, message: str) -> None:
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2), nn.Conv1d(1, 2, 3))
        before = copy.deepcopy(model)
        with pytest.raises(ValueError, match=message):
            prepare(model, recipe_for(spec))
        assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]
        assert model.state_dict().keys() == before.state_dict().keys()
        assert count_hooks(model) == 0
        assert prepared_state(model) is None
        prepare(model, recipes.int4())

    def test_padding_row_on_a_grid_without_zero(self) -> None:
        model = nn.ModuleDict({"embed": nn.Embedding(9, 4, padding_idx=0)})
        with pytest.raises(ValueError, match=r"embed\.weight: the row of padding_idx cannot stay zero, because the"):
            prepare(model, Recipe((Rule("*", recipes.seq2().rules[0].spec, types=(nn.Embedding,)),)))


class TestInputs:
    def test_input_alone(self) -> None:
        model, plain = network(), network()
        plain.load_state_dict(model.state_dict())
        report = prepare(model, INPUT_ONLY)
        x = torch.randn(3, 6)
        hidden = torch.relu(plain[0](absmax_int8_tokens(x)))
        torch.testing.assert_close(model(x), plain[2](absmax_int8_tokens(hidden)))
        assert type(model[0]) is nn.Linear
        assert report.rows[0].decision == "float"
        assert report.rows[0].detail == "only its input is quantized"

    def test_normalized_input_alone(self) -> None:
        layer = nn.Linear(6, 5)
        weight = layer.weight.detach().clone()
        prepare(layer, recipe_for(LayerSpec(input=TOKENS, transforms=(Normalize(),))))
        x = torch.randn(3, 6)
        normalized = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(layer(x), absmax_int8_tokens(normalized) @ weight.T + layer.bias)

    def test_hooks_of_the_user_come_in_the_order_of_registration(self) -> None:
        layer = nn.Linear(6, 5)
        seen = []
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        prepare(layer, recipe_for(LayerSpec(WEIGHT, TOKENS)))
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        x = torch.randn(3, 6)
        layer(x)
        assert seen[0] is x
        assert torch.equal(seen[1], absmax_int8_tokens(x))

    def test_module_called_twice(self) -> None:
        layer = nn.Linear(6, 6)
        model = nn.Sequential(layer, nn.Tanh(), layer)
        prepare(model, recipe_for(LayerSpec(WEIGHT, TOKENS)))
        assert count_hooks(model) == 1
        weight = absmax_int4(latent(layer, "weight"))
        x = torch.randn(3, 6)
        hidden = torch.tanh(absmax_int8_tokens(x) @ weight.T + layer.bias)
        torch.testing.assert_close(model(x), absmax_int8_tokens(hidden) @ weight.T + layer.bias)


class TestTraces:
    def test_random_numbers(self) -> None:
        model = network()
        state = torch.get_rng_state()
        prepare(model, recipe_for(LayerSpec(WEIGHT, TOKENS, (Hadamard(3),))))
        assert torch.equal(torch.get_rng_state(), state)

    def test_under_inference_mode_the_model_still_trains(self) -> None:
        model = network()
        with torch.inference_mode():
            prepare(model, recipe_for(LayerSpec(QuantizerSpec(Int(4)), STORED)))
        assert not any(p.is_inference() for p in (*model.parameters(), *model.buffers()))

    def test_modules_whose_names_look_like_ours(self) -> None:
        """A vector_quantizer of the user's is a module as any other."""
        model = nn.ModuleDict({"vector_quantizer": nn.Sequential(nn.Linear(6, 6)), "quantizers": nn.Linear(6, 2)})
        report = prepare(model, recipes.int4())
        assert [row.name for row in report][:2] == ["vector_quantizer.0.weight", "quantizers.weight"]
        assert report.num_weights == 6 * 6 + 6 + 6 * 2 + 2


class TestMixedPrecision:
    def test_first_rule_wins(self) -> None:
        model = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("first", "middle", "last")})
        rules = (Rule("first", None), Rule("l*", LayerSpec(QuantizerSpec(Int(8)))), *recipes.int2().rules)
        report = prepare(model, Recipe(rules))
        assert {row.name: row.bits for row in report if "weight" in row.name} == {
            "first.weight": 32.0,
            "middle.weight": 2.0,
            "last.weight": 8.0,
        }
        assert [row.rule for row in report if "weight" in row.name] == ["first", "*", "l*"]
        assert sorted(quantizers(model)) == ["last.weight_quantizer", "middle.weight_quantizer"]

    def test_order_decides(self) -> None:
        int8 = LayerSpec(QuantizerSpec(Int(8), PerTensor()))
        model = network()
        with pytest.raises(ValueError, match=r"taken by an earlier rule, '\*'; move it up"):
            prepare(model, Recipe((*recipes.int4().rules, Rule("0", int8))))

    def test_types(self) -> None:
        model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "linear": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 1)})
        rules = (
            Rule("*", LayerSpec(QuantizerSpec(Int(8), PerChannel())), types=(nn.Embedding,)),
            Rule("*", LayerSpec(QuantizerSpec(Int(3))), types=(nn.Conv1d,)),
            *recipes.int4().rules,
        )
        report = prepare(model, Recipe(rules))
        assert [row.bits for row in report][:3] == [8.0, 4.0, 3.0]


def test_root_whose_shape_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^weight: in_features=6 .* exclude the layer with Rule\(\"\*\", None\)"):
        prepare(nn.Linear(6, 5), recipes.int4(group_size=4))


def test_root_is_a_layer_itself() -> None:
    layer = nn.Linear(6, 5)
    report = prepare(layer, recipes.int4())
    assert [row.name for row in report] == ["weight", "bias"]
    assert list(codes(layer)) == ["weight"]


def test_convert_leaves_rules_to_the_report() -> None:
    model = network()
    report = convert(model, Recipe((Rule("later.*", None), *recipes.int4().rules)))
    assert len(report.problems) == 1
    model.add_module("later", nn.Sequential(nn.Linear(4, 4)))
    assert report_of(model).problems == ()


def test_report_of_a_plain_model() -> None:
    with pytest.raises(ValueError, match=r"Sequential is not prepared; call prepare\(model, recipe\)"):
        report_of(network())


@pytest.mark.parametrize("build", [network, lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))])
def test_kwargs(build: Callable[[], nn.Sequential]) -> None:
    model = build()
    prepare(model, recipe_for(LayerSpec(WEIGHT, TOKENS)))
    x = torch.randn(3, 6) if isinstance(model[0], nn.Linear) else torch.randn(3, 3, 4, 4)
    assert torch.equal(model[0](input=x), model[0](x))
