"""OrthogonalUpdates: quantized weights move by orthogonalized momentum, with the optimizer of the module."""

import fnmatch
from collections.abc import Iterator
from typing import Any, Final, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_qat.callbacks.freezing import OscillationFreezing
from lightning_qat.callbacks.measures import Slot, slots
from lightning_qat.callbacks.run_length import num_steps, run_length
from lightning_qat.callbacks.step_hooks import Arguments, hook_steps, remove
from lightning_qat.conversion.sharding import is_sharded
from lightning_qat.functional.orthogonal import orthogonalized
from lightning_qat.schedules import QuadraticRamp, Ramp, value_at

_LIKE_ADAM: Final = 0.2
"""Root mean square of what Adam-like optimizers move a weight by, in learning rates: arXiv:2502.16982 section 2.2."""

_MATRIX: Final = 2
_RATES: Final[dict[int, "float | Ramp"]] = {2: QuadraticRamp(0.0, start=2.5), 3: 2.0}
"""Of weights with so few levels, where no rate is given; 1 of others."""
_SETTLING: Final = QuadraticRamp(0.0, start=3.0)
_SETTLING_LEVELS: Final = range(3, 9)
"""Numbers of levels at which weights move by ``_SETTLING`` whose scales are recomputed from them."""


@final
class OrthogonalUpdates(pl.Callback):
    r"""Moves quantized weights by orthogonalized momentum (Muon), everything else as the module's optimizer does.

    Adam moves every latent weight by about the learning rate, also where its gradient is noise, and so codes at a
    border change at random. Here a weight matrix moves by the matrix that has the singular vectors of its momentum and
    singular values near 1: all directions that the batches agree on, at one pace. It pays with learned scales; where a
    scale is the mean of the weights themselves, as down from 3 bits, it pays most beside a ``GradualQuantization`` that
    lasts for most of the run, with steps that are long at first and short when rounding is complete. The figures, and
    what a float model would gain, are in ``benchmarks/README.md``.

    The learning rate, its schedule and the (decoupled) weight decay are those of the weight's parameter group: a step
    has the root mean square of one of Adam. The optimizer keeps no moments of these weights, so that its state is half
    as large for them. Kernels of convolutions count as (outputs, everything else). Momenta are in the checkpoint of the
    callback; a resumed run goes on bit-identically.

    The cost, for each m x n weight with m the shorter side: 20 m^2 n + 10 m^3 multiplications and additions per step
    (:func:`~lightning_qat.functional.orthogonal.orthogonalized`: where in bfloat16, where fewer); a layer's own three
    products of T tokens are 6 T m n. So it is dear where a step has few tokens: for square weights of 1024 and 8192
    tokens, five eighths of those products.

    Args:
        rate: factor of the learning rate for these weights, positive, also as a ramp over the run. None: 2 for weights
            of three levels, ``QuadraticRamp(0.0, start=2.5)`` for those of two levels, which do best when their signs
            settle early, and 1 for others; where scales are recomputed ``QuadraticRamp(0.0, start=3.0)`` for 3 to 8
            levels.
        momentum: of the gradients, in [0, 1).
        match: glob over dotted layer names.
        recomputed: whether also weights move like this whose scales are no parameters. None: those of 3 to 8 levels
            whose scales are recomputed from them in each step; others move as the optimizer moves them.

    Raises:
        ValueError: a value out of range. At fit start: a pattern that matches no quantized weight that trains, weights
            that are sharded, an optimizer that is not one of the Adam family, whose learning rates mean something
            else, or an ``OscillationFreezing`` listed before. When training starts: a rate that changes, and a run
            without end.

    Source: K. Jordan, Muon (2024), with Nesterov momentum; the scale of its steps: arXiv:2502.16982 section 2.2.
    Deviation: it acts on latent weights, whose gradients have come through rounding.

    Example::

        trainer = L.Trainer(callbacks=[QATCallback(recipes.seq2()), OrthogonalUpdates(), Distillation()])
    """

    def __init__(
        self,
        rate: float | Ramp | None = None,
        *,
        momentum: float = 0.9,
        match: str = "*",
        recomputed: bool | None = None,
    ) -> None:
        _check_rate(rate)
        if not isinstance(momentum, int | float) or not 0 <= momentum < 1:
            raise ValueError(f"OrthogonalUpdates: momentum={momentum!r} is not allowed; choose a number in [0, 1)")
        if recomputed is not None and not isinstance(recomputed, bool):
            raise ValueError(
                f"OrthogonalUpdates: recomputed={recomputed!r} is not allowed; choose True, False, or None for the "
                "default"
            )
        self.rate, self.momentum = float(rate) if isinstance(rate, int) else rate, float(momentum)
        self.match, self.recomputed = match, recomputed
        self._num_steps, self._done, self._scaled = float("inf"), 0.0, False
        self._weights: dict[Tensor, Slot] = {}
        self._momenta: dict[str, Tensor] = {}
        self._hidden: dict[Tensor, tuple[Tensor | None, float, float]] = {}
        self._handles: list[RemovableHandle] = []

    def __repr__(self) -> str:
        """Return an expression that evaluates back."""
        return (
            f"OrthogonalUpdates({self.rate!r}, momentum={self.momentum!r}, match={self.match!r}, "
            f"recomputed={self.recomputed!r})"
        )

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage == "fit":
            self._momenta = {}  # of an earlier fit; what a checkpoint holds comes after this

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        _check_order(self, trainer.callbacks)  # type: ignore[attr-defined]
        self._weights = _matrices(pl_module, self.match)
        if not any(self._takes(parameter) for parameter in self._weights):
            rank_zero_info(
                "OrthogonalUpdates: no weight has a learned scale, or one that is recomputed for 3 to 8 levels; "
                "all move as the optimizer moves them. recomputed=True would take them, too."
            )
        self._scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        for optimizer in trainer.optimizers:
            _check_optimizer(optimizer, [self._weights[p] for p, _ in self._taken(optimizer)], self._scaled)
        remove(self._handles)
        self._handles = hook_steps(trainer.optimizers, "OrthogonalUpdates", before=self._before, after=self._after)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        unknown = self._momenta.keys() - {_name(slot) for slot in self._weights.values()}
        if unknown:
            raise ValueError(
                f"OrthogonalUpdates: the checkpoint holds a momentum for {min(unknown)}, which match={self.match!r} "
                "does not choose now; give the match it was made with"
            )
        ramps = any(isinstance(self._rate(weight), Ramp) for weight in self._weights if self._takes(weight))
        if ramps:
            self._num_steps = num_steps(trainer, "OrthogonalUpdates: a rate that changes")
        else:  # ProgressiveBitWidth may come down to two levels later
            self._num_steps = run_length(trainer, "step") or float("inf")

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self._done = trainer.global_step / self._num_steps

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        remove(self._handles)
        self._show()
        self._weights = {}

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(self._momenta)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._momenta = dict(state_dict)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Let the optimizer find no gradients of the weights, also those that its closure computes."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._hide(optimizer)
            return None

        def hiding() -> Any:
            loss = closure()
            self._hide(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": hiding}

    def _taken(self, optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield the weights of an optimizer that move by this callback now, with their group."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._weights and self._takes(parameter):
                    yield parameter, group

    def _hide(self, optimizer: Optimizer) -> None:
        for parameter, group in self._taken(optimizer):
            slot = self._weights[parameter]
            if _name(slot) not in self._momenta:  # a grid of few levels may have come after the start
                _check_optimizer(optimizer, [slot], self._scaled)
            settings = float(group["lr"]), float(group.get("weight_decay") or 0.0)
            self._hidden[parameter] = parameter.grad, *settings
            parameter.grad = None

    def _show(self) -> None:
        for parameter, (gradient, _, _) in self._hidden.items():
            parameter.grad = gradient
        self._hidden = {}

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for parameter, (gradient, lr, weight_decay) in self._hidden.items():
            if gradient is not None:
                rate = value_at(self._rate(parameter), self._done)
                self._update(parameter, gradient, lr * rate, weight_decay)
        self._show()

    # Both are asked anew in each step: ProgressiveBitWidth may have changed the grid.

    def _takes(self, parameter: Tensor) -> bool:
        quantizer = self._weights[parameter].quantizer
        if self.recomputed is None and not quantizer.stored:
            return quantizer.grid.num_levels in _SETTLING_LEVELS
        return quantizer.learned or bool(self.recomputed)

    def _rate(self, parameter: Tensor) -> float | Ramp:
        quantizer = self._weights[parameter].quantizer
        levels = quantizer.grid.num_levels
        if self.rate is None and not quantizer.stored and levels in _SETTLING_LEVELS:
            return _SETTLING
        return self.rate or _RATES.get(levels, 1.0)

    def _update(self, parameter: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        name = _name(self._weights[parameter])
        momentum = self._momenta.get(name)
        if momentum is None:
            momentum = torch.zeros_like(parameter)
        self._momenta[name] = momentum = momentum.to(parameter.device).lerp_(gradient, 1 - self.momentum)
        matrix = gradient.lerp(momentum, self.momentum).flatten(1)
        step = orthogonalized(matrix).view_as(parameter)
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(step, alpha=-lr * _LIKE_ADAM * max(matrix.shape) ** 0.5)


def _check_rate(rate: Any) -> None:
    if isinstance(rate, Ramp):
        least, largest = rate.extremes
        allowed = least >= 0 and largest > 0
    else:
        allowed = rate is None or (isinstance(rate, int | float) and 0 < rate < float("inf"))
    if not allowed:
        raise ValueError(
            f"OrthogonalUpdates: rate={rate!r} is not allowed; choose a positive factor, a Ramp of factors that are "
            "not negative, or None for the default"
        )


def _check_order(callback: OrthogonalUpdates, callbacks: list[Any]) -> None:
    earlier = callbacks[: callbacks.index(callback)]
    if any(isinstance(other, OscillationFreezing) for other in earlier):
        raise ValueError(
            "OrthogonalUpdates: list it before OscillationFreezing, which has the last word on where weights are"
        )


def _name(slot: Slot) -> str:
    return f"{slot.layer}.{slot.kind}" if slot.layer else slot.kind


def _matrices(model: nn.Module, match: str) -> dict[Tensor, Slot]:
    """Return the quantized weights that are matrices and trained, by parameter.

    Raises:
        ValueError: there are none, or they are sharded.
    """
    found = [slot for slot in slots(model) if not slot.is_input]
    looked_up = {  # also where a linear layer shares them: their rows have gradients of their own
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    chosen: dict[Tensor, Slot] = {}
    for slot in found:
        parameter = slot.module._parameters.get(slot.kind)  # None where pruning or a parametrization computes it
        if parameter is None or not parameter.requires_grad or parameter in looked_up or parameter.dim() < _MATRIX:
            continue
        if fnmatch.fnmatchcase(slot.layer, match):
            if is_sharded(parameter):
                raise ValueError(
                    f"OrthogonalUpdates: {_name(slot)} is sharded (FSDP); use one device or DDP, or leave it out"
                )
            chosen.setdefault(parameter, slot)
    if not chosen:
        there = (
            f"there are {sorted({slot.layer for slot in found})[:8]}" if found else "list QATCallback(recipe) before"
        )
        raise ValueError(
            f"OrthogonalUpdates: match={match!r} matches no layer with a quantized weight that is a matrix, trains "
            f"as a parameter of its own, and is no embedding; {there}"
        )
    return chosen


def _check_optimizer(optimizer: Optimizer, held: list[Slot], scaled: bool) -> None:
    """Check that learning rates mean what they mean for Adam, and that gradients are seen unscaled."""
    kind = type(optimizer).__name__
    if held and "adam" not in kind.lower():
        raise ValueError(
            f"OrthogonalUpdates: {kind} trains {_name(held[0])}, and steps are scaled to rates of Adam; let "
            "configure_optimizers() return AdamW, or leave the layer out with match="
        )
    if held and scaled and any(group.get("fused") for group in optimizer.param_groups):
        raise ValueError(
            f"OrthogonalUpdates: a fused {kind} unscales gradients by itself, out of sight; build it with fused=False, "
            "or train with precision='bf16-mixed'"
        )
