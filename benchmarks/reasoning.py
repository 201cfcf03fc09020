"""What is left of multi-step arithmetic at 2 and 3 bits: rounding alone, training, a teacher, its reasoning.

    python -m benchmarks.reasoning --output benchmarks/reasoning.json --plot docs/images/reasoning.png
    python -m benchmarks.reasoning --grids int2 --methods distillation reasoning --seeds 0      # a part of it

The task is `lightning_qat.data.ArithmeticData`: problems of 2 and 3 steps (levels 1 and 2, ``13-1-9-2=``) are solved in
written-out steps. The figure is the exact match: the share of 500 unseen problems, the same for every run, whose answer
is right when the model writes greedily from the problem on.

The float model that learns it in two to three minutes of one core (80 to 100 ms a step): `float_settings()`, 2 layers
of width 96, 1500 steps of 64 problems, AdamW with weight decay 0.1, learning rate 4e-3 with a warm-up of 10 % and a
cosine to 0, gradients clipped at norm 1. Each seed has its own initial weights and training problems. Everything that
trains with quantization starts from it, for a third of its steps, and for a fifteenth, where more is left to gain.
"""

import argparse
import json
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.learned import with_learned_scale
from benchmarks.output import machine
from lightning_qat import Distillation, QATCallback, ReasoningMatch, Recipe, Rule, prepare, recipes
from lightning_qat.callbacks import BatchMask, TargetMask
from lightning_qat.data import ArithmeticData
from lightning_qat.losses import ReasoningWeights
from lightning_qat.models import ArithmeticModel
from lightning_qat.quantization import AbsMax, Int, LayerSpec, QuantizerSpec, Ternary

FLOAT_STEPS = 1500
QAT_STEPS = (FLOAT_STEPS // 3, FLOAT_STEPS // 15)
BATCH_SIZE, NUM_TEST, LEVELS = 64, 500, (1, 2)
QAT_LEARNING_RATE = 4e-3
GRIDS = {name: with_learned_scale(recipes.named(name)) for name in ("int3", "int2", "ternary")}
AFTER = {
    "rounding": "post-training, absolute maximum",
    "post-training": "post-training, scales of least error",
}
METHODS = {
    **AFTER,
    "qat": "QAT",
    "distillation": "QAT + distillation",
    "reasoning": "QAT + distillation + reasoning",
}
BEFORE = {"distillation": "qat", "reasoning": "distillation"}
Key = tuple[str, str, int, int]


def float_settings() -> dict[str, Any]:
    """Return the arguments of `ArithmeticModel` for the float model."""
    return {
        "hidden_size": 96, "num_heads": 4, "num_layers": 2, "window_size": 42, "learning_rate": 4e-3,
        "weight_decay": 0.1,
    }  # fmt: skip


def data(seed: int, steps: int) -> ArithmeticData:
    """Return training problems for so many steps."""
    return ArithmeticData(LEVELS, batch_size=BATCH_SIZE, num_train=steps * BATCH_SIZE, num_val=64, seed=seed)


def model(seed: int, **changes: Any) -> ArithmeticModel:
    """Return a model with the initial weights of a seed."""
    L.seed_everything(seed, verbose=False)
    return ArithmeticModel(**{**float_settings(), **changes})


def fit(module: ArithmeticModel, problems: ArithmeticData, steps: int, callbacks: Iterable[Any] = ()) -> None:
    """Train."""
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, problems)


