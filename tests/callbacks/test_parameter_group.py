"""ParameterGroup: rates and decay by glob, with every optimizer and scheduler, refused where without effect."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from lightning_qat import (
    AbsMax,
    Int,
    LayerSpec,
    LearnedSoft,
    ParameterGroup,
    QATCallback,
    QuantizerSpec,
    Recipe,
    Rule,
    add_lora,
    prepare,
    recipes,
)
from lightning_qat.callbacks.optimizer_checks import check_options
from lightning_qat.callbacks.optimizers import separate_scales
from tests.callbacks._models import HIDDEN, LEARNED_INPUTS, WIDTH, Net, adamw, assert_equal_states, fit, state
from tests.callbacks.test_optimizers import (
    DECAY,
    FLOATS,
    ONE_RATE_FOR_ALL,
    OPTIMIZERS,
    SCHEDULERS,
    Rates,
    Transfer,
    mlp,
    names_of,
    scheduled,
    trained_ids,
)

SOFT = Recipe((Rule("*", LayerSpec(QuantizerSpec(Int(4), gradient=LearnedSoft()))),))
HEAD = ParameterGroup("2", kind="weights", lr_multiplier=0.5, weight_decay=0.01)
SCALES = ParameterGroup("0", kind="scales", lr_multiplier=0.25, weight_decay=0.02)
CASES = (HEAD, SCALES)


def soft_mlp() -> nn.Module:
    """Two quantized layers with learned scales and temperatures."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))
    prepare(model, SOFT)
    return model


