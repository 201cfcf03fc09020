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
from torch import Tensor, nn

from lightning_qat.cli.results import TITLES, Measurement, format_metric, metric_title, shown_metrics
from lightning_qat.conversion import codes
from lightning_qat.conversion.view import TRANSFORMS, latent

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
    weight: Tensor = latent(module, slot).detach()
    for transform in module._modules.get(TRANSFORMS) or ():  # type: ignore[union-attr]
        weight = transform.weight(weight)
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
    names = [f"{text}\n{', '.join(same)}" for text, same in labels.items()]
    texts = ["\n\n" * low + name for name, low in zip(names, lowered, strict=True)]
    axis.set_xticks(ticks, texts)
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
