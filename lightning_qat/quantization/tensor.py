"""Integer codes with everything needed to read them."""

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from lightning_qat.functional.levels import dequantize, narrow
from lightning_qat.quantization.granularity import Granularity, Layout
from lightning_qat.quantization.grid import Grid


@final
@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantized weight: :math:`(codes + offset - z) s`.

    Args:
        codes: int8, the shape of the weight.
        scale: float32 step, broadcastable to the grouped view of the weight (see the granularity).
        zero_point: integers as float32, the shape of scale, or None.
        offset: 0.5 for half-integer grids, else 0.
        grid: the levels.
        granularity: which elements share a scale.
        layout: which dimension of the weight is the output.
        dtype: dtype of the fake-quantized weight that this equals.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    offset: float
    grid: Grid
    granularity: Granularity
    layout: Layout = field(default_factory=Layout)
    dtype: torch.dtype = torch.float32

    def dequantize(self) -> Tensor:
        """Return the weight, equal bit for bit to the fake-quantized weight of the model."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32  # as in the forward
        levels = self.granularity.group(self.codes, self.layout).to(wide) + self.offset
        values = narrow(dequantize(levels, self.scale, self.zero_point), self.dtype)
        return self.granularity.ungroup(values, tuple(self.codes.shape), self.layout)

    @property
    def num_bytes(self) -> int:
        """Size when codes are packed at their information content, scales in float32, zero points in 8 bits."""
        zero_points = 0 if self.zero_point is None else self.zero_point.numel()
        bits = 1.6 if self.grid.num_levels == 3 else self.grid.bits_per_weight
        return int(-(-self.codes.numel() * bits // 8)) + 4 * self.scale.numel() + zero_points
