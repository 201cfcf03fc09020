"""Calibration: the right scales, and no trace of how they were found."""

import itertools
import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, WeightedRandomSampler
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_qat import (
    Calibration,
    Int,
    LayerSpec,
    MovingAverage,
    PerTensor,
    QATCallback,
    QuantizerSpec,
    Recipe,
    Rule,
    calibrate,
    prepare,
    recipes,
)
from lightning_qat.callbacks.running import call_module, call_predict_step, find_forward
from lightning_qat.conversion.calibrate import calibration_state, load_calibration_state
from tests.callbacks._models import (
    CLASSES,
    HIDDEN,
    LEARNED_INPUTS,
    STORED_INPUTS,
    WIDTH,
    Net,
    assert_equal_states,
    data,
    fake_quantizers,
    fit,
    loader,
    state,
    trainer,
)

INPUT_SCALES = {"first.input_quantizer.scale", "head.input_quantizer.scale"}


def calibrated(model: Any, *callbacks: Any, **options: Any) -> dict[str, Tensor]:
    """The scales of inputs that a run finds before its first step."""
    fit(model, QATCallback(STORED_INPUTS), *(callbacks or (Calibration(),)), max_steps=0, **options)
    return calibration_state(model)


def by_hand(batches: list[Tensor], recipe: Recipe = STORED_INPUTS, model: Any = None) -> dict[str, Tensor]:
    """The scales of inputs that `calibrate` finds in batches."""
    model = model or Net()
    prepare(model, recipe)
    calibrate(model, batches)
    return calibration_state(model)


def inputs(num_batches: int = 4) -> list[Tensor]:
    return [x for x, _ in itertools.islice(loader(), num_batches)]


# --- the right scales ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_batches", [1, 2, 8])
def test_scales_are_those_of_the_first_batches(num_batches: int) -> None:
    found = calibrated(Net(), Calibration(num_batches))
    assert found.keys() == INPUT_SCALES
    assert_equal_states(found, by_hand(inputs(num_batches)))


def test_the_order_of_callbacks_does_not_matter() -> None:
    model = Net()
    fit(model, Calibration(), QATCallback(STORED_INPUTS), max_steps=0)
    assert_equal_states(calibration_state(model), by_hand(inputs()))


def test_a_dataloader_of_its_own() -> None:
    own = [(10 * x, y) for x, y in loader()]
    assert_equal_states(calibrated(Net(), Calibration(2, own)), by_hand([10 * x for x in inputs(2)]))


def test_a_function_of_its_own() -> None:
    def backwards(module: Any, batch: Any) -> Tensor:
        out: Tensor = module(batch[0].flip(-1) * 3)
        return out

    found = calibrated(Net(), Calibration(forward=backwards))
    assert_equal_states(found, by_hand([x.flip(-1) * 3 for x in inputs()]))


def test_data_of_a_datamodule_and_of_the_module() -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

    class Brings(Net):
        def train_dataloader(self) -> Any:
            return loader()

    expected = by_hand(inputs())
    for model, source in ((Net(), {"datamodule": Data()}), (Brings(), {})):
        made = trainer(QATCallback(STORED_INPUTS), Calibration(), max_steps=0)
        made.fit(model, **source)
        assert_equal_states(calibration_state(model), expected)


