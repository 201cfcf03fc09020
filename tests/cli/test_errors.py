"""What users see for a mistake: one message with the key, what is allowed, and the nearest match."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from lightning_qat.cli.errors import explain, one_message
from lightning_qat.cli.train import main


@pytest.fixture(autouse=True)
def _no_hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


def message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """What a call of the program prints to stderr, after it has ended with status 1."""
    monkeypatch.setattr(sys, "argv", ["lightning-qat", *overrides])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.startswith("lightning-qat: ")
    assert captured.err.count("\n") == 1, "one message"
    return captured.err


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("recipe=int5", ["recipe=int5", "no such option", "binary, bitnet", "Did you mean int"]),
        ("data=txt", ["data=txt", "arithmetic, digit_images, digits, text", "Did you mean text?"]),
        ("experiment=digits_int5", ["experiment=digits_int5", "Did you mean digits_int"]),
        ("recipee=int4", ["recipee", "no such", "callbacks, data", "Did you mean recipe?"]),
        ("sed=1", ["sed: no such key or group", "output_dir", "recipe", "Did you mean seed?"]),
        ("model.hiden_size=3", ["model.hiden_size", "num_classes, embed_dim", "Did you mean hidden_size?"]),
        ("trainer.max_epoch=1", ["trainer.max_epoch", "Did you mean max_epochs?", "+trainer.NAME=VALUE"]),
        ("trainer.limit_train_batches=1", ["does not list this argument", "+trainer.limit_train_batches="]),
        ("qat.trainer.max_epoch=1", ["qat.trainer.max_epoch", "Did you mean max_epochs?"]),
        ("recipe.groupsize=32", ["recipe.groupsize", "Did you mean group_size?"]),
        (
            "callbacks=[full,lorra]",
            ["callbacks=lorra: no such option", "bit_allocation, calibration", "Did you mean lora?"],
        ),
        ("callbacks.calibraton.num_batches=2", ["callbacks.calibraton", "Did you mean calibration?"]),
        ("recipe=[int4", ["'recipe=[int4' cannot be read"]),
        ("trainer.limit_train_batch=1", ["Did you mean limit_train_batches?"]),
        ("logger=null", ["leave it out with ~GROUP"]),
        ("float.model.hidden_size=8", ["does not list this argument", "+float.model.hidden_size="]),
        ("float.model.hiden_size=8", ["no such key. Did you mean hidden_size?", "+float.model.NAME=VALUE"]),
        ("qat.model.hiden_size=8", ["choose from learning_rate", "Did you mean hidden_size?"]),
        ("export.opset=23", ["export.opset: no such key", "Options of the format: +export.NAME=VALUE"]),
        ("-m", ["recipe=int5", "Did you mean int"]),
    ],
)
def test_wrong_override(
    override: str, parts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = message(monkeypatch, capsys, override, *(["recipe=int8,int5"] if override == "-m" else []))
    for part in parts:
        assert part in text


def test_full_error_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["lightning-qat", "recipe=int5"])
    with pytest.raises(Exception, match="Could not find 'recipe/int5'"):
        main()


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-qat", "--help"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    groups = ("recipe: binary", "data: arithmetic", "experiment: arithmetic_reasoning, digit_images")
    for part in ("lightning-qat -m recipe=int8,int4", *groups):
        assert part in out
    assert len(out.splitlines()) < 45, "a screenful"


def test_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit), one_message("program"):
        raise explained()
    import os

    assert "HYDRA_FULL_ERROR" not in os.environ


def explained() -> Exception:
    """An error of ours that is for users."""
    from lightning_qat import recipes

    try:
        recipes.named("int5")
    except ValueError as error:
        return error
    raise AssertionError


def test_bugs_keep_their_trace() -> None:
    assert explain(explained()) is not None
    assert explain(ValueError("raised by a test, not by us")) is None
    assert explain(ZeroDivisionError()) is None
    with pytest.raises(ZeroDivisionError), one_message("program"):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["callbacks=[full,lora]", "callbacks.lora.rank=0"], "callbacks.lora: LoRA: rank=0 is not allowed"),
        (["callbacks=[full,regularization]", "~callbacks.regularization.penalties",
          "+callbacks.regularization.penalties=[{_target_: lightning_qat.Penalty, loss: {_target_: "
          "lightning_qat.losses.sparsity}}]"],
         "penalties[0].loss: sparsity() missing 1 required positional argument: 'latent'; give them, or add _partial_"),
        (["recipe=custom"], "recipe.rules: no value is given, and there is no default"),
        (["seed=abc"], "seed='abc' is not allowed; choose an integer from 0 to 4294967295"),
        (["seed=-1"], "seed=-1 is not allowed"),
        (["trainer.max_epochs=many"], "trainer.max_epochs='many' is not allowed; expected int, or null"),
        (["data.batch_size=x"], "data.batch_size='x' is not allowed; expected int"),
        (["qat.model.learning_rate=fast"], "qat.model.learning_rate='fast' is not allowed; expected float"),
        (["data=text", "model.tie_embeddings=sure"], "model.tie_embeddings='sure' is not allowed; expected bool"),
        (["+qat.trainer.max_steeps=3"], "qat.trainer.max_steeps: no such argument; choose from "),
        (["report.metrics.accuracy=maxi"], "report.metrics.accuracy='maxi' is not allowed; choose min or max"),
        (["report.metrics=null"], "report.metrics=None is not allowed; give metrics by name"),
        (["float.checkpoint=/no.ckpt"], "float.checkpoint='/no.ckpt' is not a file"),
        (["qat.checkpoint=/no.ckpt"], "qat.checkpoint='/no.ckpt' is not a file; give a checkpoint, or null for none"),
        (["output_dir=/dev/null/x"], "/dev/null/x: Not a directory"),
    ],
)  # fmt: skip
def test_mistakes_come_up_before_anything_is_trained(
    overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-qat", *overrides])
    with pytest.raises(SystemExit):
        main()
    captured = capsys.readouterr()
    assert message in captured.err
    assert "float training" not in captured.out


def test_data_of_another_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-qat", "model=text", "data=digits"])
    with pytest.raises(SystemExit):
        main()
    assert "lightning-qat: LanguageModel: got torch.float32" in capsys.readouterr().err
