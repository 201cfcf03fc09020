"""What only TensorBoard shows: a page that explains itself, histograms, and a heat map of layers over time."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_qat.callbacks.measures import Measured

NUM_BINS: Final = 64

EXPLANATION: Final = """
Where to look:

- **Custom scalars**, the run at a glance: each chart shows one quantity for all layers; its title says what is good.
- **Images**, `quantization/heat_map`: signal-to-noise ratio of the weights, layers over time. Dark rows lose the most.
- **Histograms**, `quantization_weights/<layer>`: latent (full precision) against quantized weights.
- **Scalars**, `quantization/<layer>/<weight or input>/<quantity>`: every number.

| quantity | meaning |
|---|---|
| `sqnr` | signal-to-quantization-noise ratio in dB: higher is better, about 6 dB per bit |
| `relative_error` | size of the rounding error over size of the values: 0 nothing lost, 1 everything |
| `mse` | mean squared rounding error |
| `clip_rate` | share outside the range of the grid; their gradient is masked |
| `entropy` | bits of the width that are used; 0: all codes are equal, the layer is dead |
| `zero_rate` | share that is exactly zero |
| `scale_min`, `scale_median`, `scale_max` | distance of neighboring levels |
| `gradient_norm` | size of the gradient that reaches the latent weight |
| `bits`, `effective_bits`, `size` | bits per code (log2 of the levels), per weight with scales, and bytes |
| `oscillation_rate`, `flip_rate` | share of weights that change their code back and forth, or at all, per step |
"""


def layout() -> dict[str, dict[str, list[Any]]]:
    """Return the layout of the custom scalars: categories, charts, and regular expressions of tags."""

    def layers(kind: str, quantity: str) -> list[Any]:
        return ["Multiline", [rf"quantization/(?!total/).*{kind}/{quantity}$"]]

    return {
        "Quantization of the whole model": {
            "Bits of codes; effective bits of all parameters": [
                "Multiline",
                [r"quantization/total/(bits|effective_bits)$"],
            ],
            "Signal-to-noise ratio in dB, high is good": [
                "Multiline",
                [r"quantization/total/.*/sqnr$"],
            ],
            "Size in bytes": ["Multiline", [r"quantization/total/size$"]],
            "Distillation: losses": ["Multiline", [r"distillation/(task_loss|loss|features|reasoning\w*)$"]],
            "Distillation: agreement, 1 is best": ["Multiline", [r"distillation/top1_agreement$"]],
        },
        "Weights, one line per layer": {
            "Signal-to-noise ratio in dB, high is good": layers("weight", "sqnr"),
            "Share outside the range, low is good": layers("weight", "clip_rate"),
            "Bits in use, 0 is a dead layer": layers("weight", "entropy"),
            "Share of zeros": layers("weight", "zero_rate"),
            "Median scale, 0 is a collapse": layers("weight", "scale_median"),
            "Norm of the gradient of the weight": layers("weight", "gradient_norm"),
            "Share that oscillates, low is good": layers("weight", "oscillation_rate"),
            "Share of codes that change in a step": layers("weight", "flip_rate"),
        },
        "Inputs, one line per layer": {
            "Signal-to-noise ratio in dB, high is good": layers("input", "sqnr"),
            "Share outside the range, low is good": layers("input", "clip_rate"),
            "Bits in use": layers("input", "entropy"),
        },
    }


def writers(loggers: Sequence[Any]) -> Iterator[Any]:
    """Yield the TensorBoard writers among loggers, whichever package they come from."""
    for logger in loggers:
        writer = getattr(logger, "experiment", None)
        if hasattr(writer, "add_custom_scalars") and hasattr(writer, "add_histogram_raw"):
            yield writer


def add_page(writer: Any) -> None:
    """Write the layout and the explanation."""
    writer.add_custom_scalars(layout())
    writer.add_text("quantization/how to read this page", EXPLANATION, 0)


def add_histograms(writer: Any, layer: str, measured: Measured, step: int) -> None:
    """Write the latent and the quantized values of a weight over the same bins."""
    limit = torch.maximum(measured.values.abs().amax(), measured.quantized.abs().amax()).clamp(min=1e-30) * 1.01
    for name, values in (("latent", measured.values), ("quantized", measured.quantized)):
        _add_histogram(writer, f"quantization_weights/{layer}/{name}", values, float(limit), step)


def _add_histogram(writer: Any, tag: str, values: Tensor, limit: float, step: int) -> None:
    counts = torch.histc(values, NUM_BINS, -limit, limit)
    limits = [limit * (2 * (index + 1) / NUM_BINS - 1) for index in range(NUM_BINS)]
    numbers = torch.stack([values.amin(), values.amax(), values.sum(), values.square().sum()]).tolist()
    writer.add_histogram_raw(
        tag, min=numbers[0], max=numbers[1], num=values.numel(), sum=numbers[2], sum_squares=numbers[3],
        bucket_limits=limits, bucket_counts=counts.tolist(), global_step=step,
    )  # fmt: skip


def heat_map(layers: Sequence[str], steps: Sequence[int], sqnr: Tensor) -> Figure:
    """Return the heat map of layers over time.

    Args:
        layers: names of the rows.
        steps: of the columns, ascending.
        sqnr: signal-to-noise ratios in dB, [layers, steps].
    """
    figure = Figure(figsize=(6, 1.2 + 0.24 * len(layers)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    edges = [*steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)]
    image = axes.pcolormesh(edges, range(len(layers) + 1), sqnr.numpy(), cmap="viridis")
    axes.set_yticks([row + 0.5 for row in range(len(layers))], layers, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("step")
    axes.set_title("Signal-to-noise ratio of the weights; dark rows lose most", fontsize=10)
    figure.colorbar(image, ax=axes, label="dB")
    return figure
