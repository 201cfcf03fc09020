"""GPTQ: before the first step, after everything of fit start, and never again."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

from lightning_qat import GPTQ, Distillation, QATCallback, gptq, prepare, recipes
from tests.callbacks._models import Net, StatefulLoader, assert_equal_states, fit, loader, state
from tests.learned import learned

NOTHING: dict[str, Any] = {"limit_train_batches": 1, "max_steps": 1}


def frozen(module: Any) -> Any:
    """An optimizer that changes nothing."""
    return torch.optim.SGD(module.parameters(), lr=0.0)


def test_it_does_what_the_function_does() -> None:
    model, callback, by_hand = Net(optimizer=frozen), GPTQ(2), Net()
    prepare(by_hand, learned("int2"))
    found = gptq(by_hand, [batch[0] for batch in list(loader())[:2]])
    fit(model, QATCallback(learned("int2")), callback, **NOTHING)
    assert callback.compensated == found
    assert_equal_states(state(model), state(by_hand))


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_the_teacher_is_the_model_as_it_was(order: slice) -> None:
    model, teacher, weights = Net(), Distillation(), state(Net())
    fit(model, QATCallback(learned("int2")), *[GPTQ(2), teacher][order], **NOTHING)
    assert teacher.teacher.module is not None
    assert_equal_states(state(teacher.teacher.module), weights)


def test_random_numbers_and_order_of_data_stay(tmp_path: Path) -> None:
    orders: list[list[Tensor]] = []
    for callbacks in ([], [GPTQ(2)]):
        seen: list[Tensor] = []

        class Recorder(Net):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                seen.append(torch.cat([batch[0].flatten(), torch.rand(1)]))  # noqa: B023
                return super().training_step(batch, batch_idx)

        torch.manual_seed(3)
        fit(Recorder(seed=3), QATCallback(learned("int2")), *callbacks, train=loader(shuffle=True))
        orders.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*orders, strict=True))


def test_a_resumed_run_goes_on_bit_identically(tmp_path: Path) -> None:
    def run(folder: Path, ckpt: Path | None = None) -> dict[str, Tensor]:
        model = Net()
        saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        train = StatefulLoader(list(loader()))
        fit(model, QATCallback(learned("int2")), GPTQ(2), saves, train=train, ckpt=ckpt, max_epochs=2)
        return state(model)

    whole = run(tmp_path)
    for step in (1, 5):
        assert_equal_states(run(tmp_path / "resumed", tmp_path / f"step={step}.ckpt"), whole)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback:UserWarning")
def test_averages_start_from_the_same_weights() -> None:
    model, average = Net(optimizer=frozen), EMAWeightAveraging(decay=0.5)
    fit(model, QATCallback(learned("int2")), GPTQ(2), average, **NOTHING)
    fresh = Net(optimizer=frozen)
    fit(fresh, QATCallback(learned("int2")), GPTQ(2), **NOTHING)
    for name, value in state(fresh).items():
        assert torch.allclose(state(model)[name], value, atol=1e-6), name


def test_it_says_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(Net(), QATCallback(learned("int2")), GPTQ(2), **NOTHING)
        fit(Net(), QATCallback(recipes.int8()), GPTQ(2), **NOTHING)
    assert re.search(r"GPTQ: 2 layers; mean error of their outputs \S+ -> \S+, \d+ % of the weights", caplog.text)
    assert "GPTQ: no linear layer has a stored scale" in caplog.text


def test_clear_errors() -> None:
    with pytest.raises(ValueError, match="num_batches=0"):
        GPTQ(0)
    with pytest.raises(ValueError, match="damping=-1"):
        GPTQ(damping=-1)
    with pytest.raises(TypeError, match="dataloader=3"):
        GPTQ(dataloader=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no batches"):
        fit(Net(), QATCallback(learned("int2")), GPTQ(dataloader=[]), **NOTHING)
    with pytest.raises(ValueError, match="QATCallback"):
        fit(Net(), GPTQ(), **NOTHING)
    assert repr(GPTQ(4, rounds=2)) == "GPTQ(4, damping=0.01, rounds=2)"
