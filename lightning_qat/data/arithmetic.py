"""Arithmetic problems with written-out steps as batches for a causal language model."""

from collections.abc import Sequence
from typing import Any, final

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_qat.data._checks import check_at_least
from lightning_qat.data.arithmetic_problems import (
    ANSWER_TOKEN,
    END_TOKEN,
    LEVELS,
    STEP_TOKEN,
    VOCABULARY,
    Problem,
    encode,
    generate_problems,
)
from lightning_qat.data.sampling import ResumableDataLoader, ShuffledOrder

IGNORED = -100
"""Target of positions that do not count, as in `torch.nn.functional.cross_entropy`."""


def encode_problem(problem: Problem, length: int) -> dict[str, Tensor]:
    r"""Return a problem and its solution as one training sample; T = length.

    - ``tokens`` int64 [T]: the text without its last character, filled up with the end token.
    - ``targets`` int64 [T]: the character after each token; -100 within the problem and after the end.
    - ``step_mask`` bool [T]: where the token ends a step (``;``).
    - ``answer_mask`` bool [T]: where the target is a digit of the answer.
    - ``prompt_length`` int64: characters of the problem, up to and with ``=``.

    Args:
        problem: The problem.
        length: T, at least the characters of problem and solution less one.

    Example:
        >>> sample = encode_problem(Problem(1, (("+", 2),)), 12)  # 1+2=1+2=3;#3\n
        >>> sample["targets"]
        tensor([-100, -100, -100,    2,   11,    3,   14,    4,   15,   16,    4,    0])
        >>> sample["step_mask"].nonzero().flatten(), sample["answer_mask"].nonzero().flatten()
        (tensor([9]), tensor([10]))
    """
    prompt, solution = encode(problem.prompt), encode(problem.solution)
    text = prompt + solution
    tokens = torch.full((length,), END_TOKEN)
    targets = torch.full((length,), IGNORED)
    tokens[: len(text) - 1] = torch.tensor(text[:-1])
    targets[len(prompt) - 1 : len(text) - 1] = torch.tensor(solution)
    answer_mask = torch.zeros(length, dtype=torch.bool)
    answer_mask[text.index(ANSWER_TOKEN) : len(text) - 2] = True
    return {
        "tokens": tokens,
        "targets": targets,
        "step_mask": tokens == STEP_TOKEN,
        "answer_mask": answer_mask,
        "prompt_length": torch.tensor(len(prompt)),
    }


@final
class EncodedProblems(Dataset[dict[str, Tensor]]):
    """Problems as samples, see `encode_problem`.

    Args:
        problems: The problems.
        length: Tokens of a sample.
    """

    def __init__(self, problems: Sequence[Problem], length: int) -> None:
        self.problems = list(problems)
        samples = [encode_problem(problem, length) for problem in self.problems]
        self.samples = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def __len__(self) -> int:
        """Return the number of problems."""
        return len(self.problems)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sample."""
        return {name: values[index] for name, values in self.samples.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a batch; the loader calls this in place of single reads."""
        chosen = torch.tensor(indices)
        return {name: values[chosen] for name, values in self.samples.items()}


def _as_is(batch: Any) -> Any:
    # EncodedProblems.__getitems__ has made the batch.
    return batch


@final
class ArithmeticData(L.LightningDataModule):
    """Multi-step arithmetic, split by problem: no validation or test problem is ever seen in training.

    A batch is a dictionary with the entries of `encode_problem`, each with a leading batch dimension. Which part a
    problem belongs to is a hash of its text; `problems` are generated anew in ``setup``, as a function of the
    arguments. Training problems may repeat, the others are distinct.

    Args:
        levels: Keys of `LEVELS`, mixed evenly.
        batch_size: Problems per batch.
        num_train: Training problems, one epoch.
        num_val: Validation problems.
        num_test: Test problems.
        seed: Of the problems and of the order of training batches.
        num_workers: Loader processes.

    Raises:
        ValueError: A value is out of range; in ``setup``, the levels hold too few distinct problems.

    Example:
        >>> data = ArithmeticData(levels=(1,), num_train=64)
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader()))["tokens"].shape == (64, data.sequence_length)
        True
    """

    def __init__(
        self,
        levels: Sequence[int] = (1, 2, 3),
        *,
        batch_size: int = 64,
        num_train: int = 20_000,
        num_val: int = 200,
        num_test: int = 500,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(levels, Sequence) or not levels or not set(levels) <= set(LEVELS):
            raise ValueError(f"levels={levels}: expected some of {list(LEVELS)}, such as (1, 2)")
        self.levels = list(levels)
        check_at_least(1, batch_size=batch_size, num_train=num_train, num_val=num_val, num_test=num_test)
        check_at_least(0, seed=seed, num_workers=num_workers)
        self.batch_size = batch_size
        self.num_train = num_train
        self.num_val = num_val
        self.num_test = num_test
        self.seed = seed
        self.num_workers = num_workers
        self.vocab_size = len(VOCABULARY)
        self.sequence_length = max(LEVELS[level].max_length for level in self.levels) - 1

    def setup(self, stage: str) -> None:
        """Generate the problems; equal for every stage, so that only the first call does."""
        if hasattr(self, "test_set"):
            return
        train = generate_problems(self.num_train, levels=self.levels, split="train", seed=self.seed)
        val = generate_problems(self.num_val, levels=self.levels, split="val", seed=self.seed)
        test = generate_problems(self.num_test, levels=self.levels, split="test", seed=self.seed)
        self.train_set, self.val_set, self.test_set = (
            EncodedProblems(problems, self.sequence_length) for problems in (train, val, test)
        )

    def train_dataloader(self) -> ResumableDataLoader[dict[str, Tensor]]:
        """Return the training batches in an order that depends on (seed, epoch)."""
        return ResumableDataLoader(
            self.train_set,
            batch_size=self.batch_size,
            sampler=ShuffledOrder(len(self.train_set), seed=self.seed),
            num_workers=self.num_workers,
            collate_fn=_as_is,
        )

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the validation batches in a fixed order."""
        return self._fixed_order(self.val_set)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the test batches in a fixed order."""
        return self._fixed_order(self.test_set)

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the test batches."""
        return self.test_dataloader()

    def _fixed_order(self, problems: EncodedProblems) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(problems, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=_as_is)
