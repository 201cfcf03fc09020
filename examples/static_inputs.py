"""Quantized inputs with scales from data: Calibration sets them at fit start, training goes on learning them.

Run: python examples/static_inputs.py
"""

import argparse

import lightning as L

from lightning_qat import Calibration, Int, LayerSpec, Learned, PerTensor, QATCallback, QuantizerSpec, Recipe, Rule
from lightning_qat.data import DigitsData
from lightning_qat.models import SequenceClassifier

INPUT = QuantizerSpec(Int(8), PerTensor(), Learned())
RECIPE = Recipe((Rule("*", LayerSpec(weight=QuantizerSpec(Int(4)), input=INPUT)),))


def main() -> None:
    """Train and test a model with 4-bit weights and static 8-bit inputs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args().fast

    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=20,
        fast_dev_run=2 if fast else False,
        logger=False,
        enable_checkpointing=False,
        callbacks=[QATCallback(RECIPE), Calibration(num_batches=4)],
    )
    trainer.fit(model := SequenceClassifier(), data := DigitsData())
    trainer.test(model, data)


if __name__ == "__main__":
    main()
