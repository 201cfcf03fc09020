"""Greedy generation and its score: functions of a model that maps tokens to logits."""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def greedy_generate(
    model: Callable[[Tensor], Tensor], prompts: Tensor, *, lengths: Tensor, max_length: int, end_token: int
) -> Tensor:
    """Return the prompts continued by the most probable token, one at a time.

    A row ends at its first ``end_token`` or at ``max_length``. The model sees the whole row each time (no cache of
    keys and values), rows that ended are left out. Put a module into evaluation mode before.

    Args:
        model: Causal; maps tokens [B, T] to logits [B, T, V].
        prompts: int64 [B, longest prompt], filled up on the right with anything.
        lengths: int64 [B], the length of each prompt, at least 1.
        max_length: Of prompt and continuation, longer than each prompt.
        end_token: Ends a row, and fills the rest of it.

    Returns:
        int64 [B, max_length].

    Raises:
        ValueError: A length is not in 1 .. max_length - 1 or beyond the width of the prompts.

    Example:
        >>> def count_down(tokens: Tensor) -> Tensor:
        ...     return torch.nn.functional.one_hot((tokens - 1).clamp(min=0), 10)
        >>> greedy_generate(count_down, torch.tensor([[3, 0], [9, 5]]), lengths=torch.tensor([1, 2]), max_length=5,
        ...                 end_token=0)
        tensor([[3, 2, 1, 0, 0],
                [9, 5, 4, 3, 2]])
    """
    _check_lengths(prompts, lengths, max_length)
    width = min(prompts.shape[1], max_length)
    tokens = prompts.new_full((len(prompts), max_length), end_token)
    is_prompt = torch.arange(width, device=prompts.device) < lengths[:, None]
    tokens[:, :width] = prompts[:, :width].where(is_prompt, tokens[:, :width])
    ends = lengths.clone()
    rows = torch.arange(len(prompts), device=prompts.device)
    while len(rows):
        last = ends[rows] - 1
        logits = model(tokens[rows, : int(last.max()) + 1])
        chosen = logits[torch.arange(len(rows), device=rows.device), last].argmax(dim=-1)
        tokens[rows, last + 1] = chosen
        ends[rows] += 1
        rows = rows[(chosen != end_token) & (last + 2 < max_length)]
    return tokens


def _check_lengths(prompts: Tensor, lengths: Tensor, max_length: int) -> None:
    longest = min(prompts.shape[1], max_length - 1)
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= longest:
        raise ValueError(
            f"greedy_generate: lengths {int(lengths.min())} .. {int(lengths.max())}, expected 1 .. {longest} for "
            f"prompts of width {prompts.shape[1]} and max_length={max_length}"
        )


def answers_match(generated: Tensor, expected: Tensor, *, answer_token: int, end_token: int) -> Tensor:
    """Return for each row whether both hold the same answer: what stands between the answer token and the next end.

    The answer counts, not the steps that led to it. A row without both marks has no answer and matches nothing.

    Args:
        generated: int64 [B, T].
        expected: int64 [B, any length].
        answer_token: The first one in a row starts the answer.
        end_token: Ends it.

    Returns:
        bool [B].

    Example:
        >>> generated = torch.tensor([[5, 8, 1, 2, 9], [8, 1, 9, 9, 9], [8, 1, 2, 2, 2]])
        >>> expected = torch.tensor([[8, 1, 2, 9], [8, 1, 2, 9], [8, 1, 2, 9]])
        >>> answers_match(generated, expected, answer_token=8, end_token=9)
        tensor([ True, False, False])
    """

    def answer(row: list[int]) -> list[int] | None:
        if answer_token not in row:
            return None
        tail = row[row.index(answer_token) + 1 :]
        return tail[: tail.index(end_token)] if end_token in tail else None

    pairs = zip(generated.tolist(), expected.tolist(), strict=True)
    matches = [(found := answer(row)) is not None and found == answer(wanted) for row, wanted in pairs]
    return torch.tensor(matches, dtype=torch.bool, device=generated.device)
