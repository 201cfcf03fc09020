"""Distillation: a frozen teacher adds its loss to the user's own."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, final

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_qat.callbacks.attachment import ModuleHooks, attach, detach
from lightning_qat.callbacks.teacher import Teacher
from lightning_qat.losses import kl_divergence, top1_agreement

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "same": None}
Loss = Callable[..., Tensor]
TeacherSource = nn.Module | str | Path | Callable[[], nn.Module]


@final
class Distillation(pl.Callback, ModuleHooks):
    r"""Adds :math:`weight \cdot L(student, teacher)` to the loss that ``training_step`` returns, once per student forward.

    Automatic and manual optimization, accumulation and loss scaling work as without it. The teacher runs in evaluation
    mode without gradients on the very inputs of the student; it is in no ``state_dict``, parameter list, EMA or DDP
    bucket of the module, and its random numbers do not shift the student's.

    Args:
        teacher: None for a copy of the latent float weights at fit start (kept in checkpoints: the size of the float
            weights), a module, a factory of one, or the path of a checkpoint (kept as path and SHA-256).
        temperature: softens both distributions, positive; for losses that take one.
        weight: factor of the teacher's loss, not negative.
        loss: function of (student, teacher) outputs; ``temperature`` and ``mask`` are passed if it takes them. For
            regression use :func:`lightning_qat.losses.mean_squared_error`.
        module: dotted path of the submodule whose outputs are matched; "" finds it: the LightningModule itself if its
            forward runs, else the one child with parameters that does.
        select: takes the tensor to match from an output; by default a tensor, the first tensor of a tuple,
            ``"logits"`` of a dict or an attribute ``logits``.
        mask: function of the batch that returns which positions count.
        dtype: ``"same"`` as the student, or ``"bfloat16"`` to halve the teacher's memory.

    Raises:
        ValueError: values out of range, a path without file, an option that the loss does not take.

    Source: arXiv:1503.02531.
    """

    def __init__(
        self,
        teacher: TeacherSource | None = None,
        *,
        temperature: float = 2.0,
        weight: float = 1.0,
        loss: Loss = kl_divergence,
        module: str = "",
        select: Callable[[Any], Tensor] | None = None,
        mask: Callable[[Any], Tensor] | None = None,
        dtype: Literal["same", "float32", "bfloat16"] = "same",
    ) -> None:
        _check(temperature=temperature, weight=weight, dtype=dtype)
        self.teacher = Teacher(teacher, dtype=_DTYPES[dtype])
        self.temperature, self.weight, self.loss = temperature, weight, loss
        self.module, self.select, self.mask = module, select, mask
        self._loss = _with_temperature(loss, temperature)
        self._target: str | None = None
        self._captured: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage == "fit":
            attach(pl_module)

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.teacher.build(pl_module)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        detach(pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.teacher.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.teacher.load_state_dict(state_dict)

    @override
    def running_training_step(self, pl_module: "pl.LightningModule") -> AbstractContextManager[Any]:
        return self._capturing(pl_module)

    @contextmanager
    def _capturing(self, pl_module: "pl.LightningModule") -> Iterator[None]:
        self._captured.clear()
        handles = [
            module.register_forward_hook(functools.partial(self._capture, name), with_kwargs=True)
            for name, module in self._candidates(pl_module).items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _candidates(self, pl_module: "pl.LightningModule") -> dict[str, nn.Module]:
        if self.module:
            return {self.module: pl_module.get_submodule(self.module)}
        if self._target is not None:
            return {self._target: pl_module.get_submodule(self._target)}
        children = {
            name: child for name, child in pl_module.named_children() if next(child.parameters(), None) is not None
        }
        return {"": pl_module, **children}

    def _capture(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if torch.is_grad_enabled():
            self._captured.append((name, args, kwargs, output))

    @override
    def training_step_done(self, pl_module: "pl.LightningModule", output: Any, batch: Any) -> Any:
        if not pl_module.automatic_optimization or output is None:
            return output
        task = output["loss"] if isinstance(output, dict) else output
        total = self._added(pl_module, task, batch)
        return {**output, "loss": total} if isinstance(output, dict) else total

    @override
    def before_manual_backward(self, pl_module: "pl.LightningModule", loss: Tensor) -> Tensor:
        return self._added(pl_module, loss, None) if self._captured else loss

    def _added(self, pl_module: "pl.LightningModule", task: Tensor, batch: Any) -> Tensor:
        calls = self._matched_calls(pl_module)
        mask = None if self.mask is None else self.mask(batch)
        losses, agreement = [], None
        for name, args, kwargs, output in calls:
            student = self._tensor(output, name, pl_module)
            teacher = self._tensor(self.teacher(pl_module, name, args, kwargs), name, pl_module)
            losses.append(self._loss(student, teacher, **({} if mask is None else {"mask": mask})))
            agreement = top1_agreement(student.detach(), teacher, mask=mask) if student.dim() > 1 else None
        distillation = torch.stack(losses).sum()
        self._log(pl_module, task, distillation, agreement)
        self._captured.clear()
        return task + self.weight * distillation.to(task.device)

    def _matched_calls(self, pl_module: "pl.LightningModule") -> list[tuple[str, tuple[Any, ...], dict[str, Any], Any]]:
        names = list(dict.fromkeys(call[0] for call in self._captured))
        if "" in names:
            names = [""]
        if len(names) != 1:
            known = [name for name, _ in pl_module.named_modules() if name and name.count(".") < 2]
            found = f"several children ran: {names}" if names else "no forward of the module or its children was seen"
            raise ValueError(
                f"Distillation: cannot tell which outputs to match: {found}. Name one with "
                f"Distillation(module=...); candidates: {names or known[:10]}"
            )
        self._target = names[0]
        return [call for call in self._captured if call[0] == names[0]]

    def _tensor(self, output: Any, name: str, pl_module: "pl.LightningModule") -> Tensor:
        found = self.select(output) if self.select is not None else find_tensor(output)
        if found is None:
            kind = list(output) if isinstance(output, dict) else type(output).__name__
            raise ValueError(
                f"Distillation: cannot tell which tensor of the output of {name or type(pl_module).__name__!r} to match: "
                f"{kind}; pass Distillation(select=lambda output: ...)"
            )
        return found

    def _log(
        self, pl_module: "pl.LightningModule", task: Tensor, distillation: Tensor, agreement: Tensor | None
    ) -> None:
        task, distillation = task.detach(), distillation.detach()
        values = {"task_loss": task, "loss": distillation, "ratio": distillation / task.abs().clamp(min=1e-12)}
        if agreement is not None:
            values["top1_agreement"] = agreement
        pl_module.log_dict({f"distillation/{name}": value for name, value in values.items()}, batch_size=1)


def find_tensor(output: Any) -> Tensor | None:
    """Return the tensor that an output is about: itself, ``logits``, or the first floating tensor of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        floats = [value for value in output.values() if isinstance(value, Tensor) and value.is_floating_point()]
        return output["logits"] if "logits" in output else (floats[0] if len(floats) == 1 else None)
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, tuple | list):
        return next((value for value in output if isinstance(value, Tensor) and value.is_floating_point()), None)
    return None


def _check(*, temperature: float, weight: float, dtype: str) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"Distillation: temperature={temperature} is not allowed; choose a positive value such as 2.0")
    if not 0 <= weight < float("inf"):
        raise ValueError(f"Distillation: weight={weight} is not allowed; choose a value that is not negative")
    if dtype not in _DTYPES:
        raise ValueError(f"Distillation: dtype={dtype!r} is not allowed; choose one of {sorted(_DTYPES)}")


def _with_temperature(loss: Loss, temperature: float) -> Loss:
    if "temperature" in inspect.signature(loss).parameters:
        return functools.partial(loss, temperature=temperature)
    if temperature != 2.0:
        raise ValueError(f"Distillation: temperature={temperature} has no effect: {loss!r} does not take one")
    return loss
