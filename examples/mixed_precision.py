"""Mixed precision: attention at 8 bits, feed-forward layers ternary, the head in float.

Run: python examples/mixed_precision.py
"""

import argparse

import lightning as L

from lightning_qat import AbsMax, Int, LayerSpec, QATCallback, QuantizerSpec, Recipe, Rule, StraightThrough, Ternary
from lightning_qat.data import DigitsData
from lightning_qat.models import SequenceClassifier

RECIPE = Recipe(
    (
        Rule("*.attention.*", LayerSpec(weight=QuantizerSpec(Int(8), scale=AbsMax(), gradient=StraightThrough()))),
        Rule("*.feedforward.*", LayerSpec(weight=QuantizerSpec(Ternary()))),
        Rule("head", None),
    )
)


def main() -> None:
    """Train and test; the report says what became of every weight."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args().fast

    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=20,
        fast_dev_run=2 if fast else False,
        logger=False,
        enable_checkpointing=False,
        callbacks=[QATCallback(RECIPE)],
    )
    trainer.fit(model := SequenceClassifier(), data := DigitsData())
    trainer.test(model, data)


if __name__ == "__main__":
    main()
