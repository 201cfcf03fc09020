"""OscillationFreezing: weights that keep jumping between two levels stay at the one where they are most of the time."""

import fnmatch
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_qat.callbacks.measures import Slot, slots
from lightning_qat.callbacks.run_length import num_steps
from lightning_qat.callbacks.step_hooks import hook_steps, remove
from lightning_qat.conversion.sharding import is_sharded
from lightning_qat.conversion.view import adapter, latent, transformed
from lightning_qat.functional.levels import dequantize, quantize
from lightning_qat.functional.scaling import Sample
from lightning_qat.metrics.oscillation import OscillationState, start_oscillation, track_oscillation
from lightning_qat.quantization._checks import check_number
from lightning_qat.schedules import CosineRamp, Ramp, value_at

_THRESHOLD: Final = CosineRamp(0.01, start=0.1)


@final
class OscillationFreezing(pl.Callback):
    r"""Freezes weights whose code oscillates more often than a threshold, at the level that they visit most.

    After every optimizer step the frequency of oscillation of each weight, f = m o + (1 - m) f with o = 1 where its
    code changed against the direction of its last change, is compared with the threshold. Above it, the weight is
    frozen for the rest of the run: to the level nearest to the moving average of its codes (of the steps before), times
    the scale, which may go on learning. What an optimizer does to a frozen weight is taken back right after its step.

    What it is for: at 4 bits and less, and with few weights per output (depthwise convolutions), oscillating weights
    are noise in the loss and in the statistics of BatchNorm; freezing ends it without pulling at other weights, as
    dampening (``oscillation_dampening`` in `Regularization`) does. Costs 12 bytes per weight, in memory and in
    checkpoints, so that a resumed run is the same. Where the grid of a layer changes (`ProgressiveBitWidth`), it
    starts anew.

    Logged every ``log_every_n_steps``: ``freezing/frozen`` (share of the weights that match) and
    ``freezing/threshold``.

    Args:
        threshold: of the frequency, positive, at least 2 to 3 times ``momentum`` at first; a number, or a ramp of
            :mod:`lightning_qat.schedules`.
        momentum: weight of a step in both moving averages, 0 < momentum <= 1.
        match: glob over dotted layer names.

    Raises:
        ValueError: a number out of range. At fit start: a model that is not prepared, a pattern that matches no
            quantized weight, weights that are computed from others (adapters, parametrizations, transforms) or sharded,
            a ramp in a run without end.

    Source: arXiv:2203.11086, iterative weight freezing; 0.1 falling to 0.01 along a cosine is what its code uses for
    MobileNetV2 at 4 bits. Deviation: the latent weight is set, too, where the paper's code replaces the code of the
    forward, so that exports and averages of the latents agree.
    """

    def __init__(self, threshold: float | Ramp = _THRESHOLD, *, momentum: float = 0.01, match: str = "*") -> None:
        allowed = f"a positive number or ramp; default {_THRESHOLD}"
        for value in threshold.extremes if isinstance(threshold, Ramp) else (threshold,):
            check_number("OscillationFreezing: threshold", value, allowed, holds=lambda v: 0 < v < math.inf)
        allowed = "a number with 0 < momentum <= 1, such as 0.01"
        check_number("OscillationFreezing: momentum", momentum, allowed, holds=lambda v: 0 < v <= 1)
        self.threshold, self.momentum, self.match = threshold, momentum, match
        self._weights: dict[str, _Freezable] = {}
        self._restored: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []
        self._total_steps: float | None = None

    def __repr__(self) -> str:
        """Return an expression that evaluates back."""
        return f"OscillationFreezing({self.threshold!r}, momentum={self.momentum!r}, match={self.match!r})"

    @property
    def state_key(self) -> str:
        """Tell several for parts of one model apart."""
        return self._generate_state_key(match=self.match)

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage == "fit":
            self._restored = {}  # of an earlier fit; what a checkpoint holds comes after this

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        found = [slot for slot in slots(pl_module) if not slot.is_input]
        matching = [slot for slot in found if fnmatch.fnmatchcase(slot.layer, self.match)]
        if not matching:
            what = f"there are {[slot.layer for slot in found[:8]]}" if found else "add QATCallback(recipe)"
            raise ValueError(f"OscillationFreezing: match={self.match!r} matches no quantized weight; {what}")
        self._weights = {slot.name: _Freezable(slot, self.momentum) for slot in matching}
        for name, weight in self._weights.items():
            if name in self._restored:
                weight.load(self._restored[name])
        remove(self._handles)
        self._handles = hook_steps(trainer.optimizers, "OscillationFreezing", after=partial(self._stepped, trainer))

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._total_steps = num_steps(trainer, "OscillationFreezing") if isinstance(self.threshold, Ramp) else None

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer._logger_connector.should_update_logs:
            return
        frozen = torch.stack([weight.num_frozen() for weight in self._weights.values()]).sum()
        share = frozen / sum(weight.parameter.numel() for weight in self._weights.values())
        end = "" if self.match == "*" else f"/{self.match}"
        values = {"frozen": share, "threshold": torch.tensor(self._present_threshold(trainer))}
        pl_module.log_dict({f"freezing/{k}{end}": v for k, v in values.items()}, on_step=True, on_epoch=False)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        remove(self._handles)
        if stage == "fit":
            self._restored = self.state_dict()
            self._weights = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {name: weight.state() for name, weight in self._weights.items()} or self._restored

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def _present_threshold(self, trainer: "pl.Trainer") -> float:
        share = 0.0 if self._total_steps is None else trainer.global_step / self._total_steps
        return value_at(self.threshold, share)

    def _stepped(self, trainer: "pl.Trainer", optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        threshold = self._present_threshold(trainer)
        for name, weight in self._weights.items():
            if id(weight.parameter) in own and weight.step(threshold):
                rank_zero_info(f"OscillationFreezing: {name} starts anew on {weight.grid.label}")


@final
class _Freezable:
    """What is known of one weight; tensors have the shape in which scales broadcast to the weight."""

    def __init__(self, slot: Slot, momentum: float) -> None:
        self.slot, self.momentum = slot, momentum
        self.parameter = _own_parameter(slot)
        self.grid = slot.quantizer.grid
        self.state_: OscillationState | None = None
        self.average: Tensor
        self.frozen: Tensor

    @torch.no_grad()
    def step(self, threshold: float) -> bool:
        """Look at the codes after an optimizer step, freeze, put frozen weights back; True where the grid changed."""
        quantizer = self.slot.quantizer
        if quantizer.stale or not quantizer.enabled:
            return False
        granularity, layout = quantizer.spec.granularity, quantizer.layout
        grouped = granularity.group(self.parameter.detach(), layout)
        step, zero = quantizer.step_and_zero_point(Sample(grouped, granularity.dims(grouped.dim(), layout)))
        lo, hi = quantizer.grid.bounds
        codes = quantize(grouped, step, zero, lo=lo, hi=hi, rounding=quantizer.grid)
        changed = quantizer.grid != self.grid
        if self.state_ is None or changed:
            self.grid = quantizer.grid
            self.state_, self.average = start_oscillation(codes), codes.float()
            self.frozen = torch.zeros_like(codes, dtype=torch.bool)
            return changed
        codes = torch.where(self.frozen, self.state_.codes.to(codes.dtype), codes)
        state = track_oscillation(self.state_, codes, momentum=self.momentum)
        new = (state.frequency > threshold) & ~self.frozen
        codes = torch.where(new, quantizer.grid.round_(self.average.clone()).clamp_(lo, hi).to(codes.dtype), codes)
        self.state_ = state._replace(codes=codes.to(state.codes.dtype))
        self.average = self.average.lerp(codes.float(), self.momentum)
        self.frozen = self.frozen | new
        put_back = torch.where(self.frozen, dequantize(codes, step, zero).to(grouped.dtype), grouped)
        self.parameter.copy_(granularity.ungroup(put_back, tuple(self.parameter.shape), layout))
        return False

    def num_frozen(self) -> Tensor:
        """Return how many weights are frozen."""
        return torch.zeros((), device=self.parameter.device) if self.state_ is None else self.frozen.sum().float()

    def state(self) -> dict[str, Any]:
        """Return plain data and tensors."""
        if self.state_ is None:
            return {}
        return {"grid": repr(self.grid), **self.state_._asdict(), "average": self.average, "frozen": self.frozen}

    def load(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint stopped, unless that was on another grid."""
        if state.get("grid") != repr(self.slot.quantizer.grid):
            return
        device = self.parameter.device
        self.grid = self.slot.quantizer.grid
        self.state_ = OscillationState(*(state[name].to(device) for name in OscillationState._fields))
        self.average, self.frozen = state["average"].to(device), state["frozen"].to(device)


def _own_parameter(slot: Slot) -> nn.Parameter:
    """Return the parameter that a weight is."""
    weight = latent(slot.module, slot.kind)
    problems: dict[str, Callable[[], bool]] = {
        "is sharded": lambda: is_sharded(weight),
        "is computed from other parameters (weight_norm, pruning)": lambda: not isinstance(weight, nn.Parameter),
        "has low-rank adapters": lambda: adapter(slot.module, slot.kind) is not None,
        "is transformed before it is quantized": lambda: transformed(slot.module, weight) is not weight,
    }
    for problem, holds in problems.items():
        if holds():
            raise ValueError(
                f"OscillationFreezing: the weight of {slot.layer} {problem}, so that it cannot be set to a level; "
                "leave the layer out with match=..."
            )
    assert isinstance(weight, nn.Parameter)  # noqa: S101 - see above
    return weight
