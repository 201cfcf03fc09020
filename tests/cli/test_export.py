"""`lightning-qat-export`: of a run, of its checkpoint, and of a checkpoint that another program wrote."""

import shutil
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_qat import QATCallback, recipes
from lightning_qat.cli.export import export_checkpoint, main
from lightning_qat.cli.train import train
from lightning_qat.data import DigitsData
from lightning_qat.export import load
from lightning_qat.models import SequenceClassifier
from tests.cli.conftest import Compose

FAST = ("debug=fast", "data.batch_size=8", "model.num_layers=1", "model.hidden_size=16", "logger=none",
        "callbacks.progress_bar=null", "float.callbacks=[]")  # fmt: skip


def same(model: torch.nn.Module, path: Path) -> bool:
    """Whether the artifact computes what the model does."""
    loaded = load(path, SequenceClassifier(hidden_size=16, num_layers=1)).eval()
    samples = torch.rand(4, 8, 8)
    return torch.equal(loaded(samples), model.eval()(samples))


def test_run_and_its_checkpoint(compose_job: Compose, tmp_path: Path) -> None:
    _, objects = train(compose_job(*FAST))
    report = export_checkpoint(tmp_path / "run", [])
    assert report.path == tmp_path / "run" / "checkpoints" / "qat.safetensors"
    assert report.num_batches == 2
    assert same(objects["model"], report.path)
    odd = tmp_path / "run" / "checkpoints" / "epoch=3-step=80.ckpt"
    (tmp_path / "run" / "checkpoints" / "qat.ckpt").rename(odd)
    output = tmp_path / "elsewhere" / "m.safetensors"
    report = export_checkpoint(odd, [f"output={output}", "num_batches=1", "data.batch_size=3"])
    assert (report.path, report.num_batches) == (output, 1)
    assert same(objects["model"], output)


def trained_elsewhere(folder: Path) -> tuple[SequenceClassifier, Path]:
    """A checkpoint of a trainer without our configuration."""
    model = SequenceClassifier(hidden_size=16, num_layers=1)
    trainer = L.Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, logger=False, accelerator="cpu",
                        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                        callbacks=[QATCallback(recipes.ternary())])  # fmt: skip
    trainer.fit(model, datamodule=DigitsData(4))
    trainer.save_checkpoint(folder / "their.ckpt")
    return model, folder / "their.ckpt"


def test_checkpoint_of_another_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = trained_elsewhere(tmp_path)
    overrides = ["model._target_=lightning_qat.models.SequenceClassifier"]
    monkeypatch.setattr(sys, "argv", ["lightning-qat-export", str(path), *overrides])
    main()
    assert "equal to the trained ones bit for bit" in capsys.readouterr().out
    assert same(model, tmp_path / "their.safetensors")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["missing.ckpt"], ["missing.ckpt: no checkpoint"]),
        (["damaged.ckpt", "model._target_=torch.nn.Linear"], ["damaged.ckpt: cannot be read as a checkpoint"]),
        (["text.ckpt", "model._target_=torch.nn.Linear"], ["text.ckpt: cannot be read as a checkpoint"]),
        (["empty.ckpt", "model._target_=torch.nn.Linear"], ["empty.ckpt: cannot be read as a checkpoint"]),
        (["list.ckpt", "model._target_=torch.nn.Linear"], ["list.ckpt: cannot be read", "it holds a list"]),
        (["their.ckpt"], ["model._target_=package.module.Class"]),
        (["their.ckpt", "fromat=onnx"], ["fromat: no such key", "Did you mean format?"]),
        (["their.ckpt", "format=safetensor"], ["format='safetensor' is unknown", "did you mean 'safetensors'?"]),
        (["their.ckpt", "options.x=1"], ["format='safetensors' has no option x"]),
        (["their.ckpt", "model=digits"], ["model: holds several values"]),
        (["their.ckpt", "model._target_=no.such.Class"], ["no.such.Class"]),
        (["their.ckpt", "num_batches=two"], ["num_batches='two' is not allowed; choose 0 or more"]),
        (["their.ckpt", "num_batches=-1"], ["num_batches=-1 is not allowed"]),
        (["their.ckpt", "--format", "onnx"], ["--format: values are given without dashes"]),
        (["format=onnx"], ["format=onnx: no checkpoint", "the checkpoint comes first"]),
        (["their.ckpt", "output=their.ckpt"], ["their.ckpt: is the checkpoint, which the artifact would replace"]),
        (["state.safetensors"], ["state.safetensors: is the checkpoint"]),
        (["their.ckpt", "format=pt2", "output=a.onnx"], ["path='a.onnx' ends as format='onnx' does"]),
    ],
)
def test_mistakes(
    arguments: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save({}, tmp_path / "their.ckpt")
    shutil.copy(tmp_path / "their.ckpt", tmp_path / "state.safetensors")
    torch.save([], tmp_path / "list.ckpt")
    (tmp_path / "damaged.ckpt").write_bytes(b"not a checkpoint")
    (tmp_path / "text.ckpt").write_text("hello world\n")  # bytes that a pickle stumbles over in its own way
    (tmp_path / "empty.ckpt").touch()
    monkeypatch.setattr(sys, "argv", ["lightning-qat-export", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    text = capsys.readouterr().err
    for part in parts:
        assert part in text
    assert "Traceback" not in text


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["--help"], 0)])
def test_usage(
    arguments: list[str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-qat-export", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == status
    assert "format=FORMAT" in capsys.readouterr().out
