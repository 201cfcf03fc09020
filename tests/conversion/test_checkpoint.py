"""Checkpoints across the border between float and quantized models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_qat import Int, LayerSpec, QuantizerSpec, Rule, calibrate, load_checkpoint, prepare, recipes
from lightning_qat.conversion.calibrate import uncalibrated
from lightning_qat.conversion.checkpoint import CHECKPOINT_KEY, is_quantizer_key
from lightning_qat.conversion.prepare import prepared_state
from lightning_qat.quantization.recipe import Recipe
from tests.conversion.cases import LEARNED_INPUT, STORED, network, recipe_for

RECIPE = Recipe((Rule("2", None), *recipe_for(LayerSpec(QuantizerSpec(Int(4)), LEARNED_INPUT)).rules))
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def trained(recipe: Recipe = RECIPE) -> nn.Sequential:
    model = network()
    prepare(model, recipe)
    calibrate(model, [torch.randn(8, 6)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


def saved(model: nn.Module, path: Path) -> Path:
    """Write what Lightning and QATCallback write."""
    checkpoint: dict[str, object] = {"state_dict": model.state_dict(), "epoch": 3}
    state = prepared_state(model)
    if state is not None:
        checkpoint[CHECKPOINT_KEY] = {"version": 1, "recipe": state.recipe.to_dict()}
    torch.save(checkpoint, path / "model.ckpt")
    return path / "model.ckpt"


class TestQuantizedCheckpoint:
    def test_into_a_plain_module(self, tmp_path: Path) -> None:
        model, plain = trained(), network()
        path = saved(model, tmp_path)
        with pytest.warns(UserWarning, match=r"was trained quantized; the plain Sequential gets its latent float"):
            assert load_checkpoint(plain, path) is plain
        for name, parameter in plain.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name))
        assert prepared_state(plain) is None

    def test_as_it_was_trained(self, tmp_path: Path) -> None:
        model, other = trained(), network()
        load_checkpoint(other, saved(model, tmp_path), quantized=True)
        assert torch.equal(other(X), model(X))
        assert prepared_state(other).recipe == RECIPE
        assert other.state_dict().keys() == model.state_dict().keys()
        assert not uncalibrated(other)

    def test_into_a_module_prepared_alike(self, tmp_path: Path) -> None:
        model, other = trained(), network()
        prepare(other, RECIPE)
        load_checkpoint(other, saved(model, tmp_path))
        assert torch.equal(other(X), model(X))

    def test_with_another_width_than_the_recipe(self, tmp_path: Path) -> None:
        """A schedule lowered the precision during the run."""
        model, other = trained(), network()
        model[0].weight_quantizer.set_grid(Int(2))
        load_checkpoint(other, saved(model, tmp_path), quantized=True)
        assert other[0].weight_quantizer.grid == Int(2)
        assert torch.equal(other(X), model(X))

    def test_into_a_part_that_was_prepared_by_hand(self, tmp_path: Path) -> None:
        model, other = nn.ModuleDict({"part": trained()}), nn.ModuleDict({"part": network()})
        prepare(other["part"], RECIPE)
        load_checkpoint(other, saved(model, tmp_path))
        assert torch.equal(other["part"](X), model["part"](X))

    def test_strict_load_by_torch(self) -> None:
        model, other = trained(), network()
        with pytest.raises(RuntimeError, match="Unexpected key"):
            other.load_state_dict(model.state_dict())
        prepare(other, RECIPE)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(X), model(X))


class TestFloatCheckpoint:
    @pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 1}])
    def test_into_a_prepared_module(self, tmp_path: Path, wrap: object) -> None:
        source, model = network(), trained()
        torch.save(wrap(source.state_dict()), tmp_path / "float.pt")
        load_checkpoint(model, tmp_path / "float.pt")
        expected = network()
        expected.load_state_dict(source.state_dict())
        prepare(expected, RECIPE)
        assert torch.equal(model[0].weight, expected[0].weight)
        assert list(uncalibrated(model)) == ["0.input_quantizer"]

    def test_strict_load_by_torch(self) -> None:
        source, model = network(), trained()
        result = model.load_state_dict(source.state_dict())
        assert not result.missing_keys
        assert not result.unexpected_keys
        prepare(source, RECIPE)
        assert torch.equal(model[0].weight_quantizer.scale, source[0].weight_quantizer.scale)

    def test_into_a_plain_module(self, tmp_path: Path) -> None:
        source, plain = network(), network()
        load_checkpoint(plain, saved(source, tmp_path))
        assert torch.equal(plain(X), source(X))


def _as_it_is(layer: nn.Module) -> nn.Module:
    return layer


@pytest.mark.parametrize("norm", [_as_it_is, parametrizations.weight_norm])
def test_a_part_of_a_float_checkpoint(norm: Callable[[nn.Module], nn.Module]) -> None:
    """Layers that it leaves out keep their trained scales; those of loaded ones belong to other weights."""
    model = nn.Sequential(norm(nn.Linear(6, 8)), nn.MultiheadAttention(8, 2), nn.Linear(8, 4))
    given = {f"2.{key}": value for key, value in nn.Linear(8, 4).state_dict().items()}
    prepare(model, recipe_for(LayerSpec(QuantizerSpec(Int(4)), LEARNED_INPUT)))
    calibrate(model, [torch.randn(3, 6)], lambda m, x: m[2](m[1](*[m[0](x)] * 3)[0]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    before = {key: value.clone() for key, value in model.state_dict().items() if key.endswith(".scale")}
    model.load_state_dict(given, strict=False)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if not key.startswith("2."))
    assert list(uncalibrated(model)) == ["2.input_quantizer"]
    assert not torch.equal(after["2.weight_quantizer.scale"], before["2.weight_quantizer.scale"])


class TestErrors:
    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"load_checkpoint: path='.*nothing' is not a file"):
            load_checkpoint(network(), tmp_path / "nothing")

    def test_no_recipe(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"holds no recipe; prepare\(module, recipe\) first, or quantized=False"):
            load_checkpoint(network(), saved(network(), tmp_path), quantized=True)

    def test_another_recipe(self, tmp_path: Path) -> None:
        model = network()
        prepare(model, recipes.int8())
        with pytest.raises(ValueError, match=r"trained by another recipe than Sequential is prepared by; .*\n +- Rule"):
            load_checkpoint(model, saved(trained(), tmp_path))

    def test_keys_that_do_not_fit(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="Missing key"):
            load_checkpoint(nn.Linear(2, 2), saved(network(), tmp_path))

    @pytest.mark.parametrize("weights_only", [True, False])
    @pytest.mark.parametrize("content", [b"hello world\n", b"junk\n", b"", b"PK\x03\x04 cut off"])
    def test_damaged(self, content: bytes, weights_only: bool, tmp_path: Path) -> None:
        (tmp_path / "damaged.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged\.ckpt (is|holds more than .* or is) no checkpoint"):
            load_checkpoint(network(), tmp_path / "damaged.ckpt", weights_only=weights_only)

    def test_whole_model(self, tmp_path: Path) -> None:
        torch.save(network(), tmp_path / "model.pt")
        with pytest.raises(ValueError, match=r"holds more than tensors and plain data, .* pass weights_only=False"):
            load_checkpoint(network(), tmp_path / "model.pt")
        with pytest.raises(ValueError, match="holds a Sequential, not a state_dict"):
            load_checkpoint(network(), tmp_path / "model.pt", weights_only=False)


class Codebook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vector_quantizer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.vector_quantizer(x))
        return result


def test_modules_of_the_user_are_not_taken_for_quantizers(tmp_path: Path) -> None:
    source, plain = Codebook(), Codebook()
    prepare(source, recipes.int4())
    with pytest.warns(UserWarning, match="trained quantized"):
        load_checkpoint(plain, saved(source, tmp_path))
    assert torch.equal(plain.vector_quantizer.weight, source.get_parameter("vector_quantizer.weight"))


def test_keys() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 1, kdim=2)})
    plain = set(model.state_dict())
    prepare(model, recipe_for(LayerSpec(QuantizerSpec(Int(4)), STORED)))
    assert {key for key in model.state_dict() if not is_quantizer_key(key)} == plain
