"""Text as bytes for language models: any file or folder, or the documentation that ships with Python."""

import importlib
from pathlib import Path
from typing import final

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_qat.data._checks import check_at_least, check_share
from lightning_qat.data.sampling import RandomPositions, ResumableDataLoader


def python_documentation() -> bytes:
    """Return the text of Python's topic pages (module ``pydoc_data.topics``), each paragraph once.

    These are the pages that ``help("topics")`` lists. Several repeat others word for word; with the repetitions taken
    out, the end of the text is not seen while training on its start. 0.37 MB in Python 3.11, other versions differ.

    Raises:
        ValueError: if this Python was installed without the pages.

    Example:
        >>> len(python_documentation()) > 100_000
        True
    """
    try:
        # Read through the module: its source was quoted strings, then a triple-quoted one, and may be split further.
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise ValueError(
            "TextData: this Python has no module pydoc_data.topics; give path=, a text file or a folder"
        ) from error
    paragraphs = "\n\n".join(topics[name].strip("\n") for name in sorted(topics)).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs)).encode()


def read_text(path: str | Path, *, pattern: str = "**/*") -> bytes:
    """Return the bytes of a file, or of the files of a folder in the order of their names, joined by line ends.

    Args:
        path: a file or a folder; ``~`` is the home directory.
        pattern: which files of a folder, a glob relative to it. Hidden files and folders are left out.

    Raises:
        ValueError: if the path does not exist, nothing matches, or a file is not text (holds a zero byte).
    """
    root = Path(path).expanduser()
    if root.is_file():
        files = [root]
    elif root.is_dir():
        files = sorted(
            file
            for file in root.glob(pattern)
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
        )
    else:
        raise ValueError(f"path={str(path)!r}: no such file or folder; expected a text file or a folder of text files")
    if not files:
        raise ValueError(f"path={str(path)!r}: no file matches pattern={pattern!r}; expected a glob such as '**/*.txt'")
    texts = [file.read_bytes() for file in files]
    for file, text in zip(files, texts, strict=True):
        if b"\0" in text:
            raise ValueError(
                f"path={str(path)!r}: {file} is not text (it holds a zero byte); choose with pattern='**/*.txt'"
            )
    return b"\n".join(texts)


@final
class TextWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text: sample i is (input, target), bytes i*stride .. i*stride + length - 1 and the byte after each.

    Args:
        text: uint8 [num_bytes].
        length: bytes of a window.
        stride: distance of the starts of neighboring windows.

    Example:
        >>> windows = TextWindows(torch.tensor(list(b"abcdefg"), dtype=torch.uint8), length=3, stride=3)
        >>> len(windows), windows[1]
        (2, (tensor([100, 101, 102]), tensor([101, 102, 103])))
    """

    def __init__(self, text: Tensor, *, length: int, stride: int) -> None:
        self.text = text
        self.length = length
        self.stride = stride

    def __len__(self) -> int:
        """Return the number of whole windows."""
        return max(0, (len(self.text) - self.length - 1) // self.stride + 1)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the input and the target, int64 [length] each."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.stride
        window = self.text[start : start + self.length + 1].long()
        return window[:-1], window[1:]


@final
class TextData(L.LightningDataModule):
    """Bytes of a text, split by position into train, validation and test: the first, middle and last part.

    A batch is (input, target), int64 [batch_size, sequence_length] each, values 0 .. 255; the target is the byte that
    follows. Training windows start anywhere, drawn as a function of (seed, epoch); validation and test windows are
    fixed and do not overlap (a rest shorter than a window is left out).

    Args:
        path: a text file or a folder; by default the documentation of Python, see `python_documentation`.
        pattern: which files of a folder, a glob such as ``"**/*.py"``.
        sequence_length: bytes of an input.
        batch_size: windows per batch.
        num_train_batches: batches per training epoch.
        val_fraction: share of the bytes for validation, 0.01 .. 0.5.
        test_fraction: share of the bytes for testing, 0.01 .. 0.5.
        seed: of the training windows.
        num_workers: loader processes.

    Raises:
        ValueError: for a value out of range, at construction; for a text that is missing or too short, in ``setup``.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        pattern: str = "**/*",
        sequence_length: int = 128,
        batch_size: int = 32,
        num_train_batches: int = 100,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(1, sequence_length=sequence_length, batch_size=batch_size, num_train_batches=num_train_batches)
        check_at_least(0, seed=seed, num_workers=num_workers)
        check_share(val_fraction=val_fraction, test_fraction=test_fraction)
        self.path = path
        self.pattern = pattern
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.num_train_batches = num_train_batches
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.seed = seed
        self.num_workers = num_workers
        self.vocab_size = 256

    def setup(self, stage: str) -> None:
        """Read and split the text; equal for every stage."""
        raw = python_documentation() if self.path is None else read_text(self.path, pattern=self.pattern)
        text = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        num_val, num_test = int(len(text) * self.val_fraction), int(len(text) * self.test_fraction)
        num_train = len(text) - num_val - num_test
        if min(num_train, num_val, num_test) <= self.sequence_length:
            raise ValueError(
                f"TextData: {len(text)} bytes give {num_train} for training, {num_val} for validation and {num_test} "
                f"for testing, but sequence_length={self.sequence_length} needs {self.sequence_length + 1} in each; "
                "give a longer text or a smaller sequence_length"
            )
        length = self.sequence_length
        self.train_set = TextWindows(text[:num_train], length=length, stride=1)
        self.val_set = TextWindows(text[num_train : num_train + num_val], length=length, stride=length)
        self.test_set = TextWindows(text[num_train + num_val :], length=length, stride=length)

    def train_dataloader(self) -> ResumableDataLoader[tuple[Tensor, Tensor]]:
        """Return ``num_train_batches`` batches of random windows."""
        num_draws = self.num_train_batches * self.batch_size
        sampler = RandomPositions(len(self.train_set), num_draws=num_draws, seed=self.seed)
        return ResumableDataLoader(
            self.train_set, batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the validation windows in the order of the text."""
        return DataLoader(self.val_set, batch_size=self.batch_size, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the test windows in the order of the text."""
        return DataLoader(self.test_set, batch_size=self.batch_size, num_workers=self.num_workers)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the test windows."""
        return self.test_dataloader()
