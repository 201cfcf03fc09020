"""Every test starts from the same state: one thread, one seed, an empty working folder."""

import os
import random
from pathlib import Path

# Before torch is imported: two pytest workers on two cores must not start two threads each, and no test opens a window.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Makes a test independent of the tests before it and of the worker it runs on."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _in_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps lightning_logs, checkpoints and Hydra's outputs out of the repository. Read files through `__file__`."""
    monkeypatch.chdir(tmp_path)
