"""Parameter groups of scales: with every optimizer, every scheduler, and whatever way the user passes parameters."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

from lightning_qat import (
    AbsMax,
    Calibration,
    Int,
    LayerSpec,
    QATCallback,
    QuantizerSpec,
    Recipe,
    Rule,
    prepare,
    recipes,
)
from lightning_qat.callbacks.bit_width import forget_state
from lightning_qat.callbacks.group_splitter import GroupSplitter
from lightning_qat.callbacks.optimizer_checks import check_groups
from lightning_qat.callbacks.optimizers import separate_scales, unwatch
from lightning_qat.callbacks.parameter_group import quantizer_parameters
from tests.callbacks._models import HIDDEN, LEARNED_INPUTS, WIDTH, Net, adamw, fit, loader

Build = Callable[[nn.Module], Any]
DECAY = 0.3


def mlp() -> nn.Module:
    """Two quantized layers."""
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))
    prepare(model, recipes.int4())
    return model


def names_of(model: nn.Module, group: dict[str, Any]) -> set[str]:
    """The names of the parameters in a group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def scales(*layers: int) -> set[str]:
    return {f"{layer}.weight_quantizer.scale" for layer in layers}


FLOATS = {"0.weight", "0.bias", "2.weight", "2.bias"}
OPTIMIZERS: dict[str, Build] = {
    "SGD": lambda m: optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=DECAY),
    "SGD fused": lambda m: optim.SGD(m.parameters(), 0.1, weight_decay=DECAY, fused=True),
    "Adam": lambda m: optim.Adam(m.parameters(), weight_decay=DECAY, amsgrad=True),
    "Adam fused": lambda m: optim.Adam(m.parameters(), weight_decay=DECAY, fused=True),
    "AdamW": lambda m: optim.AdamW(m.parameters(), weight_decay=DECAY),
    "AdamW foreach": lambda m: optim.AdamW(m.parameters(), weight_decay=DECAY, foreach=True),
    "AdamW lr tensor": lambda m: optim.AdamW(m.parameters(), lr=torch.tensor(1e-3), weight_decay=DECAY),
    "Adadelta": lambda m: optim.Adadelta(m.parameters(), weight_decay=DECAY),
    "Adagrad": lambda m: optim.Adagrad(m.parameters(), weight_decay=DECAY),
    "Adamax": lambda m: optim.Adamax(m.parameters(), weight_decay=DECAY),
    "ASGD": lambda m: optim.ASGD(m.parameters(), weight_decay=DECAY),
    "NAdam": lambda m: optim.NAdam(m.parameters(), weight_decay=DECAY),
    "RAdam": lambda m: optim.RAdam(m.parameters(), weight_decay=DECAY),
    "RMSprop": lambda m: optim.RMSprop(m.parameters(), weight_decay=DECAY),
    "Rprop": lambda m: optim.Rprop(m.parameters()),
    "Adafactor": lambda m: optim.Adafactor(m.parameters(), weight_decay=DECAY),
}
WAYS: dict[str, Build] = {
    "list": lambda m: list(m.parameters()),
    "generator": lambda m: (p for p in m.parameters()),
    "names": lambda m: m.named_parameters(),
    "one group": lambda m: [{"params": m.parameters()}],
    "one group of names": lambda m: [{"params": list(m.named_parameters())}],
    "without scales": lambda m: [p for name, p in m.named_parameters() if "quantizer" not in name],
    "matrices and vectors": lambda m: [p for _, p in sorted(m.named_parameters(), key=lambda item: item[1].dim())],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scales_do_not_decay_in_any_optimizer(name: str) -> None:
    model = mlp()
    with separate_scales(model):
        optimizer = OPTIMIZERS[name](model)
    weights, own = optimizer.param_groups
    assert names_of(model, weights) == FLOATS
    assert names_of(model, own) == scales(0, 2)
    assert own.get("weight_decay", 0) == 0
    assert weights.get("weight_decay", DECAY) == DECAY
    before = {key: value.clone() for key, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(2):
        optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in model.named_parameters() if key in scales(0, 2))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_pass_parameters(way: str) -> None:
    model = mlp()
    with separate_scales(model, lr_multiplier=0.5):
        optimizer = optim.AdamW(WAYS[way](model), lr=0.2, weight_decay=DECAY)
    weights, own = optimizer.param_groups
    assert names_of(model, weights) == FLOATS
    assert names_of(model, own) == scales(0, 2)
    assert (weights["lr"], own["lr"], own["weight_decay"]) == (0.2, 0.1, 0.0)


def test_the_users_groups_keep_their_indices_and_settings() -> None:
    model = mlp()
    groups = [
        {"params": model[0].parameters(), "lr": 0.1, "name": "body"},
        {"params": model[2].weight_quantizer.scale, "lr": 7.0},
        {"params": [model[2]._parameters["weight"]], "weight_decay": 0.2},
        {"params": model[2].bias},
    ]
    with separate_scales(model, lr_multiplier=2.0):
        optimizer = optim.AdamW(groups, lr=0.01, weight_decay=DECAY)
    found = [(names_of(model, g), g["lr"], g["weight_decay"], g.get("name")) for g in optimizer.param_groups]
    assert found == [
        ({"0.weight", "0.bias"}, 0.1, DECAY, "body"),
        (scales(2), 7.0, 0.0, None),  # the user's own group of scales: only what it does not say is ours
        ({"2.weight"}, 0.01, 0.2, None),
        ({"2.bias"}, 0.01, DECAY, None),
        (scales(0), 0.2, 0.0, "body-scales"),
    ]


def test_a_decay_that_the_user_wants_for_scales_stays() -> None:
    model = mlp()
    own = [p for name, p in model.named_parameters() if "quantizer" in name]
    rest = [p for name, p in model.named_parameters() if "quantizer" not in name]
    with separate_scales(model):
        optimizer = optim.AdamW([{"params": rest}, {"params": own, "weight_decay": 0.01}], weight_decay=DECAY)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, 0.01]
    check_groups(model, [optimizer])


