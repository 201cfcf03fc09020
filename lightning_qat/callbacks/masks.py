"""Masks: functions of a batch that say which positions count, as values that a config can hold.

`Distillation` and `ReasoningMatch` take any function of the batch; these are the usual ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lightning_qat.losses import (
    StepKind,
    boundaries_from_delimiter,
    boundaries_from_mask,
    kinds_from_delimiters,
    step_weights,
    target_mask,
)


@final
@dataclass(frozen=True)
class BatchMask:
    """The mask that a batch holds: boolean or 0 / 1, one entry per position.

    Args:
        key: of a dictionary, or the index of a tuple.

    Raises:
        ValueError: when called on a batch without that entry; the message lists those it has.
        TypeError: when called on an entry of a floating type.

    Example:
        >>> import torch
        >>> BatchMask("step_mask")({"step_mask": torch.tensor([[0, 1]])})
        tensor([[False,  True]])
    """

    key: str | int

    def __call__(self, batch: Any) -> Tensor:
        """Return the mask, boolean."""
        mask = entry(batch, self.key, self)
        return boundaries_from_mask(mask, mask.shape)


@final
@dataclass(frozen=True)
class DelimiterMask:
    """The positions of a delimiter token, such as a line break: there a step of reasoning ends.

    Args:
        delimiter: token id, or several.
        key: of the tokens in the batch, int64 `[batch, seq]`.
        within: key of a mask of positions that may count, such as the solution without its problem; None: all.

    Raises:
        TypeError: a delimiter that is no integer.
        ValueError: when called on a batch without such entries.

    Example:
        >>> import torch
        >>> DelimiterMask(9)({"tokens": torch.tensor([[4, 9, 5]])})
        tensor([[False,  True, False]])
    """

    delimiter: int | Sequence[int]
    key: str | int = "tokens"
    within: str | int | None = None

    def __post_init__(self) -> None:
        several = isinstance(self.delimiter, Sequence) and not isinstance(self.delimiter, str)
        ids = list(self.delimiter) if several and isinstance(self.delimiter, Sequence) else [self.delimiter]
        if not ids or not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise TypeError(
                f"DelimiterMask: delimiter={self.delimiter!r} is not the id of a token, an integer, or several; look "
                "it up in the vocabulary, such as tokenizer.convert_tokens_to_ids"
            )

    def __call__(self, batch: Any) -> Tensor:
        """Return the mask, boolean."""
        mask = None if self.within is None else entry(batch, self.within, self)
        return boundaries_from_delimiter(entry(batch, self.key, self), self.delimiter, mask=mask)


@final
@dataclass(frozen=True)
class TargetMask:
    """The positions whose target counts, where targets and logits are aligned.

    Args:
        key: of the targets in the batch.
        ignore_index: the target that does not count.

    Raises:
        ValueError: when called on a batch without that entry.

    Example:
        >>> import torch
        >>> TargetMask()({"targets": torch.tensor([[-100, 3]])})
        tensor([[False,  True]])
    """

    key: str | int = "targets"
    ignore_index: int = -100

    def __call__(self, batch: Any) -> Tensor:
        """Return the mask, boolean."""
        return target_mask(entry(batch, self.key, self), ignore_index=self.ignore_index)


@final
@dataclass(frozen=True)
class KindWeights:
    """The weight of each position by the kind of the step whose delimiter stands there.

    Args:
        kinds: delimiter token to `StepKind` (or its number); other positions are of the first kind.
        weights: one weight >= 0 for each kind, in the order of `StepKind`.
        key: of the tokens in the batch.

    Raises:
        ValueError: a kind without a weight, a weight below 0; when called on a batch without that entry.

    Example:
        >>> import torch
        >>> KindWeights({9: StepKind.CALCULATION})({"tokens": torch.tensor([[4, 9, 5]])})
        tensor([[1.0000, 1.5000, 1.0000]])
    """

    kinds: Mapping[int, StepKind]
    weights: Sequence[float] = (1.0, 1.5, 1.0, 2.0, 2.0)
    key: str | int = "tokens"

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights) < 0:
            raise ValueError(f"KindWeights: weights={self.weights!r}; expected one weight >= 0 for each kind of step")
        unknown = {token: kind for token, kind in self.kinds.items() if int(kind) not in range(len(self.weights))}
        if unknown:
            raise ValueError(
                f"KindWeights: kinds={unknown!r} have no weight; there are {len(self.weights)}, for the kinds 0 to "
                f"{len(self.weights) - 1}: give more weights, or kinds of StepKind"
            )

    def __call__(self, batch: Any) -> Tensor:
        """Return the weights, float32."""
        return step_weights(kinds_from_delimiters(entry(batch, self.key, self), self.kinds), self.weights)


def ignored_targets(batch: Any, ignore_index: int = -100) -> tuple[str | int, float] | None:
    """Return where a batch holds targets that do not count, and their share; None where it holds none.

    Args:
        batch: a mapping or a sequence of tensors; of anything else nothing is known.
        ignore_index: the target that does not count.

    Example:
        >>> import torch
        >>> ignored_targets({"tokens": torch.tensor([[7, 3]]), "labels": torch.tensor([[-100, 3]])})
        ('labels', 0.5)
    """
    pairs = batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, list | tuple) else ()
    for key, value in pairs:
        if isinstance(value, Tensor) and value.dtype == torch.long and (value == ignore_index).any():
            return key, float((value == ignore_index).float().mean())
    return None


def entry(batch: Any, key: str | int, asked: object) -> Tensor:
    """Return a tensor of a batch.

    Args:
        batch: a mapping, or a sequence where the key is a number.
        key: of the tensor.
        asked: what wants it, for the message.

    Raises:
        ValueError: there is no such tensor.

    Example:
        >>> import torch
        >>> entry((torch.tensor(1), torch.tensor(2)), 1, None)
        tensor(2)
    """
    entries = dict(batch) if isinstance(batch, Mapping) else dict(enumerate(batch)) if _is_sequence(batch) else {}
    if not isinstance(entries.get(key), Tensor):
        held = [name for name, value in entries.items() if isinstance(value, Tensor)]
        raise ValueError(
            f"{asked!r}: the batch, a {type(batch).__name__}, has no tensor under {key!r}; it has {held}. Name one of "
            "these, let the data add it, or pass a function of the batch"
        )
    found: Tensor = entries[key]
    return found


def _is_sequence(batch: Any) -> bool:
    return isinstance(batch, Sequence) and not isinstance(batch, str)
