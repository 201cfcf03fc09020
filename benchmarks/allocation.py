"""What bits per layer from data are worth against the same width everywhere, and what a Hadamard rotation is at 2 bits.

    python -m benchmarks.allocation --output benchmarks/allocation.json
    python -m benchmarks.allocation --tasks transformer --output benchmarks/allocation_transformer.json

Small models, trained in plain loops: ``digits`` and ``text`` are perceptrons with two hidden layers, on handwritten
digits and on the 16 bytes before each byte of the documentation that ships with Python; ``transformer`` is a language
model of bytes with hidden size 64 and 3 layers on that text. Figures are losses in nats of data not trained on, after
quantization alone and after a tenth as many steps of training with it from the float weights: mean and standard error
over the seeds, and paired differences to the first row. Each seed has its own initial weights, batches and float model.
What was measured is kept in the folder --cache; a run that was stopped goes on from there.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.learned import with_learned_scale
from benchmarks.output import machine, show
from lightning_qat import (
    FisherError,
    Hadamard,
    LossChange,
    OutputDivergence,
    Pi,
    Recipe,
    Rule,
    Ternary,
    prepare,
    recipes,
)
from lightning_qat.conversion.allocate import find_allocation, recipe_of
from lightning_qat.conversion.allocation import Allocation, cheapest
from lightning_qat.conversion.sensitivity import Sensitivity
from lightning_qat.conversion.state import layers
from lightning_qat.data import TextData
from lightning_qat.models import LanguageModel

NUM_BATCHES = 4
UNIFORM = {2: with_learned_scale(recipes.int2()), 3: with_learned_scale(recipes.int3())}
CANDIDATES = (1, Ternary(), 2, 3, 4, recipes.int8())
EVERY = tuple(range(len(CANDIDATES)))
WITHOUT_TERNARY = tuple(i for i in EVERY if i != 1)
PHASES = ("post-training", "trained")
SHOWN = ("task", "budget", "variant", "bits", *(f"{phase}{more}" for phase in PHASES for more in ("", ", paired")))
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Args:
        model: makes it.
        data: given a seed, returns what yields a random training batch, and the batches to measure on.
        steps: of the training in float; with quantization a tenth.
        rate: highest learning rate, of Adam with linear decay; with quantization a third.
    """

    model: Callable[[], nn.Module]
    data: Callable[[int], tuple[Callable[[], Batch], list[Batch]]]
    steps: int
    rate: float


def digits(seed: int) -> tuple[Callable[[], Batch], list[Batch]]:
    """Return 1400 digits to train on and 397 to measure on, drawn by the seed."""
    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)

    def draw() -> Batch:
        chosen = order[torch.randint(1400, (256,), generator=generator)]
        return x[chosen], y[chosen]

    return draw, [(x[order[1400:]], y[order[1400:]])]


@functools.cache
def text() -> tuple[Tensor, Tensor]:
    """Return the bytes to train on and those to measure on."""
    data = TextData(sequence_length=16, num_train_batches=1)
    data.prepare_data()
    data.setup("fit")
    return data.train_set.text, data.val_set.text


def windows(length: int, targets: int, batch: int, num_val: int) -> Callable[[int], Any]:
    """Return data of windows of bytes: the last ``targets`` positions are predicted."""

    def of_seed(seed: int) -> tuple[Callable[[], Batch], list[Batch]]:
        generator = torch.Generator().manual_seed(seed)
        train, val = text()

        def draw(source: Tensor, generator: torch.Generator) -> Batch:
            starts = torch.randint(len(source) - length, (batch, 1), generator=generator)
            window = source[starts + torch.arange(length + 1)].long()
            return window[:, :-1], window[:, -targets:].squeeze(1)

        fixed = torch.Generator().manual_seed(0)
        return functools.partial(draw, train, generator), [draw(val, fixed) for _ in range(num_val)]

    return of_seed


def perceptron(width: int, *head: nn.Module, inputs: int, classes: int) -> nn.Module:
    """Return two hidden layers."""
    hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*head, *hidden, nn.Linear(width, classes))