def found_groups(model: nn.Module, optimizer: optim.Optimizer) -> list[Any]:
    """Names, rate and decay of each group."""
    return [(names_of(model, g), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]


# --- the value -------------------------------------------------------------------------------------------------------


def test_groups_are_values() -> None:
    again = eval(repr(HEAD))
    assert (again, hash(again)) == (HEAD, hash(HEAD))
    callback = QATCallback(recipes.int4(), groups=[HEAD, SCALES])
    assert callback.groups == CASES
    assert repr(callback).endswith(f"groups={CASES!r})")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"match": ""}, TypeError, "match='' is not a glob"),
        ({"kind": "biases"}, ValueError, r"kind='biases' is not allowed; choose one of \['weights', 'scales'"),
        ({"lr_multiplier": 0.0}, ValueError, r"must be positive; freeze parameters with requires_grad_"),
        ({"lr_multiplier": float("nan")}, ValueError, "must be positive"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay=-1.0 must be 0 or more"),
    ],
)
def test_values_out_of_range(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ParameterGroup(**{"kind": "weights", **arguments})


def test_arguments_of_the_callback() -> None:
    with pytest.raises(TypeError, match=r"groups\[0\]='\*' is not a ParameterGroup"):
        QATCallback(groups=["*"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"groups=ParameterGroup\('2', kind='weights'\) is one group; give a list"):
        QATCallback(groups=HEAD)  # type: ignore[arg-type]
    twice = ParameterGroup("2", kind="weights")
    with pytest.raises(ValueError, match=r"ParameterGroup\('2', kind='weights'\) is given twice"):
        QATCallback(groups=[HEAD, twice])


# --- what the optimizer gets -----------------------------------------------------------------------------------------


def by_hand(name: str, model: nn.Module) -> optim.Optimizer:
    """The optimizer with the groups that `CASES` ask for, written out."""
    named = dict(model.named_parameters())
    plain = OPTIMIZERS[name](nn.Linear(1, 1)).defaults
    still = {key: 0.0 for key in ("weight_decay", "lambd") if key in plain}
    decays = (still | {"weight_decay": 0.02}) if "weight_decay" in plain else still
    own = {"weight_decay": 0.01} if "weight_decay" in plain else {}
    groups: list[dict[str, Any]] = [
        {"params": [named["0.weight"], named["0.bias"], named["2.bias"]]},
        {"params": [named["2.weight"]], "lr": plain["lr"] * 0.5, **own},
        {"params": [named["0.weight_quantizer.scale"]], "lr": plain["lr"] * 0.25, **decays},
        {"params": [named["2.weight_quantizer.scale"]], **still},
    ]
    made = OPTIMIZERS[name](nn.Linear(1, 1))
    options = {
        key: value for key, value in made.defaults.items() if key not in ("differentiable", "decoupled_weight_decay")
    }
    return type(made)(groups, **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_as_if_grouped_by_hand(name: str) -> None:
    first, second = mlp(), mlp()
    second.load_state_dict(first.state_dict())
    decays = "weight_decay" in OPTIMIZERS[name](nn.Linear(1, 1)).defaults
    groups = (
        CASES if decays else tuple(ParameterGroup(g.match, kind=g.kind, lr_multiplier=g.lr_multiplier) for g in CASES)
    )
    with separate_scales(first, groups=groups):
        split = OPTIMIZERS[name](first)
    check_options(first, [split], groups)
    assert len(split.param_groups) == 4
    for model, optimizer in ((first, split), (second, by_hand(name, second))):
        for step in range(3):
            torch.manual_seed(step)
            for _, parameter in sorted(model.named_parameters()):
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
    assert_equal_states(state(first), state(second))
    assert not torch.equal(first[0].weight_quantizer.scale, mlp()[0].weight_quantizer.scale)


def test_the_users_groups_keep_their_places() -> None:
    """Also where nothing stays in one: optimizers exist that look at the first parameter of a group."""
    model = mlp()
    groups = [
        {"params": [model[0]._parameters["weight"]], "lr": 0.1, "name": "body"},
        {"params": [model[0].bias, model[2].bias], "weight_decay": 0.0},
        {"params": [model[2]._parameters["weight"]], "lr": 1.0},
    ]
    wanted = (
        ParameterGroup("0", kind="weights", lr_multiplier=0.5),
        ParameterGroup("2", kind="scales", weight_decay=0.1),
        ParameterGroup("*", kind="weights", weight_decay=0.2),
    )
    with separate_scales(model, 3.0, wanted):
        optimizer = optim.AdamW(groups, lr=0.01, weight_decay=DECAY)
    assert [group.get("name") for group in optimizer.param_groups] == [
        "body-weights-1", None, "pg3-weights-3", "body-scales", "pg3-scales-2",
    ]  # fmt: skip
    assert found_groups(model, optimizer) == [
        ({"0.weight"}, 0.05, DECAY),
        ({"0.bias", "2.bias"}, 0.01, 0.0),
        ({"2.weight"}, 1.0, 0.2),
        ({"0.weight_quantizer.scale"}, pytest.approx(0.3), 0.0),
        ({"2.weight_quantizer.scale"}, 3.0, 0.1),  # a group that names no rate has the short form's
    ]


def test_the_first_group_that_matches_decides_alone() -> None:
    model = mlp()
    wanted = (
        ParameterGroup("2", kind="weights", weight_decay=0.0),
        ParameterGroup("*", kind="weights", lr_multiplier=0.5),
        ParameterGroup("*", kind="scales"),  # an exception that asks for nothing: what holds without it
    )
    with separate_scales(model, groups=wanted):
        optimizer = optim.SGD(model.parameters(), 0.1, weight_decay=DECAY)
    assert found_groups(model, optimizer) == [
        ({"0.bias", "2.bias"}, 0.1, DECAY),
        ({"2.weight"}, 0.1, 0.0),
        ({"0.weight"}, 0.05, DECAY),
        ({"0.weight_quantizer.scale", "2.weight_quantizer.scale"}, 0.1, 0.0),
    ]


def test_others_are_all_that_is_in_float() -> None:
    """Biases, norms, embeddings, layers that are left out, wherever the user put them; they decay as they did."""
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    prepare(model, Recipe((Rule("3", None), *recipes.int4().rules)))
    wanted = (
        ParameterGroup("2", kind="others", weight_decay=0.0),
        ParameterGroup(kind="others", lr_multiplier=4.0),
        ParameterGroup(kind="scales", lr_multiplier=0.5),
    )
    with separate_scales(model, groups=wanted):
        optimizer = optim.AdamW(model.parameters(), lr=0.5, weight_decay=DECAY)
    assert found_groups(model, optimizer) == [
        ({"1.weight"}, 0.5, DECAY),
        ({"2.weight", "2.bias"}, 0.5, 0.0),
        ({"0.weight", "1.bias", "3.weight", "3.bias"}, 2.0, DECAY),
        ({"1.weight_quantizer.scale"}, 0.25, 0.0),
    ]
    check_options(model, [optimizer], wanted)


def test_adapters_are_no_others() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    prepare(model, recipes.int4())
    add_lora(model, rank=2)
    with separate_scales(model, groups=(ParameterGroup(kind="others", lr_multiplier=2.0),)):
        optimizer = optim.SGD([p.requires_grad_() for p in model.parameters()], 1.0)
    faster = [names_of(model, group) for group in optimizer.param_groups if group["lr"] == 2.0]
    assert faster == [{"0.weight", "0.bias", "2.bias"}]


def test_temperatures_have_rates_of_their_own() -> None:
    model = soft_mlp()
    with separate_scales(model, groups=(ParameterGroup(kind="temperatures", lr_multiplier=10.0),)):
        optimizer = optim.AdamW(model.named_parameters(), lr=0.1, weight_decay=DECAY)
    assert found_groups(model, optimizer) == [
        (FLOATS, 0.1, DECAY),
        ({f"{layer}.weight_quantizer.temperature" for layer in (0, 2)}, 1.0, 0.0),
        ({f"{layer}.weight_quantizer.scale" for layer in (0, 2)}, 0.1, 0.0),
    ]


def test_globs_tell_scales_of_inputs_from_those_of_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prepare(model, LEARNED_INPUTS)
    with separate_scales(model, groups=(ParameterGroup("*.input_quantizer.scale", kind="scales", lr_multiplier=0.1),)):
        optimizer = optim.SGD(model.parameters(), 1.0)
    assert names_of(model, optimizer.param_groups[1]) == {"0.input_quantizer.scale", "1.input_quantizer.scale"}


def test_a_tied_weight_matches_by_any_of_its_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    prepare(model, recipes.int4())
    wanted = (ParameterGroup("1", kind="weights", lr_multiplier=0.5), ParameterGroup("1", kind="scales"))
    with separate_scales(model, groups=wanted):
        optimizer = optim.SGD(list(dict.fromkeys(model.parameters())), 1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5, 1.0]


def test_recomputed_scales_leave_groups_of_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    prepare(model, Recipe((Rule("*", LayerSpec(QuantizerSpec(Int(4), scale=AbsMax()))),)))
    wanted = (ParameterGroup(kind="weights", weight_decay=0.0),)
    with separate_scales(model, groups=wanted):
        optimizer = optim.AdamW(model.parameters(), lr=1.0, weight_decay=DECAY)
    assert found_groups(model, optimizer) == [({"0.bias"}, 1.0, DECAY), ({"0.weight"}, 1.0, 0.0)]


def test_a_group_that_the_user_made_of_scales() -> None:
    model = mlp()
    own = [p for name, p in model.named_parameters() if "quantizer" in name]
    rest = [p for name, p in model.named_parameters() if "quantizer" not in name]
    with separate_scales(model, groups=(ParameterGroup("0", kind="scales", lr_multiplier=0.5),)):
        optimizer = optim.AdamW([{"params": rest}, {"params": own, "lr": 4.0, "weight_decay": 0.01}], lr=1.0)
    assert found_groups(model, optimizer)[1:] == [
        ({"2.weight_quantizer.scale"}, 4.0, 0.01),
        ({"0.weight_quantizer.scale"}, 2.0, 0.01),
    ]


def test_muon_splits_its_matrices() -> None:
    model = mlp()
    matrices = [p for p in model.parameters() if p.dim() == 2 and p.shape[1] > 1]
    with separate_scales(model, groups=(HEAD,)):
        optimizer = optim.Muon(matrices, lr=1.0, weight_decay=DECAY)
    assert found_groups(model, optimizer) == [({"0.weight"}, 1.0, DECAY), ({"2.weight"}, 0.5, 0.01)]


# --- schedulers ------------------------------------------------------------------------------------------------------

FIRST = ParameterGroup("first", kind="weights", lr_multiplier=0.5)
BOTH = (FIRST, ParameterGroup("head", kind="scales", lr_multiplier=2.0))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_keep_every_multiplier(name: str) -> None:
    plain, own = Rates(), Rates()
    fit(Net(optimizer=scheduled(SCHEDULERS[name])), plain)
    fit(Net(optimizer=scheduled(SCHEDULERS[name])), QATCallback(scale_lr_multiplier=0.125, groups=BOTH), own)
    assert len(own.seen) == len(plain.seen) == 4
    for (rate,), rates in zip(plain.seen, own.seen, strict=True):
        assert rates == pytest.approx([rate, 0.5 * rate, 2.0 * rate, 0.125 * rate], rel=1e-12)


@pytest.mark.parametrize("name", ONE_RATE_FOR_ALL)
@pytest.mark.parametrize("match", ["first", "*"])
def test_a_scheduler_that_sets_one_rate_for_all_is_an_error(name: str, match: str) -> None:
    group = ParameterGroup(match, kind="weights", lr_multiplier=0.5)
    with pytest.raises(
        ValueError, match=r"ParameterGroup\(.*: lr_multiplier=0.5 has no effect.* for AdamW, the last 2"
    ):
        fit(Net(optimizer=scheduled(ONE_RATE_FOR_ALL[name])), QATCallback(groups=(group,)))


def test_a_scheduler_that_ends_with_one_rate_is_an_error() -> None:
    for groups, rates in ((BOTH, 0.1), (BOTH, [0.1, 0.1, 0.1, 0.1])):
        module = Net(optimizer=scheduled(lambda o, rates=rates: SWALR(o, rates)))  # type: ignore[misc]
        with pytest.raises(ValueError, match=r"the scheduler sets one rate, 0\.1, for all groups"):
            fit(module, QATCallback(groups=groups))
    each = lambda o: SWALR(o, [0.1, 0.05, 0.2, 0.1], anneal_epochs=1)  # noqa: E731
    rates_seen = Rates()
    fit(Net(optimizer=scheduled(each)), QATCallback(groups=BOTH), rates_seen)
    assert rates_seen.seen[-1] == pytest.approx([0.1, 0.05, 0.2, 0.1])


def test_weight_averaging_that_sets_one_rate_is_an_error() -> None:
    averaging = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.1)
    with pytest.raises(ValueError, match="end with StochasticWeightAveraging, which sets one rate for all groups"):
        fit(Net(), QATCallback(groups=BOTH), averaging)


def test_a_list_per_group_gets_an_error_with_its_length() -> None:
    message = r"groups=\(...\) matches.* needs 4 for AdamW, the last 3 of them for these"
    for schedule in (lambda o: lr_scheduler.LambdaLR(o, [lambda step: 1.0]), lambda o: SWALR(o, [0.1])):
        with pytest.raises(ValueError, match=message):
            fit(Net(optimizer=scheduled(schedule)), QATCallback(groups=BOTH))


def test_learning_rate_monitor_shows_each_group_once(tmp_path: Any) -> None:
    monitor = pl.callbacks.LearningRateMonitor(logging_interval="step")
    logger = pl.loggers.CSVLogger(tmp_path)
    module = Net(optimizer=scheduled(SCHEDULERS["StepLR"]))
    fit(module, QATCallback(groups=BOTH), monitor, logger=logger, log_every_n_steps=1)
    assert set(monitor.lrs) == {f"lr-AdamW/pg1{end}" for end in ("", "-weights-1", "-scales-2", "-scales")}


# --- through trainers ------------------------------------------------------------------------------------------------


def test_two_optimizers_split_their_own() -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.manual_backward(self(batch[0]).square().mean())
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [optim.SGD(self.first.parameters(), 0.1), optim.Adam(self.head.parameters(), 0.2)]

    model = Two()
    made = fit(model, QATCallback(groups=BOTH))
    assert [[group["lr"] for group in optimizer.param_groups] for optimizer in made.optimizers] == [
        [0.1, 0.05, 0.1],
        [0.2, 0.4],
    ]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Any) -> None:
    def run(ckpt: Any = None) -> tuple[Any, Any]:
        module = Net(optimizer=scheduled(SCHEDULERS["CosineAnnealingLR"]))
        saved = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        made = fit(module, QATCallback(groups=BOTH), saved, max_epochs=2, ckpt=ckpt)
        groups = [{k: v for k, v in g.items() if k != "params"} for g in made.optimizers[0].param_groups]
        return state(module), groups

    whole, groups = run()
    resumed, again = run(tmp_path / "epoch=0.ckpt")
    assert_equal_states(whole, resumed)
    assert groups == again


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (QATCallback(groups=(FIRST,)), r"made with groups=\[.*'head'.*, the callback has \[.*would have no effect"),
        (QATCallback(groups=BOTH, scale_lr_multiplier=0.5), r"scale_lr_multiplier=1.0, the callback has 0.5"),
    ],
)
def test_other_options_than_the_checkpoints_are_an_error(tmp_path: Any, changed: QATCallback, message: str) -> None:
    fit(Net(), QATCallback(groups=BOTH)).save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=message):
        fit(Net(), changed, max_epochs=2, ckpt=tmp_path / "last.ckpt")


