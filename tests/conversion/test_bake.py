"""bake() and codes(): what is trained is what is deployed, bit for bit."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm

from lightning_qat import (
    AbsMax,
    AbsMean,
    Binary,
    Center,
    HalfInt,
    Int,
    LayerSpec,
    Learned,
    LearnedSoft,
    Normalize,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Pi,
    QuantizerSpec,
    Recipe,
    Rule,
    Ternary,
    bake,
    calibrate,
    codes,
    prepare,
    recipes,
)
from lightning_qat.conversion.bake import CODES
from lightning_qat.conversion.view import is_view
from tests.conversion.cases import (
    EVERYTHING,
    LAYERS,
    LEARNED_INPUT,
    STORED,
    TOKENS,
    WEIGHT,
    WEIGHT_ONLY,
    OwnForward,
    Table,
    Tied,
    absmax_int4,
    grid_recipes,
    network,
    recipe_for,
)

INPUTS = {
    "none": None,
    "tokens": TOKENS,
    "groups": QuantizerSpec(Int(4), PerGroup(2), AbsMax()),
    "asymmetric tokens": QuantizerSpec(Int(8, symmetric=False), PerToken(), AbsMax()),
    "absmean": QuantizerSpec(Int(3), PerToken(), AbsMean()),
    "stored": STORED,
    "learned": LEARNED_INPUT,
    "float16 scale": QuantizerSpec(Int(8), PerTensor(), Learned(), scale_dtype="float16"),
    "half-integers": QuantizerSpec(HalfInt(4), PerToken(), AbsMax()),
    "pi": QuantizerSpec(Pi(4, 3), PerToken(), AbsMax()),
}


def trained(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """Some steps of training, so that scales are no longer where they started."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(2):
        optimizer.zero_grad()
        out = model(*inputs)
        (out[0] if isinstance(out, tuple) else out).square().mean().backward()
        optimizer.step()
    return model.eval()


