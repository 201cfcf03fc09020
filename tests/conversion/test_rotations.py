"""Rotations merged into weights: equal outputs, against matrices in float64; and what must stay as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_qat as qat
from lightning_qat.conversion import fold_rotations, online_rotations, rotate_between
from lightning_qat.export import RefusedError, export, load
from lightning_qat.functional import random_signs
from lightning_qat.functional.hadamard import power_of_two_blocks
from tests import _reference as ref

TOKEN = qat.QuantizerSpec(qat.Int(8, narrow=True), qat.PerToken(), qat.AbsMax())


def rotated(*floats: str, seed: int = 0, token: Any = None) -> qat.Recipe:
    """2 bits with a rotation everywhere but in the named layers."""
    weight = qat.QuantizerSpec(qat.Pi(2, 3))
    rule = qat.Rule("*", qat.LayerSpec(weight, token, (qat.Hadamard(seed),)), types=(nn.Linear,))
    return qat.Recipe((*(qat.Rule(name, None) for name in floats), rule))


def matrix(size: int, seed: int = 0) -> Tensor:
    """The rotation as a matrix that multiplies from the right."""
    blocks = [ref.walsh_hadamard_matrix(n) / n**0.5 for n in power_of_two_blocks(size)]
    return random_signs(size, seed).double().diag() @ torch.block_diag(*blocks)


class Net(nn.Module):
    """A table read by two layers; a layer in float between; a nonlinearity, a residual, and a layer without one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 24, padding_idx=0)
        self.left, self.right = nn.Linear(24, 20), nn.Linear(24, 20)
        self.middle, self.up = nn.Linear(20, 12), nn.Linear(12, 16)
        self.down, self.head = nn.Linear(16, 8, bias=False), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = self.up(self.middle(self.left(x) * self.right(x).tanh()))
        out: Tensor = self.head(self.down(x.relu()))
        return out


def tokens() -> Tensor:
    return torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(1))


def prepared(*floats: str, **options: Any) -> Any:
    model = Net().double()
    qat.prepare(model, rotated(*floats, **options))
    return model.eval()


