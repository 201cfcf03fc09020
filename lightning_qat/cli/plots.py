"""Pictures of a run and of a sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from lightning_qat.cli.results import TITLES, Measurement, format_metric, metric_title, shown_metrics
from lightning_qat.conversion import codes
from lightning_qat.conversion.state import stored
from lightning_qat.conversion.view import transformed

COLORS: Final = {"float": "#7f8794", "post_training": "#e08e45", "qat": "#2f6db5"}
INK: Final = "#2b2f36"


@final
@dataclass(frozen=True)
class WeightView:
    """A weight as its quantizer sees it, in units of the step.

    Args:
        latent: x / s, flat.
        levels: the quantized values / s, flat.
    """

    latent: np.ndarray
    levels: np.ndarray


@torch.no_grad()
def weight_view(model: nn.Module, name: str) -> WeightView:
    """Return how a weight of a prepared model lies on its grid.

    Args:
        model: prepared.
        name: dotted, one of ``codes(model)``.
    """
    tensor = codes(model)[name]
    owner, _, slot = name.rpartition(".")
    module = model.get_submodule(owner)
    weight = transformed(module, stored(module, slot))
    grouped = tensor.granularity.group(weight.float(), tensor.layout)
    levels = tensor.granularity.group(tensor.codes, tensor.layout).float() + tensor.offset
    levels = levels if tensor.zero_point is None else levels - tensor.zero_point
    return WeightView((grouped / tensor.scale).flatten().cpu().numpy(), levels.flatten().cpu().numpy())


def largest_weight(model: nn.Module) -> str:
    """Return the name of the quantized weight with the most elements, the first of equals."""
    tensors = codes(model)
    return max(tensors, key=lambda name: tensors[name].codes.numel())


def run_figure(
    title: str,
    measurements: Mapping[str, Measurement],
    order: Mapping[str, str],
    weights: tuple[str, Mapping[str, WeightView]],
) -> Figure:
    """Return the picture of a run: quality and size of the three models, and a weight on its grid.

    Args:
        title: above the picture.
        measurements: by the keys of `lightning_qat.cli.results.TITLES`.
        order: ``report.metrics``.
        weights: name of the weight, and its views, ``post_training`` and ``qat``.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.25))
    quality, size = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    metric = shown_metrics(order, next(iter(measurements.values())).metrics)[0]
    _draw_quality(quality, measurements, metric, order.get(metric, "min"))
    _draw_size(size, measurements)
    name, views = weights
    for row, key in enumerate(("post_training", "qat")):
        axis = figure.add_subplot(grid[row, 1])
        _draw_weight(axis, views[key], key)
        when = "after float training" if key == "post_training" else "after QAT"
        _head(axis, f"{name}, in steps, {when}\n")
    return figure


def _head(axis: Axes, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=10, color=INK)


def _bare(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK, labelsize=9)


def _draw_quality(axis: Axes, measurements: Mapping[str, Measurement], metric: str, direction: str) -> None:
    values = [measurement.metrics[metric] for measurement in measurements.values()]
    rows = range(len(values))
    axis.scatter(values, rows, s=70, color=[COLORS[key] for key in measurements], zorder=3)
    axis.axvline(values[0], color=COLORS["float"], linewidth=1, linestyle=":", zorder=1)
    for row, value in zip(rows, values, strict=True):
        axis.annotate(format_metric(metric, value), (value, row), (0, 7), textcoords="offset points", ha="center",
                      fontsize=9, color=INK)  # fmt: skip
    # At least 2 % to both sides, so that noise does not fill the axis.
    margin = max(0.25 * (max(values) - min(values)), 0.02 * max(map(abs, values)), 1e-6)
    axis.set_xlim(min(values) - margin, max(values) + margin)
    axis.set_xticks([])
    _label_rows(axis, measurements)
    better = "higher" if direction == "max" else "lower"
    _head(axis, f"{metric_title(metric)} on the test data ({better} is better)")


def _draw_size(axis: Axes, measurements: Mapping[str, Measurement]) -> None:
    kilobytes = [measurement.num_bytes / 1000 for measurement in measurements.values()]
    bars = axis.barh(range(len(kilobytes)), kilobytes, height=0.6, color=[COLORS[key] for key in measurements])
    texts = [f"{m.num_bytes / 1000:,.0f} kB, {m.bits_per_weight:.1f} bits per weight" for m in measurements.values()]
    inside = [value > 0.5 * max(kilobytes) for value in kilobytes]
    for bar, text, is_inside in zip(bars, texts, inside, strict=True):
        axis.annotate(text, (bar.get_width(), bar.get_y() + bar.get_height() / 2), (-6 if is_inside else 6, 0),
                      textcoords="offset points", ha="right" if is_inside else "left", va="center", fontsize=9,
                      color="white" if is_inside else INK)  # fmt: skip
    _label_rows(axis, measurements)
    _head(axis, "size in kB")


