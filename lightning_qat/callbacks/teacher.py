"""The frozen teacher of Distillation: built once, kept outside the module, the same again after a resume."""

import copy
import hashlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_qat.callbacks.attachment import detach
from lightning_qat.callbacks.capture import capturing_features
from lightning_qat.callbacks.run_length import is_resumed
from lightning_qat.conversion.checkpoint import load_checkpoint
from lightning_qat.conversion.undo import unprepare

TeacherSource = nn.Module | str | Path | Callable[[], nn.Module]
_COMPILED = ("forward", "training_step", "validation_step", "test_step", "predict_step")


@final
class Teacher:
    """Holds a frozen module and runs it without side effects.

    Args:
        source: None (a copy of the student's latent weights), a module, a factory, or a checkpoint path.
        dtype: dtype of its floating point weights and arithmetic; None keeps both.

    Raises:
        ValueError: a path without file.
        TypeError: a source of another kind.
    """

    def __init__(self, source: TeacherSource | None, dtype: torch.dtype | None) -> None:
        if isinstance(source, str | Path) and not Path(source).is_file():
            raise ValueError(
                f"Distillation: teacher={str(source)!r} is not a file; give a checkpoint, module or factory"
            )
        if not (source is None or isinstance(source, str | Path) or callable(source)) or inspect.isclass(source):
            raise TypeError(f"Distillation: teacher={source!r} is no checkpoint path, module or factory of one")
        self.source = source
        self.dtype = dtype
        self.module: nn.Module | None = None
        self._student: weakref.ref[nn.Module] | None = None
        self._restored: dict[str, Any] = {}
        self._hash = ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_student": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        new = Teacher.__new__(Teacher)
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return new

    @property
    def is_copy(self) -> bool:
        """Whether the teacher has the student's own architecture, submodule by submodule."""
        return self.source is None or isinstance(self.source, str | Path)

    def build(self, pl_module: "pl.LightningModule") -> nn.Module:
        """Make the module if it is not there yet, and move it to the student's device.

        Raises:
            ValueError: a teacher that shares parameters with the student, or that is not the one of the checkpoint.
        """
        known = self._student is None or self._student() is pl_module
        if self.module is None or not known:
            if self.source is None and is_resumed(pl_module.trainer) and "weights" not in self._restored:
                rank_zero_warn(
                    "Distillation: the checkpoint holds no teacher, because it was written without Distillation(); the "
                    "teacher is a copy of the weights in the checkpoint. Pass teacher= the float model if it is not."
                )
            with own_randomness(pl_module.device):
                self.module = self._make(pl_module)
        self._student = weakref.ref(pl_module)
        self._freeze(self.module, pl_module)
        self._take_over()
        return self.module

    def _make(self, pl_module: "pl.LightningModule") -> nn.Module:
        if isinstance(self.source, nn.Module):
            return self.source
        if isinstance(self.source, str | Path):
            return load_checkpoint(_float_copy(pl_module), self.source)
        if self.source is None:
            return _float_copy(pl_module)
        made = self.source()
        if not isinstance(made, nn.Module):
            raise TypeError(f"Distillation: the teacher's factory returned a {type(made).__name__}, no torch.nn.Module")
        return made

    def _freeze(self, module: nn.Module, pl_module: "pl.LightningModule") -> None:
        shared = {id(p): name for name, p in pl_module.named_parameters()}
        for name, parameter in module.named_parameters():
            if id(parameter) in shared:
                raise ValueError(
                    f"Distillation: the teacher's {name} is the student's {shared[id(parameter)]}; a frozen teacher "
                    "needs weights of its own: leave teacher=None for a copy, or pass copy.deepcopy(...)"
                )
        module.requires_grad_(False).eval()
        module.to(device=pl_module.device, dtype=self.dtype)

    def __call__(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], layers: dict[str, nn.Module]
    ) -> tuple[Any, dict[str, Any]]:
        """Run the teacher on the student's inputs; return its output and the outputs of layers inside it.

        Args:
            name: of the student's module that ran.
            args: its inputs.
            kwargs: its keyword inputs.
            layers: the teacher's layers to capture, by name.
        """
        assert self.module is not None  # noqa: S101 - build() runs at fit start
        module, device = self.counterpart(name), next(self._tensors(), torch.zeros(())).device
        args, kwargs = _converted(args, self.dtype), _converted(kwargs, self.dtype)
        with torch.no_grad(), own_randomness(device), self._precision(device), capturing_features(layers) as features:
            output = module(*args, **kwargs)
        return output, features

    def _tensors(self) -> Iterator[Tensor]:
        assert self.module is not None  # noqa: S101
        yield from self.module.parameters()
        yield from self.module.buffers()

    def counterpart(self, name: str) -> nn.Module:
        """Return the teacher's module that does what the student's module of a name does.

        That is the one of the same name, or the teacher as a whole where it has none.
        """
        assert self.module is not None  # noqa: S101
        return self.module.get_submodule(name) if self.has(name) else self.module

    def has(self, name: str) -> bool:
        """Whether the teacher has a module of a name."""
        assert self.module is not None  # noqa: S101
        return name in {known for known, _ in self.module.named_modules()}

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.dtype is None:
            return nullcontext()  # the student's: also under autocast
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the weights of a copied teacher, else a hash of the file or the weights."""
        if self.module is None:
            return self._restored
        if self.source is None:
            return {"weights": {key: value.detach().cpu() for key, value in self.module.state_dict().items()}}
        self._hash = self._hash or self._fingerprint()
        path = {"path": str(self.source)} if isinstance(self.source, str | Path) else {}
        return {**path, "sha256": self._hash}

    def _fingerprint(self) -> str:
        if isinstance(self.source, str | Path):
            with Path(self.source).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        assert self.module is not None  # noqa: S101
        digest = hashlib.sha256()
        for name, value in self.module.state_dict().items():
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, as soon as the module is there."""
        self._restored = state

    def _take_over(self) -> None:
        assert self.module is not None  # noqa: S101
        restored, self._restored = self._restored, {}
        if "weights" in restored and self.source is None:
            self.module.load_state_dict(restored["weights"])
        elif "sha256" in restored and self.source is not None:
            self._hash = self._hash or self._fingerprint()
            if self._hash != restored["sha256"]:
                what = f"the file {self.source}" if "path" in restored else "the given teacher"
                raise ValueError(
                    f"Distillation: {what} is not the teacher of the checkpoint: its weights have changed since; give "
                    "the same one, or start anew from the weights with load_checkpoint()"
                )


def _float_copy(pl_module: "pl.LightningModule") -> nn.Module:
    if any(hasattr(parameter, "placements") for parameter in pl_module.parameters()):
        raise ValueError(
            "Distillation: the parameters are sharded, so that the model cannot be copied as its own teacher; pass "
            "teacher= a module, a factory or a checkpoint"
        )
    teacher = copy.deepcopy(pl_module)
    for name in _COMPILED:  # of a compiled module these are functions that belong to the original
        teacher.__dict__.pop(name, None)
    teacher._compiler_ctx = None
    detach(teacher)
    unprepare(teacher)
    return teacher


def _converted(value: Any, dtype: torch.dtype | None) -> Any:
    """Return inputs with floating tensors in a dtype."""
    if dtype is None:
        return value
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _converted(entry, dtype) for key, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_converted(entry, dtype) for entry in value)
    return value


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Leave the random numbers of torch as if nothing inside the context had drawn any."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
