"""Multi-step arithmetic with written-out steps: pure functions from a random generator to text and back.

A problem reads ``12+7*2=`` and is solved from left to right, one operation per step: ``12+7=19;19*2=38;#38`` and a
line end. All values stay within 0 .. max_value.
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

VOCABULARY = "\n0123456789+-*=;#"
"""Characters by token number."""
END_TOKEN = VOCABULARY.index("\n")
STEP_TOKEN = VOCABULARY.index(";")
ANSWER_TOKEN = VOCABULARY.index("#")

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Difficulty:
    """What problems of a level look like.

    Args:
        num_steps: Operations, at least 1.
        max_operand: Largest number in the problem, at least 2.
        operators: ``"+-"`` or ``"+-*"``; with both of the first two a next step always exists.
        max_value: Largest intermediate value, at least max_operand; factors are at most 9.

    Raises:
        ValueError: A value is out of range.
    """

    num_steps: int
    max_operand: int
    operators: str = "+-"
    max_value: int = 99

    def __post_init__(self) -> None:
        if self.operators not in ("+-", "+-*"):
            raise ValueError(f"Difficulty: operators={self.operators!r}, expected '+-' or '+-*'")
        if self.num_steps < 1 or not 2 <= self.max_operand <= self.max_value:
            raise ValueError(
                f"Difficulty: num_steps={self.num_steps}, max_operand={self.max_operand}, max_value={self.max_value}; "
                "expected num_steps >= 1 and 2 <= max_operand <= max_value"
            )

    @property
    def max_length(self) -> int:
        """Return the characters of the longest problem with its solution."""
        operand, value = len(str(self.max_operand)), len(str(self.max_value))
        prompt = operand + self.num_steps * (1 + operand) + 1
        return prompt + self.num_steps * (value + 1 + operand + 1 + value + 1) + 1 + value + 1


LEVELS: dict[int, Difficulty] = {
    1: Difficulty(num_steps=2, max_operand=20),
    2: Difficulty(num_steps=3, max_operand=20, operators="+-*"),
    3: Difficulty(num_steps=4, max_operand=50, operators="+-*"),
}
"""Levels from easy to hard."""


@dataclass(frozen=True)
class Problem:
    r"""A chain of operations: a start value, then (operator, operand) pairs applied from left to right.

    Example:
        >>> problem = Problem(12, (("+", 7), ("*", 2)))
        >>> problem.prompt, problem.solution, problem.answer
        ('12+7*2=', '12+7=19;19*2=38;#38\n', 38)
    """

    start: int
    operations: tuple[tuple[str, int], ...]

    @property
    def values(self) -> tuple[int, ...]:
        """Return the start value and the value after each step."""
        values = [self.start]
        for operator, operand in self.operations:
            values.append(apply(values[-1], operator, operand))
        return tuple(values)

    @property
    def prompt(self) -> str:
        """Return the problem as text, up to and with the equals sign."""
        return str(self.start) + "".join(f"{operator}{operand}" for operator, operand in self.operations) + "="

    @property
    def solution(self) -> str:
        """Return the steps, the answer and a line end."""
        values = self.values
        steps = "".join(
            f"{before}{operator}{operand}={after};"
            for before, (operator, operand), after in zip(values[:-1], self.operations, values[1:], strict=True)
        )
        return f"{steps}#{values[-1]}\n"

    @property
    def answer(self) -> int:
        """Return the last value."""
        return self.values[-1]


def apply(value: int, operator: str, operand: int) -> int:
    """Return the result of one operation.

    Example:
        >>> apply(7, "*", 2)
        14
    """
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator]


def generate_problem(generator: random.Random, difficulty: Difficulty) -> Problem:
    """Return a random problem of a difficulty; all its values lie in 0 .. max_value.

    Example:
        >>> generate_problem(random.Random(0), LEVELS[2]).prompt
        '13-1-9-2='
    """
    start = value = generator.randint(1, difficulty.max_operand)
    operations = []
    for _ in range(difficulty.num_steps):
        limits = {
            "+": (1, min(difficulty.max_operand, difficulty.max_value - value)),
            "-": (1, min(difficulty.max_operand, value)),
            "*": (2, min(difficulty.max_operand, 9, difficulty.max_value // max(1, value))),
        }
        operator = generator.choice([name for name in difficulty.operators if limits[name][0] <= limits[name][1]])
        operations.append((operator, generator.randint(*limits[operator])))
        value = apply(value, *operations[-1])
    return Problem(start, tuple(operations))


def split_of(problem: Problem) -> Split:
    """Return the part that a problem belongs to: 10 % "val", 10 % "test", else "train", by a hash of its text.

    It depends on nothing but the problem, so no seed, level or number of problems can bring one into two parts.

    Example:
        >>> split_of(Problem(1, (("+", 2), ("+", 3))))
        'train'
    """
    bucket = int.from_bytes(hashlib.blake2b(problem.prompt.encode(), digest_size=8).digest()) % 10
    return "val" if bucket == 0 else "test" if bucket == 1 else "train"


def generate_problems(num_problems: int, *, levels: Sequence[int], split: Split, seed: int) -> list[Problem]:
    """Return random problems of one part, levels mixed evenly; distinct ones for "val" and "test".

    Args:
        num_problems: How many.
        levels: Keys of `LEVELS`.
        split: "train" (may repeat problems), "val" or "test".
        seed: The result is a function of the arguments.

    Raises:
        ValueError: The levels do not hold that many distinct problems.

    Example:
        >>> [problem.prompt for problem in generate_problems(2, levels=(1, 2), split="test", seed=0)]
        ['6-4+8=', '16-6-5*9=']
    """
    generator = random.Random(f"{split} {seed}")
    problems: list[Problem] = []
    seen: set[Problem] = set()
    misses = 0
    while len(problems) < num_problems:
        problem = generate_problem(generator, LEVELS[levels[len(problems) % len(levels)]])
        if split_of(problem) != split or (split != "train" and problem in seen):
            misses += 1
            if misses > 10_000:
                raise ValueError(
                    f"levels={list(levels)} hold too few distinct problems for {split}: found {len(problems)} of "
                    f"{num_problems}; lower num_{split} or add a level of {list(LEVELS)}"
                )
            continue
        misses = 0
        seen.add(problem)
        problems.append(problem)
    return problems


def encode(text: str) -> list[int]:
    """Return the token numbers of a text.

    Raises:
        ValueError: A character is not in `VOCABULARY`.

    Example:
        >>> encode("1+2=")
        [2, 11, 3, 14]
    """
    unknown = sorted(set(text) - set(VOCABULARY))
    if unknown:
        raise ValueError(f"encode: characters {unknown} are not in the vocabulary {VOCABULARY!r}")
    return [VOCABULARY.index(character) for character in text]


def decode(tokens: Iterable[int]) -> str:
    """Return the text of token numbers.

    Example:
        >>> decode([2, 11, 3, 14])
        '1+2='
    """
    return "".join(VOCABULARY[token] for token in tokens)


def parse_answer(text: str) -> int | None:
    r"""Return the number between the first ``#`` and the following line end, None where there is no such number.

    Example:
        >>> parse_answer("12+7=19;#19\n"), parse_answer("12+7=19;#1"), parse_answer("#+\n")
        (19, None, None)
    """
    _, mark, tail = text.partition("#")
    answer, end, _ = tail.partition("\n")
    return int(answer) if mark and end and answer.isdigit() else None


def is_right(problem: Problem, text: str) -> bool:
    r"""Return whether a text, such as a model wrote, gives the answer of a problem, whatever its steps.

    Example:
        >>> is_right(Problem(1, (("+", 2),)), "1+2=3;#3\n"), is_right(Problem(1, (("+", 2),)), "#4\n")
        (True, False)
    """
    return parse_answer(text) == problem.answer
