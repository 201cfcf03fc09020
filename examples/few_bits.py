"""Few bits: everything that keeps a model alive at 2 bits, composed.

Run: python examples/few_bits.py
"""

import argparse
from typing import Any

import lightning as L

from lightning_qat import recipes, recommended_callbacks
from lightning_qat.data import DigitsData
from lightning_qat.models import SequenceClassifier


def main() -> None:
    """Train in float, then at 2 bits: rounding sets in gradually, orthogonal updates, the float model as teacher."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args().fast

    L.seed_everything(0, verbose=False)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "fast_dev_run": 2 if fast else False}
    model, data = SequenceClassifier(learning_rate=3e-3), DigitsData()
    L.Trainer(max_epochs=20, **quiet).fit(model, data)

    model.learning_rate = 1.5e-3  # half of the float training's: 2 bits and below want more than a float model does
    callbacks = recommended_callbacks(recipes.int2())
    for callback in callbacks:
        print(callback)  # the list could be written down like this, and changed
    trainer = L.Trainer(max_epochs=10, callbacks=callbacks, **quiet)
    trainer.fit(model, data)
    trainer.test(model, data)


if __name__ == "__main__":
    main()
