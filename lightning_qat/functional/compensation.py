"""Rounding that lets later weights compensate the error of earlier ones (GPTQ)."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lightning_qat.functional.levels import quantize
from lightning_qat.functional.points import Rounding

_BLOCK: Final = 128  # columns whose errors reach the columns behind them in one product
_MARGIN: Final = 0.02  # distance that a moved weight keeps from the border of its cell, in half cells
_ATTEMPTS: Final = 8


@dataclass(frozen=True, eq=False)
class Levels:
    """The grid of a weight matrix, spread out to its shape.

    Args:
        scale: positive step of each element, [outputs, features].
        zero_point: of each element, or None.
        lo: smallest level.
        hi: largest level.
        rounding: of the grid.
    """

    scale: Tensor
    zero_point: Tensor | None
    lo: Tensor | float
    hi: Tensor | float
    rounding: Rounding

    def of(self, weight: Tensor, columns: slice | Tensor = slice(None)) -> Tensor:
        """Return the levels that elements round to, of some columns."""
        zero_point = None if self.zero_point is None else self.zero_point[:, columns]
        return quantize(weight, self.scale[:, columns], zero_point, lo=self.lo, hi=self.hi, rounding=self.rounding)

    def values(self, levels: Tensor, columns: slice | Tensor = slice(None)) -> Tensor:
        """Return what levels stand for, of some columns."""
        zero = 0.0 if self.zero_point is None else self.zero_point[:, columns]
        return (levels - zero) * self.scale[:, columns]


def output_error(weight: Tensor, rounded: Tensor, gram: Tensor) -> Tensor:
    r"""Return the squared error of each output, :math:`(w - \hat w)^T G (w - \hat w)`: [outputs, 1].

    Args:
        weight: [outputs, features].
        rounded: [outputs, features].
        gram: mean of the outer products of the inputs, [features, features].
    """
    error = weight - rounded
    return ((error @ gram) * error).sum(1, keepdim=True)


def compensated_levels(weight: Tensor, gram: Tensor, levels: Levels, *, damping: float = 0.01) -> Tensor:
    r"""Return levels that keep the outputs of a linear layer, not each weight: the rounding of GPTQ.

    Columns are rounded one after the other, those with the strongest inputs first; the error of each is compensated by
    the columns that are still to come, as far as their inputs are correlated.

    Args:
        weight: [outputs, features], float32 or float64.
        gram: mean of the outer products of the inputs, [features, features], symmetric.
        levels: the grid.
        damping: added to the diagonal of the Gram matrix, relative to its mean; positive.

    Raises:
        ValueError: a Gram matrix that is not finite, or not positive definite even with much more damping.

    Source: GPTQ, arXiv:2210.17323 (algorithm 1, with its ordering by activation).

    >>> from lightning_qat.quantization import Int
    >>> grid = Levels(torch.ones(1, 2), None, -2.0, 1.0, Int(2))
    >>> inputs = torch.tensor([[1.0, 1.0], [1.0, 1.1]])  # nearly equal: one weight can stand in for the other
    >>> compensated_levels(torch.tensor([[0.4, 0.4]]), inputs.T @ inputs / 2, grid)
    tensor([[1., 0.]])
    """
    if not gram.diagonal().any():  # inputs that are always zero
        return levels.of(weight)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    factor = _inverse_factor(gram[order][:, order], damping)
    rest, found = weight[:, order].clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], _BLOCK):
        block = slice(start, min(start + _BLOCK, weight.shape[1]))
        errors = torch.empty_like(rest[:, block])
        for column in range(block.start, block.stop):
            at = order[column : column + 1]
            q = levels.of(rest[:, column : column + 1], at)
            found[:, at] = q
            error = (rest[:, column : column + 1] - levels.values(q, at)) / factor[column, column]
            rest[:, column : block.stop] -= error * factor[column : column + 1, column : block.stop]
            errors[:, column - start : column - start + 1] = error
        rest[:, block.stop :] -= errors @ factor[block, block.stop :]
    return found


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse, with as much damping as it takes."""
    if not torch.isfinite(gram).all():
        raise ValueError("the inputs of the layer are not all finite")
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    mean = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    for attempt in range(_ATTEMPTS):
        lower, failed = torch.linalg.cholesky_ex(gram + damping * 10.0**attempt * mean * eye)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            result: Tensor = upper
            return result
    raise ValueError("the Gram matrix of the layer's inputs is not positive definite")


def least_squares_scale(weight: Tensor, steps: Tensor, gram: Tensor) -> Tensor:
    r"""Return the scale of each output that fits given levels best: :math:`w^T G q / q^T G q`, [outputs, 1].

    Args:
        weight: [outputs, features].
        steps: levels less zero points, [outputs, features].
        gram: as in :func:`compensated_levels`.
    """
    weighted = steps @ gram
    norm = (weighted * steps).sum(1, keepdim=True)
    best: Tensor = (weighted * weight).sum(1, keepdim=True) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    return best


def moved_into_cells(weight: Tensor, chosen: Tensor, levels: Levels) -> Tensor:
    """Return the weight moved just so far that each element rounds to the level chosen for it.

    Args:
        weight: [outputs, features].
        chosen: levels, [outputs, features].
        levels: the grid.
    """
    centers = levels.values(chosen)
    reach = (1.0 - _MARGIN) * levels.rounding.half_cell * levels.scale
    moved = torch.minimum(torch.maximum(weight, centers - reach), centers + reach)
    return torch.where(levels.of(moved) == chosen, moved, centers)  # cells of Ternary(threshold) are not centered
