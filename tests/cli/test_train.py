"""The main job: what it leaves, and that its numbers depend on the configuration alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_qat.cli import stages
from lightning_qat.cli import train as train_module
from lightning_qat.cli.stages import recorded_outputs
from lightning_qat.cli.train import train
from lightning_qat.export import load
from tests.cli.conftest import Compose

FAST = ("debug=fast", "data.batch_size=8", "model.num_layers=1", "model.hidden_size=16")
QUIET = ("callbacks.progress_bar=null", "float.callbacks=[]", "logger=none")
MEASURED = {"accuracy", "loss", "num_bytes", "bits_per_weight"}


def test_files_and_table(compose_job: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics, objects = train(compose_job(*FAST))
    folder = tmp_path / "run"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    events = {name for name in files if "tfevents" in name}
    assert {name.split("/")[1] for name in events} == {"float", "qat"}
    assert files - events == {
        "checkpoints/float.ckpt",
        "checkpoints/qat.ckpt",
        "config.yaml",
        "layers.txt",
        "metrics.json",
        "model.json",
        "model.safetensors",
        "model.safetensors.report.json",
        "results.png",
        "tensorboard/float/hparams.yaml",
        "tensorboard/qat/hparams.yaml",
    }
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert list(metrics) == ["data", "model", "recipe", "experiment", "seed", "overrides", "float", "post_training",
                             "qat", "baked_equals_trained", "export", "seconds"]  # fmt: skip
    assert all(set(metrics[key]) == MEASURED for key in ("float", "post_training", "qat"))
    assert metrics["float"]["bits_per_weight"] == 32
    assert metrics["qat"]["num_bytes"] == metrics["post_training"]["num_bytes"] < metrics["float"]["num_bytes"] / 3
    description = json.loads((folder / "model.json").read_text())
    assert description["version"]
    assert "backbone.blocks.0.attention.qkv.weight" in str(description)
    out = capsys.readouterr().out
    for text in ("float", "post-training", "QAT", "accuracy", "loss", "size in bytes", "bits per weight", str(folder),
                 "model.json", "checkpoints/"):  # fmt: skip
        assert text in out
    loaded = load(folder / "model.safetensors", type(objects["float_model"])(hidden_size=16, num_layers=1))
    samples = torch.rand(2, 8, 8)
    assert torch.equal(loaded.eval()(samples), objects["model"].eval()(samples))


def without_time(metrics: dict[str, Any]) -> dict[str, Any]:
    """The part of metrics.json that must not change from run to run."""
    return {name: value for name, value in metrics.items() if name not in ("seconds", "overrides")}


def test_float_training_is_shared_without_changing_a_number(
    compose_job: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, _ = train(compose_job(*FAST, *QUIET, "recipe=int4", folder="alone"))
    cache = tmp_path / "cache"
    train(compose_job(*FAST, *QUIET, "recipe=int8", folder="first"), float_cache=cache)
    (file,) = cache.iterdir()
    fits = count_fits(monkeypatch)
    shared, _ = train(compose_job(*FAST, *QUIET, "recipe=int4", folder="second"), float_cache=cache)
    assert len(fits) == 1, "only the quantized training"
    assert without_time(shared) == without_time(alone)
    train(compose_job(*FAST, *QUIET, "seed=1", folder="third"), float_cache=cache)
    assert len(list(cache.iterdir())) == 2, f"another seed is not {file.name}"


def test_float_checkpoint_replaces_training(
    compose_job: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = train(compose_job(*FAST, "callbacks.progress_bar=null", "float.callbacks=[checkpoint]", "logger=none"))
    checkpoint = tmp_path / "run" / "checkpoints" / "float.ckpt"
    fits = count_fits(monkeypatch)
    again, _ = train(compose_job(*FAST, *QUIET, f"float.checkpoint={checkpoint}", folder="again"))
    assert len(fits) == 1
    assert without_time(again) == without_time(first)


def test_quantized_training_resumes(compose_job: Compose, tmp_path: Path) -> None:
    keeps = (*FAST, "callbacks.progress_bar=null", "float.callbacks=[checkpoint]", "logger=none")
    first, _ = train(compose_job(*keeps))
    checkpoints = tmp_path / "run" / "checkpoints"
    paths = (f"float.checkpoint={checkpoints / 'float.ckpt'}", f"qat.checkpoint={checkpoints / 'qat.ckpt'}")
    again, objects = train(compose_job(*FAST, *QUIET, *paths, folder="again"))
    assert again["qat"] == first["qat"], "nothing was left to train"
    _, objects = train(compose_job(*FAST, *QUIET, *paths, "qat.trainer.max_epochs=2", folder="longer"))
    assert (objects["trainer"].current_epoch, objects["trainer"].global_step) == (2, 4)


def count_fits(monkeypatch: pytest.MonkeyPatch) -> list[L.LightningModule]:
    """Gathers the models that are trained from now on."""
    fitted: list[L.LightningModule] = []
    fit = L.Trainer.fit

    def counted(self: L.Trainer, model: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        fitted.append(model)
        fit(self, model, *args, **kwargs)

    monkeypatch.setattr(L.Trainer, "fit", counted)
    return fitted


def test_seed_zero_is_a_seed(compose_job: Compose) -> None:
    runs = [train(compose_job(*FAST, *QUIET, f"seed={seed}", folder=str(i)))[0] for i, seed in enumerate((0, 0, 1))]
    assert without_time(runs[0]) == without_time(runs[1])
    assert runs[0]["float"] != runs[2]["float"]


def test_a_baked_model_that_differs_is_an_error(compose_job: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = stages.bake

    def bake(model: L.LightningModule) -> L.LightningModule:
        baked = honest(model)
        with torch.no_grad():
            bias: Tensor = baked.head.bias  # type: ignore[assignment, union-attr]
            bias[0] += 1e-5  # too little for any metric, enough for an output
        return baked

    monkeypatch.setattr(stages, "bake", bake)
    with pytest.raises(RuntimeError, match="does not reproduce"):
        train(compose_job(*FAST, *QUIET))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.group_size=5", "in_features=8 is not a multiple of group_size=5"),
        ("export.format=onx", "did you mean 'onnx'"),
        ("+export.shards=2", "has no option shards"),
    ],
)
def test_what_cannot_end_well_does_not_start(
    override: str, message: str, compose_job: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = count_fits(monkeypatch)
    with pytest.raises((ValueError, TypeError), match=message):
        train(compose_job(*FAST, *QUIET, override))
    assert fits == []


class Parts(L.LightningModule):
    """A module whose test calls a part of it, not the module."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 4), nn.Tanh())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_mean", self.body(batch[0]).mean())


