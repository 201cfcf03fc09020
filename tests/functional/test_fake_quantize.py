"""The one function that computes codes, values and gradients."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_qat.functional import dequantize, fake_quantize, finish_scale, positive_scale, quantize
from lightning_qat.functional.bounded import bounded_temperature
from lightning_qat.functional.levels import narrow
from lightning_qat.functional.points import GradientRule
from lightning_qat.quantization import (
    Binary,
    Clipped,
    ElementwiseScaling,
    Grid,
    HalfInt,
    Int,
    LearnedSoft,
    Pi,
    Soft,
    StraightThrough,
    Ternary,
)
from tests import _reference as ref
from tests.quantization.combinations import FEW_GRIDS, GRADIENTS, GRIDS, reference

DOUBLE = torch.float64
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.label)


def fake(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, rule: GradientRule, *, learned: bool = False,
    temperature: Tensor | None = None,
) -> Tensor:  # fmt: skip
    lo, hi = torch.tensor(grid.lo), torch.tensor(grid.hi)
    return fake_quantize(
        x, scale, zero_point, lo=lo, hi=hi, rounding=grid, rule=rule, learned=learned, temperature=temperature
    )


def gradients(output: Tensor, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, grad)


def zero_point_of(grid: Grid) -> Tensor | None:
    return None if grid.symmetric else torch.tensor([[math.floor(grid.lo / 3)], [1.0], [0.0]], dtype=DOUBLE)


@each_grid
def test_levels_and_values(grid: Grid) -> None:
    x, scale = 3 * torch.randn(3, 400, dtype=DOUBLE), torch.tensor([[0.3], [0.7], [2.0]], dtype=DOUBLE)
    zero_point = zero_point_of(grid)
    q = quantize(x, scale, zero_point, lo=grid.lo, hi=grid.hi, rounding=grid)
    plain, shift = reference(grid), 0.0 if zero_point is None else zero_point
    expected = ref.quantize(x, scale, shift, plain)
    assert torch.equal(q, expected)
    assert set(q.flatten().tolist()) <= set(ref.levels(plain))
    assert torch.equal(dequantize(q, scale, zero_point), (expected - shift) * scale)
    assert torch.equal(fake(x, scale, zero_point, grid, StraightThrough()), (expected - shift) * scale)


def test_zero_point_is_added_after_rounding() -> None:
    """The order of ONNX QuantizeLinear: 0.5 rounds to 0, then z = 1; adding first would round 1.5 to 2."""
    grid = Int(4, symmetric=False)
    x, one = torch.tensor([0.5, 1.5, -0.5, 2.5]), torch.ones(1)
    q = quantize(x, one, one, lo=grid.lo, hi=grid.hi, rounding=grid)
    assert q.tolist() == [1.0, 3.0, 1.0, 3.0]


def test_division_is_a_division() -> None:
    """x / s and x * (1 / s) differ in some codes; only the division is what ONNX computes (trap 35)."""
    x, scale = torch.randint(1, 1 << 20, (200_000,)).float(), torch.tensor([49.0])
    by_division = quantize(x, scale, None, lo=-1e9, hi=1e9, rounding=Int(8))
    expected = torch.tensor([round(float(value)) for value in (x / 49).tolist()])
    assert torch.equal(by_division, expected.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", FEW_GRIDS, ids=lambda grid: grid.label)
def test_arithmetic_of_half_precision_is_float32(grid: Grid, dtype: torch.dtype) -> None:
    """Codes from 16-bit values are those that float64 computes from the same values; the output is 16-bit again."""
    x, scale = torch.randn(64, 64).to(dtype), torch.rand(64, 1) + 0.05
    zero_point = None if grid.symmetric else torch.full((64, 1), -2.0)
    q = quantize(x, scale, zero_point, lo=grid.lo, hi=grid.hi, rounding=grid)
    shift = 0.0 if zero_point is None else zero_point
    expected = ref.quantize(x.double(), scale.double(), shift, reference(grid))
    assert torch.equal(q.double(), expected)
    out = fake(x, scale, zero_point, grid, Clipped())
    assert out.dtype == dtype
    assert torch.equal(out, dequantize(q, scale, zero_point).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_under_autocast_is_float32(dtype: torch.dtype) -> None:
    x = torch.randn(32, 32, requires_grad=True)
    scale = (torch.rand(32, 1) + 0.05).requires_grad_()
    for grid in FEW_GRIDS:
        zero_point = None if grid.symmetric else torch.full((32, 1), -2.0)
        plain = fake(x, scale, zero_point, grid, Soft(0.3), learned=True)
        with torch.autocast("cpu", dtype=dtype):
            cast = fake(x, scale, zero_point, grid, Soft(0.3), learned=True)
        assert cast.dtype == torch.float32
        assert torch.equal(cast, plain)
        grad = torch.randn_like(x)
        for one, other in zip(gradients(cast, grad, x, scale), gradients(plain, grad, x, scale), strict=True):
            assert torch.equal(one, other)


@each_grid
def test_learned_scale_has_the_gradient_of_lsq(grid: Grid) -> None:
    """By finite differences of the surrogate, divided by sqrt(N hi) with N elements per scale (trap 30)."""
    plain, zero_point = reference(grid), zero_point_of(grid)
    x, grad = 2 * torch.randn(3, 50, dtype=DOUBLE), torch.randn(3, 50, dtype=DOUBLE)
    scale = torch.tensor([[0.9], [0.3], [0.05]], dtype=DOUBLE, requires_grad=True)
    (found,) = gradients(fake(x, scale, zero_point, grid, Clipped(), learned=True), grad, scale)
    shift = torch.zeros(1, dtype=DOUBLE) if zero_point is None else zero_point
    start = scale.detach()
    slope = ref.central_difference(lambda s: ref.lsq_surrogate(x, s, start, shift, plain), start)
    expected = (grad * slope).sum(1, keepdim=True) / math.sqrt(50 * max(ref.levels(plain)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3, 1), (1, 50), (3, 50)])
def test_number_of_elements_that_share_a_scale(shape: tuple[int, ...]) -> None:
    x, grad = torch.randn(3, 50, dtype=DOUBLE), torch.randn(3, 50, dtype=DOUBLE)
    scale = (torch.rand(shape, dtype=DOUBLE) + 0.1).requires_grad_()
    (found,) = gradients(fake(x, scale, None, Int(4), Clipped(), learned=True), grad, scale)
    assert found.shape == shape
    u = x / scale.detach()
    slope = torch.where((u >= -8) & (u <= 7), torch.round(u) - u, torch.round(u).clamp(-8, 7))
    sharing = x.numel() / max(1, scale.numel())
    expected = (grad * slope).sum_to_size(shape) / math.sqrt(sharing * 7)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_scales_that_are_not_learned_get_no_gradient() -> None:
    x, scale = torch.randn(3, 5, requires_grad=True), torch.full((3, 1), 0.2, requires_grad=True)
    out = fake(x, scale, None, Int(4), Clipped())
    assert torch.autograd.grad(out.sum(), (x, scale), allow_unused=True)[1] is None


@pytest.mark.parametrize("rule", GRADIENTS, ids=repr)
@pytest.mark.parametrize("grid", [Int(4), Int(4, symmetric=False), HalfInt(3)], ids=repr)
def test_large_tensors_have_the_gradients_of_small_ones(grid: Grid, rule: GradientRule) -> None:
    """Backward works in pieces on the CPU; every way in which scales can lie across the pieces."""
    x, grad = torch.randn(600, 300, dtype=DOUBLE), torch.randn(600, 300, dtype=DOUBLE)
    temperature = torch.tensor([0.4], dtype=DOUBLE, requires_grad=True) if isinstance(rule, LearnedSoft) else None
    for shape in ((1,), (600, 1), (1, 300)):
        scale = (torch.rand(shape, dtype=DOUBLE) + 0.1).requires_grad_()
        zero_point = None if grid.symmetric else torch.randint(-3, 3, shape).double()
        inputs = [scale] if temperature is None else [scale, temperature]
        sums = [torch.zeros_like(part) for part in inputs]
        latent = x.clone().requires_grad_()
        whole = fake(latent, scale, zero_point, grid, rule, learned=True, temperature=temperature)
        found, *found_sums = gradients(whole, grad, latent, *inputs)
        for start in range(0, 600, 100):
            rows = slice(start, start + 100)
            cut = rows if shape[0] == 600 else slice(None)
            part_scale = scale[cut]
            part_zero = None if zero_point is None else zero_point[cut]
            part = fake(latent[rows], part_scale, part_zero, grid, rule, learned=True, temperature=temperature)
            expected, *parts = gradients(part, grad[rows], latent, *inputs)
            torch.testing.assert_close(found[rows], expected[rows], rtol=1e-12, atol=1e-12)
            # each part was divided by the root of its own number of elements per parameter
            shares = (1.0 if shape[0] == 600 else 6.0, 6.0)
            for total, summand, share in zip(sums, parts, shares, strict=False):
                total += summand / math.sqrt(share)
        for one, other in zip(found_sums, sums, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("grid", [Int(4), Int(4, symmetric=False), Binary(), Ternary(), HalfInt(3), Pi(3, 4)], ids=repr)
def test_temperature_has_the_gradient_of_the_staircase(grid: Grid) -> None:
    """By finite differences over all elements, divided by sqrt(N hi) with N elements of the tensor."""
    plain, zero_point = reference(grid), zero_point_of(grid)
    x, grad = 2 * torch.randn(3, 50, dtype=DOUBLE), torch.randn(3, 50, dtype=DOUBLE)
    scale = torch.tensor([[0.9], [0.3], [0.5]], dtype=DOUBLE)
    temperature = torch.tensor([0.4], dtype=DOUBLE, requires_grad=True)
    out = fake(x, scale, zero_point, grid, LearnedSoft(0.4), temperature=temperature)
    (found,) = gradients(out, grad, temperature)
    u = x / scale + (0.0 if zero_point is None else zero_point)
    inside = (u >= grid.lo) & (u <= grid.hi)

    def total(t: Tensor) -> Tensor:
        return (grad * scale * ref.staircase(u, t, plain))[inside].sum().reshape(1)

    expected = ref.central_difference(total, temperature.detach()) / math.sqrt(150 * grid.hi)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_clip_threshold_is_in_units_of_x() -> None:
    x = torch.tensor([-0.6, -0.5, 0.0, 0.5, 0.6], requires_grad=True)
    out = fake(x, torch.tensor([10.0]), None, Int(4), Clipped(0.5))
    assert gradients(out, torch.ones(5), x)[0].tolist() == [0, 1, 1, 1, 0]


def test_clip_range_includes_its_ends() -> None:
    x = torch.tensor([-8.001, -8.0, 7.0, 7.001], requires_grad=True)
    for rule in (Clipped(), Soft(0.5), LearnedSoft(0.5), ElementwiseScaling(0.1)):
        temperature = torch.tensor([0.5]) if isinstance(rule, LearnedSoft) else None
        out = fake(x, torch.ones(1), None, Int(4), rule, temperature=temperature)
        assert (gradients(out, torch.ones(4), x)[0] != 0).tolist() == [False, True, True, False]


def saved_bytes(function: Callable[[], Tensor], known: tuple[Tensor, ...]) -> int:
    """Bytes kept for backward beyond tensors that live on anyhow."""
    addresses = {tensor.data_ptr() for tensor in known}
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in addresses:
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept)


def test_nothing_is_copied_for_backward() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    scale = torch.full((64, 1), 0.1, requires_grad=True)
    assert saved_bytes(lambda: fake(x, scale, None, Int(4), StraightThrough()), ()) == 0
    kept = saved_bytes(lambda: fake(x, scale, None, Int(4), StraightThrough()), (x,))
    assert kept == 0
    for rule in (Clipped(), Soft(0.4), ElementwiseScaling(0.1), StraightThrough()):
        bounds = 2 * 4
        assert saved_bytes(lambda rule=rule: fake(x, scale, None, Int(4), rule, learned=True), (x, scale)) == bounds  # type: ignore[misc]


def test_no_gradient_where_none_is_asked_for() -> None:
    x = torch.randn(4, 4)
    scale = torch.full((4, 1), 0.1, requires_grad=True)
    out = fake(x, scale, None, Int(4), Clipped(), learned=True)
    assert gradients(out, torch.ones(4, 4), scale)[0].shape == (4, 1)
    frozen, latent = scale.detach(), x.clone().requires_grad_()
    out = fake(latent, frozen, None, Int(4), Clipped(), learned=True)
    assert gradients(out, torch.ones(4, 4), latent)[0].shape == (4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-30, 1e-7, 0.1, 1.0, 60000.0, 1e30, 3e38, math.inf, math.nan])
def test_finished_scales_are_positive_finite_and_representable(value: float, dtype: torch.dtype) -> None:
    scale = finish_scale(torch.tensor([value]), dtype)
    assert scale.dtype == torch.float32
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert torch.equal(scale.to(dtype).float(), scale)
    info = torch.finfo(dtype)
    if 2 * info.tiny < value < info.max / 2 and value < 1e30:
        assert scale.item() == pytest.approx(value, rel=float(info.eps))


def test_positive_scale_reflects() -> None:
    raw = torch.tensor([-0.5, 0.25, 0.0, -1e-38], requires_grad=True)
    scale = positive_scale(raw)
    assert scale.tolist() == [0.5, 0.25, 2.0**-100, 2.0**-100]
    assert gradients(scale, torch.tensor([1.0, 2.0, 3.0, 4.0]), raw)[0].tolist() == [-1, 2, 3, -4]
    rounded = positive_scale(raw, torch.bfloat16)
    assert torch.equal(rounded.bfloat16().float(), rounded)
    assert gradients(rounded, torch.ones(4), raw)[0].tolist() == [-1, 1, 1, -1]


def test_bounded_temperature() -> None:
    raw = torch.tensor([-0.5, 0.0, 0.01, 1e9, -math.inf, math.nan], requires_grad=True)
    bounded = bounded_temperature(raw, 0.03, 1000.0)
    assert bounded.tolist() == pytest.approx([0.5, 0.03, 0.03, 1000.0, 1000.0, 0.03])
    assert gradients(bounded, torch.ones(6), raw)[0].abs().tolist() == [1.0] * 6


def test_half_precision_saturates() -> None:
    values = torch.tensor([1e6, -1e6, 65504.0, 1.0])
    assert narrow(values, torch.float16).tolist() == [65504.0, -65504.0, 65504.0, 1.0]
    assert narrow(values, torch.bfloat16).dtype == torch.bfloat16
    x = torch.full((4,), 65504.0, dtype=torch.float16)
    out = fake(x, torch.tensor([43000.0]), None, Int(4), Clipped())  # round(1.52) = 2 steps lie beyond 65504
    assert out.tolist() == [65504.0] * 4


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(3, requires_grad=True)
    out = fake(x, torch.ones(1), None, Int(4), Soft(0.5))
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
