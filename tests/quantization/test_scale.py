"""Scales as pieces of a quantizer: what each finds, when it is found, and in which dtype it is stored."""

import math

import pytest
import torch
from torch import Tensor

from lightning_qat.quantization import (
    AbsMax,
    AbsMean,
    Binary,
    Clipped,
    FakeQuantizer,
    Grid,
    HalfInt,
    Int,
    Learned,
    MinimumError,
    MovingAverage,
    Percentile,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Pi,
    QuantizerSpec,
    Scale,
    Ternary,
)
from tests import _reference as ref
from tests.quantization.combinations import FEW_GRIDS, GRIDS, INPUT, STARTS, build, is_meaningful, meaningful, reference

SYMMETRIC = tuple(grid for grid in GRIDS if grid.symmetric)


def found(grid: Grid, scale: Scale, x: Tensor) -> Tensor:
    """The scale per row, before the factor of a Pi grid."""
    quantizer = build(QuantizerSpec(grid, PerChannel(), Learned(scale)), x)
    return torch.as_tensor(quantizer.scale).detach()


@pytest.mark.parametrize("grid", SYMMETRIC, ids=lambda grid: grid.label)
def test_scales_of_rows(grid: Grid) -> None:
    x, plain = torch.randn(6, 40), reference(grid)
    wide = x.double().abs()
    expected = {
        AbsMax(): ref.absmax_scale(plain, wide.amax(1, keepdim=True)),
        MovingAverage(0.5): ref.absmax_scale(plain, wide.amax(1, keepdim=True)),  # a weight is one batch
        AbsMean(): ref.absmean_scale(plain, wide.mean(1, keepdim=True)),
        AbsMean(0.6): 0.6 * ref.absmean_scale(plain, wide.mean(1, keepdim=True)),
        Percentile(97.0): ref.absmax_scale(plain, torch.tensor([[ref.percentile(row, 97.0)] for row in wide])),
        Percentile(100): ref.absmax_scale(plain, wide.amax(1, keepdim=True)),
    }
    for scale, value in expected.items():
        torch.testing.assert_close(found(grid, scale, x).double(), value.double(), rtol=1e-6, atol=0.0)


def test_percentiles_of_asymmetric_grids_cut_both_tails() -> None:
    x, grid = torch.randn(1, 1000) + 1.0, Int(4, symmetric=False)
    quantizer = build(QuantizerSpec(grid, PerTensor(), Percentile(95.0)), x)
    ends = -ref.percentile(-x, 95.0), ref.percentile(x, 95.0)
    scale, zero_point = ref.affine_scale(reference(grid), *(torch.tensor(end, dtype=torch.float64) for end in ends))
    assert quantizer.zero_point is not None
    assert torch.as_tensor(quantizer.scale).item() == pytest.approx(scale.item(), rel=1e-5)
    assert quantizer.zero_point.item() == zero_point.item()


@pytest.mark.parametrize("scale", [AbsMax(), AbsMean()])
def test_recomputed_scales_follow_the_tensor_and_hold_no_state(scale: Scale) -> None:
    quantizer = FakeQuantizer(QuantizerSpec(Int(4), PerTensor(), scale), (2, 3))
    assert not list(quantizer.parameters())
    assert not list(quantizer.buffers())
    assert not quantizer.needs_calibration
    x = torch.randn(2, 3)
    assert torch.equal(quantizer(4 * x), 4 * quantizer(x))


@pytest.mark.parametrize("scale", [Percentile(), MinimumError(), MovingAverage(), Learned()])
def test_stored_scales_stay(scale: Scale) -> None:
    x = torch.randn(2, 30)
    quantizer = build(QuantizerSpec(Int(4), PerTensor(), scale), x)
    before = torch.as_tensor(quantizer.scale).detach().clone()
    for mode in (True, False):
        quantizer.train(mode)
        quantizer(100 * x)
    assert torch.equal(torch.as_tensor(quantizer.scale).detach(), before)
    assert quantizer.quantize(100 * x).codes.unique().numel() <= 16


