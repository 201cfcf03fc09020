"""LoRA-QAT: what is quantized is the merged weight, what is deployed is that, bit for bit; the rest is frozen."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_qat import (
    AbsMax,
    Center,
    Hadamard,
    Int,
    LayerSpec,
    PerChannel,
    QuantizerSpec,
    Recipe,
    Rule,
    StraightThrough,
    add_lora,
    bake,
    codes,
    float_weights,
    load_checkpoint,
    merge_lora,
    prepare,
    recipes,
    unprepare,
)
from lightning_qat.conversion.prepare import quantizers, report_of
from lightning_qat.conversion.regrid import regrid
from lightning_qat.quantization.low_rank import LowRank
from tests.conversion.cases import (
    EVERYTHING,
    LAYERS,
    WEIGHT,
    WEIGHT_ONLY,
    OwnForward,
    Tied,
    absmax_int4,
    network,
    recipe_for,
    run,
)

BASES = ("same", "bfloat16", "int8", "int4")


def adapted(
    model: nn.Module, recipe: Recipe = WEIGHT_ONLY, rank: int = 2, alpha: float = 3.0, **options: Any
) -> tuple[nn.Module, dict[str, LowRank]]:
    """Prepare, add adapters that are not zero, and return these by the name of their weight."""
    prepare(model, recipe)
    add_lora(model, rank, alpha, **options)
    found = {n.removesuffix("_quantizer_lora"): m for n, m in model.named_modules() if isinstance(m, LowRank)}
    with torch.no_grad():
        for low_rank in found.values():
            low_rank.b.normal_(0.0, 0.1)
    return model, found


def train(model: nn.Module, x: Tensor, num_steps: int = 3) -> nn.Module:
    """A few steps of Adam on all parameters, as users give them."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def merged(weight: Tensor, low_rank: LowRank) -> Tensor:
    """W + alpha / r B A in float64."""
    product = low_rank.b.detach().double() @ low_rank.a.detach().double()
    return weight.detach().double() + low_rank.alpha / low_rank.rank * product.reshape(weight.shape)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_merged_weight_is_quantized(kind: str) -> None:
    build, example, axis = LAYERS[kind]
    layer = build()
    weight, x = layer.weight.detach().clone(), example()
    torch.manual_seed(1)
    _, found = adapted(nn.Sequential(layer), recipe_for(LayerSpec(WEIGHT), *EVERYTHING))
    expected = absmax_int4(merged(weight, found["0.weight"]).float(), axis)
    assert torch.allclose(layer.weight, expected, atol=1e-6)
    assert torch.equal(layer._parameters["weight"], weight)
    run(layer, x).sum().backward()
    assert found["0.weight"].a.grad.abs().sum() > 0
    assert found["0.weight"].b.grad.abs().sum() > 0


