"""Quantized inputs in the form of QuantizeLinear / DequantizeLinear pairs."""

import copy
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_qat.conversion.baked_input import BAKED_INPUT, BakedInput
from lightning_qat.export.source import Source
from lightning_qat.quantization.granularity import PerTensor, PerToken
from lightning_qat.quantization.grid import Int


def with_onnx_inputs(source: Source) -> nn.Module:
    """Return a copy of the model whose 8-bit inputs are traced as QuantizeLinear / DequantizeLinear.

    Inputs of other widths or of groups keep their plain operations, which ONNX holds as they are.
    """
    model = copy.deepcopy(source.model)
    for module in model.modules():
        child = module._modules.get(BAKED_INPUT)
        if isinstance(child, BakedInput) and _fits(child):
            module._modules[BAKED_INPUT] = _LinearInput(child)
    return model


def _fits(child: BakedInput) -> bool:
    if child.spec is None or not isinstance(child.grid, Int) or child.grid.bits != 8:
        return False
    recomputed = child.scale is None
    return isinstance(child.spec.granularity, PerToken if recomputed else PerTensor)


@final
class _LinearInput(nn.Module):
    """The same numbers as the baked input, through operators that exist in ONNX only; for tracing."""

    def __init__(self, baked: BakedInput) -> None:
        super().__init__()
        self.baked = baked

    def forward(self, x: Tensor) -> Tensor:
        """Return the input as ONNX computes it."""
        for transform in self.baked.transforms:
            x = transform.input(x)  # type: ignore[operator]
        scale, zero_point = self.baked._scale(x)
        rows = scale.numel() if self.baked.scale is not None else -1
        flat = x.reshape(rows, x.numel() // scale.numel()) if rows == -1 else x
        scale = scale.reshape(-1) if rows == -1 else scale.reshape(())
        zero = torch.zeros_like(scale) if zero_point is None else zero_point.reshape(scale.shape)
        # both operators take inputs of one type; scales are float32 in training, too
        codes = _operator("QuantizeLinear", [flat.to(scale.dtype), scale, zero.to(torch.int8)], torch.int8)
        values = _operator("DequantizeLinear", [codes, scale, zero.to(torch.int8)], scale.dtype)
        return values.to(x.dtype).reshape(x.shape)


def _operator(name: str, inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
    attributes: Any = {"axis": 0} if inputs[1].dim() else {}
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=inputs[0].shape, version=21)
