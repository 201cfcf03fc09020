"""Averaging of weights beside QATCallback: scales are averaged with the weights, grids never."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_qat import Calibration, QATCallback, prepare, recipes
from tests.callbacks._models import (
    LEARNED_INPUTS,
    STORED_INPUTS,
    Net,
    OtherNet,
    assert_equal_states,
    fake_quantizers,
    fit,
    grid_distance,
    loader,
    state,
    trainer,
)

DECAY = 0.75
AVERAGES = {
    "WeightAveraging": WeightAveraging,
    "EMAWeightAveraging": EMAWeightAveraging,
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(1e-2, 1, 1),
}
late_layers = pytest.mark.filterwarnings(
    "ignore:You're using the WeightAveraging callback with a model that overrides:UserWarning"
)
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:You're using the WeightAveraging callback, but loading a checkpoint:UserWarning"
    ),
    late_layers,  # Net has a configure_model
]


class Trajectory(pl.Callback):
    """The state after every optimizer step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.states.append(state(pl_module))


def ema(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """torch's exponential moving average of what is a parameter or buffer; what encodes the grid stays the last."""
    average = dict(states[0])
    for later in states[1:]:
        for key, value in later.items():
            moved = average[key] * DECAY + value * (1 - DECAY)
            average[key] = value if key.endswith("_extra_state") else moved
    return average


@pytest.mark.parametrize("name", AVERAGES)
def test_averaging_listed_first_is_an_error_that_names_both(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is listed before QATCallback.*list QATCallback before {name}"):
        fit(Net(), AVERAGES[name](), QATCallback())


def test_averaging_of_the_other_package() -> None:
    import pytorch_lightning
    from pytorch_lightning.callbacks import EMAWeightAveraging as OtherAveraging

    with pytest.raises(ValueError, match="EMAWeightAveraging is listed before QATCallback"):
        fit(OtherNet(), OtherAveraging(), QATCallback(), pl=pytorch_lightning)
    model = OtherNet()
    fit(model, QATCallback(STORED_INPUTS), Calibration(), OtherAveraging(decay=DECAY), pl=pytorch_lightning)
    assert all(quantizer.calibrated for quantizer in fake_quantizers(model).values())
    assert grid_distance(model, "first") < 1e-5


@pytest.mark.parametrize("name", AVERAGES)
def test_a_prepared_model_is_averaged_in_either_order(name: str) -> None:
    states = []
    for first in (True, False):
        model = Net()
        prepare(model, recipes.int4())
        callbacks = [QATCallback(), AVERAGES[name]()]
        fit(model, *(callbacks if first else callbacks[::-1]), max_epochs=2)
        states.append(state(model))
        assert grid_distance(model, "first") < 1e-5
    assert_equal_states(*states)


@pytest.mark.parametrize("where", ["__init__", "configure_model"])
@pytest.mark.parametrize("recipe", [LEARNED_INPUTS, STORED_INPUTS])
def test_the_trained_model_is_the_average_with_exact_grids(recipe: Any, where: str) -> None:
    model, trajectory = Net(where=where), Trajectory()
    fit(model, QATCallback(recipe), Calibration(), trajectory, EMAWeightAveraging(decay=DECAY), max_epochs=2)
    found, expected = state(model), ema(trajectory.states)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7)
    assert not torch.equal(found["first.weight"], trajectory.states[-1]["first.weight"])
    for name, quantizer in fake_quantizers(model).items():
        bounds = (-128.0, 127.0) if "input" in name else (-8.0, 7.0)
        assert (float(quantizer.lo), float(quantizer.hi)) == bounds
        assert quantizer.calibrated
    assert max(grid_distance(model, "first"), grid_distance(model, "head")) < 1e-5


def test_stored_scales_that_nothing_trains_stay_exact_in_the_average() -> None:
    model, trajectory = Net(), Trajectory()
    fit(model, QATCallback(STORED_INPUTS), Calibration(), trajectory, EMAWeightAveraging(decay=DECAY), max_epochs=3)
    for key in ("first.input_quantizer.scale", "head.input_quantizer.scale"):
        torch.testing.assert_close(state(model)[key], trajectory.states[0][key], rtol=1e-6, atol=0)


def test_validation_under_the_swap_uses_averaged_scales() -> None:
    seen: list[dict[str, Tensor]] = []

    class Watched(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            seen.append(state(self))

    model, trajectory, average = Watched(), Trajectory(), EMAWeightAveraging(decay=DECAY)
    options: Any = {"num_sanity_val_steps": 0, "limit_val_batches": 1}
    made = fit(model, QATCallback(LEARNED_INPUTS), Calibration(), trajectory, average, val=loader(), **options)
    expected = ema(trajectory.states)
    for key, value in expected.items():
        torch.testing.assert_close(seen[0][key], value, rtol=1e-6, atol=1e-7)
    assert_equal_states(seen[0], state(model))
    again = trainer(limit_val_batches=1).validate(model, loader(), verbose=False)[0]["val_loss"]
    assert again == float(made.callback_metrics["val_loss"])


@pytest.mark.parametrize("start", [None, 1000])
@pytest.mark.parametrize("recipe", [LEARNED_INPUTS, STORED_INPUTS])
def test_checkpoints_of_the_average_evaluate_without_calibration(
    recipe: Any, start: int | None, tmp_path: Path
) -> None:
    """Averages copy the model before calibration; what is calibrated is no number that averaging would carry over."""

    class Saves(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "average.ckpt")

    average = EMAWeightAveraging(decay=DECAY, update_starting_at_step=start)
    model = Net()
    fit(model, QATCallback(recipe), Calibration(), Saves(), average)
    fresh = Net(seed=4)
    tester = trainer(QATCallback(recipe), EMAWeightAveraging())
    tester.test(fresh, loader(), ckpt_path=tmp_path / "average.ckpt", verbose=False)
    assert_equal_states(state(model), state(fresh))


def test_layers_made_in_setup_are_not_averaged_in_part() -> None:
    message = (
        "EMAWeightAveraging copied the model before all its layers were there and would average a part of it; list "
        r"QATCallback before EMAWeightAveraging, and create layers in __init__ or configure_model\(\)"
    )
    with pytest.raises(ValueError, match=message):
        fit(Net(where="setup"), QATCallback(), EMAWeightAveraging())


@pytest.mark.parametrize("where", ["setup", "configure_model"])
def test_stochastic_averaging_of_late_layers_is_an_error(where: str) -> None:
    message = r"StochasticWeightAveraging copied the model before .* and create layers in __init__$"
    with pytest.raises(ValueError, match=message):
        fit(Net(where=where), QATCallback(), AVERAGES["StochasticWeightAveraging"]())


def test_stochastic_averaging_averages_scales() -> None:
    class EpochStarts(pl.Callback):
        def __init__(self) -> None:
            self.scales: list[Tensor] = []

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.scales.append(pl_module.head.weight_quantizer.scale.detach().clone())

    model, starts = Net(), EpochStarts()
    average = StochasticWeightAveraging(1e-2, swa_epoch_start=2, annealing_epochs=1)
    fit(model, QATCallback(LEARNED_INPUTS), Calibration(), starts, average, max_epochs=4)
    mean = torch.stack(starts.scales[1:]).mean(0)
    torch.testing.assert_close(model.head.weight_quantizer.scale.detach(), mean)
    assert grid_distance(model, "head") < 1e-5


def test_stochastic_averaging_with_batch_norm() -> None:
    """Lightning adds an epoch that finds the statistics anew (and, of float models as well, takes one step in it)."""

    class Normalized(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(self.first, nn.BatchNorm1d(8))  # type: ignore[assignment]

    model = Normalized()
    fit(model, QATCallback(LEARNED_INPUTS), Calibration(), StochasticWeightAveraging(1e-2, 2, 1), max_epochs=4)
    hidden = torch.cat([model.first[0](x) for x, _ in loader()]).detach()
    torch.testing.assert_close(model.first[1].running_mean, hidden.mean(0), rtol=1e-2, atol=5e-2)
    assert max(grid_distance(model, "first.0"), grid_distance(model, "head")) < 1e-5


def test_stochastic_averaging_wants_a_rate_per_group() -> None:
    """Its own list of rates is per group, as torch's: scales come last."""
    made = fit(Net(), QATCallback(), StochasticWeightAveraging([0.02, 0.01], 1, 1), max_epochs=3)
    assert [round(group["lr"], 6) for group in made.optimizers[0].param_groups] == [0.02, 0.01]
