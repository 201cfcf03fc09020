"""Distillation(fade_below=...): the teacher's weight falls with the loss of the task."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qat import Distillation, FeatureMatch, QATCallback, recipes
from lightning_qat.losses import hidden_state_mse, kl_divergence
from tests.callbacks._models import Net, StatefulLoader, data, fit, state


def frozen() -> Net:
    return Net(seed=7).requires_grad_(False).eval()  # type: ignore[return-value]


def sgd(module: Any) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("outputs", "features"), [(100.0, 50.0), (100.0, None), (None, 50.0), (1e-3, 1e-3)])
def test_equals_the_loss_written_by_hand(outputs: float | None, features: float | None, precision: Any) -> None:
    """The weights are numbers: no gradient of the task's loss passes through them."""
    teacher = frozen()

    class ByHand(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            first = self.first(batch[0])
            logits = self.head(first.relu())
            task = F.cross_entropy(logits, batch[1])
            share = 1.0 if outputs is None else min(1.0, float(task.detach()) / outputs)
            within = 1.0 if features is None else min(1.0, float(task.detach()) / features)
            total: Tensor = (
                task
                + 3.0 * share * kl_divergence(logits, teacher(batch[0]), temperature=1.0)
                + 2.0 * within * hidden_state_mse(first, teacher.first(batch[0]))
            )
            return total

    model, by_hand = Net(optimizer=sgd), ByHand(optimizer=sgd)
    match = FeatureMatch("first", hidden_state_mse, 2.0, fade_below=features)
    fit(
        model,
        QATCallback(recipes.int4()),
        Distillation(frozen(), weight=3.0, fade_below=outputs, features=(match,)),
        precision=precision,
    )
    fit(by_hand, QATCallback(recipes.int4()), precision=precision)
    for name, value in state(model).items():
        torch.testing.assert_close(
            value, state(by_hand)[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_samples_that_come_again_have_the_whole_teacher() -> None:
    """From the second epoch on the loss of the task tells what is known by heart, and nothing fades."""

    class ByHand(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            first = self.first(batch[0])
            logits = self.head(first.relu())
            task = F.cross_entropy(logits, batch[1])
            share = min(1.0, float(task.detach()) / 100.0) if self.current_epoch == 0 else 1.0
            taught = kl_divergence(logits, teacher(batch[0]), temperature=1.0)
            hints = hidden_state_mse(first, teacher.first(batch[0]))
            total: Tensor = task + share * (3.0 * taught + 2.0 * hints)
            return total

    teacher = frozen()
    model, by_hand = Net(optimizer=sgd), ByHand(optimizer=sgd)
    match = FeatureMatch("first", hidden_state_mse, 2.0, fade_below=100.0)
    fit(model, Distillation(frozen(), weight=3.0, fade_below=100.0, features=(match,)), max_epochs=3)
    fit(by_hand, max_epochs=3)
    for name, value in state(by_hand).items():
        torch.testing.assert_close(state(model)[name], value, rtol=1e-5, atol=1e-6)


def test_a_task_that_is_learned_or_negative_has_no_teacher() -> None:
    class Finished(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * 0.0 - 5.0

    model = Finished(optimizer=sgd)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(
        model,
        Distillation(frozen(), fade_below=1.0, features=(FeatureMatch("first", fade_below=0.1),)),
        train=StatefulLoader([list(data(8).tensors)]),
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_values_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"Distillation: fade_below=.* positive and finite"):
        Distillation(fade_below=value)
    with pytest.raises(ValueError, match=r"FeatureMatch: fade_below=.* positive and finite"):
        FeatureMatch(fade_below=value)


def test_repr() -> None:
    assert repr(Distillation(fade_below=1.0)) == "Distillation(fade_below=1.0)"
    assert repr(Distillation()) == "Distillation()"
