"""TwoStageSchedule against loops that set rate and decay by hand, with any optimizer and scheduler."""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import optim

import lightning_qat
from lightning_qat import OscillationFreezing, ParameterGroup, QATCallback, prepare, recipes
from lightning_qat.callbacks import TwoStageSchedule
from lightning_qat.callbacks.step_hooks import hook_steps, remove
from lightning_qat.callbacks.two_stage import two_stage_factor
from lightning_qat.schedules import CosineRamp, LinearRamp
from tests.callbacks._models import Net, assert_equal_states, fit, loader, state
from tests.callbacks.test_optimizers import ONE_RATE_FOR_ALL, OPTIMIZERS, SCHEDULERS, Rates, scheduled


def by_hand(step: int, total: int, *, second: float = 2 / 3, switch: float = 0.5) -> tuple[float, bool]:
    """The factor of the rate, and whether weights decay: a line to zero, lower in the second stage."""
    late = step / total >= switch
    return (1 - step / total) * (second if late else 1.0), not late


def test_the_rates_of_the_published_training() -> None:
    """1.5e-3 to about 8e-4, then 5e-4 to 0."""
    rates = [1.5e-3 * two_stage_factor(step / 1000, second=2 / 3) for step in range(1001)]
    assert rates[0] == 1.5e-3
    assert rates[499] == pytest.approx(7.5e-4, rel=0.01)
    assert rates[500] == pytest.approx(5e-4)
    assert rates[1000] == 0.0
    for step in range(1001):
        assert rates[step] == pytest.approx(1.5e-3 * by_hand(step, 1000)[0], rel=1e-12, abs=1e-18)


def test_warmup_and_shape() -> None:
    found = [two_stage_factor(share, second=0.5, switch=0.6, shape=None, warmup=0.2) for share in (0.0, 0.1, 0.2, 0.6)]
    assert found == [0.0, 0.5, 1.0, 0.5]
    assert two_stage_factor(0.5, second=0.5, shape=CosineRamp(0.0, start=1.0)) == pytest.approx(0.25)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_as_by_hand(name: str) -> None:
    model, expected = Net(optimizer=OPTIMIZERS[name]), Net()
    fit(model, TwoStageSchedule())
    optimizer = OPTIMIZERS[name](expected)
    (group,) = optimizer.param_groups
    lr, decay = group["lr"], group.get("weight_decay")
    for step, (x, y) in enumerate(loader()):
        factor, decays = by_hand(step, 4)
        group["lr"] = lr * factor
        if decay is not None:
            group["weight_decay"] = decay if decays else 0.0
        optimizer.zero_grad()
        F.cross_entropy(expected(x), y).backward()
        optimizer.step()
    for key, value in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(key), value, rtol=1e-6, atol=1e-7)


class Recording(optim.AdamW):
    """Notes rate and decay of every group in every step, as the step sees them."""

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        self.seen = [*getattr(self, "seen", []), [(float(g["lr"]), g["weight_decay"]) for g in self.param_groups]]
        super().step()
        return loss


@pytest.mark.parametrize("name", SCHEDULERS | ONE_RATE_FOR_ALL)
def test_every_scheduler_keeps_its_own_course(name: str) -> None:
    schedule = (SCHEDULERS | ONE_RATE_FOR_ALL)[name]

    def build(module: Any) -> Any:
        optimizer = Recording(module.parameters(), lr=1e-2, weight_decay=0.1)
        made = schedule(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {**(made if isinstance(made, dict) else {"scheduler": made}),
                                                         "interval": "step"}}  # fmt: skip

    rates = Rates()
    made = fit(Net(optimizer=build), TwoStageSchedule(0.25, shape=None), rates, max_epochs=2)
    plain = Rates()
    fit(Net(optimizer=scheduled(schedule)), plain, max_epochs=2)
    assert rates.seen == plain.seen
    expected = [
        [(rate * (0.25 if step >= 4 else 1.0), 0.0 if step >= 4 else 0.1)] for step, (rate,) in enumerate(plain.seen)
    ]
    assert made.optimizers[0].seen == expected


def test_groups_keep_their_multipliers_and_stop_to_decay() -> None:
    groups = (
        ParameterGroup("head", kind="weights", lr_multiplier=0.5, weight_decay=0.3),
        ParameterGroup(kind="scales", lr_multiplier=0.1, weight_decay=0.2),
    )
    build = lambda module: Recording(module.parameters(), lr=1.0, weight_decay=0.1)  # noqa: E731
    made = fit(Net(optimizer=build), QATCallback(recipes.int4(), groups=groups), TwoStageSchedule())
    for step, seen in enumerate(made.optimizers[0].seen):
        factor, decays = by_hand(step, 4)
        wanted = [(factor, 0.1), (0.5 * factor, 0.3), (0.1 * factor, 0.2)]
        assert seen == [(pytest.approx(lr), decay if decays else 0.0) for lr, decay in wanted]
    assert [group["lr"] for group in made.optimizers[0].param_groups] == [1.0, 0.5, 0.1]


