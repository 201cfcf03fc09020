"""What is compared: the float model, our recipes, the straight-through estimator in plain operations, and peers."""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import (
    AbsMax,
    Int,
    LayerSpec,
    PerChannel,
    QuantizerSpec,
    Recipe,
    Rule,
    StraightThrough,
    prepare,
    recipes,
)
from lightning_qat.quantization import PerGroup, PerToken

Build = Callable[[nn.Module], nn.Module]


def _absmax(bits: int, *, inputs: bool) -> Recipe:
    weight = QuantizerSpec(Int(bits), PerChannel(), AbsMax(), StraightThrough())
    tokens = QuantizerSpec(Int(8, narrow=True), PerToken(), AbsMax(), StraightThrough()) if inputs else None
    return Recipe((Rule("*", LayerSpec(weight, tokens)),))


def _ours(recipe: Recipe, arithmetic: str = "auto") -> Build:
    def build(model: nn.Module) -> nn.Module:
        head = (Rule("head", None),) if hasattr(model, "head") and model.head is not None else ()
        prepare(model, Recipe((*head, *recipe.rules)), arithmetic=arithmetic)
        return model

    return build


def _ste(x: Tensor, scale: Tensor, lo: float, hi: float) -> Tensor:
    return x + (torch.clamp(torch.round(x / scale), lo, hi) * scale - x).detach()


class NaiveLinear(nn.Linear):
    """The straight-through estimator as papers write it down, in plain operations."""

    bits = 4
    inputs = False

    def forward(self, input: Tensor) -> Tensor:
        """Compute with fake-quantized weight, and input where asked."""
        hi = 2.0 ** (self.bits - 1)
        scale = self.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-8) / hi
        if self.inputs:
            input = _ste(input, input.detach().abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127, -127, 127)
        return F.linear(input, _ste(self.weight, scale, -hi, hi - 1), self.bias)


class NaiveLinearInputs(NaiveLinear):
    """The same with 8-bit inputs per token."""

    inputs = True


def _naive(kind: type[NaiveLinear]) -> Build:
    def build(model: nn.Module) -> nn.Module:
        for name, module in model.named_modules():
            if type(module) is nn.Linear and name != "head":
                module.__class__ = kind
        return model

    return build


def _torchao(*, inputs: bool) -> Build:
    def build(model: nn.Module) -> nn.Module:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        tokens = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if inputs else None
        weight = IntxFakeQuantizeConfig(torch.int4, group_size=32)
        config = QATConfig(activation_config=tokens, weight_config=weight, step="prepare")
        quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and name != "head")
        return model

    return build


def _brevitas(*, inputs: bool) -> Build:
    def build(model: nn.Module) -> nn.Module:
        from brevitas.nn import QuantLinear
        from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name != "head":
                layer = QuantLinear(
                    module.in_features, module.out_features, module.bias is not None,
                    weight_quant=Int8WeightPerChannelFloat, weight_bit_width=4,
                    input_quant=Int8ActPerTensorFloat if inputs else None,
                )  # fmt: skip
                owner, _, slot = name.rpartition(".")
                setattr(model.get_submodule(owner), slot, layer)
        return model

    return build


def _modelopt(config: str) -> Build:
    def build(model: nn.Module) -> nn.Module:
        import modelopt.torch.quantization as mtq

        chosen = getattr(mtq, config)
        chosen = chosen | {"quant_cfg": [*chosen["quant_cfg"], {"quantizer_name": "head.*", "enable": False}]}
        batch = model.shape.example(next(model.parameters()).device.type)
        mtq.quantize(model, chosen, lambda quantized: quantized(batch))
        return model

    return build


def variants() -> dict[str, Build]:
    """Return what can be measured here, by name; ``float`` first."""
    found: dict[str, Build] = {
        "float": lambda model: model,
        "int4 absmax": _ours(_absmax(4, inputs=False)),
        "int4 absmax group 32": _ours(
            Recipe((Rule("*", LayerSpec(QuantizerSpec(Int(4), PerGroup(32), AbsMax(), StraightThrough()))),))
        ),
        "int4 learned": _ours(recipes.int4()),
        "ternary": _ours(recipes.ternary()),
        "seq2": _ours(recipes.seq2()),
        "binary": _ours(recipes.binary()),
        "w8a8": _ours(recipes.w8a8()),
        "w8a8 simulated": _ours(recipes.w8a8(), "simulated"),
        "w8a8 integer": _ours(recipes.w8a8(), "integer"),
        "w4a8 absmax": _ours(_absmax(4, inputs=True)),
        "bitnet": _ours(recipes.bitnet()),
        "bitnet integer": _ours(recipes.bitnet(), "integer"),
        "naive int4": _naive(NaiveLinear),
        "naive w4a8": _naive(NaiveLinearInputs),
    }
    if importlib.util.find_spec("torchao"):
        found |= {"torchao int4 group 32": _torchao(inputs=False), "torchao 8da4w": _torchao(inputs=True)}
    if importlib.util.find_spec("brevitas"):
        found |= {"brevitas int4": _brevitas(inputs=False), "brevitas w4a8": _brevitas(inputs=True)}
    if importlib.util.find_spec("modelopt"):
        found["modelopt int4 group 128"] = _modelopt("INT4_BLOCKWISE_WEIGHT_ONLY_CFG")
        found["modelopt w8a8"] = _modelopt("INT8_DEFAULT_CFG")
    return found
