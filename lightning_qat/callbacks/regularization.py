"""Regularization: penalties on latent weights, added to the user's loss."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, final

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_qat.callbacks.attachment import ModuleHooks, attach, detach
from lightning_qat.callbacks.measures import Slot, slots
from lightning_qat.callbacks.parameter_group import stored_parameters
from lightning_qat.callbacks.penalty import Penalty, quantities
from lightning_qat.callbacks.run_length import num_steps
from lightning_qat.schedules import Ramp, value_at


@final
class Regularization(pl.Callback, ModuleHooks):
    """Adds penalties on latent weights to the loss of ``training_step``, once per step.

    What each is for: ``grid_distance`` pulls weights to their levels, so that quantization changes less and less (let
    its weight rise over the run); ``bin_regularization`` does so with equal say for every level of the grid;
    ``oscillation_dampening`` keeps weights away from the thresholds between levels; ``sparsity`` pulls them to zero,
    for ternary grids and pruning; ``smoothness`` pulls neighbors together, for kernels of convolutions and tables of
    positions. Details and sources: :mod:`lightning_qat.losses.regularization`.

    Accumulation, loss scaling and gradient clipping treat the penalties as part of the loss. With manual optimization
    a weight's penalty is part of the first loss given to ``manual_backward`` that depends on the weight, again after
    its optimizer has stepped. Frozen weights have none.

    Logged every ``log_every_n_steps``: ``regularization/loss`` (the sum that is added), and for each penalty
    ``regularization/<loss>`` (without its weight) and ``regularization/<loss>_weight``.

    Args:
        penalties: at least one.

    Raises:
        TypeError: one is no `Penalty`, or it is no list.
        ValueError: none is given, or one twice. At fit start: a model that is not prepared, a pattern that matches no
            quantized weight, a ramp in a run without end.

    Example::

        Regularization([Penalty(losses.grid_distance, weight=CosineRamp(1e-2, begin=0.5))])
    """

    def __init__(self, penalties: Iterable[Penalty]) -> None:
        if isinstance(penalties, Penalty):
            raise TypeError(f"Regularization: penalties={penalties!r} is one; give a list, [{penalties!r}]")
        self.penalties = tuple(penalties)
        for penalty in self.penalties:
            if not isinstance(penalty, Penalty):
                raise TypeError(f"Regularization: {penalty!r} is not a Penalty; try Penalty({penalty!r}, weight=0.01)")
        if not self.penalties:
            raise ValueError("Regularization: no penalty given; try [Penalty(losses.grid_distance, weight=0.01)]")
        self._keys = [f"{p.name}/{p.match}" if self._is_repeated(p) else p.name for p in self.penalties]
        if len(set(self._keys)) < len(self._keys):
            raise ValueError(f"Regularization: the same loss for the same layers twice in {self.penalties}")
        self._weights: dict[Slot, list[int]] = {}
        self._done: set[Slot] = set()
        self._total_steps: float | None = None

    def __repr__(self) -> str:
        """Return an expression that evaluates back."""
        return f"Regularization({self.penalties!r})"

    def _is_repeated(self, penalty: Penalty) -> bool:
        return sum(each.name == penalty.name for each in self.penalties) > 1

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage == "fit":
            attach(pl_module)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._weights, self._done = {}, set()
        detach(pl_module)

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        weights = [slot for slot in slots(pl_module) if not slot.is_input]
        if not weights:
            raise ValueError(
                "Regularization: the model has no quantized weights; add QATCallback(recipe) to the callbacks"
            )
        for penalty in self.penalties:
            if not any(penalty.matches(slot) for slot in weights):
                layers = ", ".join(repr(slot.layer) for slot in weights[:8])
                raise ValueError(f"Regularization: {penalty} matches no quantized weight; there are {layers}")
        found = {slot: [i for i, each in enumerate(self.penalties) if each.matches(slot)] for slot in weights}
        self._weights = {slot: indices for slot, indices in found.items() if indices}

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        ramps = any(isinstance(penalty.weight, Ramp) for penalty in self.penalties)
        self._total_steps = num_steps(trainer, "Regularization: a Ramp") if ramps else None

    @override
    def running_training_step(self, pl_module: "pl.LightningModule") -> AbstractContextManager[Any]:
        return self._anew()

    @contextmanager
    def _anew(self) -> Iterator[None]:
        self._done = set()
        yield

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._done = {slot for slot in self._done if stepped.isdisjoint(_trained(slot))}

    @override
    def training_step_done(self, pl_module: "pl.LightningModule", output: Any, batch: Any) -> Any:
        if not pl_module.automatic_optimization or output is None:
            return output
        task = output["loss"] if isinstance(output, dict) else output
        total = self._added(pl_module, task, [slot for slot in self._weights if _trained(slot)])
        return {**output, "loss": total} if isinstance(output, dict) else total

    @override
    def before_manual_backward(self, pl_module: "pl.LightningModule", loss: Tensor) -> Tensor:
        reached = None if len(pl_module.trainer.optimizers) == 1 else _leaves(loss)
        now = [slot for slot in self._weights if slot not in self._done and _trained(slot)]
        if reached is not None:
            now = [slot for slot in now if not reached.isdisjoint(_trained(slot))]
        self._done.update(now)
        return self._added(pl_module, loss, now)

    def _added(self, pl_module: "pl.LightningModule", task: Tensor, weights: list[Slot]) -> Tensor:
        if not weights:
            return task
        terms: list[list[Tensor]] = [[] for _ in self.penalties]
        for slot in weights:
            chosen = [(index, self.penalties[index]) for index in self._weights[slot]]
            values = quantities(slot, {name for _, penalty in chosen for name in penalty.takes})
            for index, penalty in chosen:
                term = penalty.loss(**{name: values[name] for name in penalty.takes})
                terms[index].append(term.to(task.device))
        sums = {index: torch.stack(found).sum() for index, found in enumerate(terms) if found}
        share = 0.0 if self._total_steps is None else pl_module.trainer.global_step / self._total_steps
        factors = {index: value_at(self.penalties[index].weight, share) for index in sums}
        total = torch.stack([factors[index] * value for index, value in sums.items()]).sum()
        if pl_module.trainer._logger_connector.should_update_logs:  # at other steps nobody would see it
            named = {f"regularization/{self._keys[index]}": value.detach() for index, value in sums.items()}
            named |= {f"regularization/{self._keys[index]}_weight": torch.tensor(f) for index, f in factors.items()}
            named["regularization/loss"] = total.detach()
            pl_module.log_dict(named, on_step=True, on_epoch=False, batch_size=1)
        return task + total


def _trained(slot: Slot) -> set[int]:
    """Return the ids of the parameters that a weight is made of, where they train."""
    return {id(parameter) for parameter in stored_parameters(slot.module, slot.kind) if parameter.requires_grad}


def _leaves(loss: Tensor) -> set[int]:
    """Return the ids of the parameters that a loss depends on."""
    found: set[int] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        waiting += [following for following, _ in node.next_functions]
    return found
