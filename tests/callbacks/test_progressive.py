"""ProgressiveBitWidth: when precision falls, what happens to scales and optimizers, and that a resume is identical."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch._dynamo.testing import CompileCounter

from lightning_qat import Binary, Calibration, Int, ProgressiveBitWidth, QATCallback, Recipe, Ternary, recipes
from lightning_qat.callbacks import GradualQuantization, PlateauBitWidth
from lightning_qat.callbacks.bit_width import forget_state
from lightning_qat.schedules import ByFraction, Linear
from tests.callbacks._models import (
    LEARNED_INPUTS,
    STORED_INPUTS,
    Net,
    StatefulLoader,
    adamw,
    assert_equal_states,
    fake_quantizers,
    fit,
    grid_distance,
    loader,
    state,
    trainer,
)


class Grids(lightning.pytorch.Callback):
    """Writes down the grids at the end of every batch."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append("+".join(sorted({q.grid.label for q in fake_quantizers(pl_module).values()})))


def batches() -> StatefulLoader:
    return StatefulLoader(list(loader(64)))


def test_epochs() -> None:
    grids = Grids()
    fit(Net(), QATCallback(recipes.int2()), ProgressiveBitWidth({0: 8, 1: 4, 2: 2}), grids, max_epochs=3)
    assert grids.seen == ["int8"] * 4 + ["int4"] * 4 + ["int2"] * 4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_optimizer_steps_also_under_accumulation(accumulate: int) -> None:
    grids = Grids()
    schedule = ProgressiveBitWidth({0: 8, 2: 4}, unit="step")
    fit(Net(), QATCallback(recipes.int4()), schedule, grids, max_epochs=1, accumulate_grad_batches=accumulate,
        train=loader(64))  # fmt: skip
    assert grids.seen == ["int8"] * 2 * accumulate + ["int4"] * (8 - 2 * accumulate)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ByFraction({0.0: 8, 0.5: 4}), ["int8"] * 4 + ["int4"] * 4),
        (Linear(4, 2, duration=4), ["int4"] * 2 + ["int3"] * 2 + ["int2"] * 4),
    ],
)
def test_schedules(schedule: Any, expected: list[str]) -> None:
    grids = Grids()
    fit(Net(), QATCallback(recipes.int8()), ProgressiveBitWidth(schedule, unit="step"), grids, max_epochs=2)
    assert grids.seen == expected


class TwoOptimizers(Net):
    """Manual optimization: both optimizers step in every batch, so that global_step grows by two."""

    def __init__(self) -> None:
        super().__init__(optimizer=lambda m: [torch.optim.SGD(m.first.parameters(), 0.1), adamw(m.head)])
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = F.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()


def test_several_optimizers_count_all_their_steps_and_skip_no_stage() -> None:
    grids = Grids()
    fit(TwoOptimizers(), QATCallback(recipes.int8()), ProgressiveBitWidth({0: 8, 3: 4, 5: 2}, unit="step"), grids)
    assert grids.seen == ["int8", "int8", "int4", "int2"]


def test_fractions_of_a_run_with_several_optimizers() -> None:
    grids = Grids()
    schedule = ProgressiveBitWidth(ByFraction({0.0: 8, 0.5: 4}), unit="step")
    fit(TwoOptimizers(), QATCallback(recipes.int8()), schedule, grids, max_epochs=2)
    assert grids.seen == ["int8"] * 4 + ["int4"] * 4


def test_grid_families_change() -> None:
    model, grids = Net(), Grids()
    stages = {0: Int(4), 1: Ternary(), 2: Binary()}
    fit(model, QATCallback(recipes.int4()), ProgressiveBitWidth(stages, unit="step"), grids)
    assert grids.seen == ["int4", "ternary", "binary", "binary"]
    assert model.first.weight.unique().numel() <= 2 * 8


def test_parts_follow_schedules_of_their_own() -> None:
    model = Net()
    fit(model, QATCallback(recipes.int8()), ProgressiveBitWidth({0: 8, 1: 2}, unit="step", match="first"),
        ProgressiveBitWidth({0: 4}, unit="step", match="head"))  # fmt: skip
    assert {name: q.grid for name, q in fake_quantizers(model).items()} == {
        "first.weight_quantizer": Int(2),
        "head.weight_quantizer": Int(4),
    }


@pytest.mark.parametrize("recipe", [LEARNED_INPUTS, STORED_INPUTS])
def test_inputs_follow_and_nothing_is_left_behind(recipe: Recipe) -> None:
    model = Net()
    callbacks = (QATCallback(recipe), Calibration(2), ProgressiveBitWidth({0: 8, 2: 2}, unit="step", inputs=True))
    fit(model, *callbacks)
    assert all(q.grid == Int(2) for q in fake_quantizers(model).values())
    assert all(len(layer._forward_pre_hooks) <= 1 for layer in (model.first, model.head))


