"""What is left of a model at 8 to 1 bits: our recipes, peers and the float model, for the same training budget.

    python -m benchmarks.accuracy --task text --width int2 ternary --seed 0 1 2     # adds to benchmarks/accuracy.json
    python -m benchmarks.accuracy --report                                           # table and plot of what is there

A float model is trained for a fixed number of steps. From its weights, each with a third of those steps and of those
samples, the same optimizer, schedule and batches: training goes on in float (the reference, with and without a
teacher), or with quantization by a method. The teacher is the float model as it was. Weights of all layers but the head
are quantized, one scale per output channel (bitnet: ours per tensor). Figures are losses on the test data in nats;
excess is the loss above the float reference of the same seed. Ours is ``recommended_callbacks(recipe)``, the same for
every task.
"""

import argparse
import copy
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from scipy.stats import sem, t

from benchmarks.learned import with_learned_scale
from benchmarks.output import machine
from benchmarks.peers import PEERS, WEIGHT_BITS, parq
from lightning_qat import (
    AbsMax,
    Distillation,
    FeatureMatch,
    GradualQuantization,
    LayerSpec,
    MinimumError,
    OrthogonalUpdates,
    ParameterGroup,
    QATCallback,
    QuantizerSpec,
    Recipe,
    Rule,
    StraightThrough,
    recipes,
    recommended_callbacks,
)
from lightning_qat.callbacks import TargetMask
from lightning_qat.callbacks.running import call_module  # predict_step of the arithmetic task writes whole solutions
from lightning_qat.data import ArithmeticData, DigitImages, DigitsData, TextData
from lightning_qat.data.digits import AbstractDigits
from lightning_qat.models import ArithmeticModel, ConvNet, LanguageModel, SequenceClassifier

# Tasks ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A model, its data and its budget.

    Args:
        model: builds it from the learning rate.
        data: builds it from the number of a split, a seed, a batch size and a number of batches. What few data are
            tested on depends on the split.
        steps: of the float training; a third of them for all that follows.
        learning_rate: the highest of the cosine schedule, in float.
        mask: which positions have a target, where not all do.
        rate: factor of the learning rates (`RATES`) of all that follows the float training.
        batch_size: of all that follows the float training, which has 64.
        num_seeds: how many runs by default; the seed is the number of the split, too.
    """

    model: Callable[..., L.LightningModule]
    data: Callable[[int, int, int, int], L.LightningDataModule]
    steps: int
    learning_rate: float
    mask: TargetMask | None = None
    rate: float = 1.0
    batch_size: int = 64
    num_seeds: int = 3


def _text(_: int, seed: int, batch_size: int, num_batches: int) -> L.LightningDataModule:
    return TextData(sequence_length=64, batch_size=batch_size, num_train_batches=num_batches, seed=seed)


def _digits(kind: type[AbstractDigits], split: int, seed: int, batch_size: int, _: int) -> L.LightningDataModule:
    return kind(batch_size, seed=seed, split_seed=split)


def _arithmetic(_: int, seed: int, batch_size: int, num_batches: int) -> L.LightningDataModule:
    return ArithmeticData((1, 2), batch_size=batch_size, num_train=batch_size * num_batches, num_val=64, seed=seed)


FLOAT_BATCH_SIZE = 64
TASKS = {
    "digits": Task(
        partial(SequenceClassifier, 10, embed_dim=8, hidden_size=64, num_heads=4, num_layers=2, window_size=8),
        partial(_digits, DigitsData), 900, 3e-3, num_seeds=12,
    ),
    "images": Task(partial(ConvNet, 10), partial(_digits, DigitImages), 600, 1e-2, num_seeds=12),
    "text": Task(
        partial(LanguageModel, hidden_size=64, num_heads=4, num_layers=2, window_size=64), _text, 1500, 4e-3, rate=2.0
    ),
    "arithmetic": Task(
        partial(ArithmeticModel, hidden_size=64, num_heads=4, num_layers=2, window_size=42), _arithmetic, 1500, 4e-3,
        TargetMask(), rate=1.41421356,
    ),
}  # fmt: skip
# Of the highest learning rate of the float training; the same for all methods. Chosen for plain LSQ on the validation
# data of the text with batches of 16, for the float reference, too; `Task.rate` goes with the square root of batches.
RATES = {"ternary": 0.5, "bitnet": 0.5, "ternary_a8": 0.5, "int2": 0.5, "seq2": 0.5, "binary": 1.0}
RATE = 0.25

# Methods --------------------------------------------------------------------------------------------------------------

WIDTHS = (*WEIGHT_BITS, "seq2", "ternary_a8")
AS_MANY_BITS = {"seq2": "int2", "ternary_a8": "bitnet"}
"""Ours alone: half-integer levels; ternary weights with a scale per channel, inputs as those of bitnet."""
BITS = {"int8": 8.0, "int4": 4.0, "int3": 3.0, "int2": 2.0, "ternary": 1.58, "binary": 1.0}
FOLLOWED = ("int3", "int2", "seq2", "ternary", "ternary_a8", "bitnet")  # layers of one bit cannot follow

REFERENCES = ("float", "float + teacher", "float + teacher of blocks")
AFTER_TRAINING = ("after training", "after training, absmax")
TEACHER, TEACHER_OF_BLOCKS = " + teacher", " + teacher of blocks"
OURS, ALONE, LEARNED = "ours", "ours, QATCallback alone", "ours, learned scale"
STAYS, SURE, SMALL_BATCHES = "ours, teacher stays", "ours, teacher as sure", "ours, small batches"
WITHOUT = {
    "ours, without teacher": Distillation,
    "ours, without orthogonal updates": OrthogonalUpdates,
    "ours, rounding at once": GradualQuantization,
}
ABLATIONS = (ALONE, LEARNED, *WITHOUT, "ours, others no faster", STAYS, SURE, SMALL_BATCHES)
"""Ours with less: beside the table's own methods, by name. A learned scale is what recipes had, and peers have."""


