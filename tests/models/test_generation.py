"""Greedy generation against a loop over single rows, and the comparison of answers."""

import pytest
import torch
from torch import Tensor

from lightning_qat.models import ArithmeticModel, answers_match, greedy_generate

END = 0


def reference(model: ArithmeticModel, prompt: list[int], max_length: int) -> list[int]:
    row = list(prompt)
    while len(row) < max_length and (row[-1] != END or len(row) == len(prompt)):
        logits = model(torch.tensor([row]))
        row.append(int(logits[0, -1].argmax()))
    return row + [END] * (max_length - len(row))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_value_against_one_row_at_a_time(seed: int) -> None:
    torch.manual_seed(seed)
    model = ArithmeticModel(hidden_size=16, num_heads=2, num_layers=1, window_size=12).eval()
    torch.nn.init.normal_(model.embedding.weight)
    lengths = torch.tensor([1, 3, 5, 2])
    prompts = torch.randint(1, 17, (4, 5))
    generated = greedy_generate(model, prompts, lengths=lengths, max_length=12, end_token=END)
    rows = [prompt[:length] for prompt, length in zip(prompts.tolist(), lengths.tolist(), strict=True)]
    assert generated.tolist() == [reference(model, row, 12) for row in rows]
    assert prompts.max() <= 16  # the prompts are left as they were


def test_what_stands_behind_a_prompt_plays_no_part() -> None:
    model = ArithmeticModel(hidden_size=16, num_heads=2, num_layers=1, window_size=12).eval()
    first = torch.tensor([[3, 4, 0, 0]])
    second = torch.tensor([[3, 4, 9, 9]])
    generated = [
        greedy_generate(model, prompts, lengths=torch.tensor([2]), max_length=9, end_token=END)
        for prompts in (first, second)
    ]
    assert torch.equal(*generated)
    assert generated[0][0, :2].tolist() == [3, 4]


def test_rows_stop_on_their_own() -> None:
    calls: list[int] = []

    def count_down(tokens: Tensor) -> Tensor:
        calls.append(len(tokens))
        return torch.nn.functional.one_hot((tokens - 1).clamp(min=0), 10)

    prompts = torch.tensor([[3], [1], [9]])
    generated = greedy_generate(count_down, prompts, lengths=torch.tensor([1, 1, 1]), max_length=5, end_token=END)
    assert generated.tolist() == [[3, 2, 1, 0, 0], [1, 0, 0, 0, 0], [9, 8, 7, 6, 5]]
    assert calls == [3, 2, 2, 1]


@pytest.mark.parametrize("length", [0, 3, 5])
def test_lengths_out_of_range_raise(length: int) -> None:
    def never(tokens: Tensor) -> Tensor:
        raise AssertionError

    with pytest.raises(ValueError, match=rf"lengths {length} .. {length}, expected 1 .. 2 for prompts of width 2"):
        greedy_generate(never, torch.ones(1, 2).long(), lengths=torch.tensor([length]), max_length=9, end_token=END)


@pytest.mark.parametrize(
    ("row", "matches"),
    [
        ([5, 16, 1, 2, 0, 0], True),
        ([16, 1, 2, 0, 7, 7], True),  # other steps, and text after the end
        ([5, 16, 1, 2, 3, 0], False),
        ([5, 16, 1, 0, 2, 0], False),
        ([5, 16, 0, 0, 0, 0], False),
        ([5, 5, 1, 2, 0, 0], False),  # no mark
        ([5, 5, 5, 16, 1, 2], False),  # no end
        ([0, 16, 1, 2, 0, 0], True),
    ],
)
def test_answers(row: list[int], matches: bool) -> None:
    expected = torch.tensor([[9, 9, 9, 16, 1, 2, 0]])
    assert answers_match(torch.tensor([row]), expected, answer_token=16, end_token=0).tolist() == [matches]
