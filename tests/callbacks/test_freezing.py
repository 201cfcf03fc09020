"""OscillationFreezing against the method written out weight by weight; frozen codes stay, whatever the optimizer."""

import copy
import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn, optim

import lightning_qat
from lightning_qat import (
    AbsMax,
    Binary,
    Distillation,
    Int,
    LayerSpec,
    LoRA,
    ParameterGroup,
    Penalty,
    PerGroup,
    PerTensor,
    ProgressiveBitWidth,
    QATCallback,
    QuantizerSpec,
    Recipe,
    Regularization,
    Rule,
    TwoStageSchedule,
    codes,
    prepare,
    recipes,
)
from lightning_qat.callbacks import OscillationFreezing
from lightning_qat.callbacks.freezing import _Freezable
from lightning_qat.callbacks.measures import slots
from lightning_qat.losses import grid_distance
from lightning_qat.schedules import CosineRamp, LinearRamp
from tests.callbacks._models import Net, assert_equal_states, fit, loader, state
from tests.callbacks.test_optimizers import OPTIMIZERS
from tests.learned import learned

EAGER = {"threshold": 0.3, "momentum": 0.5}
"""Freezes at the second reversal in a row."""


def levels(layer: Any) -> Tensor:
    """The levels that a layer's weight falls on."""
    step = layer.weight_quantizer.scale.detach().abs()
    return (layer._parameters["weight"].detach() / step).round().clamp(-8, 7)


# --- the method ------------------------------------------------------------------------------------------------------


class Reference:
    """One weight, in plain numbers."""

    def __init__(self, code: float) -> None:
        self.code, self.average = code, code
        self.direction = self.frequency = 0.0
        self.frozen = False

    def see(self, code: float, momentum: float, threshold: float) -> float:
        code = self.code if self.frozen else code
        change = (code > self.code) - (code < self.code)
        reversed_ = change * self.direction == -1
        self.frequency = momentum * reversed_ + (1 - momentum) * self.frequency
        self.direction = change or self.direction
        if self.frequency > threshold and not self.frozen:
            self.frozen, code = True, float(round(self.average))
        self.code = code
        self.average = momentum * code + (1 - momentum) * self.average
        return code


@pytest.mark.parametrize("spec", [QuantizerSpec(Int(4)), QuantizerSpec(Int(4), PerGroup(2))], ids=["channel", "group"])
def test_against_the_method_written_out(spec: QuantizerSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False))
    prepare(model, Recipe((Rule("*", LayerSpec(spec)),)))
    model(torch.ones(1, 6))
    (slot,) = slots(model)
    weight, quantizer = model[0]._parameters["weight"], model[0].weight_quantizer
    with torch.no_grad():
        quantizer.scale.fill_(0.25)
    freezable, references = _Freezable(slot, 0.2), None
    for _ in range(8):
        wanted = torch.randint(-3, 4, weight.shape, generator=generator).float()
        with torch.no_grad():  # an optimizer that throws everything about
            weight.copy_(wanted * 0.25 + 0.1 * (torch.rand(weight.shape, generator=generator) - 0.5))
        if references is None:
            references = [Reference(code) for code in wanted.flatten().tolist()]
            expected = wanted.flatten().tolist()
        else:
            pairs = zip(references, wanted.flatten().tolist(), strict=True)
            expected = [reference.see(code, 0.2, 0.45) for reference, code in pairs]
        assert not freezable.step(0.45)
        seen = (weight.detach() / 0.25).round().flatten().tolist()
        assert seen == expected
    assert references is not None
    frozen = [reference.frozen for reference in references]
    assert 3 < sum(frozen) < len(frozen) - 3
    assert int(freezable.num_frozen()) == sum(frozen)
    exact = weight.detach().flatten()[torch.tensor(frozen)]
    assert torch.equal(exact, exact.div(0.25).round() * 0.25)


def test_the_frozen_level_is_one_of_the_grid() -> None:
    """The average of -1 and 1 is 0, which binary weights do not have."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    prepare(model, Recipe((Rule("*", LayerSpec(QuantizerSpec(Binary(), PerTensor(), AbsMax()))),)))
    freezable, weight = _Freezable(slots(model)[0], 0.5), model[0]._parameters["weight"]
    for step in range(8):
        with torch.no_grad():
            weight.fill_(1.0 if step % 2 else -1.0)
        freezable.step(0.3)
    assert int(freezable.num_frozen()) == 16
    assert set(model[0].weight.detach().flatten().tolist()) <= {-1.0, 1.0}


# --- in training -----------------------------------------------------------------------------------------------------


class Shaking(pl.Callback):
    """Notes the levels of a layer after every batch; and, by large gradients, makes weights oscillate."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.frozen: list[Tensor] = []

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        weight = pl_module.first._parameters["weight"]
        sign = 1.0 if trainer.global_step % 2 else -1.0
        weight.grad[:4] = sign * weight.grad.abs().max().clamp(min=1.0)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        (freezing,) = [each for each in trainer.callbacks if isinstance(each, OscillationFreezing)]
        self.seen.append(levels(pl_module.first))
        weight = freezing._weights["first/weight"]
        self.frozen.append(weight.frozen.clone() if weight.state_ is not None else torch.zeros(8, 6, dtype=torch.bool))


