"""The models that speed and memory are measured on, and their training step. Random data, random weights."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import accumulation_window
from lightning_qat.conversion.state import quantizers


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal pre-norm transformer and of its batch; without a vocabulary it regresses onto its input."""

    hidden: int
    num_heads: int
    num_layers: int
    sequence: int
    batch: int
    vocabulary: int = 0
    feed_forward: int = 0
    num_kv_heads: int = 0

    def example(self, device: str) -> Tensor:
        """Return one random batch."""
        size = self.batch, self.sequence
        if self.vocabulary:
            return torch.randint(self.vocabulary, size, device=device)
        return torch.randn(*size, self.hidden, device=device)


SHAPES = {
    "S": Shape(hidden=256, num_heads=4, num_layers=4, sequence=60, batch=32),
    "M": Shape(hidden=512, num_heads=8, num_layers=8, sequence=256, batch=8, vocabulary=4096),
    "L": Shape(896, 14, 24, sequence=1024, batch=8, vocabulary=151936, feed_forward=4864, num_kv_heads=2),
}


class Attention(nn.Module):
    """Causal attention with separate query and key-value projections where there are fewer key-value heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.width = shape.hidden // shape.num_heads
        self.kv_heads = shape.num_kv_heads or shape.num_heads
        self.qkv = nn.Linear(shape.hidden, (shape.num_heads + 2 * self.kv_heads) * self.width)
        self.out = nn.Linear(shape.hidden, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Attend: [batch, length, hidden] -> the same."""
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.width).transpose(1, 2)
        q, k, v = heads.split([self.shape.num_heads, self.kv_heads, self.kv_heads], 1)
        grouped = self.kv_heads != self.shape.num_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm; gated where a width is given, as in Qwen2.5."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inner = shape.feed_forward or 4 * shape.hidden
        self.norm1, self.norm2 = nn.LayerNorm(shape.hidden), nn.LayerNorm(shape.hidden)
        self.attention = Attention(shape)
        self.up = nn.Linear(shape.hidden, inner)
        self.gate = nn.Linear(shape.hidden, inner) if shape.feed_forward else None
        self.down = nn.Linear(inner, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Add attention and feed-forward: [batch, length, hidden] -> the same."""
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        y = F.silu(self.up(y)) if self.gate is None else F.silu(self.gate(y)) * self.up(y)
        return x + self.down(y)


class Model(nn.Module):
    """Blocks, with an embedding and a head where there is a vocabulary."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden) if shape.vocabulary else None
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False) if shape.vocabulary else None

    def forward(self, batch: Tensor) -> Tensor:
        """Return the loss of a batch, of tokens or of vectors."""
        x = batch if self.embedding is None else self.embedding(batch)
        for block in self.blocks:
            x = block(x)
        return self.loss(x, batch)

    def loss(self, x: Tensor, batch: Tensor) -> Tensor:
        """Return the loss of what comes out of the last block."""
        x = self.norm(x)
        if self.head is None:
            return F.mse_loss(x.float(), batch)
        return F.cross_entropy(self.head(x).float().flatten(0, 1), batch.flatten())

    def compile_regions(self) -> None:
        """Compile every block by itself, which is one compilation, since they share their code; and the loss."""
        for block in self.blocks:
            block.compile()
        self.loss = torch.compile(self.loss)  # type: ignore[method-assign]


def soften(model: nn.Module, softness: float) -> None:
    """Let the rounding of weights be as soft as it is on the way of GradualQuantization."""
    for quantizer in quantizers(model).values():
        if not quantizer.layout.is_input:
            quantizer.softness = torch.tensor(softness, device=quantizer.lo.device)


def training_step(
    model: nn.Module, batches: list[Tensor], precision: str, forward: Callable[[Tensor], Tensor] | None = None
) -> Callable[[], None]:
    """Return a function that runs one optimizer step (SGD, the cheapest: it hides nothing) over micro-batches.

    Several micro-batches share what an accumulation window keeps, as they do with QATCallback.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    device, run = batches[0].device.type, model if forward is None else forward  # a compiled module has no truth value

    def step() -> None:
        with accumulation_window(model) if len(batches) > 1 else nullcontext():
            backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # of many models, only one holds gradients

    def backward() -> None:
        for batch in batches:
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = run(batch)
            (loss / len(batches)).backward()

    return step
