"""Where artifacts lie: nothing of the user's is replaced, and nothing half-written stays, also after an interrupt."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_qat.export import check, export, load
from lightning_qat.export.backend import backend_for, check_name
from tests.export.models import MLP, prepared, vectors


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("model.onnx", "safetensors", r"ends as format='onnx' does, and format='safetensors' was chosen"),
        ("model.pt2", "torchao", r"ends as format='aotinductor' or format='pt2' does"),
        ("model.safetensors", "compressed-tensors", "ends as format='safetensors' does"),
        ("", "safetensors", r"path='\.' has no name; give a file, such as 'model\.safetensors'"),
    ],
)
def test_name(name: str, format: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_name(Path(name), backend_for(format, {}))


@pytest.mark.parametrize(
    ("name", "format"), [("model.pt2", "aotinductor"), ("v1.5", "onnx"), ("m", "pt2"), ("a.b", "compressed-tensors")]
)
def test_names_that_fit(name: str, format: str) -> None:
    check_name(Path(name), backend_for(format, {}))


def test_nothing_of_the_user_is_replaced(tmp_path: Path) -> None:
    model, folder, file = prepared(MLP, "int4"), tmp_path / "results", tmp_path / "notes"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years")
    file.write_text("hours")
    with pytest.raises(ValueError, match=r"results' is a folder that also holds thesis\.txt, which an export would re"):
        export(model, folder, format="compressed-tensors")
    with pytest.raises(
        ValueError, match=r"results' is a folder; give a file in it, such as .*results/model\.safetensors"
    ):
        export(model, folder)
    with pytest.raises(ValueError, match=r"notes' is a file, and format='compressed-tensors' writes a folder"):
        export(model, file, format="compressed-tensors")
    assert (folder / "thesis.txt").read_text() == "years"
    assert file.read_text() == "hours"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("format", ["safetensors", "compressed-tensors"])
@pytest.mark.parametrize("moment", ["save_file", "move"])
def test_an_interrupted_export_leaves_the_old_artifact(
    moment: str, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export(prepared(MLP, "int4"), tmp_path / "model", format=format).path
    names = sorted(each.name for each in tmp_path.rglob("*"))
    place = f"lightning_qat.export.{format.replace('-', '_')}.save_file" if moment == "save_file" else "os.replace"

    def interrupted(_: object, target: Path, *rest: object) -> None:
        if moment == "save_file":
            Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(prepared(MLP, "int8"), path, format=format)
    assert sorted(each.name for each in tmp_path.rglob("*")) == names
    assert check(path)["format"] == format


def test_an_interrupted_exchange_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace, calls = tmp_path / "model", os.replace, []
    export(prepared(MLP, "int4"), path, format="compressed-tensors")

    def second_fails(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", second_fails)
        with pytest.raises(KeyboardInterrupt):
            export(prepared(MLP, "int8"), path, format="compressed-tensors")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model", "model.report.json"]
    check(path)


@pytest.mark.parametrize("format", ["safetensors", "compressed-tensors"])
def test_others_may_read_it(format: str, tmp_path: Path) -> None:
    export(prepared(MLP, "int4"), tmp_path / "model", format=format)
    (tmp_path / "new").touch()
    files = [each for each in tmp_path.rglob("*") if each.is_file()]
    assert {each.stat().st_mode for each in files} == {(tmp_path / "new").stat().st_mode}


class Views(nn.Module):
    """Buffers that share memory, as tables of positions do."""

    def __init__(self, fill: float = 1.0) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 8)
        table = torch.arange(6.0) * fill
        self.register_buffer("first", table[:3])
        self.register_buffer("last", table[3:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.first.sum()  # type: ignore[no-any-return, operator, union-attr]


@pytest.mark.parametrize("format", ["safetensors", "compressed-tensors"])
def test_buffers_that_share_memory(format: str, tmp_path: Path) -> None:
    report = export(prepared(Views, "int4"), tmp_path / "model", format=format, batches=vectors())
    assert report.exact
    if format == "safetensors":
        assert torch.equal(load(report.path, Views(0.0)).last, torch.tensor([3.0, 4.0, 5.0]))


@pytest.mark.parametrize("batches", [torch.randn(4, 32), {"x": torch.randn(4, 32)}])
def test_one_batch_in_the_place_of_several(batches: object, tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"batches= takes a list of batches, here is one (Tensor|dict); give batches=\[it"
    ):
        export(prepared(MLP, "int4"), tmp_path / "model", batches=batches)  # type: ignore[arg-type]