@pytest.mark.parametrize("build", [nn.Linear, OwnForward])
def test_gradients(build: Callable[..., nn.Linear]) -> None:
    """dB = s G A^T, dA = s B^T G, where the rounding passes G straight through; fused and through the view."""
    layer, x, grad = build(6, 5), torch.randn(7, 6), torch.randn(7, 5)
    model, found = adapted(nn.Sequential(layer), recipe_for(LayerSpec(WEIGHT), *EVERYTHING))
    low_rank = found["0.weight"]
    model(x).backward(grad)
    inner = 1.5 * grad.double().t() @ x.double()
    torch.testing.assert_close(low_rank.b.grad.double(), inner @ low_rank.a.detach().double().t(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(low_rank.a.grad.double(), low_rank.b.detach().double().t() @ inner, rtol=1e-4, atol=1e-5)
    assert layer._parameters["weight"].grad is None
    assert layer.bias.grad is None


def test_the_layer_starts_as_it_was() -> None:
    model, x = network(), torch.randn(3, 6)
    prepare(model, recipes.int4())
    before = model(x)
    assert add_lora(model, 2) == ("0.weight", "2.weight")
    assert torch.equal(model(x), before)


RECIPES = {
    "int4": recipes.int4(),
    "w8a8": recipes.w8a8(),
    "bitnet": recipes.bitnet(),
    "groups": recipes.int4(group_size=32),
    "piq2": recipes.piq2(),
    "asymmetric": recipe_for(LayerSpec(QuantizerSpec(Int(3, symmetric=False), PerChannel(), AbsMax()))),
    "transforms": recipe_for(LayerSpec(WEIGHT, transforms=(Hadamard(2), Center())), nn.Linear),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_adapters_vanish_into_codes(recipe: Recipe, base: str) -> None:
    """Codes, baked weights and codes after merging equal the trained fake-quantized weight, bit for bit."""
    x = torch.randn(8, 64)
    model, _ = adapted(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5)), recipe, base=base)
    train(model, x).eval()
    with torch.no_grad():
        before = model(x)
    read = {name: model.get_submodule(name.removesuffix(".weight")).weight.detach() for name in codes(model)}
    baked, found = bake(model), codes(model)
    assert torch.equal(baked(x), before)
    assert not any("quantizer" in key for key in baked.state_dict())
    assert merge_lora(model) == ("0.weight", "2.weight")
    for name, tensor in codes(model).items():
        for other in (found[name], codes(baked)[name]):
            assert torch.equal(tensor.codes, other.codes)
            assert torch.equal(tensor.scale, other.scale)
        assert torch.equal(tensor.dequantize(), read[name])
    with torch.no_grad():
        assert torch.equal(model(x), before)


def test_only_adapters_and_scales_train() -> None:
    model, x = network(), torch.randn(9, 6)
    model.requires_grad_(False)  # as one freezes a base; its scales train all the same
    adapted(model, recipes.int4(), trainable="2.bias")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = ("weight_quantizer.scale", "weight_quantizer_lora.a", "weight_quantizer_lora.b")
    assert trained == {f"{layer}.{part}" for layer in (0, 2) for part in parts} | {"2.bias"}
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == trained
    assert len(optimizer.state) == len(trained)


def test_no_weight_waits_for_backward() -> None:
    model, _ = adapted(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)), recipes.int4())
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.randn(3, 32)).sum()
    own = {parameter.data_ptr() for parameter in model.parameters()}
    others = [tensor for tensor in kept if tensor.data_ptr() not in own]
    assert max(tensor.numel() for tensor in others) <= 3 * 32  # inputs of layers: no weight
    loss.backward()


