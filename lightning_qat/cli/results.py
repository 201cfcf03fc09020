"""What a run found: measurements, their table, and metrics.json."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Final, final

from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_qat.conversion import codes
from lightning_qat.conversion.bake import BAKED_INPUT

TITLES: Final = {"float": "float", "post_training": "post-training", "qat": "QAT"}
"""The three models that a run compares, in order, and what tables and plots call them."""


_INPUT_SCALES: Final = (f"{BAKED_INPUT}.scale", f"{BAKED_INPUT}.zero_point")

SHARES: Final = ("accuracy", "exact_match")
"""Metrics in 0 .. 1 that people read in percent."""


@final
@dataclass(frozen=True)
class Measurement:
    """A model on the test data.

    Args:
        metrics: what its test logged, without the prefix ``test_``.
        num_bytes: of parameters and buffers, codes packed, scales included.
        bits_per_weight: 8 num_bytes / number of parameters of the float model: an average over all of them, quantized
            or not.
    """

    metrics: Mapping[str, float]
    num_bytes: int
    bits_per_weight: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**self.metrics, "num_bytes": self.num_bytes, "bits_per_weight": round(self.bits_per_weight, 4)}


def num_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of a float or baked model, quantized weights as packed codes.

    Args:
        model: float, or as `lightning_qat.bake` returns it.

    Example:
        >>> num_bytes(nn.Linear(4, 2))
        40
    """
    try:
        quantized = codes(model)
    except ValueError:  # a float model has none
        quantized = {}
    packed = sum(tensor.num_bytes for tensor in quantized.values())
    plain = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name not in quantized)
    # Outside the state_dict only the scales of inputs count: other buffers are copies that layers compute with.
    stored = set(model.state_dict())
    buffers = [b for name, b in model.named_buffers() if name in stored or name.endswith(_INPUT_SCALES)]
    return packed + plain + sum(buffer.numel() * buffer.element_size() for buffer in buffers)


def test_metrics(logged: Mapping[str, Any]) -> dict[str, float]:
    """Return what the test logged, without the prefix.

    Args:
        logged: ``trainer.callback_metrics``, or what ``trainer.test`` returns for a loader.

    Example:
        >>> test_metrics({"test_loss": 0.5, "val_loss": 0.7})
        {'loss': 0.5}
    """
    return {name.removeprefix("test_"): float(value) for name, value in logged.items() if name.startswith("test_")}


def shown_metrics(order: Mapping[str, str], metrics: Mapping[str, float]) -> list[str]:
    """Return the names of the metrics to show, in order: those of ``report.metrics`` that were logged, else all.

    Example:
        >>> shown_metrics({"perplexity": "min", "accuracy": "max"}, {"loss": 0.5, "accuracy": 0.9})
        ['accuracy']
    """
    return [name for name in order if name in metrics] or sorted(metrics)


def format_metric(name: str, value: float) -> str:
    """Return a value for people: shares in percent, others with four digits.

    Example:
        >>> format_metric("accuracy", 0.97214), format_metric("loss", 0.09876), format_metric("perplexity", 7.12345)
        ('97.21 %', '0.0988', '7.123')
    """
    if name in SHARES:
        return f"{100 * value:.2f} %"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.4g}"


def format_spread(name: str, values: Sequence[float]) -> str:
    """Return the mean and, over several values, their standard deviation.

    Example:
        >>> format_spread("accuracy", [0.96, 0.98]), format_spread("loss", [0.5]), format_spread("loss", [1.5, 1.7])
        ('97.00 ± 1.41 %', '0.5000', '1.6 ± 0.14')
    """
    text = format_metric(name, mean(values))
    if len(values) == 1:
        return text
    spread = stdev(values)
    return f"{100 * mean(values):.2f} ± {100 * spread:.2f} %" if name in SHARES else f"{text} ± {spread:.2g}"


def metric_title(name: str) -> str:
    """Return the name of a metric for people.

    Example:
        >>> metric_title("bits_per_byte")
        'bits per byte'
    """
    return name.replace("_", " ")


def results_table(title: str, measurements: Mapping[str, Measurement], order: Mapping[str, str]) -> Table:
    """Return the table float / post-training / QAT.

    Args:
        title: above the table.
        measurements: by the keys of `TITLES`.
        order: ``report.metrics``.
    """
    caption = "QAT continues from the float weights; what it gains over float is partly this longer training."
    table = Table(title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left")
    table.add_column("model")
    names = shown_metrics(order, next(iter(measurements.values())).metrics)
    for name in [*map(metric_title, names), "size in bytes", "bits per weight"]:
        table.add_column(name, justify="right")
    for key, measurement in measurements.items():
        values = [format_metric(name, measurement.metrics[name]) for name in names]
        table.add_row(TITLES[key], *values, f"{measurement.num_bytes:,}", f"{measurement.bits_per_weight:.2f}")
    return table


def wide_console() -> Console:
    """Return a console for standard output: as wide as the terminal, or wide enough for our tables without one."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    return Console(soft_wrap=True, width=width)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a file as indented JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