def test_groups_that_are_added_later_are_split_in_front() -> None:
    """Finetuning callbacks address the last group, which therefore holds the weights."""
    model = mlp()
    with separate_scales(model):
        optimizer = optim.AdamW(model[2].parameters(), lr=0.5, weight_decay=DECAY)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.1})
    found = [(names_of(model, g), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [
        ({"2.weight", "2.bias"}, 0.5, DECAY),
        (scales(2), 0.5, 0.0),
        (scales(0), 0.1, 0.0),
        ({"0.weight", "0.bias"}, 0.1, DECAY),
    ]
    names = [group.get("name") for group in optimizer.param_groups]
    assert len(set(filter(None, names))) == 2
    check_groups(model, [optimizer])
    unwatch([optimizer])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": model[0].parameters()})


def test_errors_of_the_user_stay_torchs() -> None:
    model = mlp()
    with separate_scales(model):
        with pytest.raises(ValueError, match="empty parameter list"):
            optim.SGD([], 0.1)
        with pytest.raises(TypeError, match="an iterable of Tensors"):
            optim.SGD(model[0].bias, 0.1)
        with pytest.raises(TypeError, match="ordered collections"):
            optim.SGD([{"params": set(model.parameters())}], 0.1)
        with pytest.raises(ValueError, match="Invalid learning rate"):
            optim.SGD(model.parameters(), -1.0)
        optimizer = optim.SGD(model[0].parameters(), 0.1)
        with pytest.raises(TypeError, match="dict"):
            optimizer.add_param_group([model[2].bias])  # type: ignore[arg-type]


def test_the_patch_ends_with_the_context() -> None:
    original = optim.Optimizer.__init__
    with pytest.raises(RuntimeError, match="mine"), separate_scales(mlp()):
        raise RuntimeError("mine")
    assert optim.Optimizer.__init__ is original


def test_errors_that_are_not_of_a_scheduler_are_left_alone() -> None:
    def build(module: Net) -> Any:
        adamw(module)
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        fit(Net(optimizer=build), QATCallback())


def test_a_float_model_keeps_its_groups() -> None:
    model = nn.Linear(2, 2)
    with separate_scales(model):
        optimizer = optim.AdamW(model.parameters())
    assert len(optimizer.param_groups) == 1


def test_tied_weights_have_their_scale_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    prepare(model, recipes.int4())
    with separate_scales(model):
        optimizer = optim.AdamW(list(dict.fromkeys(model.parameters())))
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 1]


def test_inputs_of_layers_with_float_weights_have_an_owner() -> None:
    spec = LayerSpec(input=LEARNED_INPUTS.rules[0].spec.input)  # type: ignore[union-attr]
    model = nn.Sequential(nn.Linear(4, 4))
    prepare(model, Recipe((Rule("*", spec),)))
    with separate_scales(model):
        optimizer = optim.AdamW([model[0].weight, model[0].bias])
    assert names_of(model, optimizer.param_groups[1]) == {"0.input_quantizer.scale"}


# --- schedulers ------------------------------------------------------------------------------------------------------

Schedule = Callable[[Any], Any]
STEPS = 6
SCHEDULERS: dict[str, Schedule] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "LambdaLR warmup": lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 3),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, 1.0, 3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "ReduceLROnPlateau": lambda o: {
        "scheduler": lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
        "monitor": "constant",
    },
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.5, 1.0, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}
ONE_RATE_FOR_ALL: dict[str, Schedule] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, step_size_up=2, cycle_momentum=False),
}
PER_GROUP: dict[str, Schedule] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda step: 1.0]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda step: 1.0]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.1], total_steps=9),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, [0.1], [0.2], cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, min_lr=[0.1]),
}


