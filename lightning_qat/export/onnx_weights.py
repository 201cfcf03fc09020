"""Quantized weights in the form of ONNX DequantizeLinear: integers, scale, zero point, axis, block size."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_qat.quantization.granularity import PerChannel, PerGroup
from lightning_qat.quantization.tensor import QuantizedTensor


@final
@dataclass(frozen=True, eq=False)
class LinearCodes:
    """Inputs and attributes of DequantizeLinear.

    Args:
        codes: integers; of groups [rows, columns], else the shape of the weight.
        scale: float32; a scalar, [channels], or [rows, groups].
        zero_point: integers in the shape of the scale, or None.
        axis: dimension of the scale.
        block_size: elements of a group, 0 without groups.
        onnx_type: ``INT4``, ``INT8`` or ``INT16``.
        moved_shape: the shape of the weight with its output dimension in front, of groups.
        permutation: of these dimensions, which gives back the weight.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    axis: int
    block_size: int
    onnx_type: str
    moved_shape: tuple[int, ...] = ()
    permutation: tuple[int, ...] = ()

    def dequantize(self, weight: QuantizedTensor) -> Tensor:
        """Return the weight that the numbers make, with the shape and dtype of ``weight``."""
        own = linear_codes(weight)
        levels = self.codes.float() if self.zero_point is None else self._centered(own)
        scale = self._spread(self.scale, own)
        return (levels * scale).reshape(own.moved_shape).permute(own.permutation).to(weight.dtype)

    def _centered(self, own: "LinearCodes") -> Tensor:
        assert self.zero_point is not None  # noqa: S101
        return self.codes.float() - self._spread(self.zero_point.float(), own)

    def _spread(self, value: Tensor, own: "LinearCodes") -> Tensor:
        if own.block_size:
            return value.repeat_interleave(own.block_size, 1)
        return value.reshape([-1 if d == own.axis else 1 for d in range(own.codes.dim())]) if value.dim() else value


def linear_codes(weight: QuantizedTensor) -> LinearCodes:
    r"""Return a weight for DequantizeLinear, :math:`(codes - z) s`.

    Half-integer levels become odd integers with half the step: :math:`(c + 1/2) s = (2 c + 1) (s / 2)`, exact because
    halving a float is.
    """
    codes, scale = weight.codes.to(torch.int16), weight.scale.float()
    if weight.offset:
        codes, scale = 2 * codes + 1, scale / 2
    zero_point = None if weight.zero_point is None else weight.zero_point.to(torch.int16)
    shape, axis = tuple(codes.shape), weight.layout.channel_axis or 0
    block_size, moved, permutation = 0, shape, tuple(range(len(shape)))
    if isinstance(weight.granularity, PerGroup):
        order = (axis, *(d for d in range(len(shape)) if d != axis))
        moved = tuple(shape[d] for d in order)
        permutation = tuple(order.index(d) for d in range(len(shape)))
        codes = codes.permute(order).reshape(shape[axis], -1)
        axis, block_size = 1, weight.granularity.size
        target: tuple[int, ...] = (codes.shape[0], codes.shape[1] // block_size)
    else:
        target = (shape[axis],) if isinstance(weight.granularity, PerChannel) else ()
    bits = max(int(codes.max()), -1 - int(codes.min())).bit_length() + 1 if codes.numel() else 4
    kind = "INT4" if bits <= 4 else "INT8" if bits <= 8 else "INT16"
    return LinearCodes(
        codes, scale.reshape(target), None if zero_point is None else zero_point.reshape(target), axis, block_size,
        kind, moved, permutation,
    )  # fmt: skip
