"""OrthogonalUpdates against loops that move weights by hand; what the module's optimizer does stays its own."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_qat import (
    GradualQuantization,
    LoRA,
    OrthogonalUpdates,
    OscillationFreezing,
    ProgressiveBitWidth,
    QATCallback,
    Recipe,
    Ternary,
    prepare,
    recipes,
)
from lightning_qat.conversion.view import latent
from lightning_qat.schedules import LinearRamp, QuadraticRamp, Ramp, Staircase
from tests.callbacks._models import Net, StatefulLoader, adamw, assert_equal_states, fit, loader, state
from tests.learned import learned

LR, DECAY = 1e-2, 0.1  # of `adamw`


def polar(matrix: Tensor) -> Tensor:
    """Five steps of Newton-Schulz on the singular values, which the singular vectors leave alone."""
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return u * values @ v


def by_hand(model: nn.Module, momentum: float, rate: float | Ramp, clip: float | None) -> dict[str, Tensor]:
    """The same epoch in a plain loop: steps of weights computed in float64, all else by an AdamW of its own."""
    weights = {name: latent(model.get_submodule(name), "weight") for name in ("first", "head")}
    owned = {id(weight) for weight in weights.values()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if id(p) not in owned], lr=LR, weight_decay=DECAY)
    momenta = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    batches = list(loader())
    for number, (x, y) in enumerate(batches):
        factor = rate.at(number / len(batches)) if isinstance(rate, Ramp) else rate
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        for name, weight in weights.items():
            assert weight.grad is not None
            gradient, old = weight.grad.double(), weight.detach().double()
            momenta[name] = momentum * momenta[name] + (1 - momentum) * gradient
            step = 0.2 * max(weight.shape) ** 0.5 * polar(momentum * momenta[name] + (1 - momentum) * gradient)
            weight.data = (old - LR * factor * (step + DECAY * old)).float()
    return dict(model.named_parameters())


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize(("momentum", "rate"), [(0.9, 1.0), (0.5, 2.0), (0.0, LinearRamp(0.5, start=2.0))])
def test_steps_are_those_of_a_loop_by_hand(momentum: float, rate: float | Ramp, clip: float | None) -> None:
    model, expected = Net(), Net()
    fit(
        model,
        QATCallback(recipes.int8()),
        OrthogonalUpdates(rate, momentum=momentum, recomputed=True),
        gradient_clip_val=clip,
    )
    prepare(expected, recipes.int8())  # recomputed scales: nothing but weights and biases trains
    for name, value in by_hand(expected, momentum, rate, clip).items():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "rate"),
    [
        (learned("ternary"), 2.0), (recipes.binary(), QuadraticRamp(0.0, start=2.5)), (learned("seq2"), 1.0),
        *((recipes.named(name), QuadraticRamp(0.0, start=3.0)) for name in ("ternary", "seq2", "int2", "int3")),
    ],
)  # fmt: skip
def test_rates_of_few_levels(recipe: Recipe, rate: float | Ramp) -> None:
    def run(rate: float | Ramp | None) -> dict[str, Tensor]:
        model = Net()
        fit(model, QATCallback(recipe), OrthogonalUpdates(rate))
        return state(model)

    default, given, other = run(None), run(rate), run(1.5)
    assert all(torch.equal(default[name], given[name]) for name in given)
    assert not torch.equal(default["first.weight"], other["first.weight"])


def test_rates_follow_a_grid_that_changes() -> None:
    """From where weights have two levels they move by what the ramp of the whole run says, not by its start."""

    class Moves(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.before = latent(self.first, "weight").detach().clone()

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            moved.append(float((latent(self.first, "weight").detach() - self.before).norm()))

    moved: list[float] = []
    bits = ProgressiveBitWidth(Staircase({0: 4, 2: 1}), unit="step")
    plain = lambda module: torch.optim.AdamW(module.parameters(), LR, weight_decay=0.0)  # noqa: E731
    fit(Moves(optimizer=plain), QATCallback(recipes.int4()), bits, OrthogonalUpdates(), train=loader(64))
    rates = [norm / moved[0] for norm in moved]  # singular values are near 1, whatever the gradient
    expected = [1.0, 1.0, *(3.0 * (1 - step / 8) ** 2 for step in range(2, 8))]
    assert rates == pytest.approx(expected, rel=0.35)


class Watching(Net):
    """Notes after each step which parameters have a gradient, and what the optimizer remembers of which."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers().optimizer  # type: ignore[union-attr]
        self.gradients = {name for name, p in self.named_parameters() if p.grad is not None}
        self.remembered = {name for name, p in self.named_parameters() if optimizer.state.get(p)}


