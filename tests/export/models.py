"""Small models and recipes that the export tests share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import lightning_qat as qat
from lightning_qat.quantization import recipes


class TiedNet(nn.Module):
    """Embedding, attention layer (weights read by a fast path), linear, head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 32)
        self.encoder = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)))  # type: ignore[no-any-return]


class ConvNet(nn.Module):
    """Convolution, BatchNorm, transposed convolution, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.fc = nn.Linear(4 * 7 * 7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(torch.relu(self.norm(self.conv(x)))).flatten(1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers; widths that 32 divides."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(32, width)
        self.down = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def tokens(num: int = 2) -> list[Tensor]:
    return [torch.randint(0, 11, (3, 5)) for _ in range(num)]


def images(num: int = 2) -> list[Tensor]:
    return [torch.randn(3, 2, 8, 8) for _ in range(num)]


def vectors(num: int = 2) -> list[Tensor]:
    return [torch.randn(9, 32) for _ in range(num)]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Tensor]]]] = {
    "attention": (TiedNet, tokens),
    "convolution": (ConvNet, images),
    "mlp": (MLP, vectors),
}


def prepared(build: Callable[[], nn.Module], recipe: qat.Recipe | str) -> nn.Module:
    """A model of one seed, its latent weights a little away from where the scales were found, as after training."""
    torch.manual_seed(7)
    model = build()
    qat.prepare(model, recipes.named(recipe) if isinstance(recipe, str) else recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * parameter.abs().mean() * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model
