"""Layers, models and naive formulas that the tests of conversion share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat import (
    AbsMax,
    Center,
    Hadamard,
    Int,
    LayerSpec,
    Learned,
    Normalize,
    Percentile,
    PerChannel,
    PerTensor,
    PerToken,
    QuantizerSpec,
    Recipe,
    Rule,
    StraightThrough,
    recipes,
)

WEIGHT = QuantizerSpec(Int(4), PerChannel(), AbsMax(), StraightThrough())
TOKENS = QuantizerSpec(Int(8, narrow=True), PerToken(), AbsMax(), StraightThrough())
STORED = QuantizerSpec(Int(8, symmetric=False), PerTensor(), Percentile(99.0), StraightThrough())
LEARNED_INPUT = QuantizerSpec(Int(8), PerTensor(), Learned())
EVERYTHING = (nn.Module,)


def recipe_for(spec: LayerSpec | None, *types: type[nn.Module]) -> Recipe:
    """One rule for all names."""
    return Recipe((Rule("*", spec, types=types) if types else Rule("*", spec),))


WEIGHT_ONLY = recipe_for(LayerSpec(WEIGHT))


def absmax_int4(weight: Tensor, axis: int = 0) -> Tensor:
    """Naive 4-bit weights: one scale per output channel, the largest value at -8 or 8 steps."""
    rows = []
    for row in weight.detach().movedim(axis, 0):
        scale = row.abs().max() / 8
        rows.append(torch.clamp(torch.round(row / scale), -8, 7) * scale)
    return torch.stack(rows).movedim(0, axis)


def absmax_int8_tokens(x: Tensor, num_features: int = 1) -> Tensor:
    """Naive 8-bit inputs: one scale for the trailing dimensions of each token or sample."""
    tokens = x.detach().reshape(*x.shape[: x.dim() - num_features], -1)
    scale = tokens.abs().amax(-1, keepdim=True) / 127
    return (torch.clamp(torch.round(tokens / scale), -127, 127) * scale).reshape(x.shape)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 6), 0),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 7), 0),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 5, 5), 0),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), lambda: torch.randn(2, 2, 4, 4, 4), 0),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), lambda: torch.randn(2, 4, 5), 1),
    "transposed2d": (lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), lambda: torch.randn(2, 3, 4, 4), 1),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), lambda: torch.randn(1, 2, 3, 3, 3), 1),
    "embedding": (lambda: nn.Embedding(9, 4), lambda: torch.randint(0, 9, (2, 5)), 0),
    "bag": (lambda: nn.EmbeddingBag(9, 4), lambda: torch.randint(0, 9, (2, 5)), 0),
    "bilinear": (lambda: nn.Bilinear(4, 4, 3), lambda: torch.randn(2, 4), 0),
}


def run(layer: nn.Module, x: Tensor) -> Tensor:
    """Call a layer with as many copies of its input as it takes."""
    result: Tensor = layer(x, x) if isinstance(layer, nn.Bilinear) else layer(x)
    return result


class OwnForward(nn.Linear):
    """A subclass whose forward is not the stock one."""

    def forward(self, tokens: Tensor, *, gain: float = 1.0) -> Tensor:  # type: ignore[override]
        return gain * (tokens @ self.weight.T) + 7.0


class Table(nn.Module):
    """A type of the user's own with a weight that it reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weight.T


class Tied(nn.Module):
    """Embedding and head that share one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.body(self.embed(ids))))
        return result


def network() -> nn.Sequential:
    """Two linear layers."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def grid_recipes() -> dict[str, Recipe]:
    """Every named recipe, and one with each transform."""
    special: dict[str, Any] = {
        "center": LayerSpec(WEIGHT, TOKENS, (Center(),)),
        "hadamard": LayerSpec(WEIGHT, TOKENS, (Hadamard(1),)),
        "normalize": LayerSpec(WEIGHT, TOKENS, (Normalize(),)),
        "all transforms": LayerSpec(WEIGHT, TOKENS, (Normalize(), Hadamard(2), Center())),
    }
    return {name: recipes.named(name) for name in recipes.names()} | {
        name: recipe_for(spec, nn.Linear) for name, spec in special.items()
    }
