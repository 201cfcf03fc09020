"""LightningModules that classify sequences and images."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import lightning as L
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_qat.models._checks import check_dimensions, check_optimizer, check_samples
from lightning_qat.models.optimizers import adamw_with_cosine
from lightning_qat.models.transformer import Transformer


class AbstractClassifier(L.LightningModule, ABC):
    """Steps, metrics and optimizer of a classifier; subclasses build the layers and compute the logits.

    A batch is (samples [B, ...], labels int64 [B]). Logged: ``train_loss`` (per step), ``val_loss``,
    ``val_accuracy``, ``test_loss``, ``test_accuracy`` (cross-entropy in nats, accuracy in 0 .. 1).

    Args:
        num_classes: at least 2.
        learning_rate: the highest of the schedule, above 0.
        weight_decay: of weights, 0 or more.
        warmup_fraction: share of the steps in the warm-up, [0, 1].

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, num_classes: int, *, learning_rate: float, weight_decay: float, warmup_fraction: float) -> None:
        super().__init__()
        check_dimensions(num_classes=num_classes)
        check_optimizer(learning_rate=learning_rate, weight_decay=weight_decay, warmup_fraction=warmup_fraction)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    @abstractmethod
    def forward(self, samples: Tensor) -> Tensor:
        """Return the logits [B, num_classes]."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch."""
        samples, labels = batch
        loss = F.cross_entropy(self(samples), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log the loss and the accuracy."""
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log the loss and the accuracy."""
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the probabilities [B, num_classes]."""
        probabilities: Tensor = self(batch[0]).softmax(dim=-1)
        return probabilities

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with warm-up and cosine, stepped at every optimizer step."""
        return adamw_with_cosine(
            self,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_fraction=self.warmup_fraction,
        )

    def _evaluate(self, batch: Sequence[Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        samples, labels = batch
        logits = self(samples)
        accuracy(logits, labels)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log(f"{stage}_accuracy", accuracy, batch_size=len(labels), prog_bar=True)


@final
class SequenceClassifier(AbstractClassifier):
    """Classifies sequences [B, T, embed_dim] by the last step of a `Transformer`.

    Layers: ``backbone`` (the transformer) and ``head``. The defaults fit `lightning_qat.data.DigitsData`.

    Args:
        num_classes: at least 2.
        embed_dim: features per step.
        hidden_size: a multiple of num_heads.
        num_heads: attention heads.
        num_layers: blocks.
        dropout: probability in [0, 1).
        window_size: the longest sequence.
        learning_rate: the highest of the schedule.
        weight_decay: of weights.
        warmup_fraction: share of the steps in the warm-up.

    Example:
        >>> import torch
        >>> SequenceClassifier(10)(torch.zeros(2, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        embed_dim: int = 8,
        hidden_size: int = 64,
        num_heads: int = 4,
        num_layers: int = 2,
        dropout: float = 0.1,
        window_size: int = 8,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.01,
        warmup_fraction: float = 0.1,
    ) -> None:
        super().__init__(
            num_classes, learning_rate=learning_rate, weight_decay=weight_decay, warmup_fraction=warmup_fraction
        )
        self.save_hyperparameters()
        self.backbone = Transformer(
            embed_dim,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_layers=num_layers,
            dropout=dropout,
            window_size=window_size,
        )
        self.head = nn.Linear(hidden_size, num_classes)

    def forward(self, samples: Tensor) -> Tensor:
        """Return the logits [B, num_classes] of sequences [B, T, embed_dim]."""
        check_samples(self, samples, 3, floating=True, expected="sequences, [B, T, embed_dim],")
        logits: Tensor = self.head(self.backbone(samples))
        return logits


@final
class ConvBlock(nn.Module):
    """``silu(norm(conv(x)))`` with a 3 x 3 kernel and BatchNorm.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: 2 halves the image.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, images: Tensor) -> Tensor:
        """Return [B, out_channels, height / stride, width / stride]."""
        return F.silu(self.norm(self.conv(images)))


@final
class ConvNet(AbstractClassifier):
    """Classifies images [B, in_channels, height, width] with convolutions, BatchNorm and a mean over the image.

    Layers: ``blocks.0.conv``, ``blocks.0.norm``, ..., ``head``. The first block keeps the size, each further one
    halves it. The defaults fit `lightning_qat.data.DigitImages`.

    Args:
        num_classes: at least 2.
        in_channels: of the images.
        channels: of the blocks, from first to last.
        learning_rate: the highest of the schedule.
        weight_decay: of weights.
        warmup_fraction: share of the steps in the warm-up.

    Example:
        >>> import torch
        >>> ConvNet(10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        in_channels: int = 1,
        channels: Sequence[int] = (16, 32, 64),
        learning_rate: float = 1e-2,
        weight_decay: float = 0.01,
        warmup_fraction: float = 0.1,
    ) -> None:
        super().__init__(
            num_classes, learning_rate=learning_rate, weight_decay=weight_decay, warmup_fraction=warmup_fraction
        )
        channels = list(channels)
        check_dimensions(in_channels=in_channels, num_blocks=len(channels))
        self.save_hyperparameters()
        self.blocks = nn.Sequential(
            *(
                ConvBlock(before, after, stride=1 if index == 0 else 2)
                for index, (before, after) in enumerate(zip([in_channels, *channels[:-1]], channels, strict=True))
            )
        )
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, samples: Tensor) -> Tensor:
        """Return the logits [B, num_classes] of images [B, in_channels, height, width]."""
        check_samples(self, samples, 4, floating=True, expected="images, [B, in_channels, height, width],")
        logits: Tensor = self.head(self.blocks(samples).mean(dim=(2, 3)))
        return logits
