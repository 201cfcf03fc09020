"""The quantized transformer and its parts for people who build by hand: float modules prepared with a recipe."""

from collections.abc import Mapping
from typing import Any, final

from torch import nn

from lightning_qat.conversion import prepare
from lightning_qat.models.transformer import Block, Transformer
from lightning_qat.quantization import Recipe, Rule, recipes


def recommended_defaults() -> dict[str, Any]:
    """Return the arguments of `QuantizedTransformer` that have defaults.

    Example:
        >>> recommended_defaults()["hidden_size"]
        256
    """
    return {
        "hidden_size": 256,
        "num_heads": 4,
        "num_layers": 4,
        "quantize": "ternary",
        "dropout": 0.1,
        "window_size": 60,
    }


def output_size(options: Mapping[str, Any] | None = None) -> int:
    """Return the number of features that a `QuantizedTransformer` or `BitNet` gives, its hidden_size.

    Args:
        options: Arguments of the model; what is missing has its default.

    Raises:
        ValueError: An option that the model does not have.

    Example:
        >>> output_size(), output_size({"embed_dim": 12, "hidden_size": 64})
        (256, 64)
    """
    known = {"embed_dim": None, **recommended_defaults()}
    given = dict(options or {})
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"output_size: options {unknown} do not exist; expected some of {sorted(known)}")
    return int({**known, **given}["hidden_size"])


def without_input_projection(recipe: Recipe) -> Recipe:
    """Return a recipe for the skeleton: the blocks as the recipe says, the input projection in float."""
    return Recipe((Rule("input_projection", None, source="skeleton"), *recipe.rules))


@final
class QuantLinear(nn.Linear):
    """A linear layer whose weight is fake-quantized; input [..., in_features], output [..., out_features].

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        bias: Add a learned bias, in float.
        quantize: Name of a recipe, see `lightning_qat.recipes`.

    Raises:
        ValueError: The recipe does not exist.

    Example:
        >>> import torch
        >>> layer = QuantLinear(16, 2, quantize="ternary")
        >>> [len(row.unique()) <= 3 for row in layer.weight]
        [True, True]
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, quantize: str = "ternary") -> None:
        super().__init__(in_features, out_features, bias=bias)
        prepare(self, recipes.named(quantize))


@final
class QATBlock(Block):
    """A pre-norm block of causal attention and feed-forward whose four linear layers are fake-quantized.

    Args:
        hidden_size: Features per step, a multiple of num_heads.
        num_heads: Attention heads.
        dropout: Probability in [0, 1).
        quantize: Name of a recipe, see `lightning_qat.recipes`.

    Raises:
        ValueError: A value is out of range, or the recipe does not exist.

    Example:
        >>> import torch
        >>> QATBlock(16, num_heads=2, quantize="int4")(torch.zeros(1, 5, 16)).shape
        torch.Size([1, 5, 16])
    """

    def __init__(self, hidden_size: int, *, num_heads: int, dropout: float = 0.1, quantize: str = "ternary") -> None:
        super().__init__(hidden_size, num_heads=num_heads, dropout=dropout)
        prepare(self, recipes.named(quantize))


@final
class QuantizedTransformer(Transformer):
    """A `Transformer` prepared with a recipe: [B, T, embed_dim] -> features of the last step [B, hidden_size].

    The linear layers of the blocks are quantized; the input projection, positions and norms stay float.

    Args:
        embed_dim: Features per step of the input.
        hidden_size: A multiple of num_heads.
        num_heads: Attention heads.
        num_layers: Number of blocks.
        quantize: Name of a recipe, see `lightning_qat.recipes`: "ternary", "binary", "int4", "int8" and all others.
        dropout: Probability in [0, 1).
        window_size: The longest sequence, in steps.

    Raises:
        ValueError: A value is out of range, or the recipe does not exist.

    Source: the description of Edifice's ``Meta.QAT``; deviation: positions, see `Transformer`.

    Example:
        >>> import torch
        >>> model = QuantizedTransformer(12, hidden_size=32, num_layers=1, quantize="int4", window_size=20)
        >>> model(torch.zeros(3, 20, 12)).shape
        torch.Size([3, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        hidden_size: int = 256,
        num_heads: int = 4,
        num_layers: int = 4,
        quantize: str = "ternary",
        dropout: float = 0.1,
        window_size: int = 60,
    ) -> None:
        recipe = without_input_projection(recipes.named(quantize))
        super().__init__(
            embed_dim,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_layers=num_layers,
            dropout=dropout,
            window_size=window_size,
        )
        prepare(self, recipe)
