"""Callbacks that follow the share of a run: resumed inside an epoch, the data go on where they were.

And what tuners restore at fit start is no resume.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint

from lightning_qat import (
    GPTQ,
    BitAllocation,
    Distillation,
    GradualQuantization,
    OrthogonalUpdates,
    OscillationFreezing,
    Penalty,
    ProgressiveBitWidth,
    QATCallback,
    Regularization,
    TwoStageSchedule,
    recipes,
)
from lightning_qat.losses import grid_distance
from lightning_qat.schedules import ByFraction, CosineRamp, QuadraticRamp
from tests.callbacks._models import Net, StatefulLoader, assert_equal_states, fit, loader, state, trainer

FOLLOWING: dict[str, Callable[[], Any]] = {
    "freezing": OscillationFreezing,
    "gradual": lambda: GradualQuantization(0.9),
    "orthogonal": lambda: OrthogonalUpdates(QuadraticRamp(0.0, start=1.0), recomputed=True),
    "progressive": lambda: ProgressiveBitWidth(ByFraction({0.0: 8, 0.5: 4}), unit="step"),
    "regularization": lambda: Regularization([Penalty(grid_distance, weight=CosineRamp(0.1))]),
    "two stages": TwoStageSchedule,
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_a_run_resumed_inside_an_epoch_sees_the_batches_that_are_left(name: str, tmp_path: Path) -> None:
    def run(ckpt: Path | None = None) -> Any:
        model = Net(seed=0 if ckpt is None else 1)
        saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        train = StatefulLoader(list(loader(48)))
        fit(model, QATCallback(), FOLLOWING[name](), saves, train=train, max_epochs=2, ckpt=ckpt)
        return state(model)

    assert_equal_states(run(), run(tmp_path / "step=2.ckpt"))


class Tunable(Net):
    """Has what the tuners change."""

    lr, batch_size = 0.01, 8

    def train_dataloader(self) -> Any:
        return loader(32, self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(8)


TUNERS: dict[str, Callable[[], Any]] = {
    "rate": lambda: LearningRateFinder(num_training_steps=12, update_attr=False),
    "batch": lambda: BatchSizeFinder(steps_per_trial=1, init_val=8, max_trials=1, margin=0.0),
}
AT_FIT_START: dict[str, Callable[[], Any]] = {
    "gptq": GPTQ,
    "allocation": lambda: BitAllocation(3.0, num_batches=1),
    "teacher": Distillation,
    "progressive": lambda: ProgressiveBitWidth({0: 8, 1: 2}),
}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")  # the finder's scheduler steps first
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("name", AT_FIT_START)
@pytest.mark.parametrize("first", [True, False])
def test_what_a_tuner_restores_is_no_resume(name: str, tuner: str, first: bool, tmp_path: Path) -> None:
    states = []
    for tuners in ([], [TUNERS[tuner]()]):
        model, own = Tunable(), [AT_FIT_START[name]()]
        callbacks = tuners + own if first else own + tuners
        torch.manual_seed(0)
        made = trainer(QATCallback(recipes.int2()), *callbacks, max_epochs=2, default_root_dir=tmp_path)
        made.fit(model)
        states.append(state(model))
    assert_equal_states(*states)


def test_a_finder_that_would_lose_multipliers_is_refused() -> None:
    finder = LearningRateFinder(num_training_steps=12)
    with pytest.raises(ValueError, match=r"multipliers are lost with LearningRateFinder, .*\(update_attr=False\)"):
        fit(Tunable(), QATCallback(recipes.int4(), scale_lr_multiplier=0.1), finder)