class Rates(pl.Callback):
    """Writes down the rate of every group in every step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append([float(group["lr"]) for group in trainer.optimizers[0].param_groups])


def scheduled(schedule: Schedule) -> Build:
    """An optimizer with a scheduler that steps with it, in Lightning's form."""

    def build(module: nn.Module) -> Any:
        optimizer = optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
        made = schedule(optimizer)
        config = made if isinstance(made, dict) else {"scheduler": made}
        return {"optimizer": optimizer, "lr_scheduler": {**config, "interval": "step"}}

    return build


def rates_of(schedule: Schedule, *callbacks: Any) -> list[list[float]]:
    rates = Rates()
    fit(Net(optimizer=scheduled(schedule)), *callbacks, rates, train=loader(8 * STEPS))
    return rates.seen


@pytest.mark.parametrize("name", [*SCHEDULERS, *ONE_RATE_FOR_ALL])
def test_schedulers_see_the_rates_of_a_float_run(name: str) -> None:
    schedule = (SCHEDULERS | ONE_RATE_FOR_ALL)[name]
    plain, quantized = rates_of(schedule), rates_of(schedule, QATCallback())
    assert len(plain) == STEPS
    assert [weights for weights, _ in quantized] == [rate for (rate,) in plain]
    assert all(weights == own for weights, own in quantized)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_keep_the_multiplier(name: str) -> None:
    seen = rates_of(SCHEDULERS[name], QATCallback(scale_lr_multiplier=0.125))
    assert all(own == pytest.approx(0.125 * weights, rel=1e-12) for weights, own in seen)
    assert any(weights > 0 for weights, _ in seen)


@pytest.mark.parametrize("name", ONE_RATE_FOR_ALL)
def test_a_multiplier_without_effect_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"scale_lr_multiplier=0.5 has no effect.* needs 2 for AdamW, the last 1"):
        rates_of(ONE_RATE_FOR_ALL[name], QATCallback(scale_lr_multiplier=0.5))


