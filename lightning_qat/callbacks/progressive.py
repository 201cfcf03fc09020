"""ProgressiveBitWidth: lower precision while training, stage by stage."""

from collections.abc import Mapping
from typing import Any, Literal, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_qat.callbacks.optimizers import reset_state
from lightning_qat.conversion.prepare import quantizers
from lightning_qat.conversion.regrid import Regridded, regrid
from lightning_qat.schedules import Precision, Schedule, as_schedule


@final
class ProgressiveBitWidth(pl.Callback):
    """Lowers the precision of a prepared model at given epochs or optimizer steps.

    On a change the scales are found anew by error search from the present weights, and the optimizer forgets what it
    remembers of them. The stage is a function of the step count and the grid is part of the checkpoint, so that a
    resumed run continues identically. One ``torch.compile`` compilation serves all stages of a grid family.

    Args:
        schedule: ``{0: 8, 2: 4, 4: 2}`` (position: bits of the recipe's family, or a grid), or an object of
            :mod:`lightning_qat.schedules`.
        unit: whether positions count ``"epoch"`` or optimizer ``"step"`` (``trainer.global_step``).
        match: glob over dotted layer names, so that parts of the model can follow schedules of their own.
        inputs: whether quantizers of inputs follow, too.

    Raises:
        ValueError: a unit that does not exist; at fit start: a pattern that matches no quantizer, a schedule that needs
            the length of a run without one, QATCallback listed after this callback.
    """

    def __init__(
        self,
        schedule: Mapping[int, Precision] | Schedule,
        *,
        unit: Literal["epoch", "step"] = "epoch",
        match: str = "*",
        inputs: bool = False,
    ) -> None:
        if unit not in ("epoch", "step"):
            raise ValueError(f"ProgressiveBitWidth: unit={unit!r} is not allowed; choose 'epoch' or 'step'")
        self.schedule = as_schedule(schedule)
        self.unit = unit
        self.match = match
        self.inputs = inputs

    def __repr__(self) -> str:
        """Return an expression that evaluates back."""
        return (
            f"ProgressiveBitWidth({self.schedule!r}, unit={self.unit!r}, match={self.match!r}, inputs={self.inputs!r})"
        )

    @property
    def state_key(self) -> str:
        """Tell several schedules for parts of one model apart."""
        return self._generate_state_key(match=self.match, unit=self.unit)

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not quantizers(pl_module):
            raise ValueError(
                "ProgressiveBitWidth: the model is not prepared; list QATCallback before ProgressiveBitWidth"
            )
        if trainer.ckpt_path is None:  # else the grids come with the checkpoint
            self._apply(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._apply(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        if self.unit == "step":
            self._apply(trainer, pl_module)

    def _apply(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        position, total = self._position(trainer)
        precision = self.schedule.value_at(position, total)
        changed = regrid(pl_module, precision, match=self.match, inputs=self.inputs)
        if not changed:
            return
        parameters = [parameter for each in changed for parameter in each.quantizer.parameters()]
        reset_state(trainer.optimizers, parameters)
        for average in _averaged_models(trainer):
            regrid(average, precision, match=self.match, inputs=self.inputs)
        self._announce(trainer, changed)

    def _position(self, trainer: "pl.Trainer") -> tuple[int, float | None]:
        if self.unit == "epoch":
            return trainer.current_epoch, _known(trainer.max_epochs)
        return trainer.global_step, _known(trainer.estimated_stepping_batches)

    def _announce(self, trainer: "pl.Trainer", changed: list[Regridded]) -> None:
        before, after = (sorted({label for each in changed for label in [each.before.label if i == 0 else each.after.label]})
                         for i in range(2))  # fmt: skip
        rank_zero_info(
            f"ProgressiveBitWidth: {', '.join(before)} -> {', '.join(after)} in {len(changed)} quantizers "
            f"at epoch {trainer.current_epoch}, step {trainer.global_step}"
        )
        bits = torch.tensor([each.after.bits_per_weight for each in changed]).mean().item()
        for logger in trainer.loggers:
            logger.log_metrics({"quantization/bits": bits}, step=trainer.global_step)


def _known(total: float | None) -> float | None:
    return None if total is None or total < 0 or total == float("inf") else total


def _averaged_models(trainer: "pl.Trainer") -> list[nn.Module]:
    averages = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return [getattr(average, "module", average) for average in averages if average is not None]
