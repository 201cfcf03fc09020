"""Functions of autograd, called without looking at their signatures."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_qat.functional.application import applied

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: float, unused: Tensor | None) -> tuple[Tensor, Tensor]:
        return factor * x, x.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (sign,) = ctx.saved_tensors
        return grad * ctx.factor * sign.abs(), None, None


def test_is_apply() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    y, sign = applied(_Scaled, x, 2.0, None)
    expected, _ = _Scaled.apply(x, 2.0, None)
    assert torch.equal(y, expected)
    assert not sign.requires_grad
    assert type(y.grad_fn).__name__ == type(expected.grad_fn).__name__
    assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, expected)))
    with torch.no_grad():
        assert applied(_Scaled, x, 2.0, None)[0].grad_fn is None


def test_signatures_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "signature", None)
    with pytest.raises(TypeError):  # what is avoided
        _Scaled.apply(torch.ones(2, requires_grad=True), 2.0, None)
    applied(_Scaled, torch.ones(2, requires_grad=True), 2.0, None)[0].sum().backward()


def test_transforms() -> None:
    gradient = torch.func.grad(lambda x: applied(_Scaled, x, 3.0, None)[0].sum())
    assert torch.equal(gradient(torch.tensor([1.0, 0.0])), torch.tensor([3.0, 0.0]))


def test_compiled() -> None:
    x = torch.tensor([1.0, 0.0], requires_grad=True)
    compiled = torch.compile(lambda x: applied(_Scaled, x, 3.0, None)[0], fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([3.0, 0.0]))
