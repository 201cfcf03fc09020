"""regrid(): another precision for the quantizers of a prepared model."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_qat import (
    AbsMax,
    Binary,
    HalfInt,
    Int,
    LayerSpec,
    Learned,
    MinimumError,
    PerTensor,
    Pi,
    QuantizerSpec,
    Recipe,
    Rule,
    Ternary,
    calibrate,
    prepare,
    recipes,
)
from lightning_qat.conversion.regrid import check_precisions, refine_inputs, regrid
from lightning_qat.quantization.quantizer import FakeQuantizer


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def relative_error(model: nn.Module, layer: str) -> float:
    module = model.get_submodule(layer)
    latent = module._parameters["weight"].detach().double()  # type: ignore[union-attr]
    quantized = module.weight.detach().double()  # type: ignore[operator]
    return float((quantized - latent).norm() / latent.norm())


def input_recipe(bits: int = 8) -> Recipe:
    spec = QuantizerSpec(Int(bits), PerTensor(), MinimumError())
    return Recipe((Rule("*", LayerSpec(QuantizerSpec(Int(8)), spec)),))


@pytest.mark.parametrize(
    ("recipe", "precision", "expected"),
    [
        (recipes.int8(), 4, Int(4)),
        (recipes.int8(), 1, Binary()),
        (recipes.seq2(), 4, HalfInt(4)),
        (recipes.piq3(), 2, Pi(2, 4)),
        (recipes.ternary(), 4, Int(4)),
        (recipes.int4(), Ternary(), Ternary()),
        (recipes.ternary(), Binary(), Binary()),
    ],
)
def test_bits_are_of_the_family_of_the_recipe_and_grids_are_taken_as_they_are(
    recipe: Recipe, precision: object, expected: object
) -> None:
    model = net()
    prepare(model, recipe)
    changed = regrid(model, precision)
    assert [each.after for each in changed] == [expected, expected]
    assert all(q.grid == expected for q in model.modules() if isinstance(q, FakeQuantizer))
    assert regrid(model, precision) == []


@pytest.mark.parametrize("drop", [(8, 4), (4, 2), (8, 2)])
def test_scales_are_found_anew_by_search(drop: tuple[int, int]) -> None:
    """As good as a model that was prepared at the lower width, and far better than the stale scale."""
    model, fresh = net(), net()
    before, after = (Recipe((Rule("*", LayerSpec(QuantizerSpec(Int(bits)))),)) for bits in drop)
    prepare(model, before)
    prepare(fresh, after)
    stale = net()
    prepare(stale, before)
    for quantizer in stale.modules():
        if isinstance(quantizer, FakeQuantizer):
            quantizer.set_grid(Int(drop[1]))
    regrid(model, drop[1])
    assert torch.equal(model[0].weight, fresh[0].weight)
    assert relative_error(model, "0") < relative_error(stale, "0")


def test_parts_of_a_model_follow_patterns() -> None:
    model = net()
    prepare(model, recipes.int8())
    regrid(model, 2, match="0")
    assert [q.grid for q in model.modules() if isinstance(q, FakeQuantizer)] == [Int(2), Int(8)]


def test_a_tied_weight_follows_any_of_its_layers() -> None:
    model = net()
    model.add_module("tied", nn.Linear(12, 4))
    model.tied.weight = model[2].weight  # type: ignore[union-attr]
    prepare(model, recipes.int8())
    regrid(model, 4, match="tied")
    assert model[2].weight_quantizer.grid == Int(4)  # type: ignore[union-attr]
    assert model[0].weight_quantizer.grid == Int(8)  # type: ignore[union-attr]


def test_inputs_follow_only_on_request() -> None:
    model = net()
    prepare(model, recipes.w8a8())
    regrid(model, 4)
    assert model[0].input_quantizer.grid.bits == 8  # type: ignore[union-attr]
    regrid(model, 4, inputs=True)
    assert model[0].input_quantizer.grid.bits == 4  # type: ignore[union-attr]


def calibrated(x: Tensor) -> nn.Sequential:
    model = net()
    prepare(model, input_recipe())
    calibrate(model, [x])
    return model


def input_error(model: nn.Module, x: Tensor) -> float:
    quantized = model[0].input_quantizer(x)  # type: ignore[index]
    return float((quantized - x).double().square().sum())


def test_the_next_batch_decides_between_ratio_and_search_for_inputs() -> None:
    x = torch.randn(256, 16)
    model, by_ratio = calibrated(x), calibrated(x)
    changed = regrid(model, 2, inputs=True)
    regrid(by_ratio, 2, inputs=True)
    with refine_inputs(model, changed):
        out = model(x)
    assert input_error(model, x) < 0.9 * input_error(by_ratio, x)  # 8 -> 2 bits: the ratio covers tails nobody needs
    torch.testing.assert_close(out, model(x), rtol=0, atol=0)  # used in that very batch
    assert all(q.observer is None for q in model.modules() if isinstance(q, FakeQuantizer))
    assert len(model[0]._forward_pre_hooks) == 1


def test_the_ratio_stays_where_the_batch_finds_nothing_better() -> None:
    x = torch.randn(256, 16)
    model = calibrated(x)
    changed = regrid(model, 4, inputs=True)
    with torch.no_grad():
        best = min((input_error_at(model, x, scale), scale) for scale in torch.linspace(0.05, 1.0, 400).tolist())[1]
        model[0].input_quantizer.scale.fill_(best)  # type: ignore[union-attr]
        before = model[0].input_quantizer.scale.clone()  # type: ignore[union-attr]
    with refine_inputs(model, changed):
        model(x.new_zeros(4, 16))  # any scale represents zeros: no smaller error
    assert torch.equal(model[0].input_quantizer.scale, before)  # type: ignore[union-attr, arg-type]


def input_error_at(model: nn.Module, x: Tensor, scale: float) -> float:
    model[0].input_quantizer.scale.fill_(scale)  # type: ignore[index]
    return input_error(model, x)


def test_a_zero_point_moves_with_the_range() -> None:
    stored = QuantizerSpec(Int(8, symmetric=False), PerTensor(), Learned(init=AbsMax()))
    model = net()
    prepare(model, Recipe((Rule("0", LayerSpec(QuantizerSpec(Int(8)), stored)),)))
    x = torch.rand(64, 16) + 0.2
    calibrate(model, [x])
    regrid(model, 4, inputs=True)
    quantizer = model[0].input_quantizer
    assert -8 <= float(quantizer.zero_point) <= 7  # type: ignore[union-attr, arg-type]
    step = float(quantizer.scale.detach())  # type: ignore[union-attr, arg-type]
    assert float((quantizer(x) - x).detach().abs().max()) <= 0.75 * step  # type: ignore[operator]


def test_errors_name_the_layer_and_the_remedy() -> None:
    model = net()
    prepare(model, recipes.int8())
    with pytest.raises(ValueError, match=r"match='head\*' matches no quantized layer; there are \['0', '2'\]"):
        regrid(model, 4, match="head*")
    with pytest.raises(TypeError, match=r"0\.weight: precision='int4' is neither bits"):
        regrid(model, "int4")
    with pytest.raises(ValueError, match=r"0\.weight: .* one has a zero point"):
        check_precisions(model, [4, Int(4, symmetric=False)])
    pi = net()
    prepare(pi, recipes.piq3())
    with pytest.raises(ValueError, match=r"0\.weight: Pi\(bits=3, k=4\) cannot have 8 bits"):
        check_precisions(pi, [8])
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"0: Binary\(\) has no zero, so that its pruned weights"):
        check_precisions(model, [Binary()])
