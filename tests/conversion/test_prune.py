"""torch.nn.utils.prune before and after prepare()."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_qat import (
    Binary,
    Center,
    HalfInt,
    Int,
    LayerSpec,
    QuantizerSpec,
    Recipe,
    Ternary,
    bake,
    codes,
    prepare,
    unprepare,
)
from lightning_qat.conversion.view import is_view, latent
from tests.conversion.cases import WEIGHT, WEIGHT_ONLY, absmax_int4, network, recipe_for

LEARNED = recipe_for(LayerSpec(QuantizerSpec(Int(2))))
WITHOUT_ZERO = [recipe_for(LayerSpec(QuantizerSpec(grid))) for grid in (HalfInt(2), Binary())]
MOVING = recipe_for(LayerSpec(WEIGHT, transforms=(Center(),)))


def prune_smallest(model: nn.Sequential) -> None:
    prune.global_unstructured(
        [(model[0], "weight"), (model[2], "weight")], pruning_method=prune.L1Unstructured, amount=0.5
    )


def masks(model: nn.Sequential) -> list[Tensor]:
    return [layer.weight_mask for layer in (model[0], model[2])]


class TestBefore:
    def test_value(self) -> None:
        layer = nn.Linear(6, 5)
        weight = layer.weight.detach().clone()
        prune.l1_unstructured(layer, "weight", 0.5)
        mask = layer.weight_mask.clone()
        report = prepare(layer, WEIGHT_ONLY)
        assert [(row.name, row.decision) for row in report] == [("weight", "quantized"), ("bias", "float")]
        x = torch.randn(3, 6)
        torch.testing.assert_close(layer(x), x @ absmax_int4(weight * mask).T + layer.bias)
        assert torch.equal(layer.weight == 0, (absmax_int4(weight * mask) == 0))

    def test_trains(self) -> None:
        layer = nn.Linear(6, 5)
        prune.l1_unstructured(layer, "weight", 0.5)
        prepare(layer, LEARNED)
        layer(torch.randn(3, 6)).square().sum().backward()
        assert layer.weight_orig.grad is not None
        assert torch.equal(layer.weight_orig.grad != 0, (layer.weight_orig.grad != 0) & layer.weight_mask.bool())
        assert layer.weight_quantizer.scale.grad is not None

    @pytest.mark.parametrize("recipe", [*WITHOUT_ZERO, MOVING], ids=["half-integers", "binary", "centered"])
    def test_error(self, recipe: Recipe) -> None:
        model = nn.ModuleDict({"layer": nn.Linear(6, 5)})
        prune.l1_unstructured(model["layer"], "weight", 0.5)
        with pytest.raises(ValueError, match=r"layer\.weight: pruned weights cannot stay zero, because the "):
            prepare(model, recipe)
        assert not is_view(model["layer"])


class TestAfter:
    def test_importance_comes_from_the_latent_weights(self) -> None:
        model, plain = network(), network()
        plain.load_state_dict(model.state_dict())
        prepare(model, LEARNED)
        prune_smallest(model)
        prune_smallest(plain)
        for got, expected in zip(masks(model), masks(plain), strict=True):
            assert torch.equal(got, expected)

    def test_parameter_stays_the_same_object(self) -> None:
        model = network()
        weight = model[0].weight
        prepare(model, LEARNED)
        prune.l1_unstructured(model[0], "weight", 0.5)
        assert model[0].weight_orig is weight
        model(torch.randn(2, 6)).sum().backward()
        assert weight.grad is not None

    def test_zeros_stay_zero(self) -> None:
        model = network()
        prepare(model, recipe_for(LayerSpec(QuantizerSpec(Ternary()))))
        prune_smallest(model)
        model(torch.randn(2, 6))
        for layer in (model[0], model[2]):
            assert (layer.weight[layer.weight_mask == 0] == 0).all()

    def test_second_round(self) -> None:
        model, plain = network(), network()
        plain.load_state_dict(model.state_dict())
        prepare(model, LEARNED)
        for each in (model, plain):
            prune_smallest(each)
            each(torch.randn(2, 6))
            prune_smallest(each)
            each(torch.randn(2, 6))
        assert [int(m.sum()) for m in masks(model)] == [int(m.sum()) for m in masks(plain)]
        for layer, other in zip((model[0], model[2]), (plain[0], plain[2]), strict=True):
            assert torch.equal(layer.weight_mask, other.weight_mask)
            assert torch.equal(latent(layer, "weight"), other.weight)

    def test_remove_keeps_the_trained_scale(self) -> None:
        model = network()
        prepare(model, LEARNED)
        prune_smallest(model)
        with torch.no_grad():
            model[0].weight_quantizer.scale.mul_(1.5)
        scale = model[0].weight_quantizer.scale.clone()
        x = torch.randn(2, 6)
        expected, mask = model(x), model[0].weight_mask.clone()
        for layer in (model[0], model[2]):
            prune.remove(layer, "weight")
        assert torch.equal(model[0].weight_quantizer.scale, scale)
        assert torch.equal(model(x), expected)
        assert "0.weight" in model.state_dict()
        assert torch.equal(model.get_parameter("0.weight") == 0, mask == 0)
        assert not prune.is_pruned(model)

    @pytest.mark.parametrize("recipe", [*WITHOUT_ZERO, MOVING], ids=["half-integers", "binary", "centered"])
    def test_error(self, recipe: Recipe) -> None:
        model = nn.ModuleDict({"layer": nn.Linear(6, 5)})
        prepare(model, recipe)
        with pytest.raises(ValueError, match=r"layer\.weight: pruned weights cannot stay zero, because the "):
            prune.l1_unstructured(model["layer"], "weight", 0.5)
        assert "weight" in dict(model["layer"].named_parameters())
        model["layer"](torch.randn(2, 6)).sum().backward()

    def test_structured(self) -> None:
        layer = nn.Linear(6, 5)
        prepare(layer, LEARNED)
        prune.ln_structured(layer, "weight", amount=2, n=2, dim=0)
        assert int((layer.weight.abs().sum(1) == 0).sum()) == 2

    def test_biases_are_none_of_our_business(self) -> None:
        layer = nn.Linear(6, 5)
        prepare(layer, WITHOUT_ZERO[0])
        prune.l1_unstructured(layer, "bias", 2)
        assert int((layer.bias == 0).sum()) == 2


def before(model: nn.Sequential) -> None:
    prune_smallest(model)
    prepare(model, LEARNED)


def after(model: nn.Sequential) -> None:
    prepare(model, LEARNED)
    prune_smallest(model)


@pytest.mark.parametrize("build", [before, after])
class TestEitherWay:
    def test_codes_are_those_of_the_present_weights(self, build: Callable[[nn.Sequential], None]) -> None:
        """What pruning leaves in the module is older than the last optimizer step."""
        model = network()
        build(model)
        x = torch.randn(2, 6)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(x).square().sum().backward()
        optimizer.step()
        found, baked = codes(model), bake(model)
        expected = model(x)
        assert torch.equal(baked(x), expected)
        for name, tensor in found.items():
            assert torch.equal(tensor.dequantize(), baked.get_parameter(name))
            assert torch.equal(tensor.dequantize(), model.get_submodule(name.rpartition(".")[0]).weight)

    def test_unprepare(self, build: Callable[[nn.Sequential], None]) -> None:
        model, plain = network(), network()
        plain.load_state_dict(model.state_dict())
        build(model)
        prune_smallest(plain)
        unprepare(model)
        x = torch.randn(2, 6)
        assert torch.equal(model(x), plain(x))
        assert model.state_dict().keys() == plain.state_dict().keys()

    def test_state_dict(self, build: Callable[[nn.Sequential], None]) -> None:
        model, other = network(), network()
        build(model)
        build(other)
        other.load_state_dict(model.state_dict())
        x = torch.randn(2, 6)
        assert torch.equal(other(x), model(x))