def test_no_soft_weight_waits_either() -> None:
    model, _ = adapted(nn.Sequential(nn.Linear(32, 16)), recipes.ternary())
    layer, x, kept = model[0], torch.randn(3, 32), []
    layer.weight_quantizer.softness = torch.tensor(0.3)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = model(x)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert max(tensor.numel() for tensor in kept if tensor.data_ptr() not in own) <= 3 * 32
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(found.square().sum(), parameters)
    expected = nn.functional.linear(x, layer.weight, layer.bias)  # the view: soft, too
    assert torch.equal(found, expected)
    others = torch.autograd.grad(expected.square().sum(), parameters)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_activation_checkpointing(reentrant: bool, dropout: float) -> None:
    model, _ = adapted(network(), recipes.w4a8(), dropout=dropout)
    x = torch.randn(4, 6, requires_grad=True)

    def gradients(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        forward(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients(model)
    found = gradients(lambda value: checkpoint(model, value, use_reentrant=reentrant))
    assert len(found) == len(expected) == 6
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_dropout_is_one_mask_of_input_features_in_training() -> None:
    layer = nn.Linear(6, 5)
    weight = layer.weight.detach().clone()
    model, found = adapted(nn.Sequential(layer), dropout=0.5)
    low_rank = found["0.weight"]
    torch.manual_seed(3)
    trained = layer.weight.detach()
    torch.manual_seed(3)
    keep = torch.empty(6).bernoulli_(0.5) * 2
    assert 0 < int(keep.count_nonzero()) < 6
    correction = (merged(weight, low_rank) - weight.double()) * keep.double()
    assert torch.allclose(trained, absmax_int4((weight.double() + correction).float()), atol=1e-6)
    deployed = absmax_int4(merged(weight, low_rank).float())
    assert torch.allclose(codes(model)["0.weight"].dequantize(), deployed, atol=1e-6)  # without dropout
    model.eval()
    assert torch.allclose(layer.weight, deployed, atol=1e-6)


def test_scales_are_found_from_the_merged_weight() -> None:
    model, found = adapted(nn.Sequential(nn.Linear(6, 5)), recipes.int4())
    with torch.no_grad():
        found["0.weight"].b.mul_(50.0)
    plain = nn.Sequential(nn.Linear(6, 5))
    plain[0].weight = nn.Parameter(merged(model[0]._parameters["weight"], found["0.weight"]).float())
    prepare(plain, recipes.int4())
    regrid(model, 2)
    regrid(plain, 2)
    torch.testing.assert_close(model[0].weight_quantizer.scale, plain[0].weight_quantizer.scale)


def test_float_weights_and_unprepare_are_merged() -> None:
    model, found = adapted(network(), recipes.int4())
    x = torch.randn(3, 6)
    expected = {name: merged(model.get_submodule(name[:1])._parameters["weight"], found[name]) for name in found}
    with float_weights(model):
        assert torch.allclose(model[0].weight.double(), expected["0.weight"], atol=1e-6)
        floating = model(x)
    unprepare(model)
    assert {type(module) for module in model.modules()} == {nn.Sequential, nn.Linear, nn.ReLU}
    torch.testing.assert_close(model[2].weight.double(), expected["2.weight"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(x), floating, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("base", BASES)
def test_the_report_is_what_it_was(base: str) -> None:
    model = network()
    report = prepare(model, recipes.int4())
    add_lora(model, 2, base=base)
    assert report_of(model) == report


def test_tied_weights_share_an_adapter() -> None:
    model, ids = Tied(), torch.tensor([[1, 2, 3]])
    recipe = recipe_for(LayerSpec(WEIGHT), nn.Linear, nn.Embedding)
    adapted(model, recipe, base="int8")
    assert model.embed.weight_quantizer_lora is model.head.weight_quantizer_lora
    assert model.embed._parameters["weight"] is model.head._parameters["weight"]
    model(ids).sum().backward()
    before, read = model(ids), model.head.weight.detach()
    assert torch.equal(model.embed.weight, read)
    assert torch.equal(bake(model)(ids), before)
    merge_lora(model)
    assert torch.equal(model.head.weight, read)
    assert model.embed._parameters["weight"] is model.head._parameters["weight"]
    one = Tied()
    prepare(one, recipe)
    assert add_lora(one, 2, match="head") == ("embed.weight", "head.weight")  # one parameter, one decision


def test_patterns() -> None:
    model = network()
    prepare(model, recipes.int4())
    assert add_lora(model, 2, match=["2"]) == ("2.weight",)
    assert model[0].weight_quantizer.scale.requires_grad
    assert add_lora(model, 2, match="2") == ("2.weight",)  # again: no-op
    assert sum(isinstance(module, LowRank) for module in model.modules()) == 1


def test_refusals() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"no quantized weight; call prepare\(model, recipe\) before"):
        add_lora(model, 2)
    prepare(model, recipes.int4())
    for options, message in (
        ({"rank": 5}, r"2.weight: rank=5 exceeds min\(outputs, inputs\) = min\(4, 8\) = 4"),
        ({"rank": 0}, "rank=0 is not allowed; choose a positive integer such as 8"),
        ({"rank": True}, "rank=True is not allowed"),
        ({"alpha": -1.0}, "alpha=-1.0 is not allowed; choose a positive number such as 4"),
        ({"alpha": "16"}, "add_lora: alpha='16' is not allowed"),
        ({"dropout": 1.0}, "dropout=1.0 is not allowed; choose a probability below 1"),
        ({"base": "int3"}, "base='int3' is not allowed; choose one of"),
        ({"match": "first"}, r"match=\['first'\] matches no quantized layer; there are 0, 2"),
        ({"match": ["0", "first"]}, r"match=\['first'\] matches no quantized layer"),
        ({"trainable": "hed.*"}, r"trainable=\['hed.\*'\] matches no parameter; there are 0.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            add_lora(model, **{"rank": 2, **options})
    with pytest.raises(ValueError, match=r"0.weight: it has an adapter with rank=2, .*merge_lora\(model\) first"):
        add_lora(model, 3)


class Doubled(nn.Module):
    """A parametrization whose results stay alive, so that no later one takes the place in memory of an earlier one."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []

    def forward(self, weight: Tensor) -> Tensor:
        self.results.append(2 * weight)
        return self.results[-1]


def test_weights_that_are_computed_are_refused() -> None:
    doubled = nn.Linear(6, 5)
    nn.utils.parametrize.register_parametrization(doubled, "weight", Doubled())
    for layer in (nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), doubled):
        model = nn.Sequential(layer, nn.Linear(5, 5))
        prepare(model, WEIGHT_ONLY)
        for match in ("*", "0"):
            with pytest.raises(ValueError, match=r"0.weight: it is computed from other parameters \(pruning, weight_"):
                add_lora(model, 2, match=match)
        assert add_lora(model, 2, match="1") == ("1.weight",)
    model, _ = adapted(nn.Sequential(nn.Linear(6, 5)))
    with pytest.raises(ValueError, match=r"pruned weights cannot stay zero, because a LoRA adapter is added"):
        nn.utils.prune.l1_unstructured(model[0], "weight", amount=0.5)


@pytest.mark.parametrize("base", BASES)
def test_state_copies_and_pickles(base: str) -> None:
    model, _ = adapted(network(), recipes.w8a8(), base=base)
    x, buffer = torch.randn(3, 6), io.BytesIO()
    train(model, x)
    state = model.state_dict()
    added = [key for key in state if key not in network().state_dict()]
    assert all("quantizer" in key for key in added)
    assert all(torch.isfinite(value).all() for value in state.values())
    torch.save(state, buffer)
    other, _ = adapted(network(), recipes.w8a8(), base=base)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for copied in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))
        assert {p.requires_grad for p in copied[0].weight_quantizer_lora.parameters()} == {True}
        merge_lora(copied)
        assert not copied[0]._load_state_dict_pre_hooks


@pytest.mark.parametrize("base", BASES)
def test_checkpoints_across_settings(base: str, tmp_path: Path) -> None:
    """Adapters that a module lacks are merged; those that a checkpoint lacks are zero; bases are converted."""
    torch.manual_seed(0)
    floating, x = network(), torch.randn(3, 6)
    model, _ = adapted(copy.deepcopy(floating), recipes.int4(), base=base)
    path = tmp_path / "lora.pt"
    torch.save({"state_dict": model.state_dict(), "lightning_qat": {"recipe": recipes.int4().to_dict()}}, path)
    prepared = load_checkpoint(network(), path, quantized=True)
    assert torch.equal(prepared(x), model(x))
    with pytest.warns(UserWarning, match="was trained quantized"):
        plain = load_checkpoint(network(), path)
    assert torch.equal(plain(x), unprepare(copy.deepcopy(model))(x))
    torch.save(floating.state_dict(), tmp_path / "float.pt")
    load_checkpoint(model, tmp_path / "float.pt")
    fresh = network()
    fresh.load_state_dict(floating.state_dict())
    prepare(fresh, recipes.int4())
    add_lora(fresh, 2, 3.0, base=base)
    assert torch.equal(model(x), fresh(x))


def test_a_packed_checkpoint_in_a_float_base_and_the_reverse() -> None:
    x = torch.randn(3, 6)
    packed, _ = adapted(network(), recipes.int4(), base="int8")
    other, _ = adapted(network(), recipes.int4())
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(x), packed(x))
    packed.load_state_dict(other.state_dict())  # its values are levels of that grid already
    torch.testing.assert_close(packed(x), other(x))


def test_checkpoints_of_other_settings_are_refused() -> None:
    state = adapted(network())[0].state_dict()
    with pytest.raises(RuntimeError, match=r"0\.weight: the checkpoint has rank=2, the model rank=1"):
        adapted(network(), rank=1)[0].load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"0\.weight: the checkpoint has alpha=3, the model alpha=4"):
        adapted(network(), alpha=4.0)[0].load_state_dict(state)


@pytest.mark.parametrize("base", BASES)
def test_bytes_of_the_base(base: str) -> None:
    model, _ = adapted(nn.Sequential(nn.Linear(128, 64)), base=base)
    stored = model[0]._parameters["weight"]
    assert stored.nbytes == 128 * 64 * {"same": 32, "bfloat16": 16, "int8": 8, "int4": 4}[base] // 8
    assert not stored.requires_grad
    assert model[0].weight.dtype == torch.float32
    assert model[0].weight.shape == (64, 128)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("build", [nn.Linear, OwnForward])
def test_16_bit_layers_quantize_the_merged_weight_in_float32(base: str, build: Callable[..., nn.Linear]) -> None:
    """A change too small for bfloat16 moves the codes; the layer computes in bfloat16, and so does the baked one."""
    layer = build(64, 3).bfloat16()
    model, found = adapted(nn.Sequential(layer), recipe_for(LayerSpec(WEIGHT), *EVERYTHING), base=base)
    model.to(torch.bfloat16)
    low_rank, x = found["0.weight"], torch.randn(2, 64, dtype=torch.bfloat16)
    assert low_rank.a.dtype == low_rank.b.dtype == torch.float32
    train(model, x)
    assert layer.weight.dtype == model(x).dtype == torch.bfloat16
    value = low_rank.merged(layer._parameters["weight"])
    expected = absmax_int4(value).bfloat16()
    assert torch.equal(layer.weight, expected)
    assert torch.equal(codes(model)["0.weight"].dequantize(), expected)
    model.eval()
    with torch.no_grad():
        assert torch.equal(bake(model)(x), model(x))


@pytest.mark.parametrize("base", BASES)
def test_autocast(base: str) -> None:
    model, found = adapted(network(), recipes.int4(), base=base)
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(low_rank.a.grad.dtype == torch.float32 for low_rank in found.values())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bake(model)(x), y)


@pytest.mark.parametrize("base", BASES)
def test_moves_and_meta_device(base: str) -> None:
    with torch.device("meta"):
        model = network()
        prepare(model, recipes.int4())
        add_lora(model, 2, base=base)
    model.to_empty(device="cpu")
    low_rank = model[0].weight_quantizer_lora
    assert low_rank.b.count_nonzero() == 0
    assert low_rank.a.abs().max() <= math.sqrt(6 / (6 * 6))
    torch.manual_seed(0)
    state = network().state_dict()
    model.load_state_dict(state, strict=False)
    other = network()
    other.load_state_dict(state)
    prepare(other, recipes.int4())
    add_lora(other, 2, base=base)
    x = torch.randn(2, 6)
    assert torch.equal(model(x), other(x))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does
def test_compiled() -> None:
    model, found = adapted(network(), recipes.w4a8())
    x = torch.randn(4, 6)
    model(x).square().sum().backward()
    expected = {name: low_rank.a.grad.clone() for name, low_rank in found.items()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    for name, low_rank in found.items():
        torch.testing.assert_close(low_rank.a.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_quantizers_keep_their_names() -> None:
    model = network()
    prepare(model, recipes.w8a8())
    before = list(quantizers(model))
    add_lora(model, 2)
    assert list(quantizers(model)) == before


def test_attention_adapts_its_packed_projection() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    model, found = adapted(nn.ModuleDict({"attention": layer}), recipes.int4())
    assert set(found) == {"attention.in_proj_weight", "attention.out_proj.weight"}
    x = torch.randn(2, 3, 8)
    layer(x, x, x)[0].sum().backward()
    assert all(low_rank.a.grad is not None for low_rank in found.values())
    model.eval()
    with torch.no_grad():
        expected = layer(x, x, x, need_weights=False)[0]
        assert torch.equal(bake(model)["attention"](x, x, x, need_weights=False)[0], expected)


def test_separate_projections_have_adapters_of_their_own() -> None:
    layer = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    _, found = adapted(nn.ModuleDict({"attention": layer}), recipes.int4())
    assert found["attention.k_proj_weight"].a.shape == (2, 6)
    assert found["attention.v_proj_weight"].a.shape == (2, 4)


def test_rules_may_leave_layers_out() -> None:
    model = network()
    spec = LayerSpec(QuantizerSpec(Int(4), gradient=StraightThrough()))
    prepare(model, Recipe((Rule("2", None), Rule("*", spec))))
    assert add_lora(model, 2) == ("0.weight",)
    assert not model[2].weight.requires_grad
