"""Somebody's LightningModule, as it was, plus one line.

Run: python examples/one_line.py
"""

import argparse

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_qat import QATCallback, recipes


class TheirClassifier(L.LightningModule):
    """Written years ago, for another purpose: nothing in it knows of quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 64), nn.GELU())
        self.classifier = nn.Linear(64, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.classifier(self.encoder(pixels))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        pixels, labels = batch
        loss = nn.functional.cross_entropy(self(pixels), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pixels, labels = batch
        self.log("test_accuracy", (self(pixels).argmax(-1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def loaders() -> tuple[DataLoader, DataLoader]:
    """Return training and test data."""
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    train, test = random_split(data, [0.8, 0.2], generator=torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=256)


def main() -> None:
    """Train at 4 bits and test."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args().fast

    L.seed_everything(0, verbose=False)
    train, test = loaders()
    trainer = L.Trainer(
        max_epochs=10,
        fast_dev_run=2 if fast else False,
        logger=False,
        enable_checkpointing=False,
        callbacks=[QATCallback(recipes.int4())],  # the one line
    )
    trainer.fit(model := TheirClassifier(), train)
    trainer.test(model, test)


if __name__ == "__main__":
    main()
