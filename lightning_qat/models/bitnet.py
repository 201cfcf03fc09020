"""BitNet: the transformer with binary or ternary weights and 8-bit activations, as recipe and model.

Source: BitNet, arXiv:2310.11453 (binary); BitNet b1.58, arXiv:2402.17764 (ternary).
"""

from typing import final

from torch import nn

from lightning_qat.conversion import prepare
from lightning_qat.models.quantized import without_input_projection
from lightning_qat.models.transformer import Transformer
from lightning_qat.quantization import Normalize, Recipe, recipes

_RECIPES = {"binary": recipes.bitnet1, "ternary": recipes.bitnet}


def bitnet_recipe(quantize: str, *, normalize: Normalize | None = None) -> Recipe:
    """Return the recipe of BitNet's linear layers.

    Args:
        quantize: "ternary" (weights -1, 0, 1 times their mean absolute value) or "binary" (the sign of the centered
            weights times their mean absolute value); inputs are 8-bit codes per token in both.
        normalize: Of the input before it is quantized, ``Normalize()`` or None.

    Raises:
        TypeError: A normalization of another kind.
        ValueError: Another name.

    Example:
        >>> bitnet_recipe("ternary") == recipes.bitnet()
        True
    """
    if quantize not in _RECIPES:
        raise ValueError(
            f"quantize={quantize!r}: expected one of {sorted(_RECIPES)}; other grids: QuantizedTransformer"
        )
    if normalize is not None and not isinstance(normalize, Normalize):
        raise TypeError(f"normalize={normalize!r}: expected lightning_qat.Normalize(), or None for no normalization")
    return _RECIPES[quantize](normalize)


@final
class BitLinear(nn.Linear):
    """A linear layer with weights of one scale, binary or ternary, and inputs of 8 bits.

    y = (W^ x^) with W^ = gamma * clamp(round(W / gamma), -1, 1), gamma = mean |W| (ternary), or gamma * sign(W -
    mean W) (binary); x^ = s * round(x / s), s = max |x| / 127 for each token. Gradients pass the rounding unchanged.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        bias: Add a learned bias, in float; BitNet has none.
        quantize: "ternary" or "binary".
        normalize: Of the input before it is quantized, ``Normalize()`` or None.

    Raises:
        ValueError: Another name of a grid.

    Source: arXiv:2402.17764 section 2, arXiv:2310.11453 section 2.1.

    Example:
        >>> import torch
        >>> layer = BitLinear(16, 2)
        >>> len(layer.weight.unique()) <= 3
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        quantize: str = "ternary",
        normalize: Normalize | None = None,
    ) -> None:
        recipe = bitnet_recipe(quantize, normalize=normalize)
        super().__init__(in_features, out_features, bias=bias)
        prepare(self, recipe)


@final
class BitNet(Transformer):
    """A `Transformer` of `BitLinear` layers: [B, T, embed_dim] -> features of the last step [B, hidden_size].

    The linear layers of the blocks are quantized; the input projection, positions, norms and biases stay float.

    Args:
        embed_dim: Features per step of the input.
        hidden_size: A multiple of num_heads.
        num_heads: Attention heads.
        num_layers: Number of blocks.
        quantize: "ternary" or "binary".
        normalize: Of each layer's input before it is quantized, ``Normalize()`` or None; the blocks normalize the
            inputs of attention and feed-forward in any case, this adds the inputs of ``out`` and ``down``.
        dropout: Probability in [0, 1).
        window_size: The longest sequence, in steps.

    Raises:
        ValueError: A value is out of range, or another name of a grid.

    Source: the description of Edifice's ``Feedforward.BitNet``; arXiv:2402.17764. Deviation from the papers: the
    skeleton (LayerNorm, SiLU, biases, learned positions) in place of LLaMA's blocks.

    Example:
        >>> import torch
        >>> BitNet(12, hidden_size=32, num_layers=1, window_size=20)(torch.zeros(3, 20, 12)).shape
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
        normalize: Normalize | None = None,
        dropout: float = 0.1,
        window_size: int = 60,
    ) -> None:
        recipe = without_input_projection(bitnet_recipe(quantize, normalize=normalize))
        super().__init__(
            embed_dim,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_layers=num_layers,
            dropout=dropout,
            window_size=window_size,
        )
        prepare(self, recipe)
