"""Distillation(max_odds=...): from the second epoch on a teacher that is too sure is softened."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_qat import Distillation
from lightning_qat.callbacks import TargetMask
from lightning_qat.callbacks.output_loss import OutputLoss, temperature_rise
from lightning_qat.losses import jensen_shannon, kl_divergence, mean_squared_error, reverse_kl_divergence
from tests.callbacks._models import Net, fit, state


def sgd(module: Any) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def sure(certainty: float) -> Net:
    teacher = Net(seed=7)
    with torch.no_grad():
        for parameter in teacher.head.parameters():
            parameter.mul_(certainty)
    return teacher.requires_grad_(False).eval()  # type: ignore[return-value]


def odds_by_hand(logits: Tensor, weights: Tensor) -> float:
    """Return the geometric mean of p_first / p_second in float64, one position after the other."""
    total = 0.0
    for row, weight in zip(logits.double().softmax(-1).flatten(0, -2), weights.flatten(), strict=True):
        first, second = sorted(row.tolist(), reverse=True)[:2]
        total += float(weight) * math.log(first / second)
    return math.exp(total / float(weights.sum()))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_odds_at_the_risen_temperature_are_those_asked_for(dtype: torch.dtype, temperature: float) -> None:
    logits = (6 * torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    mask = torch.arange(15).reshape(3, 5) % 3
    for weights in (None, mask):
        rise = temperature_rise(logits, max_odds=4.0, temperature=temperature, mask=weights)
        found = odds_by_hand(
            logits / float(rise) / temperature
            if dtype == torch.float64
            else logits.double() / float(rise * temperature),
            torch.ones(3, 5) if weights is None else weights,
        )
        assert found == pytest.approx(4.0, rel=1e-5) if rise > 1 else found <= 4.0
    assert float(temperature_rise(logits, max_odds=1e9)) == 1.0


def test_what_a_mask_hides_and_what_has_no_odds_does_not_count() -> None:
    logits = torch.tensor([[4.0, 0.0, 0.0], [math.nan, 0.0, 0.0], [1.0, -math.inf, -math.inf]])
    mask = torch.tensor([1, 0, 0])
    hidden = torch.where(mask[:, None] > 0, logits, 0.0)
    assert float(temperature_rise(hidden, max_odds=math.e, mask=mask)) == 4.0
    assert float(temperature_rise(logits[[0, 2]], max_odds=math.e)) == 2.0  # the second is as if there were no choice
    assert float(temperature_rise(logits, max_odds=math.e, mask=torch.zeros(3))) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_and_many_choices_are_looked_at_alike(dtype: torch.dtype) -> None:
    """Equal ones, too: then the odds are even."""
    few = (4 * torch.randn(5, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    few[0, :2] = 20.0
    many = torch.cat([few, few.amin(-1, keepdim=True).expand(5, 300)], -1)
    assert temperature_rise(few, max_odds=1.1) == temperature_rise(many, max_odds=1.1) > 1
    assert temperature_rise(few[:1], max_odds=1.1) == temperature_rise(many[:1], max_odds=1.1) == 1


@pytest.mark.parametrize("loss", [kl_divergence, reverse_kl_divergence, jensen_shannon])
def test_the_loss_is_that_of_the_risen_temperature(loss: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (5 * torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    found, temperature = OutputLoss(loss, 2.0, 1.5, takes_mask=False)(student, teacher, None, repeated=True)
    assert temperature is not None
    assert temperature > 2
    torch.testing.assert_close(found, loss(student, teacher, temperature=float(temperature)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("manual", [False, True])
def test_equals_the_loss_written_by_hand(precision: Any, manual: bool) -> None:
    """The first epoch has the temperature asked for, later ones that of the batch; no gradient passes through it."""
    teacher = sure(20.0)

    class ByHand(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits, theirs = self(batch[0]), teacher(batch[0])
            best = theirs.float().sort(-1, descending=True).values
            temperature = (
                max(1.0, float((best[:, 0] - best[:, 1]).mean()) / math.log(5.0)) if self.current_epoch else 1.0
            )
            temperatures.append(temperature)
            total: Tensor = F.cross_entropy(logits, batch[1])
            return total + 3.0 * kl_divergence(logits, theirs, temperature=temperature)

    class Manual(Net):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            if not manual:
                return loss
            self.optimizers().zero_grad()  # type: ignore[union-attr]
            self.manual_backward(loss)
            self.optimizers().step()  # type: ignore[union-attr]
            return None

    temperatures: list[float] = []
    model, by_hand = Manual(optimizer=sgd), ByHand(optimizer=sgd)
    fit(model, Distillation(sure(20.0), weight=3.0, max_odds=5.0), max_epochs=3, precision=precision)
    fit(by_hand, max_epochs=3, precision=precision)
    assert set(temperatures[:4]) == {1.0}
    assert min(temperatures[4:]) > 1.2
    for name, value in state(by_hand).items():
        torch.testing.assert_close(state(model)[name], value, rtol=1e-4, atol=1e-5)


def test_a_teacher_that_is_not_that_sure_changes_nothing() -> None:
    models = Net(), Net()
    fit(models[0], Distillation(sure(1.0), max_odds=100.0), max_epochs=3)
    fit(models[1], Distillation(sure(1.0)), max_epochs=3)
    ours, theirs = (state(model) for model in models)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_temperature_is_logged_while_it_may_rise() -> None:
    logged: list[dict[str, float]] = []
    logger = CSVLogger(save_dir="")
    logger.log_metrics = lambda metrics, step: logged.append(metrics)  # type: ignore[method-assign, assignment, misc]
    fit(Net(), Distillation(sure(20.0), max_odds=5.0), max_epochs=2, logger=logger, log_every_n_steps=1)
    found = [row.get("distillation/temperature") for row in logged if "distillation/loss" in row]
    assert found[:4] == [None] * 4
    assert all(value is not None and value > 1.2 for value in found[4:])
    assert len(found) == 8


def test_positions_without_target_do_not_count() -> None:
    """A batch in which the masked half is sure of nothing: the temperature is that of the other half."""

    class Logits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    x = torch.tensor([[8.0, 0.0], [0.0, 0.0]])
    mask = TargetMask("targets")({"targets": torch.tensor([1, -100])})
    loss = OutputLoss(kl_divergence, 1.0, math.e**2, takes_mask=True)
    assert float(loss(Logits()(x), x, mask, repeated=True)[1]) == 4.0  # type: ignore[arg-type]


def test_bad_options() -> None:
    for value in (1.0, 0.0, math.nan, math.inf, True, "100"):
        with pytest.raises(
            ValueError, match=r"Distillation: max_odds=.* is not allowed; choose a finite number above 1, or None"
        ):
            Distillation(max_odds=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"max_odds=100.0 has no effect: .*mean_squared_error takes no temperature"):
        Distillation(loss=mean_squared_error, max_odds=100.0)
    with pytest.raises(ValueError, match=r"max_odds=9.0 needs two classes; outputs are \[4, 1\]"):
        temperature_rise(torch.zeros(4, 1), max_odds=9.0)
    assert repr(Distillation(max_odds=100.0)) == "Distillation(max_odds=100.0)"
