"""The fused linear function against naive formulas: values, gradients, what is kept for backward, splits of a batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_qat.functional.fake_quantize import Setting
from lightning_qat.functional.fused_linear import fused_linear
from lightning_qat.quantization import Clipped, HalfInt, Int, StraightThrough
from lightning_qat.quantization.gradient import Gradient
from lightning_qat.quantization.grid import Grid

INT8 = Int(8, narrow=True)


def setting(x: Tensor, grid: Grid, rule: Gradient | None = None, *, learned: bool = False) -> Setting:
    """Absmax scales of the last dimension."""
    scale = x.detach().abs().amax(-1, keepdim=True) / grid.hi if x.numel() else x.new_ones(*x.shape[:-1], 1)
    scale = scale.float() if x.dtype != torch.float64 else scale
    lo, hi = torch.tensor(grid.lo), torch.tensor(grid.hi)
    return Setting(scale.requires_grad_(learned), None, None, lo, hi, grid, rule or StraightThrough(), learned)


def quantized(x: Tensor, how: Setting) -> Tensor:
    """The naive formula in float64, for integer and half-integer grids."""
    offset = 0.5 if isinstance(how.rounding, HalfInt) else 0.0
    scale = how.scale.detach().double()
    codes = (torch.round(x.detach() / how.scale.detach() - offset) + offset).clamp(how.lo, how.hi)
    return codes.double() * scale


SHAPES = [(5, 7, 3), (1, 1, 1), (0, 6, 2), (33, 130, 17)]


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", [Int(4), HalfInt(2)])
def test_value_and_gradient(shape: tuple[int, int, int], grid: Grid, integer: bool) -> None:
    tokens, features, outputs = shape
    x, w = torch.randn(tokens, features, requires_grad=True), torch.randn(outputs, features, requires_grad=True)
    bias, grad = torch.randn(outputs, requires_grad=True), torch.randn(tokens, outputs)
    of_x, of_w = setting(x, INT8), setting(w, grid)
    y = fused_linear(x, w, bias, of_w, of_x, integer=integer)
    y.backward(grad)
    x_hat, w_hat = quantized(x, of_x), quantized(w, of_w)
    bound = {"rtol": 1e-5, "atol": 1e-6 * features}
    torch.testing.assert_close(y.double(), x_hat @ w_hat.t() + bias.detach().double(), **bound)
    torch.testing.assert_close(x.grad.double(), grad.double() @ w_hat, **bound)
    torch.testing.assert_close(w.grad.double(), grad.double().t() @ x_hat, **bound)
    torch.testing.assert_close(bias.grad.double(), grad.double().sum(0), **bound)


def test_integer_product_is_nearer_to_the_exact_one_than_floats() -> None:
    x, w = torch.randn(64, 2000), torch.randn(48, 2000)
    of_x, of_w = setting(x, INT8), setting(w, INT8)
    exact = quantized(x, of_x) @ quantized(w, of_w).t()
    errors = [(fused_linear(x, w, None, of_w, of_x, integer=i) - exact).abs().max().item() for i in (True, False)]
    assert errors[0] < 0.5 * errors[1]
    assert errors[0] <= 3 * 2**-24 * exact.abs().max().item()


def test_integer_results_do_not_depend_on_the_split_of_a_batch() -> None:
    x, w = torch.randn(9, 4, 50), torch.randn(6, 50)
    of_w = setting(w, Int(4))
    whole = fused_linear(x, w, None, of_w, setting(x, INT8), integer=True)
    parts = [fused_linear(part, w, None, of_w, setting(part, INT8), integer=True) for part in x.split([1, 5, 3])]
    assert torch.equal(whole, torch.cat(parts))
    one = fused_linear(x[0, 0], w, None, of_w, setting(x[0, 0], INT8), integer=True)
    assert torch.equal(one, whole[0, 0])


@pytest.mark.parametrize("integer", [False, True])
def test_non_contiguous_operands(integer: bool) -> None:
    x, w = torch.randn(8, 5, 6).transpose(0, 1)[:, ::2], torch.randn(10, 7).t()[::2, :6]
    assert not x.is_contiguous()
    assert not w.is_contiguous()
    found = fused_linear(x, w, None, setting(w, Int(4)), setting(x, INT8), integer=integer)
    x, w = x.contiguous(), w.contiguous()
    expected = fused_linear(x, w, None, setting(w, Int(4)), setting(x, INT8), integer=integer)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_gradients_by_finite_differences() -> None:
    """Linear in input and bias; of the input under a learned scale, the surrogate's slope is 1 inside its range."""
    w = torch.randn(3, 5, dtype=torch.float64)
    of_w = setting(w, Int(4))

    def linear(x: Tensor, bias: Tensor) -> Tensor:
        return fused_linear(x, w, bias, of_w)

    inputs = (
        torch.randn(4, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(3, dtype=torch.float64).requires_grad_(),
    )
    assert torch.autograd.gradcheck(linear, inputs)


@pytest.mark.parametrize("rule", [StraightThrough(), Clipped()])
def test_learned_scales_of_weight_and_input(rule: Gradient) -> None:
    """By the chain rule from the naive LSQ gradients, in float64."""
    x, w = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (5, 3))
    grad = torch.randn(5, 3, dtype=torch.float64)
    of_x, of_w = setting(x, Int(3), rule, learned=True), setting(w, Int(3), rule, learned=True)
    fused_linear(x, w, None, of_w, of_x).backward(grad)
    for latent, how, inner in (
        (x, of_x, grad @ quantized(w, of_w)),
        (w, of_w, grad.t() @ quantized(x, of_x)),
    ):
        u = (latent / how.scale).detach()
        inside = (u >= -4) & (u <= 3)
        slope = torch.where(inside, u.round() - u, u.round().clamp(-4, 3))
        torch.testing.assert_close(latent.grad, inner * inside)
        torch.testing.assert_close(how.scale.grad, (inner * slope).sum(1, keepdim=True) / (6 * 3) ** 0.5)


def kept_for_backward(run: Callable[[], Tensor]) -> list[Tensor]:
    """What autograd keeps that is neither a parameter nor a scalar."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Any:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return [tensor for tensor in kept if tensor.dim()]


def test_weights_only_keep_the_latent_weight_and_the_input() -> None:
    x, w = torch.randn(16, 32, requires_grad=True), torch.randn(8, 32, requires_grad=True)
    of_w = setting(w, Int(4))
    kept = kept_for_backward(lambda: fused_linear(x, w, None, of_w))
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), w.data_ptr(), of_w.scale.data_ptr()}


def test_quantized_inputs_keep_their_codes() -> None:
    x, w = torch.randn(16, 32, requires_grad=True), torch.randn(8, 32, requires_grad=True)
    of_x, of_w = setting(x, INT8), setting(w, Int(4))
    kept = kept_for_backward(lambda: fused_linear(x, w, None, of_w, of_x))
    assert x.data_ptr() not in {t.data_ptr() for t in kept}
    (codes,) = [t for t in kept if t.dtype == torch.int8]
    assert torch.equal(codes.double() * of_x.scale.double(), quantized(x, of_x))


def test_frozen_weight_and_frozen_input() -> None:
    x, w, grad = torch.randn(4, 6), torch.randn(3, 6, requires_grad=True), torch.randn(4, 3)
    of_x, of_w = setting(x, INT8), setting(w, Int(4))
    fused_linear(x, w, None, of_w, of_x).backward(grad)
    assert w.grad is not None
    w = w.detach()
    x.requires_grad_()
    fused_linear(x, w, None, of_w, of_x).backward(grad)
    assert x.grad is not None
    assert w.grad is None
