"""The divergence of rows in pieces: finite differences, pieces that do not matter, and what waits for backward."""

import pytest
import torch
from torch import Tensor

from lightning_qat.losses import _divergence as implementation
from lightning_qat.losses import kl_divergence
from lightning_qat.losses._divergence import row_divergence


@pytest.fixture(autouse=True)
def _few_logits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "_WORTHWHILE", 0)


def test_few_logits_take_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    found = kl_divergence(student, teacher)
    monkeypatch.setattr(implementation, "_WORTHWHILE", 1 << 16)
    torch.testing.assert_close(kl_divergence(student, teacher), found)


def test_gradient_by_finite_differences() -> None:
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher, mask = torch.randn(3, 5, dtype=torch.float64), torch.tensor([1.0, 0.0, 0.5])
    assert torch.autograd.gradcheck(lambda s: kl_divergence(s, teacher, temperature=1.7, mask=mask), student)


@pytest.mark.parametrize("shape", [(7, 4), (2, 3, 5), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_do_not_matter(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    teacher[..., 1] = -torch.inf
    found = []
    for chunk in (9, 1 << 17):
        monkeypatch.setattr(implementation, "_CHUNK", chunk)
        loss = row_divergence(student, teacher, 2.0, None).sum()
        found.append((loss, *torch.autograd.grad(loss, student)))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert found[0][1].dtype == dtype


def test_one_tensor_waits_for_backward() -> None:
    student, teacher = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kl_divergence(student, teacher)
    assert [tuple(tensor.shape) for tensor in kept if tensor.numel() > 6] == [(6, 8)]


def test_nothing_waits_without_a_gradient() -> None:
    loss = kl_divergence(torch.randn(6, 8), torch.randn(6, 8))
    assert not loss.requires_grad


def test_backward_twice() -> None:
    student, teacher = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    loss = kl_divergence(student, teacher)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(2 * loss, student)
    torch.testing.assert_close(second, 2 * first)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does
def test_compiled() -> None:
    student, teacher = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    torch.compiler.reset()
    found = torch.compile(kl_divergence, fullgraph=True, backend="aot_eager")(student, teacher)
    torch.testing.assert_close(found, kl_divergence(student, teacher))
