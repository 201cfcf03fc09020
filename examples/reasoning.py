"""Reasoning: the float model, trained first, teaches its 2-bit copy the steps of arithmetic and not the answers alone.

Run: python examples/reasoning.py
"""

import argparse
from typing import Any

import lightning as L

from lightning_qat import Distillation, QATCallback, ReasoningMatch, recipes
from lightning_qat.callbacks import BatchMask, DelimiterMask, TargetMask
from lightning_qat.data import ArithmeticData
from lightning_qat.data.arithmetic_problems import STEP_TOKEN
from lightning_qat.losses import ReasoningWeights
from lightning_qat.models import ArithmeticModel


def main() -> None:
    """Train in float (two minutes), then at 2 bits for a third of the steps; print the exact match of both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args().fast

    L.seed_everything(0, verbose=False)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "fast_dev_run": 2 if fast else False}
    size: dict[str, Any] = {"num_train": 64, "num_val": 8, "num_test": 8, "batch_size": 4} if fast else {}
    data = ArithmeticData(levels=(1, 2), **{"num_train": 16_000, **size})
    model = ArithmeticModel(hidden_size=96, num_layers=2, window_size=42, learning_rate=4e-3)
    trainer = L.Trainer(max_epochs=6, limit_val_batches=0, gradient_clip_val=1.0, **quiet)
    trainer.fit(model, data)
    trainer.test(model, data)

    reasoning = ReasoningMatch(
        "backbone.norm",  # hidden states: what the last norm returns
        boundaries=DelimiterMask(STEP_TOKEN),  # a step ends at ";"
        answer=BatchMask("answer_mask"),
        weights=ReasoningWeights.mathematics(),
    )
    callbacks = [QATCallback(recipes.int2()), Distillation(mask=TargetMask(), reasoning=reasoning)]
    model.learning_rate = 2e-3
    trainer = L.Trainer(max_epochs=2, limit_val_batches=0, gradient_clip_val=1.0, callbacks=callbacks, **quiet)
    trainer.fit(model, data)
    trainer.test(model, data)


if __name__ == "__main__":
    main()
