"""BitNet from scratch: ternary weights, 8-bit inputs, a high learning rate in two stages.

Run: python examples/bitnet.py
"""

import argparse
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import TwoStageSchedule, codes
from lightning_qat.data import DigitsData
from lightning_qat.models import BitNet


class Digits(L.LightningModule):
    """BitNet with a head in float; the optimizer alone, because TwoStageSchedule is the schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = BitNet(8, hidden_size=64, num_layers=2, window_size=8)
        self.head = nn.Linear(64, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the accuracy."""
        self.log("accuracy", (self.head(self.backbone(batch[0])).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW with BitNet's settings, which are high for a float model."""
        return torch.optim.AdamW(self.parameters(), lr=6e-3, betas=(0.9, 0.95), weight_decay=0.1)


def main() -> None:
    """Train, test, and count the codes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="four batches only")
    fast = parser.parse_args().fast

    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=1 if fast else 30,
        limit_train_batches=4 if fast else 1.0,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        callbacks=[TwoStageSchedule(warmup=0.1)],
    )
    trainer.fit(model := Digits(), data := DigitsData())
    trainer.test(model, data)
    counts = torch.stack([(each.codes == code).sum() for code in (-1, 0, 1) for each in codes(model).values()])
    print(f"codes -1, 0, 1: {(counts.view(3, -1).sum(-1) / counts.sum()).tolist()}")


if __name__ == "__main__":
    main()
