"""Chain-of-thought fidelity: the student reasons in the same steps, along the same path, to the same answer.

Token by token distillation weighs every token alike. These terms look at the few positions where a step of reasoning
ends: at the hidden states there, at the change from one to the next, and at the answer. All are differentiable, in
float32 (float64 where the inputs are), and send no gradient to the teacher.

Shape suffixes: B batch, S sequence, K steps, D features.

Source: the reasoning loss of ruvLLM's QAT design (ADR-090), with these deviations: weights of step kinds are
normalized by their sum, transitions are averaged over the whole batch, and the answer term is a divergence of
distributions instead of a comparison of strings, which has no gradient.
"""

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from lightning_qat.losses._common import check_equal_shapes, check_mask, cosine, full_precision, hide, masked_mean
from lightning_qat.losses.boundaries import boundary_indices
from lightning_qat.losses.distillation import kl_divergence


@final
@dataclass(frozen=True)
class ReasoningWeights:
    """The weights of the three terms of `chain_of_thought_fidelity`.

    Args:
        step: Weight of the step consistency, >= 0.
        trajectory: Weight of the trajectory consistency, >= 0.
        answer: Weight of the answer agreement, >= 0.

    Raises:
        ValueError: A weight is negative or not finite, or all are 0.

    Example:
        >>> ReasoningWeights()
        ReasoningWeights(step=0.3, trajectory=0.5, answer=0.2)
    """

    step: float = 0.3
    trajectory: float = 0.5
    answer: float = 0.2

    def __post_init__(self) -> None:
        """Check the weights."""
        values = (self.step, self.trajectory, self.answer)
        if not all(0.0 <= value < float("inf") for value in values) or sum(values) == 0:
            raise ValueError(f"{self!r}: expected finite weights >= 0 with at least one above 0")

    @classmethod
    def mathematics(cls) -> "ReasoningWeights":
        """Return the preset for mathematics: a single wrong step or answer spoils the result, so they weigh as much.

        Example:
            >>> ReasoningWeights.mathematics()
            ReasoningWeights(step=0.4, trajectory=0.4, answer=0.4)
        """
        return cls(step=0.4, trajectory=0.4, answer=0.4)

    @classmethod
    def code(cls) -> "ReasoningWeights":
        """Return the preset for code: how one line leads to the next matters most.

        Example:
            >>> ReasoningWeights.code()
            ReasoningWeights(step=0.2, trajectory=0.6, answer=0.3)
        """
        return cls(step=0.2, trajectory=0.6, answer=0.3)

    @classmethod
    def named(cls, name: str) -> "ReasoningWeights":
        """Return a preset by its name, for configs.

        Args:
            name: ``"default"``, ``"mathematics"`` or ``"code"``.

        Raises:
            ValueError: there is no such preset.

        Example:
            >>> ReasoningWeights.named("code") == ReasoningWeights.code()
            True
        """
        presets = {"default": cls(), "mathematics": cls.mathematics(), "code": cls.code()}
        if name not in presets:
            raise ValueError(f"ReasoningWeights.named: {name!r} is no preset; choose one of {list(presets)}")
        return presets[name]


class ReasoningOutputs(NamedTuple):
    """What `chain_of_thought_fidelity` compares of one model.

    Args:
        hidden: Hidden states `[batch, seq, features]`, usually of the last block.
        logits: Raw scores `[batch, seq, classes]`.
    """

    hidden: Tensor
    logits: Tensor


class ReasoningTerms(NamedTuple):
    """The weighted sum and its three unweighted terms, scalars, ready for a log."""

    total: Tensor
    step: Tensor
    trajectory: Tensor
    answer: Tensor


def step_consistency(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    boundaries: Tensor,
    *,
    weights: Tensor | None = None,
    max_steps: int | None = None,
) -> Tensor:
    """Return how far the student's states at the ends of steps point away from the teacher's.

    sum_k w_k * (1 - cos(s_k, t_k)) / sum_k w_k over all steps k of the batch; 0 where there is none.

    Args:
        student_hidden: Hidden states, `[batch, seq, features]`.
        teacher_hidden: The same shape; gets no gradient.
        boundaries: Boolean, `[batch, seq]`, True at the last token of each step.
        weights: Weights >= 0, `[batch, seq]` (`step_weights`), read at the boundaries. None: all 1.
        max_steps: Only the last so many steps of each sequence; less memory (see `boundary_indices`).

    Returns:
        A scalar in 0 .. 2, float32 or float64.

    Raises:
        ValueError: Shapes do not match.

    Example:
        >>> student = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
        >>> teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> step_consistency(student, teacher, torch.tensor([[True, True]]))
        tensor(0.5000)
    """
    student_BKD, teacher_BKD, steps = _states_at_steps(student_hidden, teacher_hidden, boundaries, max_steps)
    step_mask = steps.used.to(student_BKD.dtype)
    if weights is not None:
        check_mask(weights, boundaries.shape, name="weights")
        step_mask = step_mask * weights.gather(1, steps.positions).to(step_mask.dtype)
    return masked_mean(1.0 - cosine(student_BKD, teacher_BKD), step_mask)


