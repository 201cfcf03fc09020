"""Orders of training data that depend on a seed and the epoch alone, and a loader that resumes inside an epoch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any, TypeVar, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

_T_co = TypeVar("_T_co", covariant=True)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return a generator that is a function of the seed and the epoch.

    Args:
        seed: any non-negative integer.
        epoch: counted from 0.

    Example:
        >>> import torch
        >>> torch.randperm(5, generator=epoch_generator(0, epoch=1))
        tensor([0, 4, 2, 3, 1])
    """
    # Not seed + epoch: (0, 1) and (1, 0) would share an order, and runs with neighboring seeds most of their data.
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


class EpochSampler(Sampler[int], ABC):
    """Indices drawn anew in each epoch, as a function of (seed, epoch) and of nothing else.

    Lightning calls ``set_epoch`` before each epoch, also on resume and through its distributed wrapper, so that an
    interrupted run meets the same data as an uninterrupted one and the global random state plays no part.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose indices the next iteration yields."""
        self.epoch = epoch

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Tensor:
        """Return the int64 indices of one epoch."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of indices in an epoch."""

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of the current epoch."""
        yield from self.draw(epoch_generator(self.seed, self.epoch)).tolist()


@final
class ShuffledOrder(EpochSampler):
    """Every index of ``range(num_samples)`` once, in an order that depends on (seed, epoch).

    Args:
        num_samples: size of the data set, at least 1.
        seed: of the order.

    Example:
        >>> list(ShuffledOrder(4, seed=0))
        [0, 1, 3, 2]
    """

    def __init__(self, num_samples: int, *, seed: int = 0) -> None:
        super().__init__(seed)
        self.num_samples = num_samples

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return a permutation."""
        return torch.randperm(self.num_samples, generator=generator)

    def __len__(self) -> int:
        """Return ``num_samples``."""
        return self.num_samples


@final
class RandomPositions(EpochSampler):
    """``num_draws`` indices of ``range(num_positions)`` with replacement, depending on (seed, epoch).

    Args:
        num_positions: indices lie in 0 .. num_positions - 1.
        num_draws: length of an epoch.
        seed: of the draws.

    Example:
        >>> list(RandomPositions(100, num_draws=3, seed=0))
        [44, 39, 33]
    """

    def __init__(self, num_positions: int, *, num_draws: int, seed: int = 0) -> None:
        super().__init__(seed)
        self.num_positions = num_positions
        self.num_draws = num_draws

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return uniform draws."""
        return torch.randint(self.num_positions, (self.num_draws,), generator=generator)

    def __len__(self) -> int:
        """Return ``num_draws``."""
        return self.num_draws


@final
class ResumableDataLoader(DataLoader[_T_co]):
    """A DataLoader that continues inside an epoch after a resume, where a plain one starts the epoch again.

    Lightning keeps ``state_dict()`` in its checkpoints and hands it back on resume. The state is the epoch and the
    number of batches already given out; with a sampler whose order is a function of the epoch that is all there is.
    Arguments are those of `torch.utils.data.DataLoader`.
    """

    # Class attributes, no __init__: Lightning builds the loader again with a distributed sampler from its signature.
    _batches_given: int = 0
    _resume: dict[str, int] | None = None

    @property
    def _epoch(self) -> int:
        return int(getattr(self.sampler, "epoch", 0))

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches already given out."""
        return {"epoch": self._epoch, "batches": self._batches_given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up a state; it serves the next iteration if that is of the same epoch, else it is out of date."""
        self._resume = dict(state)
        self._batches_given = state["batches"]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches that are left of the sampler's current epoch."""
        # A generator, so that workers start at the first batch: Lightning sets the epoch after it calls iter().
        # Lightning before 2.6.1 tells it to its distributed wrapper, but not to the sampler within.
        wrapped = getattr(getattr(self.sampler, "dataset", None), "_sampler", None)
        if isinstance(wrapped, EpochSampler):
            wrapped.set_epoch(self._epoch)
        state, self._resume = self._resume, None
        skip = state["batches"] if state is not None and state["epoch"] == self._epoch else 0
        self._batches_given = skip
        for batch in islice(super().__iter__(), skip, None):
            self._batches_given += 1
            yield batch
