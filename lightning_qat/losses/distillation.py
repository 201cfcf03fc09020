"""Losses between the outputs of a student and of its frozen teacher.

Every loss works in float32 (float64 where the inputs are), averages over positions (tokens, samples), never over
classes, and sends no gradient to the teacher. Temperatures enter as softmax(logits / T), and the result is multiplied
by T^2, which keeps the size of the gradient independent of T (Hinton et al., arXiv:1503.02531, section 2).
"""

import math

import torch
from torch import Tensor

from lightning_qat.losses._common import (
    check_equal_shapes,
    check_mask,
    check_positive,
    feature_mean,
    full_precision,
    hide,
    masked_mean,
)
from lightning_qat.losses._divergence import in_pieces, row_divergence


def kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0, mask: Tensor | None = None
) -> Tensor:
    """Return the forward Kullback-Leibler divergence of the student from the teacher, per position.

    T^2 * mean over positions of sum_c p_t(c) * (log p_t(c) - log p_s(c)), with p = softmax(logits / T).

    `torch.nn.functional.kl_div(reduction="mean")` divides by the number of classes too (32000 times smaller at a
    vocabulary of 32000): it is not this loss.

    Args:
        student_logits: Raw scores, `[..., classes]`, any floating dtype. An entry of -inf removes a class; removed on
            the student's side only, the loss is inf.
        teacher_logits: The same shape; gets no gradient.
        temperature: Softmax temperature T > 0.
        mask: Boolean, 0 / 1 or weights >= 0, shaped like the logits without classes; positions with 0 do not count,
            whatever they hold. All positions masked: the loss is 0.

    Returns:
        A scalar >= 0, float32 or float64. In eager mode on CPU that of many logits has first derivatives only.

    Raises:
        ValueError: Shapes do not match, or the temperature is not positive.

    Source: arXiv:1503.02531, section 2.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0, 0.0]])
        >>> kl_divergence(torch.tensor([[0.0, 0.0, 0.0]]), teacher, temperature=1.0)
        tensor(0.4330)
        >>> kl_divergence(teacher, teacher)
        tensor(0.)
    """
    if in_pieces(student_logits):
        _check_logits(student_logits, teacher_logits, mask)
        check_positive(temperature, name="temperature")
        return temperature**2 * masked_mean(row_divergence(student_logits, teacher_logits, temperature, mask), mask)
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature, mask)
    return temperature**2 * masked_mean(_divergence(teacher, student), mask)


def reverse_kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0, mask: Tensor | None = None
) -> Tensor:
    """Return the reverse Kullback-Leibler divergence, which seeks the teacher's modes instead of covering them.

    T^2 * mean over positions of sum_c p_s(c) * (log p_s(c) - log p_t(c)), with p = softmax(logits / T).

    Args:
        student_logits: Raw scores, `[..., classes]`.
        teacher_logits: The same shape; gets no gradient. A class removed (-inf) on the teacher's side only makes the
            loss inf.
        temperature: Softmax temperature T > 0.
        mask: As in `kl_divergence`.

    Returns:
        A scalar >= 0, float32 or float64.

    Raises:
        ValueError: Shapes do not match, or the temperature is not positive.

    Source: arXiv:2306.08543 (MiniLLM); here per position over all classes instead of by sampled sequences.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0, 0.0]])
        >>> reverse_kl_divergence(torch.tensor([[0.0, 0.0, 0.0]]), teacher, temperature=1.0)
        tensor(0.4743)
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature, mask)
    return temperature**2 * masked_mean(_divergence(student, teacher), mask)


def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 2.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the generalized Jensen-Shannon divergence, bounded and finite for any two distributions.

    T^2 * mean over positions of beta * KL(p_t || m) + (1 - beta) * KL(p_s || m), m = beta * p_t + (1 - beta) * p_s.

    Args:
        student_logits: Raw scores, `[..., classes]`.
        teacher_logits: The same shape; gets no gradient.
        beta: Share of the teacher in the mixture, 0 < beta < 1; small values approach the direction of forward KL,
            large ones that of reverse KL.
        temperature: Softmax temperature T > 0.
        mask: As in `kl_divergence`.

    Returns:
        A scalar in 0 .. T^2 * log 2 (for beta = 0.5), float32 or float64.

    Raises:
        ValueError: Shapes do not match, or `beta` or the temperature is out of range.

    Source: arXiv:2306.13649 (generalized knowledge distillation), section 2; the factor T^2 is ours.

    Example:
        >>> a, b = torch.tensor([[9.0, -9.0]]), torch.tensor([[-9.0, 9.0]])
        >>> jensen_shannon(a, b, temperature=1.0)
        tensor(0.6931)
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(
            f"beta={beta!r}; expected 0 < beta < 1. For the limits use kl_divergence or reverse_kl_divergence"
        )
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature, mask)
    # logaddexp(-inf, -inf) has a NaN gradient; at this floor the probability is exactly 0 all the same.
    floor = torch.finfo(student.dtype).min / 4
    mixture = torch.logaddexp(
        (teacher + math.log(beta)).clamp(min=floor), (student + math.log1p(-beta)).clamp(min=floor)
    )
    divergence = beta * _divergence(teacher, mixture) + (1.0 - beta) * _divergence(student, mixture)
    return temperature**2 * masked_mean(divergence, mask)


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0, mask: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy of the student under the teacher's distribution.

    T^2 * mean over positions of -sum_c p_t(c) * log p_s(c). The gradient equals that of `kl_divergence`; the value
    exceeds it by the teacher's entropy, so its minimum is not 0.

    Args:
        student_logits: Raw scores, `[..., classes]`.
        teacher_logits: The same shape; gets no gradient.
        temperature: Softmax temperature T > 0.
        mask: As in `kl_divergence`.

    Returns:
        A scalar >= 0, float32 or float64.

    Raises:
        ValueError: Shapes do not match, or the temperature is not positive.

    Source: arXiv:1503.02531, section 2.

    Example:
        >>> soft_cross_entropy(torch.zeros(1, 4), torch.zeros(1, 4), temperature=1.0)
        tensor(1.3863)
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature, mask)
    weights = teacher.exp()
    terms = weights * torch.where(weights > 0, student, torch.zeros_like(student))
    return -(temperature**2) * masked_mean(terms.sum(-1), mask)


def mean_squared_error(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared difference of two outputs, for regression (or for logits without a softmax).

    mean over positions of mean over features of (student - teacher)^2.

    Args:
        student: Any floating tensor.
        teacher: The same shape; gets no gradient.
        mask: Boolean, 0 / 1 or weights >= 0, shaped like the leading dimensions of the outputs (any number of them).

    Returns:
        A scalar >= 0, float32 or float64.

    Raises:
        ValueError: Shapes do not match.

    Source: arXiv:1312.6184 (matching outputs without a softmax).

    Example:
        >>> mean_squared_error(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
        tensor(2.5000)
    """
    check_equal_shapes(student, teacher, names=("student", "teacher"), hint="project the student to the teacher's size")
    check_mask(mask, student.shape[: mask.ndim] if mask is not None else ())
    difference = full_precision(hide(student, mask)) - full_precision(hide(teacher.detach(), mask))
    return masked_mean(feature_mean(difference.square(), mask), mask)


