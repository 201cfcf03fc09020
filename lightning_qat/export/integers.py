"""Quantized weights as plain integers times a step, for formats that know neither offsets nor our granularities."""

import torch
from torch import Tensor

from lightning_qat.quantization.granularity import PerGroup
from lightning_qat.quantization.tensor import QuantizedTensor


def as_integers(weight: QuantizedTensor) -> tuple[Tensor, Tensor]:
    r"""Return integer codes (int16) and a step in the same grouped shape, so that the weight is :math:`codes \cdot s`.

    Half-integer levels become odd integers with half the step: :math:`(c + 1/2) s = (2 c + 1) (s / 2)`, exact because
    halving a float is. Zero points are left to the caller.

    >>> from lightning_qat.quantization import HalfInt, PerTensor
    >>> tensor = QuantizedTensor(torch.tensor([[-2, 1]]), torch.tensor([0.5]), None, 0.5, HalfInt(2), PerTensor())
    >>> as_integers(tensor)
    (tensor([[-3,  3]], dtype=torch.int16), tensor([0.2500]))
    """
    codes = weight.codes.to(torch.int16)
    return (2 * codes + 1, weight.scale / 2) if weight.offset else (codes, weight.scale)


def block_scales(weight: QuantizedTensor, block: int) -> Tensor | None:
    """Return one step for each block of consecutive elements of a row, or None where blocks and scales do not fit.

    Args:
        weight: a matrix [out, in] whose output dimension comes first.
        block: elements in a block.

    Returns:
        Float of shape [out, in / block]; scales over more than a block are repeated.
    """
    shape = weight.codes.shape
    if len(shape) != 2 or weight.layout.channel_axis != 0 or shape[1] % block:
        return None
    _, scale = as_integers(weight)
    if isinstance(weight.granularity, PerGroup):
        size = weight.granularity.size
        return None if size % block else scale.reshape(shape[0], -1).repeat_interleave(size // block, 1)
    return scale.reshape(-1, 1).expand(shape[0], shape[1] // block)


def bits_of(codes: Tensor) -> int:
    """Return the width of the narrowest two's complement that holds all codes.

    >>> bits_of(torch.tensor([-8, 7])), bits_of(torch.tensor([8])), bits_of(torch.tensor([0]))
    (4, 5, 1)
    """
    if not codes.numel():
        return 1
    return max(int(codes.max()), -1 - int(codes.min())).bit_length() + 1


def is_representable(values: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a conversion to a narrower dtype and back changes nothing."""
    return torch.equal(values.to(dtype).to(values.dtype), values)
