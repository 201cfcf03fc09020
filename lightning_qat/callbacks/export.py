"""ExportCallback: the trained model as a verified artifact, at fit end."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, final

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_qat.callbacks.batches import flattened, iterate, reads_once
from lightning_qat.callbacks.running import Forward, call_module
from lightning_qat.callbacks.untouched import without_trace
from lightning_qat.conversion.undisturbed import undisturbed_loaders
from lightning_qat.export import export
from lightning_qat.export.backend import backend_for, check_name


@final
class ExportCallback(pl.Callback):
    """Writes the trained model at fit end and proves the file on real batches; a failed proof stops the program.

    The process of rank 0 alone writes, in the dtype of the weights, without autocast. Weight averaging has put its
    weights into the model by then. Nothing is written by ``fast_dev_run``. Holds no state.

    Args:
        path: file to write, a relative one in the trainer's ``default_root_dir``.
        format: as in :func:`lightning_qat.export.export`.
        num_batches: how many batches outputs are compared on; 0 compares weights alone.
        dataloader: where they come from; by default the validation data, else the training data.
        forward: called with (module, batch). By default the module is called with what its ``forward`` takes.
        options: fields of the back end, such as ``opset=23``.

    Raises:
        ValueError: an unknown format, a path with the ending of another one, or a negative ``num_batches``; at fit end
            also a model that is not prepared.
        TypeError: an unknown option.
        ImportError: the format needs an extra.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        format: str = "safetensors",
        num_batches: int = 1,
        dataloader: Iterable[Any] | None = None,
        forward: Forward | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(num_batches, int) or num_batches < 0:
            raise ValueError(f"ExportCallback: num_batches={num_batches!r} is not allowed; choose 0 or more")
        check_name(Path(path), backend_for(format, options))
        self.path, self.format, self.num_batches = Path(path), format, num_batches
        self.dataloader, self.forward, self.options = dataloader, forward, options

    def __repr__(self) -> str:
        """Return an expression that evaluates back where no dataloader or function is held."""
        parts = [repr(str(self.path)), f"format={self.format!r}", f"num_batches={self.num_batches}"]
        given = {"dataloader": self.dataloader, "forward": self.forward}
        parts += [f"{name}={value!r}" for name, value in given.items() if value is not None]
        return f"ExportCallback({', '.join(parts + [f'{name}={value!r}' for name, value in self.options.items()])})"

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if getattr(trainer, "fast_dev_run", False):
            rank_zero_info("ExportCallback: fast_dev_run writes no artifact.")
        elif trainer.is_global_zero:
            self._export(trainer, pl_module)
        trainer.strategy.barrier("ExportCallback")

    def _export(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        path = Path(trainer.default_root_dir) / self.path
        with without_trace(pl_module):
            loader = self._loader(trainer)
            with undisturbed_loaders(flattened([loader])):
                batches = list(self._batches(trainer, pl_module, loader))
                run = self.forward or call_module
                report = export(pl_module, path, format=self.format, batches=batches, forward=run, **self.options)
        rank_zero_info(f"ExportCallback:\n{report}")

    def _loader(self, trainer: "pl.Trainer") -> Any:
        if self.num_batches == 0:
            return ()
        found = [self.dataloader, trainer.val_dataloaders, trainer.train_dataloader]
        loader = next((each for each in found if each is not None), ())
        if any(map(reads_once, flattened([loader]))):
            raise ValueError(
                "ExportCallback: the data can be read only once, and outputs are to be compared on it; pass "
                "ExportCallback(dataloader=...), or num_batches=0 to compare weights alone"
            )
        return loader

    def _batches(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loader: Any) -> Iterator[Any]:
        for batch in itertools.islice(iterate(loader), self.num_batches):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)
