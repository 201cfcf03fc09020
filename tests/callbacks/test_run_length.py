"""Callbacks that follow the share of a run: resumed inside an epoch, the data go on where they were."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_qat import (
    GradualQuantization,
    OrthogonalUpdates,
    OscillationFreezing,
    Penalty,
    ProgressiveBitWidth,
    QATCallback,
    Regularization,
    TwoStageSchedule,
)
from lightning_qat.losses import grid_distance
from lightning_qat.schedules import ByFraction, CosineRamp, QuadraticRamp
from tests.callbacks._models import Net, StatefulLoader, assert_equal_states, fit, loader, state

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
