"""ActivationCheckpointing: the run is the same, bit for bit, beside other callbacks and after a resume, and it ends."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_qat import (
    ActivationCheckpointing,
    BitAllocation,
    Calibration,
    Distillation,
    FeatureMatch,
    LoRA,
    QATCallback,
    QuantizationStatistics,
    recipes,
)
from lightning_qat.models import SequenceClassifier
from tests.callbacks._models import LEARNED_INPUTS, StatefulLoader, adamw, assert_equal_states, fit, state

BLOCKS = "backbone.blocks.*"


def model() -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(3, embed_dim=4, hidden_size=8, num_heads=2, num_layers=2, window_size=5, dropout=0.5)


def batches() -> StatefulLoader:
    generator = torch.Generator().manual_seed(0)
    return StatefulLoader([(torch.randn(4, 5, 4, generator=generator), torch.arange(4) % 3) for _ in range(4)])


def run(*callbacks: Any, **options: Any) -> SequenceClassifier:
    built = model()
    torch.manual_seed(1)
    fit(built, *callbacks, train=batches(), val=batches(), **options)
    return built


OTHERS: dict[str, list[Any]] = {
    "quantized inputs": [QATCallback(LEARNED_INPUTS), Calibration(1)],
    "adapters": [QATCallback(recipes.int4()), LoRA(2, base="int8", dropout=0.5)],
    "a teacher inside": [QATCallback(recipes.int4()), Distillation(features=[FeatureMatch("*.feedforward")])],
    "allocation, statistics": [QATCallback(), BitAllocation(3.0, num_batches=1), QuantizationStatistics(1)],
}


@pytest.mark.filterwarnings("ignore:QuantizationStatistics. .* of the (values lie outside|scales have collapsed)")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("first", [True, False])
def test_the_run_is_the_same_beside_others(name: str, first: bool) -> None:
    saving, others = [ActivationCheckpointing(BLOCKS)], copy.deepcopy(OTHERS[name])
    found = run(*(saving + others if first else others + saving))
    assert_equal_states(state(found), state(run(*copy.deepcopy(OTHERS[name]))))
    assert not any("forward" in vars(module) for module in found.modules())


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one(stop: int, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        return [QATCallback(recipes.int4()), ActivationCheckpointing(BLOCKS), saves]

    def train(ckpt: Path | None) -> SequenceClassifier:
        built = model()
        built.configure_optimizers = lambda: adamw(built)  # type: ignore[method-assign, assignment, return-value]
        for module in built.modules():  # Lightning restores no random numbers
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        fit(built, *callbacks(), train=batches(), val=batches(), ckpt=ckpt)
        return built

    whole = train(None)
    assert_equal_states(state(train(tmp_path / f"step={stop}.ckpt")), state(whole))


def test_values_and_copies() -> None:
    for callback in (ActivationCheckpointing(BLOCKS), ActivationCheckpointing(["a.*", "b"])):
        assert repr(eval(repr(callback))) == repr(callback)
        for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
            assert repr(other) == repr(callback)


def test_errors() -> None:
    with pytest.raises(TypeError, match="ActivationCheckpointing: match=3 is not a glob over names of modules"):
        ActivationCheckpointing(3)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"ActivationCheckpointing: match=\['blocks'\] matches no module .* backbone.bl"
    ):
        run(ActivationCheckpointing("blocks"))


def test_an_error_while_training_leaves_nothing() -> None:
    built = model()
    built.head = torch.nn.Linear(7, 3)  # does not fit
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(built, ActivationCheckpointing(BLOCKS), train=batches(), val=batches())
    assert not any("forward" in vars(module) for module in built.modules())
