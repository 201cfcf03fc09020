"""ProgressiveBitWidth: lower precision while training, stage by stage."""

from collections.abc import Mapping
from typing import Any, Literal, final

import lightning.pytorch as pl
from typing_extensions import override

from lightning_qat.callbacks.bit_width import BitWidth
from lightning_qat.callbacks.run_length import is_resumed, run_length
from lightning_qat.schedules import Change, Precision, Schedule, as_schedule


@final
class ProgressiveBitWidth(pl.Callback):
    """Lowers the precision of a prepared model at given epochs or optimizer steps.

    On a change the scales of weights are found anew by error search from the present weights; stored scales of inputs
    by the ratio of the ranges or from the next batch, whichever has the smaller error. The optimizer forgets what it
    remembers of them. The stage is a function of the step count and the grid is part of the checkpoint, so that a
    resumed run continues identically. One ``torch.compile`` compilation serves all stages of a grid family.

    Args:
        schedule: ``{0: 8, 2: 4, 4: 2}`` (position: bits of the recipe's family, or a grid), or an object of
            :mod:`lightning_qat.schedules`.
        unit: whether positions count ``"epoch"`` or optimizer ``"step"`` (``trainer.global_step``; with several
            optimizers each of their steps counts, and fractions of the run assume that each steps once per batch).
        match: glob over dotted layer names, so that parts of the model can follow schedules of their own.
        inputs: whether quantizers of inputs follow, too.

    Raises:
        ValueError: a unit that does not exist; at fit start: a model that is not prepared, a pattern that matches no
            quantizer or those of another callback, a precision that a layer cannot have, a schedule that needs the
            length of a run without one.

    Example::

        trainer = L.Trainer(callbacks=[QATCallback(recipes.int2()), ProgressiveBitWidth({0: 8, 2: 4, 4: 2})])
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
        self.bit_width = BitWidth(match, inputs, "ProgressiveBitWidth")
        self._stages: tuple[Change, ...] = ()

    def __repr__(self) -> str:
        """Return an expression that evaluates back."""
        return (
            f"ProgressiveBitWidth({self.schedule!r}, unit={self.unit!r}, match={self.bit_width.match!r}, "
            f"inputs={self.bit_width.inputs!r})"
        )

    @property
    def state_key(self) -> str:
        """Tell several schedules for parts of one model apart."""
        return self._generate_state_key(match=self.bit_width.match, unit=self.unit)

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self.bit_width.forget()

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self.bit_width.batch_ended()

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not is_resumed(trainer):  # else the grids come with the checkpoint, with FSDP after this hook
            self._begin(trainer, pl_module)
            self._apply(trainer, pl_module)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if is_resumed(trainer):  # the length of the run is not known before, see run_length()
            self._begin(trainer, pl_module)
            if self.unit == "epoch":  # a run resumed after the last batch of an epoch starts none before its batches
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
        self.bit_width.batch_begins(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.bit_width.batch_ended()

    def _begin(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._stages = self._known_stages(trainer)
        self.bit_width.check(trainer, pl_module, [precision for _, precision in self._stages])

    def _apply(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        position = trainer.current_epoch if self.unit == "epoch" else trainer.global_step
        begun = [precision for start, precision in self._stages if start <= position]
        self.bit_width.set(trainer, pl_module, begun[-1])

    def _known_stages(self, trainer: "pl.Trainer") -> tuple[Change, ...]:
        try:
            return self.schedule.changes()
        except ValueError:  # it needs the length of the run
            return self.schedule.changes(run_length(trainer, self.unit))
