"""Where steps of reasoning end, and of what kind they are: from delimiter tokens, from the batch, from a function."""

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from lightning_qat.losses._common import check_mask


class StepKind(IntEnum):
    """What a step of reasoning does; the ids that `step_weights` reads."""

    SETUP = 0
    CALCULATION = 1
    INFERENCE = 2
    CONCLUSION = 3
    ANSWER = 4


def boundaries_from_delimiter(tokens: Tensor, delimiter: int | Sequence[int], *, mask: Tensor | None = None) -> Tensor:
    """Return the positions of delimiter tokens: there a step of reasoning ends.

    Args:
        tokens: Token ids, `[batch, seq]`.
        delimiter: The id of the token that ends a step (a line break, say), or several.
        mask: Boolean or 0 / 1, `[batch, seq]`: positions that may count, for example the completion without its prompt.

    Returns:
        Boolean, `[batch, seq]`.

    Raises:
        ValueError: No delimiter, or the mask does not have the shape of the tokens.

    Example:
        >>> boundaries_from_delimiter(torch.tensor([[5, 1, 6, 7, 1]]), 1)
        tensor([[False,  True, False, False,  True]])
    """
    ids = (delimiter,) if isinstance(delimiter, int) else tuple(delimiter)
    if not ids:
        raise ValueError("delimiter is empty; give the id of at least one token that ends a step")
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for token in ids:
        found = found | (tokens == token)
    return found if mask is None else found & boundaries_from_mask(mask, tokens.shape)


def boundaries_from_mask(boundaries: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a mask that came with the batch as boundaries, after a look at its shape and type.

    Args:
        boundaries: Boolean or integers 0 / 1, `[batch, seq]`, non-zero where a step ends.
        shape: `[batch, seq]` of the tokens.

    Returns:
        Boolean, `[batch, seq]`.

    Raises:
        TypeError: The mask has a floating type (a mask of probabilities is no set of boundaries).
        ValueError: The shape differs.

    Example:
        >>> boundaries_from_mask(torch.tensor([[0, 1, 1]]), (1, 3))
        tensor([[False,  True,  True]])
    """
    if boundaries.is_floating_point() or boundaries.is_complex():
        raise TypeError(f"boundaries has dtype {boundaries.dtype}; expected bool or an integer type with 0 and 1")
    check_mask(boundaries, shape, name="boundaries")
    return boundaries != 0


def boundaries_from_function(tokens: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what a function of the tokens says about where steps end, after a look at its shape and type.

    Args:
        tokens: Token ids, `[batch, seq]`.
        function: Maps them to booleans or 0 / 1 of the same shape.

    Returns:
        Boolean, `[batch, seq]`.

    Raises:
        TypeError: The function returns a floating type.
        ValueError: It returns another shape.

    Example:
        >>> boundaries_from_function(torch.tensor([[4, 9, 5]]), lambda tokens: tokens > 8)
        tensor([[False,  True, False]])
    """
    return boundaries_from_mask(function(tokens), tokens.shape)


def boundary_indices(boundaries: Tensor, *, max_steps: int | None = None) -> tuple[Tensor, Tensor]:
    """Return boundaries as positions, right-aligned: the last column is the last step of each sequence.

    Works without a look at the data (no synchronization of an accelerator), so the width is fixed beforehand.

    Args:
        boundaries: Boolean, `[batch, seq]`.
        max_steps: Columns K. Where a sequence has more steps, its last K are kept. None: K = seq, nothing is cut.

    Returns:
        Positions `[batch, K]`, ascending, 0 where unused, and a boolean `[batch, K]` that is True where used.

    Raises:
        ValueError: `max_steps` is below 1.

    Example:
        >>> boundary_indices(torch.tensor([[True, False, True], [False, True, False]]), max_steps=2)
        (tensor([[0, 2],
                [0, 1]]), tensor([[ True,  True],
                [False,  True]]))
    """
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps={max_steps}; expected at least 1, or None for the length of the sequence")
    length = boundaries.shape[-1]
    positions = torch.arange(length, device=boundaries.device).expand(boundaries.shape)
    count = length if max_steps is None else min(max_steps, length)
    last = torch.where(boundaries, positions, -1).topk(count, dim=-1).values.flip(-1)
    return last.clamp(min=0), last >= 0


def kinds_from_delimiters(tokens: Tensor, kinds: Mapping[int, StepKind]) -> Tensor:
    """Return the step kind that each delimiter token stands for, `StepKind.SETUP` (weight 1) elsewhere.

    Args:
        tokens: Token ids, `[batch, seq]`.
        kinds: Token id to kind.

    Returns:
        Kind ids, int64, `[batch, seq]`.

    Example:
        >>> kinds_from_delimiters(torch.tensor([[5, 1, 2]]), {1: StepKind.CALCULATION, 2: StepKind.ANSWER})
        tensor([[0, 1, 4]])
    """
    result = torch.full_like(tokens, int(StepKind.SETUP), dtype=torch.int64)
    for token, kind in kinds.items():
        result = result.masked_fill(tokens == token, int(kind))
    return result


def step_weights(kinds: Tensor, weights: Sequence[float] = (1.0, 1.5, 1.0, 2.0, 2.0)) -> Tensor:
    """Return the weight of each position by the kind of the step that ends there.

    Args:
        kinds: `StepKind` ids (or your own, 0 .. len(weights) - 1), `[batch, seq]`.
        weights: One weight >= 0 per kind, in the order of the ids.

    Returns:
        float32, shaped like `kinds`.

    Raises:
        ValueError: A weight is negative, or there are none.

    Example:
        >>> step_weights(torch.tensor([[StepKind.SETUP, StepKind.CALCULATION, StepKind.ANSWER]]))
        tensor([[1.0000, 1.5000, 2.0000]])
    """
    if not weights or min(weights) < 0:
        raise ValueError(f"weights={tuple(weights)}; expected one weight >= 0 per kind of step")
    return torch.tensor(weights, dtype=torch.float32, device=kinds.device)[kinds]
