"""A run that is killed after any step and resumed ends as the uninterrupted run, bit for bit."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

from lightning_qat import (
    Calibration,
    Distillation,
    FeatureMatch,
    LayerSpec,
    LearnedSoft,
    PerGroup,
    QATCallback,
    QuantizerSpec,
    Recipe,
    Rule,
    recipes,
)
from lightning_qat import Int as IntGrid
from tests.callbacks._models import (
    LEARNED_INPUTS,
    STORED_INPUTS,
    Net,
    StatefulLoader,
    assert_equal_states,
    fit,
    loader,
    state,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:You're using the WeightAveraging callback with a model that overrides:UserWarning"
)

TEMPERATURES = Recipe(
    (Rule("*", LayerSpec(QuantizerSpec(IntGrid(3, symmetric=False), PerGroup(2), gradient=LearnedSoft(0.5)))),)
)
RECIPES = {
    "learned inputs": LEARNED_INPUTS,
    "stored inputs": STORED_INPUTS,
    "temperatures": TEMPERATURES,
    "bitnet": recipes.bitnet(),
}
NUM_EPOCHS, NUM_BATCHES = 2, 6


def scheduled(module: Net) -> Any:
    """An optimizer with momentum, and a schedule of the whole run."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=NUM_EPOCHS * NUM_BATCHES + 1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(
    folder: Path, recipe: Recipe, *extra: Any, ckpt: Path | None = None, where: str = "__init__", **options: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train with a checkpoint after every step; return what the module and the optimizer hold in the end."""
    model = Net(optimizer=scheduled, where=where, seed=0 if ckpt is None else 99)  # a resumed one starts from elsewhere
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [QATCallback(recipe, scale_lr_multiplier=1.0), Calibration(2), *extra, saves]
    train = StatefulLoader(list(loader(8 * NUM_BATCHES)))
    made = fit(model, *callbacks, train=train, val=loader(8), ckpt=ckpt, max_epochs=NUM_EPOCHS, **options)
    optimizer = made.optimizers[0].state_dict()
    moments = {f"{i}.{key}": value for i, each in optimizer["state"].items() for key, value in each.items()}
    return state(model), {**moments, "groups": torch.tensor([g["lr"] for g in optimizer["param_groups"]])}


def assert_resumes(folder: Path, recipe: Recipe, extra: Callable[[], list[Any]], steps: Any, **options: Any) -> None:
    whole = run(folder, recipe, *extra(), **options)
    assert len(list(folder.glob("step=*.ckpt"))) >= len(list(steps))
    for step in steps:
        resumed = run(folder / "resumed", recipe, *extra(), ckpt=folder / f"step={step}.ckpt", **options)
        assert_equal_states(whole[0], resumed[0])
        assert_equal_states(whole[1], resumed[1])


@pytest.mark.parametrize("name", RECIPES)
def test_killed_after_any_step(name: str, tmp_path: Path) -> None:
    assert_resumes(tmp_path, RECIPES[name], list, range(1, NUM_EPOCHS * NUM_BATCHES, 2))


@pytest.mark.parametrize("where", ["setup", "configure_model"])
def test_killed_with_layers_made_late(where: str, tmp_path: Path) -> None:
    assert_resumes(tmp_path, LEARNED_INPUTS, list, [4, 6], where=where)


def test_killed_while_layers_follow_a_teacher(tmp_path: Path) -> None:
    """The weight of what they add falls over the whole run, not over what is left of it."""
    assert_resumes(
        tmp_path, LEARNED_INPUTS, lambda: [Distillation(max_odds=1.05, features=(FeatureMatch("first"),))], [2, 7]
    )


def test_killed_between_accumulated_batches(tmp_path: Path) -> None:
    """6 batches of 2 make 3 steps; a checkpoint after a step has no accumulated gradient to lose."""
    assert_resumes(tmp_path, LEARNED_INPUTS, list, range(1, 6), accumulate_grad_batches=2)


def test_killed_with_clipping_in_bf16(tmp_path: Path) -> None:
    assert_resumes(tmp_path, LEARNED_INPUTS, list, [3, 8], gradient_clip_val=0.1, precision="bf16-mixed")


@pytest.mark.parametrize("recipe", [LEARNED_INPUTS, STORED_INPUTS])
@pytest.mark.parametrize("options", [{}, {"update_starting_at_step": 5}, {"update_every_n_steps": 2}])
def test_killed_with_averaging(recipe: Recipe, options: dict[str, Any], tmp_path: Path) -> None:
    assert_resumes(tmp_path, recipe, lambda: [EMAWeightAveraging(decay=0.75, **options)], [1, 4, 6, 9])


def test_resumed_in_a_new_process(tmp_path: Path) -> None:
    whole = run(tmp_path, LEARNED_INPUTS, EMAWeightAveraging(decay=0.75))
    script = f"""
import warnings
from pathlib import Path
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from tests.callbacks.test_resume import LEARNED_INPUTS, run

torch.set_num_threads(1)
warnings.simplefilter("ignore")
folder = Path({str(tmp_path)!r})
ckpt = folder / "step=4.ckpt"
torch.save(run(folder / "new", LEARNED_INPUTS, EMAWeightAveraging(decay=0.75), ckpt=ckpt), folder / "new.pt")
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True, timeout=120, capture_output=True)
    resumed = torch.load(tmp_path / "new.pt", weights_only=True)
    assert_equal_states(whole[0], resumed[0])
    assert_equal_states(whole[1], resumed[1])
