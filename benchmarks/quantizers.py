"""Fake quantization of one weight to 4 bits, nothing else: ours, plain operations, and that of peers."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import ste
from lightning_qat import AbsMax, FakeQuantizer, Int, Learned, PerChannel, QuantizerSpec, StraightThrough


class _Naive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ste(x, x.detach().abs().amax(1, keepdim=True).clamp(min=1e-8) / 8, -8, 7)


class _BrevitasWeight(nn.Module):
    """The quantizer of a layer's weight, which reads the weight that the layer holds: x must be that parameter."""

    def __init__(self, x: nn.Parameter, *, learned: bool) -> None:
        super().__init__()
        from brevitas.inject.enum import ScalingImplType
        from brevitas.nn import QuantLinear
        from brevitas.quant import Int8WeightPerChannelFloat

        kind = ScalingImplType.PARAMETER_FROM_STATS if learned else ScalingImplType.STATS
        self.layer = QuantLinear(
            x.shape[1], x.shape[0], False, weight_quant=Int8WeightPerChannelFloat, weight_bit_width=4,
            weight_scaling_impl_type=kind,
        )  # fmt: skip
        self.layer.weight = x
        self.layer.weight_quant.init_tensor_quant()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.quant_weight().value


def _torchao(x: nn.Parameter, **settings: Any) -> nn.Module:
    from torchao.quantization.qat import IntxFakeQuantizeConfig, initialize_fake_quantizers
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    module = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, **settings))
    if settings.get("range_learning"):
        initialize_fake_quantizers(module, (x,))
    return module


def _modelopt(**settings: Any) -> nn.Module:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    return TensorQuantizer(QuantizerAttributeConfig(num_bits=4, **settings))


def quantizers(x: nn.Parameter) -> dict[str, nn.Module]:
    """Return modules that fake-quantize a weight (rows, columns), by name; peers where they are installed.

    A scale per row unless the name says otherwise, recomputed in each call or learned.
    """
    dynamic = QuantizerSpec(Int(4), PerChannel(), AbsMax(), StraightThrough())
    learned = QuantizerSpec(Int(4), PerChannel(), Learned(init=AbsMax()))
    found: dict[str, nn.Module] = {
        "dynamic": FakeQuantizer(dynamic, tuple(x.shape)).to(x.device),
        "learned": FakeQuantizer(learned, tuple(x.shape)).to(x.device),
        "naive": _Naive(),
    }
    makers: dict[str, tuple[str, Callable[[], nn.Module]]] = {
        "torchao": ("torchao", lambda: _torchao(x, granularity="per_channel")),
        "torchao group 32": ("torchao", lambda: _torchao(x, group_size=32)),
        "torchao learned": (
            "torchao", lambda: _torchao(x, granularity="per_channel", range_learning=True, is_dynamic=False)
        ),
        "brevitas": ("brevitas", lambda: _BrevitasWeight(x, learned=False)),
        "brevitas learned": ("brevitas", lambda: _BrevitasWeight(x, learned=True)),
        "modelopt": ("modelopt", lambda: _modelopt(axis=0)),
        "modelopt group 128": ("modelopt", lambda: _modelopt(block_sizes={-1: 128})),
    }  # fmt: skip
    found |= {name: make() for name, (package, make) in makers.items() if importlib.util.find_spec(package)}
    return found
