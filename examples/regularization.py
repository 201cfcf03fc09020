"""Regularization: weights pulled to their levels late in the run, oscillating ones frozen, and what that does to them.

Run: python examples/regularization.py
"""

import argparse

import lightning as L

from lightning_qat import OscillationFreezing, Penalty, QATCallback, Regularization, recipes
from lightning_qat.data import DigitsData
from lightning_qat.losses import grid_distance
from lightning_qat.models import SequenceClassifier
from lightning_qat.schedules import CosineRamp


def train(name: str, *callbacks: L.Callback, fast: bool) -> None:
    """Train at 2 bits and print the accuracy, and how much of the weights oscillates in the end."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=1 if fast else 20,
        limit_train_batches=3 if fast else 1.0,
        limit_val_batches=0,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[QATCallback(recipes.int2()), *callbacks],
    )
    trainer.fit(model := SequenceClassifier(), data := DigitsData())
    logged = {key: f"{value:.4f}" for key, value in trainer.callback_metrics.items() if "/" in key}
    (metrics,) = trainer.test(model, data, verbose=False)
    print(f"{name}: test accuracy {metrics['test_accuracy']:.4f} {logged}")


def main() -> None:
    """Compare training with and without."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="three batches only")
    fast = parser.parse_args().fast

    pull = Penalty(grid_distance, weight=CosineRamp(0.01, begin=0.5))
    train("as it is", fast=fast)
    train("pulled to levels", Regularization([pull]), fast=fast)
    train("frozen", OscillationFreezing(), fast=fast)


if __name__ == "__main__":
    main()
