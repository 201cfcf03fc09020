"""What bits per layer from data are worth against the same width everywhere, and what a Hadamard rotation is at 2 bits.

    python -m benchmarks.allocation --study allocation --output benchmarks/allocation.json
    python -m benchmarks.allocation --study hadamard --output benchmarks/hadamard.json

Models: a language model of bytes (hidden size 64, 3 layers, context 64) on the documentation that ships with Python,
and a transformer on handwritten digits (hidden size 32, 2 layers). Figures are losses in nats of data not trained on
(validation data of the text, test data of the digits), after quantization alone and after training with it from the
float weights; mean and standard error over the seeds, and paired differences to the first row. Each seed has its own
initial weights, order of the data and float model.
"""

import argparse
import copy
import itertools
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.output import machine, show
from lightning_qat import (
    FisherError,
    Hadamard,
    OutputDivergence,
    Pi,
    QATCallback,
    Recipe,
    Rule,
    Ternary,
    allocate_bits,
    prepare,
    recipes,
)
from lightning_qat.conversion.sensitivity import Sensitivity
from lightning_qat.data import DigitsData, TextData
from lightning_qat.models import LanguageModel, SequenceClassifier

NUM_BATCHES = 8
UNIFORM = {2: recipes.int2(), 3: recipes.int3()}
WIDTHS = (1, 2, 3, 4, recipes.int8())
WITH_TERNARY = (1, Ternary(), 2, 3, 4, recipes.int8())


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Args:
        model: makes it, given a learning rate.
        data: makes it, given a seed and the number of steps.
        loss: of a batch.
        float_steps: optimizer steps of the training in float.
        steps: and with quantization.
        rates: highest learning rates of the two.
        metric: the loss that is reported.
    """

    model: Callable[[float], L.LightningModule]
    data: Callable[[int, int], L.LightningDataModule]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    float_steps: int
    steps: int
    rates: tuple[float, float]
    metric: str


def text_model(learning_rate: float) -> L.LightningModule:
    """Return the language model of ``benchmarks/recipes.py``."""
    return LanguageModel(
        hidden_size=64, num_heads=4, num_layers=3, window_size=64, learning_rate=learning_rate, weight_decay=0.0
    )


def text_data(seed: int, steps: int) -> L.LightningDataModule:
    """Return the text in one epoch of so many batches."""
    return TextData(sequence_length=64, batch_size=16, num_train_batches=steps, val_fraction=0.1, seed=seed)


def text_loss(model: Any, batch: Any) -> torch.Tensor:
    """Return the cross-entropy of a batch of text."""
    tokens, targets = model.tokens_and_targets(batch)
    return cross_entropy(model(tokens).flatten(0, -2), targets.flatten())


TASKS = {
    "text": Task(text_model, text_data, text_loss, 1200, 200, (4e-3, 2e-3), "val_loss"),
    "digits": Task(
        lambda rate: SequenceClassifier(hidden_size=32, num_layers=2, dropout=0.0, learning_rate=rate),
        lambda seed, steps: DigitsData(seed=seed),
        lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        600,
        100,
        (3e-3, 1e-3),
        "test_loss",
    ),
}


def fit(task: Task, module: L.LightningModule, seed: int, steps: int, callbacks: list[Any]) -> float:
    """Train and return the loss."""
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=callbacks, logger=False, gradient_clip_val=1.0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=task.data(seed, steps))
    return loss_of(task, module, seed)


def loss_of(task: Task, module: L.LightningModule, seed: int) -> float:
    """Return the loss of a model as it is."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    run = trainer.validate if task.metric.startswith("val") else trainer.test
    return float(run(module, datamodule=task.data(seed, 1), verbose=False)[0][task.metric])


def float_model(name: str, seed: int, folder: Path) -> tuple[L.LightningModule, float]:
    """Return the float model of a seed and its loss; trained at the first call."""
    task, path = TASKS[name], folder / f"{name}{seed}.pt"
    L.seed_everything(seed, verbose=False)
    module = task.model(task.rates[0])
    if not path.is_file():
        loss = fit(task, module, seed, task.float_steps, [])
        torch.save({"state_dict": module.state_dict(), "loss": loss}, path)
    stored = torch.load(path, weights_only=True)
    module.load_state_dict(stored["state_dict"])
    return module, stored["loss"]


def compared(name: str, seed: int, model: L.LightningModule, recipe: Recipe, *, training: bool) -> dict[str, float]:
    """Return the losses of a recipe: after quantization alone, and after training with it; and its bits per weight."""
    task = TASKS[name]
    quantized = copy.deepcopy(model)
    report = prepare(quantized, recipe)
    rows = [row for row in report if row.decision == "quantized"]
    trained = task.model(task.rates[1])
    trained.load_state_dict(model.state_dict())
    found = {
        "post-training": loss_of(task, quantized, seed),
        "bits": sum(row.bits * row.numel for row in rows) / sum(row.numel for row in rows),
    }
    if training:
        found["trained"] = fit(task, trained, seed + 1000, task.steps, [QATCallback(recipe)])
    return found


