"""Low-rank corrections of a weight, and bases that are stored in few bits."""

import math
from typing import Final

import torch
from torch import Tensor

from lightning_qat.functional.packing import pack_bits, packed_size

GROUP: Final = 64
"""Neighbors in a row of a packed base that share a scale, where the length of the row is a multiple of it."""


def merge_low_rank(weight: Tensor, a: Tensor, b: Tensor, scaling: float, keep: Tensor | None = None) -> Tensor:
    r"""Return :math:`W + s\, B\, (A \odot m)` in float32, or in float64 for a float64 weight, whatever autocast says.

    Args:
        weight: W, [outputs, ...] in any floating dtype; a 16-bit one is not rounded to again.
        a: [rank, inputs], where inputs are all but the first dimension of the weight.
        b: [outputs, rank].
        scaling: s = alpha / rank.
        keep: m, [inputs], what dropout multiplies the inputs of the correction by; None for all 1.

    Source: LoRA, arXiv:2106.09685, section 4.1.

    >>> merge_low_rank(torch.zeros(2, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [3.0]]), 0.5)
    tensor([[0.5000, 1.0000],
            [1.5000, 3.0000]])
    """
    kind = weight.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return merge_low_rank(weight, a, b, scaling, keep)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    left, right = b.to(dtype), (a if keep is None else a * keep).to(dtype)
    if weight.dtype == dtype:
        return torch.addmm(weight.flatten(1), left, right, alpha=scaling).reshape(weight.shape)
    # the copy is ours: one tensor of this size instead of two
    return weight.to(dtype).flatten(1).addmm_(left, right, alpha=scaling).reshape(weight.shape)


def pack_base(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Store a weight as integers of a symmetric grid: absolute maximum per group of :data:`GROUP`, or per row.

    Args:
        weight: [outputs, ...], any floating dtype, finite.
        bits: 4 (levels -7..7, two to a byte) or 8 (-127..127).

    Returns:
        (codes, scales): codes flat, uint8 for 4 bits and int8 for 8 bits; scales float32, [outputs, groups, 1].

    Raises:
        ValueError: other bits.

    >>> codes, scales = pack_base(torch.tensor([[7.0, -3.0, 0.4, 1.0]]), 4)
    >>> codes.tolist(), scales.item(), unpack_base(codes, scales, (1, 4)).tolist()
    ([95, 152], 1.0, [[7.0, -3.0, 0.0, 1.0]])
    """
    if bits not in (4, 8):
        raise ValueError(f"pack_base: bits={bits} is not allowed; choose 4 or 8")
    rows = weight.detach().flatten(1).float()
    size = GROUP if rows.shape[1] % GROUP == 0 else rows.shape[1]
    groups, largest = rows.reshape(rows.shape[0], -1, size), 2 ** (bits - 1) - 1
    scales = (groups.abs().amax(-1, keepdim=True) / largest).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (groups / scales).round_().clamp_(-largest, largest).to(torch.int8).flatten()
    return (codes if bits == 8 else pack_bits(codes + 8, 4)[: packed_size(codes.numel(), 16)]), scales


def unpack_base(codes: Tensor, scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo :func:`pack_base`, in float32, up to the rounding to the grid.

    Args:
        codes: flat, int8 (8 bits) or uint8 (two 4-bit values to a byte).
        scales: float32, [outputs, groups, 1].
        shape: of the weight.
    """
    if codes.dtype == torch.uint8:
        values = torch.stack((codes & 15, codes >> 4), -1).flatten()[: math.prod(shape)].float().sub_(8)
    else:
        values = codes.float()
    rows = values.reshape(shape[0], scales.shape[1], -1)
    return rows.mul_(scales).reshape(shape)