def top1_agreement(student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the share of positions at which student and teacher prefer the same class.

    mean over positions of [argmax_c student(c) = argmax_c teacher(c)]. A measure for logs, without gradient.

    Args:
        student_logits: Raw scores, `[..., classes]`.
        teacher_logits: The same shape.
        mask: As in `kl_divergence`.

    Returns:
        A float32 scalar in 0 .. 1.

    Raises:
        ValueError: Shapes do not match.

    Example:
        >>> top1_agreement(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([[5.0, 0.0], [1.0, 0.0]]))
        tensor(0.5000)
    """
    _check_logits(student_logits, teacher_logits, mask)
    with torch.no_grad():
        same = student_logits.argmax(-1) == teacher_logits.argmax(-1)
        return masked_mean(same.float(), mask)


def causal_shift(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and targets of a causal language model aligned: position t predicts token t + 1.

    Args:
        logits: `[batch, seq, classes]`, position t computed from tokens 0 .. t.
        targets: Token ids `[batch, seq]`, not shifted.

    Returns:
        `logits[:, :-1]` and `targets[:, 1:]`, views.

    Raises:
        ValueError: Batch or sequence sizes differ, or there is only one position.

    Example:
        >>> logits, targets = causal_shift(torch.zeros(1, 3, 5), torch.tensor([[7, 8, 9]]))
        >>> tuple(logits.shape), targets
        ((1, 2, 5), tensor([[8, 9]]))
    """
    if logits.ndim != 3 or targets.shape != logits.shape[:2] or targets.shape[1] < 2:
        raise ValueError(
            f"logits has shape {list(logits.shape)}, targets has shape {list(targets.shape)}; expected "
            "[batch, seq, classes] and [batch, seq] with at least 2 positions"
        )
    return logits[:, :-1], targets[:, 1:]


def target_mask(targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Return the mask of targets that count, where targets and logits are already aligned.

    Args:
        targets: Class or token ids, any shape.
        ignore_index: The id that marks positions without a target.

    Returns:
        Boolean, shaped like `targets`.

    Example:
        >>> target_mask(torch.tensor([[5, -100, 7]]))
        tensor([[ True, False,  True]])
    """
    return targets != ignore_index


def next_token_mask(targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Return the mask of logits positions that count in a causal model whose targets are not shifted.

    mask[t] = (targets[t + 1] != ignore_index), and False at the last position: the causal shift as a mask, so that
    student and teacher logits are compared where they are, without slicing or copying them.

    Args:
        targets: Token ids, `[..., seq]`, not shifted.
        ignore_index: The id that marks positions without a target.

    Returns:
        Boolean, shaped like `targets`.

    Example:
        >>> next_token_mask(torch.tensor([[-100, 5, 7, -100]]))
        tensor([[ True,  True, False, False]])
    """
    mask = torch.zeros_like(targets, dtype=torch.bool)
    mask[..., :-1] = targets[..., 1:] != ignore_index
    return mask


def _check_logits(student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
    hint = "slice a padded vocabulary to the classes that both have, and shift both or neither"
    check_equal_shapes(student, teacher, names=("student_logits", "teacher_logits"), hint=hint)
    check_mask(mask, student.shape[:-1])


def _log_probabilities(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check_logits(student, teacher, mask)
    check_positive(temperature, name="temperature")
    with torch.no_grad():
        log_teacher = (full_precision(hide(teacher, mask)) / temperature).log_softmax(-1)
    return (full_precision(hide(student, mask)) / temperature).log_softmax(-1), log_teacher


def _divergence(log_first: Tensor, log_second: Tensor) -> Tensor:
    """Return KL(first || second) over the last dimension; classes of probability 0 contribute 0, also backward."""
    weights = log_first.exp()
    ratio = torch.where(weights > 0, log_first - log_second, torch.zeros_like(log_first))
    return (weights * ratio).sum(-1)
