"""Accumulation windows that follow a trainer."""

from contextlib import ExitStack
from typing import Any, final

import lightning.pytorch as pl

from lightning_qat.conversion.window import open_window
from lightning_qat.quantization.window import Window


@final
class AccumulationWindows:
    """Keeps weights quantized from one optimizer step to the next while a trainer accumulates gradients."""

    def __init__(self) -> None:
        self._stack: ExitStack | None = None
        self._window: Window | None = None

    def batch_begins(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch_idx: int) -> None:
        """Open a window, or begin the next one after an optimizer step; close it where nothing is accumulated.

        Args:
            trainer: of either Lightning package.
            pl_module: prepared.
            batch_idx: index of the batch that begins, in its epoch.
        """
        num_batches: Any = trainer.accumulate_grad_batches  # GradientAccumulationScheduler changes it between epochs
        if num_batches == 1:
            self.close()
        elif self._stack is None:
            self._stack = ExitStack()
            self._window = open_window(pl_module, self._stack)
        elif batch_idx % num_batches == 0 and self._window is not None:
            self._window.drop()  # for optimizers that are none of torch's

    def close(self) -> None:
        """Forget everything; again is a no-op."""
        if self._stack is not None:
            self._stack.close()
        self._stack = self._window = None
