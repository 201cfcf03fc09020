"""Tiny LightningModules and trainers for the tests of callbacks; everything is a function of a seed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import pytorch_lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import (
    Int,
    LayerSpec,
    Learned,
    MovingAverage,
    PerTensor,
    QuantizerSpec,
    Recipe,
    Rule,
)
from lightning_qat.quantization.quantizer import FakeQuantizer

WIDTH, HIDDEN, CLASSES = 6, 8, 3

LEARNED_INPUTS = Recipe((Rule("*", LayerSpec(QuantizerSpec(Int(4)), QuantizerSpec(Int(8), PerTensor(), Learned()))),))
"""Learned scales of weights and of inputs: inputs need calibration, and train."""
STORED_INPUTS = Recipe(
    (Rule("*", LayerSpec(QuantizerSpec(Int(4)), QuantizerSpec(Int(8), PerTensor(), MovingAverage()))),)
)
"""Scales of inputs that calibration finds and nothing trains."""


def data(num_samples: int = 32, seed: int = 0) -> TensorDataset:
    """Samples of two features' sum in three classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, WIDTH, generator=generator)
    return TensorDataset(x, (x[:, :2].sum(-1) + 1).clamp(0, 2).long())


def loader(num_samples: int = 32, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    """A DataLoader of `data`, in order unless told otherwise."""
    return DataLoader(data(num_samples), batch_size, **options)


class StatefulLoader:
    """Yields the batches of a loader, and continues where it was: what Lightning asks of one that resumes mid-epoch."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        self.position %= len(self.batches)  # a finished epoch is followed by a whole one
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def adamw(module: Any) -> Any:
    """The usual optimizer: one group, with weight decay."""
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)


class _Methods:
    """Two linear layers; where the second is made, and which optimizers there are, are arguments."""

    def __init__(self, where: str = "__init__", optimizer: Callable[[Any], Any] = adamw, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.where, self.optimizer = where, optimizer
        self.first = nn.Linear(WIDTH, HIDDEN)
        self.head: nn.Linear
        self._make_head("__init__")

    def _make_head(self, now: str) -> None:
        if self.where == now and not hasattr(self, "head"):
            self.head = nn.Linear(HIDDEN, CLASSES)

    def setup(self, stage: str) -> None:
        self._make_head("setup")

    def configure_model(self) -> None:
        self._make_head("configure_model")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.first(x).relu())
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        self.log("constant", 1.0)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        out: Tensor = self(batch[0])
        return out

    def configure_optimizers(self) -> Any:
        return self.optimizer(self)


class Net(_Methods, lightning.pytorch.LightningModule):
    """The module of the package `lightning`."""


class OtherNet(_Methods, pytorch_lightning.LightningModule):
    """The module of the package `pytorch_lightning`."""


FLAVORS: tuple[tuple[ModuleType, type[Any]], ...] = ((lightning.pytorch, Net), (pytorch_lightning, OtherNet))


def trainer(*callbacks: Any, pl: ModuleType = lightning.pytorch, **options: Any) -> Any:
    """A quiet trainer on the CPU without checkpoints, of one epoch."""
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if any("Checkpoint" in type(callback).__name__ for callback in callbacks):
        defaults["enable_checkpointing"] = True
    return pl.Trainer(callbacks=list(callbacks), **defaults | options)


def fit(
    model: Any, *callbacks: Any, train: Any = None, val: Any = None, ckpt: Path | None = None, **options: Any
) -> Any:
    """Fit a module and return the trainer."""
    made = trainer(*callbacks, **options)
    made.fit(model, loader() if train is None else train, val, ckpt_path=None if ckpt is None else str(ckpt))
    return made


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state of a module."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal_states(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Bit for bit, with a readable message."""
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert not different


def fake_quantizers(model: nn.Module) -> dict[str, FakeQuantizer]:
    """The quantizers of a module by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantizer)}


def grid_distance(model: nn.Module, layer: str) -> float:
    """How far the weight that a layer reads is from whole multiples of its scale."""
    module = model.get_submodule(layer)
    scale = module.weight_quantizer.scale.detach()
    levels = module.weight.detach() / scale
    return float((levels - levels.round()).abs().max())
