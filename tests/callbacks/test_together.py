"""Every subset of our callbacks together with Lightning's: trains, resumes bit for bit, copies, and prints itself."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger

import lightning_qat
import lightning_qat.callbacks
import lightning_qat.schedules
from lightning_qat import Calibration, Int, Recipe, Ternary, prepare, recipes
from lightning_qat.callbacks import Distillation, ProgressiveBitWidth, QATCallback, QuantizationStatistics
from tests.callbacks._models import LEARNED_INPUTS, Net, assert_equal_states, fake_quantizers, fit, loader, state

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings("ignore:QuantizationStatistics. .* of the (values lie outside|scales have collapsed)"),
]

REGISTRY: dict[str, Callable[[Recipe], Any]] = {
    "qat": QATCallback,
    "calibration": lambda recipe: Calibration(1),
    "progressive": lambda recipe: ProgressiveBitWidth({0: 8, 1: 4, 3: 2}, unit="step", inputs=True),
    "distillation": lambda recipe: Distillation(weight=0.5),
    "statistics": lambda recipe: QuantizationStatistics(1, oscillation_samples=4),
}
SUBSETS = [names for n in range(1, 6) for names in itertools.combinations(REGISTRY, n)]
NAMESPACE = vars(lightning_qat) | vars(lightning_qat.callbacks) | vars(lightning_qat.schedules)


def recipe_of(names: tuple[str, ...]) -> Recipe:
    """Learned scales of inputs where something calibrates them."""
    return LEARNED_INPUTS if "calibration" in names else recipes.int4()


def ours(names: tuple[str, ...]) -> list[Any]:
    return [REGISTRY[name](recipe_of(names)) for name in names]


def theirs(folder: Path) -> list[Any]:
    return [
        EMAWeightAveraging(decay=0.5),
        LearningRateMonitor(),
        EarlyStopping("val_loss", patience=9),
        GradientAccumulationScheduler({0: 1, 1: 2}),
        ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, enable_version_counter=False),
    ]


def train(names: tuple[str, ...], folder: Path, seed: int = 0, **options: Any) -> Net:
    model = Net(seed=seed)
    if "qat" not in names:
        prepare(model, recipe_of(names))
    fit(model, *ours(names), *theirs(folder), val=loader(8), train=loader(16), max_epochs=3, logger=CSVLogger(folder),
        log_every_n_steps=1, num_sanity_val_steps=0, **options)  # fmt: skip
    return model


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_every_subset_trains_and_resumes_bit_for_bit(names: tuple[str, ...], tmp_path: Path) -> None:
    whole = train(names, tmp_path)
    bits = {q.grid.bits_per_weight for q in fake_quantizers(whole).values()}
    assert bits == ({2.0} if "progressive" in names else {4.0, 8.0} if "calibration" in names else {4.0})
    for epoch in (0, 1) if len(names) == 5 else (0,):
        resumed = train(names, tmp_path, seed=1, ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert_equal_states(state(resumed), state(whole))


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
def test_every_subset_copies_and_prints_itself(names: tuple[str, ...]) -> None:
    callbacks = ours(names)
    copies = copy.deepcopy(callbacks)
    for callback, made in zip(callbacks, copies, strict=True):
        assert repr(made) == repr(callback)
        assert repr(eval(repr(callback), dict(NAMESPACE))) == repr(callback)
    model, other = Net(), Net()
    for net, used in ((model, callbacks), (other, copies)):
        if "qat" not in names:
            prepare(net, recipe_of(names))
        fit(net, *used, train=loader(16))
    assert_equal_states(state(model), state(other))
    copy.deepcopy(callbacks)  # also after a fit


def test_an_averaged_model_ends_on_the_grid_of_the_trained_one() -> None:
    schedule = ProgressiveBitWidth({0: Int(4), 1: Ternary()}, unit="step")
    average, model = EMAWeightAveraging(decay=0.9), Net()
    fit(model, QATCallback(recipes.int4()), schedule, average, max_epochs=2)
    assert average._average_model is not None
    for name, quantizer in fake_quantizers(average._average_model.module).items():
        assert quantizer.grid == fake_quantizers(model)[name].grid == Ternary()
    assert all(len(row.unique()) <= 3 for row in model.first.weight.detach())


@pytest.mark.parametrize("names", [("qat",), ("qat", "progressive", "distillation", "statistics")], ids="-".join)
def test_stochastic_weight_averaging(names: tuple[str, ...]) -> None:
    """The average keeps the parameters of the quantizers, and stays on the grid."""
    model = Net()
    swa = StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=1)
    fit(model, *ours(names), swa, train=loader(16), max_epochs=4)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert {q.grid.bits_per_weight for q in fake_quantizers(model).values()} == {2.0 if "progressive" in names else 4.0}
    levels = model.first.weight.detach() / model.first.weight_quantizer.scale.detach().abs()  # type: ignore[operator]
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


def test_both_packages_at_once() -> None:
    """Ours derive from lightning.pytorch, and work in the trainer of pytorch_lightning."""
    import pytorch_lightning

    from tests.callbacks._models import OtherNet

    names = tuple(REGISTRY)
    model, other = Net(), OtherNet()
    fit(model, *ours(names))
    fit(other, *ours(names), pl=pytorch_lightning)
    assert_equal_states(state(model), state(other))
    assert isinstance(ours(names)[0], lightning.pytorch.Callback)


class SameEverywhere(lightning.pytorch.Callback):
    """Fails where processes have different parameters or scales."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for name, value in pl_module.state_dict().items():
            everywhere = [torch.empty_like(value) for _ in range(2)]
            torch.distributed.all_gather(everywhere, value)
            assert torch.equal(*everywhere), name


@pytest.mark.timeout(120)
def test_two_processes_agree(tmp_path: Path) -> None:
    """Learned scales of inputs are found from the data of both; rank zero logs what both measured."""
    logger, names = CSVLogger(tmp_path, name="", version="run"), tuple(REGISTRY)
    model = Net()
    prepare(model, recipe_of(names))  # processes are forked off: the model comes back to this one
    fit(model, *ours(names), SameEverywhere(), logger=logger, devices=2, strategy="ddp_fork")
    text = (tmp_path / "run" / "metrics.csv").read_text()
    header, *rows = [line.split(",") for line in text.splitlines()]
    measured = [row[header.index("quantization/first/input/sqnr")] for row in rows]
    assert len([value for value in measured if value]) == 2  # two batches for each of the processes