TASKS = {
    "digits": Task(lambda: perceptron(48, inputs=64, classes=10), digits, 300, 3e-3),
    "text": Task(
        lambda: perceptron(128, nn.Embedding(256, 12), nn.Flatten(), inputs=192, classes=256),
        windows(16, 1, 512, 16),
        600,
        4e-3,
    ),
    "transformer": Task(
        lambda: LanguageModel(hidden_size=64, num_heads=4, num_layers=3, window_size=64, dropout=0.0),
        windows(64, 64, 16, 32),
        1200,
        4e-3,
    ),
}


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of a batch."""
    logits = model(batch[0])
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def train(model: nn.Module, draw: Callable[[], Batch], steps: int, rate: float) -> None:
    """Train by Adam, with scales in the same group."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, draw()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measured(model: nn.Module, batches: list[Batch]) -> float:
    """Return the loss of a model as it is."""
    model.eval()
    return statistics.fmean(float(loss(model, batch)) for batch in batches)


def float_model(name: str, seed: int, folder: Path) -> nn.Module:
    """Return the float model of a seed; trained at the first call."""
    task, path = TASKS[name], folder / f"{name}{seed}.pt"
    torch.manual_seed(seed)
    model = task.model()
    if not path.is_file():
        train(model, task.data(seed)[0], task.steps, task.rate)
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def after_quantization(name: str, seed: int, folder: Path, variant: "Variant") -> dict[str, Any]:
    """Return the recipe of a variant, its bits per weight, and the loss without training."""
    model, batches = float_model(name, seed, folder), TASKS[name].data(seed)[1]
    recipe = variant(name, seed, folder)
    if recipe is None:
        return {"loss": measured(model, batches), "bits": 32.0}
    rows = [row for row in prepare(model, recipe) if row.decision == "quantized"]
    bits = sum(row.bits * row.numel for row in rows) / sum(row.numel for row in rows)
    return {"loss": measured(model, batches), "bits": bits, "recipe": recipe.to_dict()}


def after_training(name: str, seed: int, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Return the loss after training with a recipe, from the float weights."""
    task, model = TASKS[name], float_model(name, seed, folder)
    draw, batches = task.data(seed + 1000)[0], task.data(seed)[1]
    if name == "digits":  # drawn by the seed: others are among those to measure on
        draw = task.data(seed)[0]
    prepare(model, recipe)
    train(model, draw, task.steps // 10, task.rate / 3)
    return {"loss": measured(model, batches)}


@functools.cache
def sensitivities(name: str, seed: int, folder: Path, sensitivity: Sensitivity) -> tuple[Allocation, nn.Module]:
    """Return the table of a float model at all candidates, on training data, and the prepared model."""
    draw, _ = TASKS[name].data(seed)
    model = float_model(name, seed, folder)
    prepare(model, recipes.int4())
    table = find_allocation(
        model, [draw() for _ in range(NUM_BATCHES)], average_bits=8, candidates=CANDIDATES, sensitivity=sensitivity,
        forward=loss if sensitivity.needs_loss else None,
    )  # fmt: skip
    return table, model


def allocated(
    name: str, seed: int, folder: Path, bits: float, candidates: tuple[int, ...], sensitivity: Sensitivity
) -> Recipe:
    """Return what ``allocate_bits`` returns for some columns of the table, which is measured once for all budgets."""
    table, model = sensitivities(name, seed, folder, sensitivity)
    specs = tuple(tuple(row[c] for c in candidates) for row in table.specs)
    costs = tuple(tuple(row[c] for c in candidates) for row in table.sensitivities)
    chosen = cheapest(costs, [[spec.grid.bits_per_weight for spec in row] for row in specs], table.num_weights, bits)
    found = replace(table, specs=specs, sensitivities=costs, chosen=chosen, limit=bits)
    return recipe_of(found, recipes.int4(), layers(model))


Variant = Callable[[str, int, Path], Recipe | None]


def fixed(recipe: Recipe | None) -> Variant:
    """Return a variant that is the same for all seeds."""
    return lambda *_: recipe


def variants(name: str) -> dict[tuple[str, str], Variant]:
    """Return all that is compared, by budget and variant; the first of a budget is what the others differ from."""
    found: dict[tuple[str, str], Variant] = {("float", "float"): fixed(None)}
    for bits in (3, 2):
        found[f"{bits} bits", "the same width everywhere"] = fixed(UNIFORM[bits])
        for label, candidates, sensitivity in (
            ("divergence; 1, 2, 3, 4, 8 bits", WITHOUT_TERNARY, OutputDivergence()),
            ("divergence; and ternary", EVERY, OutputDivergence()),
            ("change of the loss; and ternary", EVERY, LossChange()),
            ("Fisher error; and ternary", EVERY, FisherError()),
        ):
            found[f"{bits} bits", label] = functools.partial(
                allocated, bits=bits, candidates=candidates, sensitivity=sensitivity
            )
    spec = UNIFORM[2].rules[0].spec
    assert spec is not None
    assert spec.weight is not None
    pi = Recipe((Rule("*", replace(spec, weight=replace(spec.weight, grid=Pi(2, 3)))),))
    for label, recipe in (("Int(2)", UNIFORM[2]), ("Pi(2, 3)", pi)):
        base = recipe.rules[0].spec
        assert base is not None
        found["2 bits, rotation", label] = fixed(recipe)
        rotated = Recipe((Rule("*", replace(base, transforms=(Hadamard(),))),))
        found["2 bits, rotation", f"{label}, rotated"] = fixed(rotated)
    return found


def measure(names: list[str], seeds: list[int], folder: Path) -> dict[str, dict[str, Any]]:
    """Measure what is not known yet, losses without training first; return all of it."""
    path = folder / "results.json"
    known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    for name, phase, seed in itertools.product(names, PHASES, seeds):
        for (budget, label), variant in variants(name).items():
            key = f"{phase}; {name}; {budget}; {label}; {seed}"
            if key in known or (phase == "trained" and budget == "float"):
                continue
            began = time.process_time()
            if phase == "trained":
                recipe = Recipe.from_dict(known[key.replace(phase, PHASES[0], 1)]["recipe"])
                known[key] = after_training(name, seed, folder, recipe)
            else:
                known[key] = after_quantization(name, seed, folder, variant)
            known[key]["cpu_seconds"] = time.process_time() - began
            path.write_text(json.dumps(known))
            print(f"{key}: {known[key]['loss']:.4f}, {known[key]['cpu_seconds']:.1f} s", flush=True)
    return known


def summary(values: list[float]) -> str:
    """Return mean and standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.4f} +- {error:.4f}"