def test_a_rate_for_each_group_sets_the_rate_of_scales() -> None:
    schedule: Schedule = lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.01], total_steps=9)  # noqa: E731
    seen = rates_of(schedule, QATCallback(scale_lr_multiplier=0.5))
    assert all(own == pytest.approx(0.1 * weights, rel=1e-12) for weights, own in seen)


@pytest.mark.parametrize("name", PER_GROUP)
def test_a_list_per_group_gets_an_error_with_its_length(name: str) -> None:
    with pytest.raises(ValueError, match=r"come after yours; a list with one value per group needs 2 for AdamW"):
        rates_of(PER_GROUP[name], QATCallback())


def test_an_error_in_a_scheduler_of_two_optimizers_names_both() -> None:
    def build(module: Net) -> Any:
        first = optim.SGD(module.first.parameters(), 0.1)
        second = optim.Adam([{"params": module.head.weight}, {"params": module.head.bias}], 0.1)
        lr_scheduler.LambdaLR(second, [lambda step: 1.0, lambda step: 1.0])
        return [first, second]

    with pytest.raises(ValueError, match=r"2 for SGD, the last 1 of them for scales; 3 for Adam, the last 1 of them"):
        fit(Net(optimizer=build), QATCallback())


# --- through trainers ------------------------------------------------------------------------------------------------


def trained_ids(trainer: Any) -> set[int]:
    return {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}


def test_a_filter_by_name_does_not_lose_scales() -> None:
    def build(module: Net) -> Any:
        wanted = [p for name, p in module.named_parameters() if name.endswith((".weight", ".bias"))]
        return optim.AdamW(wanted, lr=1e-2)

    model = Net(optimizer=build)
    made = fit(model, QATCallback(LEARNED_INPUTS), Calibration())
    assert set(quantizer_parameters(model)) <= trained_ids(made)
    assert len(quantizer_parameters(model)) == 4


def test_no_trace_stays_on_the_optimizer() -> None:
    made = fit(Net(), QATCallback())
    assert "add_param_group" not in vars(made.optimizers[0])


def test_an_optimizer_built_too_early_is_an_error() -> None:
    class Early(Net):
        def __init__(self) -> None:
            super().__init__()
            self.early = adamw(self)

        def configure_optimizers(self) -> Any:
            return self.early

    message = r"scale would not be trained, though the weight is: the optimizer was built outside configure_optimizers"
    with pytest.raises(ValueError, match=message):
        fit(Early(), QATCallback())


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_model_prepared_before_its_optimizer_was_built_early(decay: float) -> None:
    model = Net()
    prepare(model, recipes.int4())
    early = optim.AdamW(model.parameters(), lr=1e-2, weight_decay=decay)
    model.optimizer = lambda module: early
    if decay:
        with pytest.raises(ValueError, match=r"scale would decay with the weights: .* with weight_decay=0"):
            fit(model, QATCallback())
    else:
        assert len(fit(model, QATCallback()).optimizers[0].param_groups) == 1


def test_two_optimizers_train_the_scales_of_their_weights() -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [optim.SGD(self.first.parameters(), 0.1), optim.Adam(self.head.parameters(), 0.1)]

    model = Two()
    prepare(model, recipes.int4())
    before = {key: value.clone() for key, value in model.named_parameters()}
    made = fit(model, QATCallback())
    found = [[names_of(model, group) for group in optimizer.param_groups] for optimizer in made.optimizers]
    assert found == [
        [{f"{layer}.weight", f"{layer}.bias"}, {f"{layer}.weight_quantizer.scale"}] for layer in ("first", "head")
    ]
    assert not any(torch.equal(before[key], value) for key, value in model.named_parameters())


