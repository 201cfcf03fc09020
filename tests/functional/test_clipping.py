"""Rules that only clip: the gradient, and the values beside it, are those of the plain formulas, bit for bit."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_qat.functional.fake_quantize import Setting
from lightning_qat.quantization import Clipped, Grid, HalfInt, Int, StraightThrough, Ternary

SHAPES = {"small": (5, 7), "odd": (257, 1031), "pieces": (600, 512), "groups": (384, 6, 128), "one row": (1, 300_000)}
GRIDS = [Ternary(), Int(2), Int(3), HalfInt(2), Int(8)]


def example(shape: tuple[int, ...], grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, scales that are powers of two, gradients; each third weight lies on a bound or just beside it."""
    torch.manual_seed(0)
    scale = 2.0 ** torch.randint(-6, 3, (*shape[:-1], 1)).to(torch.float64 if dtype == torch.float64 else torch.float32)
    u = torch.round(torch.randn(shape, dtype=scale.dtype) * grid.hi * 1024) / 1024  # exact less an offset, too
    bounds = torch.tensor([grid.lo, grid.hi], dtype=u.dtype)[torch.randint(2, shape)]
    away = torch.tensor([-math.inf, math.inf], dtype=u.dtype)[torch.randint(2, shape)]
    u = torch.where(torch.rand(shape) < 1 / 3, torch.where(torch.rand(shape) < 0.5, bounds, bounds.nextafter(away)), u)
    u.view(-1)[1:5] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    return (u * scale).to(dtype), scale, torch.randn(shape).to(dtype)


def setting(grid: Grid, scale: Tensor) -> Setting:
    lo, hi = (torch.tensor(bound) for bound in grid.bounds)
    return Setting(scale, None, None, lo, hi, grid, Clipped(), learned=False, ends=grid.bounds)


def expected(x: Tensor, scale: Tensor, grad: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """In float64, where nothing rounds: scales are powers of two."""
    u = torch.nan_to_num(x.double(), nan=0.0) / scale.double()
    passed = torch.where((grid.lo <= u) & (u <= grid.hi), grad, 0.0)
    levels = torch.round(u - grid.offset) + grid.offset
    return passed, (levels.clamp(grid.lo, grid.hi) * scale.double()).to(x.dtype)


def same(one: Tensor | None, other: Tensor) -> None:
    assert one is not None
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradient(shape: str, grid: Grid, dtype: torch.dtype) -> None:
    x, scale, grad = example(SHAPES[shape], grid, dtype)
    passed, values = expected(x, scale, grad, grid)
    found = setting(grid, scale)
    same(found.fake_quantized(x), values)
    same(found.gradients(grad, x, (True, False, False))[0], passed)
    same(replace(found, ends=None).gradients(grad, x, (True, False, False))[0], passed)
    overwritten = grad.clone()
    same(found.clip_(overwritten, x), values)
    same(overwritten, passed)


def test_without_a_look_for_nan() -> None:
    x, scale, grad = example((300, 1000), Ternary(), torch.float32)
    x = torch.nan_to_num(x, posinf=math.inf, neginf=-math.inf)
    passed, values = expected(x, scale, grad, Ternary())
    same(replace(setting(Ternary(), scale), no_nan=True).clip_(grad, x), values)
    same(grad, passed)


@pytest.mark.parametrize("numbers", [False, True])
def test_zero_point(numbers: bool) -> None:
    grid, zero_point = Int(2, symmetric=False), torch.tensor([[-1.0], [0.0], [1.0]])
    x, grad = torch.tensor([[-2.0, -1.0, 0.2, 1.0, 2.0, 3.0]]).repeat(3, 1), torch.arange(1.0, 19.0).reshape(3, 6)
    lo, hi = (torch.tensor(bound) for bound in grid.bounds)
    ends = grid.bounds if numbers else None
    found = Setting(torch.ones(3, 1), zero_point, None, lo, hi, grid, Clipped(), learned=False, ends=ends)
    passed = torch.where((x + zero_point >= grid.lo) & (x + zero_point <= grid.hi), grad, 0.0)
    same(found.gradients(grad, x, (True, False, False))[0], passed)
    same(found.clip_(grad, x), (torch.round(x) + zero_point).clamp(grid.lo, grid.hi) - zero_point)
    same(grad, passed)


def test_a_learned_scale_clips_whatever_the_rule() -> None:
    x, scale, grad = example((4, 64), Int(3), torch.float32)
    passed, _ = expected(x, scale, grad, Int(3))
    for rule in (Clipped(), StraightThrough()):
        found = replace(setting(Int(3), scale), rule=rule, learned=True)
        assert found.only_clips
        for needs in ((True, True, False), (True, False, False)):
            same(found.gradients(grad, x, needs)[0], passed)


def test_which_rules_only_clip() -> None:
    plain = setting(Int(4), torch.ones(1))
    assert plain.only_clips
    assert not replace(plain, rule=Clipped(1.0)).only_clips
    assert not replace(plain, rule=StraightThrough()).only_clips  # nothing is zero
