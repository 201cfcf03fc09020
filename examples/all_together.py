"""All callbacks together, beside Lightning's own: float first, then down to 2 bits, taught by the float model.

Run: python examples/all_together.py
"""

import argparse
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from lightning_qat import (
    Calibration,
    Distillation,
    ExportCallback,
    Int,
    LayerSpec,
    Learned,
    PerTensor,
    ProgressiveBitWidth,
    QATCallback,
    QuantizationStatistics,
    QuantizerSpec,
    Recipe,
    Rule,
)
from lightning_qat.data import DigitsData
from lightning_qat.models import SequenceClassifier

RECIPE = Recipe(
    (Rule("*", LayerSpec(weight=QuantizerSpec(Int(2)), input=QuantizerSpec(Int(8), PerTensor(), Learned()))),)
)


def main() -> None:
    """Train twice and export what the second training gave."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="a few batches")
    fast = parser.parse_args().fast

    L.seed_everything(0, verbose=False)
    short: dict[str, Any] = {"limit_train_batches": 3, "limit_val_batches": 1} if fast else {}
    model, data = SequenceClassifier(), DigitsData()
    L.Trainer(max_epochs=1 if fast else 20, logger=False, enable_checkpointing=False, **short).fit(model, data)

    trainer = L.Trainer(
        max_epochs=3 if fast else 15,
        logger=CSVLogger("lightning_logs", name="all_together"),
        log_every_n_steps=1 if fast else 20,
        enable_checkpointing=False,
        callbacks=[
            QATCallback(RECIPE, scale_lr_multiplier=0.1),  # first: the others need a prepared model
            Calibration(num_batches=4),
            ProgressiveBitWidth({0: 4, 1: 2}),
            Distillation(),
            QuantizationStatistics(),
            EMAWeightAveraging(decay=0.9),
            LearningRateMonitor(),
            ExportCallback("lightning_logs/all_together.safetensors"),
        ],
        **short,
    )
    trainer.fit(model, data)
    trainer.test(model, data)


if __name__ == "__main__":
    main()
