"""Damaged files of every format: one clear error, whatever their readers raise, and no other numbers unnoticed."""

import logging
import random
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.export import Backend, DamagedFileError, Source, check, export, formats, read_source
from lightning_qat.export.api import is_same
from lightning_qat.export.backend import backend_for
from lightning_qat.export.errors import reading
from lightning_qat.quantization import recipes
from tests.export.models import prepared

FORMATS = [name for name in formats() if name != "aotinductor"]  # its archive is that of pt2, and compiling takes long
RECIPE = recipes.int4(32, "float16")


def small() -> nn.Module:
    return prepared(lambda: nn.Sequential(nn.Linear(32, 8)), RECIPE)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, batches = tmp_path_factory.mktemp("artifacts"), [torch.randn(4, 32)]
    return {
        name: export(small(), folder / f"{name}{backend_for(name, {}).suffix}", format=name, batches=batches).path
        for name in FORMATS
    }


def copied(artifact: Path, folder: Path) -> Path:
    for path in (artifact, artifact.with_name(artifact.name + ".report.json")):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    return folder / artifact.name


def files_of(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def damaged(data: bytes) -> Iterator[bytes]:
    """Cut, overwritten, with one bit flipped, and with sizes at the front that would fill any memory."""
    size = len(data)
    chance = random.Random(size)
    for length in (0, 1, 8, 20, size // 4, size // 2, size - 1):
        yield data[:length]
    yield bytes(size)
    yield chance.randbytes(size)
    for _ in range(25):
        place = chance.randrange(size)
        yield data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
    for place in range(0, 64, 8):
        for number in (2**31, 2**62, 2**64 - 1):
            yield data[:place] + struct.pack("<Q", number) + data[place + 8 :]


def read_or_none(backend: Backend, path: Path, source: Source) -> Mapping[str, Tensor] | None:
    """The weights, or None where the file is said to be damaged; any other error is the test's."""
    try:
        return backend.read(path, source)[0]
    except DamagedFileError:
        return None


def same(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    return all(is_same(value, state[name]) for name, value in weights.items())


@pytest.mark.parametrize("format", FORMATS)
def test_one_clear_error(
    format: str, artifacts: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    path, backend, source = copied(artifacts[format], tmp_path), backend_for(format, {}), read_source(small())
    state, errors = source.model.state_dict(), 0
    for file in files_of(path):
        whole = file.read_bytes()
        for data in damaged(whole):
            file.write_bytes(data)
            with pytest.raises(DamagedFileError, match=rf"{file.name}.*damaged or changed after the export"):
                check(path)
            weights = read_or_none(backend, path, source)
            errors += weights is None
            # a flip may hit padding, or a name that nobody reads; formats without a sum of their own read other numbers
            assert weights is None or format not in ("safetensors", "pt2") or same(weights, state)
        file.write_bytes(whole)
    assert errors > 20
    assert check(path)["format"] == format


def test_check(artifacts: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(artifacts["compressed-tensors"], tmp_path)
    (folder / "tokenizer.json").write_text("{}")  # is no part of the export
    check(folder)
    (folder / "config.json").unlink()
    with pytest.raises(DamagedFileError, match=r"config\.json: damaged or changed after the export"):
        check(folder)
    report = folder.with_name("compressed-tensors.report.json")
    for text in ("no JSON", "{}", "[]", '{"checksums": 3}', '{"checksums": {}}'):
        report.write_text(text)
        with pytest.raises(DamagedFileError, match="compressed-tensors"):
            check(folder)
    report.unlink()
    with pytest.raises(FileNotFoundError, match=r"compressed-tensors\.report\.json' does not exist"):
        check(folder)
    with pytest.raises(FileNotFoundError, match=r"none' does not exist"):
        check(tmp_path / "none")


def test_reading() -> None:
    with pytest.raises(DamagedFileError, match=r"a\.x: cannot be read as a thing \(KeyError: 'b'\)"), \
            reading(Path("a.x"), "a thing"):  # fmt: skip
        raise KeyError("b")
    with pytest.raises(DamagedFileError, match=r"^own$"), reading(Path("a.x"), "a thing"):
        raise DamagedFileError("own")
    with pytest.raises(KeyboardInterrupt), reading(Path("a.x"), "a thing"):
        raise KeyboardInterrupt