def test_gradients_come_back_and_the_optimizer_keeps_no_moments() -> None:
    model = Watching()
    fit(model, QATCallback(recipes.int2()), OrthogonalUpdates(match="first"))
    names = {name for name, _ in model.named_parameters()}
    assert model.gradients == names
    assert model.remembered == names - {"first.weight"}


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_every_precision(precision: Any) -> None:
    model = Net()
    before = state(model)
    fit(model, QATCallback(recipes.int2()), OrthogonalUpdates(), GradualQuantization(), precision=precision)
    for name in ("first.weight", "head.weight"):
        moved = model.get_parameter(name).double() - before[name].double()
        assert moved.isfinite().all()
        assert float(moved.detach().abs().max()) > 0


def test_a_resumed_run_goes_on_bit_identically(tmp_path: Path) -> None:
    def scheduled(module: Any) -> Any:
        optimizer = adamw(module)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer), "interval": "step"}]

    def run(folder: Path, ckpt: Path | None = None, match: str = "*") -> dict[str, Tensor]:
        model = Net(optimizer=scheduled)
        saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [QATCallback(recipes.ternary()), OrthogonalUpdates(match=match), OscillationFreezing(), saves]
        fit(model, *callbacks, train=StatefulLoader(list(loader())), ckpt=ckpt, max_epochs=2, accumulate_grad_batches=2)
        return state(model)

    whole = run(tmp_path)
    for step in (1, 2, 3):
        assert_equal_states(run(tmp_path / "resumed", tmp_path / f"step={step}.ckpt"), whole)
    with pytest.raises(ValueError, match=r"holds a momentum for head.weight, which match='first' does not choose now"):
        run(tmp_path / "other", tmp_path / "step=1.ckpt", match="first")


