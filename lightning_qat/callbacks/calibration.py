"""Calibration: stored scales of inputs from data, at fit start."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from safetensors.torch import load_file, save_file
from torch import Generator, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_qat.conversion.calibrate import (
    calibrate,
    calibration_state,
    default_forward,
    load_calibration_state,
    uncalibrated,
)


@final
class Calibration(pl.Callback):
    """Sets the stored scales of inputs from training data at fit start; skipped where they are known, as on resume.

    The model runs in evaluation mode on batches that pass the module's own preprocessing. Afterwards random number
    generators (those of loader and sampler included), BatchNorm statistics, metrics and the order of the data are as if
    nothing had happened. All processes of a distributed run end with equal scales, found from the data of all.

    Args:
        num_batches: batches per process, positive.
        dataloader: where they come from; by default the training data. One-shot iterables need one of their own.
        forward: called with (module, batch) if neither ``predict_step`` nor calling the module with the batch's input
            (first element of a tuple, a dict as keywords) is right.

    Raises:
        ValueError: ``num_batches`` below 1; at fit start: a one-shot iterable, or layers that no data reached.
    """

    calibrates: ClassVar[bool] = True

    def __init__(
        self,
        num_batches: int = 8,
        dataloader: Iterable[Any] | None = None,
        *,
        forward: Callable[["pl.LightningModule", Any], Any] | None = None,
    ) -> None:
        if not isinstance(num_batches, int) or num_batches < 1:
            raise ValueError(f"Calibration: num_batches={num_batches!r} is not allowed; choose a positive integer")
        self.num_batches = num_batches
        self.dataloader = dataloader
        self.forward = forward

    def __repr__(self) -> str:
        """Return an expression that evaluates back where no loader is held."""
        extra = "" if self.dataloader is None else f", dataloader={self.dataloader!r}"
        return f"Calibration(num_batches={self.num_batches}{extra})"

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        restored_later = trainer.strategy.restore_checkpoint_after_setup and trainer.ckpt_path is not None
        if not restored_later:  # else the scales arrive with the checkpoint, after this hook
            self._calibrate(trainer, pl_module)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if uncalibrated(pl_module):
            self._calibrate(trainer, pl_module)

    def _calibrate(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        missing = uncalibrated(pl_module)
        if not missing:
            rank_zero_info("Calibration: nothing to calibrate, every scale is known or recomputed.")
            return
        loader = self.dataloader if self.dataloader is not None else _training_data(trainer)
        if iter(loader) is loader:
            raise ValueError(
                "Calibration: the training data can be read only once, so that calibration would use it up; pass "
                "Calibration(dataloader=...)"
            )
        with _untouched(pl_module, loader), trainer.precision_plugin.forward_context():
            batches = (self._prepared(trainer, pl_module, batch) for batch in self._share(trainer, loader))
            seen = calibrate(pl_module, batches, self.forward or _forward)
        rank_zero_info(f"Calibration: found {len(seen)} input scales from {max(seen.values())} batches.")

    def _share(self, trainer: "pl.Trainer", loader: Iterable[Any]) -> Iterator[Any]:
        """Yield this process's share: every world_size-th batch."""
        return itertools.islice(
            loader, trainer.global_rank, self.num_batches * trainer.world_size, max(1, trainer.world_size)
        )

    def _prepared(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def save(self, pl_module: nn.Module, path: str | Path) -> None:
        """Write the scales of inputs to a safetensors file."""
        save_file(calibration_state(pl_module), str(path), {"format": "lightning_qat.calibration", "version": "1"})

    def load(self, pl_module: nn.Module, path: str | Path) -> None:
        """Set the scales of inputs from a file that :meth:`save` wrote, bit for bit; calibration is then skipped.

        Raises:
            ValueError: if the file is of another model.
        """
        load_calibration_state(pl_module, load_file(str(path)))


def _forward(pl_module: nn.Module, batch: Any) -> Any:
    try:
        if is_overridden("predict_step", pl_module):  # type: ignore[arg-type]
            return pl_module.predict_step(batch, 0)  # type: ignore[operator]
        return default_forward(pl_module, batch)
    except TypeError as error:
        raise TypeError(
            f"Calibration: cannot tell how to run {type(pl_module).__name__} on a batch of type "
            f"{type(batch).__name__} ({error}); pass Calibration(forward=lambda module, batch: module(...))"
        ) from error


def _training_data(trainer: "pl.Trainer") -> Iterable[Any]:
    source = trainer.fit_loop._data_source
    loader: Iterable[Any] = source.dataloader()
    return loader


@contextmanager
def _untouched(pl_module: nn.Module, loader: Any) -> Iterator[None]:
    """Restore metrics and the generators of loader, sampler and batch sampler afterwards."""
    metrics = [module for module in pl_module.modules() if isinstance(module, Metric)]
    states = [(metric, _metric_state(metric)) for metric in metrics]
    generators = [(generator, generator.get_state()) for generator in _generators(loader)]
    random_state = torch.get_rng_state()
    try:
        yield
    finally:
        for metric, state in states:
            metric.__dict__.update(state)
        for generator, saved in generators:
            generator.set_state(saved)
        torch.set_rng_state(random_state)


def _metric_state(metric: Metric) -> dict[str, Any]:
    names = (*metric._defaults, "_update_count", "_computed")
    return {name: copy.deepcopy(getattr(metric, name)) for name in names}


def _generators(loader: Any) -> list[Generator]:
    holders = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    holders.append(getattr(holders[-1], "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    unique = {id(generator): generator for generator in found if isinstance(generator, Generator)}
    return list(unique.values())