def evaluate(module: ArithmeticModel, num_problems: int = NUM_TEST, split: str = "test") -> dict[str, float]:
    """Return the exact match and the loss (nats per character of the solutions) on unseen problems."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    problems = ArithmeticData(LEVELS, batch_size=250, num_train=1, num_val=num_problems, num_test=num_problems)
    run = trainer.test if split == "test" else trainer.validate
    (found,) = run(module, problems, verbose=False)
    return {"exact_match": found[f"{split}_exact_match"], "loss": found[f"{split}_loss"]}


def float_model(seed: int, cache: Path) -> tuple[ArithmeticModel, dict[str, float]]:
    """Return the trained float model of a seed and its figures; trained at the first call, then read from the cache."""
    path = cache / f"float{seed}_{FLOAT_STEPS}.pt"
    module = model(seed)
    if not path.is_file():
        began = time.process_time()
        fit(module, data(seed, FLOAT_STEPS), FLOAT_STEPS)
        seconds = time.process_time() - began
        path.parent.mkdir(parents=True, exist_ok=True)
        figures = {**evaluate(module), "cpu_seconds": seconds}
        torch.save({"state_dict": module.state_dict(), "figures": figures}, path)
    saved = torch.load(path, weights_only=True)
    module.load_state_dict(saved["state_dict"])
    return module, saved["figures"]


def rounding(grid: str) -> Recipe:
    """Return the recipe of a grid with the scale of the absolute maximum, which nothing searches."""
    kinds = {"int3": Int(3), "int2": Int(2), "ternary": Ternary()}
    return Recipe((Rule("*", LayerSpec(QuantizerSpec(kinds[grid], scale=AbsMax()))),))


def callbacks_of(grid: str, method: str, weight: float = 1.0, preset: str = "default") -> list[Any]:
    """Return the callbacks that a method trains with; the teacher is the float model."""
    match = ReasoningMatch(
        "backbone.norm",
        boundaries=BatchMask("step_mask"),
        answer=BatchMask("answer_mask"),
        weights=ReasoningWeights.named(preset),
        weight=weight,
    )
    found: list[Any] = [QATCallback(GRIDS[grid])]
    if method != "qat":
        found.append(Distillation(mask=TargetMask(), reasoning=match if method == "reasoning" else None))
    return found


def quantized(grid: str, method: str, steps: int, seed: int, cache: Path) -> ArithmeticModel:
    """Return the float model of a seed, quantized by a method; no steps are after training."""
    weights = float_model(seed, cache)[0].state_dict()
    module = model(seed, learning_rate=QAT_LEARNING_RATE, weight_decay=0.0)
    module.load_state_dict(weights)
    if method in AFTER:
        prepare(module, rounding(grid) if method == "rounding" else GRIDS[grid])
    else:
        fit(module, data(seed + 1000, steps), steps, callbacks_of(grid, method))
    return module


def run(grid: str, method: str, steps: int, seed: int, cache: Path) -> dict[str, Any]:
    """Return a row: what was done, and its figures."""
    began = time.process_time()
    module = quantized(grid, method, steps, seed, cache)
    seconds = time.process_time() - began
    kept = float_model(seed, cache)[1]["exact_match"]
    figures = evaluate(module)
    what = {"grid": grid, "method": method, "steps": steps, "seed": seed}
    return {**what, **figures, "kept": figures["exact_match"] / kept, "cpu_seconds": round(seconds, 1)}


def runs(options: argparse.Namespace) -> list[Key]:
    """Return what is asked for: seed by seed, the long budget first."""
    found: list[Key] = []
    for seed in options.seeds:
        for steps in (0, *options.steps):
            methods = [method for method in options.methods if (method in AFTER) == (steps == 0)]
            found += [(grid, method, steps, seed) for grid in options.grids for method in methods]
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Return mean and standard deviation of a sample."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return {"mean": statistics.fmean(values), "standard_deviation": deviation}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and spread for each grid, budget and method, and the difference to the method before.

    The difference is paired: of the same seed, so of the same float model and training problems.
    """
    groups: dict[tuple[str, str, int], dict[int, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["grid"], row["method"], row["steps"]), {})[row["seed"]] = row
    found = []
    for (grid, method, steps), chosen in groups.items():
        line: dict[str, Any] = {"grid": grid, "method": method, "steps": steps}
        before = groups.get((grid, BEFORE.get(method, ""), steps), {})
        for name in ("exact_match", "kept", "loss"):
            line[name] = spread([row[name] for row in chosen.values()])
            both = [row[name] - before[seed][name] for seed, row in chosen.items() if seed in before]
            line[f"{name}_gain"] = spread(both) if both else None
        found.append(line)
    return found


