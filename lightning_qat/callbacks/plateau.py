"""PlateauBitWidth: lower precision when a metric has stopped improving."""

import math
from collections.abc import Sequence
from typing import Any, Literal, final

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_qat.callbacks.bit_width import BitWidth
from lightning_qat.callbacks.run_length import is_resumed
from lightning_qat.schedules import Precision


@final
class PlateauBitWidth(pl.Callback):
    """Goes to the next precision when a monitored metric has not improved for some evaluations.

    It looks after each validation of the fit, or at the end of each training epoch where there is none; the change
    comes with the next training batch, as in :class:`ProgressiveBitWidth`. What cannot be told from the step count is
    its state: the stage, the best value of the stage, and how many evaluations did not improve on it.

    Args:
        stages: precisions in order, such as ``(8, 4, 2)``: bits of the recipe's family, or grids.
        monitor: name of a logged metric.
        mode: whether ``"min"`` or ``"max"`` is better.
        patience: evaluations without improvement before the change, positive.
        min_delta: what counts as improvement, not negative, in units of the metric.
        match: glob over dotted layer names.
        inputs: whether quantizers of inputs follow, too.

    Raises:
        ValueError: values out of range; while training: a metric that is not logged.
    """

    def __init__(
        self,
        stages: Sequence[Precision],
        *,
        monitor: str,
        mode: Literal["min", "max"] = "min",
        patience: int = 2,
        min_delta: float = 0.0,
        match: str = "*",
        inputs: bool = False,
    ) -> None:
        _check(stages, mode=mode, patience=patience, min_delta=min_delta)
        self.stages = tuple(stages)
        self.monitor, self.mode, self.patience, self.min_delta = monitor, mode, patience, min_delta
        self.bit_width = BitWidth(match, inputs, "PlateauBitWidth")
        self._stage, self._best, self._num_bad = 0, math.inf, 0

    def __repr__(self) -> str:
        """Return an expression that evaluates back."""
        return (
            f"PlateauBitWidth({self.stages!r}, monitor={self.monitor!r}, mode={self.mode!r}, "
            f"patience={self.patience!r}, min_delta={self.min_delta!r}, match={self.bit_width.match!r}, "
            f"inputs={self.bit_width.inputs!r})"
        )

    @property
    def state_key(self) -> str:
        """Tell several triggers for parts of one model apart."""
        return self._generate_state_key(monitor=self.monitor, match=self.bit_width.match)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"stage": self._stage, "best": self._best, "num_bad": self._num_bad}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stage, self._best, self._num_bad = state_dict["stage"], state_dict["best"], state_dict["num_bad"]

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self.bit_width.forget()
        if stage == "fit" and trainer.global_step == 0:  # of another run; a checkpoint brings its own after this hook
            self._stage, self._best, self._num_bad = 0, math.inf, 0

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self.bit_width.batch_ended()

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.bit_width.check(trainer, pl_module, self.stages)
        if not is_resumed(trainer):
            self.bit_width.set(trainer, pl_module, self.stages[self._stage])

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self.bit_width.set(trainer, pl_module, self.stages[self._stage])
        self.bit_width.batch_begins(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.bit_width.batch_ended()

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not trainer.enable_validation:
            self._look(trainer)

    def _look(self, trainer: "pl.Trainer") -> None:
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"PlateauBitWidth: monitor={self.monitor!r} is not logged; there are {sorted(trainer.callback_metrics)}"
            )
        value = float(trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor])))  # equal on all ranks
        value = value if self.mode == "min" else -value
        if value < self._best - self.min_delta:
            self._best, self._num_bad = value, 0
            return
        self._num_bad += 1
        if self._num_bad >= self.patience and self._stage + 1 < len(self.stages):
            rank_zero_info(
                f"PlateauBitWidth: {self.monitor} has not improved {self._num_bad} times; "
                f"{self.stages[self._stage]!r} -> {self.stages[self._stage + 1]!r}"
            )
            # fewer bits are worse at first: what was best before is no measure for them
            self._stage, self._best, self._num_bad = self._stage + 1, math.inf, 0


def _check(stages: Sequence[Precision], *, mode: str, patience: int, min_delta: float) -> None:
    if isinstance(stages, str) or len(stages) < 2:
        raise ValueError(f"PlateauBitWidth: stages={stages!r} is not allowed; give at least two, such as (8, 4, 2)")
    if mode not in ("min", "max"):
        raise ValueError(f"PlateauBitWidth: mode={mode!r} is not allowed; choose 'min' or 'max'")
    if not isinstance(patience, int) or patience < 1:
        raise ValueError(f"PlateauBitWidth: patience={patience!r} is not allowed; choose a positive integer")
    if not min_delta >= 0:
        raise ValueError(
            f"PlateauBitWidth: min_delta={min_delta!r} is not allowed; choose a value that is not negative"
        )
