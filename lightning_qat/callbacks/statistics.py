"""QuantizationStatistics: what quantization does to each layer, into the logger."""

import math
from typing import Any, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_qat.callbacks.advice import Bounds, advice
from lightning_qat.callbacks.bit_width import is_compiled, logged_step
from lightning_qat.callbacks.history import History
from lightning_qat.callbacks.measures import InputMetrics, Measured, Slot, measure, slots, totals, weight_values
from lightning_qat.callbacks.oscillation import Oscillation
from lightning_qat.callbacks.tensorboard import add_histograms, add_page, heat_map, writers
from lightning_qat.conversion.view import TRANSFORMS, latent
from lightning_qat.metrics import gradient_norm

_HISTOGRAM_EVERY = 4


@final
class QuantizationStatistics(pl.Callback):
    """Logs per layer, and in total, what quantization does to weights and inputs.

    Under ``quantization/<layer>/<weight or input>/`` stand ``sqnr`` (dB), ``relative_error``, ``mse``, ``clip_rate``,
    ``entropy`` (bits of the width in use), ``zero_rate``, ``scale_min``, ``scale_median``, ``scale_max``; of weights
    also ``gradient_norm`` (of the latent weight, before clipping), ``effective_bits`` and ``size`` (bytes, scales
    included); and likewise under ``quantization/total/``. All loggers get these as scalars. TensorBoard also gets
    histograms of latent against quantized weights, a heat map of layers over time, and a layout of custom scalars that
    explains the page.

    Warns once per layer, with what to do, of dead layers, values outside the range, collapsed scales and oscillation.

    Cost: on steps that are not due, one comparison. On a due step about 1 ms per quantized tensor for numbers and
    writing, see ``benchmarks/README.md``; a tensor of more than ``max_values`` is looked at in rows and columns at
    equal distances (the same ones always). Memory: some kilobytes per quantized tensor, and its scales. Of compiled
    models inputs are not measured.

    Args:
        every_n_steps: optimizer steps between measurements, counted as ``Trainer(log_every_n_steps)`` does; positive.
        max_values: about how many values of a tensor to look at, positive.
        oscillation_samples: how many weights of each layer to watch at every step for ``oscillation_rate`` and
            ``flip_rate`` (arXiv:2203.11086); 0 is off. They take 34 bytes each, and some 0.3 ms per layer and step.
        bounds: where to warn.

    Raises:
        ValueError: numbers out of range; at fit start: a model that is not prepared.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        *,
        max_values: int = 65536,
        oscillation_samples: int = 0,
        bounds: Bounds | None = None,
    ) -> None:
        _check(every_n_steps=every_n_steps, max_values=max_values, oscillation_samples=oscillation_samples + 1)
        self.every_n_steps, self.max_values = every_n_steps, max_values
        self.oscillation_samples = oscillation_samples
        self.bounds = bounds or Bounds()
        self.history = History()
        self._oscillation = Oscillation(oscillation_samples)
        self._slots: list[Slot] = []
        self._metrics: dict[str, InputMetrics] = {}
        self._weights: dict[str, dict[str, Tensor]] = {}
        self._gradients: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._warned: set[tuple[str, str]] = set()
        self._due = False

    def __repr__(self) -> str:
        """Return an expression that evaluates back."""
        return (
            f"QuantizationStatistics(every_n_steps={self.every_n_steps}, max_values={self.max_values}, "
            f"oscillation_samples={self.oscillation_samples}, bounds={self.bounds!r})"
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.state_dict(), "oscillation": self._oscillation.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history.load_state_dict(state_dict["history"])
        self._oscillation.load_state_dict(state_dict["oscillation"])

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage == "fit" and trainer.global_step == 0:  # of another run; a checkpoint brings its own after this hook
            self.history, self._oscillation, self._warned = History(), Oscillation(self.oscillation_samples), set()

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        found = slots(pl_module)
        if not found:
            raise ValueError(
                "QuantizationStatistics: the model is not prepared; add QATCallback(recipe) to the callbacks, or call "
                "prepare(model, recipe) before"
            )
        compiled = is_compiled(pl_module)
        if compiled and any(slot.is_input for slot in found):
            rank_zero_info("QuantizationStatistics: inputs of a compiled model are not measured.")
        sharded = [s for s in found if not s.is_input and hasattr(latent(s.module, s.kind), "placements")]
        if sharded:
            rank_zero_warn("QuantizationStatistics: sharded weights are not measured; use DDP to see them.")
        self._slots = [s for s in found if s not in sharded and not (compiled and s.is_input)]
        self._metrics = {slot.name: InputMetrics() for slot in self._slots if slot.is_input}
        self._oscillation.start([slot for slot in self._slots if not slot.is_input])
        for writer in writers(trainer.loggers):
            add_page(writer)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self._due = logged_step(trainer) % self.every_n_steps == 0
        if self._due:
            self._handles = [
                slot.module.register_forward_pre_hook(_InputHook(self, slot), with_kwargs=True, prepend=True)
                for slot in self._slots
                if slot.is_input
            ]

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        if self._due:
            trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for slot in self._slots:
                weight = None if slot.is_input else latent(slot.module, slot.kind)
                if weight is not None and id(weight) in trained and weight.grad is not None:
                    self._gradients[slot.name] = gradient_norm(weight.grad)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.oscillation_samples:
            self._oscillation.update(trainer.global_step)
        if self._due:
            self._remove_hooks()
            if not trainer.fit_loop._should_accumulate():
                self._measure(trainer, pl_module)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._draw(trainer)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._remove_hooks()
        self._slots, self._metrics, self._gradients, self._due = [], {}, {}, False

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _measure(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        step = logged_step(trainer)
        with_histograms = (step // self.every_n_steps) % _HISTOGRAM_EVERY == 0
        for slot in self._slots:
            if not slot.is_input:
                measured = measure(slot.quantizer, slot.weight(), max_values=self.max_values)
                self._weights[slot.name] = weight_values(measured, slot.quantizer)
                if with_histograms:
                    _write_histograms(trainer, slot, measured, step)
        rows = self._computed()
        self._weights.clear()
        self._gradients.clear()
        self._log(trainer, pl_module, rows, step)
        self._warn(rows)
        weights = [slot.name for slot in self._slots if not slot.is_input]
        if self.history.add(weights, step, [rows[name]["sqnr"] for name in weights]):
            self._draw(trainer)

    def _computed(self) -> dict[str, dict[str, float]]:
        """Return the numbers of all tensors; they leave the accelerator together."""
        inputs = {name: metrics.compute() for name, metrics in self._metrics.items() if not metrics.is_empty}
        found = {**self._weights, **inputs}
        for name, norm in self._gradients.items():
            found[name]["gradient_norm"] = norm
        for name, rates in self._oscillation.compute().items():
            found[name] |= rates
        flat = [value.reshape(()).double() for values in found.values() for value in values.values()]
        numbers = iter(torch.stack(flat).tolist())
        rows = {name: {key: next(numbers) for key in values} for name, values in found.items()}
        for slot in self._slots:
            if not slot.is_input:
                rows[slot.name]["effective_bits"], rows[slot.name]["size"] = slot.storage()
        return rows

    def _log(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", rows: dict[str, dict[str, float]], step: int
    ) -> None:
        total = _total(pl_module, self._slots, rows)
        hidden = ("signal", "collapsed")
        values = {
            f"quantization/{name}/{key}": value
            for name, row in (*rows.items(), *total.items())
            for key, value in row.items()
            if key not in hidden and math.isfinite(value)
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        totals_only = {key: value for key, value in values.items() if key.startswith("quantization/total/")}
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in totals_only.items()})

    def _warn(self, rows: dict[str, dict[str, float]]) -> None:
        for name, values in rows.items():
            for problem, sentence in advice(name, values, self.bounds):
                if (name, problem) not in self._warned:
                    self._warned.add((name, problem))
                    rank_zero_warn(f"QuantizationStatistics: {sentence}")

    def _draw(self, trainer: "pl.Trainer") -> None:
        if self.history.steps:
            for writer in writers(trainer.loggers):
                layers = [name.removesuffix("/weight") for name in self.history.layers]
                figure = heat_map(layers, self.history.steps, self.history.table())
                writer.add_figure("quantization/heat_map", figure, self.history.steps[-1], close=False)


class _InputHook:
    """A forward pre-hook that measures the input of a layer before it is quantized."""

    def __init__(self, statistics: QuantizationStatistics, slot: Slot) -> None:
        self.statistics, self.slot = statistics, slot

    @torch.no_grad()
    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()), None)
        quantizer = self.slot.quantizer
        if x is None or quantizer.observer is not None or not quantizer.enabled or not layer.training:
            return
        transforms: Any = layer._modules.get(TRANSFORMS) or ()
        for transform in transforms:
            x = transform.input(x)
        measured = measure(quantizer, x, max_values=self.statistics.max_values)
        self.statistics._metrics[self.slot.name].update(measured, quantizer)


def _write_histograms(trainer: "pl.Trainer", slot: Slot, measured: Measured, step: int) -> None:
    for writer in writers(trainer.loggers):
        add_histograms(writer, slot.name.removesuffix("/weight"), measured, step)


def _total(pl_module: nn.Module, present: list[Slot], rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    weights = [slot for slot in present if not slot.is_input]
    inputs = [slot for slot in present if slot.is_input and slot.name in rows]
    sizes = [slot.numel for slot in weights]
    found = {}
    if weights:
        found["total/weight"] = totals((n, rows[s.name]) for n, s in zip(sizes, weights, strict=True))
        norms = [rows[slot.name].get("gradient_norm", 0.0) for slot in weights]
        found["total/weight"]["gradient_norm"] = math.hypot(*norms)
    if inputs:
        found["total/input"] = totals((1, rows[slot.name]) for slot in inputs)
    num_bytes = sum(rows[slot.name]["size"] for slot in weights)
    bits = sum(n * slot.quantizer.grid.bits_per_weight for n, slot in zip(sizes, weights, strict=True))
    own = {id(latent(slot.module, slot.kind)) for slot in weights}
    own |= {id(parameter) for slot in present for parameter in slot.quantizer.parameters()}
    others = sum(p.numel() for p in pl_module.parameters() if id(p) not in own)
    total = num_bytes + 4 * others
    found["total"] = {"effective_bits": 8 * total / (sum(sizes) + others), "size": float(total)}
    if weights:
        found["total"]["bits"] = bits / sum(sizes)
    return found


def _check(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            allowed = "0 or more" if name == "oscillation_samples" else "a positive integer"
            shown = value - 1 if name == "oscillation_samples" else value
            raise ValueError(f"QuantizationStatistics: {name}={shown!r} is not allowed; choose {allowed}")
