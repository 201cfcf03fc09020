"""Handwritten digits that ship with scikit-learn: 1797 images of 8 x 8 pixels in 10 classes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat.data._checks import check_at_least, check_share
from lightning_qat.data.sampling import ResumableDataLoader, ShuffledOrder


@dataclass(frozen=True)
class DigitsSplit:
    """Sample numbers (int64) of the three disjoint parts of the data."""

    train: Tensor
    val: Tensor
    test: Tensor


def load_digits() -> tuple[Tensor, Tensor]:
    """Return the pixels, float32 in [0, 1] of shape [1797, 8, 8] as rows of pixels, and the labels, int64 [1797].

    Source: UCI ML hand-written digits (test set of optdigits), copied in scikit-learn; the raw pixels are 0 .. 16.

    Example:
        >>> images, labels = load_digits()
        >>> images.shape, labels[:5]
        (torch.Size([1797, 8, 8]), tensor([0, 1, 2, 3, 4]))
    """
    # Imported here: scikit-learn takes most of a second, which users of the other data need not wait for.
    from sklearn import datasets

    digits = datasets.load_digits()
    return torch.as_tensor(digits.images, dtype=torch.float32) / 16, torch.as_tensor(digits.target).long()


def stratified_split(labels: Tensor, *, val_fraction: float, test_fraction: float, seed: int) -> DigitsSplit:
    """Split samples into train, validation and test so that each part holds the classes in the same shares.

    Args:
        labels: class of each sample, int64 [num_samples], 0 or more.
        val_fraction: share of all samples, rounded within each class.
        test_fraction: the same for the test part.
        seed: of the choice; the parts are a function of it and of the labels.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        >>> split = stratified_split(labels, val_fraction=0.25, test_fraction=0.25, seed=0)
        >>> split.val, split.test
        (tensor([3, 7]), tensor([2, 5]))
    """
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        num_val, num_test = round(val_fraction * len(members)), round(test_fraction * len(members))
        for part, chosen in zip(parts, members.tensor_split([-num_val - num_test, -num_test]), strict=True):
            part.append(chosen)
    return DigitsSplit(*(torch.cat(part).sort().values for part in parts))


class AbstractDigits(L.LightningDataModule, ABC):
    """The digits with a fixed split; subclasses choose the shape of one sample.

    Args:
        batch_size: samples per batch; the last, smaller training batch is kept.
        val_fraction: share of all samples for validation, 0.01 .. 0.5.
        test_fraction: share of all samples for testing, 0.01 .. 0.5.
        seed: of the order of training batches, which is a function of (seed, epoch).
        split_seed: of the split. Separate, so that runs of several seeds are compared on the same test samples.
        num_workers: loader processes.

    Raises:
        ValueError: for a fraction out of range, a batch size below 1 or a negative seed or worker count.
    """

    def __init__(
        self,
        batch_size: int = 64,
        *,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        split_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_share(val_fraction=val_fraction, test_fraction=test_fraction)
        check_at_least(1, batch_size=batch_size)
        check_at_least(0, seed=seed, split_seed=split_seed, num_workers=num_workers)
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.seed = seed
        self.split_seed = split_seed
        self.num_workers = num_workers
        self.num_classes = 10

    @abstractmethod
    def shape(self, images: Tensor) -> Tensor:
        """Return the samples [n, ...] made of the images [n, 8, 8]."""

    def setup(self, stage: str) -> None:
        """Load and split the data; equal for every stage."""
        images, labels = load_digits()
        split = stratified_split(
            labels, val_fraction=self.val_fraction, test_fraction=self.test_fraction, seed=self.split_seed
        )
        samples = self.shape(images)
        self.train_set, self.val_set, self.test_set = (
            TensorDataset(samples[part], labels[part]) for part in (split.train, split.val, split.test)
        )

    def train_dataloader(self) -> ResumableDataLoader[tuple[Tensor, ...]]:
        """Return the training batches, samples and labels, in an order that depends on (seed, epoch)."""
        sampler = ShuffledOrder(len(self.train_set), seed=self.seed)
        return ResumableDataLoader(
            self.train_set, batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation batches in a fixed order."""
        return DataLoader(self.val_set, batch_size=self.batch_size, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test batches in a fixed order."""
        return DataLoader(self.test_set, batch_size=self.batch_size, num_workers=self.num_workers)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test batches."""
        return self.test_dataloader()


@final
class DigitsData(AbstractDigits):
    """Digits as sequences: samples are float32 [8 rows, 8 pixels] in [0, 1], labels int64. Arguments as in the base.

    Example:
        >>> data = DigitsData(batch_size=32)
        >>> data.setup("fit")
        >>> samples, labels = next(iter(data.train_dataloader()))
        >>> samples.shape, labels.shape
        (torch.Size([32, 8, 8]), torch.Size([32]))
    """

    def shape(self, images: Tensor) -> Tensor:
        """Return rows as time steps and the pixels of a row as features: [n, 8, 8]."""
        return images


@final
class DigitImages(AbstractDigits):
    """Digits as images: samples are float32 [1 channel, 8, 8] in [0, 1], labels int64. Arguments as in the base."""

    def shape(self, images: Tensor) -> Tensor:
        """Return images of one channel: [n, 1, 8, 8]."""
        return images.unsqueeze(1)
