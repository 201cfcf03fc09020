"""LightningModules that predict the next token: of bytes, and of arithmetic with written-out steps."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, final

import lightning as L
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_qat.models._checks import check_dimensions, check_optimizer, check_samples
from lightning_qat.models.generation import answers_match, greedy_generate
from lightning_qat.models.optimizers import adamw_with_cosine
from lightning_qat.models.transformer import Transformer

IGNORED = -100
"""Target of positions that do not count."""


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy in nats, a mean over the targets that count.

    Args:
        logits: Scores [B, T, V].
        targets: Tokens, int64 [B, T]; -100 does not count.

    Example:
        >>> import torch
        >>> next_token_loss(torch.zeros(1, 2, 4), torch.tensor([[3, -100]]))
        tensor(1.3863)
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


class AbstractLanguageModel(L.LightningModule, ABC):
    """A causal language model: ``embedding`` -> ``backbone`` (a `Transformer`) -> ``head``; and its training.

    Subclasses say how a batch holds tokens and targets, and what evaluation logs.

    Args:
        vocab_size: V, number of tokens.
        hidden_size: a multiple of num_heads.
        num_heads: attention heads.
        num_layers: blocks.
        dropout: probability in [0, 1).
        window_size: the longest sequence; positions are learned up to it.
        learning_rate: the highest of the schedule, above 0.
        weight_decay: of weights, 0 or more.
        warmup_fraction: share of the steps in the warm-up, [0, 1].

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        hidden_size: int,
        num_heads: int,
        num_layers: int,
        dropout: float,
        window_size: int,
        learning_rate: float,
        weight_decay: float,
        warmup_fraction: float,
    ) -> None:
        super().__init__()
        check_dimensions(vocab_size=vocab_size)
        check_optimizer(learning_rate=learning_rate, weight_decay=weight_decay, warmup_fraction=warmup_fraction)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.backbone = Transformer(
            hidden_size,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_layers=num_layers,
            dropout=dropout,
            window_size=window_size,
        )
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, T, V] of the token after each of the tokens [B, T]."""
        check_samples(self, tokens, 2, floating=False, expected="tokens, int64 [B, T],")
        logits: Tensor = self.head(self.backbone.features(self.embedding(tokens)))
        return logits

    @abstractmethod
    def tokens_and_targets(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the tokens and the targets of a batch, int64 [B, T] each; a target of -100 does not count."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy per target that counts, in nats."""
        tokens, targets = self.tokens_and_targets(batch)
        loss = next_token_loss(self(tokens), targets)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with warm-up and cosine, stepped at every optimizer step."""
        return adamw_with_cosine(
            self,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_fraction=self.warmup_fraction,
        )


@final
class LanguageModel(AbstractLanguageModel):
    """A language model of bytes.

    A batch is (tokens, targets), int64 [B, T] each, as of `lightning_qat.data.TextData`. Logged: ``train_loss`` (per
    step), and of each evaluation ``val_loss`` (nats per byte), ``val_bits_per_byte`` (loss / ln 2),
    ``val_perplexity`` (exp loss), ``val_accuracy`` (share of bytes predicted); the same with ``test_``.

    Args:
        vocab_size: number of tokens, 256 for bytes.
        hidden_size: a multiple of num_heads.
        num_heads: attention heads.
        num_layers: blocks.
        dropout: probability in [0, 1).
        window_size: the longest sequence.
        tie_embeddings: let the head use the weight of the embedding.
        learning_rate: the highest of the schedule.
        weight_decay: of weights.
        warmup_fraction: share of the steps in the warm-up.

    Example:
        >>> import torch
        >>> LanguageModel()(torch.zeros(2, 16, dtype=torch.long)).shape
        torch.Size([2, 16, 256])
    """

    def __init__(
        self,
        vocab_size: int = 256,
        *,
        hidden_size: int = 96,
        num_heads: int = 4,
        num_layers: int = 2,
        dropout: float = 0.0,
        window_size: int = 128,
        tie_embeddings: bool = False,
        learning_rate: float = 4e-3,
        weight_decay: float = 0.1,
        warmup_fraction: float = 0.1,
    ) -> None:
        super().__init__(
            vocab_size,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_layers=num_layers,
            dropout=dropout,
            window_size=window_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_fraction=warmup_fraction,
        )
        self.save_hyperparameters()
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        self.mean_loss = MeanMetric()
        self.mean_accuracy = MeanMetric()

    def tokens_and_targets(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the two entries of the batch."""
        tokens, targets = batch
        return tokens, targets

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Gather the loss and the accuracy."""
        self._gather(batch)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Gather the loss and the accuracy."""
        self._gather(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation data."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole test data."""
        self._log_evaluation("test")

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the most probable next byte after each of the tokens, int64 [B, T]."""
        predicted: Tensor = self(batch[0]).argmax(dim=-1)
        return predicted

    def _gather(self, batch: Sequence[Tensor]) -> None:
        tokens, targets = self.tokens_and_targets(batch)
        logits = self(tokens)
        counted = targets != IGNORED
        num_counted = counted.sum()
        self.mean_loss.update(next_token_loss(logits, targets), num_counted)
        self.mean_accuracy.update((logits.argmax(dim=-1) == targets).sum() / num_counted, num_counted)

    def _log_evaluation(self, stage: str) -> None:
        loss, accuracy = self.mean_loss.compute(), self.mean_accuracy.compute()
        self.mean_loss.reset()
        self.mean_accuracy.reset()
        self.log(f"{stage}_loss", loss, prog_bar=True, sync_dist=True)
        self.log(f"{stage}_bits_per_byte", loss / math.log(2), sync_dist=True)
        self.log(f"{stage}_perplexity", loss.exp(), sync_dist=True)
        self.log(f"{stage}_accuracy", accuracy, sync_dist=True)


@final
class ArithmeticModel(AbstractLanguageModel):
    """A decoder that writes the steps and the answer of arithmetic problems.

    A batch is a dictionary as of `lightning_qat.data.ArithmeticData`. Logged: ``train_loss`` (per step), ``val_loss``
    (nats per character of the solutions) and ``val_exact_match`` (share of problems whose answer, generated greedily
    after the problem, is right); the same with ``test_``. Generation runs within the evaluation steps, so Lightning's
    progress bar shows it.

    Args:
        vocab_size: number of tokens.
        hidden_size: a multiple of num_heads.
        num_heads: attention heads.
        num_layers: blocks.
        dropout: probability in [0, 1).
        window_size: the longest sequence.
        answer_token: starts the answer.
        end_token: ends the text.
        learning_rate: the highest of the schedule.
        weight_decay: of weights.
        warmup_fraction: share of the steps in the warm-up.
    """

    def __init__(
        self,
        vocab_size: int = 17,
        *,
        hidden_size: int = 128,
        num_heads: int = 4,
        num_layers: int = 3,
        dropout: float = 0.0,
        window_size: int = 64,
        answer_token: int = 16,
        end_token: int = 0,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        warmup_fraction: float = 0.1,
    ) -> None:
        super().__init__(
            vocab_size,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_layers=num_layers,
            dropout=dropout,
            window_size=window_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_fraction=warmup_fraction,
        )
        self.save_hyperparameters()
        self.answer_token = answer_token
        self.end_token = end_token
        self.val_exact_match = MeanMetric()
        self.test_exact_match = MeanMetric()

    def tokens_and_targets(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the entries ``tokens`` and ``targets``."""
        if not isinstance(batch, Mapping):
            given = type(batch).__name__
            raise TypeError(f"ArithmeticModel: a batch is a {given}, not a dict; does the data fit the model?")
        return batch["tokens"], batch["targets"]

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log the loss and the exact matches."""
        self._evaluate(batch, "val", self.val_exact_match)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log the loss and the exact matches."""
        self._evaluate(batch, "test", self.test_exact_match)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the problems with the generated solutions, int64 [B, T + 1]."""
        return greedy_generate(
            self,
            batch["tokens"],
            lengths=batch["prompt_length"],
            max_length=batch["tokens"].shape[1] + 1,
            end_token=self.end_token,
        )

    def _evaluate(self, batch: Mapping[str, Tensor], stage: str, exact_match: MeanMetric) -> None:
        tokens, targets = self.tokens_and_targets(batch)
        # The longest text has lost its end, as the last token has nothing to predict.
        expected = F.pad(tokens, (0, 1), value=self.end_token)
        matches = answers_match(
            self.predict_step(batch, 0), expected, answer_token=self.answer_token, end_token=self.end_token
        )
        exact_match.update(matches.float())
        loss = next_token_loss(self(tokens), targets)
        self.log(f"{stage}_loss", loss, batch_size=len(tokens), sync_dist=True)
        self.log(f"{stage}_exact_match", exact_match, batch_size=len(tokens), prog_bar=True)
