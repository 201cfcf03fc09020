"""Properties that hold for every meaningful combination of grid, granularity, scale and gradient."""

import io
import math

import pytest
import torch
from torch import Tensor

from lightning_qat.quantization import (
    AbsMax,
    AbsMean,
    Clipped,
    ElementwiseScaling,
    FakeQuantizer,
    Gradient,
    Grid,
    HalfInt,
    Int,
    LayerSpec,
    Learned,
    LearnedSoft,
    Percentile,
    PerTensor,
    Pi,
    QuantizerSpec,
    Soft,
    StraightThrough,
)
from tests import _reference as ref
from tests.quantization.combinations import (
    GRADIENTS,
    GRIDS,
    PLACES,
    SCALES,
    SHAPE,
    build,
    is_meaningful,
    meaningful,
    reference,
    step_and_zero_point,
)

RECOMPUTED = (AbsMax(), AbsMean(), AbsMean(0.6))
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.label)


@each_grid
def test_combinations_exist_exactly_where_they_have_a_meaning(grid: Grid) -> None:
    for granularity, layout in PLACES:
        for scale in SCALES:
            for gradient in GRADIENTS:
                try:
                    spec = QuantizerSpec(grid, granularity, scale, gradient)
                    exists = LayerSpec(input=spec) if layout.is_input else LayerSpec(weight=spec)
                except ValueError:
                    exists = None
                assert bool(exists) == is_meaningful(grid, granularity, scale, layout), (granularity, scale)


@each_grid
def test_forward_is_the_formula(grid: Grid) -> None:
    """Values, codes and what the codes dequantize to, against float64."""
    x = torch.randn(*SHAPE)
    for granularity, layout, scale in meaningful(grid, SCALES):
        quantizer = build(QuantizerSpec(grid, granularity, scale), x, layout)
        step, zero_point = step_and_zero_point(quantizer, x)
        out, quantized = quantizer(x), quantizer.quantize(x)
        q = ref.quantize(x, step, zero_point, reference(grid))
        away = ref.border_distance(x.double() / step + zero_point, reference(grid)) > 1e-5
        assert away.sum() > 0.8 * x.numel()
        expected = ref.dequantize(q, step, zero_point)
        torch.testing.assert_close(out.double()[away], expected[away], rtol=3e-7, atol=0.0)
        assert torch.equal((quantized.codes + quantized.offset)[away].double(), q[away])
        assert torch.equal(quantized.dequantize(), out)
        assert out.dtype == x.dtype
        assert quantized.codes.dtype == torch.int8


def expected_input_gradient(
    gradient: Gradient, grad: Tensor, x: Tensor, step: Tensor, zero_point: Tensor, grid: Grid, *, learned: bool
) -> tuple[Tensor, Tensor]:
    """What backward must return, in float64, and where it is alive."""
    plain = reference(grid)
    lo, *_, hi = ref.levels(plain)
    u = x / step + zero_point
    inside = (u >= lo) & (u <= hi)
    clipped = inside if learned else torch.ones_like(inside)
    if isinstance(gradient, StraightThrough):
        inside = clipped
    if isinstance(gradient, Clipped) and gradient.threshold is not None:
        inside = clipped & (x.abs() <= gradient.threshold)
    if isinstance(gradient, Soft | LearnedSoft):
        grad = grad * ref.central_difference(lambda v: ref.staircase(v, gradient.temperature, plain), u)
    if isinstance(gradient, ElementwiseScaling):
        q = ref.quantize(x, step, zero_point, plain)
        grad = grad * (1 + gradient.delta * torch.sign(grad) * (u - q) / (hi - lo))
    return torch.where(inside, grad, 0.0), inside


@each_grid
def test_gradient_flows_everywhere_but_where_it_is_clipped(grid: Grid) -> None:
    """INV-1, and with it the exact gradient of every combination in float64."""
    x = torch.randn(*SHAPE, dtype=torch.float64)
    grad = torch.randn_like(x)
    for granularity, layout, scale in meaningful(grid):
        first = build(QuantizerSpec(grid, granularity, scale), x, layout)
        step, zero_point = (part.double() for part in step_and_zero_point(first, x))
        for gradient in GRADIENTS:
            quantizer = FakeQuantizer(
                QuantizerSpec(grid, granularity, scale, gradient), () if layout.is_input else SHAPE, layout
            )
            quantizer.load_state_dict(first.state_dict(), strict=not isinstance(gradient, LearnedSoft))
            latent = x.clone().requires_grad_()
            quantizer(latent).backward(grad)
            expected, alive = expected_input_gradient(
                gradient, grad, x, step, zero_point, grid, learned=quantizer.learned
            )
            assert latent.grad is not None
            torch.testing.assert_close(latent.grad, expected, rtol=1e-5, atol=1e-8)
            assert torch.equal(latent.grad != 0, alive), (granularity, scale, gradient)
            for parameter in quantizer.parameters():
                assert parameter.grad is not None
                assert torch.isfinite(parameter.grad).all()
                assert (parameter.grad != 0).all()