def test_lbfgs_trains_all_in_its_one_group() -> None:
    model = Net(optimizer=lambda module: optim.LBFGS(module.parameters(), lr=0.1, max_iter=2))
    made = fit(model, QATCallback())
    assert set(quantizer_parameters(model)) <= trained_ids(made)


def test_lbfgs_without_scales_is_an_error() -> None:
    def build(module: Net) -> Any:
        return optim.LBFGS([p for name, p in module.named_parameters() if "quantizer" not in name])

    with pytest.raises(ValueError, match="LBFGS has one group for all; build it with all parameters"):
        fit(Net(optimizer=build), QATCallback())


@pytest.mark.parametrize("with_scales", [True, False])
def test_muon_does_not_get_scales(with_scales: bool) -> None:
    def build(module: Net) -> Any:
        matrices = [p for n, p in module.named_parameters() if n.endswith(".weight")]
        others = [p for n, p in module.named_parameters() if n.endswith(".bias") or (with_scales and "quantizer" in n)]
        return [optim.Muon(matrices, lr=1e-3), optim.AdamW(others, lr=1e-3)]

    class Both(Net):
        def __init__(self) -> None:
            super().__init__(optimizer=build)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.manual_backward(self(batch[0]).square().mean())
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()

    if with_scales:
        made = fit(Both(), QATCallback(), limit_train_batches=1)
        assert [len(optimizer.param_groups) for optimizer in made.optimizers] == [1, 2]
    else:
        with pytest.raises(ValueError, match=r"Muon orthogonalizes matrices, and scales are none; give them to your"):
            fit(Both(), QATCallback())


def test_muon_that_was_given_scales_is_an_error() -> None:
    model = mlp()
    with separate_scales(model):
        matrices = [p for p in model.parameters() if p.dim() == 2]
        optimizer = optim.Muon(matrices)
    with pytest.raises(
        ValueError, match=r"0.weight_quantizer.scale, 2.weight_quantizer.scale cannot be trained by Muon"
    ):
        check_groups(model, [optimizer])


def test_learning_rate_monitor_shows_the_groups(tmp_path: Any) -> None:
    from lightning.pytorch.callbacks import LearningRateMonitor
    from lightning.pytorch.loggers import CSVLogger

    logger, monitor = CSVLogger(tmp_path), LearningRateMonitor(logging_interval="step")
    fit(Net(optimizer=scheduled(SCHEDULERS["StepLR"])), QATCallback(), monitor, logger=logger, log_every_n_steps=1)
    assert set(monitor.lrs) == {"lr-AdamW/pg1", "lr-AdamW/pg1-scales"}


class Transfer(Net):
    """What BackboneFinetuning wants: a backbone, and an optimizer of the head alone."""

    def __init__(self, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.schedule = schedule
        self.backbone, self.first = self.first, nn.Identity()  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.backbone(x).relu())
        return out

    def configure_optimizers(self) -> Any:
        wanted = [p for p in self.parameters() if p.requires_grad]
        return optim.SGD(wanted, lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize("first", ["finetuning", "qat"])
def test_backbone_finetuning_in_either_order(first: str) -> None:
    from lightning.pytorch.callbacks import BackboneFinetuning

    finetuning = BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.5, backbone_initial_lr=0.01
    )
    callbacks = [finetuning, QATCallback(LEARNED_INPUTS, scale_lr_multiplier=0.5)]
    callbacks = callbacks if first == "finetuning" else callbacks[::-1]
    model, history = Transfer(), []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            groups = trainer.optimizers[0].param_groups
            history.append([(names_of(model, g), round(g["lr"], 6), g["weight_decay"]) for g in groups])

    fit(model, *callbacks, Calibration(), Watch(), max_epochs=3, limit_train_batches=1)
    head = [
        ({"head.weight", "head.bias"}, 0.1, 0.1),
        ({"head.weight_quantizer.scale", "head.input_quantizer.scale"}, 0.05, 0.0),
    ]
    own = {"backbone.weight_quantizer.scale", "backbone.input_quantizer.scale"}
    assert history[0] == head
    assert history[1] == [*head, (own, 0.005, 0.0), ({"backbone.weight", "backbone.bias"}, 0.01, 0.1)]
    assert history[2] == [*head, (own, 0.0075, 0.0), ({"backbone.weight", "backbone.bias"}, 0.015, 0.1)]


