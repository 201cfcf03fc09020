"""The Kullback-Leibler divergence of rows of logits, with its gradient found in the same pass."""

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_qat.functional.application import unaliased
from lightning_qat.losses._common import full_precision

_CHUNK: Final = 1 << 17  # logits handled at a time on CPU: the temporaries then stay in the cache


_WORTHWHILE: Final = 1 << 16  # logits from which on fewer passes earn the time of the calls


class _Divergence(torch.autograd.Function):
    """Keeps softmax(student / T) - softmax(teacher / T) for backward, and nothing else."""

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, temperature: float, hidden: Tensor | None, wanted: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(full_precision(student[:0]).dtype, full_precision(teacher[:0]).dtype)
        values = torch.empty(student.shape[0], dtype=dtype, device=student.device)
        slopes = torch.empty(student.shape if wanted else (0,), dtype=dtype, device=student.device)
        for rows in _pieces(student):
            log_student, log_teacher = (
                (full_precision(logits[rows]) / temperature).log_softmax(-1) for logits in (student, teacher)
            )
            weights = log_teacher.exp()
            values[rows] = _sums(weights, log_teacher, log_student)
            if wanted:
                torch.sub(log_student.exp_(), weights, out=slopes[rows])
        if hidden is not None:
            values.index_fill_(0, hidden, 0.0)
            slopes = slopes.index_fill_(0, hidden, 0.0) if wanted else slopes
        return unaliased(values), unaliased(slopes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.temperature, ctx.dtype = inputs[2], inputs[0].dtype
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * (grad / ctx.temperature)[:, None]).to(ctx.dtype), None, None, None, None


def _pieces(logits: Tensor) -> Iterator[Any]:
    rows = max(1, _CHUNK // max(1, logits.shape[1]))
    for start in range(0, logits.shape[0], rows):
        yield slice(start, start + rows)


def _sums(weights: Tensor, log_first: Tensor, log_second: Tensor) -> Tensor:
    """Return the divergence of each row; classes of probability 0 contribute 0."""
    sums = torch.sub(log_first, log_second).mul_(weights).sum(-1)
    if sums.isfinite().all():
        return sums
    ratio = torch.where(weights > 0, log_first - log_second, torch.zeros_like(log_first))  # 0 * inf is NaN
    return (weights * ratio).sum(-1)


def in_pieces(logits: Tensor) -> bool:
    """Whether :func:`row_divergence` is the faster way."""
    return logits.device.type == "cpu" and logits.numel() >= _WORTHWHILE and not torch.compiler.is_compiling()


def row_divergence(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    """Return KL(softmax(teacher / T) || softmax(student / T)) of each position, 0 where masked.

    Args:
        student: Raw scores, `[..., classes]`.
        teacher: The same shape; gets no gradient.
        temperature: T > 0.
        mask: Positions with 0 may hold anything; `[...]`.
    """
    rows = student.reshape(-1, student.shape[-1]), teacher.detach().reshape(-1, teacher.shape[-1])
    hidden = None if mask is None else (mask == 0).flatten().nonzero().flatten()
    wanted = student.requires_grad and torch.is_grad_enabled()
    values: Tensor = _Divergence.apply(*rows, temperature, hidden, wanted)[0]  # type: ignore[no-untyped-call]
    return values.reshape(student.shape[:-1])
