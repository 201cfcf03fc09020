"""Distillation: a frozen teacher adds its loss to the user's own."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_qat.callbacks.attachment import ModuleHooks, attach, detach
from lightning_qat.callbacks.capture import (
    Call,
    capturing,
    check_ran,
    describe,
    find_module,
    find_tensor,
    forget_compiled,
    module_names,
)
from lightning_qat.callbacks.fading import faded
from lightning_qat.callbacks.feature_match import FeatureMatch
from lightning_qat.callbacks.masks import ignored_targets
from lightning_qat.callbacks.output_loss import TEMPERATURE, Loss, OutputLoss, name_of, parameters
from lightning_qat.callbacks.reasoning import ReasoningMatch
from lightning_qat.callbacks.run_length import num_steps
from lightning_qat.callbacks.teacher import Teacher, TeacherSource
from lightning_qat.losses import kl_divergence, top1_agreement
from lightning_qat.quantization._checks import check_positive
from lightning_qat.schedules import Ramp, value_at

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "same": None}


@final
class Distillation(pl.Callback, ModuleHooks):
    r"""Adds :math:`weight \cdot L(student, teacher)` to the loss of ``training_step``, once per student forward.

    Automatic and manual optimization, accumulation and loss scaling work as without it. The teacher runs in evaluation
    mode without gradients on the very inputs of the student; it is in no ``state_dict``, parameter list, EMA or DDP
    bucket of the module, and its random numbers do not shift the student's. A resumed run meets the same teacher: its
    weights are in the checkpoint (None), or a hash of them is, and another teacher is an error.

    Logged every ``log_every_n_steps``: ``distillation/task_loss``, ``/loss``, ``/ratio`` (of weighted distillation loss
    to task loss), ``/top1_agreement`` with the teacher, ``/features`` where layers are matched, and ``/reasoning`` with
    ``/reasoning_step``, ``/reasoning_trajectory`` and ``/reasoning_answer`` where steps of reasoning are, and
    ``/temperature`` while it may rise (``max_odds``).

    Args:
        teacher: None for a copy of the latent float weights at fit start (kept in checkpoints: the size of the float
            weights), a module, a factory of one, or the path of a checkpoint, Lightning's or a ``state_dict``.
        temperature: softens both distributions, positive; for losses that take one and multiply by its square,
            as ours do.
        weight: factor of the teacher's loss, not negative.
        fade_below: loss of the task, in its units, below which that weight falls in proportion to it; 1 nat served
            cross-entropies best. None: it does not. In manual optimization it is the loss of each backward. Labels that
            are certain say more than a teacher, whose errors the student would learn, too; where they are noisy nothing
            changes. Only in the first epoch: when samples repeat, the loss also falls by heart, and the weight stays.
        max_odds: from the second epoch on, how many times as likely as its second choice a teacher may hold its first,
            as the geometric mean over the positions of a batch, above 1; 100 served. Where it is surer, as of samples
            that it knows by heart, the temperature rises until it is not: its other choices say more than labels do.
            None: it does not.
        loss: function of (student, teacher) outputs; ``temperature`` and ``mask`` are passed if it takes them. For
            regression use :func:`lightning_qat.losses.mean_squared_error`.
        module: dotted path of the submodule whose outputs are matched; "" finds it: the LightningModule itself if its
            forward runs, else the one child with parameters that does.
        select: takes the tensor to match from an output; by default a tensor, ``logits`` of a dict or object, the
            only floating tensor of a dict, the first of a tuple.
        mask: function of the batch that returns which positions count, `TargetMask`, `BatchMask` or
            ``lambda batch: next_token_mask(batch["labels"])``; by default all do, with a warning where the batch holds
            targets of -100.
        features: layers inside the model that follow the teacher's, too; ``(FeatureMatch(),)`` for its blocks.
        reasoning: steps of reasoning that follow the teacher's, too; adds its own weight times its own loss.
        dtype: ``"same"`` as the student, or ``"bfloat16"`` to halve the teacher's memory.

    Raises:
        TypeError: a mask that is no function, or features and reasoning of another kind.
        ValueError: values out of range, a path without file, an option that the loss does not take. At fit start: names
            that match nothing. In the first step: outputs among which it cannot choose; messages list the candidates.

    Source: arXiv:1503.02531; ``fade_below`` and ``max_odds`` are ours.
    """

    def __init__(
        self,
        teacher: TeacherSource | None = None,
        *,
        temperature: float = TEMPERATURE,
        weight: float = 4.0,
        fade_below: float | None = None,
        max_odds: float | None = None,
        loss: Loss = kl_divergence,
        module: str = "",
        select: Callable[[Any], Tensor] | None = None,
        mask: Callable[[Any], Tensor] | None = None,
        features: tuple[FeatureMatch, ...] = (),
        reasoning: ReasoningMatch | None = None,
        dtype: Literal["same", "float32", "bfloat16"] = "same",
    ) -> None:
        _check(weight=weight, fade_below=fade_below, dtype=dtype)
        _check_kinds(mask=mask, features=features, reasoning=reasoning)
        self.teacher = Teacher(teacher, dtype=_DTYPES[dtype])
        self.temperature, self.weight, self.loss, self.dtype = temperature, weight, loss, dtype
        self.fade_below, self.max_odds = fade_below, max_odds
        self.module, self.select, self.mask, self.features = module, select, mask, tuple(features)
        self.reasoning = reasoning
        self._output_loss = OutputLoss(loss, temperature, max_odds, takes_mask=mask is not None)
        self._target: str | None = module or None
        self._layers: list[dict[str, nn.Module]] = []
        self._reasoning_layer: dict[str, nn.Module] = {}
        self._calls: list[Call] = []
        self._batch: Any = None
        self._num_steps = 1.0
        self._compiled_step: Any = None

    def __repr__(self) -> str:
        """Return an expression that evaluates back, where no function or module of the user is in it."""
        defaults = {name: p.default for name, p in inspect.signature(type(self)).parameters.items()}
        given = {name: self.teacher.source if name == "teacher" else getattr(self, name) for name in defaults}
        shown = [f"{name}={name_of(value)}" for name, value in given.items() if value is not defaults[name]]
        return f"Distillation({', '.join(shown)})"

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage == "fit":
            attach(pl_module)
            # Of a compiled module, training_step would be compiled without us; its forward stays compiled.
            self._compiled_step = pl_module.__dict__.pop("training_step", None)
            self._target = self.module or ("" if self._compiled_step is not None else None)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if self._compiled_step is not None:
            pl_module.__dict__["training_step"] = self._compiled_step
            self._compiled_step = None
        self._calls, self._batch, self._layers, self._reasoning_layer = [], None, [], {}
        detach(pl_module)

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self.module:
            find_module(pl_module, self.module, "module")
        if self.features or self.reasoning is not None:
            forget_compiled()
        self._layers = [feature.find_layers(pl_module) for feature in self.features]
        self._reasoning_layer = {} if self.reasoning is None else self.reasoning.find_layer(pl_module)
        self.teacher.build(pl_module)
        missing = [name for name in self._inside() if not self.teacher.has(self._in_teacher(name))]
        if missing:
            raise ValueError(
                f"Distillation: the teacher has no layer {missing[0]!r} (and lacks {len(missing) - 1} more that "
                "FeatureMatch or ReasoningMatch names); match layers that both have"
            )

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if any(isinstance(feature.weight, Ramp) for feature in self.features):
            self._num_steps = num_steps(trainer, "Distillation: FeatureMatch without weight=<number>")

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        if self._batch is None and self.mask is None and "mask" in parameters(self.loss):
            _warn_of_ignored_targets(batch)
        self._batch = batch

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
        with capturing(self._candidates(pl_module), self._inside()) as self._calls:
            yield

    def _inside(self) -> dict[str, nn.Module]:
        """Return the layers inside the model whose outputs are compared, by name."""
        return {name: module for matched in (*self._layers, self._reasoning_layer) for name, module in matched.items()}

    def _candidates(self, pl_module: "pl.LightningModule") -> dict[str, nn.Module]:
        if self._target is not None:
            return {self._target: pl_module.get_submodule(self._target)}
        children = {
            name: child for name, child in pl_module.named_children() if next(child.parameters(), None) is not None
        }
        return {"": pl_module, **children}

    @override
    def training_step_done(self, pl_module: "pl.LightningModule", output: Any, batch: Any) -> Any:
        if not pl_module.automatic_optimization or output is None:
            return output
        task = output["loss"] if isinstance(output, dict) else output
        total = self._added(pl_module, task)
        return {**output, "loss": total} if isinstance(output, dict) else total

    @override
    def before_manual_backward(self, pl_module: "pl.LightningModule", loss: Tensor) -> Tensor:
        return self._added(pl_module, loss) if self._calls else loss

    def _added(self, pl_module: "pl.LightningModule", task: Tensor) -> Tensor:
        calls, self._calls[:] = self._matched_calls(pl_module), []
        mask = None if self.mask is None else self.mask(self._batch)
        new = task if pl_module.current_epoch == 0 else None  # later, a low loss does not tell what is learned
        terms = [self._terms(call, mask, new, pl_module) for call in calls]
        total = torch.stack([term["total"].to(task.device) for term in terms]).sum()
        if pl_module.trainer._logger_connector.should_update_logs:  # at other steps nobody would see it
            self._log(pl_module, task, total, terms)
        return task + total

    def _terms(
        self, call: Call, mask: Tensor | None, task: Tensor | None, pl_module: "pl.LightningModule"
    ) -> dict[str, Tensor]:
        layers = {name: self.teacher.counterpart(self._in_teacher(name)) for name in self._inside()}
        output, theirs = self.teacher(call.name, call.args, call.kwargs, layers)
        student = self._tensor(call.output, call.name, pl_module)
        teacher = self._tensor(output, call.name, pl_module)
        loss, temperature = self._output_loss(student, teacher, mask, repeated=task is None)
        terms = {"loss": loss, "total": faded(loss, self.weight, self.fade_below, task)}
        if temperature is not None:
            terms["temperature"] = temperature
        if self.features:
            done = pl_module.trainer.global_step / self._num_steps
            terms["features"] = self._feature_loss(call.features, theirs, mask, task, done)
            terms["total"] = terms["total"] + terms["features"]
        if self.reasoning is not None:
            terms |= self._reasoning_terms(self.reasoning, (call.features, student), (theirs, teacher))
            terms["total"] = terms["total"] + self.reasoning.weight * terms["reasoning"]
        if student.dim() > 1 and pl_module.trainer._logger_connector.should_update_logs:
            agreement_mask = mask if mask is None or mask.shape == student.shape[:-1] else None
            terms["top1_agreement"] = top1_agreement(student.detach(), teacher, mask=agreement_mask)
        return terms

    def _feature_loss(
        self, ours: dict[str, Any], theirs: dict[str, Any], mask: Tensor | None, task: Tensor | None, done: float
    ) -> Tensor:
        losses = []
        for feature, matched in zip(self.features, self._layers, strict=True):
            loss = feature.mean_loss(matched, ours, theirs, mask)
            losses.append(faded(loss, value_at(feature.weight, done), feature.fade_below, task))
        return torch.stack(losses).sum()

    def _reasoning_terms(
        self, reasoning: ReasoningMatch, ours: tuple[dict[str, Any], Tensor], theirs: tuple[dict[str, Any], Tensor]
    ) -> dict[str, Tensor]:
        (name,) = self._reasoning_layer
        check_ran(name, ours[0], f"ReasoningMatch(match={reasoning.match!r})")
        terms = reasoning.terms((ours[0][name], ours[1]), (theirs[0][name], theirs[1]), self._batch)
        return {
            "reasoning": terms.total,
            "reasoning_step": terms.step,
            "reasoning_trajectory": terms.trajectory,
            "reasoning_answer": terms.answer,
        }

    def _in_teacher(self, name: str) -> str:
        """Return a layer's name in the teacher, which may be no more than the student's matched submodule."""
        inside = name.removeprefix(f"{self._target}.") if self._target else name
        return name if self.teacher.has(name) else inside

    def _matched_calls(self, pl_module: "pl.LightningModule") -> list[Call]:
        names = list(dict.fromkeys(call.name for call in self._calls))
        if "" in names:
            names = [""]
        if len(names) != 1:
            found = f"several children ran: {names}" if names else "no forward of the module or its children was seen"
            raise ValueError(
                f"Distillation: cannot tell which outputs to match: {found}. Name one with Distillation(module=...); "
                f"candidates: {names or module_names(pl_module)[:10]}"
            )
        self._target = names[0]
        return [call for call in self._calls if call.name == names[0]]

    def _tensor(self, output: Any, name: str, pl_module: "pl.LightningModule") -> Tensor:
        found = self.select(output) if self.select is not None else find_tensor(output)
        if found is None:
            raise ValueError(
                f"Distillation: cannot tell which tensor of the output of {name or type(pl_module).__name__!r} to "
                f"match, which is {describe(output)}; pass Distillation(select=lambda output: ...)"
            )
        return found

    def _log(
        self, pl_module: "pl.LightningModule", task: Tensor, total: Tensor, terms: list[dict[str, Tensor]]
    ) -> None:
        task, total = task.detach(), total.detach()
        values = {"task_loss": task, "ratio": total / task.abs().clamp(min=1e-12)}
        for name in terms[0].keys() - {"total"}:
            combine = torch.mean if name in ("top1_agreement", "temperature") else torch.sum
            values[name] = combine(torch.stack([term[name].detach() for term in terms if name in term]))
        named = {f"distillation/{name}": value for name, value in values.items()}
        pl_module.log_dict(named, on_step=True, on_epoch=False, batch_size=1)


def _check(*, weight: float, fade_below: float | None, dtype: str) -> None:
    if not 0 <= weight < float("inf"):
        raise ValueError(f"Distillation: weight={weight} is not allowed; choose a value that is not negative")
    if fade_below is not None:
        check_positive("Distillation: fade_below", fade_below)
    if dtype not in _DTYPES:
        raise ValueError(f"Distillation: dtype={dtype!r} is not allowed; choose one of {sorted(_DTYPES)}")


def _check_kinds(*, mask: Any, features: Any, reasoning: Any) -> None:
    if mask is not None and not callable(mask):
        raise TypeError(
            f"Distillation: mask={mask!r} is no function of the batch; pass TargetMask({mask!r}) or your own"
        )
    if isinstance(features, FeatureMatch) or not all(isinstance(each, FeatureMatch) for each in features):
        raise TypeError(f"Distillation: features={features!r} is no tuple of FeatureMatch; pass (FeatureMatch(...),)")
    if reasoning is not None and not isinstance(reasoning, ReasoningMatch):
        raise TypeError(f"Distillation: reasoning={reasoning!r} is no ReasoningMatch; pass ReasoningMatch(layer, ...)")


def _warn_of_ignored_targets(batch: Any) -> None:
    found = ignored_targets(batch)
    if found is not None:
        key, share = found
        rank_zero_warn(
            f"Distillation: {share:.0%} of batch[{key!r}] are -100, which losses leave out, but the teacher's loss "
            f"counts every position. Pass mask=TargetMask({key!r}) where targets and logits are aligned, or "
            f"mask=lambda batch: next_token_mask(batch[{key!r}]) where they are shifted inside the model."
        )
