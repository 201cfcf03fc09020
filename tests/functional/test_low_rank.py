"""Merging of low-rank corrections, packed bases, and the linear function that computes its weight again in backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_qat.functional.fake_quantize import Setting
from lightning_qat.functional.fused_linear import fused_linear
from lightning_qat.functional.low_rank import merge_low_rank, pack_base, unpack_base
from lightning_qat.functional.recomputed_linear import Origin, recomputed_linear
from lightning_qat.quantization import Clipped, Int, StraightThrough


@pytest.mark.parametrize("shape", [(5, 6), (4, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merged_weight(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    a, b = torch.randn(2, weight[0].numel()), torch.randn(shape[0], 2)
    keep = torch.tensor([0.0, 2.0]).repeat(weight[0].numel() // 2)
    expected = weight.double() + 0.25 * (b.double() @ (a * keep).double()).reshape(shape)
    with torch.autocast("cpu", torch.bfloat16):  # has no say here
        found = merge_low_rank(weight, a, b, 0.25, keep)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_base_is_not_written_to() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.ones(2, 2, dtype=dtype)
        merge_low_rank(weight, torch.ones(1, 2), torch.ones(2, 1), 1.0)
        assert torch.equal(weight, torch.ones(2, 2, dtype=dtype))


@pytest.mark.parametrize("shape", [(3, 128), (5, 7), (2, 3, 5)])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_base_is_the_nearest_level(shape: tuple[int, ...], bits: int) -> None:
    weight = torch.randn(shape)
    codes, scales = pack_base(weight, bits)
    largest = 2 ** (bits - 1) - 1
    assert codes.numel() * codes.element_size() == -(-weight.numel() * bits // 8)
    size = 64 if weight[0].numel() % 64 == 0 else weight[0].numel()
    groups = weight.double().reshape(shape[0], -1, size)
    step = groups.abs().amax(-1, keepdim=True) / largest
    expected = (torch.round(groups / step) * step).reshape(shape)
    torch.testing.assert_close(unpack_base(codes, scales, shape).double(), expected, rtol=1e-5, atol=1e-6)


def test_packed_base_of_zeros_and_of_other_bits() -> None:
    codes, scales = pack_base(torch.zeros(2, 3), 4)
    assert torch.equal(unpack_base(codes, scales, (2, 3)), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="bits=3 is not allowed; choose 4 or 8"):
        pack_base(torch.zeros(2, 3), 3)


def setting(weight: Tensor, *, learned: bool = False) -> Setting:
    """Absmax scales of rows at 4 bits."""
    scale = (weight.detach().abs().amax(-1, keepdim=True) / 8).requires_grad_(learned)
    rule = Clipped() if learned else StraightThrough()
    return Setting(scale, None, None, torch.tensor(-8.0), torch.tensor(7.0), Int(4), rule, learned)


def merge(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return weight + 0.5 * b @ a


def parts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, base, A and B."""
    x, weight = torch.randn(7, 6, requires_grad=True), torch.randn(5, 6)
    return x, weight, torch.randn(2, 6, requires_grad=True), torch.randn(5, 2, requires_grad=True)


@pytest.mark.parametrize("learned", [False, True])
def test_equals_the_fused_function_on_the_merged_weight(learned: bool) -> None:
    x, weight, a, b = parts()
    bias, grad = torch.randn(5, requires_grad=True), torch.randn(7, 5)
    merged = merge(weight, a, b)
    plain, ours = setting(merged, learned=learned), setting(merged, learned=learned)
    expected = fused_linear(x, merged, bias, plain)
    wanted = (x, a, b, bias, *([plain.scale] if learned else []))
    gradients = torch.autograd.grad(expected, wanted, grad)
    found = recomputed_linear(Origin(merge, (weight, a, b)), x, merged.detach(), bias, ours)
    wanted = (x, a, b, bias, *([ours.scale] if learned else []))
    assert torch.equal(found, expected)
    for one, other in zip(torch.autograd.grad(found, wanted, grad), gradients, strict=True):
        assert torch.equal(one, other)


def test_gradients_of_the_factors() -> None:
    """dB = s G A^T and dA = s B^T G, with G the gradient of the merged weight."""
    x, weight, a, b = parts()
    merged, grad = merge(weight, a, b).detach(), torch.randn(7, 5)
    recomputed_linear(Origin(merge, (weight, a, b)), x, merged, None, setting(merged)).backward(grad)
    inner = grad.double().t() @ x.detach().double()
    torch.testing.assert_close(b.grad.double(), 0.5 * inner @ a.detach().double().t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.grad.double(), 0.5 * b.detach().double().t() @ inner, rtol=1e-5, atol=1e-5)
    assert weight.grad is None


def kept(run: Callable[[], Tensor]) -> set[int]:
    """Addresses of what autograd keeps, scalars aside."""
    found: list[Tensor] = []

    def pack(tensor: Tensor) -> Any:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return {tensor.data_ptr() for tensor in found if tensor.dim()}


def test_no_weight_is_kept() -> None:
    x, weight, a, b = parts()
    merged = merge(weight, a, b).detach()
    how = setting(merged)
    found = kept(lambda: recomputed_linear(Origin(merge, (weight, a, b)), x, merged, None, how))
    assert found == {t.data_ptr() for t in (x, weight, a, b, how.scale)}


def test_frozen_factors_and_missing_gradients() -> None:
    x, weight, a, b = parts()
    a, b = a.detach(), b.detach()
    merged = merge(weight, a, b)
    recomputed_linear(Origin(merge, (weight, a, b)), x, merged, None, setting(merged)).sum().backward()
    assert x.grad is not None
    y = recomputed_linear(Origin(merge, (weight, a.requires_grad_(), b)), x, merged, None, setting(merged)).sum()
    with torch.no_grad():
        a.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
