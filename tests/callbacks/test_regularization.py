"""Regularization: what penalties see of a weight, and that they are a part of the loss in every kind of training."""

import functools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

import lightning_qat
from lightning_qat import (
    AbsMax,
    Distillation,
    Hadamard,
    Int,
    LayerSpec,
    LoRA,
    PerGroup,
    PerTensor,
    QATCallback,
    QuantizerSpec,
    Recipe,
    Rule,
    losses,
    prepare,
    recipes,
)
from lightning_qat.callbacks import Penalty, Regularization
from lightning_qat.callbacks.measures import slots
from lightning_qat.callbacks.penalty import QUANTITIES, quantities
from lightning_qat.schedules import CosineRamp, LinearRamp
from tests.callbacks._models import Net, assert_equal_states, fit, loader, state

ABSMAX = Recipe((Rule("*", LayerSpec(QuantizerSpec(Int(3), PerTensor(), AbsMax()))),))
PULL = Penalty(losses.grid_distance, weight=0.5)


# --- what penalties see ----------------------------------------------------------------------------------------------

SPECS = {
    "channel": LayerSpec(QuantizerSpec(Int(3))),
    "tensor": LayerSpec(QuantizerSpec(Int(3), PerTensor(), AbsMax())),
    "group": LayerSpec(QuantizerSpec(Int(3), PerGroup(4))),
    "zero point": LayerSpec(QuantizerSpec(Int(3, symmetric=False), PerGroup(4))),
    "half": recipes.seq2().rules[-1].spec,
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_quantities_describe_the_weight_that_the_layer_computes_with(name: str, kind: Any) -> None:
    torch.manual_seed(0)
    layer = kind(8, 3) if kind is nn.Linear else kind(8, 3, 2)
    model = nn.Sequential(layer)
    prepare(model, Recipe((Rule("*", SPECS[name]),)))
    model(torch.ones(2, 8, *(() if kind is nn.Linear else (4, 4))))  # finds scales
    seen = quantities(slots(model)[0], QUANTITIES)
    assert seen["latent"] is layer._parameters["weight"]
    torch.testing.assert_close(seen["quantized"], layer.weight.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close((seen["levels"] * seen["scale"]).detach(), layer.weight.detach(), rtol=1e-6, atol=1e-7)
    assert seen["lo"] <= seen["levels"].min()
    assert seen["levels"].max() <= seen["hi"]
    assert (seen["lower"] <= seen["quantized"] + 1e-6).all()
    assert (seen["quantized"] <= seen["upper"] + 1e-6).all()
    assert not any(seen[key].requires_grad for key in ("quantized", "levels", "lower", "upper"))
    losses.bin_regularization(**{key: seen[key] for key in ("latent", "levels", "scale", "lo", "hi")}).backward()
    assert layer._parameters["weight"].grad.abs().sum() > 0


def test_transforms_and_adapters_come_first() -> None:
    model = nn.Sequential(nn.Linear(8, 3))
    prepare(model, Recipe((Rule("*", LayerSpec(QuantizerSpec(Int(3)), transforms=(Hadamard(),))),)))
    (slot,) = slots(model)
    torch.testing.assert_close(quantities(slot, ["latent"])["latent"], slot.weight())


# --- in training -----------------------------------------------------------------------------------------------------


def sgd(module: Any) -> Any:
    return optim.SGD(module.parameters(), lr=0.1)


def distance(model: Net) -> Tensor:
    """The mean squared distance from the levels of 3 bits with the scale of the largest weight, written out."""
    total = torch.zeros(())
    for layer in (model.first, model.head):
        weight = layer._parameters["weight"]
        step = weight.detach().abs().max() / 4
        levels = (weight.detach() / step).round().clamp(-4, 3)
        total = total + ((weight - levels * step) / step).square().mean()
    return total


def by_hand(model: Net, *, accumulate: int = 1, weight: float = 0.5) -> None:
    """Train one epoch with the penalty in the loss."""
    prepare(model, ABSMAX)
    optimizer = sgd(model)
    for index, (x, y) in enumerate(loader()):
        loss = F.cross_entropy(model(x), y) + weight * distance(model)
        (loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_penalty_is_a_part_of_the_loss(accumulate: int) -> None:
    expected, model = Net(), Net(optimizer=sgd)
    by_hand(expected, accumulate=accumulate)
    fit(model, QATCallback(ABSMAX), Regularization([PULL]), accumulate_grad_batches=accumulate)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, expected.get_parameter(name), rtol=1e-5, atol=1e-6)
    plain = Net(optimizer=sgd)
    fit(plain, QATCallback(ABSMAX), accumulate_grad_batches=accumulate)
    assert not torch.allclose(plain.first._parameters["weight"], model.first._parameters["weight"], atol=1e-4)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_dictionary_of_the_users_and_other_callbacks() -> None:
    class Dictionary(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 2 else {"loss": loss, "more": 1}

    first, second = Dictionary(optimizer=sgd), Dictionary(optimizer=sgd)
    fit(first, QATCallback(), Regularization([PULL]), Distillation())
    fit(second, QATCallback(), Distillation(), Regularization([PULL]))
    for name, value in first.named_parameters():
        torch.testing.assert_close(value, second.get_parameter(name))


class Manual(Net):
    """Manual optimization; each optimizer has its loss."""

    def __init__(self, *, two: bool, optimizer: Any = sgd) -> None:
        super().__init__(optimizer=optimizer)
        self.automatic_optimization = False
        self.two = two

    def configure_optimizers(self) -> Any:
        return [sgd(self.first), sgd(self.head)] if self.two else sgd(self)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers = self.optimizers() if self.two else [self.optimizers()]
        for optimizer in optimizers:  # type: ignore[union-attr]
            hidden = self.first(batch[0])
            hidden = hidden if optimizer is optimizers[0] else hidden.detach()  # type: ignore[index]
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.head(hidden.relu()), batch[1]))
            optimizer.step()


def test_manual_optimization_with_one_optimizer() -> None:
    expected, model = Net(), Manual(two=False)
    by_hand(expected)
    fit(model, QATCallback(ABSMAX), Regularization([PULL]))
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, expected.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_manual_optimization_penalizes_a_weight_where_a_loss_depends_on_it() -> None:
    """The first loss depends on both layers, the second, whose gradients alone reach the head's optimizer, on one."""
    model, plain = Manual(two=True), Manual(two=True)
    seen: list[float] = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            own = pl_module.first if optimizer is trainer.optimizers[0] else pl_module.head
            seen.append(float(own._parameters["weight"].grad.abs().max()))

    far = Penalty(losses.sparsity, weight=1e4)
    fit(model, QATCallback(ABSMAX), Regularization([far]), Watch(), limit_train_batches=1)
    assert seen[0] > 100  # of the first layer: its penalty is in the loss of its optimizer
    assert seen[1] < 100  # of the head: its penalty went with the first loss, whose gradient was set to zero
    fit(plain, QATCallback(ABSMAX), limit_train_batches=1)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision(precision: Any) -> None:
    model = Net(optimizer=sgd)
    fit(model, QATCallback(ABSMAX), Regularization([PULL]), precision=precision)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_frozen_weights_have_no_penalty() -> None:
    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__(optimizer=sgd)
            self.first.requires_grad_(False)
            self.head.requires_grad_(False)
            self.last = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.last

    model = Frozen()
    before = state(model.first)
    made = fit(model, QATCallback(ABSMAX), Regularization([PULL]), log_every_n_steps=1)
    assert torch.equal(before["weight"], model.first._parameters["weight"])
    assert not any(key.startswith("regularization") for key in made.callback_metrics)


def test_adapters_get_the_gradient() -> None:
    model = Net(optimizer=sgd)
    far = Penalty(losses.sparsity, weight=100.0)
    fit(model, QATCallback(recipes.int4()), LoRA(2), Regularization([far]), limit_train_batches=1)
    moved = [p for name, p in model.named_parameters() if "quantizer_lora.b" in name]
    assert moved
    assert all(torch.isfinite(p).all() for p in moved)
    assert max(float(p.detach().abs().max()) for p in moved) > 0.1


def test_weights_are_pulled_to_their_levels() -> None:
    def after(*callbacks: Any) -> float:
        model = Net(optimizer=sgd)
        fit(model, QATCallback(ABSMAX), *callbacks, max_epochs=5)
        return float(distance(model).detach())

    assert after(Regularization([Penalty(losses.grid_distance, weight=1.0)])) < 0.5 * after()


# --- ramps, logs, resuming -------------------------------------------------------------------------------------------


def test_ramps_and_logs() -> None:
    seen: list[dict[str, float]] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("regularization")})

    wanted = [
        Penalty(losses.grid_distance, weight=LinearRamp(1.0)),
        Penalty(losses.sparsity, weight=2.0, match="head"),
        Penalty(losses.sparsity, weight=3.0, match="first"),
    ]
    fit(Net(), QATCallback(ABSMAX), Regularization(wanted), Watch(), log_every_n_steps=1, max_epochs=2)
    assert [values["regularization/grid_distance_weight"] for values in seen] == [i / 8 for i in range(8)]
    for values in seen:
        assert values["regularization/sparsity/head_weight"] == 2.0
        parts = [
            values[f"regularization/{key}"] * values[f"regularization/{key}_weight"]
            for key in ("grid_distance", "sparsity/head", "sparsity/first")
        ]
        assert values["regularization/loss"] == pytest.approx(sum(parts), rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Any) -> None:
    def run(ckpt: Any = None) -> Any:
        model = Net()
        saved = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        ramp = Penalty(losses.oscillation_dampening, weight=CosineRamp(0.1))
        fit(model, QATCallback(), Regularization([ramp]), saved, max_epochs=2, ckpt=ckpt)
        return state(model)

    assert_equal_states(run(), run(tmp_path / "epoch=0.ckpt"))


