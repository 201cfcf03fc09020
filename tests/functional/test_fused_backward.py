"""Backward of fake quantization in pieces, without masks: the numbers of the naive formula, whatever the split."""

import importlib
import math

import pytest
import torch
from torch import Tensor

from lightning_qat.functional.gradients import within
from lightning_qat.quantization import (
    AbsMax,
    Clipped,
    ElementwiseScaling,
    FakeQuantizer,
    Int,
    Learned,
    LearnedSoft,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantizerSpec,
)

implementation = importlib.import_module("lightning_qat.functional.fake_quantize")  # the name is a function's, too


def lsq_reference(x: Tensor, scale: Tensor, grad: Tensor, lo: float, hi: float) -> tuple[Tensor, Tensor]:
    """LSQ, arXiv:1902.08153, in float64: the gradients of x and of one scale per row."""
    x, scale, grad = x.double(), scale.double(), grad.double()
    u = x / scale
    inside = (u >= lo) & (u <= hi)
    slope = torch.where(inside, u.round() - u, u.round().clamp(lo, hi))
    return grad * inside, (grad * slope).sum(1, keepdim=True) / math.sqrt(x.shape[1] * hi)


@pytest.mark.parametrize("shape", [(1, 7), (13, 21), (0, 4)])
@pytest.mark.parametrize("chunk", [1, 50, 1 << 17])
def test_learned_scale_gradient_in_pieces(shape: tuple[int, int], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "_PIECE", chunk)
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    quantizer = FakeQuantizer(QuantizerSpec(Int(3), PerChannel(), Learned(init=AbsMax())), shape)
    quantizer.find_scale(x)
    with torch.no_grad():
        quantizer.scale.mul_(0.5)  # so that some values lie outside the clip range
    quantizer(x).backward(grad)
    expected_x, expected_scale = lsq_reference(x.detach(), quantizer.scale.detach(), grad, -4, 3)
    assert x.grad is not None
    assert torch.equal(x.grad.double(), expected_x)
    torch.testing.assert_close(quantizer.scale.grad.double(), expected_scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_forward_in_pieces(
    granularity: PerTensor | PerChannel | PerGroup, dtype: torch.dtype, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer = FakeQuantizer(QuantizerSpec(Int(3, symmetric=symmetric), granularity, AbsMax()), (10, 8))
    x = torch.randn(8, 10).to(dtype).t()  # not contiguous
    x[3, 5], x[4, 1] = torch.nan, torch.inf
    whole = quantizer(x)
    monkeypatch.setattr(implementation, "_PIECE", 17)
    assert torch.equal(quantizer(x), whole)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(4)])
@pytest.mark.parametrize("gradient", [Clipped(), Clipped(0.7), ElementwiseScaling(0.3), LearnedSoft(0.4)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pieces_add_up(
    granularity: PerTensor | PerChannel | PerGroup, gradient: Clipped, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = QuantizerSpec(Int(3, symmetric=symmetric), granularity, Learned(init=AbsMax()), gradient)
    x, grad = torch.randn(10, 8, requires_grad=True), torch.randn(10, 8)
    found = []
    for chunk in (17, 1 << 17):
        monkeypatch.setattr(implementation, "_PIECE", chunk)
        quantizer = FakeQuantizer(spec, (10, 8))
        x.grad = None
        quantizer.find_scale(0.6 * x)
        quantizer(x).backward(grad)
        assert x.grad is not None
        found.append([x.grad, *(parameter.grad for parameter in quantizer.parameters())])
    pieces, whole = found
    assert torch.equal(pieces[0], whole[0])
    for one, other in zip(pieces[1:], whole[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_within_keeps_the_bounds_themselves(dtype: torch.dtype) -> None:
    below, above = torch.tensor([-8.0, 7.0], dtype=dtype), torch.tensor([-math.inf, math.inf], dtype=dtype)
    u = torch.cat([torch.nextafter(below, above), below, torch.nextafter(below, -above), torch.zeros(1, dtype=dtype)])
    expected = [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert within(torch.ones_like(u), u, -8.0, 7.0).tolist() == expected
    lo, hi = torch.tensor(-8.0), torch.tensor(7.0)
    assert within(torch.ones_like(u), u, lo, hi).tolist() == expected
    assert torch.where((u >= lo) & (u <= hi), 1.0, 0.0).tolist() == expected


def test_only_wanted_gradients_are_computed() -> None:
    x = torch.randn(3, 4)
    quantizer = FakeQuantizer(QuantizerSpec(Int(3), PerTensor(), Learned(init=AbsMax())), (3, 4))
    quantizer.find_scale(x)
    quantizer(x).sum().backward()
    assert quantizer.scale.grad is not None
    quantizer.scale.requires_grad_(False)
    quantizer.scale.grad = None
    x.requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert quantizer.scale.grad is None