def but_head(recipe: Recipe, module: L.LightningModule) -> Recipe:
    """Return a recipe that leaves the head in float, where there is one."""
    return Recipe((Rule("head", None), *recipe.rules)) if hasattr(module, "head") else recipe


def _after_training(width: str, *, search: bool) -> Recipe:
    """Return round to nearest: the grid of a recipe, scales by absolute maximum or least error."""
    spec = recipes.named(width).rules[0].spec
    assert spec is not None
    assert spec.weight is not None
    scale = MinimumError() if search else AbsMax()
    weight = QuantizerSpec(spec.weight.grid, spec.weight.granularity, scale, StraightThrough())
    return Recipe((Rule("*", LayerSpec(weight, spec.input)),))


def _ours(method: str, width: str, module: L.LightningModule, mask: TargetMask | None) -> list[Any]:
    recipe = recipes.named(width)
    recipe = but_head(with_learned_scale(recipe) if method == LEARNED else recipe, module)
    callbacks: list[Any] = recommended_callbacks(recipe, mask=mask, forward=call_module)
    if method == "ours, others no faster":
        callbacks[0] = QATCallback(recipe)
    if method == STAYS:
        callbacks[-1] = Distillation(mask=mask, max_odds=100.0)
    if method == SURE:
        callbacks[-1] = Distillation(mask=mask, fade_below=1.0)
    return [each for each in callbacks if not isinstance(each, WITHOUT.get(method, ()))]


def _small_batches(width: str, module: L.LightningModule, mask: TargetMask | None) -> list[Any]:
    """Return ours for gradients of much noise: blocks follow the teacher's, too, and rounding sets in longer."""
    callbacks = _ours(OURS, width, module, mask)
    if width in FOLLOWED:
        callbacks[-1] = Distillation(mask=mask, fade_below=1.0, features=(FeatureMatch(fade_below=0.1),))
    if width == "binary":
        slower = ParameterGroup(kind="others", lr_multiplier=4.0)
        callbacks[0] = QATCallback(but_head(recipes.named(width), module), groups=(slower,))
        callbacks[-1] = Distillation(mask=mask)
    if width in ("int4", "w4a8"):
        callbacks[0] = QATCallback(but_head(recipes.named(width), module), scale_lr_multiplier=0.1)
    callbacks[-2] = GradualQuantization(0.9 if width == "binary" else 0.8)
    return callbacks


