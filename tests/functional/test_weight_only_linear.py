"""The short function of layers with quantized weights alone gives, bit for bit, what the general one gives."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_qat.functional import fused_linear as fused
from lightning_qat.quantization import (
    AbsMax,
    AbsMean,
    Clipped,
    FakeQuantizer,
    Gradient,
    HalfInt,
    Int,
    Learned,
    PerChannel,
    PerGroup,
    QuantizerSpec,
    Scale,
    StraightThrough,
    Ternary,
)

GRIDS = [Int(4), Int(3, symmetric=False), HalfInt(2), Ternary()]
SCALES = [AbsMax(), AbsMean(0.7), Learned(init=AbsMax())]
COMBINATIONS = [(grid, scale) for grid in GRIDS for scale in SCALES if grid.symmetric or scale.takes_zero_point]


def results(spec: QuantizerSpec, dtype: torch.dtype, *, keep: bool, extreme: float) -> list[Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(192, 256, dtype=dtype)  # large enough for a look at the scales in the place of all values
    weight[0, 0] = extreme
    x = torch.randn(2, 3, 256, dtype=dtype)
    quantizer = FakeQuantizer(spec, (192, 256))
    quantizer.find_scale(weight)
    if spec.scale.learned:
        with torch.no_grad():
            quantizer.scale[::2].neg_()
    bias, leaves = torch.randn(192, dtype=dtype), [x, weight]
    for leaf in (*leaves, bias):
        leaf.requires_grad_()
    grouped, setting = quantizer.detached_setting(weight)
    known = fused.quantized_weight(grouped, setting, integer=False, dtype=dtype).detach() if keep else None
    y = fused.fused_linear(x, grouped, bias, setting, known=known)
    return [y, *torch.autograd.grad(y, [*leaves, bias, *quantizer.parameters()], torch.randn(2, 3, 192, dtype=dtype))]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("grid", "scale"), COMBINATIONS, ids=repr)
@pytest.mark.parametrize("rule", [StraightThrough(), Clipped()], ids=repr)
@pytest.mark.parametrize(("groups", "extreme"), [(0, 0.5), (32, 0.5), (0, torch.nan), (0, torch.inf)])
def test_value_and_gradient(
    monkeypatch: Any, keep: bool, dtype: torch.dtype, grid: Any, scale: Scale, rule: Gradient, groups: int,
    extreme: float,
) -> None:  # fmt: skip
    spec = QuantizerSpec(grid, PerGroup(groups) if groups else PerChannel(), scale, rule)
    found = results(spec, dtype, keep=keep, extreme=extreme)
    monkeypatch.setattr(fused, "fits", lambda setting: False)
    expected = results(spec, dtype, keep=keep, extreme=extreme)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_differentiated_twice() -> None:
    quantizer = FakeQuantizer(QuantizerSpec(Int(4), PerChannel(), AbsMax()), (4, 8))
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    y = fused.fused_linear(x, weight, None, quantizer.detached_setting(weight)[1])
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("shape", [(5, 13), (700, 401)])
def test_plain_formula(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(shape, dtype=torch.float64), torch.randn(2, 7, shape[1], dtype=torch.float64)
    grad = torch.randn(2, 7, shape[0], dtype=torch.float64)
    quantizer = FakeQuantizer(QuantizerSpec(Int(2), PerChannel(), AbsMean(0.66), Clipped()), shape)
    for leaf in (x, weight):
        leaf.requires_grad_()
    y = fused.fused_linear(x, weight, None, quantizer.detached_setting(weight)[1])
    grad_x, grad_weight = torch.autograd.grad(y, [x, weight], grad)
    scale = 0.66 * 2 * weight.detach().abs().mean(1, keepdim=True)
    rounded = torch.round(weight.detach() / scale).clamp(-2, 1) * scale
    inside = (weight >= -2 * scale) & (weight <= scale)
    assert 0 < inside.double().mean() < 1
    expected = x @ rounded.T, grad @ rounded, inside * (grad.flatten(0, 1).T @ x.detach().flatten(0, 1))
    for one, other in zip((y, grad_x, grad_weight), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