def check(model: nn.Module, *inputs: Tensor) -> None:
    """Outputs, weights and codes of the baked model equal those of the prepared one."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(*inputs)
    baked = bake(model)
    for got, wanted in zip(as_tuple(baked(*inputs)), as_tuple(expected), strict=True):
        assert torch.equal(got, wanted)
    found, of_baked = codes(model), codes(baked)
    assert list(found) == list(of_baked)
    for name, tensor in found.items():
        owner, _, slot = name.rpartition(".")
        weight = getattr(model.get_submodule(owner), slot)
        assert torch.equal(tensor.dequantize(), weight)
        assert torch.equal(of_baked[name].dequantize(), weight)
        assert torch.equal(baked.get_parameter(name), weight)
        assert tensor.codes.dtype == torch.int8
        assert tensor.codes.unique().numel() <= tensor.grid.num_levels
    assert not any(is_view(module) for module in baked.modules())
    assert not [key for key in baked.state_dict() if "quantizer" in key]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def as_tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("recipe", grid_recipes().values(), ids=grid_recipes())
class TestEveryRecipe:
    def test_linear(self, recipe: Recipe) -> None:
        model = network()
        prepare(model, recipe)
        x = torch.randn(4, 6)
        check(trained(model, x), x)

    def test_layers(self, recipe: Recipe) -> None:
        """Convolutions, attention, an own forward, and float embeddings in one model."""
        if any(rule.types == (nn.Linear,) for rule in recipe.rules):
            recipe = Recipe((Rule("attention.out_proj", None), *recipe.rules))
        model = nn.ModuleDict(
            {
                "embed": nn.Embedding(9, 8),
                "conv": nn.Conv1d(8, 8, 3, padding=1),
                "up": nn.ConvTranspose1d(8, 8, 1),
                "attention": nn.MultiheadAttention(8, 2, batch_first=True),
                "own": OwnForward(8, 8),
            }
        )
        prepare(model, recipe)
        caller = Caller(model)
        ids = torch.randint(0, 9, (2, 5))
        check(trained(caller, ids), ids)


class Caller(nn.Module):
    def __init__(self, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layers["embed"](ids).transpose(1, 2)
        x = self.layers["up"](self.layers["conv"](x)).transpose(1, 2)
        x, _ = self.layers["attention"](x, x, x, need_weights=False)
        result: Tensor = self.layers["own"](x, gain=0.5)
        return result


@pytest.mark.parametrize(("build", "sample", "axis"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(
    "spec",
    [
        WEIGHT,
        QuantizerSpec(Int(4)),
        QuantizerSpec(Int(4, symmetric=False), PerTensor()),
        QuantizerSpec(Ternary(), PerTensor(), AbsMean()),
        QuantizerSpec(Binary(), gradient=LearnedSoft(0.5)),
        QuantizerSpec(Pi(3, 4), scale_dtype="bfloat16"),
        QuantizerSpec(HalfInt(2), PerGroup(2)),
    ],
    ids=lambda spec: spec.label,
)
def test_every_layer(
    build: Callable[[], nn.Module], sample: Callable[[], Tensor], axis: int, spec: QuantizerSpec
) -> None:
    layer, x = build(), sample()
    prepare(layer, recipe_for(LayerSpec(spec), *EVERYTHING))
    inputs = (x, x) if isinstance(layer, nn.Bilinear) else (x,)
    check(trained(layer, *inputs), *inputs)


@pytest.mark.parametrize("spec", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
class TestInputs:
    def test_linear(self, spec: QuantizerSpec | None, dtype: torch.dtype) -> None:
        model = network().to(dtype)
        prepare(model, recipe_for(LayerSpec(WEIGHT, spec)))
        x = torch.randn(4, 6, dtype=dtype)
        calibrate(model, [x])
        check(trained(model, x), x)

    def test_convolution(self, spec: QuantizerSpec | None, dtype: torch.dtype) -> None:
        if spec is not None and isinstance(spec.granularity, PerGroup):
            spec = TOKENS
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2)).to(dtype)
        prepare(model, recipe_for(LayerSpec(QuantizerSpec(Int(3)), spec)))
        x = torch.randn(2, 2, 5, 5, dtype=dtype)
        calibrate(model, [x])
        check(trained(model, x), x)


def with_weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 4))


def with_spectral_norm() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6)), old_spectral_norm(nn.Linear(6, 4)))


def pruned() -> nn.Module:
    model = network()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


@pytest.mark.parametrize("build", [with_weight_norm, with_spectral_norm, pruned])
@pytest.mark.parametrize("recipe", [WEIGHT_ONLY, recipe_for(LayerSpec(QuantizerSpec(Int(3)), TOKENS))])
def test_weights_that_are_computed(build: Callable[[], nn.Module], recipe: Recipe) -> None:
    model, x = build(), torch.randn(4, 6)
    prepare(model, recipe)
    check(trained(model, x), x)
    baked = bake(model)
    assert sorted(baked.state_dict()) == sorted(f"{i}.{n}" for i in baked._modules for n in ("weight", "bias")
                                                if isinstance(baked._modules[i], nn.Linear))  # fmt: skip
    baked.load_state_dict(dict(baked.state_dict()))  # without metadata, as safetensors gives it
    assert model(x).grad_fn is not None  # the original still trains


class TestBaked:
    @pytest.mark.parametrize("recipe", ["int4", "w8a8", "bitnet", "piq2", "seq2"])
    def test_exports(self, recipe: str) -> None:
        model = network()
        prepare(model, recipes.named(recipe))
        x = torch.randn(4, 6)
        baked = bake(trained(model, x))
        assert torch.equal(torch.export.export(baked, (x,)).module()(x), model(x))

    @pytest.mark.parametrize("recipe", ["int4", "w8a8", "bitnet", "piq2"])
    def test_saves(self, recipe: str) -> None:
        model = network()
        prepare(model, recipes.named(recipe))
        x = torch.randn(4, 6)
        baked = bake(trained(model, x))
        buffer = io.BytesIO()
        torch.save(baked, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert torch.equal(loaded(x), model(x))
        for name, tensor in codes(loaded).items():
            assert torch.equal(tensor.codes, codes(model)[name].codes)
        assert torch.equal(copy.deepcopy(loaded)(x), model(x))

    def test_state_dict_of_weights_fits_the_plain_model(self) -> None:
        model, plain = network(), network()
        prepare(model, recipes.int4())
        plain.load_state_dict(bake(model).state_dict())
        x = torch.randn(4, 6)
        assert torch.equal(plain(x), model(x))

    def test_is_plain(self) -> None:
        model = network()
        prepare(model, WEIGHT_ONLY)
        baked = bake(model)
        assert [type(module) for module in baked] == [nn.Linear, nn.ReLU, nn.Linear]
        assert len(baked[0]._forward_pre_hooks) == 0
        assert torch.equal(baked[0].weight, absmax_int4(model.get_parameter("0.weight")))
        assert baked[0].weight.requires_grad

    def test_shares_nothing(self) -> None:
        model = network()
        prepare(model, recipes.w8a8())
        x = torch.randn(4, 6)
        expected = model(x)
        baked = bake(model)
        with torch.no_grad():
            for parameter in baked.parameters():
                parameter.zero_()
        assert torch.equal(model(x), expected)

    def test_hooks_keep_their_order(self) -> None:
        layer = nn.Linear(6, 4)
        seen: list[Tensor] = []
        prepare(layer, recipes.w8a8())
        layer.register_forward_pre_hook(keep)
        layer.seen = seen
        x = torch.randn(2, 6)
        layer(x)
        baked = bake(layer)
        baked(x)
        assert torch.equal(baked.seen[-1], seen[-1])
        assert not torch.equal(seen[-1], x)

    def test_arguments_by_name(self) -> None:
        model = nn.ModuleDict({"own": OwnForward(6, 4), "table": Table()})
        prepare(model, recipe_for(LayerSpec(WEIGHT, TOKENS), nn.Linear, Table))
        baked, x = bake(model), torch.randn(2, 6)
        assert torch.equal(baked["own"](tokens=x, gain=3.0), model["own"](tokens=x, gain=3.0))
        assert torch.equal(baked["table"](features=x), model["table"](features=x))

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("inputs", [None, TOKENS])
    def test_encoder_with_padding(self, inputs: QuantizerSpec | None) -> None:
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
        prepare(model, recipe_for(LayerSpec(WEIGHT, inputs)))
        x, mask = torch.randn(2, 4, 8), torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]]).bool()
        baked = bake(model)
        with torch.inference_mode():
            expected = model(x, src_key_padding_mask=mask)
            assert torch.equal(baked(x, src_key_padding_mask=mask), expected)
        assert baked.use_nested_tensor == (inputs is None)

    def test_layer_whose_input_alone_is_quantized(self) -> None:
        model = network()
        prepare(model, recipe_for(LayerSpec(input=TOKENS, transforms=(Normalize(),)), nn.Linear))
        x = torch.randn(4, 6)
        assert torch.equal(bake(model)(x), model(x))
        assert codes(bake(model)) == {}

    def test_centered_embedding(self) -> None:
        model = Tied()
        prepare(model, recipe_for(LayerSpec(WEIGHT, transforms=(Center(),)), nn.Embedding, nn.Linear))
        ids = torch.tensor([[1, 2]])
        assert torch.equal(bake(model)(ids), model(ids))


def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    module.seen.append(args[0])


class TestErrors:
    def test_model_without_a_layer_for_its_recipe(self) -> None:
        """It is prepared: to be told to prepare it would lead nowhere."""
        model = nn.Sequential(nn.LayerNorm(4), nn.LSTM(4, 4))
        prepare(model, recipes.int4())
        with pytest.raises(ValueError, match=r"Sequential has no layer that its recipe quantizes; see the report"):
            bake(model)

    def test_plain_model(self) -> None:
        with pytest.raises(ValueError, match=r"Sequential is not prepared; call prepare\(model, recipe\) before bake"):
            bake(network())
        with pytest.raises(ValueError, match=r"Sequential is neither prepared nor baked; call prepare"):
            codes(network())

    def test_baked_twice(self) -> None:
        model = network()
        prepare(model, recipes.w8a8())
        with pytest.raises(ValueError, match="is baked already"):
            bake(bake(model))

    def test_not_calibrated(self) -> None:
        model = network()
        prepare(model, recipe_for(LayerSpec(WEIGHT, STORED)))
        with pytest.raises(ValueError, match=r"0: the scale of its input was never calibrated; call calibrate\(\)"):
            bake(model)

    def test_prepared_but_nothing_to_quantize(self) -> None:
        model = nn.Sequential(nn.ReLU())
        prepare(model, recipes.int4())
        assert codes(model) == {}


def test_codes_of_a_part() -> None:
    model = nn.ModuleDict({"part": network(), "rest": nn.Linear(4, 4)})
    prepare(model, recipes.int4())
    assert list(codes(model["part"])) == ["0.weight", "2.weight"]
    assert torch.equal(bake(model["part"])(torch.ones(1, 6)), model["part"](torch.ones(1, 6)))


def test_per_channel_of_a_transposed_convolution() -> None:
    layer = nn.ConvTranspose1d(4, 6, 3)
    prepare(layer, recipe_for(LayerSpec(QuantizerSpec(Int(4), PerChannel()))))
    assert codes(layer)["weight"].scale.shape == (1, 6, 1)
    assert CODES not in vars(layer)
