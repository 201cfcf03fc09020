"""Losses between activations, against formulas written out in float64 NumPy."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_qat import losses

Array = NDArray[np.float64]
MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])
STATES = ["hidden_state_mse", "hidden_state_nmse", "hidden_state_log_nmse", "hidden_state_cosine"]


def pair(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*shape, generator=generator, dtype=torch.float64),
        torch.randn(*shape, generator=generator, dtype=torch.float64),
    )


def relation_reference(student: Array, teacher: Array, heads: int, mask: Array) -> float:
    """Loops over sequences, relation heads and rows; masked tokens are left out before anything is computed."""

    def relations(x: Array) -> Array:
        scores = x @ x.T / np.sqrt(x.shape[1])
        exponentials = np.exp(scores - scores.max(-1, keepdims=True))
        return np.asarray(exponentials / exponentials.sum(-1, keepdims=True))

    rows: list[float] = []
    for ours, theirs, keep in zip(student, teacher, mask, strict=True):
        ours, theirs = ours[keep], theirs[keep]
        for s, t in zip(np.split(ours, heads, axis=1), np.split(theirs, heads, axis=1), strict=True):
            p, q = relations(t), relations(s)
            rows += list((p * np.log(p / q)).sum(-1))
    return float(np.mean(rows))


@pytest.mark.parametrize("masked", [False, True])
def test_hidden_state_values(masked: bool) -> None:
    student, teacher = pair(2, 4, 6)
    mask = MASK if masked else None
    keep = MASK.numpy() if masked else np.ones((2, 4), dtype=bool)
    s, t = student.numpy()[keep], teacher.numpy()[keep]
    assert losses.hidden_state_mse(student, teacher, mask=mask).item() == pytest.approx(((s - t) ** 2).mean())
    relative = losses.hidden_state_nmse(student, teacher, mask=mask)
    assert relative.item() == pytest.approx(((s - t) ** 2).sum() / (t**2).sum())
    logarithm = losses.hidden_state_log_nmse(student, teacher, mask=mask)
    assert logarithm.item() == pytest.approx(np.log1p(1000 * relative.item()))
    torch.testing.assert_close(losses.hidden_state_nmse(50 * student, 50 * teacher, mask=mask), relative)
    cosines = (s * t).sum(-1) / np.sqrt((s**2).sum(-1) * (t**2).sum(-1))
    assert losses.hidden_state_cosine(student, teacher, mask=mask).item() == pytest.approx((1 - cosines).mean())


@pytest.mark.parametrize("name", STATES)
def test_projection(name: str) -> None:
    loss = getattr(losses, name)
    student, _ = pair(2, 4, 3)
    _, teacher = pair(2, 4, 5)
    projection = nn.Linear(3, 5, dtype=torch.float64)
    result = loss(student, teacher, projection=projection)
    torch.testing.assert_close(result, loss(projection(student), teacher))
    result.backward()
    assert projection.weight.grad is not None
    with pytest.raises(ValueError, match=r"student has shape \[2, 4, 3\].*projection="):
        loss(student, teacher)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("masked", [False, True])
def test_hidden_state_gradients(name: str, masked: bool) -> None:
    student, teacher = pair(2, 4, 3)
    mask = MASK if masked else None
    assert torch.autograd.gradcheck(lambda x: getattr(losses, name)(x, teacher, mask=mask), (student.requires_grad_(),))


def test_relative_error_of_nothing() -> None:
    """A teacher that says nothing, and no positions at all: 0, and gradients that are finite."""
    student = torch.ones(2, 3, requires_grad=True)
    for teacher, mask in (
        (torch.zeros(2, 3), None),
        (torch.ones(2, 3), torch.zeros(2)),
        (torch.zeros(2, 3), MASK[0, :2]),
    ):
        loss = losses.hidden_state_nmse(student, teacher, mask=mask)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == 0
        torch.testing.assert_close(gradient, torch.zeros(2, 3), rtol=0, atol=0)


def test_cosine_of_zero_vectors() -> None:
    student = torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, 4.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    loss = losses.hidden_state_cosine(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(2 / 3)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.zeros(3, 2), rtol=0, atol=1e-7)


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_relation_value(heads: int, masked: bool) -> None:
    """Widths of student and teacher differ; three relations are averaged."""
    students = [pair(2, 4, 6, seed=seed)[0] for seed in range(3)]
    teachers = [pair(2, 4, 12, seed=seed)[1] for seed in range(3)]
    keep = MASK.numpy() if masked else np.ones((2, 4), dtype=bool)
    expected = np.mean(
        [relation_reference(s.numpy(), t.numpy(), heads, keep) for s, t in zip(students, teachers, strict=True)]
    )
    mask = MASK if masked else None
    result = losses.attention_relation_loss(students, teachers, num_relation_heads=heads, mask=mask)
    assert result.item() == pytest.approx(expected, rel=1e-12)


def test_relation_with_integer_mask_and_garbage_in_padding() -> None:
    student, teacher = pair(2, 4, 6)
    expected = losses.attention_relation_loss([student], [teacher], num_relation_heads=2, mask=MASK)
    dirty = student.clone()
    dirty[~MASK] = float("nan")
    dirty.requires_grad_()
    result = losses.attention_relation_loss([dirty], [teacher], num_relation_heads=2, mask=MASK.long())
    result.backward()
    assert result.item() == expected.item()
    assert dirty.grad is not None
    assert torch.equal(dirty.grad[~MASK], torch.zeros(4, 6, dtype=torch.float64))
    assert dirty.grad.isfinite().all()


def test_a_sequence_without_tokens() -> None:
    student, teacher = pair(2, 4, 6)
    mask = MASK.clone()
    mask[1] = False
    result = losses.attention_relation_loss([student], [teacher], num_relation_heads=2, mask=mask)
    expected = relation_reference(student[:1].numpy(), teacher[:1].numpy(), 2, mask[:1].numpy())
    assert result.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_relation_gradient(masked: bool) -> None:
    student, teacher = pair(2, 4, 6)
    mask = MASK if masked else None
    assert torch.autograd.gradcheck(
        lambda x: losses.attention_relation_loss([x, x.flip(2)], [teacher, teacher], num_relation_heads=2, mask=mask),
        (student.requires_grad_(),),
    )


def test_relations_are_blind_to_rotations() -> None:
    student, teacher = pair(1, 5, 4)
    rotation = torch.linalg.qr(pair(4, 4, seed=3)[0]).Q
    first = losses.attention_relation_loss([student], [teacher], num_relation_heads=1)
    torch.testing.assert_close(
        losses.attention_relation_loss([student @ rotation], [teacher], num_relation_heads=1), first
    )
    rotated = losses.attention_relation_loss([teacher @ rotation], [teacher], num_relation_heads=1)
    assert abs(rotated.item()) < 1e-15


def test_merge_heads() -> None:
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    merged = losses.merge_heads(x)
    assert merged.shape == (2, 4, 15)
    for head in range(3):
        assert torch.equal(merged[..., 5 * head : 5 * head + 5], x[:, head])
    with pytest.raises(ValueError, match=r"\[batch, heads, seq, width\]"):
        losses.merge_heads(x[0])


@pytest.mark.parametrize("name", [*STATES, "relations"])
def test_arithmetic_is_float32(name: str) -> None:
    """Under autocast the product of relations would run in bfloat16; 100 % of the bits of float32 are kept."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        if name == "relations":
            return losses.attention_relation_loss([student], [teacher], num_relation_heads=2)
        return Tensor(getattr(losses, name)(student, teacher))

    student, teacher = (x.bfloat16() for x in pair(2, 8, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(student, teacher)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), loss(student.double(), teacher.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [*STATES, "relations"])
def test_the_teacher_gets_no_gradient(name: str) -> None:
    student, teacher = pair(1, 3, 4)
    student.requires_grad_()
    teacher.requires_grad_()
    if name == "relations":
        losses.attention_relation_loss([student], [teacher], num_relation_heads=2).backward()
    else:
        getattr(losses, name)(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_errors() -> None:
    x = torch.zeros(2, 3, 6)
    with pytest.raises(ValueError, match=r"mask has shape \[3\]; expected \[2, 3\]"):
        losses.hidden_state_mse(x, x, mask=torch.ones(3))
    with pytest.raises(ValueError, match="student has 1 tensors, teacher has 2"):
        losses.attention_relation_loss([x], [x, x], num_relation_heads=1)
    with pytest.raises(ValueError, match="at least one"):
        losses.attention_relation_loss([], [], num_relation_heads=1)
    with pytest.raises(ValueError, match=r"num_relation_heads=4.*student's width.*\[1, 2, 3, 6\]"):
        losses.attention_relation_loss([x], [x], num_relation_heads=4)
    with pytest.raises(ValueError, match=r"teacher has shape \[3, 6\].*merge_heads"):
        losses.attention_relation_loss([x], [x[0]], num_relation_heads=2)
    with pytest.raises(ValueError, match="batch and sequence sizes"):
        losses.attention_relation_loss([x], [x[:, :2]], num_relation_heads=2)
    with pytest.raises(ValueError, match=r"mask has shape \[2\]"):
        losses.attention_relation_loss([x], [x], num_relation_heads=2, mask=torch.ones(2))
