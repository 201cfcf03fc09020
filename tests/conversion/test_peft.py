"""Layers of peft, by a stand-in of the same structure: refused by prepare(), adopted with the merged weight quantized.

The stand-in has what peft 0.21 has where it counts: class names and their modules, attributes, and the formula.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import Recipe, Rule, adopt_peft, bake, codes, float_weights, merge_lora, prepare, recipes
from lightning_qat.quantization.low_rank import LowRank
from tests.conversion.cases import network


class BaseTunerLayer:
    """What peft's layers have in common; recognized by name and module."""


BaseTunerLayer.__module__ = "peft.tuners.tuners_utils"


class Linear(nn.Module, BaseTunerLayer):
    """base_layer(x) + scaling lora_B(lora_A(dropout(x)))."""

    def __init__(self, base_layer: nn.Module, rank: int = 2, scaling: float = 1.5, bias: bool = False) -> None:
        super().__init__()
        base: Any = base_layer
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=bias)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.25)})
        self.scaling, self.active_adapters = {"default": scaling}, ["default"]
        self.lora_variant: dict[str, Any] = {}
        self.merged = self.disable_adapters = False

    def forward(self, x: Tensor) -> Tensor:
        low = self.lora_A["default"](self.lora_dropout["default"](x))
        out: Tensor = self.base_layer(x) + self.scaling["default"] * self.lora_B["default"](low)
        return out


Linear.__module__ = "peft.tuners.lora.layer"


class OtherTuner(nn.Module, BaseTunerLayer):
    """A layer of another method, such as IA3."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


def model() -> nn.Sequential:
    """Two layers of peft, in a model that is itself a part."""
    first, act, last = network()
    return nn.Sequential(Linear(first), act, Linear(last, 3))


def test_prepare_refuses() -> None:
    with pytest.raises(ValueError, match=r"^0 is a Linear layer of peft: .* Call adopt_peft\(model, recipe\) instead"):
        prepare(model(), recipes.int4())
    partly = Recipe((Rule("0.*", None), Rule("2.base_layer", None), *recipes.int4().rules))
    with pytest.raises(ValueError, match=r"^2 is a Linear layer of peft"):  # the adapters alone would be no better
        prepare(model(), partly)
    left_out = nn.ModuleDict({"peft": model(), "other": nn.Linear(6, 4)})
    prepare(left_out, Recipe((Rule("peft.*", None), *recipes.int4().rules)))
    assert list(codes(left_out)) == ["other.weight"]


@pytest.mark.parametrize("base", ["same", "int8"])
def test_adopted_models_compute_the_same_and_train_on(base: str) -> None:
    theirs, x = model(), torch.randn(5, 6)
    theirs.eval()
    expected = theirs(x)
    report = adopt_peft(theirs, recipes.int4(), base=base)
    assert {row.name for row in report if row.decision == "quantized"} == {"0.weight", "2.weight"}
    with float_weights(theirs):
        torch.testing.assert_close(theirs(x), expected, rtol=1e-5, atol=1e-6 if base == "same" else 0.02)
    parts = ("weight_quantizer.scale", "weight_quantizer_lora.a", "weight_quantizer_lora.b")
    trainable = {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{layer}.{part}" for layer in (0, 2) for part in parts}
    adapter = theirs[2].weight_quantizer_lora
    assert isinstance(adapter, LowRank)
    assert (adapter.rank, adapter.scaling, adapter.dropout) == (3, 1.5, 0.25)
    optimizer = torch.optim.Adam(theirs.train().parameters(), 1e-2)
    theirs(x).square().sum().backward()
    optimizer.step()
    theirs.eval()
    with torch.no_grad():
        trained = theirs(x)
        assert torch.equal(bake(theirs)(x), trained)
        assert merge_lora(theirs) == ("0.weight", "2.weight")
        assert torch.equal(theirs(x), trained)


def changed(**attributes: Any) -> nn.Sequential:
    """A model whose first layer is not what it should be."""
    found = model()
    vars(found[0]).update(attributes)
    return found


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (network, r"Sequential holds no layer of peft; use prepare\(\) and add_lora\(\)"),
        (lambda: nn.Sequential(OtherTuner(nn.Linear(6, 4))), "0: OtherTuner of .* is no LoRA layer"),
        (lambda: nn.Sequential(Linear(nn.Linear(6, 4), bias=True)), "0: its adapter has a bias"),
        (lambda: changed(merged=True), "0: its adapter is merged"),
        (lambda: changed(disable_adapters=True), "0: its adapter is disabled"),
        (lambda: changed(active_adapters=["default", "more"]), r"0: it has the adapters \['default'\], of which"),
        (lambda: changed(lora_variant={"default": object()}), r"0: its adapter is a variant of LoRA \(DoRA"),
    ],
)
def test_refusals(build: Any, message: str) -> None:
    built = build()
    kinds = [type(module) for module in built]
    with pytest.raises(ValueError, match=f"^adopt_peft: {message}"):
        adopt_peft(built, recipes.int4())
    assert [type(module) for module in built] == kinds


def test_every_adapted_layer_must_be_quantized() -> None:
    with pytest.raises(ValueError, match="adopt_peft: 2 has an adapter, but the recipe leaves its weight in float"):
        adopt_peft(model(), Recipe((Rule("2", None), *recipes.int4().rules)))


def test_other_base_layers() -> None:
    built = model()
    built[0].base_layer = nn.Conv1d(6, 8, 1)
    with pytest.raises(ValueError, match=r"adopt_peft: 0: its base layer is Conv1d, not nn.Linear"):
        adopt_peft(built, recipes.int4())