def table_of(known: dict[str, dict[str, Any]], names: list[str], seeds: list[int]) -> list[dict[str, Any]]:
    """Return a row per variant, with differences to the first of its task and budget."""
    rows: list[dict[str, Any]] = []
    first: dict[tuple[str, str, str], list[float]] = {}
    for name in names:
        for budget, label in variants(name):
            row: dict[str, Any] = {"task": name, "budget": budget, "variant": label}
            for phase in PHASES:
                found = [known.get(f"{phase}; {name}; {budget}; {label}; {seed}", {}) for seed in seeds]
                losses = [each["loss"] for each in found if "loss" in each]
                if len(losses) < len(seeds):
                    continue
                base = first.setdefault((name, budget, phase), losses)
                row[phase] = summary(losses)
                row[f"{phase}, paired"] = summary([a - b for a, b in zip(losses, base, strict=True)])
                row[f"{phase}, losses"] = losses
                if phase == PHASES[0]:
                    row["bits"] = statistics.fmean(each["bits"] for each in found)
                    row["widths"] = [widths(each["recipe"]) for each in found if "recipe" in each]
            rows.append(row)
    return rows


def widths(recipe: dict[str, Any]) -> dict[str, str]:
    """Return the grid of each rule."""
    rules = Recipe.from_dict(recipe).rules
    return {rule.match: rule.spec.weight.grid.label for rule in rules if rule.spec and rule.spec.weight}


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", choices=sorted(TASKS), nargs="+", default=["digits", "text"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--cache", type=Path, default=Path("outputs/allocation"), help="folder of models and results")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    known = measure(arguments.tasks, arguments.seeds, arguments.cache)
    rows = table_of(known, arguments.tasks, arguments.seeds)
    show([{key: row[key] for key in SHOWN if key in row} for row in rows])
    if arguments.output:
        content = {"machine": machine(), "settings": {"seeds": arguments.seeds}, "rows": rows}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
