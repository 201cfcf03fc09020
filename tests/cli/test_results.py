"""Measurements, their table, and pictures."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

from lightning_qat import (
    Int,
    LayerSpec,
    MinimumError,
    PerTensor,
    QuantizerSpec,
    Recipe,
    Rule,
    bake,
    calibrate,
    codes,
    prepare,
    recipes,
)
from lightning_qat.cli.plots import SweepPoint, largest_weight, run_figure, sweep_figure, weight_view
from lightning_qat.cli.results import Measurement, num_bytes, results_table

ORDER = {"perplexity": "min", "accuracy": "max", "loss": "min"}
MEASUREMENTS = {
    "float": Measurement({"loss": 0.05, "accuracy": 0.99}, 1000, 32.0),
    "post_training": Measurement({"loss": 1.5, "accuracy": 0.6}, 150, 4.8),
    "qat": Measurement({"loss": 0.06, "accuracy": 0.985}, 150, 4.8),
}


def test_bytes_count_codes_scales_and_all_else() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8))
    norm = 4 * (8 + 8 + 8 + 8) + 8  # weight, bias, mean, variance; an int64 counter
    assert num_bytes(model) == 4 * (16 * 8 + 8) + norm
    prepare(model, recipes.int4())
    assert num_bytes(bake(model)) == 16 * 8 // 2 + 4 * 8 + 4 * 8 + norm  # packed codes, scales, bias


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    prepare(model, recipes.int8())
    assert num_bytes(bake(model)) == 8 * 8 + 4 * 8


def test_copies_that_layers_compute_with_do_not_count() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    prepare(model, recipes.w8a8())
    baked = bake(model)
    assert num_bytes(baked) == 2 * (512 * 512 + 4 * 512 + 4 * 512)


def test_scales_of_inputs_count() -> None:
    spec = LayerSpec(QuantizerSpec(Int(8)), QuantizerSpec(Int(8, symmetric=False), PerTensor(), MinimumError()))
    model = nn.Sequential(nn.Linear(16, 8, bias=False))
    prepare(model, Recipe((Rule("*", spec),)))
    calibrate(model, [torch.randn(4, 16)])
    assert num_bytes(bake(model)) == 16 * 8 + 4 * 8 + 4 + 4  # codes, their scales, scale and zero point of the input


def test_table_shows_the_metrics_in_order() -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(results_table("digits, int4", MEASUREMENTS, ORDER))
    lines = capture.get().splitlines()
    assert lines[0].strip() == "digits, int4"
    header = lines[2]
    assert header.index("accuracy") < header.index("loss") < header.index("size") < header.index("bits per weight")
    assert "perplexity" not in header
    assert [line.split()[1] for line in lines if line.startswith("│")] == ["float", "post-training", "QAT"]
    assert "60.00 %" in lines[5]
    assert "4.80" in lines[5]


@pytest.mark.parametrize("recipe", ["int4", "ternary", "binary", "seq2", "bitnet1", "piq2", "w8a8"])
def test_weights_lie_within_half_a_step_of_their_level(recipe: str) -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4))
    prepare(model, recipes.named(recipe))
    name = largest_weight(model)
    assert name == "0.weight"
    view = weight_view(model, name)
    assert view.latent.shape == view.levels.shape == (512,)
    inside = (view.latent >= view.levels.min()) & (view.latent <= view.levels.max())
    bound = 1.0 if recipe in ("binary", "bitnet1") else 0.5  # two levels, a distance of two steps
    assert np.abs(view.latent - view.levels)[inside].max() <= bound + 1e-5
    assert len(np.unique(view.levels)) <= codes(model)[name].grid.num_levels


def test_run_figure_says_what_it_shows() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    prepare(model, recipes.ternary())
    view = weight_view(model, "weight")
    figure = run_figure("digits, ternary", MEASUREMENTS, ORDER, ("weight", {"post_training": view, "qat": view}))
    text = texts(figure)
    for part in ("accuracy on the test data (higher is better)", "98.50 %", "4.8 bits per weight", "after QAT"):
        assert part in text


def test_sweep_figure_says_what_it_shows() -> None:
    points = [
        SweepPoint("int4", 4.5, {"float": [0.99, 0.98], "post_training": [0.97, 0.98], "qat": [0.985, 0.98]}),
        SweepPoint("binary", 1.5, {"float": [0.99], "post_training": [0.5], "qat": [0.97]}),
    ]
    figure = sweep_figure("Quality against bits, digits", points, "accuracy", "max")
    text = texts(figure)
    for part in ("int4", "binary", "accuracy on the test data (higher is better)", "post-training", "QAT", "float"):
        assert part in text
    lines = figure.axes[0].get_lines()
    assert [list(map(float, line.get_xdata())) for line in lines[1:]] == [[1.5, 4.5], [1.5, 4.5]]


def texts(figure: Figure) -> str:
    """All that is written in a figure."""
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))
