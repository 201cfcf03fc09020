"""Learning rate and weight decay of quantized weights and learned scales, by layer.

Run: python examples/optimizer_groups.py
"""

import argparse

import lightning as L

from lightning_qat import ParameterGroup, QATCallback, recipes
from lightning_qat.data import DigitsData
from lightning_qat.models import SequenceClassifier

GROUPS = (
    ParameterGroup("*.attention.*", kind="weights", lr_multiplier=0.5, weight_decay=0.1),  # the first match decides
    ParameterGroup("*", kind="weights", weight_decay=0.0),
    ParameterGroup("*.attention.*", kind="scales", lr_multiplier=2.0),
)


def main() -> None:
    """Train, and print what the optimizer of the model has become; its schedule scales all rates alike."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args().fast

    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=20,
        fast_dev_run=2 if fast else False,
        logger=False,
        enable_checkpointing=False,
        callbacks=[QATCallback(recipes.int4(), groups=GROUPS)],
    )
    trainer.fit(model := SequenceClassifier(), data := DigitsData())
    for index, group in enumerate(trainer.optimizers[0].param_groups, start=1):
        name = group.get("name", f"pg{index}")
        rate, decay = group["initial_lr"], group["weight_decay"]
        print(f"{name:16} {len(group['params']):3} tensors, learning rate {rate:g}, weight decay {decay:g}")
    trainer.test(model, data)


if __name__ == "__main__":
    main()
