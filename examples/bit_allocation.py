"""Bits where they count: a width for each layer from data, 2.5 bits per weight on average, and what it brings.

Run: python examples/bit_allocation.py
"""

import argparse
import copy

import lightning as L

from lightning_qat import BitAllocation, QATCallback, Ternary, allocate_bits, prepare, recipes
from lightning_qat.data import DigitsData, train_dataloader
from lightning_qat.models import SequenceClassifier

CANDIDATES = (1, Ternary(), 2, 3, 4, 8)


def main() -> None:
    """Train in float, compare widths after training, and train with those that data ask for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="a few batches only")
    fast = parser.parse_args().fast
    options = {"logger": False, "enable_checkpointing": False, "limit_train_batches": 4 if fast else 1.0}

    L.seed_everything(0, verbose=False)
    model, data = SequenceClassifier(hidden_size=32), DigitsData()
    trainer = L.Trainer(max_epochs=1 if fast else 20, **options)
    trainer.fit(model, data)

    # As a function: a recipe with one rule per layer, to be prepared, printed, stored (recipe.to_dict()) and edited.
    batches = [samples for samples, _ in train_dataloader(data)][:2]
    recipe = allocate_bits(model, batches, average_bits=2.0, candidates=CANDIDATES)
    for name, each in (("2 bits everywhere", recipes.int2()), ("2 bits on average", recipe)):
        prepare(quantized := copy.deepcopy(model), each)
        found = trainer.test(quantized, data, verbose=False)[0]
        print(f"{name}, without training: loss {found['test_loss']:.3f}, accuracy {found['test_accuracy']:.3f}")
    for rule in recipe.rules:
        print(f"  {rule.match:32} {rule.spec.weight.grid.label}")

    # As a callback: at the start of training, from training data. The table goes to the logger, too.
    allocation = BitAllocation(2.5, CANDIDATES, num_batches=2)
    L.Trainer(max_epochs=1 if fast else 10, callbacks=[QATCallback(), allocation], **options).fit(model, data)
    print(allocation.allocation)


if __name__ == "__main__":
    main()
