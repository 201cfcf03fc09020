"""What a baked layer does to its input, in plain operations."""

from typing import Any, Final, final

import torch
from torch import Tensor, nn

from lightning_qat.conversion.fused import product_dtype
from lightning_qat.conversion.inputs import on_inputs
from lightning_qat.functional.bounded import positive_scale
from lightning_qat.functional.levels import dequantize, narrow, quantize
from lightning_qat.functional.scaling import Sample
from lightning_qat.quantization.quantizer import FakeQuantizer
from lightning_qat.quantization.scale import Bounds

BAKED_INPUT: Final = "baked_input"
"""Name of the child that a baked layer with a quantized input has."""
BAKED_ARGUMENTS: Final = "_baked_arguments"
"""Where such a layer keeps the names of the forward's leading arguments that make up the input."""

INTEGER_DTYPES: Final = "_integer_dtypes"
"""Where a layer that multiplies integers keeps the dtypes of the products that they replace."""


@final
class BakedInput(nn.Module):
    """Quantizes an input with the numbers that training ended with; no gradient passes the rounding.

    Args:
        quantizer: the trained quantizer of the input, or None.
        transforms: what comes before it.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    lo: Tensor
    hi: Tensor

    def __init__(self, quantizer: FakeQuantizer | None, transforms: nn.ModuleList | None) -> None:
        super().__init__()
        self.transforms = transforms or nn.ModuleList()
        self.spec = None if quantizer is None else quantizer.spec
        if quantizer is None:
            return
        self.grid, self.layout = quantizer.grid, quantizer.layout
        scale = quantizer.scale.detach() if quantizer.stored else None
        if scale is not None and quantizer.learned:
            scale = positive_scale(scale, quantizer.spec.torch_scale_dtype)
        self.register_buffer("scale", None if scale is None else scale.clone())
        zero_point = quantizer.zero_point
        self.register_buffer("zero_point", None if zero_point is None else torch.round(zero_point.detach()))
        # Tensors as in training: accelerators divide by a number and by a tensor differently.
        self.register_buffer("lo", quantizer.lo.clone(), persistent=False)
        self.register_buffer("hi", quantizer.hi.clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input as the trained layer computes with it."""
        if self.spec is None:
            return self._transformed(x)
        levels, scale, zero_point = self.levels(x)
        values = narrow(dequantize(levels, scale, zero_point), x.dtype)
        return self.spec.granularity.ungroup(values, tuple(x.shape), self.layout)

    def _transformed(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            x = transform.input(x)  # type: ignore[operator]
        return x

    def levels(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the levels of a quantized input, grouped, with their scale and zero point."""
        assert self.spec is not None  # noqa: S101 - asked of quantized inputs only
        x = self._transformed(x)
        grouped = self.spec.granularity.group(x, self.layout)
        scale, zero_point = self._scale(grouped)
        levels = quantize(grouped, scale, zero_point, lo=self.lo, hi=self.hi, rounding=self.grid)
        return levels, scale, zero_point

    def _scale(self, grouped: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self.spec is not None  # noqa: S101 - forward() looked
        scale, zero_point = self.scale, self.zero_point
        if scale is None:
            wide = grouped if grouped.dtype == torch.float64 else grouped.float()
            dims = self.spec.granularity.dims(wide.dim(), self.layout)
            bounds = Bounds(self.grid, self.lo, self.hi, self.spec.torch_scale_dtype)
            scale, zero_point = self.spec.scale.find(Sample(wide, dims), bounds)
        factor = self.grid.step_factor
        return (scale if factor == 1.0 else scale * factor), zero_point

    def extra_repr(self) -> str:
        """Return the compact form of the spec."""
        return "" if self.spec is None else self.spec.label.replace(self.spec.grid.label, self.grid.label, 1)


def apply_baked_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of baked layers with quantized inputs; a module-level function, so that models pickle."""
    first = args[0] if args else kwargs.get("input")
    if isinstance(first, Tensor) and integer_dtype(module, first) is not None:
        return args, kwargs  # the forward quantizes its input itself
    baked_input: Any = module._modules[BAKED_INPUT]
    return on_inputs(baked_input, getattr(module, BAKED_ARGUMENTS), args, kwargs)


def integer_dtype(module: nn.Module, x: Tensor) -> torch.dtype | None:
    """Return the dtype of the result where the product of a baked layer with x runs on integers, else None.

    Not while exporting, nor where an exporter has put an input of its own in the place of ours.
    """
    if not isinstance(module._modules.get(BAKED_INPUT), BakedInput) or torch.compiler.is_exporting():
        return None
    dtypes = module.__dict__.get(INTEGER_DTYPES, ())
    dtype = product_dtype(module, x) if dtypes else None
    return dtype if dtype in dtypes else None