@pytest.mark.parametrize("bits", range(2, 6))
@pytest.mark.parametrize("k", range(2, 6))
def test_pi_step(bits: int, k: int) -> None:
    """INV-3: the step is alpha * (pi / k), exactly in float64 and as near as float32 can tell in float32."""
    x = torch.randn(*SHAPE, dtype=torch.float64)
    for granularity, layout, scale in meaningful(Pi(bits, k)):
        spec = QuantizerSpec(Pi(bits, k), granularity, scale)
        quantizer = build(spec, x, layout)
        if quantizer.stored:
            alpha = torch.as_tensor(quantizer.scale).detach()
            step = quantizer.quantize(x).scale
            assert torch.equal(step, alpha * torch.tensor(math.pi / k, dtype=torch.float32))
        elif scale == AbsMax():
            grouped = granularity.group(x, layout)
            alpha = grouped.abs().amax(granularity.dims(grouped.dim(), layout), keepdim=True) / 2 ** (bits - 1)
            assert torch.equal(quantizer.quantize(x).scale, alpha * (math.pi / k))


@pytest.mark.parametrize("bits", range(2, 6))
@pytest.mark.parametrize("k", range(2, 6))
def test_pi_with_a_rescaled_alpha_is_the_uniform_grid(bits: int, k: int) -> None:
    """The same family: all that is claimed (trap 32)."""
    x = torch.randn(*SHAPE, dtype=torch.float64)
    pi = build(QuantizerSpec(Pi(bits, k), PerTensor(), Percentile(90.0)), x)
    uniform = build(QuantizerSpec(Int(bits), PerTensor(), Percentile(90.0)), x)
    with torch.no_grad():
        uniform.scale.copy_(pi.quantize(x).scale)
    assert torch.equal(uniform(x), pi(x))


@each_grid
def test_idempotent_and_monotone_at_a_fixed_scale(grid: Grid) -> None:
    """INV-7, in every dtype; the values of a grid are its own fixed points."""
    latent, ordered = torch.randn(*SHAPE), (8 * torch.randn(64)).sort().values.reshape(8, 8)
    for granularity, layout, scale in meaningful(grid):
        if layout.is_input and granularity != PerTensor():
            continue  # never a fixed scale
        scale = Learned(scale) if scale in RECOMPUTED else scale
        quantizer = build(QuantizerSpec(grid, granularity, scale), latent, layout)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            once = quantizer(latent.to(dtype))
            assert torch.equal(quantizer(once), once), (dtype, granularity, scale)
            if granularity == PerTensor():
                assert (quantizer(ordered.to(dtype)).flatten().diff() >= 0).all(), (dtype, scale)


@each_grid
def test_odd_on_symmetric_grids(grid: Grid) -> None:
    """INV-7. A tie of a half-integer grid (zero included) rounds to even, so that it has no mirror image."""
    if -grid.lo != grid.hi:
        assert isinstance(grid, Int | Pi)
        return
    for granularity, layout, scale in meaningful(grid):
        x = torch.randn(*SHAPE)
        quantizer = build(QuantizerSpec(grid, granularity, scale), x, layout)
        step, _ = step_and_zero_point(quantizer, x)
        tie = ref.border_distance((x / step).double(), reference(grid)) == 0
        assert torch.equal(quantizer(-x)[~tie], -quantizer(x)[~tie]), (granularity, scale)
        assert isinstance(grid, HalfInt) or not tie.any()


@each_grid
def test_recomputed_scales_follow_powers_of_two(grid: Grid) -> None:
    """INV-7: FQ(x 2^n) = FQ(x) 2^n bit for bit, for scales found in the forward and for all that a search finds."""
    for granularity, layout, scale in meaningful(grid):
        x = torch.randn(*SHAPE)
        quantizer = build(QuantizerSpec(grid, granularity, scale), x, layout)
        plain = quantizer(x)
        for factor in (2.0**-20, 2.0**40):
            quantizer.find_scale(x * factor)
            assert torch.equal(quantizer(x * factor), plain * factor), (granularity, scale, factor)


@each_grid
def test_every_code_is_reached(grid: Grid) -> None:
    """INV-7 and trap 29: exactly the promised number of codes, on a ramp over lo..hi and on Gaussian data."""
    quantizer = FakeQuantizer(QuantizerSpec(grid, PerTensor(), Percentile(90.0)))
    ramp = torch.linspace(grid.lo - 1, grid.hi + 1, 4001) * grid.step_factor  # the scale is 1 before calibration
    assert sorted(set(quantizer(ramp).div(grid.step_factor).tolist())) == pytest.approx(ref.levels(reference(grid)))
    gaussian = torch.randn(1 << 16)
    quantizer.find_scale(gaussian)
    assert quantizer.quantize(gaussian).codes.unique().numel() == grid.num_levels == len(ref.levels(reference(grid)))
    assert quantizer(gaussian).unique().numel() == grid.num_levels


@each_grid
def test_saved_and_loaded_scales_are_equal_bit_for_bit(grid: Grid) -> None:
    """INV-5."""
    for granularity, layout, scale in meaningful(grid):
        x = torch.randn(*SHAPE)
        spec = QuantizerSpec(grid, granularity, scale, LearnedSoft(0.3))
        quantizer, fresh = build(spec, x, layout), FakeQuantizer(spec, () if layout.is_input else SHAPE, layout)
        buffer = io.BytesIO()
        torch.save(quantizer.state_dict(), buffer)
        buffer.seek(0)
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        saved, loaded = quantizer.state_dict(), fresh.state_dict()
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[key], loaded[key]) and saved[key].dtype == torch.float32 for key in saved)
        assert torch.equal(fresh(x), quantizer(x)), (granularity, scale)
        assert not fresh.needs_calibration
        assert not fresh.stale
        fresh.find_scale(x)  # found again from the same data
        assert all(torch.equal(saved[key], fresh.state_dict()[key]) for key in saved), (granularity, scale)
