"""What quantizers do to tensors, as numbers: measured on samples, accumulated in torchmetrics."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from lightning_qat.conversion.regrid import layer_of
from lightning_qat.conversion.state import quantizers, stored, stored_shape
from lightning_qat.conversion.view import QUANTIZER_SUFFIX, transformed
from lightning_qat.functional.levels import dequantize, quantize
from lightning_qat.functional.scaling import Sample
from lightning_qat.metrics import (
    SQNR,
    ClipRate,
    LevelEntropy,
    QuantizationMSE,
    RelativeError,
    ScaleSummary,
    ZeroRate,
    clip_rate,
    effective_bits,
    level_entropy,
    model_size,
    quantization_mse,
    relative_error,
    sample_indices,
    scale_summary,
    sqnr,
    zero_rate,
)
from lightning_qat.quantization.quantizer import FakeQuantizer

MAX_LEVELS = 256


@final
@dataclass(frozen=True, eq=False)
class Measured:
    """A sample of a tensor with what its quantizer makes of it.

    Args:
        values: latent values.
        levels: levels they fall on.
        quantized: fake-quantized values.
        step: distance of the levels, broadcastable to the values.
        zero_point: broadcastable to the values, or None.
        num_scales: of the whole tensor.
        collapsed: share of the scales whose outermost level lies below 1 % of the root mean square of their values.
    """

    values: Tensor
    levels: Tensor
    quantized: Tensor
    step: Tensor
    zero_point: Tensor | None
    num_scales: int
    collapsed: Tensor


@torch.no_grad()
def measure(quantizer: FakeQuantizer, x: Tensor, *, max_values: int = 65536) -> Measured:
    """Quantize a sample of a tensor: all of it up to ``max_values`` values, else rows (and columns) at equal distances.

    Args:
        quantizer: of this tensor; not changed.
        x: a weight (after transforms) or an input.
        max_values: about how many values to look at, positive.
    """
    granularity, layout = quantizer.spec.granularity, quantizer.layout
    grouped = granularity.group(x.detach(), layout)
    dims = granularity.dims(grouped.dim(), layout)
    step, zero_point = quantizer.step_and_zero_point(Sample(grouped, dims))
    step = step.detach()
    values, step_of_values = _thin(grouped, max_values, grouped), _thin(step, max_values, grouped)
    zero = None if zero_point is None else _thin(zero_point, max_values, grouped)
    wide = values if values.dtype == torch.float64 else values.float()
    lo, hi = quantizer.grid.bounds
    levels = quantize(wide, step_of_values, zero, lo=lo, hi=hi, rounding=quantizer.grid)
    size = wide.square().mean(dims, keepdim=True).sqrt()
    collapsed = (step_of_values * max(-lo, hi) < 0.01 * size).float().mean()
    quantized = dequantize(levels, step_of_values, zero)
    return Measured(wide, levels, quantized, step_of_values, zero, step.numel(), collapsed)


def _thin(tensor: Tensor, max_values: int, like: Tensor) -> Tensor:
    """Take rows and columns of a tensor at the distances that leave about so many values of the tensor it goes with."""
    if tensor.dim() != like.dim() or like.numel() <= max_values:
        return tensor
    stride = math.ceil(like.numel() / max_values)
    rows = min(stride, like.shape[0])
    columns = min(math.ceil(stride / rows), like.shape[-1]) if like.dim() > 1 else 1
    if tensor.shape[0] == like.shape[0]:
        tensor = tensor[::rows]
    return tensor[..., ::columns] if tensor.shape[-1] == like.shape[-1] else tensor


def weight_values(measured: Measured, quantizer: FakeQuantizer) -> dict[str, Tensor]:
    """Return the statistics of a weight; it is equal on all processes, so that nothing is to be combined.

    Args:
        measured: what :func:`measure` returned.
        quantizer: of the weight.
    """
    lo, hi = quantizer.grid.bounds
    zero = 0.0 if measured.zero_point is None else measured.zero_point
    values, quantized = measured.values, measured.quantized
    return {
        "sqnr": sqnr(values, quantized),
        "relative_error": relative_error(values, quantized),
        "mse": quantization_mse(values, quantized),
        "clip_rate": clip_rate(values, scale=measured.step, lo=lo, hi=hi, zero_point=zero),
        "entropy": level_entropy(measured.levels, lo=lo, num_levels=MAX_LEVELS),
        "zero_rate": zero_rate(quantized),
        "signal": values.square().mean(),
        "collapsed": measured.collapsed,
        **{f"scale_{name}": value for name, value in scale_summary(measured.step).items()},
    }


@final
class InputMetrics:
    """The statistics of an input, accumulated over micro-batches and processes."""

    def __init__(self) -> None:
        self.errors = MetricCollection(
            {"sqnr": SQNR(), "relative_error": RelativeError(), "mse": QuantizationMSE()},
            compute_groups=[["sqnr", "relative_error", "mse"]],
        )
        self.rates: dict[str, Any] = {
            "clip_rate": ClipRate(),
            "entropy": LevelEntropy(MAX_LEVELS),
            "zero_rate": ZeroRate(),
            "signal": MeanMetric(),
            "collapsed": MeanMetric(),
        }
        self.scales = ScaleSummary()
        self.is_empty = True

    def update(self, measured: Measured, quantizer: FakeQuantizer) -> None:
        """Add a tensor."""
        self.is_empty = False
        device = measured.values.device
        for metric in (self.errors, self.scales, *self.rates.values()):
            metric.to(device)
        zero = 0.0 if measured.zero_point is None else measured.zero_point
        lo, hi = quantizer.grid.bounds
        self.errors.update(measured.values, measured.quantized)
        self.rates["clip_rate"].update(measured.values, scale=measured.step, lo=lo, hi=hi, zero_point=zero)
        self.rates["entropy"].update(measured.levels, lo=lo)
        self.rates["zero_rate"].update(measured.quantized)
        self.rates["signal"].update(measured.values.square().mean(), weight=measured.values.numel())
        self.rates["collapsed"].update(measured.collapsed)
        self.scales.update(measured.step)

    def compute(self) -> dict[str, Tensor]:
        """Return all values and start anew."""
        values: dict[str, Tensor] = dict(self.errors.compute())
        values |= {name: metric.compute() for name, metric in self.rates.items()}
        values |= {f"scale_{name}": value for name, value in self.scales.compute().items()}
        for metric in (self.errors, self.scales, *self.rates.values()):
            metric.reset()
        self.is_empty = True
        return values


@final
@dataclass(frozen=True, eq=False)
class Slot:
    """A quantized tensor of a model.

    Args:
        layer: dotted name of its layer.
        kind: ``"weight"`` (or another parameter's name) or ``"input"``.
        module: the layer.
        quantizer: its quantizer.
    """

    layer: str
    kind: str
    module: nn.Module
    quantizer: FakeQuantizer

    @property
    def is_input(self) -> bool:
        """Whether this is an input."""
        return self.quantizer.layout.is_input

    @property
    def name(self) -> str:
        """Name in logs."""
        return f"{self.layer or 'model'}/{self.kind}"

    def weight(self) -> Tensor:
        """Return the latent weight as its quantizer sees it, after transforms."""
        return transformed(self.module, stored(self.module, self.kind))

    @property
    def numel(self) -> int:
        """Number of elements of a weight."""
        return math.prod(stored_shape(self.module, self.kind))

    def storage(self) -> tuple[float, int]:
        """Return (effective bits per weight, bytes), scales included."""
        numel, quantizer = self.numel, self.quantizer
        of_scales = quantizer.spec.granularity.scale_shape(stored_shape(self.module, self.kind), quantizer.layout)
        num_scales = math.prod(of_scales)
        scale_bits = 32 if quantizer.spec.scale_dtype == "float32" else 16
        options = {"num_scales": num_scales, "scale_bits": scale_bits + (0 if quantizer.grid.symmetric else 8)}
        bits = quantizer.grid.bits_per_weight
        return effective_bits(numel, bits, **options), model_size(numel, bits, **options)


def slots(model: nn.Module) -> list[Slot]:
    """Return the quantized tensors of a prepared model."""
    return [
        Slot(
            layer_of(name),
            name.rpartition(".")[2].removesuffix(QUANTIZER_SUFFIX),
            model.get_submodule(name.rpartition(".")[0]),
            quantizer,
        )
        for name, quantizer in quantizers(model).items()
    ]


def totals(rows: Iterable[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Return the values over several tensors together: sums for errors, means over the elements for shares.

    Args:
        rows: (number of elements, values) of each tensor.

    >>> one = {"mse": 1.0, "signal": 100.0, "clip_rate": 0.0, "entropy": 2.0, "zero_rate": 0.5}
    >>> totals([(1, one), (3, one)])["sqnr"]
    20.0
    """
    rows = list(rows)
    count = sum(num for num, _ in rows)
    mean = {
        name: sum(num * values[name] for num, values in rows) / count
        for name in ("mse", "signal", "clip_rate", "entropy", "zero_rate")
    }
    ratio = mean["mse"] / mean["signal"] if mean["signal"] > 0 else math.nan
    decibels = -10 * math.log10(ratio) if ratio > 0 else math.inf
    return {"sqnr": decibels, "relative_error": math.sqrt(ratio), **{k: v for k, v in mean.items() if k != "signal"}}


@final
class WatchedWeights:
    """Codes of a fixed sample of a weight.

    Args:
        slot: the weight.
        num_watched: how many of its elements, drawn once, the same in every run and on every process.
    """

    def __init__(self, slot: Slot, num_watched: int) -> None:
        self.slot = slot
        grouped = slot.quantizer.spec.granularity.group(slot.weight(), slot.quantizer.layout).shape
        numel = math.prod(grouped)
        drawn = sample_indices(numel, num_watched)
        flat = torch.arange(numel) if drawn is None else drawn.long()
        self.index = torch.unravel_index(flat, grouped)

    @property
    def count(self) -> int:
        """Number of watched weights."""
        return self.index[0].numel()

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Return their present levels."""
        quantizer = self.slot.quantizer
        granularity, layout = quantizer.spec.granularity, quantizer.layout
        grouped = granularity.group(self.slot.weight(), layout)
        step, zero = quantizer.step_and_zero_point(Sample(grouped, granularity.dims(grouped.dim(), layout)))
        if self.index[0].device != grouped.device:
            self.index = tuple(part.to(grouped.device) for part in self.index)
        values = grouped[self.index].float()
        lo, hi = quantizer.grid.bounds
        zero_point = None if zero is None else self._of(zero)
        return quantize(values, self._of(step.detach()), zero_point, lo=lo, hi=hi, rounding=quantizer.grid)

    def _of(self, scales: Tensor) -> Tensor:
        if scales.dim() != len(self.index):
            return scales.flatten()  # one scale for all
        index = tuple(
            part if size > 1 else torch.zeros_like(part) for part, size in zip(self.index, scales.shape, strict=True)
        )
        return scales[index]
