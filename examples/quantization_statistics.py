"""What quantization does to every layer, in TensorBoard: signal to noise, clipping, use of levels, scales, histograms.

Run: python examples/quantization_statistics.py, then: tensorboard --logdir lightning_logs
"""

import argparse

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_qat import QATCallback, QuantizationStatistics, recipes
from lightning_qat.data import DigitsData
from lightning_qat.models import SequenceClassifier


def main() -> None:
    """Train at ternary weights and 8-bit inputs, and measure every 50 steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="one short epoch")
    fast = parser.parse_args().fast

    L.seed_everything(0, verbose=False)
    logger = TensorBoardLogger("lightning_logs", name="statistics")
    trainer = L.Trainer(
        max_epochs=1 if fast else 20,
        limit_train_batches=4 if fast else 1.0,
        limit_val_batches=1,
        log_every_n_steps=2 if fast else 20,
        logger=logger,
        enable_checkpointing=False,
        callbacks=[QATCallback(recipes.bitnet()), QuantizationStatistics(every_n_steps=2 if fast else 50)],
    )
    trainer.fit(SequenceClassifier(), DigitsData())
    print(f"tensorboard --logdir {logger.log_dir}")


if __name__ == "__main__":
    main()
