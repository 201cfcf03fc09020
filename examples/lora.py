"""LoRA-QAT: adapt a float model at 4 bits by training low-rank adapters and scales alone.

Run: python examples/lora.py
"""

import argparse
from typing import Any

import lightning as L
import torch

from lightning_qat import ActivationCheckpointing, LoRA, QATCallback, codes, merge_lora, recipes
from lightning_qat.data import DigitsData
from lightning_qat.models import SequenceClassifier


def main() -> None:
    """Train in float, then adapters at 4 bits on an 8-bit base; fold them in without changing a code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args().fast

    L.seed_everything(0, verbose=False)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "fast_dev_run": 2 if fast else False}
    model, data = SequenceClassifier(), DigitsData()
    L.Trainer(max_epochs=20, **quiet).fit(model, data)

    callbacks = [
        QATCallback(recipes.int4()),
        LoRA(rank=8, alpha=16.0, base="int8"),
        ActivationCheckpointing("backbone.blocks.*"),  # what is left of the memory are activations
    ]
    trainer = L.Trainer(max_epochs=10, callbacks=callbacks, **quiet)
    trainer.fit(model, data)
    trainer.test(model, data)

    before = codes(model)
    merged = merge_lora(model)
    equal = all(torch.equal(tensor.codes, before[name].codes) for name, tensor in codes(model).items())
    print(f"{len(merged)} adapters merged, codes {'as before' if equal else 'changed'}")


if __name__ == "__main__":
    main()
