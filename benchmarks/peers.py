"""What other packages make of a model: weights of its linear layers and convolutions, one scale per output channel.

Each function changes a model in place so that its layers compute with fake-quantized weights; PARQ is an optimizer and
wraps the one of the module. Peers get what their documentation recommends for a width, and learned scales where they
have them.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHT_BITS = {"int8": 8, "w8a8": 8, "int4": 4, "w4a8": 4, "int3": 3, "int2": 2, "ternary": 0, "binary": 1, "bitnet": 0}
WITH_INPUTS = ("w8a8", "w4a8", "bitnet")


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Yield the linear layers and convolutions except the head, by name."""
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Linear, nn.Conv2d) and name != "head":
            assert isinstance(module, nn.Linear | nn.Conv2d)
            yield name, module


def ste(x: Tensor, scale: Tensor, lo: float, hi: float) -> Tensor:
    """Return the straight-through estimator as papers write it down."""
    return x + (torch.clamp(torch.round(x / scale), lo, hi) * scale - x).detach()


def naive_weight(weight: Tensor, bits: int) -> Tensor:
    """Return a weight by absolute maximum per channel, or by absolute mean at ternary and binary (BitNet)."""
    magnitude = weight.detach().abs().flatten(1)
    shape = (-1, *([1] * (weight.dim() - 1)))
    if bits > 1:
        hi = 2.0 ** (bits - 1)
        return ste(weight, magnitude.amax(1).clamp(min=1e-8).view(shape) / hi, -hi, hi - 1)
    mean = magnitude.mean(1).view(shape)
    if bits == 0:
        return ste(weight, mean.clamp(min=1e-8), -1, 1)
    return weight + (torch.where(weight >= 0, mean, -mean) - weight).detach()


def naive_input(input: Tensor) -> Tensor:
    """Return an input in 8 bits by absolute maximum per token."""
    return ste(input, input.detach().abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127, -127, 127)


class NaiveLinear(nn.Linear):
    """Weights and, where asked, inputs in plain operations."""

    bits: int
    inputs: bool

    def forward(self, input: Tensor) -> Tensor:
        """Compute with fake-quantized weight."""
        return F.linear(naive_input(input) if self.inputs else input, naive_weight(self.weight, self.bits), self.bias)


class NaiveConv2d(nn.Conv2d):
    """Weights in plain operations; inputs stay in float."""

    bits: int
    inputs: bool

    def forward(self, input: Tensor) -> Tensor:
        """Compute with fake-quantized weight."""
        return self._conv_forward(input, naive_weight(self.weight, self.bits), self.bias)


def naive(model: nn.Module, width: str, example: Tensor) -> None:
    """Replace the forward of layers by one in plain operations."""
    for _, module in layers(model):
        module.__class__ = NaiveLinear if isinstance(module, nn.Linear) else NaiveConv2d
        module.bits, module.inputs = WEIGHT_BITS[width], width in WITH_INPUTS  # type: ignore[assignment]


def torchao(model: nn.Module, width: str, example: Tensor, *, learned: bool = False) -> None:
    """Quantize with ``torchao.quantization.qat``, scales recomputed or learned (its range learning)."""
    from torchao.quantization import PerAxis, quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig, initialize_fake_quantizers
    from torchao.quantization.quant_primitives import TorchAODType

    bits = WEIGHT_BITS[width]
    dtype: Any = torch.int8 if bits == 8 else getattr(TorchAODType, f"INT{bits}")
    weight = IntxFakeQuantizeConfig(
        dtype, PerAxis(0), is_symmetric=True, is_dynamic=not learned, range_learning=learned
    )
    tokens = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if width in WITH_INPUTS else None
    names = {name for name, _ in layers(model)}
    config = QATConfig(activation_config=tokens, weight_config=weight, step="prepare")
    quantize_(model, config, lambda module, name: name in names)
    if learned:
        initialize_fake_quantizers(model, (example,))


def torchao_learned(model: nn.Module, width: str, example: Tensor) -> None:
    """Quantize with torchao's range learning."""
    torchao(model, width, example, learned=True)


