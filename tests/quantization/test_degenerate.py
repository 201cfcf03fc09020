"""INV-2: scales are positive and finite, outputs and gradients finite, whatever comes in."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_qat.quantization import (
    AbsMax,
    AbsMean,
    Clipped,
    FakeQuantizer,
    Granularity,
    Grid,
    Int,
    Layout,
    Learned,
    LearnedSoft,
    MinimumError,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
    Scale,
)
from tests.quantization.combinations import FEW_GRIDS, GRADIENTS, GRIDS, INPUT, WEIGHT, build, meaningful

NAN, INF = math.nan, math.inf
ROWS = {
    "zeros": [0.0] * 8,
    "constant": [0.3] * 8,
    "negative constant": [-0.3] * 8,
    "nan": [NAN, 1.0, -2.0, 0.5, 0.0, 0.1, -0.1, 0.7],
    "inf": [INF, 1.0, -2.0, 0.5, 0.0, 0.1, -0.1, 0.7],
    "both infinities and nan": [INF, -INF, NAN, 0.5, 0.0, 0.1, -0.1, 0.7],
    "all nan": [NAN] * 8,
    "subnormal": [1e-42, -1e-42, 0.0, 1e-44, 0.0, 0.0, 0.0, 0.0],
    "huge": [3e38, -3e38, 2e38, 1e38, 0.0, 1.0, -1.0, 3e38],
    "huge in half": [65504.0, -65504.0, 43700.0, 43700.0, 43700.0, -43700.0, 43700.0, 1.0],
    "one spike": [0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0],
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE_DTYPES = ("float16", "bfloat16", "float32", "float32")  # four, so that every pair with a dtype has its turn
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.label)


def check(spec: QuantizerSpec, x: Tensor, layout: Layout) -> Tensor:
    """Forward and backward; returns the gradient with respect to x."""
    quantizer = build(spec, x, layout)
    latent = x.clone().requires_grad_()
    out = quantizer(latent)
    quantized = quantizer.quantize(x)
    context = (spec, x.dtype, x)
    assert torch.isfinite(quantized.scale).all(), context
    assert (quantized.scale > 0).all(), context
    if quantized.zero_point is not None:
        assert torch.equal(quantized.zero_point, quantized.zero_point.round().clamp(spec.grid.lo, spec.grid.hi)), (
            context
        )
    assert out.dtype == x.dtype, context
    assert torch.isfinite(out).all(), context
    assert torch.equal(quantized.dequantize(), out), context
    out.backward(torch.ones_like(out))
    assert latent.grad is not None
    for grad in (latent.grad, *(parameter.grad for parameter in quantizer.parameters())):
        assert grad is not None, context
        assert torch.isfinite(grad).all(), context
    return latent.grad


def cases(grid: Grid) -> Iterator[tuple[QuantizerSpec, torch.dtype, Layout]]:
    """Every place and scale, with dtypes and gradients that take turns."""
    for turn, (granularity, layout, scale) in enumerate(meaningful(grid)):
        gradient, scale_dtype = GRADIENTS[turn % len(GRADIENTS)], SCALE_DTYPES[turn % len(SCALE_DTYPES)]
        yield QuantizerSpec(grid, granularity, scale, gradient, scale_dtype), DTYPES[turn % len(DTYPES)], layout


@each_grid
def test_rows_of_every_kind(grid: Grid) -> None:
    everything = torch.tensor(list(ROWS.values()))
    for spec, dtype, layout in cases(grid):
        check(spec, everything.to(dtype), layout)


@pytest.mark.parametrize("grid", FEW_GRIDS, ids=lambda grid: grid.label)
@pytest.mark.parametrize("kind", ROWS)
def test_one_kind_alone(grid: Grid, kind: str) -> None:
    row = torch.tensor([ROWS[kind]])
    for spec, dtype, layout in cases(grid):
        check(spec, row.to(dtype), layout)


@each_grid
def test_gradient_is_alive_at_the_floor(grid: Grid) -> None:
    """Zeros train on, or a row that starts at zero would never leave it."""
    for turn, (granularity, layout, scale) in enumerate(meaningful(grid)):
        dtype = DTYPES[turn % len(DTYPES)]
        grad = check(QuantizerSpec(grid, granularity, scale, Clipped()), torch.zeros(4, 8, dtype=dtype), layout)
        assert (grad == 1).all(), (granularity, scale)


def test_learned_scale_leaves_zero_and_is_reflected() -> None:
    quantizer = build(QuantizerSpec(Int(4), PerTensor()), torch.randn(4, 8))
    for value, sign in ((0.0, 1.0), (-0.1, -1.0), (1e-38, 1.0)):
        with torch.no_grad():
            quantizer.scale.fill_(value)
        quantizer.zero_grad()
        x = torch.full((4, 8), 1.0)
        quantizer(x).sum().backward()
        assert isinstance(quantizer.scale, torch.nn.Parameter)
        assert quantizer.scale.grad is not None
        expected = sign * 32 * 7 / math.sqrt(32 * 7)  # every element is clipped at hi = 7
        assert quantizer.scale.grad.item() == pytest.approx(expected)


def test_learned_scale_that_is_no_number_is_replaced() -> None:
    quantizer = build(QuantizerSpec(Int(4), PerTensor()), torch.randn(4, 8))
    for value in (NAN, INF):
        with torch.no_grad():
            quantizer.scale.fill_(value)
        scale = quantizer.quantize(torch.ones(4, 8)).scale
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()
        assert torch.isfinite(quantizer(torch.ones(4, 8))).all()


def test_temperature_lives_on_outside_its_bounds() -> None:
    x = torch.randn(4, 8)
    quantizer = build(QuantizerSpec(Int(4), PerTensor(), AbsMax(), LearnedSoft(0.5)), x)
    assert quantizer.temperature is not None
    for value in (0.0, 1e-6, -0.01, 1e6, -1e20, 0.4, NAN):
        with torch.no_grad():
            quantizer.temperature.fill_(value)
        quantizer.zero_grad()
        latent = x.clone().requires_grad_()
        quantizer(latent).sum().backward()
        assert quantizer.temperature.grad is not None
        assert latent.grad is not None
        assert torch.isfinite(quantizer.temperature.grad).all()
        assert torch.isfinite(latent.grad).all()
        if abs(value) < 1.0:
            assert quantizer.temperature.grad.item() != 0, value


@pytest.mark.parametrize(
    ("shape", "granularity", "layout"),
    [
        ((4, 1), PerChannel(), WEIGHT),
        ((4, 3), PerGroup(1), WEIGHT),
        ((1, 1), PerTensor(), WEIGHT),
        ((2, 3, 1), PerToken(), INPUT),
        ((5, 4), PerGroup(1), INPUT),
        ((1,), PerTensor(), INPUT),
    ],
)
@pytest.mark.parametrize("grid", FEW_GRIDS, ids=lambda grid: grid.label)
def test_single_elements(grid: Grid, shape: tuple[int, ...], granularity: Granularity, layout: Layout) -> None:
    x = torch.randn(shape)
    for scale in (AbsMax(), Learned(AbsMax()), MinimumError()):
        if granularity in (PerToken(), PerGroup(1)) and layout.is_input and scale != AbsMax():
            continue
        spec = QuantizerSpec(grid, granularity, scale)
        check(spec, x, layout)
        if scale == MinimumError():  # one element is met exactly
            torch.testing.assert_close(build(spec, x, layout)(x), x, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("grid", FEW_GRIDS, ids=lambda grid: grid.label)
@pytest.mark.parametrize(
    ("shape", "granularity", "layout"),
    [
        ((0, 8), PerTensor(), INPUT),
        ((0, 8), PerToken(), INPUT),
        ((0, 8), PerGroup(4), INPUT),
        ((2, 0, 8), PerToken(), INPUT),
        ((0, 8), PerTensor(), WEIGHT),
        ((0, 8), PerChannel(), WEIGHT),
        ((0, 8), PerGroup(4), WEIGHT),
        ((8, 0), PerChannel(), WEIGHT),
    ],
)
def test_empty(grid: Grid, shape: tuple[int, ...], granularity: Granularity, layout: Layout) -> None:
    x = torch.empty(shape)
    for known_granularity, known_layout, scale in meaningful(grid):
        if (known_granularity, known_layout) == (granularity, layout):
            grad = check(QuantizerSpec(grid, granularity, scale, LearnedSoft(0.5)), x, layout)
            assert grad.shape == x.shape


def test_empty_batch_after_calibration_keeps_the_scale() -> None:
    quantizer = build(QuantizerSpec(Int(8), PerTensor(), Learned()), torch.randn(4, 8), INPUT)
    before = quantizer.scale.detach().clone()
    quantizer(torch.empty(0, 8)).sum().backward()
    assert torch.equal(quantizer.scale, before)
    assert isinstance(quantizer.scale, torch.nn.Parameter)
    assert quantizer.scale.grad is not None
    assert quantizer.scale.grad.item() == 0.0


@pytest.mark.parametrize("scale", [AbsMax(), AbsMean()])
def test_non_finite_values_have_a_defined_place(scale: Scale) -> None:
    """NaN goes to the level nearest to zero, infinities to the outermost levels, at stored and at computed scales."""
    x = torch.tensor([[NAN, INF, -INF, 1.0]])
    stored = build(QuantizerSpec(Int(4), PerTensor(), Learned(scale)), x)
    assert stored.quantize(x).codes.tolist() == [[0, 7, -8, 7 if scale == AbsMax() else 5]]
    assert stored.scale.item() == pytest.approx(1 / 8 if scale == AbsMax() else 2 * 0.25 / math.sqrt(7))
    computed = build(QuantizerSpec(Int(4), PerTensor(), scale), x[:, 1:])
    assert computed.quantize(x[:, 1:]).codes.tolist() == [[7, -8, 0]]


def test_scales_beyond_float32_are_bounded() -> None:
    x = torch.tensor([[1e300, -1e300, 1e290, 0.0]], dtype=torch.float64)
    for scale in (AbsMax(), MinimumError(), Learned()):
        check(QuantizerSpec(Int(4), PerTensor(), scale), x, WEIGHT)


def test_uncalibrated_quantizer_is_defined() -> None:
    quantizer = FakeQuantizer(QuantizerSpec(Int(4), PerTensor(), MinimumError()))
    assert quantizer.needs_calibration
    assert torch.equal(quantizer(torch.tensor([0.4, 9.0])), torch.tensor([0.0, 7.0]))