def show(lines: list[dict[str, Any]]) -> None:
    """Print the summary as a table in Markdown."""
    print("| weights | steps | method | exact match, % | of float, % | loss | paired, points | paired, loss |")
    print("|---|---|---|---|---|---|---|---|")
    for line in lines:
        percent = [_text(line[name], 100, 1) for name in ("exact_match", "kept")]
        paired = [_text(line["exact_match_gain"], 100, 1, "+"), _text(line["loss_gain"], 1, 4, "+")]
        cells = [
            line["grid"],
            str(line["steps"]),
            METHODS[line["method"]],
            *percent,
            _text(line["loss"], 1, 4),
            *paired,
        ]
        print("| " + " | ".join(cells) + " |")


def _text(found: dict[str, float] | None, factor: float, digits: int, sign: str = "") -> str:
    if found is None:
        return ""
    mean, deviation = found["mean"] * factor, found["standard_deviation"] * factor
    return f"{mean:{sign}.{digits}f} ± {deviation:.{digits}f}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the share of the float model's exact match that each method keeps at the long budget; a dot is a seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["steps"] in (0, QAT_STEPS[0])]
    grids = list(dict.fromkeys(row["grid"] for row in rows))
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    width = 0.8 / len(METHODS)
    for i, (method, label) in enumerate(METHODS.items()):
        kept = [[100 * row["kept"] for row in rows if (row["grid"], row["method"]) == (grid, method)] for grid in grids]
        places = [j + (i - (len(METHODS) - 1) / 2) * width for j in range(len(grids))]
        means = [statistics.fmean(values) if values else 0.0 for values in kept]
        bars = axes.bar(places, means, 0.92 * width, label=label, color=f"C{i}")
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=3)
        for place, values in zip(places, kept, strict=True):
            axes.plot([place] * len(values), values, ".", color="black", markersize=3)
    axes.axhline(90, color="gray", linewidth=1, linestyle="--", zorder=0)
    axes.set_xticks(range(len(grids)), grids)
    axes.set_ylim(0, 109)
    axes.set_ylabel("exact match kept, % of the float model's")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", choices=list(GRIDS), nargs="+", default=list(GRIDS))
    parser.add_argument("--methods", choices=list(METHODS), nargs="+", default=list(METHODS))
    parser.add_argument("--steps", type=int, nargs="+", default=list(QAT_STEPS), help="budgets of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path("outputs/reasoning"), help="folder of the float models")
    parser.add_argument("--output", type=Path, help="JSON file to write; rows in it are not run again")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    return parser.parse_args(arguments)


def main() -> None:
    """Run what is asked for and missing, print the table, write the figures and the plot."""
    options = parse(sys.argv[1:])
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    known = json.loads(options.output.read_text())["rows"] if options.output and options.output.is_file() else []
    rows = {(row["grid"], row["method"], row["steps"], row["seed"]): row for row in known}
    for key in runs(options):
        if key not in rows:
            row = rows[key] = run(*key, options.cache)
            print(*key, f"{row['exact_match']:.3f} {row['loss']:.5f} {row['cpu_seconds']:.0f} s", flush=True)
            if options.output:
                write(options, list(rows.values()))
    grids, methods = list(GRIDS), list(METHODS)
    ordered = [
        rows[key] for key in sorted(rows, key=lambda k: (grids.index(k[0]), k[2] > 0, -k[2], methods.index(k[1]), k[3]))
    ]
    show(summary(ordered))
    if options.plot:
        plot(ordered, options.plot)


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the figures so far."""
    floats = {str(seed): float_model(seed, options.cache)[1] for seed in dict.fromkeys(row["seed"] for row in rows)}
    settings = {
        "float": {**float_settings(), "steps": FLOAT_STEPS, "batch_size": BATCH_SIZE},
        "qat": {"learning_rate": QAT_LEARNING_RATE, "weight_decay": 0.0},
        "test_problems": NUM_TEST,
    }
    content = {"machine": machine(), "settings": settings, "float": floats, "rows": rows}
    options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