def test_backbones_that_thaw_later() -> None:
    """Groups of layers that are still frozen are no mistake; they are split when the backbone comes."""
    wanted = (
        ParameterGroup("backbone", kind="weights", lr_multiplier=0.5, weight_decay=0.02),
        ParameterGroup("backbone", kind="scales", lr_multiplier=0.25),
    )
    finetuning = pl.callbacks.BackboneFinetuning(1, lambda_func=lambda epoch: 2.0, backbone_initial_lr=0.01)
    model, history = Transfer(), []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            history.append([(names, round(lr, 6), d) for names, lr, d in found_groups(model, trainer.optimizers[0])])

    fit(model, QATCallback(groups=wanted), finetuning, Watch(), max_epochs=3, limit_train_batches=1)
    head = [({"head.weight", "head.bias"}, 0.1, 0.1), ({"head.weight_quantizer.scale"}, 0.1, 0.0)]
    assert history[0] == head
    for epoch, rate in ((1, 0.01), (2, 0.02)):
        assert history[epoch] == [
            *head,
            ({"backbone.weight"}, rate / 2, 0.02),
            ({"backbone.weight_quantizer.scale"}, rate / 4, 0.0),
            ({"backbone.bias"}, rate, 0.1),
        ]


# --- what has no effect is an error ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (ParameterGroup("*.attn.*", kind="weights"), "no layer with weights matches; there are 'first', 'head'"),
        (ParameterGroup(kind="temperatures"), r"no quantizer of the recipe has gradient=LearnedSoft\(\)"),
        (ParameterGroup("third", kind="others"), "no layer with others matches; there are 'first', 'head'"),
        ((ParameterGroup("*", kind="weights"), FIRST), r"all that it matches is taken by an earlier one, .*\('\*'"),
    ],
)
def test_a_group_without_parameters(groups: Any, message: str) -> None:
    given = groups if isinstance(groups, tuple) else (groups,)
    with pytest.raises(ValueError, match=f"has no effect: {message}"):
        fit(Net(), QATCallback(groups=given))