@pytest.mark.parametrize("change", [0.0, 1e-3])
def test_outputs_are_recorded_where_only_parts_are_called(change: float) -> None:
    model, x = Parts(), torch.rand(3, 8)
    with recorded_outputs(model) as first:
        model.body(x)
    with torch.no_grad():
        model.body[0].bias += change
    with recorded_outputs(model) as second:
        model.body(x)
    assert first.num_calls == second.num_calls == 1
    assert (first.sha.digest() == second.sha.digest()) == (change == 0.0)
    model.body(x)
    assert second.num_calls == 1, "hooks are gone"


def test_sweep_from_the_console(tmp_path: Path) -> None:
    """End to end in a process of its own: the jobs, the shared float training, the report."""
    command = [sys.executable, "-m", "lightning_qat.cli.train", "-m", "recipe=int8,ternary", *FAST, "trainer=cpu",
               "callbacks.progress_bar=null", "float.callbacks=[]", "hydra.sweep.dir=sweep"]  # fmt: skip
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    folder = tmp_path / "sweep"
    assert len(list((folder / train_module.FLOAT_CACHE).iterdir())) == 1
    jobs = [json.loads((folder / number / "metrics.json").read_text()) for number in ("0", "1")]
    assert [job["recipe"] for job in jobs] == ["int8", "ternary"]
    assert jobs[0]["float"] == jobs[1]["float"]
    assert (folder / "results.png").stat().st_size > 10_000
    table = (folder / "results.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[4:]] == ["int8", "ternary"]
    assert "Sweep, digits" in result.stdout
    assert "Warning" not in result.stderr, result.stderr
