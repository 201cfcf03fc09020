"""QATCallback quantizes weights once per optimizer step where gradients are accumulated, and nothing else changes."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, WeightAveraging
from torch import nn

from lightning_qat import QATCallback, recipes
from lightning_qat.callbacks import accumulation
from lightning_qat.quantization.quantizer import FakeQuantizer
from tests.callbacks._models import Net, assert_equal_states, fit, loader, state


class Kept(L.Callback):
    """How many weights are kept when a batch begins and when it ends."""

    def __init__(self) -> None:
        self.seen: list[tuple[int | None, ...]] = []

    def count(self, model: nn.Module) -> int | None:
        quantizer = next(module for module in model.modules() if isinstance(module, FakeQuantizer))
        return None if quantizer.window is None else len(quantizer.window)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = self.count(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((self.before, self.count(pl_module)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"accumulate_grad_batches": 2}, [(0, 2), (2, 0), (0, 2), (2, 0)]),
        ({"accumulate_grad_batches": 3}, [(0, 2), (2, 2), (2, 0), (0, 0)]),  # the last batch of an epoch steps
        ({}, [(None, None)] * 4),
        ({"accumulate_grad_batches": 2, "val_check_interval": 1}, [(0, 2), (0, 0), (0, 2), (0, 0)]),
    ],
)
def test_weights_are_kept_until_the_optimizer_steps(options: dict[str, Any], expected: list[Any]) -> None:
    kept, model = Kept(), Net()
    fit(model, QATCallback(recipes.int4()), kept, val=loader(), **options)
    assert kept.seen == expected
    assert kept.count(model) is None


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides:UserWarning")
@pytest.mark.parametrize(
    ("options", "callbacks"),
    [
        ({"accumulate_grad_batches": 3}, []),
        ({"accumulate_grad_batches": 2, "val_check_interval": 1}, [lambda: WeightAveraging()]),
        ({"max_epochs": 3}, [lambda: GradientAccumulationScheduler({0: 2, 1: 1, 2: 4})]),
    ],
)
def test_runs_end_in_the_same_state(
    options: dict[str, Any], callbacks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for opened in (True, False):
        model = Net()
        if not opened:
            monkeypatch.setattr(accumulation, "open_window", lambda *_: None)
        fit(model, QATCallback(recipes.w8a8()), *(make() for make in callbacks), val=loader(), **options)
        ends.append(state(model))
    assert_equal_states(*ends)


def test_an_interrupted_run_closes_its_window() -> None:
    from torch.optim import optimizer

    class Failing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 1:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    hooks, model = len(optimizer._global_optimizer_post_hooks), Failing()
    with pytest.raises(RuntimeError, match="stop"):
        fit(model, QATCallback(recipes.int4()), accumulate_grad_batches=2)
    assert Kept().count(model) is None
    assert len(optimizer._global_optimizer_post_hooks) == hooks