def callbacks_of(method: str, width: str, module: L.LightningModule, mask: TargetMask | None) -> list[Any]:
    """Return what is given to the trainer; none for a peer without a teacher, which has converted the module."""
    if method in AFTER_TRAINING:
        return [QATCallback(but_head(_after_training(width, search="absmax" not in method), module))]
    if method == ALONE:
        return [QATCallback(but_head(recipes.named(width), module))]
    if method == SMALL_BATCHES:
        return _small_batches(width, module, mask)
    if method.startswith(OURS):
        return _ours(method, width, module, mask)
    if method.endswith(TEACHER_OF_BLOCKS):
        return [Distillation(copy.deepcopy(module), mask=mask, features=(FeatureMatch(),))]
    return [Distillation(copy.deepcopy(module), mask=mask)] if method.endswith(TEACHER) else []


def _peer(method: str) -> str:
    """Return a method without the teacher that may be added to it."""
    return method.removesuffix(TEACHER_OF_BLOCKS).removesuffix(TEACHER)


def methods(task: str, width: str) -> list[str]:
    """Return what is compared at a width; ``float`` stands for no quantization."""
    if width == "float":
        return list(REFERENCES[:2])
    able = {name: peer for name, peer in PEERS.items() if peer.convolutions or task != "images"}
    peers = [name for name, peer in able.items() if width in peer.widths and peer.installed]
    return [*AFTER_TRAINING, *peers, ALONE, OURS]


def applies(method: str, task: str, width: str) -> bool:
    """Return whether there is such a method at a width, among those compared by default or beside them."""
    return (width != "float" and method in ABLATIONS) or _peer(method) in methods(task, width)


# Runs -----------------------------------------------------------------------------------------------------------------


def _module(task: Task, seed: int, rate: float, weight_decay: float) -> L.LightningModule:
    L.seed_everything(seed, verbose=False)
    return task.model(learning_rate=rate * task.learning_rate, weight_decay=weight_decay)


def quiet_trainer(steps: int, callbacks: list[Any]) -> L.Trainer:
    """Return a trainer on the CPU that shows and keeps nothing."""
    return L.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, limit_val_batches=0,
    )  # fmt: skip


def _fit(module: L.LightningModule, data: L.LightningDataModule, seed: int, steps: int, callbacks: list[Any]) -> None:
    L.seed_everything(seed, verbose=False)
    quiet_trainer(steps, callbacks).fit(module, datamodule=data)


def _evaluate(task: Task, module: L.LightningModule, split: int, callbacks: list[Any]) -> dict[str, float]:
    converting = [each for each in callbacks if isinstance(each, QATCallback)]
    found = quiet_trainer(1, converting).test(module, datamodule=task.data(split, 0, 64, 1), verbose=False)[0]
    return {name.removeprefix("test_"): float(value) for name, value in found.items()}


def float_model(task: Task, name: str, width: str, seed: int, folder: Path) -> L.LightningModule:
    """Return the float model of a seed, ready to go on from; trained at the first call."""
    path = folder / f"{name}_{seed}_{task.steps}.pt"  # {name}{seed}: of former splits
    if not path.is_file():
        module = _module(task, seed, 1.0, 0.1)
        _fit(module, task.data(seed, seed, FLOAT_BATCH_SIZE, task.steps), seed, task.steps, [])
        torch.save(module.state_dict(), path)
    module = _module(task, seed, RATES.get(width, RATE) * task.rate, 0.0)
    module.load_state_dict(torch.load(path, weights_only=True))
    return module


