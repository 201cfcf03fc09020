"""Losses between outputs, against formulas written out in float64 NumPy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_qat import losses

Array = NDArray[np.float64]
Loss = Callable[..., Tensor]
LOSSES = ("kl_divergence", "reverse_kl_divergence", "jensen_shannon", "soft_cross_entropy")


def softmax(logits: Array, temperature: float) -> Array:
    exponentials = np.exp(logits / temperature - (logits / temperature).max(-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(-1, keepdims=True))


def per_position(name: str, student: Array, teacher: Array, temperature: float, beta: float = 0.5) -> Array:
    """The loss of every position, before T^2 and the mean."""
    s, t = softmax(student, temperature), softmax(teacher, temperature)
    mixture = beta * t + (1 - beta) * s

    def kl(p: Array, q: Array) -> Array:
        return np.asarray((p * (np.log(p) - np.log(q))).sum(-1))

    return {
        "kl_divergence": lambda: kl(t, s),
        "reverse_kl_divergence": lambda: kl(s, t),
        "jensen_shannon": lambda: beta * kl(t, mixture) + (1 - beta) * kl(s, mixture),
        "soft_cross_entropy": lambda: np.asarray(-(t * np.log(s)).sum(-1)),
    }[name]()


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(*shape, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def function(name: str) -> Loss:
    loss: Loss = getattr(losses, name)
    return loss


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(4, 7), (2, 5, 11), (3, 1, 2)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_value(name: str, shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = logits(*shape)
    expected = temperature**2 * per_position(name, student.numpy(), teacher.numpy(), temperature).mean()
    assert function(name)(student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.9])
def test_value_of_the_mixture(beta: float) -> None:
    student, teacher = logits(2, 3, 5)
    expected = per_position("jensen_shannon", student.numpy(), teacher.numpy(), 1.0, beta).mean()
    result = losses.jensen_shannon(student, teacher, beta=beta, temperature=1.0)
    assert result.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_mask(name: str, dtype: torch.dtype) -> None:
    student, teacher = logits(2, 4, 5)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]]).to(dtype)
    values = per_position(name, student.numpy(), teacher.numpy(), 2.0)
    expected = 4 * values[mask.bool().numpy()].mean()
    assert function(name)(student, teacher, mask=mask).item() == pytest.approx(expected, rel=1e-12)


def test_weights_as_mask() -> None:
    student, teacher = logits(3, 5)
    weights = torch.tensor([0.25, 0.0, 0.5], dtype=torch.float64)
    values = per_position("kl_divergence", student.numpy(), teacher.numpy(), 2.0)
    expected = 4 * np.average(values, weights=weights.numpy())
    assert losses.kl_divergence(student, teacher, mask=weights).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_masked_positions_may_hold_anything(name: str, garbage: float) -> None:
    student, teacher = logits(1, 3, 4)
    mask = torch.tensor([[True, False, True]])
    clean = student.clone().requires_grad_()
    function(name)(clean, teacher, mask=mask).backward()
    dirty = student.clone()
    dirty[0, 1] = garbage
    teacher[0, 1] = garbage
    dirty.requires_grad_()
    loss = function(name)(dirty, teacher, mask=mask)
    loss.backward()
    assert loss.isfinite()
    torch.testing.assert_close(dirty.grad, clean.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_left(name: str) -> None:
    student, teacher = logits(1, 3, 4)
    student.requires_grad_()
    loss = function(name)(student, teacher, mask=torch.zeros(1, 3))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad if student.grad is not None else torch.ones(1), torch.zeros(1, 3, 4))


@pytest.mark.parametrize("name", LOSSES)
def test_a_class_removed_from_both(name: str) -> None:
    student, teacher = logits(2, 4)
    wide_student, wide_teacher = (torch.nn.functional.pad(x, (0, 1), value=-torch.inf) for x in (student, teacher))
    wide_student.requires_grad_()
    loss = function(name)(wide_student, wide_teacher)
    loss.backward()
    torch.testing.assert_close(loss, function(name)(student, teacher))
    assert wide_student.grad is not None
    assert wide_student.grad.isfinite().all()
    assert torch.equal(wide_student.grad[:, -1], torch.zeros(2, dtype=torch.float64))


def test_a_class_removed_from_one() -> None:
    student, teacher = logits(1, 3)
    removed = student.clone()
    removed[0, 0] = -torch.inf
    assert losses.kl_divergence(removed, teacher).item() == float("inf")
    assert losses.reverse_kl_divergence(teacher, removed).item() == float("inf")
    bounded = losses.jensen_shannon(removed.requires_grad_(), teacher)
    bounded.backward()
    assert 0 < bounded.item() < 4 * np.log(2)
    assert removed.grad is not None
    assert removed.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradient(name: str, masked: bool) -> None:
    student, teacher = logits(2, 3, 4)
    mask = torch.tensor([[True, False, True], [True, True, False]]) if masked else None
    assert torch.autograd.gradcheck(
        lambda x: function(name)(x, teacher, temperature=1.7, mask=mask), (student.requires_grad_(),)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_at_high_temperature(name: str) -> None:
    """T^2 undoes the 1 / T^2 of softened distributions: the gradient tends to that of centered logits."""
    student, teacher = logits(2, 5)
    student.requires_grad_()
    function(name)(student, teacher, temperature=1e4).backward()
    difference = (student - teacher).detach()
    curvature = 0.25 if name == "jensen_shannon" else 1.0
    expected = curvature * (difference - difference.mean(-1, keepdim=True)) / (2 * 5)
    torch.testing.assert_close(student.grad, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", [*LOSSES, "mean_squared_error"])
def test_the_teacher_gets_no_gradient(name: str) -> None:
    student, teacher = logits(2, 3)
    student.requires_grad_()
    teacher.requires_grad_()
    function(name)(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("name", [*LOSSES, "mean_squared_error"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher = logits(2, 3, 50, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = function(name)(student, teacher)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), function(name)(student.double(), teacher.double()), rtol=1e-5, atol=0)


def test_mean_is_per_position_not_per_class() -> None:
    """kl_div(reduction="mean") would shrink with the vocabulary: classes that are never chosen must not matter."""
    student, teacher = logits(2, 3, 8)
    wide = [torch.nn.functional.pad(x, (0, 1000), value=-1e4) for x in (student, teacher)]
    torch.testing.assert_close(losses.kl_divergence(*wide), losses.kl_divergence(student, teacher))
    log_s, log_t = (x.log_softmax(-1) for x in wide)
    wrong = (log_t.exp() * (log_t - log_s)).mean()
    assert losses.kl_divergence(*wide, temperature=1.0).item() == pytest.approx(1008 * wrong.item())


def test_relations_between_the_losses() -> None:
    student, teacher = logits(4, 6)
    forward = losses.kl_divergence(student, teacher)
    assert forward.item() == losses.reverse_kl_divergence(teacher, student).item()
    entropy = losses.soft_cross_entropy(teacher, teacher)
    torch.testing.assert_close(losses.soft_cross_entropy(student, teacher) - entropy, forward)
    symmetric = losses.jensen_shannon(student, teacher), losses.jensen_shannon(teacher, student)
    torch.testing.assert_close(*symmetric)
    torch.testing.assert_close(losses.jensen_shannon(student, teacher, beta=1e-7) / 1e-7, forward, rtol=1e-5, atol=0)
    for name in ("kl_divergence", "reverse_kl_divergence", "jensen_shannon"):
        assert function(name)(student, student).abs().item() < 1e-15
        assert function(name)(student, teacher).item() > 0


@pytest.mark.parametrize("mask_shape", [None, (2,), (2, 3), (2, 3, 4)])
def test_mean_squared_error(mask_shape: tuple[int, ...] | None) -> None:
    student, teacher = logits(2, 3, 4)
    squares = (student - teacher).numpy() ** 2
    if mask_shape is None:
        assert losses.mean_squared_error(student, teacher).item() == pytest.approx(squares.mean(), rel=1e-12)
        return
    mask = torch.rand(mask_shape, generator=torch.Generator().manual_seed(1)) < 0.7
    values = squares.reshape(*mask_shape, -1).mean(-1)
    student[~mask] = float("nan")
    student.requires_grad_()
    loss = losses.mean_squared_error(student, teacher, mask=mask)
    assert loss.item() == pytest.approx(values[mask.numpy()].mean(), rel=1e-12)
    loss.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_top1_agreement() -> None:
    student = torch.tensor([[[3.0, 1.0], [0.0, 1.0], [1.0, 0.0]]], requires_grad=True)
    teacher = torch.tensor([[[9.0, 1.0], [1.0, 0.0], [1.0, 0.5]]])
    assert losses.top1_agreement(student, teacher).item() == pytest.approx(2 / 3)
    agreement = losses.top1_agreement(student, teacher, mask=torch.tensor([[False, True, True]]))
    assert agreement.item() == 0.5
    assert not agreement.requires_grad


def test_causal_masks_and_shift_say_the_same() -> None:
    student, teacher = logits(2, 6, 5)
    targets = torch.tensor([[-100, -100, 3, 4, -100, 2], [1, 2, 3, 4, 0, -100]])
    shifted_student, shifted_targets = losses.causal_shift(student, targets)
    shifted_teacher, _ = losses.causal_shift(teacher, targets)
    assert torch.equal(shifted_targets, targets[:, 1:])
    by_shift = losses.kl_divergence(shifted_student, shifted_teacher, mask=losses.target_mask(shifted_targets))
    by_mask = losses.kl_divergence(student, teacher, mask=losses.next_token_mask(targets))
    torch.testing.assert_close(by_shift, by_mask)
    values = per_position("kl_divergence", student.numpy(), teacher.numpy(), 2.0)
    counted = [(b, t) for b in range(2) for t in range(5) if targets[b, t + 1] != -100]
    assert by_mask.item() == pytest.approx(4 * np.mean([values[position] for position in counted]), rel=1e-12)
    assert losses.target_mask(torch.tensor([7, 0]), ignore_index=0).tolist() == [True, False]


@pytest.mark.parametrize("name", [*LOSSES, "top1_agreement"])
def test_shape_errors(name: str) -> None:
    with pytest.raises(ValueError, match=r"student_logits has shape \[2, 4\], teacher_logits has .* \[2, 5\].*vocab"):
        function(name)(torch.zeros(2, 4), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"mask has shape \[3\]; expected \[2\]"):
        function(name)(torch.zeros(2, 4), torch.zeros(2, 4), mask=torch.ones(3))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_temperature_errors(name: str, temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature=.*positive finite"):
        function(name)(torch.zeros(2, 4), torch.zeros(2, 4), temperature=temperature)


def test_other_errors() -> None:
    for beta in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="use kl_divergence or reverse_kl_divergence"):
            losses.jensen_shannon(torch.zeros(1, 2), torch.zeros(1, 2), beta=beta)
    with pytest.raises(ValueError, match=r"mask has shape \[3\]; expected \[2\]"):
        losses.mean_squared_error(torch.zeros(2, 3), torch.zeros(2, 3), mask=torch.ones(3))
    with pytest.raises(ValueError, match="at least 2 positions"):
        losses.causal_shift(torch.zeros(1, 1, 3), torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"\[batch, seq\]"):
        losses.causal_shift(torch.zeros(1, 4, 3), torch.zeros(1, 3))