# --- values and errors -----------------------------------------------------------------------------------------------


def test_penalties_are_values() -> None:
    callback = Regularization([PULL, Penalty(losses.sparsity, weight=CosineRamp(1.0), match="head")])
    names = vars(lightning_qat.callbacks) | vars(lightning_qat.schedules) | {"lightning_qat": lightning_qat}
    again = eval(repr(callback), names)
    assert (repr(again), again.penalties) == (repr(callback), callback.penalties)
    assert Penalty(functools.partial(losses.sparsity)) == Penalty(losses.sparsity)
    bound = Penalty(functools.partial(losses.smoothness, dim=0))
    assert (bound.name, bound.takes) == ("smoothness", ("latent",))


def needs_more(latent: Tensor, teacher: Tensor) -> Tensor:
    return (latent - teacher).sum()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Penalty("sparsity"), TypeError, "loss='sparsity' is not a function"),
        (lambda: Penalty(losses.sparsity, weight=-1.0), ValueError, r"weight=-1\.0 is not allowed"),
        (lambda: Penalty(losses.sparsity, weight=LinearRamp(1.0, start=-1.0)), ValueError, "is not allowed"),
        (lambda: Penalty(needs_more), ValueError, r"needs_more takes \['teacher'\]; a loss takes latent"),
        (lambda: Penalty(losses.top1_agreement), ValueError, "top1_agreement takes"),
        (lambda: Penalty(losses.sparsity, weight="0.1"), ValueError, r"weight='0\.1' is not allowed; .* CosineRamp"),
        (lambda: Penalty(losses.sparsity, match=3), TypeError, "match=3 is not a glob over layer names"),
        (lambda: Regularization([]), ValueError, "no penalty given"),
        (lambda: Regularization(PULL), TypeError, r"is one; give a list, \[Penalty\("),
        (lambda: Regularization([losses.sparsity]), TypeError, "is not a Penalty; try Penalty"),
        (lambda: Regularization([PULL, Penalty(losses.grid_distance)]), ValueError, "the same loss for the same"),
    ],
)
def test_errors_of_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_errors_at_fit_start() -> None:
    with pytest.raises(ValueError, match="the model has no quantized weights"):
        fit(Net(), Regularization([PULL]))
    nothing = Penalty(losses.sparsity, match="*.attention.*")
    with pytest.raises(ValueError, match=r"matches no quantized weight; there are 'first', 'head'"):
        fit(Net(), QATCallback(), Regularization([nothing]))
    ramp = Penalty(losses.sparsity, weight=CosineRamp(1.0))
    with pytest.raises(ValueError, match="Ramp follows the share of the run that is done, but the run has no end"):
        fit(Net(), QATCallback(), Regularization([ramp]), max_epochs=-1)
