"""Training curves on integer products against float products of the same fake-quantized values.

    python -m benchmarks.arithmetic --output benchmarks/arithmetic.json

Digits and text, sizes of conf/, 8-bit weights and inputs (w8a8) and ternary weights (bitnet). Every seed has its own
initial weights and data order; both arithmetics share them. Compared are the losses of the last quarter of the
steps: the difference of both arithmetics per seed, and how much seeds differ.
"""

import argparse
import json
import logging
import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.output import machine
from lightning_qat import QATCallback, Recipe, recipes
from lightning_qat.data import DigitsData, TextData
from lightning_qat.models import LanguageModel, SequenceClassifier

RECIPES = {"w8a8": recipes.w8a8(), "bitnet": recipes.bitnet()}


class Losses(L.Callback):
    """The training loss of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the loss."""
        self.seen.append(float(outputs["loss"]))


def task(name: str, num_steps: int) -> tuple[L.LightningModule, L.LightningDataModule]:
    """Return model and data."""
    if name == "digits":
        model = SequenceClassifier(10, embed_dim=8, hidden_size=64, num_heads=4, num_layers=2, window_size=8)
        return model, DigitsData(batch_size=64)
    text = LanguageModel(hidden_size=96, num_heads=4, num_layers=2, window_size=64)
    return text, TextData(sequence_length=64, batch_size=16, num_train_batches=num_steps)


def losses(name: str, recipe: Recipe, arithmetic: str, seed: int, num_steps: int) -> list[float]:
    """Train and return the loss of every step."""
    L.seed_everything(seed, verbose=False)
    model, data = task(name, num_steps)
    curve = Losses()
    L.Trainer(
        max_steps=num_steps, max_epochs=-1, accelerator="cpu", logger=False,
        callbacks=[QATCallback(recipe, arithmetic=arithmetic), curve],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0,
    ).fit(model, datamodule=data)  # fmt: skip
    return curve.seen


def compare(name: str, recipe: Recipe, seeds: int, num_steps: int) -> dict[str, Any]:
    """Return the last quarter's mean loss per arithmetic, the mean paired difference, and the spread of seeds."""
    ends: dict[str, list[float]] = {}
    largest_at_start = 0.0
    for seed in range(seeds):
        curves = {how: losses(name, recipe, how, seed, num_steps) for how in ("simulated", "integer")}
        for how, curve in curves.items():
            ends.setdefault(how, []).append(statistics.fmean(curve[-num_steps // 4 :]))
        pairs = zip(curves["simulated"][:10], curves["integer"][:10], strict=True)
        largest_at_start = max(largest_at_start, *(abs(one - other) for one, other in pairs))
    paired = [one - other for one, other in zip(ends["integer"], ends["simulated"], strict=True)]
    return {
        **{how: statistics.fmean(values) for how, values in ends.items()},
        "difference": statistics.fmean(paired),
        "its standard error": statistics.stdev(paired) / math.sqrt(len(paired)),
        "standard deviation of seeds": statistics.stdev(ends["simulated"]),
        "largest difference in the first 10 steps": largest_at_start,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": machine(), "steps": arguments.steps, "seeds": arguments.seeds}
    for name in ("digits", "text"):
        for label, recipe in RECIPES.items():
            found[f"{name}, {label}"] = compare(name, recipe, arguments.seeds, arguments.steps)
    print(json.dumps(found, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
