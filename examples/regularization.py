"""Regularization: what each penalty on weights, and freezing of oscillating ones, does to a training at 2 bits.

Run: python examples/regularization.py
"""

import argparse

import lightning as L

from lightning_qat import OscillationFreezing, Penalty, QATCallback, Regularization, recipes
from lightning_qat.data import DigitsData
from lightning_qat.losses import bin_regularization, grid_distance, oscillation_dampening, smoothness, sparsity
from lightning_qat.models import SequenceClassifier
from lightning_qat.schedules import CosineRamp, LinearRamp

PENALTIES = {
    "pulled to levels": Penalty(grid_distance, weight=CosineRamp(0.01, begin=0.5)),  # late, when codes have settled
    "every level alike": Penalty(bin_regularization, weight=CosineRamp(0.001, begin=0.5)),
    "off thresholds": Penalty(oscillation_dampening, weight=CosineRamp(0.001)),
    "more zeros": Penalty(sparsity, weight=LinearRamp(0.0, start=0.01, until=0.5), match="*.feedforward.*"),
    "alike neighbors": Penalty(smoothness, weight=0.01, match="backbone.input_projection"),
}


def train(name: str, *callbacks: L.Callback, fast: bool) -> None:
    """Train at 2 bits and print the accuracy, and what the callback logged last."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=1 if fast else 10,
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
    """Compare trainings without and with each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="three batches only")
    fast = parser.parse_args().fast

    train("as it is", fast=fast)
    for name, penalty in PENALTIES.items():
        train(name, Regularization([penalty]), fast=fast)
    train("frozen", OscillationFreezing(), fast=fast)


if __name__ == "__main__":
    main()