def allocated(
    name: str, seed: int, model: L.LightningModule, bits: float, candidates: Any, sensitivity: Sensitivity
) -> Recipe:
    """Return the recipe that training data ask for."""
    data = TASKS[name].data(seed + 2000, NUM_BATCHES)
    data.prepare_data()
    data.setup("fit")
    batches = list(itertools.islice(data.train_dataloader(), NUM_BATCHES))
    forward = TASKS[name].loss if sensitivity.needs_loss else lambda module, batch: module(inputs(name, module, batch))
    return allocate_bits(
        model, batches, average_bits=bits, candidates=candidates, sensitivity=sensitivity, forward=forward
    )


def inputs(name: str, module: Any, batch: Any) -> torch.Tensor:
    """Return what the model takes of a batch."""
    tensor: torch.Tensor = module.tokens_and_targets(batch)[0] if name == "text" else batch[0]
    return tensor


Variant = Callable[[str, int, L.LightningModule], Recipe]


def allocation_study() -> dict[tuple[str, str], dict[str, Variant]]:
    """Return the same width everywhere against widths from data, by task and average bits."""
    found: dict[tuple[str, str], dict[str, Variant]] = {}
    for name, bits in itertools.product(TASKS, (3, 2)):
        variants: dict[str, Variant] = {"the same width everywhere": lambda *_, bits=bits: UNIFORM[bits]}
        for label, candidates, sensitivity in (
            ("divergence; 1, 2, 3, 4, 8 bits", WIDTHS, OutputDivergence()),
            ("divergence; and ternary", WITH_TERNARY, OutputDivergence()),
            ("Fisher error; 1, 2, 3, 4, 8 bits", WIDTHS, FisherError()),
        ):
            variants[label] = lambda name, seed, model, b=bits, c=candidates, s=sensitivity: allocated(
                name, seed, model, b, c, s
            )
        found[name, f"{bits} bits"] = variants
    return found


def rotated(recipe: Recipe) -> Recipe:
    """Return a recipe of linear layers with a Hadamard rotation."""
    spec = recipe.rules[0].spec
    assert spec is not None
    return Recipe((Rule("*", replace(spec, transforms=(Hadamard(),))),))


def hadamard_study() -> dict[tuple[str, str], dict[str, Variant]]:
    """Return two 2-bit grids, each without and with a rotation."""
    weight = recipes.int2().rules[0].spec
    assert weight is not None
    assert weight.weight is not None
    pi = Recipe((Rule("*", replace(weight, weight=replace(weight.weight, grid=Pi(2, 3)))),))
    grids = {"Int(2)": recipes.int2(), "Pi(2, 3)": pi}
    variants: dict[str, Variant] = {}
    for label, recipe in grids.items():
        variants[label] = lambda *_, recipe=recipe: recipe
        variants[f"{label}, rotated"] = lambda *_, recipe=recipe: rotated(recipe)
    return {("text", "2 bits"): variants}


STUDIES = {"allocation": allocation_study, "hadamard": hadamard_study}


def summary(values: list[float]) -> str:
    """Return mean and standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.4f} +- {error:.4f}"


def run(study: str, seeds: list[int], folder: Path) -> list[dict[str, Any]]:
    """Carry a study out, and return a row per variant."""
    rows: list[dict[str, Any]] = []
    for (name, bits), variants in STUDIES[study]().items():
        first: dict[str, Any] = {}
        for label, variant in variants.items():
            began = time.process_time()
            row: dict[str, Any] = {"task": name, "budget": bits, "variant": label}
            found, widths = [], []
            for seed in seeds:
                model, _ = float_model(name, seed, folder)
                recipe = variant(name, seed, model)
                found.append(compared(name, seed, model, recipe, training="Fisher" not in label))
                print(name, bits, label, seed, found[-1], flush=True)
                widths.append({rule.match: rule.spec.weight.grid.label for rule in recipe.rules})  # type: ignore[union-attr]
            first = first or {key: [each[key] for each in found] for key in found[0]}
            row["bits"] = statistics.fmean(each["bits"] for each in found)
            for key in sorted(found[0].keys() - {"bits"}):
                values = [each[key] for each in found]
                row[key] = summary(values)
                row[f"{key}, paired"] = summary([a - b for a, b in zip(values, first[key], strict=True)])
                row[f"{key}, losses"] = values
            row |= {"widths": widths, "cpu_seconds": time.process_time() - began}
            rows.append(row)
    return rows


SHOWN = (
    "task",
    "budget",
    "variant",
    "bits",
    "post-training",
    "post-training, paired",
    "trained",
    "trained, paired",
    "cpu_seconds",
)


def main() -> None:
    """Run a study, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=sorted(STUDIES), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--cache", type=Path, default=Path("outputs/allocation"), help="folder of the float models")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    arguments.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = run(arguments.study, arguments.seeds, arguments.cache)
    show([{key: value for key, value in row.items() if key in SHOWN} for row in rows])
    losses = {name: [float_model(name, seed, arguments.cache)[1] for seed in arguments.seeds] for name in TASKS}
    if arguments.output:
        settings = {"seeds": arguments.seeds, "study": arguments.study, "float": losses}
        arguments.output.write_text(
            json.dumps({"machine": machine(), "settings": settings, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