@pytest.mark.parametrize(("recipe", "options"), [("int8", {}), ("bitnet1", {}), ("bitnet", {"recomputed": False})])
def test_weights_with_recomputed_scales_move_as_the_optimizer_moves_them(
    recipe: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    models = Net(), Net()
    fit(models[0], QATCallback(recipes.named(recipe)))
    with caplog.at_level("INFO"):
        fit(models[1], QATCallback(recipes.named(recipe)), OrthogonalUpdates(**options))
    assert "no weight has a learned scale" in caplog.text
    assert_equal_states(state(models[0]), state(models[1]))


def test_those_of_few_levels_move_far_at_first() -> None:
    given = {"rate": QuadraticRamp(0.0, start=3.0), "recomputed": True}
    results = []
    for options in ({}, given, {"recomputed": False}):
        model, updates = Net(), OrthogonalUpdates(**options)  # type: ignore[arg-type]
        fit(model, QATCallback(recipes.bitnet()), updates, train=loader(64))
        results.append(state(model))
        assert bool(updates.state_dict()) == (options != {"recomputed": False})
    assert_equal_states(results[0], results[1])
    assert not torch.equal(results[0]["first.weight"], results[2]["first.weight"])


def test_the_optimizer_is_checked_when_few_levels_come_later() -> None:
    recipe, bits = QATCallback(recipes.int8()), ProgressiveBitWidth({0: 8, 2: Ternary()}, unit="step")
    with pytest.raises(ValueError, match=r"SGD trains first.weight, .*return AdamW, or leave the layer out"):
        fit(Net(optimizer=sgd), recipe, bits, OrthogonalUpdates())


def test_a_callback_is_used_again() -> None:
    updates, models = OrthogonalUpdates(), [Net(), Net()]
    for model in models:
        fit(model, QATCallback(recipes.int2()), updates)
    assert_equal_states(state(models[0]), state(models[1]))


class Kinds(pl.LightningModule):
    """An embedding tied to nothing, a convolution and a linear layer; optimizers are stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.embed = nn.Embedding(5, 6)
        self.conv = nn.Conv1d(6, 4, 3)
        self.head = nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        tokens = (2 * batch[0] + 2).long().clamp(0, 4)
        loss = F.cross_entropy(self.head(self.conv(self.embed(tokens).transpose(1, 2)).mean(-1)), batch[1])
        self.manual_backward(loss)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        others = [*self.embed.parameters(), *self.conv.parameters()]
        return torch.optim.AdamW(others, lr=LR), torch.optim.NAdam(self.head.parameters(), lr=LR)


def test_convolutions_count_as_matrices_and_embeddings_do_not() -> None:
    model, updates = Kinds(), OrthogonalUpdates()
    fit(model, QATCallback(recipes.int2()), updates)
    assert set(updates.state_dict()) == {"conv.weight", "head.weight"}
    kernel = updates.state_dict()["conv.weight"]
    assert kernel.shape == model.conv.weight.shape
    before, model = Kinds(), Kinds()
    fit(model, QATCallback(recipes.int8()), OrthogonalUpdates(momentum=0.0, recomputed=True), limit_train_batches=1)
    step = (before.conv.weight - latent(model.conv, "weight")).detach() / (LR * 0.2 * 18**0.5)
    values = torch.linalg.svdvals(step.flatten(1) - 0.01 / (0.2 * 18**0.5) * before.conv.weight.detach().flatten(1))
    assert float(values.max()) < 1.25
    assert float(values[1]) > 0.6
    assert float(values[2]) < 1e-3  # three classes give gradients in two directions


def test_what_an_embedding_shares_is_left_to_the_optimizer() -> None:
    model, updates = Net(), OrthogonalUpdates()
    model.tokens = nn.Embedding(3, 8)
    model.tokens.weight = model.head.weight
    fit(model, QATCallback(recipes.int2()), updates)
    assert set(updates.state_dict()) == {"first.weight"}


def sgd(module: nn.Module) -> Any:
    return torch.optim.SGD(module.parameters(), 0.1)


def test_clear_errors() -> None:
    qat = QATCallback(recipes.int4())
    for options, message in (
        ({"rate": 0}, "rate=0 is not allowed; choose a positive factor"),
        ({"rate": "high"}, "rate='high' is not allowed"),
        ({"rate": LinearRamp(-1.0, start=2.0)}, "a Ramp of factors that are not negative"),
        ({"recomputed": "no"}, "recomputed='no' is not allowed; choose True, False, or None"),
        ({"momentum": 1.0}, r"momentum=1.0 is not allowed; choose a number in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            OrthogonalUpdates(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"match='haed' matches no layer .*there are \['first', 'head'\]"):
        fit(Net(), QATCallback(recipes.int4()), OrthogonalUpdates(match="haed"))
    with pytest.raises(ValueError, match=r"list QATCallback\(recipe\) before"):
        fit(Net(), OrthogonalUpdates())
    with pytest.raises(ValueError, match=r"matches no layer with a quantized weight that is a matrix, trains"):
        fit(Net(), qat, LoRA(2), OrthogonalUpdates())
    with pytest.raises(ValueError, match=r"SGD trains first.weight, .*return AdamW, or leave the layer out"):
        fit(
            Net(optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1)),
            QATCallback(recipes.int4()),
            OrthogonalUpdates(),
        )
    with pytest.raises(ValueError, match=r"OrthogonalUpdates: a rate that changes follows .* but the run has no end"):
        fit(Net(), QATCallback(recipes.binary()), OrthogonalUpdates(), max_epochs=-1)
    with pytest.raises(ValueError, match="list it before OscillationFreezing"):
        fit(Net(), QATCallback(recipes.int4()), OscillationFreezing(), OrthogonalUpdates())
    assert repr(OrthogonalUpdates()) == "OrthogonalUpdates(None, momentum=0.9, match='*', recomputed=None)"


def test_a_step_that_fails_gives_gradients_back() -> None:
    class Breaks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    model, updates = Breaks(), OrthogonalUpdates()
    with pytest.raises(RuntimeError, match="broken"):
        fit(model, QATCallback(recipes.int4()), updates)
    assert not updates._handles
    fit(Net(), QATCallback(recipes.int4()), updates)