def run(name: str, width: str, method: str, seed: int, folder: Path) -> dict[str, float]:
    """Return the test metrics of one training."""
    task = TASKS[name]
    module = float_model(task, name, width, seed, folder)
    callbacks = callbacks_of(method, width, module, task.mask)
    peer = PEERS.get(_peer(method))
    if peer is not None:
        if peer.convert is None:
            parq(module, width)
        else:
            peer.convert(module, width, _example(task))
    if method not in AFTER_TRAINING:
        steps, order = task.steps // 3, seed + 1000
        _fit(module, task.data(seed, order, task.batch_size, steps), order, steps, callbacks)
    return _evaluate(task, module, seed, callbacks)


def _example(task: Task) -> torch.Tensor:
    data: Any = task.data(0, 0, 4, 1)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    example: torch.Tensor = batch["tokens"] if isinstance(batch, dict) else batch[0]
    return example


# Report ---------------------------------------------------------------------------------------------------------------


def summary(values: list[float]) -> tuple[float, float]:
    """Return the mean and half of its 95 % confidence interval."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), float(sem(values) * t.ppf(0.975, len(values) - 1))


def excess(results: dict[str, Any], task: str, width: str, method: str) -> list[float]:
    """Return the losses above the float reference, by seed."""
    own = results.get(f"{task}/{width}/{method}", {})
    reference = results.get(f"{task}/float/float", {})
    return [own[seed]["loss"] - reference[seed]["loss"] for seed in sorted(own) if seed in reference]


def table(results: dict[str, Any], task: str) -> list[dict[str, str]]:
    """Return a row for each method and a column for each width: excess loss and half its 95 % interval."""
    found: dict[str, dict[str, str]] = {}
    taught = [f"{peer}{teacher}" for peer in PEERS for teacher in (TEACHER, TEACHER_OF_BLOCKS)]
    for width in ("float", *WIDTHS):
        for method in [*REFERENCES[1:], *AFTER_TRAINING, *PEERS, *taught, *ABLATIONS, OURS]:
            if values := excess(results, task, width, method):
                found.setdefault(method, {"method": method})[width] = "{:.4f} ± {:.4f}".format(*summary(values))
    return list(found.values())


def comparison(results: dict[str, Any], task: str) -> list[dict[str, str]]:
    """Return a row for each width: the best peer, ours, and what ours recovers of the loss of rounding alone."""
    rows = []
    for width in WIDTHS:
        same = AS_MANY_BITS.get(width, width)
        peers = {name: values for name in PEERS if (values := excess(results, task, same, name))}
        own = excess(results, task, width, OURS) or excess(results, task, width, SMALL_BATCHES)
        after = excess(results, task, same, AFTER_TRAINING[0])
        if not peers or not own or not after:
            continue
        best = min(peers, key=lambda name: statistics.fmean(peers[name]))
        pairs = [ours - peer for ours, peer in zip(own, peers[best], strict=True)]
        ours, peer = statistics.fmean(own), statistics.fmean(peers[best])
        rows.append(
            {
                "width": width, "best peer": best, "excess": f"{peer:.4f}", "ours": f"{ours:.4f}",
                "paired": "{:+.4f} ± {:.4f}".format(*summary(pairs)), "ratio": f"{ours / peer:.2f}",
                "recovered": f"{1 - ours / statistics.fmean(after):.1%}",
            }
        )  # fmt: skip
    return rows


def show(columns: list[str], rows: list[dict[str, str]]) -> None:
    """Print a table in Markdown."""
    for line in (columns, ["---"] * len(columns), *([row.get(c, "") for c in columns] for row in rows)):
        print("| " + " | ".join(line) + " |")


def report(results: dict[str, Any]) -> None:
    """Print two tables for each task."""
    for task in TASKS:
        rows = table(results, task)
        if not rows:
            continue
        reference = [entry["loss"] for entry in results[f"{task}/float/float"].values()]
        print(f"\n{task}: excess loss (float, same budget: {statistics.fmean(reference):.4f})\n")
        show(["method", *(width for width in ("float", *WIDTHS) if any(width in row for row in rows))], rows)
        print()
        against = comparison(results, task)
        show(list(against[0]) if against else [], against)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw excess loss against the bits of a weight: ours, the peers, post-training; not of tasks that saturate."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in ("text", "arithmetic") if table(results, task)]
    figure, axes = plt.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for number, method in enumerate([AFTER_TRAINING[0], *PEERS, ALONE, OURS]):
            means = {w: statistics.fmean(v) for w in BITS if (v := excess(results, task, w, method))}
            style = {"linewidth": 2.5, "color": "black", "zorder": 3} if method == OURS else {"color": f"C{number}"}
            places = [list(BITS).index(width) for width in means]
            axis.plot(places, list(means.values()), marker="o", markersize=3, label=method, **style)
        if half_integers := excess(results, task, "seq2", OURS):
            axis.plot(list(BITS).index("int2"), statistics.fmean(half_integers), "k*", zorder=3, label="ours, seq2")
        axis.axhline(0.0, color="gray", linestyle=":", label="float, same budget")
        axis.set(
            title=task, xlabel="bits per weight", xticks=range(len(BITS)), xticklabels=[f"{b:g}" for b in BITS.values()]
        )
        axis.set_yscale("symlog", linthresh=0.01 if task == "text" else 0.001)
    axes[0][0].set_ylabel("loss above float, nats")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=120)


# Command line ---------------------------------------------------------------------------------------------------------


def _jobs(arguments: argparse.Namespace) -> list[tuple[str, str, str, int]]:
    return [
        (task, width, method, seed)
        for task in arguments.task
        for width in arguments.width
        for method in (arguments.method or methods(task, width))
        for seed in (arguments.seed or range(TASKS[task].num_seeds))
        if applies(method, task, width)
    ]


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"machine": machine(), "results": {}}
    return content


def _carry_out(arguments: argparse.Namespace, task: str, width: str, method: str, seed: int) -> None:
    key = f"{task}/{width}/{method}"
    if str(seed) in _read(arguments.output)["results"].get(key, {}) and not arguments.again:
        return
    began = time.perf_counter()
    found = run(task, width, method, seed, arguments.cache)
    print(f"{key:45} seed {seed}  loss {found['loss']:.4f}  {time.perf_counter() - began:.0f} s", flush=True)
    content = _read(arguments.output)  # read again: runs of other tasks may write beside this one
    content["results"].setdefault(key, {})[str(seed)] = found
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Carry out what is asked for and not there yet, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=sorted(TASKS), default=["digits", "images", "text", "arithmetic"])
    parser.add_argument("--width", nargs="+", choices=("float", *WIDTHS), default=["float", *WIDTHS])
    parser.add_argument("--method", nargs="+", help="default: all but ablations")
    parser.add_argument("--seed", type=int, nargs="+", help="default: 0 1 2; of digits, which are few, 0 to 11")
    parser.add_argument("--batch-size", type=int, help="of what follows the float training; default: 64")
    parser.add_argument("--learning-rate", type=float, help="factor of that of what follows; default: see TASKS")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/accuracy.json"))
    parser.add_argument("--cache", type=Path, default=Path("outputs/accuracy"), help="folder of the float models")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--report", action="store_true", help="only show what is there, and draw the plot")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/accuracy.png"))
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        size, rate = arguments.batch_size or task.batch_size, arguments.learning_rate or task.rate
        TASKS[name] = replace(task, batch_size=size, rate=rate)
    known = {each for each in arguments.method or () for t in TASKS for w in ("float", *WIDTHS) if applies(each, t, w)}
    if unknown := set(arguments.method or ()) - known:
        parser.error(f"no such method, or a peer that is not installed: {', '.join(sorted(unknown))}")
    if not arguments.report:
        for task, width, method, seed in _jobs(arguments):
            _carry_out(arguments, task, width, method, seed)
    results = _read(arguments.output)["results"]
    report(results)
    if arguments.report:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