STEPPING = [name for name in OPTIMIZERS if name != "Adadelta"]  # its steps are too small to cross a level here


@pytest.mark.parametrize("name", STEPPING)
def test_frozen_codes_stay_with_every_optimizer(name: str) -> None:
    def build(module: Any) -> Any:
        optimizer = OPTIMIZERS[name](module)
        for group in optimizer.param_groups:
            lr = {"ASGD": 0.5, "Adafactor": 0.5, "Adagrad": 0.3}.get(name, 0.3)
            group["lr"] = torch.tensor(lr) if isinstance(group["lr"], Tensor) else lr
        return optimizer

    shaking = Shaking()
    model = Net(optimizer=build)
    fit(model, QATCallback(recipes.int4()), OscillationFreezing(**EAGER), shaking, max_epochs=3)
    assert shaking.frozen[-1].any()
    for index in range(1, len(shaking.seen)):
        assert (shaking.frozen[index] >= shaking.frozen[index - 1]).all()
        stays = shaking.frozen[index - 1]
        assert torch.equal(shaking.seen[index][stays], shaking.seen[index - 1][stays])
    exported = codes(model)["first.weight"].codes.float()
    assert torch.equal(exported[shaking.frozen[-1]], shaking.seen[-1][shaking.frozen[-1]])


def fast_sgd(module: Any) -> Any:
    return optim.SGD(module.parameters(), lr=0.3)


@pytest.mark.parametrize("how", ["manual", "accumulate", "bf16-mixed", "match"])
def test_every_kind_of_training(how: str) -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__(optimizer=fast_sgd)
            self.automatic_optimization = how != "manual"

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if self.automatic_optimization:
                return loss
            self.optimizers().zero_grad()  # type: ignore[union-attr]
            self.manual_backward(loss)
            self.optimizers().step()  # type: ignore[union-attr]
            return None

    shaking = Shaking()
    options: dict[str, Any] = {"accumulate": {"accumulate_grad_batches": 2}, "bf16-mixed": {"precision": "bf16-mixed"}}
    freezing = OscillationFreezing(**EAGER, match="first" if how == "match" else "*")
    fit(Manual(), QATCallback(recipes.int4()), freezing, shaking, max_epochs=4, **options.get(how, {}))
    assert shaking.frozen[-1].any()
    assert set(freezing.state_dict()) == ({"first/weight"} if how == "match" else {"first/weight", "head/weight"})


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Any) -> None:
    def run(ckpt: Any = None) -> tuple[Any, Any]:
        freezing = OscillationFreezing(LinearRamp(0.2, start=0.4), momentum=0.5)
        model = Net(optimizer=fast_sgd, seed=0 if ckpt is None else 1)
        saved = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        fit(model, QATCallback(), freezing, Shaking(), saved, max_epochs=4, ckpt=ckpt)
        return state(model), freezing.state_dict()

    (whole, seen), (resumed, again) = run(), run(tmp_path / "epoch=1.ckpt")
    assert_equal_states(whole, resumed)
    assert seen["first/weight"]["frozen"].any()
    for name in seen:
        assert seen[name].pop("grid") == again[name].pop("grid")
        assert_equal_states(seen[name], again[name])


def test_a_new_grid_starts_anew() -> None:
    shaking, freezing = Shaking(), OscillationFreezing(**EAGER)
    progressive = ProgressiveBitWidth({0: 4, 12: 2}, unit="step")
    model = Net(optimizer=fast_sgd)
    fit(model, QATCallback(learned("int2")), progressive, freezing, shaking, max_epochs=4)
    assert shaking.frozen[11].any()
    assert not shaking.frozen[12].any()
    assert freezing.state_dict()["first/weight"]["grid"] == repr(Int(2))


