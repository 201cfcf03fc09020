"""unprepare() and float_weights()."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import (
    Center,
    Hadamard,
    Int,
    LayerSpec,
    Normalize,
    PerTensor,
    QuantizerSpec,
    Recipe,
    calibrate,
    float_weights,
    prepare,
    unprepare,
)
from lightning_qat.conversion.prepare import prepared_state, quantizers
from tests.conversion.cases import (
    EVERYTHING,
    LAYERS,
    LEARNED_INPUT,
    TOKENS,
    WEIGHT,
    Tied,
    grid_recipes,
    network,
    recipe_for,
    run,
)

LEARNED = recipe_for(LayerSpec(QuantizerSpec(Int(2)), LEARNED_INPUT))


def everything_about(model: nn.Module) -> list[object]:
    found: list[object] = []
    for name, module in model.named_modules():
        hooks = [len(module._forward_pre_hooks), len(module._forward_hooks), len(module._load_state_dict_post_hooks)]
        found += [name, type(module), sorted(vars(module)), list(module._modules), list(module._parameters), hooks]
    return [*found, *model.state_dict(), *map(id, model.parameters())]


@pytest.mark.parametrize("recipe", grid_recipes().values(), ids=grid_recipes())
def test_unprepare_leaves_nothing_behind(recipe: Recipe) -> None:
    model = network()
    before, x = everything_about(model), torch.randn(3, 6)
    expected = model(x)
    prepare(model, recipe)
    model(x)
    assert unprepare(model) is model
    assert everything_about(model) == before
    assert torch.equal(model(x), expected)
    assert prepared_state(model) is None


@pytest.mark.parametrize(("build", "sample", "axis"), LAYERS.values(), ids=LAYERS)
def test_unprepare_layers(build: Callable[[], nn.Module], sample: Callable[[], Tensor], axis: int) -> None:
    layer, x = build(), sample()
    before, expected = everything_about(layer), run(layer, x)
    prepare(layer, recipe_for(LayerSpec(WEIGHT), *EVERYTHING))
    unprepare(layer)
    assert everything_about(layer) == before
    assert torch.equal(run(layer, x), expected)


def test_unprepare_encoder_uses_nested_tensors_again() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    before = everything_about(model)
    prepare(model, recipe_for(LayerSpec(WEIGHT, TOKENS)))
    assert not model.use_nested_tensor
    unprepare(model)
    assert model.use_nested_tensor
    assert everything_about(model) == before


def test_unprepare_tied() -> None:
    model = Tied()
    before = everything_about(model)
    prepare(model, recipe_for(LayerSpec(WEIGHT), nn.Embedding, nn.Linear))
    unprepare(model)
    assert everything_about(model) == before


def test_unprepare_plain_model_is_left_alone() -> None:
    model = network()
    before = everything_about(model)
    assert unprepare(model) is model
    assert everything_about(model) == before


def test_unprepare_keeps_hooks_of_the_user() -> None:
    model = network()
    prepare(model, LEARNED)
    calls: list[int] = []
    model[0].register_forward_pre_hook(lambda *_: calls.append(1))
    unprepare(model)
    model(torch.randn(2, 6))
    assert calls == [1]


def test_unprepare_a_part() -> None:
    model = nn.ModuleDict({"part": network(), "rest": nn.Linear(4, 4)})
    prepare(model, LEARNED)
    unprepare(model["part"])
    assert sorted(quantizers(model)) == ["rest.input_quantizer", "rest.weight_quantizer"]


def test_unprepare_under_another_class_says_so() -> None:
    model = network()
    prepare(model, LEARNED)
    kind = type(model[0])
    model[0].__class__ = type("Wrapped", (kind,), {})
    with pytest.raises(RuntimeError, match=r"0: its class was changed to Wrapped after prepare\(\); undo that first"):
        unprepare(model)
    assert len(quantizers(model)) == 4
    model[0].__class__ = kind
    unprepare(model)


class TestFloatWeights:
    @pytest.mark.parametrize("recipe", grid_recipes().values(), ids=grid_recipes())
    @pytest.mark.parametrize("grad", [True, False])
    def test_value(self, recipe: Recipe, grad: bool) -> None:
        model = network()
        x = torch.randn(3, 6)
        expected = model(x)
        prepare(model, recipe)
        quantized = model(x)
        with float_weights(model), torch.set_grad_enabled(grad):
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), quantized)
        assert not torch.equal(quantized, expected)

    def test_every_parameter_gets_a_gradient(self) -> None:
        """DistributedDataParallel waits for all of them; those of quantizers are zero."""
        model = network()
        prepare(model, LEARNED)
        calibrate(model, [torch.randn(4, 6)])
        with float_weights(model):
            model(torch.randn(3, 6)).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert ("quantizer" in name) == (not parameter.grad.any()), name

    def test_gradients_are_those_of_the_float_model(self) -> None:
        model = network()
        plain = copy.deepcopy(model)
        prepare(model, LEARNED)
        x = torch.randn(3, 6)
        with float_weights(model):
            model(x).square().sum().backward()
        plain(x).square().sum().backward()
        for name, parameter in plain.named_parameters():
            assert torch.equal(model.get_parameter(name).grad, parameter.grad)

    def test_back_on_after_an_error(self) -> None:
        model = network()
        prepare(model, LEARNED)
        model[0].weight_quantizer.enabled = False
        with pytest.raises(KeyError), float_weights(model):
            raise KeyError
        assert [q.enabled for q in quantizers(model).values()] == [True, False, True, True]

    def test_nested(self) -> None:
        model = network()
        prepare(model, LEARNED)
        with float_weights(model):
            with float_weights(model):
                pass
            assert not any(q.enabled for q in quantizers(model).values())

    def test_plain_model(self) -> None:
        model, x = network(), torch.randn(1, 6)
        expected = model(x)
        with float_weights(model):
            assert torch.equal(model(x), expected)

    @pytest.mark.parametrize("transforms", [(Hadamard(),), (Normalize(), Hadamard()), (Center(),)])
    def test_a_disabled_input_quantizer_leaves_the_rotation_on(self, transforms: tuple[Hadamard, ...]) -> None:
        """Weight and input are rotated together or not at all."""
        layer = nn.Linear(8, 5)
        fine = LayerSpec(QuantizerSpec(Int(8), PerTensor()), QuantizerSpec(Int(8), PerTensor()), transforms)
        prepare(layer, recipe_for(fine))
        x = torch.randn(64, 8)
        calibrate(layer, [x])
        expected = layer(x)
        layer.input_quantizer.enabled = False
        torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.02)
