"""A causal pre-norm transformer: an ordinary float model whose module names suit recipes.

Shapes: B batch, T time, E embed_dim, H hidden_size, N heads, D = H / N features of a head.

Names that rules match: ``input_projection``, ``positions``, ``blocks.0.attention.qkv``, ``blocks.0.attention.out``,
``blocks.0.feedforward.up``, ``blocks.0.feedforward.down``, ``norm``.
"""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.models._checks import check_dimensions, check_dropout

FEEDFORWARD_FACTOR = 4


@final
class Attention(nn.Module):
    """Causal multi-head self-attention, softmax(Q K^T / sqrt(D)) V over the present and earlier steps.

    Args:
        hidden_size: H, a multiple of num_heads.
        num_heads: N.
    """

    def __init__(self, hidden_size: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, H] for x [B, T, H]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # [B, N, T, D] each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


@final
class FeedForward(nn.Module):
    """``down(silu(up(x)))`` with an inner size of 4 H.

    Args:
        hidden_size: H.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, FEEDFORWARD_FACTOR * hidden_size)
        self.down = nn.Linear(FEEDFORWARD_FACTOR * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, H] for x [B, T, H]."""
        out: Tensor = self.down(F.silu(self.up(x)))
        return out


class Block(nn.Module):
    """One pre-norm block: x + dropout(attention(norm(x))), then x + dropout(feedforward(norm(x))).

    Args:
        hidden_size: H, a multiple of num_heads.
        num_heads: N.
        dropout: probability in [0, 1), on the two branches (not on the attention weights).

    Raises:
        ValueError: if H is not a multiple of N or a value is out of range.
    """

    def __init__(self, hidden_size: int, *, num_heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        check_dimensions(hidden_size=hidden_size, num_heads=num_heads)
        check_dropout(dropout)
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = Attention(hidden_size, num_heads=num_heads)
        self.feedforward_norm = nn.LayerNorm(hidden_size)
        self.feedforward = FeedForward(hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, H]; step t depends on the steps up to t."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        out: Tensor = x + self.dropout(self.feedforward(self.feedforward_norm(x)))
        return out


class Transformer(nn.Module):
    """The skeleton of the quantized transformer and of BitNet, in float.

    Input [B, T, E] -> ``input_projection`` where E != H -> + learned positions -> ``num_layers`` blocks -> LayerNorm
    -> the last step, [B, H]. `features` returns all steps. The number of parameters is

        (E + 1) H [if E != H] + window_size H + num_layers (12 H^2 + 13 H) + 2 H

    Args:
        embed_dim: E, features per step of the input.
        hidden_size: H, a multiple of num_heads.
        num_heads: N.
        num_layers: number of blocks.
        dropout: probability in [0, 1).
        window_size: the longest sequence, in steps; shorter ones are fine.

    Raises:
        ValueError: if H is not a multiple of N or a value is out of range; in forward, for an input of another size.

    Source: the description of Edifice's ``Meta.QAT`` in Elixir. Deviation: positions. The description has none, with
    window_size the expected length; attention without positions only tells how many steps came before, so here each
    of the window_size steps has a learned vector (initialized with standard deviation 0.1).

    Example:
        >>> model = Transformer(12, hidden_size=32, num_layers=2, window_size=20)
        >>> model(torch.zeros(3, 20, 12)).shape, model.features(torch.zeros(3, 7, 12)).shape
        (torch.Size([3, 32]), torch.Size([3, 7, 32]))
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        hidden_size: int = 256,
        num_heads: int = 4,
        num_layers: int = 4,
        dropout: float = 0.1,
        window_size: int = 60,
    ) -> None:
        super().__init__()
        check_dimensions(
            embed_dim=embed_dim,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_layers=num_layers,
            window_size=window_size,
        )
        self.embed_dim = embed_dim
        self.hidden_size = hidden_size
        self.window_size = window_size
        self.input_projection = nn.Identity() if embed_dim == hidden_size else nn.Linear(embed_dim, hidden_size)
        self.positions = nn.Embedding(window_size, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads=num_heads, dropout=dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        nn.init.normal_(self.positions.weight, std=0.1)

    def features(self, x: Tensor) -> Tensor:
        """Return the features of all steps [B, T, H]; step t depends on the inputs up to t.

        Raises:
            ValueError: if the input is not [B, T <= window_size, embed_dim].
        """
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"Transformer: got an input of shape {list(x.shape)}, expected [batch, steps, {self.embed_dim}]; "
                "build it with embed_dim = the size of the input's last dimension"
            )
        num_steps = x.shape[1]
        if num_steps > self.window_size:
            raise ValueError(
                f"Transformer: got {num_steps} steps, expected at most window_size={self.window_size}; build it with "
                f"a larger window_size or pass the last steps, x[:, -{self.window_size}:]"
            )
        x = self.input_projection(x) + self.positions(torch.arange(num_steps, device=x.device))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the last step [B, H]."""
        return self.features(x)[:, -1]
