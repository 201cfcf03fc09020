"""A scale that was found from all values tells that none of them is NaN; then none is looked for."""

import pytest
import torch

from lightning_qat.functional.fake_quantize import Setting
from lightning_qat.quantization import (
    AbsMax,
    AbsMean,
    Binary,
    FakeQuantizer,
    Granularity,
    Grid,
    HalfInt,
    Int,
    MinimumError,
    PerChannel,
    PerGroup,
    PerTensor,
    Pi,
    QuantizerSpec,
    Scale,
    StraightThrough,
    Ternary,
)

SHAPE = (64, 256)


def setting(x: torch.Tensor, grid: Grid, scale: Scale, granularity: Granularity) -> tuple[torch.Tensor, Setting]:
    quantizer = FakeQuantizer(QuantizerSpec(grid, granularity, scale), tuple(x.shape))
    quantizer.find_scale(x)
    return quantizer.setting(x)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(32)])
@pytest.mark.parametrize(
    ("grid", "scale"),
    [
        (Int(4), AbsMax()),
        (Int(2, symmetric=False), AbsMax()),
        (Int(4, narrow=True), AbsMean()),
        (Ternary(), AbsMean()),
        (Ternary(threshold=0.7), AbsMax()),
        (Binary(), AbsMean()),
        (HalfInt(2), AbsMax()),
        (Pi(3, 4), AbsMax()),
    ],
)
def test_same_values(grid: Grid, scale: Scale, granularity: Granularity) -> None:
    x = torch.randn(SHAPE)
    grouped, fast = setting(x, grid, scale, granularity)
    assert fast.no_nan
    careful = Setting(*fast._fields)
    assert not careful.no_nan
    for values in (
        grouped,
        torch.where(grouped > 1, torch.inf, grouped),
        torch.where(grouped < -1, -torch.inf, grouped),
    ):
        assert torch.equal(fast.fake_quantized(values), careful.fake_quantized(values))
        assert torch.equal(fast.levels(values), careful.levels(values))


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(32)])
@pytest.mark.parametrize("scale", [AbsMax(), AbsMean()])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
def test_one_nan_is_seen(granularity: Granularity, scale: Scale, scale_dtype: str) -> None:
    x = torch.randn(SHAPE)
    x[5, 7] = torch.nan
    quantizer = FakeQuantizer(QuantizerSpec(Int(4), granularity, scale, scale_dtype=scale_dtype), SHAPE)
    assert not quantizer.setting(x)[1].no_nan
    assert quantizer(x).isfinite().all()


def test_one_nan_is_seen_with_a_zero_point() -> None:
    x = torch.randn(SHAPE)
    x[5, 7] = torch.nan
    _, found = setting(x, Int(4, symmetric=False), AbsMax(), PerChannel())
    assert not found.no_nan


def test_rows_of_zeros_are_looked_at() -> None:
    x = torch.randn(SHAPE)
    x[3] = 0
    assert not setting(x, Int(4), AbsMax(), PerChannel())[1].no_nan


def test_a_stored_scale_tells_nothing() -> None:
    assert not setting(torch.randn(SHAPE), Int(4), MinimumError(), PerChannel())[1].no_nan


def test_no_number_is_read_under_transforms() -> None:
    quantizer = FakeQuantizer(QuantizerSpec(Int(4), PerChannel(), AbsMax(), StraightThrough()), SHAPE)
    x = torch.randn(SHAPE)
    gradient = torch.func.grad(lambda x: quantizer(x).square().sum())
    assert torch.equal(gradient(x), 2 * quantizer(x))