def test_optimizers_start_afresh_with_scales_only() -> None:
    class Look(lightning.pytorch.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:
                optimizer = trainer.optimizers[0]
                scale, weight = pl_module.first.weight_quantizer.scale, pl_module.first._parameters["weight"]
                found.append({key: float(value.sum()) for key, value in optimizer.state[scale].items()})
                found.append({key: float(value.abs().sum()) for key, value in optimizer.state[weight].items()})

    found: list[dict[str, float]] = []
    fit(Net(), QATCallback(recipes.int4()), ProgressiveBitWidth({0: 8, 3: 4}, unit="step"), Look())
    scale, weight = found
    assert scale == {"step": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0}
    assert weight["step"] == 3.0
    assert weight["exp_avg"] > 0


@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": False}, {"foreach": True}, {"amsgrad": True}])
def test_adam_after_the_reset_steps_as_a_new_one_does(options: dict[str, bool]) -> None:
    used, new = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    old = torch.optim.AdamW([used], lr=0.1, **options)  # type: ignore[arg-type]
    for _ in range(5):
        used.grad = torch.randn(3)
        old.step()
    forget_state([old], [used])
    with torch.no_grad():
        used.copy_(new)
    fresh = torch.optim.AdamW([new], lr=0.1, **options)  # type: ignore[arg-type]
    for seed in range(3):
        used.grad = new.grad = torch.randn(3, generator=torch.Generator().manual_seed(seed))
        old.step()
        fresh.step()
    assert torch.equal(used, new)


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("recipe", [recipes.int2(), LEARNED_INPUTS])
def test_resume_at_any_step_is_identical(stop: int, recipe: Recipe, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        schedule = ProgressiveBitWidth({0: 8, 2: 4, 5: 2}, unit="step", inputs=True)
        return [QATCallback(recipe), Calibration(2), schedule]

    def run(model: Net, **options: Any) -> None:
        checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1,
                                     enable_version_counter=False)  # fmt: skip
        fit(model, *callbacks(), checkpoint, train=batches(), **options)

    whole, resumed = Net(), Net(seed=1)
    run(whole)
    run(resumed, ckpt=tmp_path / f"step={stop}.ckpt")
    assert_equal_states(state(resumed), state(whole))


@pytest.mark.parametrize("stop", [3, 4, 5, 8])
def test_resume_around_the_end_of_an_epoch_is_identical(stop: int, tmp_path: Path) -> None:
    """After a checkpoint of the last batch, Lightning begins the next epoch without on_train_epoch_start."""

    def run(model: Net, **options: Any) -> list[str]:
        grids = Grids()
        schedule = ProgressiveBitWidth({0: 8, 1: 4, 2: 2})
        saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1,
                                enable_version_counter=False)  # fmt: skip
        callbacks = (GradualQuantization(1.0, most_levels=16), QATCallback(recipes.int2()), schedule, grids, saves)
        fit(model, *callbacks, train=StatefulLoader(list(loader())), max_epochs=3, **options)
        return grids.seen

    whole, resumed = Net(), Net(seed=1)
    seen = run(whole)
    assert seen == ["int8"] * 4 + ["int4"] * 4 + ["int2"] * 4
    assert run(resumed, ckpt=tmp_path / f"step={stop}.ckpt") == seen[stop:]
    assert_equal_states(state(resumed), state(whole))


