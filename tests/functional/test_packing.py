"""Packing of codes: against arithmetic on Python and NumPy numbers, over many seeds, sizes and numbers of levels."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lightning_qat.functional import pack, packed_size, unpack


def reference_bits(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """The bits of all values behind each other, least significant first, cut into bytes."""
    stream = ((values[:, None].astype(np.int64) >> np.arange(bits)) & 1).astype(np.uint8).reshape(-1)
    return np.packbits(stream, bitorder="little")


def reference_trits(values: list[int]) -> list[int]:
    filled = values + [0] * (-len(values) % 5)
    return [sum(digit * 3**i for i, digit in enumerate(filled[k : k + 5])) for k in range(0, len(filled), 5)]


@pytest.mark.parametrize("num_levels", [2, 3, 4, 7, 8, 15, 16, 32, 64, 128, 255, 256])
def test_value(num_levels: int) -> None:
    for seed in range(100):  # 12 numbers of levels: 1200 seeds in all
        random = np.random.default_rng(seed * 1000 + num_levels)
        numbers = random.integers(0, num_levels, size=random.integers(0, 40), dtype=np.uint8)
        packed = pack(torch.from_numpy(numbers), num_levels)
        if num_levels == 3:
            assert packed.tolist() == reference_trits(numbers.tolist())
        else:
            assert packed.tolist() == reference_bits(numbers, (num_levels - 1).bit_length()).tolist()
        assert packed.numel() == packed_size(numbers.size, num_levels)
        assert unpack(packed, num_levels, numbers.size).tolist() == numbers.tolist()


@pytest.mark.parametrize(("num_levels", "bits"), [(2, 1.0), (3, 1.6), (4, 2.0), (8, 3.0), (16, 4.0), (256, 8.0)])
def test_size(num_levels: int, bits: float) -> None:
    assert packed_size(4000, num_levels) == 4000 * bits / 8
    assert packed_size(0, num_levels) == 0
    assert packed_size(1, num_levels) == 1


def test_shape_and_dtype() -> None:
    values = torch.arange(24).reshape(2, 3, 4) % 4
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int64):
        assert torch.equal(pack(values.to(dtype), 4), pack(values.flatten(), 4))
    assert unpack(pack(values, 4), 4, 24).dtype == torch.uint8
    assert torch.equal(pack(values.mT, 4), pack(values.mT.contiguous(), 4))


def test_error() -> None:
    with pytest.raises(ValueError, match="values from 0 to 4 do not fit num_levels=4; allowed are 0 to 3"):
        pack(torch.tensor([0, 4]), 4)
    with pytest.raises(ValueError, match="values from -1 to 2"):
        pack(torch.tensor([-1, 2]), 3)
    with pytest.raises(ValueError, match=r"take torch.uint8 of shape \(2,\)"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, 5)
    with pytest.raises(ValueError, match=r"torch.int8 of shape \(2,\) does not hold"):
        unpack(torch.zeros(2, dtype=torch.int8), 4, 5)
    with pytest.raises(ValueError, match="byte 243 holds no five trits"):
        unpack(torch.tensor([243], dtype=torch.uint8), 3, 5)
    with pytest.raises(ValueError, match="a value of 7 with num_levels=7; the bytes are damaged"):
        unpack(torch.tensor([7], dtype=torch.uint8), 7, 2)
    with pytest.raises(ValueError, match="num_levels=1; allowed"):
        packed_size(3, 1)