def test_a_multiplier_of_no_scale() -> None:
    group = ParameterGroup(kind="scales", lr_multiplier=0.5)
    with pytest.raises(ValueError, match=r"scale_lr_multiplier=2\.0 has no effect, because groups give all scales"):
        fit(Net(), QATCallback(groups=(group,), scale_lr_multiplier=2.0))


def test_options_that_an_optimizer_does_not_have() -> None:
    group = ParameterGroup("head", kind="weights", weight_decay=0.1)
    with pytest.raises(ValueError, match="the optimizer has no weight_decay"):
        fit(Net(optimizer=lambda module: optim.Rprop(module.parameters())), QATCallback(groups=(group,)))


def test_lbfgs_has_no_groups() -> None:
    with pytest.raises(ValueError, match=r"ParameterGroup\('first'.* has no effect: LBFGS has one group for all"):
        fit(Net(optimizer=lambda module: optim.LBFGS(module.parameters())), QATCallback(groups=(FIRST,)))


def test_an_optimizer_built_too_early() -> None:
    model = Net()
    prepare(model, Recipe((Rule("*", LayerSpec(QuantizerSpec(Int(4), scale=AbsMax()))),)))
    early = adamw(model)
    model.optimizer = lambda module: early
    with pytest.raises(ValueError, match=r"has no effect: the optimizer was built outside configure_optimizers\(\)"):
        fit(model, QATCallback(groups=(FIRST,)))


def test_parameters_in_no_optimizer() -> None:
    model = Net(optimizer=lambda module: adamw(module.head))
    with pytest.raises(ValueError, match="has no effect: what it matches is in no optimizer"):
        fit(model, QATCallback(groups=(FIRST,)))
    model = Net(optimizer=lambda module: adamw(module.head))
    model.first.requires_grad_(False)  # frozen on purpose
    assert id(model.first._parameters["weight"]) not in trained_ids(fit(model, QATCallback(groups=(FIRST,))))
