"""TwoStageSchedule: BitNet's learning rate in two stages, the second without weight decay."""

from typing import Any, Final, final

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_qat.callbacks.run_length import num_steps
from lightning_qat.callbacks.step_hooks import hook_steps, remove
from lightning_qat.schedules import LinearRamp, Ramp

_TO_ZERO: Final = LinearRamp(0.0, start=1.0)
_DECAY: Final = "weight_decay"


def two_stage_factor(
    share: float, *, second: float, switch: float = 0.5, shape: Ramp | None = _TO_ZERO, warmup: float = 0.0
) -> float:
    """Return the factor of the learning rate where a share of the run is done.

    shape(share) * min(1, share / warmup) * (1 before ``switch``, then ``second``).

    Args:
        share: of the run that is done, 0 .. 1.
        second: factor of the second stage, positive.
        switch: share of the run at which it begins, 0 < switch < 1.
        shape: of both stages together; None: 1.
        warmup: share of the run in which the rate rises from 0, 0 <= warmup < switch.

    Example:
        >>> [round(two_stage_factor(share, second=2 / 3), 3) for share in (0.0, 0.25, 0.499, 0.5, 0.75, 1.0)]
        [1.0, 0.75, 0.501, 0.333, 0.167, 0.0]
    """
    factor = 1.0 if shape is None else shape.at(share)
    if share < warmup:
        factor *= share / warmup
    return factor * second if share >= switch else factor


@final
class TwoStageSchedule(pl.Callback):
    """Trains with a high learning rate and weight decay first, then with a lower rate and without weight decay.

    By default the learning rate falls along a straight line to 0 at the end of the run, in the second stage from a
    lower start: with the rate 1.5e-3 it goes from 1.5e-3 to 7.5e-4, and from 5e-4 to 0. The second stage has no weight
    decay, in any parameter group. With ``shape=None`` the rate is that of the module's own scheduler, times ``second``
    in the second stage.

    What it is for: weights of 1 or 1.58 bits need a larger learning rate than float ones, because small steps change no
    code, and the size of a latent weight is how sure it is of its code: weight decay then keeps codes changing, which
    helps early and hurts late.

    The factors act in each optimizer step and are taken back after it: whatever the groups, rates relative to each
    other stay, and checkpoints hold the rates without the factor, as LearningRateMonitor shows them. Logged every
    ``log_every_n_steps``: ``two_stage/lr_factor`` and ``two_stage/weight_decay_factor``.

    Args:
        second: factor of the learning rate in the second stage, positive.
        switch: share of the run at which the second stage begins, 0 < switch < 1.
        shape: of the learning rate over the run, as a factor; None leaves it to the module's own scheduler.
        warmup: share of the run in which the rate rises from 0, 0 <= warmup < switch; only with ``shape``.

    Raises:
        TypeError: ``shape`` is no ramp.
        ValueError: a number out of range. At fit start: a module with a scheduler of its own while ``shape`` is given,
            a run without end.

    Source: Microsoft, The Era of 1-bit LLMs: Training Tips, Code and FAQ (2024). Taken from it: the peak rates 1.5e-3,
    then 1e-3 (table 2, 700M parameters; hence ``second=2 / 3``), weight decay 0.1, then 0, both from the middle of
    training on. That the line runs to 0 at the end of the run in both stages is our reading of published notes on it.
    """

    def __init__(
        self, second: float = 2 / 3, *, switch: float = 0.5, shape: Ramp | None = _TO_ZERO, warmup: float = 0.0
    ) -> None:
        if not 0 < second < float("inf"):
            raise ValueError(f"TwoStageSchedule: second={second} must be positive; default 2 / 3")
        if not 0 < switch < 1:
            raise ValueError(f"TwoStageSchedule: switch={switch}; expected a share of the run, 0 < switch < 1")
        if not 0 <= warmup < switch:
            raise ValueError(f"TwoStageSchedule: warmup={warmup}; expected 0 <= warmup < switch={switch}")
        if shape is not None and not isinstance(shape, Ramp):
            raise TypeError(
                f"TwoStageSchedule: shape={shape!r} is not a ramp; give LinearRamp(0.0, start=1.0) or another, or None "
                "to keep the module's own scheduler"
            )
        if shape is not None and shape.extremes[0] < 0:
            raise ValueError(f"TwoStageSchedule: shape={shape} falls below 0")
        if shape is None and warmup:
            raise ValueError(
                f"TwoStageSchedule: warmup={warmup} has no effect with shape=None; let your scheduler do it"
            )
        self.second, self.switch, self.shape, self.warmup = second, switch, shape, warmup
        self._handles: list[RemovableHandle] = []
        self._own: list[tuple[dict[str, Any], str, Any]] = []
        self._total_steps = 1.0

    def __repr__(self) -> str:
        """Return an expression that evaluates back."""
        return (
            f"TwoStageSchedule({self.second!r}, switch={self.switch!r}, shape={self.shape!r}, warmup={self.warmup!r})"
        )

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        schedulers = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
        if self.shape is not None and schedulers:
            raise ValueError(
                f"TwoStageSchedule: {type(pl_module).__name__} has a scheduler of its own, {schedulers[0]}; return the "
                "optimizer alone from configure_optimizers(), or keep the scheduler with TwoStageSchedule(shape=None)"
            )
        remove(self._handles)

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._scale(optimizer, trainer.global_step / self._total_steps)

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._take_back()

        self._handles = hook_steps(trainer.optimizers, "TwoStageSchedule", before=before, after=after)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._total_steps = num_steps(trainer, "TwoStageSchedule")

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer._logger_connector.should_update_logs:
            share = max(0, trainer.global_step - 1) / self._total_steps  # of the step that has just been made
            values = {"lr_factor": self._factor(share), "weight_decay_factor": float(share < self.switch)}
            named = {f"two_stage/{name}": torch.tensor(value) for name, value in values.items()}
            pl_module.log_dict(named, on_step=True, on_epoch=False)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        remove(self._handles)

    def _factor(self, share: float) -> float:
        return two_stage_factor(share, second=self.second, switch=self.switch, shape=self.shape, warmup=self.warmup)

    def _scale(self, optimizer: Optimizer, share: float) -> None:
        self._take_back()  # of a step that failed
        factor = self._factor(share)
        for group in optimizer.param_groups:
            self._own += [(group, key, group[key]) for key in ("lr", _DECAY) if group.get(key) is not None]
            group["lr"] = group["lr"] * factor
            if share >= self.switch and _DECAY in group:
                group[_DECAY] = 0.0

    def _take_back(self) -> None:
        for group, key, value in self._own:
            group[key] = value
        self._own = []