def test_weights_find_their_scale_at_first_use_and_inputs_wait_for_calibration() -> None:
    x, spec = torch.randn(4, 8), QuantizerSpec(Int(4), PerTensor())
    lazy, eager = FakeQuantizer(spec, (4, 8)), build(spec, x)
    assert lazy.needs_calibration
    with torch.inference_mode():  # Lightning's sanity check comes before training
        lazy(x)
    assert not lazy.needs_calibration
    assert torch.equal(lazy(x), eager(x))
    lazy(x).sum().backward()
    assert isinstance(lazy.scale, torch.nn.Parameter)
    assert lazy.scale.grad is not None
    waiting = FakeQuantizer(spec, (), INPUT)
    waiting(x)
    assert waiting.needs_calibration


@pytest.mark.parametrize("grid", FEW_GRIDS, ids=lambda grid: grid.label)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_for_narrow_storage(grid: Grid, dtype: str) -> None:
    """The forward uses a scale that the storage dtype can hold; the parameter behind it trains in float32."""
    x = torch.randn(4, 8)
    for granularity, layout, scale in meaningful(grid):
        spec = QuantizerSpec(grid, granularity, scale, Clipped(), dtype)
        quantizer = build(spec, x, layout)
        if not isinstance(grid, Pi):
            stored = quantizer.quantize(x).scale
            assert torch.equal(stored.to(spec.torch_scale_dtype).float(), stored), (granularity, scale)
        if quantizer.learned:
            assert isinstance(quantizer.scale, torch.nn.Parameter)
            with torch.no_grad():
                quantizer.scale.mul_(1.0 + 1e-5)  # lost in 16 bits, kept in the parameter
            assert not torch.equal(quantizer.scale, quantizer.scale.to(spec.torch_scale_dtype).float())
            quantizer(x).square().sum().backward()
            assert quantizer.scale.grad is not None
            assert (quantizer.scale.grad != 0).all()
            kept = quantizer.quantize(x).scale / grid.step_factor
            torch.testing.assert_close(kept.to(spec.torch_scale_dtype).float(), kept, rtol=2e-7, atol=0.0)


def test_float16_scales_neither_vanish_nor_overflow() -> None:
    for magnitude in (1e-9, 1e9):
        x = magnitude * torch.randn(4, 8)
        for scale in (AbsMax(), AbsMean(), MinimumError(), Learned()):
            stored = build(QuantizerSpec(Int(4), PerGroup(4), scale, scale_dtype="float16"), x).quantize(x).scale
            assert torch.isfinite(stored.half()).all()
            assert (stored.half() > 0).all()
            assert torch.equal(stored.half().float(), stored)


@pytest.mark.parametrize(("scale", "start"), [(Learned(start), start) for start in STARTS], ids=repr)
def test_learned_scales_start_where_their_init_says(scale: Scale, start: Scale) -> None:
    x = torch.randn(4, 8)
    for grid in FEW_GRIDS:
        if not is_meaningful(grid, PerChannel(), scale, build(QuantizerSpec(Int(4)), x).layout):
            continue
        learned = build(QuantizerSpec(grid, PerChannel(), scale), x).quantize(x)
        plain = build(QuantizerSpec(grid, PerChannel(), start), x).quantize(x)
        assert torch.equal(learned.scale, plain.scale)
        assert torch.equal(learned.codes, plain.codes)


def test_training_a_learned_scale_lowers_the_error() -> None:
    """LSQ's gradient descends: from a start twice too large, the error falls to near that of a search."""
    x = torch.randn(8, 64)
    spec = QuantizerSpec(Int(3), PerChannel(), Learned(AbsMax()))
    quantizer, searched = build(spec, x), build(QuantizerSpec(Int(3), PerChannel(), MinimumError()), x)
    with torch.no_grad():
        torch.as_tensor(quantizer.scale).mul_(2.0)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (quantizer(x) - x).square().sum().backward()
        optimizer.step()
    error = [(part(x) - x).square().sum().item() for part in (quantizer, searched)]
    assert error[0] < 1.1 * error[1]


@pytest.mark.parametrize(
    ("grid", "mean_scale"),
    [(Ternary(), 0.8), (Binary(), 0.8), (Int(4), 2 * 0.8 / math.sqrt(7)), (HalfInt(2), 2 * 0.8 / math.sqrt(1.5))],
    ids=repr,
)
def test_absmean_in_numbers(grid: Grid, mean_scale: float) -> None:
    x = torch.tensor([[0.5, -0.7, 1.2, -0.8]])
    quantizer = FakeQuantizer(QuantizerSpec(grid, PerToken(), AbsMean()), (), INPUT)
    assert quantizer.quantize(x).scale.item() == pytest.approx(mean_scale)
