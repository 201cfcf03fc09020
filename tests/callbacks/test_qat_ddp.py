"""Two real processes on the CPU (gloo)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_qat import calibrate, gptq, prepare
from lightning_qat.conversion.calibrate import calibration_state
from tests.callbacks._models import LEARNED_INPUTS, Net, assert_equal_states, loader, state
from tests.learned import learned


def run(kind: str, folder: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PL_", "LOCAL_RANK"))}
    command = [sys.executable, "-m", "tests.callbacks._two_processes", kind, str(folder)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def loaded(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(path, weights_only=True)
    return found


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    run("ddp", folder)
    return folder


def test_both_ranks_hold_the_same(ddp: Path) -> None:
    for when in ("start", "end"):
        assert_equal_states(loaded(ddp / f"{when}0.pt"), loaded(ddp / f"{when}1.pt"))
    assert not torch.equal(loaded(ddp / "start0.pt")["first.weight"], loaded(ddp / "end0.pt")["first.weight"])


def test_scales_are_those_of_the_data_of_both_ranks(ddp: Path) -> None:
    """Two batches per process and domain: the four of "chat", and the two that "code" has."""
    reference = Net()
    prepare(reference, LEARNED_INPUTS)
    batches = [x for x, _ in loader()] + [3 * x for x, _ in loader(16)]
    calibrate(reference, batches)
    started = loaded(ddp / "start0.pt")
    for key, value in calibration_state(reference).items():
        assert torch.equal(started[key], value)
    alone = Net()
    prepare(alone, LEARNED_INPUTS)
    calibrate(alone, batches[::2])
    assert not torch.equal(
        started["first.input_quantizer.scale"], calibration_state(alone)["first.input_quantizer.scale"]
    )


def test_samples_are_counted_over_both_ranks(ddp: Path) -> None:
    for rank in range(2):
        assert torch.load(ddp / f"samples{rank}.pt", weights_only=True) == {"chat": 32, "code": 16}


def test_the_checkpoint_is_that_of_both(ddp: Path) -> None:
    assert_equal_states(loaded(ddp / "run.ckpt")["state_dict"], loaded(ddp / "end1.pt"))  # type: ignore[arg-type]


def test_adapters_train_alike_on_both_ranks(tmp_path: Path) -> None:
    run("lora", tmp_path)
    started, ended = (loaded(tmp_path / f"{when}0.pt") for when in ("start", "end"))
    assert_equal_states(ended, loaded(tmp_path / "end1.pt"))
    changed = {key for key in started if not torch.equal(started[key], ended[key])}
    assert changed == {key for key in started if key.endswith((".a", ".b", ".scale"))}


def test_weights_are_rounded_by_the_data_of_both_ranks(tmp_path: Path) -> None:
    run("compensated", tmp_path)
    for when in ("start", "end"):
        assert_equal_states(loaded(tmp_path / f"{when}0.pt"), loaded(tmp_path / f"{when}1.pt"))
    alone = Net()
    prepare(alone, learned("int2"))
    gptq(alone, [x for x, _ in loader()])
    for key, value in loaded(tmp_path / "start0.pt").items():
        assert torch.allclose(value, state(alone)[key], atol=1e-6), key


def test_forked_processes_hand_scales_back_to_a_prepared_model(tmp_path: Path) -> None:
    run("fork", tmp_path)
    message = (tmp_path / "error.txt").read_text(encoding="utf-8")
    assert "would lose all scales. Call prepare(model, recipe) before trainer.fit(model)" in message
    assert_equal_states(loaded(tmp_path / "back.pt"), loaded(tmp_path / "end0.pt"))
    assert state(Net()).keys() < loaded(tmp_path / "back.pt").keys()


def test_sharded_models_train_as_replicated_ones_and_resume(tmp_path: Path) -> None:
    """Scales of weights and inputs and a lowered grid included; weights are restored after on_fit_start there."""
    run("shard", tmp_path)
    expected = loaded(tmp_path / "ddp.pt")
    assert_equal_states(loaded(tmp_path / "whole.pt"), expected)
    assert_equal_states(loaded(tmp_path / "resumed.pt"), expected)