def _brevitas_quantizer(bits: int) -> Any:
    from brevitas.core.function_wrapper import TensorClamp
    from brevitas.inject.enum import BitWidthImplType, RestrictValueType, ScalingImplType, ScalingPerOutputType, StatsOp
    from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerChannelFloatMSE
    from brevitas.quant.base import SignedBinaryClampedConst
    from brevitas.quant.solver import WeightQuantSolver

    class Learned(Int8WeightPerChannelFloatMSE):  # the starting point is found by its own search
        scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
        narrow_range = bits == 0
        bit_width = bits or 2

    class Binary(SignedBinaryClampedConst, WeightQuantSolver):
        scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
        scaling_per_output_type = ScalingPerOutputType.CHANNEL
        scaling_stats_op = StatsOp.AVE
        scaling_min_val = 1e-10
        restrict_scaling_type = RestrictValueType.FP
        bit_width_impl_type = BitWidthImplType.CONST
        bit_width = 1
        tensor_clamp_impl = TensorClamp

    class Stats(Int8WeightPerChannelFloat):
        bit_width = bits

    return Binary if bits == 1 else Stats if bits == 8 else Learned


def brevitas(model: nn.Module, width: str, example: Tensor) -> None:
    """Replace layers by those of ``brevitas.nn`` with learned scales (8 bits: recomputed)."""
    from brevitas.nn import QuantConv2d, QuantLinear
    from brevitas.quant import Int8ActPerTensorFloat

    inputs = Int8ActPerTensorFloat if width in WITH_INPUTS else None
    quantizers = {"weight_quant": _brevitas_quantizer(WEIGHT_BITS[width]), "input_quant": inputs}
    for name, module in layers(model):
        bias = module.bias is not None
        if isinstance(module, nn.Linear):
            layer = QuantLinear(module.in_features, module.out_features, bias, **quantizers)
        else:
            layer = QuantConv2d(
                module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
                module.dilation, module.groups, module.padding_mode, bias, **quantizers,
            )  # fmt: skip
        layer.weight.data.copy_(module.weight.data)
        if module.bias is not None:
            layer.bias.data.copy_(module.bias.data)
        layer.weight_quant.init_tensor_quant()  # its search, on these weights
        owner, _, slot = name.rpartition(".")
        setattr(model.get_submodule(owner), slot, layer)


def parq(module: L.LightningModule, width: str) -> None:
    """Let ``configure_optimizers`` return torchao's PARQ prototype around the optimizer of the module."""
    from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
    from torchao.prototype.parq.quant import LSBQuantizer, TernaryUnifQuantizer, UnifQuantizer

    bits = WEIGHT_BITS[width]
    own = module.configure_optimizers

    def configure_optimizers() -> Any:
        built: Any = own()
        base, schedule = built["optimizer"], built["lr_scheduler"]["scheduler"].lr_lambdas[0]
        chosen = {id(layer.weight) for _, layer in layers(module)}
        for group in list(base.param_groups):
            quantized = [p for p in group["params"] if id(p) in chosen]
            if quantized:
                group["params"] = [p for p in group["params"] if id(p) not in chosen]
                settings = {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}
                base.add_param_group({**settings, "params": quantized, "lr": base.defaults["lr"], "quant_bits": bits})
        for group in base.param_groups:
            group["lr"] = base.defaults["lr"]
            group.pop("initial_lr", None)
        steps = int(module.trainer.estimated_stepping_batches)
        quantizer = TernaryUnifQuantizer() if bits == 0 else LSBQuantizer() if bits == 1 else UnifQuantizer()
        annealing = ProxPARQ(anneal_start=round(0.1 * steps), anneal_end=round(0.8 * steps), steepness=10)
        optimizer = QuantOptimizer(base, quantizer, annealing, quant_period=10, quant_per_channel=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()  # before PARQ takes the float weights out: gradients belong to the quantized ones
        optimizer.step()

    module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]
    module.optimizer_step = optimizer_step  # type: ignore[method-assign]


@dataclass(frozen=True)
class Peer:
    """A package and what it can do.

    Args:
        package: the distribution that must be installed; None for plain torch.
        widths: what it offers.
        convert: changes the model; None for PARQ.
        convolutions: whether it also quantizes these.
    """

    package: str | None
    widths: tuple[str, ...]
    convert: Callable[[nn.Module, str, Tensor], None] | None
    convolutions: bool = True

    @property
    def installed(self) -> bool:
        """Whether the package is there."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


_INTEGERS = ("int8", "int4", "int3", "int2", "w8a8", "w4a8")
PEERS: dict[str, Peer] = {
    "naive STE": Peer(None, tuple(WEIGHT_BITS), naive),
    "torchao": Peer("torchao", _INTEGERS, torchao, convolutions=False),
    "torchao range learning": Peer("torchao", ("int4", "int3", "int2"), torchao_learned, convolutions=False),
    "torchao PARQ": Peer("torchao", ("int4", "int3", "int2", "ternary", "binary"), None),
    "brevitas": Peer("brevitas", tuple(WEIGHT_BITS), brevitas),
}