class OfParts(Net):
    """Trains on batches of several loaders."""

    def forward(self, batch: Any) -> Tensor:
        parts = batch.values() if isinstance(batch, dict) else batch
        return super().forward(torch.cat([x for x, _ in parts]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        out: Tensor = self(batch)
        return out


@pytest.mark.parametrize(
    "loaders",
    [
        lambda: {"a": loader(), "b": loader(16)},
        lambda: [loader(), loader(16)],
        lambda: CombinedLoader({"a": loader(), "b": loader(16)}, "max_size_cycle"),
    ],
)
def test_collections_of_loaders_are_combined_as_in_training(loaders: Callable[[], Any]) -> None:
    batches = inputs()
    expected = by_hand([torch.cat([x, batches[i % 2]]) for i, x in enumerate(batches)])
    assert_equal_states(calibrated(OfParts(), train=loaders()), expected)


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer", "transfer_batch_to_device"])
@pytest.mark.parametrize("owner", ["module", "datamodule"])
def test_preprocessing_is_applied_once(hook: str, owner: str) -> None:
    def double(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        return [2 * batch[0], batch[1]]

    methods: dict[str, Any] = {"train_dataloader": lambda self: loader(), hook: double}
    if owner == "module":
        model: Any = type("Doubling", (Net,), methods)()
        source = {}
    else:
        model, source = Net(), {"datamodule": type("Data", (pl.LightningDataModule,), methods)()}
    trainer(QATCallback(STORED_INPUTS), Calibration(), max_steps=0).fit(model, **source)
    assert_equal_states(calibration_state(model), by_hand([2 * x for x in inputs()]))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_calibration_runs_in_the_precision_of_training(precision: str) -> None:
    seen: set[Any] = set()

    class Watched(Net):
        def forward(self, x: Tensor) -> Tensor:
            seen.add((x.dtype, torch.is_autocast_enabled("cpu")))
            return super().forward(x)

    calibrated(Watched(), precision=precision)
    dtypes = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert seen == {(dtypes[precision], precision == "bf16-mixed")}


def test_scales_that_are_known_stay() -> None:
    """A part that was calibrated before keeps its scales when others are found."""
    model = Net()
    prepare(model, STORED_INPUTS)
    with torch.no_grad():
        model.first.input_quantizer.scale.fill_(0.125)
    model.first.input_quantizer.calibrated = True
    fit(model, QATCallback(), Calibration(), max_steps=0)
    assert float(model.first.input_quantizer.scale) == 0.125
    assert float(model.head.input_quantizer.scale) not in (0.125, 1.0)


def test_nothing_to_calibrate_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(Net(), QATCallback(recipes.int4()), Calibration(), max_steps=0)
    lines = [record.getMessage() for record in caplog.records if "Calibration" in record.getMessage()]
    assert lines == ["Calibration: nothing to calibrate, every scale is known or recomputed."]


# --- domains and artifacts -------------------------------------------------------------------------------------------


def domains() -> dict[str, Any]:
    return {"chat": loader(24), "code": [(5 * x, y) for x, y in loader(8)]}


def test_domains_are_read_in_turn_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    callback = Calibration(2, domains())
    with caplog.at_level(logging.INFO):
        found = calibrated(Net(), callback)
    chat = inputs(2)
    assert_equal_states(found, by_hand([chat[0], 5 * chat[0], chat[1]]))
    assert callback.samples == {"chat": 16, "code": 8}
    assert "found 2 input scales from 24 samples: chat 16 (67 %), code 8 (33 %)." in caplog.text


def test_artifacts_are_reproducible(tmp_path: Path) -> None:
    callback, model = Calibration(2, domains()), Net()
    found = calibrated(model, callback)
    callback.save(model, tmp_path / "scales.safetensors")
    assert_equal_states(load_file(str(tmp_path / "scales.safetensors")), found)
    described = json.loads((tmp_path / "scales.json").read_text(encoding="utf-8"))
    assert described["inputs"].keys() == {"first.input_quantizer", "head.input_quantizer"}
    assert described["domains"]["chat"] == {"samples": 16, "share": 2 / 3}
    fresh = Net()
    prepare(fresh, STORED_INPUTS)
    Calibration().load(fresh, tmp_path / "scales.safetensors")
    assert_equal_states(calibration_state(fresh), found)
    fit(fresh, QATCallback(), max_steps=0)  # no calibration is needed any more


def test_artifacts_are_written_and_read_by_the_callback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = calibrated(Net(), Calibration(2, domains(), path="scales/a.safetensors"), default_root_dir=tmp_path)
    again = Calibration(dataloader=[], artifact=tmp_path / "scales" / "a.safetensors")
    with caplog.at_level(logging.INFO):
        assert_equal_states(calibrated(Net(), again), found)
    assert again.samples == {"chat": 16, "code": 8}
    assert "a.safetensors, once found from 24 samples: chat 16 (67 %), code 8 (33 %)." in caplog.text
    assert eval(repr(Calibration(3, path="a", artifact="b"))).artifact == Path("b")
    calibrated(Net(), Calibration(path=tmp_path / "trial.safetensors"), fast_dev_run=1)
    assert not (tmp_path / "trial.safetensors").exists()


def test_artifacts_of_inputs_with_another_grid_are_refused(tmp_path: Path) -> None:
    callback, model = Calibration(), Net()
    calibrated(model, callback)
    callback.save(model, tmp_path / "a.safetensors")
    other = Net()
    weight, static = QuantizerSpec(Int(4)), QuantizerSpec(Int(4), PerTensor(), MovingAverage())
    prepare(other, Recipe((Rule("*", LayerSpec(weight, static)),)))
    with pytest.raises(ValueError, match=r"first.input_quantizer is int4:.* was found for int8:"):
        callback.load(other, tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a.json does not say 'lightning_qat.calibration' 1"):
        callback.load(model, tmp_path / "a.safetensors")
    (tmp_path / "a.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"a.json' is not a file"):
        callback.load(model, tmp_path / "a.safetensors")


def test_artifacts_of_other_models_are_refused(tmp_path: Path) -> None:
    model = Net()
    calibrated(model)
    Calibration().save(model, tmp_path / "scales.safetensors")
    part = Net()
    prepare(part, Recipe((Rule("head", None), *STORED_INPUTS.rules)))
    with pytest.raises(ValueError, match=r"unexpected \['head.input_quantizer.scale'\]; it is of another model"):
        Calibration().load(part, tmp_path / "scales.safetensors")
    with pytest.raises(FileNotFoundError, match=r"Calibration.load: path='nowhere' is not a file"):
        Calibration().load(part, "nowhere")


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"num_batches": 0}, ValueError, "num_batches=0 is not allowed; choose a positive integer"),
        ({"num_batches": 2.5}, ValueError, "num_batches=2.5 is not allowed"),
        ({"dataloader": {}}, ValueError, "is empty; give one dataloader per domain, or leave it out"),
        ({"dataloader": 3}, TypeError, "dataloader=3 cannot be iterated; give a DataLoader or a list of batches"),
        ({"dataloader": {"chat": None}}, TypeError, r"dataloader\['chat'\]=None cannot be iterated"),
    ],
)
def test_arguments_are_checked_at_construction(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Calibration(**arguments)


class Stream(IterableDataset[Any]):
    """Hands out what an iterator gives."""

    def __init__(self) -> None:
        self.stream = iter(data(16))

    def __iter__(self) -> Iterator[Any]:
        yield from self.stream


class Itself(IterableDataset[Any]):
    """An iterator and a data set in one."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        raise StopIteration


@pytest.mark.parametrize(
    "once", [lambda: iter(list(loader())), lambda: DataLoader(Stream(), 8), lambda: DataLoader(Itself(), 8)]
)
def test_data_that_can_be_read_once_needs_another_loader(once: Callable[[], Any]) -> None:
    message = r"can be read only once, and looking at it now would use it up; pass Calibration\(dataloader=...\)"
    with pytest.raises(ValueError, match=message):
        fit(Net(), QATCallback(STORED_INPUTS), Calibration(), train=once())
    made = fit(Net(), QATCallback(STORED_INPUTS), Calibration(dataloader=loader()), train=iter(list(loader())))
    assert made.global_step == 4


def test_a_stream_that_starts_anew_is_fine() -> None:
    class Fresh(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from data(16)

    assert fit(Net(), QATCallback(STORED_INPUTS), Calibration(), train=DataLoader(Fresh(), 8)).global_step == 2


def test_no_batches_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"data reached first\.input_quantizer, head\.input_quantizer"):
        fit(Net(), QATCallback(STORED_INPUTS), Calibration(dataloader=[]))


def test_a_layer_without_data_is_named() -> None:
    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"data reached spare\.input_quantizer in"):
        fit(Unused(), QATCallback(STORED_INPUTS), Calibration())


def test_a_module_that_cannot_be_run_is_told_apart() -> None:
    class Odd(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("mine")

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch["missing"]

    with pytest.raises(
        ValueError, match=r"(?s)cannot tell how to run Odd on .* list;.*predict_step: TypeError.*KeyError"
    ):
        fit(Odd(), QATCallback(STORED_INPUTS), Calibration())


# --- how a module is run ---------------------------------------------------------------------------------------------


class Runs(nn.Module):
    """Says how it was called."""

    def forward(self, a: Any, b: Any, c: Any = 0) -> Any:
        return (a, b, c)


class Keywords(nn.Module):
    def forward(self, **entries: Any) -> Any:
        return entries


class Whole(nn.Module):
    def forward(self, batch: Any) -> Any:
        return batch


class Variadic(nn.Module):
    def forward(self, *args: Any) -> Any:
        return args


@pytest.mark.parametrize(
    ("module", "batch", "expected"),
    [
        (Runs(), (1, 2, 3), (1, 2, 0)),
        (Runs(), {"b": 1, "y": 9, "a": 2}, (2, 1, 0)),
        (Runs(), {"a": 1, "b": 2, "c": 3}, (1, 2, 3)),
        (Keywords(), {"x": 1, "y": 2}, {"x": 1, "y": 2}),
        (Whole(), {"x": 1}, {"x": 1}),
        (Whole(), [1, 2], 1),
        (Whole(), 7, 7),
        (Variadic(), (1, 2), (1,)),
    ],
)
def test_call_module(module: nn.Module, batch: Any, expected: Any) -> None:
    assert call_module(module, batch) == expected


def test_predict_step_is_preferred_where_it_takes_training_batches() -> None:
    class Predicts(Net):
        def predict_step(self, batch: Any) -> Tensor:  # type: ignore[override]
            out: Tensor = self(batch[0] + 1)
            return out

    class PredictsInputs(Net):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            out: Tensor = self(batch)  # prediction has no labels
            return out

    class Borrowed(pl.LightningModule):
        forward = Whole.forward

    batch = next(iter(loader()))
    assert find_forward(Predicts(), batch) is call_predict_step
    assert find_forward(PredictsInputs(), batch) is call_module
    assert find_forward(Borrowed(), batch) is call_module
    assert_equal_states(calibrated(Predicts()), by_hand([x + 1 for x in inputs()]))
    assert_equal_states(calibrated(PredictsInputs()), by_hand(inputs()))


# --- no trace --------------------------------------------------------------------------------------------------------


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Busy(Net):
    """Everything that calibration could disturb: dropout, BatchNorm, metrics, logging in forward, augmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.metrics = MetricCollection({"mean": MeanMetric(), "accuracy": MulticlassAccuracy(CLASSES)})
        self.order: list[Tensor] = []
        self.noise: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log("in_forward", x.mean())
        self.log_dict({"also_in_forward": x.std()})
        hidden = F.dropout(self.norm(self.first(x)), 0.3, self.training)
        out: Tensor = self.head(hidden.relu())
        self.metrics["mean"].update(out.detach())  # type: ignore[index]
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.order.append(batch[0].clone())
        self.noise.append(random.random() + float(np.random.rand()) + float(torch.rand(())))
        out = self(batch[0])
        self.metrics["accuracy"](out.detach(), batch[1])  # type: ignore[index]
        loss = F.cross_entropy(out, batch[1])
        self.log("train_loss", loss)
        return loss

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 0.1 * torch.randn_like(batch[0]) + random.random() + float(np.random.rand()), batch[1]]


class Recorder(Logger):
    """Keeps all that is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Any] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.lines.append("hyperparameters")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step, metrics))


class Augmented(Dataset[Any]):
    """Draws from random generators of its own, of three kinds, and counts."""

    def __init__(self) -> None:
        self.torch = torch.Generator().manual_seed(1)
        self.numpy, self.legacy = np.random.default_rng(1), np.random.RandomState(1)
        self.python = random.Random(1)
        self.reads = 0

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        self.late = getattr(self, "late", 0) + 2
        noise = self.numpy.random() + self.legacy.rand() + self.python.random() + self.reads + self.late
        x, y = data()[index]
        return x + 0.1 * torch.randn(WIDTH, generator=self.torch) + 0.01 * noise, y


class OwnOrder(Sampler[int]):
    """Shuffles with a generator of its own, and differently each time."""

    def __init__(self) -> None:
        self.random = random.Random(4)
        self.passes = 0

    def __len__(self) -> int:
        return 32

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        yield from (int(i) for i in self.random.sample(range(32), 32))


LOADERS: dict[str, Callable[[], Any]] = {
    "in order": loader,
    "shuffled globally": lambda: loader(shuffle=True),
    "shuffled by a generator": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(3)),
    "random sampler": lambda: loader(sampler=RandomSampler(data(), generator=torch.Generator().manual_seed(5))),
    "weighted sampler": lambda: loader(
        sampler=WeightedRandomSampler([1.0] * 32, 32, generator=torch.Generator().manual_seed(6))
    ),
    "sampler of its own": lambda: loader(sampler=OwnOrder()),
    "augmented": lambda: DataLoader(Augmented(), 8, shuffle=True),
    "combined": lambda: CombinedLoader(loader(shuffle=True), "max_size_cycle"),
    "workers": lambda: loader(shuffle=True, num_workers=1, persistent_workers=True),
}


def busy_run(make_loader: Callable[[], Any], recipe: Recipe, scales: dict[str, Tensor] | None) -> tuple[Any, ...]:
    """A run with Calibration, or one without in which the scales are known; and all that could tell them apart."""
    seed_all(0)
    model, logger, found = Busy(), Recorder(), {}
    if scales is not None:
        prepare(model, recipe)
        load_calibration_state(model, scales)

    class Starts(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            found.update({name: value.clone() for name, value in calibration_state(pl_module).items()})
            assert all(module.training for module in pl_module.modules())
            assert all(parameter.grad is None for parameter in pl_module.parameters())
            assert "log" not in vars(pl_module)

    torch.manual_seed(1)
    callbacks = (
        [QATCallback(recipe), Starts()] if scales is not None else [QATCallback(recipe), Calibration(), Starts()]
    )
    fit(model, *callbacks, train=make_loader(), max_epochs=2, logger=logger, log_every_n_steps=1)
    rest = (model.order, model.noise, logger.lines, model.metrics.compute(), torch.rand(3), random.random())
    return found, state(model), rest


@pytest.mark.parametrize("name", LOADERS)
def test_a_calibrated_run_is_the_run_whose_scales_are_known(name: str) -> None:
    scales, trained, rest = busy_run(LOADERS[name], LEARNED_INPUTS, None)
    assert all(float(scale) != 1 for scale in scales.values())
    _, expected, expected_rest = busy_run(LOADERS[name], LEARNED_INPUTS, scales)
    assert_equal_states(trained, expected)
    assert all(torch.equal(a, b) for a, b in zip(rest[0], expected_rest[0], strict=True))
    assert rest[1] == expected_rest[1]
    assert rest[2] == expected_rest[2]
    assert rest[3] == expected_rest[3]
    assert torch.equal(rest[4], expected_rest[4])
    assert rest[5] == expected_rest[5]


def test_calibration_with_nothing_to_do_changes_nothing() -> None:
    runs = []
    for callbacks in ((), (Calibration(),)):
        seed_all(1)
        model = Busy()
        fit(model, QATCallback(recipes.w8a8()), *callbacks, train=loader(shuffle=True))
        runs.append((state(model), model.order))
    assert_equal_states(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_an_error_while_calibrating_leaves_no_trace() -> None:
    def fails(module: Any, batch: Any) -> Any:
        raise RuntimeError("mine")

    model, batches = Net(), loader(shuffle=True, generator=torch.Generator().manual_seed(3))
    before = batches.generator.get_state()
    model.eval()
    with pytest.raises(RuntimeError, match="mine"):
        fit(model, QATCallback(STORED_INPUTS), Calibration(forward=fails), train=batches)
    assert "log" not in vars(model)
    assert not model.training
    assert torch.equal(before, batches.generator.get_state())
    assert all(quantizer.observer is None for quantizer in fake_quantizers(model).values())


def test_a_method_of_the_user_on_the_instance_comes_back() -> None:
    model = Net()
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    own = model.log
    fit(model, QATCallback(STORED_INPUTS), Calibration())
    assert model.log is own


# --- resuming --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_does_not_calibrate(tmp_path: Path) -> None:
    model = Net()
    made = fit(model, QATCallback(STORED_INPUTS), Calibration())
    made.save_checkpoint(tmp_path / "run.ckpt")

    def never(module: Any, batch: Any) -> Any:
        raise AssertionError("calibrated again")

    fresh = Net()
    fit(fresh, QATCallback(STORED_INPUTS), Calibration(forward=never), ckpt=tmp_path / "run.ckpt", max_epochs=2)
    assert_equal_states(calibration_state(fresh), calibration_state(model))


def test_a_strategy_that_restores_late_is_not_calibrated_before(tmp_path: Path) -> None:
    """FSDP and DeepSpeed restore weights after on_fit_start: calibrating unrestored weights would be wrong."""
    callback, model = Calibration(), Net()
    prepare(model, STORED_INPUTS)
    made = trainer(QATCallback(), callback)
    made.strategy.__class__ = type("Late", (type(made.strategy),), {"restore_checkpoint_after_setup": True})
    made._checkpoint_connector._ckpt_path = "run.ckpt"
    callback.on_fit_start(made, model)
    assert all(
        quantizer.needs_calibration for quantizer in fake_quantizers(model).values() if quantizer.layout.is_input
    )
    found = by_hand(inputs())
    load_calibration_state(model, found)
    callback.on_train_start(made, model)
    assert_equal_states(calibration_state(model), found)
