"""Chain-of-thought fidelity, against loops over the steps of each sequence in float64 NumPy."""

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_qat import losses
from lightning_qat.losses import ReasoningOutputs, ReasoningWeights

Array = NDArray[np.float64]
BATCH, SEQ, WIDTH, CLASSES = 4, 9, 5, 7


def outputs(seed: int) -> ReasoningOutputs:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(BATCH, SEQ, WIDTH, generator=generator, dtype=torch.float64)
    return ReasoningOutputs(hidden, torch.randn(BATCH, SEQ, CLASSES, generator=generator, dtype=torch.float64))


def marks(seed: int = 5) -> Tensor:
    """Sequences with several steps, with one and with none."""
    boundaries = torch.rand(BATCH, SEQ, generator=torch.Generator().manual_seed(seed)) < 0.5
    boundaries[1] = False
    boundaries[2] = torch.arange(SEQ) == 4
    return boundaries


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def step_reference(student: Array, teacher: Array, boundaries: Array, weights: Array) -> float:
    places = list(zip(*np.nonzero(boundaries), strict=True))
    terms = [weights[place] * (1 - cosine(student[place], teacher[place])) for place in places]
    return float(sum(terms) / sum(weights[place] for place in places))


def trajectory_reference(student: Array, teacher: Array, boundaries: Array) -> float:
    terms = []
    for s, t, row in zip(student, teacher, boundaries, strict=True):
        ends = np.nonzero(row)[0]
        for a, b in itertools.pairwise(ends):
            terms.append(1 - cosine(s[b] - s[a], t[b] - t[a]))
    return float(np.mean(terms))