@pytest.mark.parametrize("how", ["accumulate", "manual", "several"])
def test_positions_count_optimizer_steps(how: str) -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = how == "accumulate"

        def configure_optimizers(self) -> Any:
            parts = [self.first, self.head] if how == "several" else [self]
            return [Recording(part.parameters(), lr=1.0, weight_decay=0.1) for part in parts]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if self.automatic_optimization:
                return loss
            found = self.optimizers()
            self.manual_backward(loss)
            for optimizer in found if isinstance(found, list) else [found]:
                optimizer.step()
            return None

    options = {"accumulate_grad_batches": 2} if how == "accumulate" else {}
    made = fit(Manual(), TwoStageSchedule(), train=loader(64), **options)
    total = {"accumulate": 4, "manual": 8, "several": 16}[how]
    order = [optimizer.seen for optimizer in made.optimizers]
    seen = [each for pair in zip(*order, strict=True) for each in pair]
    assert len(seen) == total
    assert [lr for ((lr, _),) in seen] == pytest.approx([by_hand(step, total)[0] for step in range(total)])


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Any) -> None:
    def run(ckpt: Any = None) -> Any:
        model = Net(seed=0 if ckpt is None else 1)
        saved = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        fit(model, QATCallback(recipes.bitnet()), TwoStageSchedule(), saved, max_epochs=3, ckpt=ckpt)
        return state(model)

    assert_equal_states(run(), run(tmp_path / "step=8.ckpt"))


def test_logs(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(Net(), TwoStageSchedule(), logger=logger, log_every_n_steps=2, max_epochs=2)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["two_stage/lr_factor"]]
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7]
    for row in rows:
        factor, decays = by_hand(int(row["step"]), 8)
        assert float(row["two_stage/lr_factor"]) == pytest.approx(factor, rel=1e-6)
        assert float(row["two_stage/weight_decay_factor"]) == decays


def test_hooks_count_a_step_once_and_go() -> None:
    """A step that calls that of its base class runs torch's hooks twice."""
    optim.AdamW([torch.zeros(1, requires_grad=True)]).step()  # from now on the base class has hooks
    optimizer = Recording([torch.zeros(1, requires_grad=True)])
    calls: list[str] = []
    handles = hook_steps(
        [optimizer], "Me", before=lambda *_: calls.append("before"), after=lambda *_: calls.append("after")
    )
    optimizer.step()
    optimizer.step()
    assert calls == ["before", "after"] * 2
    remove(handles)
    optimizer.step()
    assert (len(calls), handles) == (4, [])
    with pytest.raises(ValueError, match=r"Me: object is no torch\.optim\.Optimizer"):
        hook_steps([object()], "Me")
    for callback in (TwoStageSchedule(), OscillationFreezing(0.1)):
        model = Net()
        prepare(model, recipes.int4())
        made = fit(model, callback)
        assert not made.optimizers[0]._optimizer_step_pre_hooks
        assert not made.optimizers[0]._optimizer_step_post_hooks


def test_repr_evaluates_back() -> None:
    names = vars(lightning_qat.callbacks) | vars(lightning_qat.schedules)
    for schedule in (TwoStageSchedule(), TwoStageSchedule(0.5, switch=0.6, shape=None)):
        assert repr(eval(repr(schedule), dict(names))) == repr(schedule)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"second": 0.0}, r"second=0\.0 must be positive"),
        ({"switch": 1.0}, "0 < switch < 1"),
        ({"warmup": 0.5}, r"0 <= warmup < switch=0\.5"),
        ({"shape": LinearRamp(-1.0)}, "falls below 0"),
        ({"shape": None, "warmup": 0.1}, r"warmup=0\.1 has no effect with shape=None"),
    ],
)
def test_errors_of_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwoStageSchedule(**arguments)


def test_a_shape_by_name_is_refused() -> None:
    with pytest.raises(TypeError, match=r"shape='cosine' is not a ramp; give LinearRamp\(0\.0, start=1\.0\)"):
        TwoStageSchedule(shape="cosine")  # type: ignore[arg-type]


def test_errors_at_fit_start() -> None:
    module = Net(optimizer=scheduled(SCHEDULERS["StepLR"]))
    with pytest.raises(ValueError, match=r"Net has a scheduler of its own, StepLR; .* TwoStageSchedule\(shape=None\)"):
        fit(module, TwoStageSchedule())
    with pytest.raises(ValueError, match="the run has no end"):
        fit(Net(), TwoStageSchedule(), max_epochs=-1)