def test_averages_end_on_the_grid_of_the_model() -> None:
    model = Net()
    average = EMAWeightAveraging(decay=0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You're using the WeightAveraging callback with a model that overrides")
        fit(model, QATCallback(recipes.int4()), ProgressiveBitWidth({0: 8, 2: 2}, unit="step"), average, max_epochs=2)
    averaged = average._average_model
    assert averaged is not None
    for name, quantizer in fake_quantizers(averaged.module).items():
        own = fake_quantizers(model)[name]
        assert quantizer.grid == own.grid == Int(2)
        assert (float(quantizer.lo), float(quantizer.hi)) == (float(own.lo), float(own.hi)) == (-2.0, 1.0)
    assert grid_distance(model, "first") < 1e-5
    assert model.first.weight.div(model.first.weight_quantizer.scale).unique().numel() <= 4  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does so itself
def test_one_compilation_serves_a_family() -> None:
    torch._dynamo.reset()
    counted = CompileCounter()

    class Compiled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.run = None

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.run is None:
                self.run = torch.compile(self.forward, backend=counted)
            return F.cross_entropy(self.run(batch[0]), batch[1])

    grids = Grids()
    fit(Compiled(), QATCallback(recipes.int2()), ProgressiveBitWidth({0: 8, 1: 4, 2: 3, 3: 2}, unit="step"), grids)
    assert grids.seen == ["int8", "int4", "int3", "int2"]
    assert counted.frame_count == 1


def test_changes_are_logged_and_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger, rows = CSVLogger(tmp_path), []
    logger.log_metrics = lambda metrics, step: rows.append((step, metrics))  # type: ignore[method-assign]
    with caplog.at_level("INFO"):
        fit(Net(), QATCallback(recipes.int4()), ProgressiveBitWidth({0: 8, 2: 4}, unit="step"), logger=logger)
    bits = [(step, metrics["quantization/bits"]) for step, metrics in rows if "quantization/bits" in metrics]
    assert bits == [(0, 8.0), (2, 4.0)]
    assert "ProgressiveBitWidth: int8 -> int4 in 2 quantizers at epoch 0, step 2" in caplog.text


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([ProgressiveBitWidth({0: 8})], "the model is not prepared; add QATCallback"),
        ([QATCallback(recipes.int8()), ProgressiveBitWidth({0: 8}, match="heads")], "match='heads' matches no"),
        (
            [QATCallback(recipes.int8()), ProgressiveBitWidth({0: 8}), ProgressiveBitWidth({0: 4}, match="head")],
            "both set head.weight_quantizer; choose patterns that do not overlap",
        ),
        ([QATCallback(recipes.piq3()), ProgressiveBitWidth({0: 8, 9: 3})], r"Pi\(bits=3, k=4\) cannot have 8 bits"),
        ([QATCallback(recipes.int8()), ProgressiveBitWidth(ByFraction({0.0: 8}))], "needs the length of the run"),
    ],
)
def test_errors_at_fit_start(callbacks: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(Net(), *callbacks, max_epochs=-1, max_steps=2)


def test_errors_at_construction() -> None:
    with pytest.raises(ValueError, match="unit='batch' is not allowed; choose 'epoch' or 'step'"):
        ProgressiveBitWidth({0: 8}, unit="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bits can only fall"):
        ProgressiveBitWidth({0: 4, 1: 8})


def plateau(monitor: str = "val_loss") -> PlateauBitWidth:
    return PlateauBitWidth((8, 4, 2), monitor=monitor, patience=1, min_delta=100.0)


def test_a_plateau_triggers_the_next_stage() -> None:
    grids = Grids()
    fit(Net(), QATCallback(recipes.int2()), plateau(), grids, val=loader(8), max_epochs=5, num_sanity_val_steps=1)
    # the first evaluation of a stage counts as the best so far, the second as no improvement
    assert grids.seen[::4] == ["int8", "int8", "int4", "int4", "int2"]


def test_a_plateau_of_a_training_metric() -> None:
    grids = Grids()
    fit(Net(), QATCallback(recipes.int2()), plateau("train_loss"), grids, max_epochs=3)
    assert grids.seen[::4] == ["int8", "int8", "int4"]


@pytest.mark.parametrize("stop", [2, 3])
def test_a_plateau_resumes_identically(stop: int, tmp_path: Path) -> None:
    def run(model: Net, epochs: int, **options: Any) -> Any:
        checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        return fit(
            model, QATCallback(recipes.int2()), plateau(), checkpoint, val=loader(8), max_epochs=epochs, **options
        )

    whole = Net()
    run(whole, 5)
    resumed = Net(seed=1)
    run(resumed, 5, ckpt=tmp_path / f"epoch={stop - 1}.ckpt")
    assert_equal_states(state(resumed), state(whole))


def test_a_plateau_of_a_second_fit_starts_anew_and_a_continued_one_goes_on() -> None:
    trigger, first, second = plateau(), Grids(), Grids()
    fit(Net(), QATCallback(recipes.int2()), trigger, first, val=loader(8), max_epochs=4)
    model = Net()
    again = fit(model, QATCallback(recipes.int2()), trigger, second, val=loader(8), max_epochs=3)
    assert (first.seen[::4], second.seen[::4]) == (["int8", "int8", "int4", "int4"], ["int8", "int8", "int4"])
    again.fit_loop.max_epochs = 5
    again.fit(model, loader(), loader(8))
    assert second.seen[::4] == ["int8", "int8", "int4", "int4", "int2"]


def test_plateau_errors() -> None:
    with pytest.raises(ValueError, match="give at least two"):
        PlateauBitWidth((8,), monitor="val_loss")
    with pytest.raises(ValueError, match="patience=0 is not allowed"):
        PlateauBitWidth((8, 4), monitor="val_loss", patience=0)
    with pytest.raises(ValueError, match="mode='best'"):
        PlateauBitWidth((8, 4), monitor="val_loss", mode="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_delta"):
        PlateauBitWidth((8, 4), monitor="val_loss", min_delta=-1.0)
    with pytest.raises(ValueError, match=r"monitor='val_f1' is not logged; there are \[.*'train_loss'\]"):
        fit(Net(), QATCallback(recipes.int2()), plateau("val_f1"))
    assert repr(eval(repr(plateau()))) == repr(plateau())


def test_repr_evaluates() -> None:
    schedule = ProgressiveBitWidth({0: Int(4), 2: Ternary()}, unit="step", match="head", inputs=True)
    from lightning_qat.schedules import Staircase

    names = {"ProgressiveBitWidth": ProgressiveBitWidth, "Staircase": Staircase, "Int": Int, "Ternary": Ternary}
    assert repr(eval(repr(schedule), names)) == repr(schedule)


def test_trainer_without_our_callbacks_is_not_needed_for_validation() -> None:
    model = Net()
    fit(model, QATCallback(recipes.int8()), ProgressiveBitWidth({0: 8, 1: 4}, unit="step"))
    before = state(model)
    trainer(QATCallback(recipes.int8()), ProgressiveBitWidth({0: 8})).validate(model, loader(8), verbose=False)
    assert_equal_states(state(model), before)
