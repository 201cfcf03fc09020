"""Arithmetic problems: correct, parsed back, split by problem, encoded with the right masks."""

import random
import re
from itertools import pairwise
from typing import Any

import pytest
import torch

from lightning_qat.data import ArithmeticData
from lightning_qat.data.arithmetic import encode_problem
from lightning_qat.data.arithmetic_problems import (
    LEVELS,
    VOCABULARY,
    Difficulty,
    Problem,
    Split,
    decode,
    encode,
    generate_problem,
    generate_problems,
    is_right,
    parse_answer,
    split_of,
)

SAMPLE = [generate_problem(random.Random(seed), LEVELS[1 + seed % 3]) for seed in range(150)]


def reference_value(prompt: str) -> int:
    """Left to right, by Python's own arithmetic: 1+2*3= becomes ((1+2)*3)."""
    first, *rest = re.findall(r"^\d+|[-+*]\d+", prompt)
    expression = first
    for part in rest:
        expression = f"({expression}{part})"
    return int(eval(expression))


def test_solutions_are_right_step_by_step() -> None:
    for problem in SAMPLE:
        assert problem.answer == reference_value(problem.prompt)
        *steps, answer = problem.solution.strip().split(";")
        assert answer == f"#{problem.answer}"
        for step in steps:
            left, right = step.split("=")
            assert reference_value(left + "=") == int(right)
        befores = [re.match(r"\d+", step) for step in steps[1:]]
        assert [step.split("=")[1] for step in steps[:-1]] == [before.group() for before in befores if before]


@pytest.mark.parametrize("level", LEVELS)
def test_problems_keep_to_their_difficulty(level: int) -> None:
    difficulty = LEVELS[level]
    problems = [generate_problem(random.Random(seed), difficulty) for seed in range(300)]
    assert {len(problem.operations) for problem in problems} == {difficulty.num_steps}
    assert all(0 <= value <= difficulty.max_value for problem in problems for value in problem.values)
    operations = {operation for problem in problems for operation in problem.operations}
    assert {operator for operator, _ in operations} == set(difficulty.operators)
    assert max(operand for _, operand in operations) <= difficulty.max_operand
    assert max(operand for operator, operand in operations if operator == "*") <= 9 if level > 1 else True
    assert max(len(problem.prompt + problem.solution) for problem in problems) <= difficulty.max_length


def test_levels_get_longer() -> None:
    assert all(LEVELS[easy].max_length < LEVELS[hard].max_length for easy, hard in pairwise(sorted(LEVELS)))


def test_a_difficulty_out_of_range_raises() -> None:
    with pytest.raises(ValueError, match=r"operators='\*', expected '\+-' or '\+-\*'"):
        Difficulty(2, 9, operators="*")
    with pytest.raises(ValueError, match=r"max_operand=120.*expected num_steps >= 1 and 2 <= max_operand <= max_value"):
        Difficulty(2, 120)


def test_answers_parse_back() -> None:
    assert all(parse_answer(problem.solution) == problem.answer for problem in SAMPLE)
    assert all(is_right(problem, problem.prompt + problem.solution) for problem in SAMPLE)
    assert not any(is_right(problem, problem.solution.replace("#", "#1")) for problem in SAMPLE)
    assert parse_answer("1+2=3;3") is None
    assert parse_answer("#12") is None
    assert parse_answer("#1-2\n") is None
    assert parse_answer("#12\n#13\n") == 12


def test_text_and_tokens_are_inverse() -> None:
    assert decode(encode(VOCABULARY)) == VOCABULARY
    assert encode(VOCABULARY) == list(range(17))
    with pytest.raises(ValueError, match=r"characters \['a', 'b'\] are not in the vocabulary"):
        encode("a1b")


def test_no_problem_is_in_two_parts() -> None:
    parts: dict[Split, set[Problem]] = {
        split: set(generate_problems(100, levels=(1, 2, 3), split=split, seed=seed))
        for seed, split in enumerate(("train", "val", "test"))
    }
    assert not parts["train"] & parts["val"]
    assert not parts["train"] & parts["test"]
    assert not parts["val"] & parts["test"]
    assert all(split_of(problem) == split for split, problems in parts.items() for problem in problems)


def test_the_split_is_the_same_in_every_process_and_has_its_shares() -> None:
    texts = [Problem(start, (("+", operand),)) for start in range(100) for operand in range(20)]
    shares = [sum(split_of(problem) == split for problem in texts) / 2000 for split in ("train", "val", "test")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    # Python's own hash of a string would differ from process to process.
    assert [split_of(problem) for problem in texts[:6]] == ["train", "train", "val", "train", "val", "train"]


def test_evaluation_problems_are_distinct_and_all_levels_are_there() -> None:
    problems = generate_problems(90, levels=(1, 2, 3), split="test", seed=0)
    assert len(set(problems)) == 90
    assert sorted(len(problem.operations) for problem in problems) == [2] * 30 + [3] * 30 + [4] * 30


def test_generation_is_a_function_of_the_seed() -> None:
    first, again, other = (generate_problems(20, levels=(2,), split="train", seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_too_many_problems_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEVELS, 0, Difficulty(1, 2, max_value=3))
    with pytest.raises(ValueError, match=r"levels=\[0\] hold too few distinct problems for test: found \d of 50"):
        generate_problems(50, levels=(0,), split="test", seed=0)


def test_masks_and_targets() -> None:
    for problem in SAMPLE:
        text = problem.prompt + problem.solution
        sample = encode_problem(problem, 60)
        tokens, targets = sample["tokens"], sample["targets"]
        assert decode(tokens.tolist()) == text[:-1] + "\n" * (61 - len(text))
        counted = targets != -100
        assert decode(targets[counted].tolist()) == problem.solution
        assert torch.equal(counted[1:] & counted[:-1], (targets[:-1] == tokens[1:]) & counted[:-1] & counted[1:])
        assert decode(tokens[: sample["prompt_length"]].tolist()) == problem.prompt
        assert int(counted.nonzero()[0]) == sample["prompt_length"] - 1
        assert int(sample["step_mask"].sum()) == len(problem.operations)
        assert set(decode(tokens[sample["step_mask"]].tolist())) == {";"}
        assert decode(targets[sample["answer_mask"]].tolist()) == str(problem.answer)


def test_batches() -> None:
    data = ArithmeticData(batch_size=16, num_train=48, num_val=20, num_test=20)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    for name in ("tokens", "targets", "step_mask", "answer_mask"):
        assert batch[name].shape == (16, data.sequence_length)
    assert batch["prompt_length"].shape == (16,)
    assert batch["tokens"].max() < data.vocab_size == 17
    assert [len(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())] == [
        3,
        2,
        2,
    ]


def test_data_modules_of_other_seeds_never_share_a_test_problem_with_training() -> None:
    first, second = (ArithmeticData(num_train=200, num_val=30, num_test=30, seed=seed) for seed in (0, 1))
    for data in (first, second):
        data.setup("fit")
    assert not set(first.train_set.problems) & set(second.test_set.problems)
    assert first.train_set.problems != second.train_set.problems


def test_problems_are_generated_once_for_all_stages() -> None:
    data = ArithmeticData((1,), num_train=8, num_val=2, num_test=2)
    data.setup("fit")
    first = data.train_set
    data.setup("test")
    assert data.train_set is first


@pytest.mark.parametrize("levels", [(), (1, 7), 1])
def test_unknown_levels_raise(levels: Any) -> None:
    with pytest.raises(ValueError, match=r"expected some of \[1, 2, 3\]"):
        ArithmeticData(levels)
