"""gptq(): what it changes, what it leaves alone, what it refuses."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import (
    Hadamard,
    Int,
    LayerSpec,
    MinimumError,
    PerGroup,
    PerTensor,
    QuantizerSpec,
    Recipe,
    Rule,
    add_lora,
    codes,
    gptq,
    prepare,
    recipes,
)
from lightning_qat.conversion import Compensated
from tests.learned import learned

FEATURES = 16


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 24), nn.ReLU(), nn.Linear(24, 8)).eval()


def data() -> Tensor:
    """Inputs of few dimensions, and a little noise."""
    torch.manual_seed(1)
    return torch.randn(256, 3) @ torch.randn(3, FEATURES) + 0.1 * torch.randn(256, FEATURES)


def error(model: nn.Module, reference: nn.Module) -> float:
    with torch.no_grad():
        return float((model(data()) - reference(data())).square().mean())


def only(spec: QuantizerSpec, *transforms: Hadamard) -> Recipe:
    return Recipe((Rule("*", LayerSpec(spec, transforms=transforms)),))


RECIPES = {
    **{name: recipes.named(name) for name in ("int4", "binary", "piq3", "w4a8")},
    **{name: learned(name) for name in ("int2", "seq2", "ternary")},
    "groups": only(QuantizerSpec(Int(2), PerGroup(8))),
    "tensor": only(QuantizerSpec(Int(3), PerTensor())),
    "zero point": only(QuantizerSpec(Int(3, symmetric=False), scale=MinimumError())),
}


@pytest.mark.parametrize("name", RECIPES)
def test_outputs_come_nearer_to_those_of_the_float_model(name: str) -> None:
    model = net()
    reference = copy.deepcopy(model)
    prepare(model, RECIPES[name])
    before = error(model, reference)
    found = gptq(model, [data()[:128], data()[128:]])
    assert list(found) == ["0", "2"]
    assert all(each.after < each.before and 0 < each.changed < 1 for each in found.values())
    assert error(model, reference) < 0.5 * before
    for layer, tensor in codes(model).items():
        assert torch.equal(tensor.dequantize(), model.get_submodule(layer.removesuffix(".weight")).weight)


def test_weights_that_keep_their_level_are_hardly_touched() -> None:
    model = net()
    prepare(model, only(QuantizerSpec(Int(2), PerTensor())))  # scales of tensors are not refitted
    before = {name: codes(model)[name].codes for name in codes(model)}
    latents = copy.deepcopy({name: p for name, p in model.named_parameters() if name.endswith(".weight")})
    gptq(model, [data()])
    for name, tensor in codes(model).items():
        same = tensor.codes == before[name]
        assert 0 < same.float().mean() < 1
        moved = (dict(model.named_parameters())[name] - latents[name]).abs()[same]
        inside = latents[name].abs()[same] < tensor.scale
        assert (moved[inside] <= 0.011 * tensor.scale).all()


def test_layers_left_alone() -> None:
    """Recomputed scales move with the weights, rotated weights are others, shared ones have several inputs."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 1), nn.Linear(8, 8))
    model[4].weight = model[2].weight
    recipe = Recipe((Rule("0", recipes.int8().rules[0].spec), *only(QuantizerSpec(Int(4)), Hadamard()).rules))
    prepare(model, Recipe((recipe.rules[0], Rule("1", recipe.rules[1].spec), *recipes.int4().rules)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert gptq(model, [], lambda model, batch: None) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_attention_keeps_its_output_projection() -> None:
    """Its weight is read without a forward, so that nobody sees its inputs."""
    model = nn.TransformerEncoderLayer(FEATURES, 2, 8, batch_first=True)
    prepare(model, recipes.int4())
    before = {name: value.clone() for name, value in model.self_attn.state_dict().items()}
    assert list(gptq(model, [data().view(16, 16, FEATURES)])) == ["linear1", "linear2"]
    assert all(torch.equal(value, before[name]) for name, value in model.self_attn.state_dict().items())


def test_no_trace_but_the_weights() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2)).train()
    prepare(model, recipes.int3())
    x = data()
    statistics, seed = copy.deepcopy(model[2].state_dict()), torch.get_rng_state()
    gptq(model, [x])
    assert model.training
    assert model[1].training
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(value, statistics[name]) for name, value in model[2].state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model[0]._forward_pre_hooks


def test_rounds_are_groups_of_layers() -> None:
    """In one round all layers see the inputs of the float model; in several, later ones see what errors came before."""
    found = {}
    for rounds in (1, 2):
        model = net()
        prepare(model, learned("int2"))
        found[rounds] = (gptq(model, [data()], rounds=rounds), codes(model))
    assert torch.equal(found[1][1]["0.weight"].codes, found[2][1]["0.weight"].codes)
    assert not torch.equal(found[1][1]["2.weight"].codes, found[2][1]["2.weight"].codes)
    assert isinstance(found[1][0]["0"], Compensated)


def test_bfloat16_weights() -> None:
    model = net().bfloat16()
    prepare(model, recipes.int4())
    found = gptq(model, [data().bfloat16()])
    assert all(each.after < each.before for each in found.values())


def test_clear_errors() -> None:
    model = net()
    with pytest.raises(ValueError, match="not prepared"):
        gptq(model, [data()])
    prepare(model, recipes.int4())
    with pytest.raises(ValueError, match="no data reached 0"):
        gptq(model, [])
    with pytest.raises(ValueError, match=r"gptq: 0: .* not all finite"):
        gptq(model, [data() * float("inf")])
    assert model[0].weight_quantizer.enabled
    with pytest.raises(ValueError, match="damping=0"):
        gptq(model, [data()], damping=0)
    with pytest.raises(ValueError, match="rounds=0"):
        gptq(model, [data()], rounds=0)


@pytest.mark.parametrize("base", ["same", "bfloat16", "int8", "int4"])
def test_weights_under_adapters_move_only_where_they_are_stored_whole(base: str) -> None:
    model = net()
    prepare(model, recipes.int4())
    add_lora(model, 2, base=base)
    before = codes(model)
    found = gptq(model, [data()])
    assert list(found) == (["0", "2"] if base == "same" else [])
    changed = [name for name, tensor in codes(model).items() if not torch.equal(tensor.codes, before[name].codes)]
    assert bool(changed) == (base == "same")
    torch.nn.init.ones_(model[0].weight_quantizer_lora.b)  # type: ignore[union-attr, arg-type]
    assert "0" not in gptq(model, [data()])