def test_folds_what_comes_from_tables_and_layers_in_float() -> None:
    model, plain = prepared("middle"), Net().double()
    assert set(online_rotations(qat.bake(model))) == {"left", "right", "up", "down", "head"}
    folded: Any = fold_rotations(model, tokens())
    assert online_rotations(folded) == {"down": qat.Hadamard(0), "head": qat.Hadamard(0)}
    assert torch.allclose(folded(tokens()), model(tokens()), rtol=1e-12, atol=1e-13)
    expected = plain.table.weight @ matrix(24)
    assert torch.allclose(folded.table.weight, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(folded.table.weight[0], torch.zeros(24, dtype=torch.float64))
    assert torch.allclose(folded.middle.weight, matrix(12).T @ plain.middle.weight, rtol=1e-12, atol=1e-14)
    assert torch.allclose(folded.middle.bias, plain.middle.bias @ matrix(12), rtol=1e-12, atol=1e-14)
    assert type(folded.left).forward is nn.Linear.forward
    assert not folded.left._forward_pre_hooks
    assert not list(folded.left.children())


def test_codes_stay_as_they_are_and_the_model_too() -> None:
    model = prepared("middle")
    before, codes = {k: v.clone() for k, v in model.state_dict().items()}, qat.codes(model)
    folded = fold_rotations(model, tokens())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for name, tensor in qat.codes(folded).items():
        assert torch.equal(tensor.codes, codes[name].codes)
        assert torch.equal(tensor.dequantize(), folded.get_parameter(name))


def test_a_baked_model_folds_alike() -> None:
    model = prepared("middle")
    once, again = fold_rotations(model, tokens()), fold_rotations(qat.bake(model), tokens())
    assert torch.equal(once(tokens()), again(tokens()))
    assert torch.equal(fold_rotations(again, tokens())(tokens()), again(tokens()))


def test_quantized_inputs_are_quantized_after_the_rotation() -> None:
    model = prepared("middle", token=TOKEN)
    folded: Any = fold_rotations(model, tokens())
    assert set(online_rotations(folded)) == {"down", "head"}
    assert folded.left.baked_input.spec == TOKEN
    assert torch.allclose(folded(tokens()), model(tokens()), rtol=1e-9, atol=1e-10)


def test_what_a_quantized_layer_returns_stays_rotated_online() -> None:
    folded = fold_rotations(prepared(), tokens())
    assert set(online_rotations(folded)) == {"middle", "up", "down", "head"}


class Reads(nn.Module):
    """One table and somebody else who reads it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.table, self.layer, self.other = nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        if how == "tied":
            self.other.weight = nn.Parameter(torch.randn(5, 8))
            self.table.weight = self.other.weight

    def forward(self, x: Tensor) -> Any:
        x = self.table(x)
        if self.how == "residual":
            return x + self.layer(x)
        if self.how == "returned":
            return self.layer(x), x
        if self.how == "twice":
            return self.layer(self.layer(x))
        if self.how == "tied":
            return F.linear(self.layer(x), self.other.weight)
        return self.layer(x) + self.other(x)


@pytest.mark.parametrize("how", ["residual", "returned", "twice", "tied", "float reader", "another rotation"])
def test_what_others_read_in_another_way_stays(how: str) -> None:
    model = Reads(how).double()
    rules = rotated("other").rules
    if how == "another rotation":
        rules = (qat.Rule("other", rotated(seed=1).rules[-1].spec), *rotated().rules)
    qat.prepare(model, qat.Recipe(rules))
    x = torch.arange(5)
    folded = fold_rotations(model, x)
    assert "layer" in online_rotations(folded)
    assert torch.equal(folded.table.weight, model.table.weight)  # type: ignore[union-attr, arg-type]


def test_a_folded_model_fits_formats_without_rotations(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 6))
    qat.prepare(model, rotated("0"))
    x = [torch.randn(4, 8)]
    with pytest.raises(RefusedError, match="transforms"):
        export(model, tmp_path / "before", format="compressed-tensors", batches=x)
    folded = fold_rotations(model, x[0])
    assert export(folded, tmp_path / "after", format="compressed-tensors", batches=x).exact
    export(folded, tmp_path / "a.safetensors", batches=x)
    fresh = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 6))
    load(tmp_path / "a.safetensors", fresh)
    assert torch.equal(fresh(x[0]), folded(x[0]))


def test_a_float_model_has_nothing_to_fold() -> None:
    with pytest.raises(ValueError, match="neither prepared nor baked"):
        fold_rotations(Net(), tokens())


# --- between two layers, before training -----------------------------------------------------------------------------


class Attention(nn.Module):
    """Values and output in separate layers, with fewer heads of values than of queries; or all packed in one."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.packed = packed
        self.qkv = nn.Linear(16, 48) if packed else nn.Linear(16, 32)
        self.v, self.out = nn.Linear(16, 8), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        heads = [part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in self.qkv(x).split(16, -1)]
        v = heads[2] if self.packed else self.v(x).unflatten(-1, (-1, 4)).transpose(1, 2).repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(heads[0], heads[1], v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_output_per_head(packed: bool, dtype: torch.dtype) -> None:
    model, plain = Attention(packed).to(dtype), Attention(packed).to(dtype)
    x = torch.randn(2, 5, 16).to(dtype)
    rows = (32, 48) if packed else None
    rotate_between(model, "qkv" if packed else "v", "out", x, block=4, rows=rows, seed=3)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(model(x), plain(x), rtol=tolerance, atol=10 * tolerance)
    blocks = torch.block_diag(*[matrix(4, 3)] * 4)
    expected = (plain.out.weight.double() @ blocks).to(dtype)
    torch.testing.assert_close(model.out.weight, expected, rtol=tolerance, atol=tolerance)
    if packed:
        assert torch.equal(model.qkv.weight[:32], plain.qkv.weight[:32])
        assert not torch.equal(model.qkv.bias[32:], plain.qkv.bias[32:])


def test_two_linear_layers_then_trained_as_usual() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 4, bias=False))
    x = torch.randn(5, 6)
    before = model(x)
    rotate_between(model, "0", "1", x)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    qat.prepare(model, qat.recipes.int2())
    model(x).sum().backward()
    assert not online_rotations(qat.bake(model))


def test_a_spike_is_spread_over_both_layers() -> None:
    model = nn.Sequential(nn.Linear(6, 16, bias=False), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight[3] = 50.0  # type: ignore[operator, index]
    before = float(model[0].weight.detach().abs().max())  # type: ignore[operator]
    rotate_between(model, "0", "1", torch.randn(3, 6))
    assert float(model[0].weight.detach().abs().max()) < before / 3  # type: ignore[operator]


def test_nonlinear_layers_between_are_noticed_and_nothing_changes() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(4, 8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"rotate_between\('0', '2'\): outputs differ by a relative .*more than rounding"
    ):
        rotate_between(model, "0", "2", x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"producer": "9"}, r"'9' is no linear layer of the model; there are \['qkv', 'v', 'out'\]"),
        ({"block": 3}, "blocks of 3 do not divide the 8 rotated outputs of v and the 16 inputs of out"),
        ({}, "blocks of 8 do not divide"),
        ({"block": 1}, "blocks of 1 do not divide"),
        ({"rows": (4, 12)}, r"rows=\(4, 12\) do not lie in the 8 outputs of v"),
    ],
)
def test_errors_say_what_to_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotate_between(Attention(), **{"producer": "v", "consumer": "out", "batch": torch.randn(1, 2, 16)} | arguments)


def test_a_quantized_model_comes_too_late() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    qat.prepare(model, qat.recipes.int2())
    with pytest.raises(ValueError, match=r"0 is quantized; rotate the float model, before prepare\(\)"):
        rotate_between(model, "0", "1", torch.randn(1, 8))