def _label_rows(axis: Axes, measurements: Mapping[str, Measurement]) -> None:
    axis.set_yticks(range(len(measurements)), [TITLES[key] for key in measurements])
    axis.set_ylim(len(measurements) - 0.5, -0.7)
    _bare(axis)


def _draw_weight(axis: Axes, view: WeightView, key: str) -> None:
    levels, counts = np.unique(view.levels, return_counts=True)
    low, high = levels.min() - 0.75, levels.max() + 0.75
    bins = np.linspace(low, high, min(120, 24 * len(levels)) + 1)
    inside, _ = np.histogram(view.latent, bins=bins)
    axis.bar(bins[:-1], inside, width=np.diff(bins), align="edge", color=COLORS[key], alpha=0.6, linewidth=0)
    top = 1.15 * inside.max()
    axis.vlines(levels, 0, top, color=INK, linewidth=0.8, linestyle=":")
    if len(levels) <= 8:
        for level, count in zip(levels, counts, strict=True):
            axis.annotate(f"{100 * count / counts.sum():.0f} %", (level, top), (0, 3), textcoords="offset points",
                          ha="center", fontsize=9, color=INK)  # fmt: skip
    axis.set_xlim(low, high)
    axis.set_ylim(0, top)
    axis.set_xticks(levels)
    axis.set_yticks([])
    _bare(axis)


@final
@dataclass(frozen=True)
class SweepPoint:
    """A configuration of a sweep, over all its seeds.

    Args:
        label: what distinguishes it.
        bits: per weight, of the quantized model.
        values: of the metric, by the keys of `lightning_qat.cli.results.TITLES`; one entry per seed.
    """

    label: str
    bits: float
    values: Mapping[str, Sequence[float]]


def sweep_figure(title: str, points: Sequence[SweepPoint], metric: str, direction: str) -> Figure:
    """Return the picture of a sweep: quality against bits per weight, after training and by training.

    Args:
        title: above the picture.
        points: at least one.
        metric: name of the metric.
        direction: ``"max"`` or ``"min"``, which is better.
    """
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axis = figure.subplots()
    ordered = sorted(points, key=lambda point: point.bits)
    floats = [value for point in ordered for value in point.values["float"]]
    axis.axhline(float(np.mean(floats)), color=COLORS["float"], linestyle="--", linewidth=1.5, label="float")
    for key in ("post_training", "qat"):
        bits = [point.bits for point in ordered]
        means = [float(np.mean(point.values[key])) for point in ordered]
        axis.plot(bits, means, "o-", color=COLORS[key], linewidth=2, markersize=7, label=TITLES[key])
        for point in ordered:
            axis.scatter([point.bits] * len(point.values[key]), point.values[key], s=12, color=COLORS[key], alpha=0.6)
    _draw_bits_axis(axis, ordered)
    _draw_value_axis(axis, ordered, metric, direction)
    axis.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    axis.legend(frameon=False, loc="lower right" if direction == "max" else "upper right")
    _bare(axis)
    return figure


def _draw_bits_axis(axis: Axes, points: Sequence[SweepPoint]) -> None:
    """Write name and bits below each point; neighbors that would overlap alternate between two heights."""
    labels: dict[str, list[str]] = {}
    places: dict[str, float] = {}
    for point in points:
        text = f"{point.bits:.1f} bits"
        labels.setdefault(text, []).append(point.label)
        places.setdefault(text, point.bits)
    ticks = list(places.values())
    span = np.log2(max(ticks) / min(ticks)) or 1.0
    lowered = [False]
    for left, right in pairwise(ticks):
        lowered.append(bool(np.log2(right / left) < 0.12 * span) and not lowered[-1])
    names = [f"{text}\n{', '.join(same)}" for text, same in labels.items()]
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, ["\n\n" * low + name for name, low in zip(names, lowered, strict=True)])
    axis.minorticks_off()
    axis.set_xlim(min(ticks) / 2 ** (0.08 * span), max(ticks) * 2 ** (0.08 * span))
    axis.set_xlabel("bits per weight of the whole model, scales and float parts included", color=INK)


def _draw_value_axis(axis: Axes, points: Sequence[SweepPoint], metric: str, direction: str) -> None:
    values = [value for point in points for same in point.values.values() for value in same]
    low, high = min(values), max(values)
    margin = max(0.08 * (high - low), 0.005 * max(map(abs, values)), 1e-6)
    axis.set_ylim(low - margin, high + margin)
    if direction == "min" and 0 < 10 * low < high:  # quantization after training can be off by orders of magnitude
        axis.set_yscale("log")
        axis.set_ylim(low / 1.2, high * 1.2)
    axis.yaxis.set_major_formatter(lambda value, _: format_metric(metric, value))
    better = "higher" if direction == "max" else "lower"
    axis.set_ylabel(f"{metric_title(metric)} on the test data ({better} is better)", color=INK)
    axis.grid(axis="y", linewidth=0.5, alpha=0.4)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=150, facecolor="white")
