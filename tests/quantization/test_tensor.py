"""INV-8 at its root: codes, scale and zero point give back exactly the values that training computes with."""

import pytest
import torch

from lightning_qat.quantization import (
    AbsMax,
    Binary,
    FakeQuantizer,
    Granularity,
    Grid,
    HalfInt,
    Int,
    Layout,
    Learned,
    MinimumError,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
    Ternary,
)
from tests.quantization.combinations import GRIDS, KINDS, build, is_meaningful

PLACES: tuple[tuple[Granularity, Layout, tuple[int, ...]], ...] = (
    (PerTensor(), Layout(0), (6, 8)),
    (PerChannel(), Layout(0), (6, 8, 3, 3)),
    (PerChannel(), Layout(1), (6, 8, 3, 3)),
    (PerGroup(9), Layout(1), (6, 8, 3, 3)),
    (PerGroup(4), Layout(0), (6, 8, 2)),
    (PerToken(), Layout(None, 3), (4, 3, 5, 5)),
    (PerGroup(4), Layout(None), (4, 3, 8)),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.label)
def test_dequantized_codes_are_the_fake_quantized_values(grid: Grid) -> None:
    lowest, highest = grid.lo - grid.offset, grid.hi - grid.offset
    for granularity, layout, shape in PLACES:
        for scale in KINDS:
            if scale == MinimumError() or not is_meaningful(grid, granularity, scale, layout):
                continue
            x = torch.randn(shape)
            quantizer = build(QuantizerSpec(grid, granularity, scale), x, layout)
            for dtype in DTYPES:
                out, quantized = quantizer(x.to(dtype)), quantizer.quantize(x.to(dtype))
                assert quantized.dequantize().dtype == out.dtype == dtype
                assert torch.equal(quantized.dequantize(), out), (granularity, layout, scale, dtype)
                assert quantized.codes.dtype == torch.int8
                assert quantized.codes.shape == x.shape
                assert lowest <= int(quantized.codes.min()) <= int(quantized.codes.max()) <= highest


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_narrow_scales(scale_dtype: str) -> None:
    x = torch.randn(6, 8)
    for grid in GRIDS:
        for scale in (AbsMax(), Learned(AbsMax())):
            quantizer = build(QuantizerSpec(grid, PerGroup(4), scale, scale_dtype=scale_dtype), x)
            assert torch.equal(quantizer.quantize(x).dequantize(), quantizer(x))


def test_a_quantized_tensor_shares_nothing_with_its_quantizer() -> None:
    x = torch.randn(4, 8)
    quantizer = build(QuantizerSpec(Int(4, symmetric=False)), x)
    quantized = quantizer.quantize(x)
    expected = quantized.dequantize()
    with torch.no_grad():
        for tensor in (*quantizer.parameters(), *quantizer.buffers()):
            tensor.fill_(7.0)
    quantizer.set_grid(Int(2, symmetric=False))
    assert torch.equal(quantized.dequantize(), expected)
    assert not quantized.scale.requires_grad
    assert quantized.grid == Int(4, symmetric=False)


@pytest.mark.parametrize(
    ("grid", "granularity", "num_bytes"),
    [
        (Int(8), PerChannel(), 4 * 100 + 4 * 4),
        (Int(4), PerTensor(), 4 * 50 + 4),
        (Int(2), PerGroup(25), 4 * 25 + 4 * 16),
        (Int(3), PerTensor(), 150 + 4),
        (Int(4, symmetric=False), PerChannel(), 4 * 50 + 4 * 4 + 4),
        (Binary(), PerTensor(), 50 + 4),
        (Ternary(), PerTensor(), 80 + 4),  # five codes in a byte
        (HalfInt(2), PerTensor(), 100 + 4),
    ],
    ids=str,
)
def test_size_when_packed(grid: Grid, granularity: Granularity, num_bytes: int) -> None:
    quantizer = FakeQuantizer(QuantizerSpec(grid, granularity, AbsMax()), (4, 100))
    assert quantizer.quantize(torch.randn(4, 100)).num_bytes == num_bytes
