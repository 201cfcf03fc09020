"""Distillation: the float model, trained first, teaches its own ternary copy.

Run: python examples/distillation.py
"""

import argparse
from typing import Any

import lightning as L

from lightning_qat import Distillation, QATCallback, recipes
from lightning_qat.data import DigitsData
from lightning_qat.models import SequenceClassifier


def main() -> None:
    """Train in float, then at 1.58 bits with the float weights as teacher."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args().fast

    L.seed_everything(0, verbose=False)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "fast_dev_run": 2 if fast else False}
    model, data = SequenceClassifier(), DigitsData()
    L.Trainer(max_epochs=20, **quiet).fit(model, data)

    callbacks = [QATCallback(recipes.ternary()), Distillation(temperature=2.0, weight=0.5)]
    trainer = L.Trainer(max_epochs=15, callbacks=callbacks, **quiet)
    trainer.fit(model, data)
    trainer.test(model, data)


if __name__ == "__main__":
    main()
