"""Every way to find a scale against brute force, on tensors and on histograms."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_qat.functional.scaling import (
    GridLike,
    Sample,
    absolute_percentile,
    entropy_scale,
    minimum_error_scale,
    range_to_scale,
    signed_percentiles,
)
from lightning_qat.quantization import Binary, Grid, HalfInt, Int, Pi, Ternary
from tests import _reference as ref
from tests.quantization.combinations import GRIDS, reference

SYMMETRIC = tuple(grid for grid in GRIDS if grid.symmetric)
SEARCHED: tuple[Grid, ...] = (
    Int(2), Int(3), Int(4), Int(4, narrow=True), Binary(), Ternary(), Ternary(0.3), HalfInt(2), HalfInt(4), Pi(3, 4),
)  # fmt: skip
ASYMMETRIC: tuple[Grid, ...] = tuple(Int(bits, symmetric=False) for bits in (2, 4, 8))


def gaussian(num: int) -> Tensor:
    return torch.randn(num)


def heavy_tailed(num: int) -> Tensor:
    return torch.distributions.StudentT(3.0).sample((num,))


def one_outlier(num: int) -> Tensor:
    return torch.cat([torch.randn(num - 1), torch.tensor([100.0])])


def one_sided(num: int) -> Tensor:
    return torch.randn(num).clamp(min=0.0)


def shifted(num: int) -> Tensor:
    return torch.randn(num) + 1.5


DISTRIBUTIONS = (gaussian, heavy_tailed, one_outlier, one_sided, shifted)
each_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda f: f.__name__)


def named(grid: Grid) -> str:
    return grid.label


@pytest.mark.parametrize("grid", SYMMETRIC, ids=named)
def test_absmax_of_each_grid(grid: Grid) -> None:
    x = torch.randn(6, 10, dtype=torch.float64)
    scale, zero_point = range_to_scale(*Sample(x, (1,)).range(), grid, grid.lo, grid.hi, torch.float32)
    assert zero_point is None
    expected = ref.absmax_scale(reference(grid), x.abs().amax(1, keepdim=True))
    torch.testing.assert_close(scale, expected, rtol=1e-12, atol=0.0)


def test_absmax_in_numbers() -> None:
    """The table of the design, for amax = 1."""
    one = torch.tensor([1.0])
    cases: list[tuple[GridLike, float]] = [
        (Int(4), 1 / 8), (Int(2), 1 / 2), (Int(8), 1 / 128), (Int(4, narrow=True), 1 / 7),
        (Int(8, narrow=True), 1 / 127),
        (Ternary(), 1.0), (Binary(), 1.0), (HalfInt(2), 1 / 2), (HalfInt(4), 1 / 8), (Pi(3, 4), 1 / 4),
    ]  # fmt: skip
    for grid, expected in cases:
        scale, _ = range_to_scale(-one, one, grid, grid.lo, grid.hi, torch.float32)
        assert scale.item() == pytest.approx(expected), grid


@pytest.mark.parametrize("bits", range(2, 9))
@each_distribution
def test_zero_points_are_integers_and_zero_stays_zero(bits: int, distribution: Callable[[int], Tensor]) -> None:
    grid = Int(bits, symmetric=False)
    for x in (distribution(200), -distribution(200)):
        minimum, maximum = x.amin().reshape(1), x.amax().reshape(1)
        scale, zero_point = range_to_scale(minimum, maximum, grid, grid.lo, grid.hi, torch.float32)
        assert zero_point is not None
        assert zero_point.item() == round(zero_point.item())
        assert grid.lo <= zero_point.item() <= grid.hi
        wide = minimum.double(), maximum.double()
        expected_scale, expected_zero = ref.affine_scale(reference(grid), *wide)
        torch.testing.assert_close(scale.double(), expected_scale, rtol=1e-6, atol=0.0)
        assert (zero_point - expected_zero).abs().item() <= 1  # a rounding tie may fall to either side
        ends = torch.stack([*wide, torch.zeros(1, dtype=torch.float64)])
        q = ref.quantize(ends, scale, zero_point, reference(grid))
        error = (ref.dequantize(q, scale, zero_point) - ends).abs()
        assert error[2].item() == 0.0
        if minimum.item() < 0 < maximum.item():
            assert (error[:2] <= 1.01 * scale).all()


@pytest.mark.parametrize("percentile", [0.001, 10.0, 50.0, 97.3, 99.9, 100.0])
@pytest.mark.parametrize("num", [1, 2, 17, 400])
def test_percentiles_are_interpolated_order_statistics(percentile: float, num: int) -> None:
    x = torch.randn(3, num, dtype=torch.float64)
    sample = Sample(x, (1,))
    expected = torch.tensor([[ref.percentile(row.abs(), percentile)] for row in x], dtype=torch.float64)
    torch.testing.assert_close(absolute_percentile(sample, percentile), expected, rtol=1e-12, atol=1e-12)
    low, high = signed_percentiles(sample, percentile)
    expected = torch.tensor([[ref.percentile(row, percentile)] for row in x], dtype=torch.float64)
    torch.testing.assert_close(high, expected, rtol=1e-10, atol=1e-12)
    expected = torch.tensor([[-ref.percentile(-row, percentile)] for row in x], dtype=torch.float64)
    torch.testing.assert_close(low, expected, rtol=1e-10, atol=1e-12)


def test_percentiles_over_several_dimensions() -> None:
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    found = absolute_percentile(Sample(x, (0, 2, 3)), 75.0)
    assert found.shape == (1, 3, 1, 1)
    expected = [ref.percentile(x[:, channel].abs(), 75.0) for channel in range(3)]
    assert found.flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("grid", SEARCHED, ids=named)
@each_distribution
def test_minimum_error_is_as_low_as_brute_force_finds(grid: Grid, distribution: Callable[[int], Tensor]) -> None:
    x = distribution(2000)
    scale, zero_point = minimum_error_scale(Sample(x, (0,)), grid, torch.float32)
    assert zero_point is None
    plain = reference(grid)
    found = ref.squared_error(x, ref.step_of(plain, scale), 0.0, plain)
    widest = ref.absmax_scale(plain, x.double().abs().amax())
    factors = torch.logspace(math.log10(0.003), math.log10(2.1), 700, dtype=torch.float64)
    best = ref.least_error(x, plain, ((widest * factor, 0.0) for factor in factors))
    assert found <= 1.015 * best


@pytest.mark.parametrize("grid", ASYMMETRIC, ids=named)
@each_distribution
def test_minimum_error_of_asymmetric_grids(grid: Grid, distribution: Callable[[int], Tensor]) -> None:
    """Among ranges whose two ends shrink by the same factor."""
    x = distribution(2000)
    scale, zero_point = minimum_error_scale(Sample(x, (0,)), grid, torch.float32)
    assert zero_point is not None
    plain = reference(grid)
    found = ref.squared_error(x, scale, zero_point, plain)
    factors = torch.logspace(math.log10(0.003), math.log10(1.1), 500, dtype=torch.float64)
    ends = x.double().amin(), x.double().amax()
    best = ref.least_error(x, plain, (ref.affine_scale(plain, ends[0] * f, ends[1] * f) for f in factors))
    assert found <= (1.04 if grid == Int(8, symmetric=False) else 1.015) * best


@pytest.mark.parametrize("grid", [Int(8), Int(8, narrow=True), HalfInt(8)], ids=named)
@each_distribution
def test_minimum_error_at_eight_bits(grid: Grid, distribution: Callable[[int], Tensor]) -> None:
    """The error jumps from scale to scale where levels are many and values few."""
    x = distribution(2000)
    scale, _ = minimum_error_scale(Sample(x, (0,)), grid, torch.float32)
    plain = reference(grid)
    widest = ref.absmax_scale(plain, x.double().abs().amax())
    factors = torch.linspace(0.1, 1.05, 400, dtype=torch.float64)
    best = ref.least_error(x, plain, ((widest * factor, 0.0) for factor in factors))
    assert ref.squared_error(x, scale, 0.0, plain) <= 1.08 * best


@pytest.mark.parametrize("size", [1, 2, 7, 64, 5000])
def test_minimum_error_of_binary_is_the_mean(size: int) -> None:
    x = torch.randn(16, size) * torch.logspace(-3, 3, 16).unsqueeze(1)
    scale, _ = minimum_error_scale(Sample(x, (1,)), Binary(), torch.float32)
    torch.testing.assert_close(scale.double(), x.double().abs().mean(1, keepdim=True), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("grid", [Int(3), Int(4), HalfInt(4)], ids=named)
def test_minimum_error_is_settled(grid: Grid) -> None:
    """One more least-squares step, <x, q> / <q, q> for the codes that were found, would change next to nothing."""
    x, plain = torch.randn(300, 64), reference(grid)
    scale, _ = minimum_error_scale(Sample(x, (1,)), grid, torch.float32)
    q = ref.quantize(x, scale, 0.0, plain)
    least_squares = (x.double() * q).sum(1, keepdim=True) / q.square().sum(1, keepdim=True)
    settled, before = (ref.squared_error(x, part, 0.0, plain) for part in (least_squares, scale))
    assert settled > 0.9995 * before


@pytest.mark.parametrize("grid", SEARCHED, ids=named)
def test_minimum_error_is_never_worse_than_its_alternatives(grid: Grid) -> None:
    x = torch.randn(8, 40)
    plain = reference(grid)
    scale, _ = minimum_error_scale(Sample(x, (1,)), grid, torch.float32)
    for row, found in zip(x, scale, strict=True):
        error = ref.squared_error(row, ref.step_of(plain, found), 0.0, plain)
        for other in (ref.absmax_scale(plain, row.abs().amax()), ref.absmean_scale(plain, row.abs().mean())):
            assert error <= 1.00001 * ref.squared_error(row, ref.step_of(plain, other), 0.0, plain)


def test_searches_look_at_each_group_alone() -> None:
    """Rows found together equal rows found one by one; large tensors are searched in chunks."""
    x = torch.randn(600, 700) * torch.logspace(-3, 3, 600).unsqueeze(1)
    together, _ = minimum_error_scale(Sample(x, (1,)), Int(4), torch.float32)
    assert together.shape == (600, 1)
    for row in (0, 373, 374, 375, 599):  # around the end of the first chunk
        alone, _ = minimum_error_scale(Sample(x[row : row + 1], (1,)), Int(4), torch.float32)
        assert torch.equal(together[row : row + 1], alone)
    few = x[:4, :64]
    entropy, _ = entropy_scale(Sample(few, (1,)), Int(4), torch.float32)
    for row in range(4):
        assert torch.equal(
            entropy[row : row + 1], entropy_scale(Sample(few[row : row + 1], (1,)), Int(4), torch.float32)[0]
        )


@pytest.mark.parametrize("grid", [Int(3), Int(4), Int(4, narrow=True), HalfInt(3), Ternary(0.3), Pi(3, 3)], ids=named)
@each_distribution
def test_entropy_finds_the_least_divergence(grid: Grid, distribution: Callable[[int], Tensor]) -> None:
    x = distribution(3000)
    scale, _ = entropy_scale(Sample(x, (0,)), grid, torch.float32)
    plain = reference(grid)
    widest = ref.absmax_scale(plain, x.double().abs().amax())
    candidates = [float(ref.step_of(plain, widest * 2 ** (-k / 4))) for k in range(21)]
    best = min(ref.divergence(x, step, plain) for step in candidates)
    assert ref.divergence(x, float(ref.step_of(plain, scale.double())), plain) <= best * 1.01 + 1e-9


def test_entropy_ignores_zeros() -> None:
    """Half the values after a ReLU are zero; they must not pull the scale down to the smallest candidate."""
    x = torch.randn(20_000).clamp(min=0.0)
    scale, _ = entropy_scale(Sample(x, (0,)), Int(4), torch.float32)
    absmax = x.max() / 8
    assert 0.4 < (scale / absmax).item() <= 1.0


@pytest.mark.parametrize("grid", [*SEARCHED, *ASYMMETRIC], ids=named)
def test_a_histogram_gives_nearly_the_scale_of_its_values(grid: Grid) -> None:
    """Counts stand for repeated values: the same scale as from the values themselves."""
    values = torch.randn(60).repeat_interleave(torch.randint(1, 6, (60,)))
    unique, counts = values.unique(return_counts=True)
    limits = values.amin().reshape(1), values.amax().reshape(1)
    histogram, plain = Sample(unique, (0,), counts.double(), limits), Sample(values, (0,))
    for search in (minimum_error_scale, entropy_scale):
        if isinstance(grid, Binary) and search is entropy_scale:
            continue
        found, zero = search(histogram, grid, torch.float32)
        expected, expected_zero = search(plain, grid, torch.float32)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)
        assert found.dtype == torch.float32
        assert (zero is None) == (expected_zero is None) == grid.symmetric
    torch.testing.assert_close(histogram.mean(), plain.mean())
    assert all(torch.equal(*pair) for pair in zip(histogram.range(), plain.range(), strict=True))
