"""Progressive bit-width reduction: 8 bits, then 4, then 2, while training.

Run: python examples/progressive.py
"""

import argparse

import lightning as L

from lightning_qat import ProgressiveBitWidth, QATCallback, recipes
from lightning_qat.data import DigitsData
from lightning_qat.models import SequenceClassifier


def main() -> None:
    """Train through three stages and test at the last."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="three short epochs")
    fast = parser.parse_args().fast

    L.seed_everything(0, verbose=False)
    schedule = {0: 8, 1: 4, 2: 2} if fast else {0: 8, 6: 4, 12: 2}
    trainer = L.Trainer(
        max_epochs=3 if fast else 20,
        limit_train_batches=2 if fast else 1.0,
        limit_val_batches=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[QATCallback(recipes.int2()), ProgressiveBitWidth(schedule)],
    )
    trainer.fit(model := SequenceClassifier(), data := DigitsData())
    trainer.test(model, data)


if __name__ == "__main__":
    main()