def test_a_new_fit_starts_anew() -> None:
    freezing = OscillationFreezing(**EAGER)
    fit(Net(optimizer=fast_sgd), QATCallback(), freezing, Shaking(), max_epochs=3)
    assert freezing.state_dict()["first/weight"]["frozen"].any()
    fit(Net(optimizer=fast_sgd), QATCallback(), freezing, limit_train_batches=1)
    assert not freezing.state_dict()["first/weight"]["frozen"].any()


def test_no_trace_stays_on_the_optimizer() -> None:
    made = fit(Net(), QATCallback(), OscillationFreezing(0.5))
    assert not made.optimizers[0]._optimizer_step_post_hooks


def test_logs(tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path)
    freezing = OscillationFreezing(LinearRamp(0.1, start=0.3), momentum=0.5)
    fit(
        Net(optimizer=fast_sgd), QATCallback(), freezing, Shaking(), logger=logger, log_every_n_steps=3, max_epochs=3
    )  # fmt: skip
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["freezing/frozen"]]
    assert [row["step"] for row in logged] == ["2", "5", "8", "11"]
    assert 0 < float(logged[-1]["freezing/frozen"]) < 1
    thresholds = [float(row["freezing/threshold"]) for row in logged]
    assert thresholds == pytest.approx([0.3 - 0.2 * n / 12 for n in (3, 6, 9, 12)])


# --- values and errors -----------------------------------------------------------------------------------------------


def test_repr_evaluates_back() -> None:
    names = vars(lightning_qat.callbacks) | vars(lightning_qat.schedules)
    for freezing in (OscillationFreezing(), OscillationFreezing(0.02, momentum=0.1, match="head")):
        assert repr(eval(repr(freezing), dict(names))) == repr(freezing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.0}, r"threshold=0\.0 is not allowed; choose a positive number or ramp"),
        ({"threshold": "0.1"}, r"threshold='0\.1' is not allowed"),
        ({"threshold": CosineRamp(0.0, start=0.1)}, "a positive number or ramp"),
        ({"momentum": 0.0}, r"momentum=0\.0 is not allowed; choose a number with 0 < momentum <= 1"),
    ],
)
def test_errors_of_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OscillationFreezing(**arguments)


def test_errors_at_fit_start() -> None:
    with pytest.raises(ValueError, match=r"matches no quantized weight; add QATCallback\(recipe\)"):
        fit(Net(), OscillationFreezing())
    with pytest.raises(ValueError, match=r"match='body' matches no quantized weight; there are \['first', 'head'\]"):
        fit(Net(), QATCallback(), OscillationFreezing(match="body"))
    with pytest.raises(ValueError, match="has low-rank adapters, so that it cannot be set to a level"):
        fit(Net(), QATCallback(), LoRA(2), OscillationFreezing(0.1))
    with pytest.raises(ValueError, match="is transformed before it is quantized"):
        fit(Net(), QATCallback(recipes.bitnet1()), OscillationFreezing(0.1))
    with pytest.raises(ValueError, match="the run has no end"):
        fit(Net(), QATCallback(), OscillationFreezing(), train=loader(), max_epochs=-1)

    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            nn.utils.parametrizations.weight_norm(self.first)

    with pytest.raises(ValueError, match="the weight of first is computed from other parameters"):
        fit(Normed(), QATCallback(), OscillationFreezing(0.1))


# --- with the other callbacks ----------------------------------------------------------------------------------------


def all_together() -> list[Any]:
    """Everything that acts on the loss, the optimizer or the weights."""
    return [
        QATCallback(learned("int2"), groups=(ParameterGroup("first", kind="weights", lr_multiplier=0.5),)),
        ProgressiveBitWidth({0: 4, 6: 2}, unit="step"),
        Distillation(weight=0.5),
        Regularization([Penalty(grid_distance, weight=CosineRamp(0.1))]),
        OscillationFreezing(**EAGER),
        TwoStageSchedule(),
    ]


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_all_together_resume_and_copy(tmp_path: Any) -> None:
    def run(callbacks: list[Any], ckpt: Any = None) -> Any:
        model = Net(optimizer=fast_sgd, seed=0 if ckpt is None else 1)
        saved = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        average = pl.callbacks.EMAWeightAveraging(decay=0.5)
        fit(model, *callbacks, Shaking(), average, saved, max_epochs=3, num_sanity_val_steps=0, ckpt=ckpt)
        return state(model)

    callbacks = all_together()
    copies = copy.deepcopy(callbacks)
    whole = run(callbacks)
    assert_equal_states(run(copies, tmp_path / "epoch=0.ckpt"), whole)
    assert_equal_states(run(copy.deepcopy(callbacks)), whole)  # copies of used ones begin anew
