"""Packing of small non-negative integers into bytes, without loss and without gaps."""

from typing import Final

import torch
from torch import Tensor

TRITS_PER_BYTE: Final = 5
"""Ternary digits in a byte: 3^5 = 243 of 256 values, 1.6 bits each where log2(3) = 1.585 is the least possible."""

_NUM_TRIT_BYTES: Final = 3**TRITS_PER_BYTE


def packed_size(numel: int, num_levels: int) -> int:
    """Return how many bytes :func:`pack` needs: three levels take 1.6 bits each, others whole bits.

    Args:
        numel: number of values, 0 or more.
        num_levels: 2 to 256.

    Raises:
        ValueError: a number out of range.

    >>> packed_size(10, 3), packed_size(10, 2), packed_size(10, 16)
    (2, 2, 5)
    """
    if numel < 0 or not 2 <= num_levels <= 256:
        raise ValueError(f"packed_size: numel={numel}, num_levels={num_levels}; allowed are 0 or more and 2 to 256")
    if num_levels == 3:
        return -(-numel // TRITS_PER_BYTE)
    return -(-numel * (num_levels - 1).bit_length() // 8)


def pack(values: Tensor, num_levels: int) -> Tensor:
    """Pack integers 0 .. num_levels - 1: five trits to a byte for three levels, else as few whole bits as hold them.

    Args:
        values: integers in any integer dtype and shape, read in row-major order.
        num_levels: 2 to 256.

    Returns:
        uint8 of shape [:func:`packed_size`], the same for every shape of equal order.

    Raises:
        ValueError: a value outside the range.

    >>> pack(torch.tensor([0, 1, 2, 2, 1, 0]), 3)
    tensor([156,   0], dtype=torch.uint8)
    >>> pack(torch.tensor([1, 2, 3, 0, 1]), 4)
    tensor([57,  1], dtype=torch.uint8)
    """
    least, largest = (int(values.min()), int(values.max())) if values.numel() else (0, 0)
    if least < 0 or largest >= num_levels:
        raise ValueError(
            f"pack: values from {least} to {largest} do not fit num_levels={num_levels}; "
            f"allowed are 0 to {num_levels - 1}"
        )
    size = packed_size(values.numel(), num_levels)
    return pack_trits(values)[:size] if num_levels == 3 else pack_bits(values, (num_levels - 1).bit_length())[:size]


def unpack(packed: Tensor, num_levels: int, numel: int) -> Tensor:
    """Undo :func:`pack`.

    Args:
        packed: uint8 of shape [:func:`packed_size`].
        num_levels: 2 to 256.
        numel: how many values were packed.

    Returns:
        uint8 of shape [numel].

    Raises:
        ValueError: a wrong size, or bytes that :func:`pack` never writes.

    >>> unpack(torch.tensor([156, 0], dtype=torch.uint8), 3, 6)
    tensor([0, 1, 2, 2, 1, 0], dtype=torch.uint8)
    """
    size = packed_size(numel, num_levels)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (size,):
        raise ValueError(
            f"unpack: {packed.dtype} of shape {tuple(packed.shape)} does not hold {numel} values of {num_levels} "
            f"levels, which take torch.uint8 of shape ({size},)"
        )
    values = unpack_trits(packed) if num_levels == 3 else unpack_bits(packed, (num_levels - 1).bit_length())
    values = values[:numel]
    if numel and int(values.max()) >= num_levels:
        raise ValueError(f"unpack: a value of {int(values.max())} with num_levels={num_levels}; the bytes are damaged")
    return values


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack eight values into ``bits`` bytes as one little-endian number; the last group is filled up with zeros.

    Args:
        values: integers 0 .. 2^bits - 1, any shape.
        bits: 1 to 8.

    Returns:
        uint8 of shape [ceil(numel / 8) * bits].

    >>> pack_bits(torch.tensor([1, 0, 1, 1, 0, 0, 0, 0]), 1)
    tensor([13], dtype=torch.uint8)
    """
    groups = _groups(values, 8).to(torch.int64)
    words: Tensor = (groups << (torch.arange(8, device=values.device) * bits)).sum(1, keepdim=True)
    return (words >> (torch.arange(bits, device=values.device) * 8) & 255).to(torch.uint8).flatten()


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Undo :func:`pack_bits`; values that do not fill a group come back with zeros behind them.

    Args:
        packed: uint8, one-dimensional; a cut last group is filled up with zeros.
        bits: 1 to 8.

    Returns:
        uint8 of shape [8 * groups].

    >>> unpack_bits(torch.tensor([13], dtype=torch.uint8), 1)
    tensor([1, 0, 1, 1, 0, 0, 0, 0], dtype=torch.uint8)
    """
    parts = _groups(packed, bits).to(torch.int64)
    words: Tensor = (parts << (torch.arange(bits, device=packed.device) * 8)).sum(1, keepdim=True)
    values: Tensor = words >> (torch.arange(8, device=packed.device) * bits) & (2**bits - 1)
    return values.to(torch.uint8).flatten()


def pack_trits(values: Tensor) -> Tensor:
    r"""Pack five ternary digits into a byte as :math:`\sum_i 3^i v_i`; the last group is filled up with zeros.

    Args:
        values: integers 0, 1, 2 in any shape.

    Returns:
        uint8 of shape [ceil(numel / 5)].

    >>> pack_trits(torch.tensor([1, 0, 0, 0, 2]))
    tensor([163], dtype=torch.uint8)
    """
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int32, device=values.device)
    return (_groups(values, TRITS_PER_BYTE).to(torch.int32) * powers).sum(1).to(torch.uint8)


def unpack_trits(packed: Tensor) -> Tensor:
    """Undo :func:`pack_trits`.

    Args:
        packed: uint8, one-dimensional, values below 243.

    Returns:
        uint8 of shape [5 * bytes].

    Raises:
        ValueError: a byte that no five digits make.

    >>> unpack_trits(torch.tensor([163], dtype=torch.uint8))
    tensor([1, 0, 0, 0, 2], dtype=torch.uint8)
    """
    if packed.numel() and int(packed.max()) >= _NUM_TRIT_BYTES:
        raise ValueError(f"unpack_trits: byte {int(packed.max())} holds no five trits; the largest is 242")
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int32, device=packed.device)
    digits: Tensor = packed.to(torch.int32).unsqueeze(1) // powers % 3
    return digits.to(torch.uint8).flatten()


def _groups(values: Tensor, size: int) -> Tensor:
    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).reshape(-1, size)