def trajectory_consistency(
    student_hidden: Tensor, teacher_hidden: Tensor, boundaries: Tensor, *, max_steps: int | None = None
) -> Tensor:
    """Return how far the student's change from step to step points away from the teacher's.

    mean over consecutive steps of 1 - cos(s_{k+1} - s_k, t_{k+1} - t_k); 0 where no sequence has two steps.

    Args:
        student_hidden: Hidden states, `[batch, seq, features]`.
        teacher_hidden: The same shape; gets no gradient.
        boundaries: Boolean, `[batch, seq]`, True at the last token of each step.
        max_steps: Only the last so many steps of each sequence.

    Returns:
        A scalar in 0 .. 2, float32 or float64.

    Raises:
        ValueError: Shapes do not match.

    Example:
        >>> student = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]])
        >>> teacher = torch.tensor([[[5.0, 5.0], [6.0, 5.0], [6.0, 6.0]]])
        >>> trajectory_consistency(student, teacher, torch.ones(1, 3, dtype=torch.bool))
        tensor(0.5000)
    """
    student_BKD, teacher_BKD, steps = _states_at_steps(student_hidden, teacher_hidden, boundaries, max_steps)
    used = steps.used[:, 1:] & steps.used[:, :-1]
    return masked_mean(1.0 - cosine(student_BKD.diff(dim=1), teacher_BKD.diff(dim=1)), used)


def answer_agreement(
    student_logits: Tensor, teacher_logits: Tensor, answer_mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return the divergence of the student from the teacher on the answer's tokens alone.

    Args:
        student_logits: Raw scores, `[batch, seq, classes]`.
        teacher_logits: The same shape; gets no gradient.
        answer_mask: Boolean or 0 / 1, `[batch, seq]`: positions whose logits predict the answer (in a causal model the
            answer's positions shifted left by one).
        temperature: Softmax temperature T > 0; the result is scaled by T^2.

    Returns:
        A scalar >= 0, float32 or float64; 0 where no position is marked.

    Raises:
        ValueError: Shapes do not match, or the temperature is not positive.

    Example:
        >>> teacher = torch.tensor([[[9.0, 9.0], [2.0, 0.0]]])
        >>> answer_agreement(torch.zeros(1, 2, 2), teacher, torch.tensor([[False, True]]))
        tensor(0.3278)
    """
    return kl_divergence(student_logits, teacher_logits, temperature=temperature, mask=answer_mask)


def chain_of_thought_fidelity(
    student: ReasoningOutputs,
    teacher: ReasoningOutputs,
    *,
    boundaries: Tensor,
    answer_mask: Tensor,
    weights: ReasoningWeights = ReasoningWeights(),
    kind_weights: Tensor | None = None,
    max_steps: int | None = None,
) -> ReasoningTerms:
    """Return the reasoning loss and its terms.

    total = weights.step * step consistency + weights.trajectory * trajectory consistency
    + weights.answer * answer agreement (temperature 1).

    Args:
        student: Hidden states and logits of the student.
        teacher: Those of the teacher; get no gradient.
        boundaries: Boolean, `[batch, seq]`, True at the last token of each step.
        answer_mask: Boolean or 0 / 1, `[batch, seq]`, as in `answer_agreement`.
        weights: Weights of the three terms.
        kind_weights: Weights of the steps, `[batch, seq]` (`step_weights`), read at the boundaries.
        max_steps: Only the last so many steps of each sequence.

    Returns:
        `ReasoningTerms(total, step, trajectory, answer)`.

    Raises:
        ValueError: Shapes do not match.

    Example:
        >>> hidden, logits = torch.eye(3)[None], torch.zeros(1, 3, 2)
        >>> teacher = ReasoningOutputs(hidden, logits)
        >>> student = ReasoningOutputs(hidden.flip(1), logits)
        >>> marks = torch.ones(1, 3, dtype=torch.bool)
        >>> terms = chain_of_thought_fidelity(student, teacher, boundaries=marks, answer_mask=marks)
        >>> terms.step, terms.trajectory, terms.answer
        (tensor(0.6667), tensor(0.5000), tensor(0.))
        >>> terms.total
        tensor(0.4500)
    """
    step = step_consistency(student.hidden, teacher.hidden, boundaries, weights=kind_weights, max_steps=max_steps)
    trajectory = trajectory_consistency(student.hidden, teacher.hidden, boundaries, max_steps=max_steps)
    answer = answer_agreement(student.logits, teacher.logits, answer_mask)
    total = weights.step * step + weights.trajectory * trajectory + weights.answer * answer
    return ReasoningTerms(total, step, trajectory, answer)


class _Steps(NamedTuple):
    positions: Tensor
    used: Tensor


def _states_at_steps(
    student_BSD: Tensor, teacher_BSD: Tensor, boundaries: Tensor, max_steps: int | None
) -> tuple[Tensor, Tensor, _Steps]:
    check_equal_shapes(
        student_BSD,
        teacher_BSD,
        names=("student_hidden", "teacher_hidden"),
        hint="project the student's states to the teacher's width first",
    )
    check_mask(boundaries, student_BSD.shape[:-1], name="boundaries")
    steps = _Steps(*boundary_indices(boundaries, max_steps=max_steps))
    index = steps.positions[..., None]
    # Unused columns hold the state at position 0; zeros there keep NaN in padding out of the gradient.
    student_BKD = full_precision(hide(torch.take_along_dim(student_BSD, index, dim=1), steps.used))
    teacher_BKD = full_precision(hide(torch.take_along_dim(teacher_BSD.detach(), index, dim=1), steps.used))
    return student_BKD, teacher_BKD, steps
