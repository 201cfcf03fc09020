"""What statistics, distillation and orthogonal updates add to a training step, in CPU time of one thread.

    python benchmarks/callbacks.py --output benchmarks/callbacks.json

Statistics: CPU time of one measurement with TensorBoard, over that of ``every_n_steps`` steps. Distillation: CPU time
of what it adds to the forward of a step beyond the teacher's forward, over that of the step. Softening: what the loss
takes longer, forward, from the second epoch on where a teacher may be too sure. Blocks that follow the
teacher's: the median of the ratios of whole steps with and without, in turn. Orthogonal updates: CPU time of all of
them in a step, over that of a step without.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_qat import QATCallback, recipes
from lightning_qat.callbacks import Distillation, FeatureMatch, OrthogonalUpdates, QuantizationStatistics
from lightning_qat.callbacks.output_loss import OutputLoss
from lightning_qat.callbacks.teacher import Teacher
from lightning_qat.data import DigitsData, TextData
from lightning_qat.models import LanguageModel, SequenceClassifier

NUM_STEPS = 60
NUM_PAIRS = 9


class StepTimes(L.Callback):
    """CPU time between the starts of batches."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note the time."""
        self.marks.append(time.thread_time())

    def median(self) -> float:
        """Return the median time of a step in seconds, without the first five."""
        return statistics.median(after - before for before, after in zip(self.marks[5:], self.marks[6:], strict=False))


def timed(owner: Any, name: str) -> list[float]:
    """Replace a function by one that notes the CPU time of each call; return the notes."""
    notes: list[float] = []
    original = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        try:
            return original(*args, **kwargs)
        finally:
            notes.append(time.thread_time() - began)

    setattr(owner, name, run)
    return notes


def task(name: str) -> tuple[L.LightningModule, L.LightningDataModule]:
    """Return model and data of the sizes in conf/."""
    if name == "digits":
        model = SequenceClassifier(10, embed_dim=8, hidden_size=64, num_heads=4, num_layers=2, window_size=8)
        return model, DigitsData(batch_size=64)
    text = LanguageModel(hidden_size=96, num_heads=4, num_layers=2, window_size=128)
    return text, TextData(sequence_length=128, batch_size=16, num_train_batches=NUM_STEPS)


def fit(name: str, *callbacks: Any, num_batches: float = 1.0) -> float:
    """Train for some steps and return the median CPU time of a step."""
    times, (model, data) = StepTimes(), task(name)
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            max_steps=NUM_STEPS, accelerator="cpu", callbacks=[QATCallback(recipes.named("w4a8")), *callbacks, times],
            logger=TensorBoardLogger(folder), enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, limit_train_batches=num_batches,
        ).fit(model, datamodule=data)  # fmt: skip
    return times.median()


def statistics_cost(name: str) -> dict[str, float]:
    """Return the cost of statistics at the default interval."""
    interval, callback = QuantizationStatistics().every_n_steps, QuantizationStatistics(10)
    step = fit(name)
    notes = timed(callback, "_measure")
    fit(name, callback)
    measurement = statistics.median(notes[1:])
    return {"step": step, "measurement": measurement, "share": measurement / (interval * step)}


def distillation_cost(name: str) -> dict[str, float]:
    """Return the share of a step that distillation takes beyond the teacher's forward, with and without the loss."""
    callback = Distillation()
    added, loss, forward = timed(callback, "_added"), timed(OutputLoss, "__call__"), timed(Teacher, "__call__")
    step = fit(name, callback)
    whole, formula, teacher = (statistics.median(notes[5:]) for notes in (added, loss, forward))
    return {
        "step": step, "teacher": teacher, "loss": formula, "rest": whole - teacher - formula,
        "share_of_loss": formula / step, "share_of_rest": (whole - teacher - formula) / step,
    }  # fmt: skip


def softening_cost(name: str) -> dict[str, float]:
    """Return the share of a step that it takes to look how sure the teacher is, and to soften it."""
    callback, sure, other = Distillation(max_odds=1.01), list[float](), list[float]()
    loss = callback._output_loss

    def run(*args: Any, repeated: bool, **kwargs: Any) -> Any:
        began = time.thread_time()
        try:
            return loss(*args, repeated=repeated, **kwargs)
        finally:
            (sure if repeated else other).append(time.thread_time() - began)

    callback._output_loss = run  # type: ignore[assignment]
    step = fit(name, callback, num_batches=NUM_STEPS // 3)
    added = statistics.median(sure) - statistics.median(other[5:])
    return {"step": step, "added": added, "share": added / step}


def blocks_cost(name: str) -> dict[str, float]:
    """Return the share of a step that blocks take that follow the teacher's, forward and backward, by difference."""
    alone, matched = Distillation(), Distillation(features=(FeatureMatch(),))
    pairs = [(fit(name, alone), fit(name, matched)) for _ in range(NUM_PAIRS)]
    ratio = statistics.median(after / before for before, after in pairs)
    return {"step": statistics.median(before for before, _ in pairs), "share": ratio - 1}


def orthogonal_cost(name: str) -> dict[str, float]:
    """Return the share of a step that the updates of all weights take."""
    callback = OrthogonalUpdates()
    step, notes = fit(name), timed(callback, "_update")
    fit(name, callback)
    num_weights = len(notes) // NUM_STEPS
    updates = statistics.median(sum(notes[i : i + num_weights]) for i in range(0, len(notes), num_weights))
    return {"step": step, "updates": updates, "share": updates / step}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found: dict[str, Any] = {name: {"statistics": statistics_cost(name)} for name in ("digits", "text")}
    for name, costs in found.items():
        costs["distillation"] = distillation_cost(name)
        costs["softening"] = softening_cost(name)
        costs["blocks"] = blocks_cost(name)
        costs["orthogonal"] = orthogonal_cost(name)
    print(json.dumps(found, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
