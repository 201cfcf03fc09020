"""The format aotinductor: the compiled model and its program in one package. One test compiles, for about a minute."""

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lightning_qat as qat
from lightning_qat.export import AotInductor, DamagedFileError, MissingCompilerError, export, read_source
from lightning_qat.export import aotinductor as aoti
from tests.export.models import MLP, prepared, vectors


@pytest.mark.timeout(600)
def test_value(tmp_path: Path) -> None:
    model = prepared(MLP, "w8a8")
    report = export(model, tmp_path / "model.pt2", format="aotinductor", batches=vectors())
    assert report.sqnr is not None
    assert report.sqnr > 100
    assert report.agreement == 1
    with zipfile.ZipFile(report.path) as archive:
        assert not [entry for entry in archive.infolist() if entry.filename.endswith(".pt") and entry.file_size]
    program = torch.export.load(report.path)
    for name, tensor in qat.codes(model).items():
        assert torch.equal(program.state_dict[f"{name}_codes"], tensor.codes)
    small = vectors(1)[0][:2]  # another batch size than the one it was traced with
    runner = torch._inductor.aoti_load_package(str(report.path))
    with torch.no_grad():
        torch.testing.assert_close(runner(small), model.eval()(small), rtol=1e-4, atol=1e-5)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled; packages then hold the program alone."""
    monkeypatch.setattr(aoti, "need_compiler", lambda: None)
    monkeypatch.setattr(aoti, "compiled", lambda program: [])


@pytest.fixture
def written(interpreted: None, tmp_path: Path) -> Path:
    AotInductor().write(read_source(prepared(MLP, "int4"), vectors()), tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


def test_program(written: Path) -> None:
    aoti.check_archive(written)
    model = prepared(MLP, "int4").eval()
    (x,) = vectors(1)
    assert torch.equal(torch.export.load(written).module()(x), model(x))


def test_no_compiled_model(interpreted: None, tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match=r"as a package of AOTInductor with its program \(KeyError: 'model'\)"):
        export(prepared(MLP, "int4"), tmp_path / "model.pt2", format="aotinductor", batches=vectors())
    assert list(tmp_path.iterdir()) == []


def test_missing_compiler(tmp_path: Path) -> None:
    absent = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})  # monkeypatch would hide it afterwards
    message = r"needs a C\+\+ compiler, and none was found; install g\+\+"
    with absent, pytest.raises(MissingCompilerError, match=message):
        export(prepared(MLP, "int4"), tmp_path / "model.pt2", format="aotinductor", batches=vectors())
    assert list(tmp_path.iterdir()) == []


def test_needs_a_batch(interpreted: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs a real input; give batches=\[one or more\]"):
        export(prepared(MLP, "int4"), tmp_path / "model.pt2", format="aotinductor")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("data/weights/weight_2"))
    data = bytearray(path.read_bytes())
    position = data.index(b"weight_2", entry.header_offset) + 200
    data[position] ^= 1
    path.write_bytes(data)


def text(path: Path) -> None:
    path.write_text("no archive", encoding="utf-8")


def with_sample_inputs(path: Path) -> None:
    """As torch.export.save writes it: torch unpickles the inputs, and falls back to running what they say."""
    program = torch.export.load(path)
    program.example_inputs = ((vectors(1)[0],), {})
    torch.export.save(program, path)


def with_an_object(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/constants/custom_obj_0", b"anything")


def with_a_pickled_weight(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in entries if name.endswith("model_weights_config.json"))
    entries[name] = entries[name].replace(b'"use_pickle": false', b'"use_pickle": true', 1)
    with zipfile.ZipFile(path, "w") as archive:
        for key, data in entries.items():
            archive.writestr(key, data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "File is not a zip file"),
        (flipped, r"the checksum of \S*data/weights/weight_2 is wrong"),
        (text, "File is not a zip file"),
        (Path.unlink, "No such file"),
        (with_sample_inputs, r"data/sample_inputs/model\.pt is no plain tensor; packages that unpickle"),
        (with_an_object, r"data/constants/custom_obj_0 is no plain tensor"),
        (with_a_pickled_weight, r"data/weights/model_weights_config\.json: \S+ is no plain tensor"),
    ],
)
def test_damaged(damage: Callable[[Path], None], message: str, written: Path) -> None:
    source = read_source(prepared(MLP, "int4"))
    damage(written)
    with pytest.raises(DamagedFileError, match=rf"{written}.* {message}"):
        AotInductor().read(written, source)


def test_old_torch(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.export.pt2_archive", None)
    with pytest.raises(ImportError, match=r"needs torch 2.8 or newer, here is"):
        AotInductor().read(written, read_source(prepared(MLP, "int4")))