@pytest.mark.parametrize("seed", range(4))
def test_step_consistency(seed: int) -> None:
    student, teacher, boundaries = outputs(seed).hidden, outputs(seed + 10).hidden, marks(seed)
    weights = torch.rand(BATCH, SEQ, generator=torch.Generator().manual_seed(seed))
    arrays = student.numpy(), teacher.numpy(), boundaries.numpy()
    plain = losses.step_consistency(student, teacher, boundaries)
    assert plain.item() == pytest.approx(step_reference(*arrays, np.ones((BATCH, SEQ))), rel=1e-12)
    weighted = losses.step_consistency(student, teacher, boundaries, weights=weights)
    assert weighted.item() == pytest.approx(step_reference(*arrays, weights.double().numpy()), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_trajectory_consistency(seed: int) -> None:
    student, teacher, boundaries = outputs(seed).hidden, outputs(seed + 10).hidden, marks(seed)
    result = losses.trajectory_consistency(student, teacher, boundaries)
    expected = trajectory_reference(student.numpy(), teacher.numpy(), boundaries.numpy())
    assert result.item() == pytest.approx(expected, rel=1e-12)


def test_answer_agreement() -> None:
    student, teacher = outputs(0).logits, outputs(1).logits
    mask = marks()
    p, q = (x.softmax(-1).numpy()[mask.numpy()] for x in (teacher, student))
    expected = (p * np.log(p / q)).sum(-1).mean()
    assert losses.answer_agreement(student, teacher, mask).item() == pytest.approx(expected, rel=1e-12)


def test_max_steps_keeps_the_last() -> None:
    student, teacher, boundaries = outputs(0).hidden, outputs(1).hidden, marks()
    longest = int(boundaries.sum(-1).max())
    last_two = boundaries & (boundaries.flip(1).cumsum(1).flip(1) <= 2)
    for function in (losses.step_consistency, losses.trajectory_consistency):
        full = function(student, teacher, boundaries)
        assert function(student, teacher, boundaries, max_steps=longest).item() == pytest.approx(full.item())
        cut = function(student, teacher, boundaries, max_steps=2)
        assert cut.item() == pytest.approx(function(student, teacher, last_two).item())
        assert cut.item() != pytest.approx(full.item())


@pytest.mark.parametrize(
    "weights", [ReasoningWeights(), ReasoningWeights.mathematics(), ReasoningWeights.code(), ReasoningWeights(0, 1, 0)]
)
def test_total(weights: ReasoningWeights) -> None:
    student, teacher = outputs(0), outputs(1)
    kinds = torch.randint(5, (BATCH, SEQ), generator=torch.Generator().manual_seed(2))
    terms = losses.chain_of_thought_fidelity(
        student,
        teacher,
        boundaries=marks(),
        answer_mask=marks(9),
        weights=weights,
        kind_weights=losses.step_weights(kinds),
    )
    per_kind = np.array([1.0, 1.5, 1.0, 2.0, 2.0])[kinds.numpy()]
    step = step_reference(student.hidden.numpy(), teacher.hidden.numpy(), marks().numpy(), per_kind)
    assert terms.step.item() == pytest.approx(step)
    expected = weights.step * terms.step + weights.trajectory * terms.trajectory + weights.answer * terms.answer
    torch.testing.assert_close(terms.total, expected)
    assert terms.trajectory.item() == losses.trajectory_consistency(student.hidden, teacher.hidden, marks()).item()
    assert terms.answer.item() == losses.answer_agreement(student.logits, teacher.logits, marks(9)).item()


def test_a_faithful_student_pays_nothing() -> None:
    model = outputs(0)
    scaled = ReasoningOutputs(3 * model.hidden, model.logits + 1)
    terms = losses.chain_of_thought_fidelity(scaled, model, boundaries=marks(), answer_mask=marks())
    torch.testing.assert_close(torch.stack(terms), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("max_steps", [None, 3])
def test_gradient(max_steps: int | None) -> None:
    teacher = outputs(1)
    kinds = torch.rand(BATCH, SEQ, generator=torch.Generator().manual_seed(2)).double()

    def total(hidden: Tensor, logits: Tensor) -> Tensor:
        return losses.chain_of_thought_fidelity(
            ReasoningOutputs(hidden, logits),
            teacher,
            boundaries=marks(),
            answer_mask=marks(9),
            kind_weights=kinds,
            max_steps=max_steps,
        ).total

    hidden, logits = (x.requires_grad_() for x in outputs(0))
    assert torch.autograd.gradcheck(total, (hidden, logits))


def test_without_steps_the_loss_is_zero_and_keeps_its_graph() -> None:
    student, teacher = outputs(0), outputs(1)
    student.hidden.requires_grad_()
    student.logits.requires_grad_()
    nothing = torch.zeros(BATCH, SEQ, dtype=torch.bool)
    terms = losses.chain_of_thought_fidelity(student, teacher, boundaries=nothing, answer_mask=nothing)
    terms.total.backward()
    assert [term.item() for term in terms] == [0, 0, 0, 0]
    for x in student:
        assert x.grad is not None
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_equal_neighbors_and_garbage_between_steps_leave_the_gradient_finite() -> None:
    student, teacher = outputs(0).hidden, outputs(1).hidden
    boundaries = marks()
    boundaries[3, :2] = True
    student[3, 1] = student[3, 0]
    student[~boundaries] = float("nan")
    student.requires_grad_()
    loss = losses.trajectory_consistency(student, teacher, boundaries)
    (loss + losses.step_consistency(student, teacher, boundaries)).backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_the_teacher_gets_no_gradient_and_arithmetic_is_float32() -> None:
    student, teacher = (ReasoningOutputs(*(x.bfloat16() for x in outputs(seed))) for seed in (0, 1))
    for x in (*student, *teacher):
        x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = losses.chain_of_thought_fidelity(student, teacher, boundaries=marks(), answer_mask=marks())
    wide = [ReasoningOutputs(*(x.detach().double() for x in model)) for model in (student, teacher)]
    expected = losses.chain_of_thought_fidelity(*wide, boundaries=marks(), answer_mask=marks())
    for term, reference in zip(terms, expected, strict=True):
        assert term.dtype == torch.float32
        torch.testing.assert_close(term.double(), reference, rtol=1e-5, atol=0)
    terms.total.backward()
    assert all(x.grad is not None for x in student)
    assert all(x.grad is None for x in teacher)


def test_weights_are_values() -> None:
    assert ReasoningWeights() == ReasoningWeights(step=0.3, trajectory=0.5, answer=0.2)
    for weights in (ReasoningWeights(), ReasoningWeights.mathematics(), ReasoningWeights.code()):
        assert eval(repr(weights)) == weights
        assert hash(weights) == hash(eval(repr(weights)))
    for wrong in ((-0.1, 0.5, 0.5), (0, 0, 0), (float("nan"), 1, 1), (float("inf"), 1, 1)):
        with pytest.raises(ValueError, match="expected finite weights >= 0"):
            ReasoningWeights(*wrong)


def test_errors() -> None:
    student, teacher = outputs(0), outputs(1)
    with pytest.raises(ValueError, match=r"student_hidden has shape .* project the student's states"):
        losses.step_consistency(student.hidden[..., :3], teacher.hidden, marks())
    with pytest.raises(ValueError, match=r"boundaries has shape \[3, 9\]; expected \[4, 9\]"):
        losses.trajectory_consistency(student.hidden, teacher.hidden, marks()[:3])
    with pytest.raises(ValueError, match=r"weights has shape \[4\]; expected \[4, 9\]"):
        losses.step_consistency(student.hidden, teacher.hidden, marks(), weights=torch.ones(4))
    with pytest.raises(ValueError, match=r"mask has shape"):
        losses.answer_agreement(student.logits, teacher.logits, marks()[:, 1:])