def test_backbone_finetuning_resumes_with_its_groups(tmp_path: Any) -> None:
    """Lightning itself does not resume it bit for bit: a backbone that was unfrozen is frozen again."""
    from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint

    def run(ckpt: Any = None) -> list[Any]:
        rates = Rates()
        saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        fit(Transfer(), QATCallback(), BackboneFinetuning(1), saved, rates, max_epochs=4, ckpt=ckpt)
        return rates.seen[-4:]

    assert run() == run(tmp_path / "epoch=1.ckpt")


def test_groups_are_checked_again_each_epoch() -> None:
    """Whoever gets around add_param_group is found out at the next epoch."""

    class Loses(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.optimizers[0].param_groups.pop()

    for callbacks in ((QATCallback(), Loses()), (Loses(), QATCallback())):
        model = Net()
        prepare(model, recipes.int4())
        with pytest.raises(ValueError, match=r"first.weight_quantizer.scale, head.weight_quantizer.scale would not be"):
            fit(model, *callbacks, max_epochs=2)


def test_forget_state_forgets_moments_of_some_parameters() -> None:
    model = mlp()
    optimizer = adamw(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    forget_state([optimizer], [model[0].weight_quantizer.scale])
    kept = optimizer.state[model[2].weight_quantizer.scale]
    assert float(kept["exp_avg"].abs().sum()) > 0
    forgotten = optimizer.state[model[0].weight_quantizer.scale]
    assert float(sum(value.abs().sum() for value in forgotten.values())) == 0


def test_recomputed_scales_need_no_groups() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prepare(model, Recipe((Rule("*", LayerSpec(QuantizerSpec(Int(4), scale=AbsMax()))),)))
    assert GroupSplitter(model).split([{"params": list(model.parameters())}], {}) == (
        [{"params": list(model.parameters())}],
        [],
    )


# --- complete --------------------------------------------------------------------------------------------------------


def test_torch_has_no_optimizer_and_no_scheduler_that_is_not_tested() -> None:
    def names(module: Any, base: type) -> set[str]:
        found = {name: kind for name, kind in vars(module).items() if isinstance(kind, type) and issubclass(kind, base)}
        return {name for name, kind in found.items() if kind is not base and not name.startswith("_")}

    by_themselves = {"LBFGS", "Muon", "SparseAdam"}
    assert names(optim, optim.Optimizer) == {name.split()[0] for name in OPTIMIZERS} | by_themselves
    tested = {name.split()[0] for name in SCHEDULERS} | set(ONE_RATE_FOR_ALL)
    assert names(lr_scheduler, lr_scheduler.LRScheduler) == tested


class Sparse(Net):
    """An embedding with sparse gradients, which has an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, WIDTH, sparse=True)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self(batch[0] + self.embedding(batch[1])), batch[1])
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        dense = [p for name, p in self.named_parameters() if "embedding" not in name]
        return [optim.SparseAdam(self.embedding.parameters()), optim.AdamW(dense, weight_decay=DECAY)]


def test_sparse_adam_keeps_its_embedding_in_float() -> None:
    model = Sparse()
    before = model.embedding.weight.detach().clone()
    spec = recipes.int4().rules[0].spec
    made = fit(model, QATCallback(Recipe((Rule("*", spec, types=(nn.Linear, nn.Embedding)),))))
    assert not torch.equal(model.embedding.weight, before)
    assert [len(optimizer.param_groups) for optimizer in made.optimizers] == [1, 2]
    assert "embedding.weight_quantizer.scale" not in model.state_dict()
