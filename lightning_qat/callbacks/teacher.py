"""The frozen teacher of Distillation: built once, kept outside the module, the same again after a resume."""

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_qat.callbacks.attachment import detach
from lightning_qat.conversion.checkpoint import load_checkpoint
from lightning_qat.conversion.prepare import unprepare


@final
class Teacher:
    """Holds a frozen module and runs it without side effects.

    Args:
        source: None (a copy of the student's latent weights), a module, a factory, or a checkpoint path.
        dtype: dtype of its floating point weights; None keeps them.

    Raises:
        ValueError: a path without file.
    """

    def __init__(
        self, source: nn.Module | str | Path | Callable[[], nn.Module] | None, dtype: torch.dtype | None
    ) -> None:
        if isinstance(source, str | Path) and not Path(source).is_file():
            raise ValueError(
                f"Distillation: teacher={str(source)!r} is not a file; give a checkpoint, module or factory"
            )
        self.source = source
        self.dtype = dtype
        self.module: nn.Module | None = None
        self._restored: dict[str, Any] = {}

    def build(self, pl_module: "pl.LightningModule") -> None:
        """Make the module if it is not there yet, and move it to the student's device."""
        if self.module is None:
            self.module = self._make(pl_module)
        if self._restored:
            self._restore(self._restored)
            self._restored = {}
        self.module.requires_grad_(False).eval()
        self.module.to(pl_module.device)
        if self.dtype is not None:
            self.module.to(self.dtype)

    def _make(self, pl_module: "pl.LightningModule") -> nn.Module:
        if isinstance(self.source, nn.Module):
            return self.source
        if isinstance(self.source, str | Path):
            return load_checkpoint(_float_copy(pl_module), self.source)
        return _float_copy(pl_module) if self.source is None else self.source()

    def __call__(
        self, pl_module: "pl.LightningModule", name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the teacher, or its submodule of that name, on the student's inputs."""
        assert self.module is not None  # noqa: S101 - build() runs at fit start
        own = self.source is None or isinstance(self.source, str | Path)
        module = self.module.get_submodule(name) if own or _has(self.module, name) else self.module
        with torch.no_grad(), _own_randomness(pl_module), self._precision(pl_module):
            return module(*args, **kwargs)

    def _precision(self, pl_module: "pl.LightningModule") -> Any:
        if self.dtype is None or self.dtype == torch.float32:
            return torch.autocast(pl_module.device.type, enabled=torch.is_autocast_enabled(pl_module.device.type))
        return torch.autocast(pl_module.device.type, dtype=self.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the weights of a copied teacher, or path and hash of a file."""
        if isinstance(self.source, str | Path):
            return {"path": str(self.source), "sha256": _sha256(Path(self.source))}
        if self.source is None and self.module is not None:
            return {"weights": {key: value.detach().cpu() for key, value in self.module.state_dict().items()}}
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: if the file at the path has changed.
        """
        if "sha256" in state and isinstance(self.source, str | Path) and _sha256(Path(self.source)) != state["sha256"]:
            raise ValueError(f"Distillation: the teacher {self.source} has changed since the checkpoint was written")
        if self.module is not None:
            self._restore(state)
        else:
            self._restored = state

    def _restore(self, state: dict[str, Any]) -> None:
        if "weights" in state and self.module is not None:
            self.module.load_state_dict(state["weights"])


def _has(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


def _float_copy(pl_module: "pl.LightningModule") -> nn.Module:
    if any(hasattr(parameter, "placements") for parameter in pl_module.parameters()):
        raise ValueError(
            "Distillation: the parameters are sharded, so that the model cannot be copied as its own teacher; pass "
            "teacher= a module, a factory or a checkpoint"
        )
    teacher = copy.deepcopy(pl_module)
    detach(teacher)
    unprepare(teacher)
    return teacher


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _own_randomness(pl_module: "pl.LightningModule") -> Iterator[None]:
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
