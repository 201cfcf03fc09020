"""Models, data and budgets of benchmarks/accuracy.py."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import lightning as L

from lightning_qat.callbacks import TargetMask
from lightning_qat.data import ArithmeticData, DigitImages, DigitsData, TextData
from lightning_qat.models import ArithmeticModel, ConvNet, LanguageModel, SequenceClassifier


@dataclass(frozen=True)
class Task:
    """A model, its data and its budget.

    Args:
        model: builds it from the learning rate.
        data: builds it from a seed, a batch size and a number of batches.
        steps: of the float training; a third of them for all that follows.
        batch_sizes: of the float training, and of all that follows.
        learning_rate: the highest of the cosine schedule, in float.
        mask: which positions have a target, where not all do.
        rate: factor of the learning rates (`RATES`) of all that follows the float training.
    """

    model: Callable[..., L.LightningModule]
    data: Callable[[int, int, int], L.LightningDataModule]
    steps: int
    batch_sizes: tuple[int, int]
    learning_rate: float
    mask: TargetMask | None = None
    rate: float = 1.0


def _text(seed: int, batch_size: int, num_batches: int) -> L.LightningDataModule:
    return TextData(sequence_length=64, batch_size=batch_size, num_train_batches=num_batches, seed=seed)


def _arithmetic(seed: int, batch_size: int, num_batches: int) -> L.LightningDataModule:
    return ArithmeticData((1, 2), batch_size=batch_size, num_train=batch_size * num_batches, num_val=64, seed=seed)


TASKS = {
    "digits": Task(
        partial(SequenceClassifier, 10, embed_dim=8, hidden_size=64, num_heads=4, num_layers=2, window_size=8),
        lambda seed, batch_size, _: DigitsData(batch_size, seed=seed), 900, (64, 64), 3e-3,
    ),
    "images": Task(
        partial(ConvNet, 10), lambda seed, batch_size, _: DigitImages(batch_size, seed=seed), 600, (64, 64), 1e-2
    ),
    "text": Task(
        partial(LanguageModel, hidden_size=64, num_heads=4, num_layers=2, window_size=64), _text, 1500, (64, 16), 4e-3
    ),
    "arithmetic": Task(
        partial(ArithmeticModel, hidden_size=64, num_heads=4, num_layers=2, window_size=42),
        _arithmetic, 1500, (64, 32), 4e-3, TargetMask(),
    ),
}  # fmt: skip
# Of the highest learning rate of the float training; the same for all methods. The best of 1/8 to 2 for plain LSQ
# (learned scales, no teacher) on the validation data of the text; for the float reference, too.
RATES = {"ternary": 0.5, "bitnet": 0.5, "ternary_a8": 0.5, "int2": 0.5, "seq2": 0.5, "binary": 1.0}
RATE = 0.25
