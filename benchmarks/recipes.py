"""What progressive bit widths and distillation are worth below 3 bits, at equal numbers of steps.

    python -m benchmarks.recipes --study trained --seeds 0 1 2 --output benchmarks/recipes_trained.json
    python -m benchmarks.recipes --study scratch --seeds 0 1 2 --output benchmarks/recipes_scratch.json
    python -m benchmarks.recipes --study int2 --seeds 0 1 2 --output benchmarks/recipes_int2.json
    python -m benchmarks.recipes --study ternary --seeds 0 1 2 --output benchmarks/recipes_ternary.json

The model is a language model of bytes (hidden size 64, 3 layers, context 64) on the documentation that ships with
Python. Figures are validation losses in nats per byte, mean and standard error over the seeds; each seed has its own
initial weights, order of the data and float model.
"""

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.learned import with_learned_scale
from lightning_qat import Distillation, Int, ProgressiveBitWidth, QATCallback, Ternary, recipes
from lightning_qat.data import TextData
from lightning_qat.models import LanguageModel
from lightning_qat.schedules import ByFraction

FLOAT_STEPS, SHORT, LONG = 1200, 100, 400
SEQUENCE_LENGTH, BATCH_SIZE = 64, 16
GRIDS = {name: with_learned_scale(recipes.named(name)) for name in ("int2", "ternary")}
STAGES: dict[str, ByFraction | None] = {
    "direct": None,
    "8-4-2 at 1/3, 2/3": ByFraction({0.0: 8, 1 / 3: 4, 2 / 3: 2}),
    "8-4-2 at 0.1, 0.2": ByFraction({0.0: 8, 0.1: 4, 0.2: 2}),
    "8-4-2 at 0.03, 0.06": ByFraction({0.0: 8, 0.03: 4, 0.06: 2}),
    "8-4-ternary at 0.1, 0.2": ByFraction({0.0: Int(8), 0.1: Int(4), 0.2: Ternary()}),
}


@dataclass(frozen=True)
class Run:
    """A training with quantization.

    Args:
        grid: a key of GRIDS.
        stages: a key of STAGES.
        steps: optimizer steps.
        start: ``float`` (a trained float model) or ``scratch``.
        learning_rate: the highest of the cosine schedule.
        distillation: weight of the loss of the teacher, a copy of the float model; 0 is without.
        temperature: of the teacher's loss.
        scale_lr_multiplier: learning rate of scales relative to weights.
        quantized: False continues in float, for comparison.
    """

    grid: str
    stages: str
    steps: int
    start: str = "float"
    learning_rate: float = 1e-3
    distillation: float = 0.0
    temperature: float = 2.0
    scale_lr_multiplier: float = 1.0
    quantized: bool = True


def data(seed: int, steps: int) -> TextData:
    """Return the text in one epoch of so many batches."""
    return TextData(
        sequence_length=SEQUENCE_LENGTH, batch_size=BATCH_SIZE, num_train_batches=steps, val_fraction=0.1, seed=seed
    )


def model(seed: int, learning_rate: float) -> LanguageModel:
    """Return a model with the initial weights of a seed."""
    L.seed_everything(seed, verbose=False)
    return LanguageModel(
        hidden_size=64, num_heads=4, num_layers=3, window_size=SEQUENCE_LENGTH, learning_rate=learning_rate,
        weight_decay=0.0,
    )  # fmt: skip


def fit(module: LanguageModel, seed: int, steps: int, callbacks: list[Any]) -> float:
    """Train and return the validation loss in nats per byte."""
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data(seed, steps))
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[each for each in callbacks if isinstance(each, QATCallback)],
    )  # fmt: skip
    return float(trainer.validate(module, datamodule=data(seed, steps), verbose=False)[0]["val_loss"])


def float_weights_of(seed: int, folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the float model of a seed, trained at the first call."""
    path = folder / f"float{seed}_{FLOAT_STEPS}.pt"
    if not path.is_file():
        module = model(seed, 4e-3)
        loss = fit(module, seed, FLOAT_STEPS, [])
        torch.save({"state_dict": module.state_dict(), "val_loss": loss}, path)
    weights: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return weights


def callbacks_of(run: Run) -> list[Any]:
    """Return the callbacks that make up a run."""
    found: list[Any] = []
    if run.quantized:
        found.append(QATCallback(GRIDS[run.grid], scale_lr_multiplier=run.scale_lr_multiplier))
    schedule = STAGES[run.stages]
    if schedule is not None:
        found.append(ProgressiveBitWidth(schedule, unit="step"))
    if run.distillation:
        found.append(Distillation(weight=run.distillation, temperature=run.temperature))
    return found


def train(run: Run, seed: int, folder: Path) -> float:
    """Carry a run out and return its validation loss."""
    weights = float_weights_of(seed, folder)
    module = model(seed, run.learning_rate)
    if run.start == "float":
        module.load_state_dict(weights)
    return fit(module, seed + 1000, run.steps, callbacks_of(run))


def trained_study() -> list[Run]:
    """Direct 2 bits against 8 -> 4 -> 2 from a trained float model, with equal settings otherwise."""
    early, thirds = "8-4-2 at 0.1, 0.2", "8-4-2 at 1/3, 2/3"
    stages = {SHORT: ("direct", "8-4-2 at 0.03, 0.06", early), LONG: ("direct", early, thirds)}
    return [Run("int2", each, steps, learning_rate=2e-3) for steps in stages for each in stages[steps]]


def scratch_study() -> list[Run]:
    """The same from initial weights."""
    return [
        Run("int2", stages, steps, "scratch", learning_rate=4e-3)
        for steps in (SHORT, LONG)
        for stages in ("direct", "8-4-2 at 1/3, 2/3")
    ]


def full_study(grid: str, stages: str) -> list[Run]:
    """Plain training with quantization against each stage and all together, at the same number of steps."""
    plain = Run(grid, "direct", LONG, learning_rate=2e-3)
    distilled = replace(plain, distillation=2.0)
    return [plain, distilled, replace(distilled, stages=stages), replace(plain, stages=stages)]


def warmup_study() -> list[Run]:
    """The long budget from a trained float model with drops inside the warm-up, and the default weight of a teacher."""
    runs = [Run("int2", each, LONG, learning_rate=2e-3) for each in ("direct", "8-4-2 at 0.03, 0.06")]
    return [*runs, Run("int2", "direct", LONG, learning_rate=2e-3, distillation=1.0)]


STUDIES = {
    "warmup": warmup_study,
    "trained": trained_study,
    "scratch": scratch_study,
    "int2": partial(full_study, "int2", "8-4-2 at 0.1, 0.2"),
    "ternary": partial(full_study, "ternary", "8-4-ternary at 0.1, 0.2"),
}


def summary(losses: list[float]) -> dict[str, Any]:
    """Return mean and standard error."""
    error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return {"losses": losses, "mean": statistics.fmean(losses), "standard_error": error}


def main() -> None:
    """Run a study, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=sorted(STUDIES), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--cache", type=Path, default=Path("outputs/recipes"), help="folder of the float models")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    arguments.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = []
    for run in STUDIES[arguments.study]():
        began = time.perf_counter()
        found = summary([train(run, seed, arguments.cache) for seed in arguments.seeds])
        rows.append({**asdict(run), **found})
        print(
            f"{run.grid if run.quantized else 'float':8} {run.start:8} {run.steps:5} {run.stages:24} "
            f"distillation {run.distillation:<4} "
            f"{found['mean']:.4f} +- {found['standard_error']:.4f}   {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        if arguments.output:
            arguments.output.write_text(json.dumps({"seeds": arguments.seeds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
