"""QuantizationStatistics: the numbers against their formulas, when they are measured, where they go, and warnings."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_qat import (
    AbsMax,
    Int,
    LayerSpec,
    PerGroup,
    PerTensor,
    QATCallback,
    QuantizerSpec,
    Recipe,
    Rule,
    codes,
    prepare,
    recipes,
)
from lightning_qat.callbacks import Bounds, ProgressiveBitWidth, QuantizationStatistics
from lightning_qat.callbacks.advice import advice
from lightning_qat.callbacks.history import History
from lightning_qat.callbacks.measures import WatchedWeights, measure, slots
from lightning_qat.callbacks.tensorboard import layout
from lightning_qat.quantization.quantizer import FakeQuantizer
from tests.callbacks._models import Net, assert_equal_states, fit, loader, state

WEIGHT = ("sqnr", "relative_error", "mse", "clip_rate", "entropy", "zero_rate", "scale_min", "scale_median",
          "scale_max", "gradient_norm", "effective_bits", "size")  # fmt: skip


class Rows:
    """A logger that keeps what it gets."""

    def __new__(cls) -> Any:
        logger = CSVLogger("logs")
        logger.rows = []  # type: ignore[attr-defined]
        logger.log_metrics = lambda metrics, step: logger.rows.append((step, dict(metrics)))  # type: ignore[method-assign, attr-defined]
        return logger


def measured(logger: Any) -> list[tuple[int, dict[str, float]]]:
    return [(step, row) for step, row in logger.rows if any(key.startswith("quantization/total") for key in row)]


def sgd(rate: float) -> Any:
    return lambda module: torch.optim.SGD(module.parameters(), lr=rate)


def test_the_numbers_are_those_of_the_formulas() -> None:
    """A learning rate of 0: what is measured after the step is the model as it was made."""
    logger, model, batch = Rows(), Net(optimizer=sgd(0.0)), next(iter(loader()))
    fit(model, QATCallback(recipes.named("w4a8")), QuantizationStatistics(1), logger=logger, limit_train_batches=1)
    (step, row), layer = measured(logger)[0], model.first
    weight = layer._parameters["weight"].detach().double()  # type: ignore[union-attr]
    scale = layer.weight_quantizer.scale.detach().double()  # type: ignore[union-attr, operator]
    codes = (weight / scale).round().clamp(-8, 7)
    noise = (codes * scale - weight).square().sum()
    shares = torch.bincount((codes + 8).long().flatten()) / weight.numel()
    shares = shares[shares > 0]
    expected = {
        "sqnr": 10 * math.log10(weight.square().sum() / noise),
        "relative_error": float((noise / weight.square().sum()).sqrt()),
        "mse": float(noise) / weight.numel(),
        "clip_rate": float(((weight / scale < -8) | (weight / scale > 7)).double().mean()),
        "entropy": float(-(shares * shares.log2()).sum()),
        "zero_rate": float((codes == 0).double().mean()),
        "scale_min": float(scale.min()),
        "scale_max": float(scale.max()),
        "effective_bits": 4 + 32 * 8 / 48,
        "size": 48 / 2 + 4 * 8,
    }
    for name, value in expected.items():
        assert row[f"quantization/first/weight/{name}"] == pytest.approx(value, rel=1e-5), name
    x = batch[0].double()
    token = x.abs().amax(-1, keepdim=True) / 127
    rounded = (x / token).round().clamp(-127, 127) * token
    assert row["quantization/first/input/mse"] == pytest.approx(float((rounded - x).square().mean()), rel=1e-4)
    model.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    gradient = model.first._parameters["weight"].grad.double()  # type: ignore[union-attr]
    assert row["quantization/first/weight/gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert step == 0


def test_totals() -> None:
    logger = Rows()
    fit(Net(), QATCallback(recipes.int4()), QuantizationStatistics(1), logger=logger, limit_train_batches=1)
    row = measured(logger)[0][1]
    sizes = {"first": 48, "head": 24}

    def mean(name: str) -> float:
        return sum(n * row[f"quantization/{layer}/weight/{name}"] for layer, n in sizes.items()) / 72

    assert row["quantization/total/weight/mse"] == pytest.approx(mean("mse"))
    assert row["quantization/total/weight/clip_rate"] == pytest.approx(mean("clip_rate"))
    signal = {
        n: row[f"quantization/{n}/weight/mse"] / row[f"quantization/{n}/weight/relative_error"] ** 2 for n in sizes
    }
    ratio = mean("mse") / (sum(n * signal[layer] for layer, n in sizes.items()) / 72)
    assert row["quantization/total/weight/sqnr"] == pytest.approx(-10 * math.log10(ratio), rel=1e-5)
    num_bytes = sum(row[f"quantization/{layer}/weight/size"] for layer in sizes) + 4 * (8 + 3)
    assert row["quantization/total/size"] == num_bytes
    assert row["quantization/total/bits"] == 4.0
    assert row["quantization/total/effective_bits"] == pytest.approx(8 * num_bytes / 83)


def test_names_are_stable_and_go_to_every_logger_and_to_monitors() -> None:
    first, second = Rows(), Rows()
    model = Net(optimizer=sgd(1e-3))
    trainer = fit(model, QATCallback(recipes.named("w4a8")), QuantizationStatistics(2), logger=[first, second])
    rows = measured(first)
    assert rows == measured(second)
    assert [step for step, _ in rows] == [0, 2]
    assert {f"quantization/{layer}/weight/{name}" for layer in ("first", "head") for name in WEIGHT} <= rows[0][
        1
    ].keys()
    assert not [key for key in rows[0][1] if "signal" in key or "collapsed" in key]
    assert float(trainer.callback_metrics["quantization/total/weight/sqnr"]) > 10


@pytest.mark.parametrize("accumulate", [1, 2])
def test_counts_as_lightning_does_under_accumulation(accumulate: int) -> None:
    logger = Rows()
    fit(Net(), QATCallback(recipes.int4()), QuantizationStatistics(2), logger=logger, train=loader(64),
        accumulate_grad_batches=accumulate)  # fmt: skip
    assert [step for step, _ in measured(logger)] == list(range(0, 8 // accumulate, 2))


def test_inputs_are_those_of_all_micro_batches() -> None:
    logger, recipe = Rows(), recipes.named("w4a8")
    fit(
        Net(optimizer=sgd(0.0)),
        QATCallback(recipe),
        QuantizationStatistics(9),
        logger=logger,
        accumulate_grad_batches=4,
    )
    x = torch.cat([batch[0] for batch in loader()]).double()
    token = x.abs().amax(-1, keepdim=True) / 127
    expected = ((x / token).round() * token - x).square().mean()
    assert measured(logger)[0][1]["quantization/first/input/mse"] == pytest.approx(float(expected), rel=1e-4)


def test_nothing_happens_on_steps_that_are_not_due(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return measure(*args, **kwargs)

    monkeypatch.setattr("lightning_qat.callbacks.statistics.measure", counted)
    statistics = QuantizationStatistics(1000)

    class Look(lightning.pytorch.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            hooks.append(len(pl_module.first._forward_pre_hooks))

    hooks: list[int] = []
    model = Net()
    monkeypatch.setattr(QuantizationStatistics, "_measure", lambda *args: None)
    fit(model, QATCallback(recipes.named("w4a8")), statistics, Look())
    assert len(calls) == 1 * 2  # the inputs of two layers at step 0
    assert hooks[1:] == [hooks[0] - 1] * 3
    assert not statistics._handles


def test_the_model_trains_as_without() -> None:
    watched, plain = Net(), Net()
    fit(watched, QATCallback(recipes.named("w4a8")), QuantizationStatistics(1, oscillation_samples=8), logger=Rows())
    fit(plain, QATCallback(recipes.named("w4a8")))
    assert_equal_states(state(watched), state(plain))


def tensorboard(folder: Path, *callbacks: Any, **options: Any) -> EventAccumulator:
    logger = TensorBoardLogger(folder, name="", version="run")
    model = Net(optimizer=sgd(1e-3))
    fit(model, QATCallback(recipes.named("w4a8")), *callbacks, logger=logger, log_every_n_steps=1, **options)
    events = EventAccumulator(str(folder / "run"), size_guidance={"histograms": 0, "scalars": 0, "tensors": 0})
    return events.Reload()


def test_what_tensorboard_gets(tmp_path: Path) -> None:
    events = tensorboard(
        tmp_path, QuantizationStatistics(1, oscillation_samples=8), ProgressiveBitWidth({0: 8, 2: 2}, unit="step")
    )
    tags = events.Tags()
    assert [event.step for event in events.Scalars("quantization/first/weight/sqnr")] == [0, 1, 2, 3]
    sqnr = [event.value for event in events.Scalars("quantization/first/weight/sqnr")]
    assert sqnr[1] > 30 > 15 > sqnr[2]  # 8 bits, then 2
    assert [event.value for event in events.Scalars("quantization/bits")] == [8.0, 2.0]
    assert "quantization/first/weight/oscillation_rate" in tags["scalars"]
    assert tags["histograms"] == [f"quantization_weights/{layer}/{kind}" for layer in ("first", "head")
                                  for kind in ("latent", "quantized")]  # fmt: skip
    latent = events.Histograms("quantization_weights/first/latent")[0].histogram_value
    assert sum(latent.bucket) == latent.num == 48
    assert tags["images"] == ["quantization/heat_map"]
    assert "custom_scalars__config__" in tags["tensors"]
    assert any("how" in tag for tag in tags["tensors"])


def test_every_chart_of_the_layout_finds_its_scalars(tmp_path: Path) -> None:
    scalars = tensorboard(tmp_path, QuantizationStatistics(1, oscillation_samples=8)).Tags()["scalars"]
    charts = {name: chart[1] for category in layout().values() for name, chart in category.items()}
    empty = [
        name for name, patterns in charts.items() if not any(re.match(p, tag) for p in patterns for tag in scalars)
    ]
    assert empty == ["Distillation: losses", "Distillation: agreement, 1 is best"]


def test_history_is_bounded_and_resumes(tmp_path: Path) -> None:
    history = History()
    drawn = [step for step in range(1000) if history.add(["a", "b"], step, [1.0, 2.0])]
    assert drawn == [15, 31, 63, 127, 255, 511]
    assert len(history.steps) <= 256
    assert history.table().shape == (2, len(history.steps))
    other = History()
    other.load_state_dict(copy.deepcopy(history.state_dict()))
    assert (other.steps, other.layers) == (history.steps, history.layers)


def test_resume_continues_histories_and_logs_the_same(tmp_path: Path) -> None:
    def run(**options: Any) -> tuple[Any, QuantizationStatistics]:
        logger, statistics = Rows(), QuantizationStatistics(1, oscillation_samples=16)
        checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        model = Net(optimizer=sgd(1e-3))
        fit(model, QATCallback(recipes.int4()), statistics, checkpoint, max_epochs=2, logger=logger, **options)
        return logger, statistics

    whole, statistics = run()
    resumed, continued = run(ckpt=tmp_path / "epoch=0.ckpt")
    after = measured(whole)[-1]
    assert measured(resumed)[-1] == after
    assert "quantization/first/weight/oscillation_rate" in after[1]
    assert continued.history.steps == statistics.history.steps == list(range(8))
    assert torch.equal(continued.history.table(), statistics.history.table())


@pytest.mark.parametrize("granularity", [PerTensor(), PerGroup(16)])
def test_large_tensors_are_sampled_at_equal_distances(granularity: Any) -> None:
    x = torch.randn(512, 256)
    quantizer = FakeQuantizer(QuantizerSpec(Int(4), granularity, AbsMax()), (512, 256))
    whole, part = measure(quantizer, x, max_values=x.numel()), measure(quantizer, x, max_values=4096)
    assert 4096 // 2 <= part.values.numel() <= 4096
    assert torch.equal(part.values, measure(quantizer, x, max_values=4096).values)
    torch.testing.assert_close(whole.quantized.reshape(x.shape), quantizer(x), rtol=0, atol=0)
    assert (part.values - part.quantized).std() == pytest.approx(float((whole.values - whole.quantized).std()), rel=0.1)


@pytest.mark.parametrize("recipe", [recipes.int4(), recipes.named("int4", group_size=2), recipes.ternary()])
def test_watched_codes_are_those_of_the_weight(recipe: Recipe) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    prepare(model, recipe)
    (slot,) = slots(model)
    all_of_them = WatchedWeights(slot, 32).codes()
    assert torch.equal(all_of_them, codes(model)["0.weight"].codes.float().flatten())
    some = WatchedWeights(slot, 5)
    assert some.count == 5
    assert set(some.codes().tolist()) <= set(all_of_them.tolist())


def test_oscillation_is_that_of_every_step() -> None:
    """A gradient that turns around at every step: all codes go back and forth."""

    class Swing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            sign = 1.0 if batch_idx % 2 else -1.0
            return sign * self.first.weight.sum() + 0.0 * self.head.weight.sum()  # type: ignore[return-value]

    logger = Rows()
    statistics = QuantizationStatistics(2, oscillation_samples=100)
    with pytest.warns(UserWarning, match="of the weights oscillate between codes"):
        fit(
            Swing(optimizer=sgd(0.01)),
            QATCallback(Recipe((Rule("*", LayerSpec(QuantizerSpec(Int(8)))),)), scale_lr_multiplier=1e-6),
            statistics,
            logger=logger,
            train=loader(64),
        )
    last = measured(logger)[-1][1]
    assert last["quantization/first/weight/flip_rate"] > 0.9  # but for those at the end of the range
    assert last["quantization/first/weight/oscillation_rate"] > 0.9
    assert last["quantization/head/weight/flip_rate"] == 0.0


def broken(how: str) -> Any:
    class Break(lightning.pytorch.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                quantizer = pl_module.first.weight_quantizer
                if how == "collapsed":
                    quantizer.scale.fill_(1e-6)
                if how == "dead":
                    quantizer.scale.fill_(1e6)
                if how == "clipped":
                    quantizer.scale.fill_(0.01)

    return Break()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("collapsed", r"first/weight: 100% of the scales have collapsed.*scale_lr_multiplier=0.1"),
        ("dead", r"first/weight: all codes are equal.*Rule\(\"first\", None\)"),
        ("clipped", r"first/weight: \d+% of the values lie outside the range of the grid \(bound: 60%\)"),
    ],
)
def test_warnings_once_per_layer(how: str, message: str) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        fit(Net(optimizer=sgd(0.0)), QATCallback(recipes.int4()), broken(how), QuantizationStatistics(1), max_epochs=2)
    assert len([w for w in caught if "QuantizationStatistics" in str(w.message)]) == 1


def test_a_second_fit_has_a_page_and_warnings_of_its_own() -> None:
    statistics = QuantizationStatistics(1, oscillation_samples=4)
    for seed in range(2):
        model = Net(seed=seed, optimizer=sgd(0.0))
        with pytest.warns(UserWarning, match="QuantizationStatistics") as caught:
            fit(model, QATCallback(recipes.int4()), broken("dead"), statistics, max_epochs=2)
        assert len([w for w in caught if "QuantizationStatistics" in str(w.message)]) == 1
        assert statistics.history.steps == list(range(8))


def test_oscillation_is_advised_on() -> None:
    values = {"entropy": 3.0, "clip_rate": 0.1, "oscillation_rate": 0.7}
    ((problem, sentence),) = advice("fc/weight", values, Bounds())
    assert problem == "oscillating"
    assert "70% of the weights oscillate" in sentence
    assert list(advice("fc/weight", values, Bounds(oscillation_rate=0.8))) == []


def test_errors_and_repr() -> None:
    with pytest.raises(ValueError, match="every_n_steps=0 is not allowed; choose a positive integer"):
        QuantizationStatistics(0)
    with pytest.raises(ValueError, match="oscillation_samples=-1 is not allowed; choose 0 or more"):
        QuantizationStatistics(oscillation_samples=-1)
    with pytest.raises(ValueError, match=r"clip_rate=0 is not allowed; choose a share in \(0, 1\]"):
        Bounds(clip_rate=0)
    with pytest.raises(ValueError, match="the model is not prepared; add QATCallback"):
        fit(Net(), QuantizationStatistics())
    made = QuantizationStatistics(7, max_values=9, oscillation_samples=3, bounds=Bounds(clip_rate=0.5))
    assert repr(eval(repr(made))) == repr(made)


def test_only_inputs_quantized() -> None:
    spec = LayerSpec(input=QuantizerSpec(Int(8), PerTensor(), AbsMax()))
    logger = Rows()
    fit(Net(), QATCallback(Recipe((Rule("first", spec),))), QuantizationStatistics(1), logger=logger)
    row = measured(logger)[0][1]
    assert "quantization/first/input/sqnr" in row
    assert "quantization/first/weight/sqnr" not in row
