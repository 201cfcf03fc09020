"""Text as bytes: where it comes from, how it is split, what a window holds."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from lightning_qat.data import TextData
from lightning_qat.data.text import TextWindows, python_documentation, read_text


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(1, 256)) * 4)
    return path


def test_default_is_the_documentation_without_repeated_paragraphs() -> None:
    text = python_documentation().decode()
    paragraphs = text.split("\n\n")
    assert len(text) > 200_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert 'The "assert" statement' in text
    pages = importlib.import_module("pydoc_data.topics").topics
    assert all(paragraph.strip("\n") in text for paragraph in pages["assert"].split("\n\n"))


def test_a_python_without_the_pages_gets_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match=r"no module pydoc_data\.topics; give path="):
        TextData().setup("fit")


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name, text in (("b.txt", "two"), ("a.txt", "one"), ("sub/c.md", "three"), (".hidden/d.txt", "no")):
        (tmp_path / name).write_text(text)
    assert read_text(tmp_path) == b"one\ntwo\nthree"
    assert read_text(tmp_path, pattern="*.txt") == b"one\ntwo"
    assert read_text(str(tmp_path / "b.txt")) == b"two"


def test_errors_name_the_path_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path='/nowhere': no such file or folder; expected a text file or a folder"):
        read_text("/nowhere")
    with pytest.raises(ValueError, match=r"no file matches pattern='\*.rst'; expected a glob"):
        read_text(tmp_path, pattern="*.rst")
    (tmp_path / "image.bin").write_bytes(b"\0\1")
    with pytest.raises(ValueError, match=r"image.bin is not text .* pattern="):
        read_text(tmp_path)
    (tmp_path / "image.bin").write_bytes(b"a" * 100)
    data = TextData(tmp_path, sequence_length=10)
    with pytest.raises(ValueError, match=r"100 bytes give 80 for training, 10 for validation .* needs 11 in each"):
        data.setup("fit")


@pytest.mark.parametrize("argument", ["sequence_length", "batch_size", "num_train_batches"])
def test_sizes_are_checked(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}=0: expected an integer of at least 1"):
        TextData(**{argument: 0})  # type: ignore[arg-type]


def test_the_parts_are_the_text_in_order(file: Path) -> None:
    data = TextData(file, sequence_length=8)
    data.setup("fit")
    parts = [data.train_set.text, data.val_set.text, data.test_set.text]
    assert bytes(torch.cat(parts).tolist()) == file.read_bytes()
    assert [len(part) for part in parts] == [816, 102, 102]


def test_targets_are_the_next_bytes(file: Path) -> None:
    data = TextData(file, sequence_length=8, batch_size=4, num_train_batches=3)
    data.setup("fit")
    assert len(data.train_dataloader()) == 3
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        tokens, targets = next(iter(loader))
        assert tokens.shape == targets.shape == (4, 8)
        assert tokens.dtype == targets.dtype == torch.int64
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        assert torch.equal(targets, tokens % 255 + 1)  # the file counts 1 .. 255, over and over


def test_evaluation_windows_cover_the_part_without_overlap(file: Path) -> None:
    data = TextData(file, sequence_length=8)
    data.setup("validate")
    inputs = torch.cat([tokens for tokens, _ in data.val_dataloader()]).flatten()
    assert torch.equal(inputs, data.val_set.text[: len(inputs)].long())
    assert len(data.val_set.text) - 8 <= len(inputs) < len(data.val_set.text)


@pytest.mark.parametrize("num_bytes", range(12))
def test_number_of_windows(num_bytes: int) -> None:
    windows = TextWindows(torch.zeros(num_bytes, dtype=torch.uint8), length=4, stride=3)
    starts = [start for start in range(0, num_bytes, 3) if start + 4 + 1 <= num_bytes]
    assert len(windows) == len(starts)
    with pytest.raises(IndexError, match="window"):
        windows[len(starts)]


def test_training_windows_depend_on_seed_and_epoch(file: Path) -> None:
    def first_batch(seed: int, epoch: int) -> torch.Tensor:
        data = TextData(file, sequence_length=8, num_train_batches=2, seed=seed)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        tokens: torch.Tensor = next(iter(loader))[0]
        return tokens

    assert torch.equal(first_batch(0, 1), first_batch(0, 1))
    assert not torch.equal(first_batch(0, 0), first_batch(0, 1))
    assert not torch.equal(first_batch(1, 0), first_batch(0, 1))
