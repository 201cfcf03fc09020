"""Losses between intermediate activations of a student and of its frozen teacher.

They work in float32 (float64 where the inputs are) whatever the autocast state, average over positions and send no
gradient to the teacher. A projection between different widths is the caller's module, because it has parameters.

Shape suffixes: B batch, S sequence, D features, R relation heads.
"""

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from lightning_qat.losses._common import (
    check_equal_shapes,
    check_mask,
    cosine,
    feature_mean,
    full_precision,
    hide,
    masked_mean,
    without_autocast,
)

_LITTLE: Final = 1e-3
_PROJECT = "give projection= a module that maps the student's width to the teacher's"


def hidden_state_mse(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    projection: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the mean squared difference of hidden states.

    mean over positions of mean_d (projection(student)_d - teacher_d)^2.

    Args:
        student: Hidden states `[..., features]`.
        teacher: The same leading dimensions; gets no gradient.
        mask: Boolean, 0 / 1 or weights >= 0, shaped like the leading dimensions of the states.
        projection: Applied to the student's states first, for example a `nn.Linear` that is trained along.

    Returns:
        A scalar >= 0, float32 or float64.

    Raises:
        ValueError: Shapes do not match after the projection.

    Source: arXiv:1909.10351 (TinyBERT), eq. 8, as a mean.

    Example:
        >>> hidden_state_mse(torch.ones(1, 2, 4), torch.zeros(1, 2, 4))
        tensor(1.)
    """
    projected, target = _hidden_states(student, teacher, mask, projection)
    return masked_mean(feature_mean((projected - target).square().mean(-1), mask), mask)


def hidden_state_nmse(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    projection: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the mean squared difference of hidden states over the mean square of the teacher's: 0 equal, 1 nothing.

    sum of (projection(student) - teacher)^2 / sum of teacher^2, over positions and features. It has no unit, so that
    one weight serves layers, models and tasks whose states are of different size.

    Args:
        student: Hidden states `[..., features]`.
        teacher: The same leading dimensions; gets no gradient.
        mask: Boolean, 0 / 1 or weights >= 0, shaped like the leading dimensions of the states.
        projection: Applied to the student's states first.

    Returns:
        A scalar >= 0, float32 or float64; 0 where the teacher's states are all zero or masked.

    Raises:
        ValueError: Shapes do not match after the projection.

    Source: arXiv:1909.10351 (TinyBERT), eq. 8, here relative to the teacher: the inverse of a signal-to-noise ratio.

    Example:
        >>> hidden_state_nmse(torch.tensor([[3.0, 5.0]]), torch.tensor([[3.0, 4.0]]))
        tensor(0.0400)
    """
    projected, target = _hidden_states(student, teacher, mask, projection)
    error = masked_mean(feature_mean((projected - target).square().mean(-1), mask), mask)
    size = masked_mean(feature_mean(target.square().mean(-1), mask), mask)
    return error / torch.where(size > 0, size, torch.ones_like(size)) * (size > 0)


def hidden_state_log_nmse(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    projection: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return ln(1 + `hidden_state_nmse` / 0.001): what counts is by which factor the difference shrinks.

    Its gradient is that of the signal-to-noise ratio in decibels (times -0.23), down to a relative difference of 0.001,
    below which it fades. So the pull is strong where states can follow closely, and weak where the grid of the weights
    does not let them.

    Args:
        student: Hidden states `[..., features]`.
        teacher: The same leading dimensions; gets no gradient.
        mask: Boolean, 0 / 1 or weights >= 0, shaped like the leading dimensions of the states.
        projection: Applied to the student's states first.

    Returns:
        A scalar >= 0, float32 or float64: 0 equal, 6.9 where nothing is left.

    Raises:
        ValueError: Shapes do not match after the projection.

    Source: `hidden_state_nmse`; the logarithm is ours, chosen in ``benchmarks/README.md``.

    Example:
        >>> hidden_state_log_nmse(torch.tensor([[3.0, 5.0]]), torch.tensor([[3.0, 4.0]]))
        tensor(3.7136)
    """
    return (hidden_state_nmse(student, teacher, mask=mask, projection=projection) / _LITTLE).log1p()


def hidden_state_cosine(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    projection: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return one minus the cosine of hidden states: their direction is matched, their size is free.

    mean over positions of 1 - cos(projection(student), teacher). A vector of norm below 1e-8 has cosine 0 and no
    gradient.

    Args:
        student: Hidden states `[..., features]`.
        teacher: The same leading dimensions; gets no gradient.
        mask: Boolean, 0 / 1 or weights >= 0, shaped like the leading dimensions of the states.
        projection: Applied to the student's states first.

    Returns:
        A scalar in 0 .. 2, float32 or float64.

    Raises:
        ValueError: Shapes do not match after the projection.

    Source: arXiv:1910.01108 (DistilBERT), section 3.

    Example:
        >>> hidden_state_cosine(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        tensor(0.2929)
    """
    projected, target = _hidden_states(student, teacher, mask, projection)
    return masked_mean(1.0 - cosine(projected, target), mask)


def attention_relation_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, num_relation_heads: int, mask: Tensor | None = None
) -> Tensor:
    """Return the divergence of the relations between tokens that queries, keys and values span.

    For each given pair of tensors A (queries, keys, values, or hidden states), split into R relation heads of width d:
    relation_r = softmax(A_r A_r^T / sqrt(d)), loss = mean over heads and tokens of KL(teacher's row || student's row),
    averaged over the given tensors. Widths of student and teacher may differ: only the S x S relations are compared.

    Args:
        student: Tensors `[batch, seq, width]`, for example `(q, k, v)` of the last block, or `(hidden,)`. Heads are
            joined first (`merge_heads`).
        teacher: As many tensors, with the same batch and sequence sizes; gets no gradient.
        num_relation_heads: R; divides every width. The paper uses more relation heads (48) than attention heads (12).
        mask: Boolean or 0 / 1, `[batch, seq]`; masked tokens neither attend nor are attended to.

    Returns:
        A scalar >= 0, float32 or float64.

    Raises:
        ValueError: Counts, shapes or heads do not match.

    Source: arXiv:2012.15828 (MiniLMv2), with the mean over Q-Q, K-K and V-V relations where the paper weights them;
    the V-V relation alone is that of arXiv:2002.10957 (MiniLM).

    Example:
        >>> q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> attention_relation_loss([q], [2 * q], num_relation_heads=1)
        tensor(0.2250)
        >>> attention_relation_loss([q], [q], num_relation_heads=2)
        tensor(0.)
    """
    if not student or len(student) != len(teacher):
        raise ValueError(
            f"student has {len(student)} tensors, teacher has {len(teacher)}; give both the same, at least one each"
        )
    losses = [
        _relation_divergence(ours, theirs, num_relation_heads, mask)
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).mean()


def merge_heads(x: Tensor) -> Tensor:
    """Return `[batch, heads, seq, width]` as `[batch, seq, heads * width]`, the input of `attention_relation_loss`.

    Args:
        x: Queries, keys or values split into attention heads.

    Returns:
        A tensor of three dimensions.

    Raises:
        ValueError: `x` does not have four dimensions.

    Example:
        >>> merge_heads(torch.tensor([[[[1.0], [2.0]], [[3.0], [4.0]]]]))
        tensor([[[1., 3.],
                 [2., 4.]]])
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {list(x.shape)}; expected [batch, heads, seq, width]")
    return x.transpose(1, 2).flatten(2)


def _hidden_states(
    student: Tensor, teacher: Tensor, mask: Tensor | None, projection: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    projected = student if projection is None else projection(student)
    check_equal_shapes(projected, teacher, names=("student", "teacher"), hint=_PROJECT)
    check_mask(mask, projected.shape[:-1])
    return full_precision(hide(projected, mask)), full_precision(hide(teacher.detach(), mask))


def _relation_divergence(student_BSD: Tensor, teacher_BSD: Tensor, num_heads: int, mask: Tensor | None) -> Tensor:
    for name, x in (("student", student_BSD), ("teacher", teacher_BSD)):
        _check_relation_input(name, x, num_heads)
    if student_BSD.shape[:2] != teacher_BSD.shape[:2]:
        raise ValueError(
            f"student has shape {list(student_BSD.shape)}, teacher has shape {list(teacher_BSD.shape)}; "
            "batch and sequence sizes must be equal"
        )
    check_mask(mask, student_BSD.shape[:2])
    with torch.no_grad():
        teacher_BRSS = _log_relations(teacher_BSD, num_heads, mask)
    student_BRSS = _log_relations(student_BSD, num_heads, mask)
    divergence_BS = (teacher_BRSS.exp() * (teacher_BRSS - student_BRSS)).sum(-1).mean(1)
    return masked_mean(divergence_BS, mask)


def _log_relations(x_BSD: Tensor, num_heads: int, mask: Tensor | None) -> Tensor:
    x_BRSd = full_precision(hide(x_BSD, mask)).reshape(*x_BSD.shape[:2], num_heads, -1).transpose(1, 2)
    # Autocast would run this product in bfloat16 and return 8 bits of the relation.
    with without_autocast(x_BSD):
        scores_BRSS = x_BRSd @ x_BRSd.transpose(-1, -2) / math.sqrt(x_BRSd.shape[-1])
    if mask is not None:
        # A large finite number: -inf would make rows without any token NaN.
        scores_BRSS = scores_BRSS.masked_fill((mask == 0)[:, None, None, :], torch.finfo(scores_BRSS.dtype).min / 4)
    return scores_BRSS.log_softmax(-1)


def _check_relation_input(name: str, x: Tensor, num_heads: int) -> None:
    if x.ndim != 3:
        raise ValueError(f"{name} has shape {list(x.shape)}; expected [batch, seq, width] (see merge_heads)")
    if num_heads < 1 or x.shape[-1] % num_heads:
        divisors = [n for n in range(1, x.shape[-1] + 1) if x.shape[-1] % n == 0]
        raise ValueError(f"num_relation_heads={num_heads} does not divide the {name}'s width; choose one of {divisors}")
