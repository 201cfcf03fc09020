"""Batches at fit start: from one dataloader or several, prepared as for training, and how many samples they hold."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import lightning.pytorch as pl
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

_MISSING: Final = object()
_ONLY_DOMAIN: Final = "data"


def check_loaders(dataloader: Any, who: str) -> None:
    """Check what the argument ``dataloader`` of a callback was given.

    Args:
        dataloader: the argument.
        who: name of the callback, for messages.

    Raises:
        TypeError: a dataloader that cannot be iterated.
        ValueError: an empty dict.
    """
    if dataloader is None:
        return
    loaders = dataloader if isinstance(dataloader, Mapping) else {"": dataloader}
    if not loaders:
        raise ValueError(f"{who}: dataloader={{}} is empty; give one dataloader per domain, or leave it out")
    for name, loader in loaders.items():
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            key = f"dataloader[{name!r}]" if name else "dataloader"
            raise TypeError(f"{who}: {key}={loader!r} cannot be iterated; give a DataLoader or a list of batches")


def named_loaders(trainer: "pl.Trainer", dataloader: Any, who: str) -> dict[str, Any]:
    """Return loaders by name of their domain: those that were given, or the training data.

    Args:
        trainer: at fit start.
        dataloader: None, one loader, or a dict of them.
        who: name of the callback, for messages.

    Raises:
        ValueError: training data that can be read only once.
    """
    if isinstance(dataloader, Mapping):
        return {str(name): loader for name, loader in dataloader.items()}
    if dataloader is not None:
        return {_ONLY_DOMAIN: dataloader}
    loader = trainer.fit_loop._data_source.dataloader()
    if any(map(reads_once, flattened([loader]))):
        raise ValueError(
            f"{who}: the training data can be read only once, and looking at it now would use it up; pass "
            f"{who}(dataloader=...)"
        )
    return {_ONLY_DOMAIN: loader}


def prepared_batches(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", loaders: Mapping[str, Any], num_batches: int
) -> Iterator[tuple[str, Any]]:
    """Yield (name, batch): this process's share of the batches of all loaders, prepared as for training.

    Args:
        trainer: at fit start.
        pl_module: its module, whose preprocessing is applied.
        loaders: by name.
        num_batches: most batches of each loader per process.
    """
    share = {"num_batches": num_batches, "rank": trainer.global_rank, "world_size": trainer.world_size}
    for name, batch in in_turn(loaders, **share):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield name, trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def flattened(loaders: Iterable[Any]) -> list[Any]:
    """Return the single loaders in collections of them."""
    found = []
    for loader in loaders:
        inner = getattr(loader, "flattened", None)  # CombinedLoader of either Lightning package
        if inner is None and isinstance(loader, Mapping | list | tuple):
            inner = flattened(loader.values() if isinstance(loader, Mapping) else loader)
        found += [loader] if inner is None else list(inner)
    return found


def reads_once(loader: Any) -> bool:
    """Whether iterating over a loader uses its data up, as far as can be seen from outside."""
    dataset = getattr(loader, "dataset", None)
    held = vars(dataset).values() if isinstance(dataset, IterableDataset) else ()
    return any(isinstance(each, Iterator) for each in (loader, dataset, *held))


def iterate(loader: Any) -> Iterator[Any]:
    """Yield batches; of a collection of loaders as the trainer combines them."""
    if hasattr(loader, "flattened"):
        combined = CombinedLoader(loader.iterables, loader._mode)
    elif isinstance(loader, Mapping) or (isinstance(loader, list | tuple) and any(map(_is_loader, loader))):
        combined = CombinedLoader(loader, "max_size_cycle")
    else:
        yield from loader
        return
    yield from (batch for batch, _, _ in combined)


def _is_loader(value: Any) -> bool:
    return isinstance(value, DataLoader)


def in_turn(loaders: Mapping[str, Any], *, num_batches: int, rank: int, world_size: int) -> Iterator[tuple[str, Any]]:
    """Yield (name, batch) of several loaders in turn, of each the share of one process.

    Every process gets as many batches as the others, because sharded models run in step: what is left over is not used,
    and where there are fewer batches than processes, the last one serves several.

    Args:
        loaders: by name.
        num_batches: most batches of each loader per process.
        rank: of this process.
        world_size: number of processes.

    >>> list(in_turn({"a": [1, 2, 3], "b": [4]}, num_batches=2, rank=0, world_size=1))
    [('a', 1), ('b', 4), ('a', 2)]
    >>> list(in_turn({"a": [1, 2, 3], "b": [4]}, num_batches=2, rank=1, world_size=2))
    [('a', 2), ('b', 4)]
    """
    shares = [itertools.islice(_share(loader, rank, world_size), num_batches) for loader in loaders.values()]
    for turn in itertools.zip_longest(*shares, fillvalue=_MISSING):
        yield from ((name, batch) for name, batch in zip(loaders, turn, strict=True) if batch is not _MISSING)


def _share(loader: Any, rank: int, world_size: int) -> Iterator[Any]:
    batches = iterate(loader)
    part = list(itertools.islice(batches, world_size))
    if part:
        yield part[min(rank, len(part) - 1)]
    while len(part := list(itertools.islice(batches, world_size))) == world_size:
        yield part[rank]


def num_samples(batch: Any) -> int:
    """Return the length of the first tensor in a batch; 1 for batches without one.

    >>> import torch
    >>> num_samples({"x": torch.zeros(3, 2), "y": torch.zeros(3)})
    3
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    inner = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((num_samples(each) for each in inner if isinstance(each, Tensor | Mapping | tuple | list)), 1)


def describe_shares(samples: Mapping[str, int]) -> str:
    """Return how many samples came from which domain, in words.

    >>> describe_shares({"chat": 24, "code": 8})
    '32 samples: chat 24 (75 %), code 8 (25 %)'
    >>> describe_shares({"data": 16})
    '16 samples'
    """
    total = sum(samples.values())
    if len(samples) < 2:
        return f"{total} samples"
    parts = [f"{name} {count} ({100 * count / max(1, total):.0f} %)" for name, count in samples.items()]
    return f"{total} samples: {', '.join(parts)}"
