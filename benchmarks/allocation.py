"""What bits per layer from data are worth against the same width everywhere, and what a Hadamard rotation is at 2 bits.

    python -m benchmarks.allocation --output benchmarks/allocation.json

Models: a language model of bytes (hidden size 64, 3 layers, context 64) on the documentation that ships with Python,
and a transformer on handwritten digits (hidden size 32, 2 layers). Figures are losses in nats of data not trained on
(50 batches of the text's validation data, the test data of the digits), after quantization alone and after training
with it from the float weights; mean and standard error over the seeds, and paired differences to the first row. Each
seed has its own initial weights, order of the data and float model. What was measured is kept in the folder --cache;
a run that was stopped goes on from there.
"""

import argparse
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

NUM_BATCHES = 4
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
    "text": Task(text_model, text_data, text_loss, 1200, 100, (4e-3, 2e-3), "val_loss"),
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


def fit(task: Task, module: L.LightningModule, seed: int, steps: int, callbacks: list[Any]) -> None:
    """Train."""
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=callbacks, logger=False, gradient_clip_val=1.0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=task.data(seed, steps))


def loss_of(task: Task, module: L.LightningModule, seed: int) -> float:
    """Return the loss of a model as it is."""
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=50
    )
    run = trainer.validate if task.metric.startswith("val") else trainer.test
    return float(run(module, datamodule=task.data(seed, 1), verbose=False)[0][task.metric])


def float_model(name: str, seed: int, folder: Path) -> L.LightningModule:
    """Return the float model of a seed; trained at the first call."""
    task, path = TASKS[name], folder / f"{name}{seed}.pt"
    L.seed_everything(seed, verbose=False)
    module = task.model(task.rates[0])
    if not path.is_file():
        fit(task, module, seed, task.float_steps, [])
        torch.save({"state_dict": module.state_dict()}, path)
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return module


def after_quantization(name: str, seed: int, folder: Path, variant: "Variant") -> dict[str, Any]:
    """Return the recipe of a variant, its bits per weight, and the loss without training."""
    model = float_model(name, seed, folder)
    recipe = variant(name, seed, model)
    if recipe is None:
        return {"loss": loss_of(TASKS[name], model, seed), "bits": 32.0}
    rows = [row for row in prepare(model, recipe) if row.decision == "quantized"]
    return {
        "loss": loss_of(TASKS[name], model, seed),
        "bits": sum(row.bits * row.numel for row in rows) / sum(row.numel for row in rows),
        "recipe": recipe.to_dict(),
    }


def after_training(name: str, seed: int, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Return the loss after training with a recipe, from the float weights."""
    task = TASKS[name]
    trained = task.model(task.rates[1])
    trained.load_state_dict(float_model(name, seed, folder).state_dict())
    fit(task, trained, seed + 1000, task.steps, [QATCallback(recipe)])
    return {"loss": loss_of(task, trained, seed)}


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


Variant = Callable[[str, int, L.LightningModule], Recipe | None]


def allocation_study() -> dict[tuple[str, str], dict[str, Variant]]:
    """Return the same width everywhere against widths from data, by task and average bits."""
    found: dict[tuple[str, str], dict[str, Variant]] = {(name, "float"): {"float": lambda *_: None} for name in TASKS}
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
    return {("text", "2 bits, rotation"): variants}


def summary(values: list[float]) -> str:
    """Return mean and standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.4f} +- {error:.4f}"


def measure(seeds: list[int], folder: Path) -> dict[str, dict[str, Any]]:
    """Measure what is not known yet, losses without training first; return all of it."""
    path = folder / "results.json"
    known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    variants = [
        (name, budget, label, variant)
        for (name, budget), group in {**allocation_study(), **hadamard_study()}.items()
        for label, variant in group.items()
    ]
    for phase, seed, (name, budget, label, variant) in itertools.product(PHASES, seeds, variants):
        key = f"{phase}; {name}; {budget}; {label}; {seed}"
        if key in known or (phase == "trained" and (budget == "float" or "Fisher" in label)):
            continue
        began = time.process_time()
        if phase == "trained":
            recipe = Recipe.from_dict(known[key.replace(phase, PHASES[0], 1)]["recipe"])
            known[key] = after_training(name, seed, folder, recipe)
        else:
            known[key] = after_quantization(name, seed, folder, variant)
        known[key]["cpu_seconds"] = time.process_time() - began
        print(f"{key}: {known[key]['loss']:.4f}, {known[key]['cpu_seconds']:.0f} s", flush=True)
        path.write_text(json.dumps(known))
    return known


def table(known: dict[str, dict[str, Any]], seeds: list[int]) -> list[dict[str, Any]]:
    """Return a row per variant, with differences to the first of its task and budget."""
    rows: list[dict[str, Any]] = []
    first: dict[tuple[str, str], list[float]] = {}
    for (name, budget), group in {**allocation_study(), **hadamard_study()}.items():
        for label in group:
            row: dict[str, Any] = {"task": name, "budget": budget, "variant": label}
            for phase in PHASES:
                found = [known.get(f"{phase}; {name}; {budget}; {label}; {seed}") for seed in seeds]
                losses = [each["loss"] for each in found if each is not None]
                if len(losses) < len(seeds):
                    continue
                base = first.setdefault((f"{name} {budget}", phase), losses)
                row[phase] = summary(losses)
                row[f"{phase}, paired"] = summary([a - b for a, b in zip(losses, base, strict=True)])
                row[f"{phase}, losses"] = losses
                if phase == PHASES[0]:
                    row["bits"] = statistics.fmean(each["bits"] for each in found if each is not None)
                    row["widths"] = [widths(each["recipe"]) for each in found if each and "recipe" in each]
            rows.append(row)
    return rows


def widths(recipe: dict[str, Any]) -> dict[str, str]:
    """Return the grid of each rule."""
    rules = Recipe.from_dict(recipe).rules
    return {rule.match: rule.spec.weight.grid.label for rule in rules if rule.spec and rule.spec.weight}


PHASES = ("post-training", "trained")
SHOWN = ("task", "budget", "variant", "bits", *(f"{phase}{more}" for phase in PHASES for more in ("", ", paired")))


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--cache", type=Path, default=Path("outputs/allocation"), help="folder of models and results")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    arguments.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = table(measure(arguments.seeds, arguments.cache), arguments.seeds)
    show([{key: row[key] for key in SHOWN if key in row} for row in rows])
    if arguments.output:
        content = {"machine": machine(), "settings": {"seeds": arguments.seeds}, "rows": rows}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
