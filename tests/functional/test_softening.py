"""The softened staircase: the identity at 1, rounding towards 0, PARQ's formula between."""

import pytest
import torch
from torch import Tensor

from lightning_qat.functional import fake_quantize
from lightning_qat.functional.levels import quantize
from lightning_qat.quantization import Binary, Clipped, Grid, HalfInt, Int, Pi, Ternary

GRIDS: list[Grid] = [Int(2), Int(4), Int(3, narrow=True), HalfInt(2), Ternary(), Binary(), Pi(3, 4)]
X = torch.linspace(-3, 3, 241, dtype=torch.float64)
SCALE = torch.tensor([0.37], dtype=torch.float64)


def soft(
    grid: Grid, softness: float, x: Tensor = X, zero_point: Tensor | None = None, scale: Tensor = SCALE
) -> Tensor:  # fmt: skip
    lo, hi = (torch.tensor(bound) for bound in grid.bounds)
    soft = torch.tensor(softness)
    return fake_quantize(x, scale, zero_point, lo=lo, hi=hi, rounding=grid, rule=Clipped(), softness=soft)


def reference(u: float, levels: list[float], softness: float) -> float:
    """The interval between two levels, its middle, and a line of slope 1 / softness through it."""
    if u <= levels[0] or u >= levels[-1]:
        return levels[0] if u <= levels[0] else levels[-1]
    below = max(level for level in levels if level <= u)
    above = min(level for level in levels if level > u)
    middle = (below + above) / 2
    return min(max(middle + (u - middle) / softness, below), above)


@pytest.mark.parametrize("softness", [1.0, 0.6, 0.1])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_formula(grid: Grid, softness: float) -> None:
    lo, hi = grid.bounds
    levels = [-1.0, 1.0] if isinstance(grid, Binary) else [lo + i for i in range(round(hi - lo) + 1)]
    expected = [reference(float(u), levels, softness) * float(SCALE) for u in X / SCALE]
    assert torch.allclose(soft(grid, softness), torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def in_plain_operations(x: Tensor, scale: Tensor, softness: float, grid: Grid) -> Tensor:
    """Level by level: how far past it, how much of that is left, back in the dtype of the values."""
    u = torch.nan_to_num((x if x.dtype == torch.float64 else x.float()) / scale).clamp(grid.lo, grid.hi)
    levels, rho = grid.round(u), torch.tensor(softness)
    left = ((u - levels).abs() / rho + grid.half_cell * (1 - 1 / rho)).clamp(min=0)
    return ((torch.where(u < levels, -left, left) + levels) * scale).to(x.dtype)


@pytest.mark.parametrize("softness", [1.0, 0.3, 0.07, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (300, 1001), (8, 40, 1024)])
def test_bits(shape: tuple[int, ...], grid: Grid, dtype: torch.dtype, softness: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    x.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    scale = torch.rand(*shape[:-1], 1, dtype=torch.float64 if dtype == torch.float64 else torch.float32) + 0.1
    expected = in_plain_operations(x, scale, softness, grid)
    assert torch.equal(soft(grid, softness, x, scale=scale), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does
def test_a_softness_that_is_compiled_in_no_number() -> None:
    torch.compiler.reset()
    x, scale, softness = torch.randn(6, 40), torch.rand(6, 1) + 0.1, torch.tensor(1.0)
    lo, hi = torch.tensor(-2.0), torch.tensor(1.0)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: Tensor, softness: Tensor) -> Tensor:
        return fake_quantize(x, scale, lo=lo, hi=hi, rounding=Int(2), rule=Clipped(), softness=softness)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for value in (1.0, 0.3, 0.07):
            found = compiled(x, softness.fill_(value))
            assert torch.equal(found, in_plain_operations(x, scale, value, Int(2)))


@pytest.mark.parametrize("learned", [False, True])
def test_gradients_are_those_of_hard_rounding(learned: bool) -> None:
    x, scale = torch.randn(6, 40, requires_grad=True), (torch.rand(6, 1) + 0.1).requires_grad_()
    lo, hi, grad = torch.tensor(-2.0), torch.tensor(1.0), torch.randn(6, 40)
    found = []
    for softness in (None, torch.tensor(0.3)):
        kind = {"lo": lo, "hi": hi, "rounding": Int(2), "rule": Clipped(), "learned": learned}
        y = fake_quantize(x, scale, **kind, softness=softness)  # type: ignore[arg-type]
        found.append(torch.autograd.grad(y, [x, scale] if learned else [x], grad))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_limits(grid: Grid) -> None:
    lo, hi = (bound * float(SCALE) for bound in grid.bounds)
    assert torch.allclose(soft(grid, 1.0), X.clamp(lo, hi))
    levels = quantize(X, SCALE, None, lo=grid.lo, hi=grid.hi, rounding=grid)
    borders = ((X / SCALE - levels).abs() - grid.half_cell).abs() < 1e-6
    assert torch.allclose(soft(grid, 1e-9)[~borders], (levels * SCALE)[~borders])


def test_zero_point() -> None:
    grid, zero_point = Int(2, symmetric=False), torch.ones(1, dtype=torch.float64)
    expected = [(reference(float(u) + 1, [-2.0, -1.0, 0.0, 1.0], 0.5) - 1) * float(SCALE) for u in X / SCALE]
    found = soft(grid, 0.5, zero_point=zero_point)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64))
    shifted = torch.tensor([[0.0], [1.0]], dtype=torch.float64)  # one for each channel
    both = soft(grid, 0.5, X.repeat(2, 1), shifted, SCALE.repeat(2, 1))
    assert torch.equal(both[1], found)
    assert torch.equal(both[0], soft(grid, 0.5))


def test_dtype_and_values_that_are_not_finite() -> None:
    x = torch.tensor([float("nan"), float("inf"), 0.1], dtype=torch.bfloat16)
    found = soft(Int(3), 0.5, x)
    assert found.dtype == torch.bfloat16
    assert torch.isfinite(found).all()
