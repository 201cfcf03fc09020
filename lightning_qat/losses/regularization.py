"""Penalties on latent weights that prepare them for their grid.

Each is a function of the tensors that a quantizer holds: `latent` (the full-precision weight), `quantized` (its
fake-quantized value), its `levels` (the value in steps of the scale, zero point taken off), `scale`. What each is
for:

- `grid_distance`: pulls every weight to its level, so that quantization changes less and less.
- `bin_regularization`: the same, with every level of the grid given the same say, however few weights it holds.
- `oscillation_dampening`: keeps weights from hovering at the threshold between two levels; leaves clipped ones alone.
- `sparsity`: pulls weights to 0, for ternary grids and for pruning.
- `smoothness`: pulls neighboring weights together, for convolution kernels and position tables.

They work in float32 (float64 where the inputs are); the quantized value is a constant for the gradient. It has to be:
through a straight-through estimator, latent and quantized would move together and the gradient would be 0.
"""

import torch
from torch import Tensor

from lightning_qat.losses._common import check_equal_shapes, full_precision

_PAIR = ("latent", "quantized")
_HINT = "give a weight and its own fake-quantized value"


def grid_distance(latent: Tensor, quantized: Tensor, *, scale: Tensor | float) -> Tensor:
    """Return the mean squared distance of weights from their levels, in steps of the grid.

    mean of ((x - x^) / s)^2: 1 / 12 for weights spread evenly over the steps, whatever the scale, so that one weight of
    this penalty serves all layers. Gradient 2 (x - x^) / (s^2 n) with respect to x; x^ and s are constants.

    Args:
        latent: Full-precision weight, any shape.
        quantized: Fake-quantized weight of the same shape.
        scale: Step of the grid, > 0, broadcastable to the weight.

    Returns:
        A scalar >= 0, float32 or float64.

    Raises:
        ValueError: Shapes do not match.

    Source: the L2 penalty of arXiv:1811.09862 (to levels instead of to +-1), per step of the grid.

    Example:
        >>> grid_distance(torch.tensor([0.1, 0.9]), torch.tensor([0.0, 1.0]), scale=0.5)
        tensor(0.0400)
    """
    check_equal_shapes(latent, quantized, names=_PAIR, hint=_HINT)
    step = full_precision(scale.detach()) if isinstance(scale, Tensor) else scale
    return ((full_precision(latent) - full_precision(quantized.detach())) / step).square().mean()


def bin_regularization(latent: Tensor, levels: Tensor, *, scale: Tensor | float, lo: float, hi: float) -> Tensor:
    """Return the squared distance of weights from their levels, averaged within each level and summed over levels.

    sum over levels i that hold weights of (mean(w_i) - target_i)^2 + var(w_i), target = level * scale. With the
    variance of the population the two terms are together the mean of (w - target)^2 over the level's weights, which
    is how it is computed, and which also serves scales per channel. A level with one weight has variance 0.

    Args:
        latent: Full-precision weight, any shape.
        levels: The level lo .. hi of each weight in steps of the scale (integers or half-integers, in any dtype, zero
            point taken off), the same shape.
        scale: Step of the grid, > 0, broadcastable to the weight. Gets the gradient of the first term, as in the
            paper; detach it to keep it out.
        lo: Smallest level.
        hi: Largest level.

    Returns:
        A scalar >= 0, float32 or float64.

    Raises:
        ValueError: Shapes do not match, or lo >= hi.
        RuntimeError: A level lies outside lo..hi (torch's index error).

    Source: Han et al., Improving Low-Precision Network Quantization via Bin Regularization, ICCV 2021, eq. 5 (one
    layer; the paper sums over layers, and starts the penalty only once learned scales have settled).

    Example:
        >>> weight, levels = torch.tensor([0.1, -0.1, 1.2]), torch.tensor([0, 0, 1])
        >>> bin_regularization(weight, levels, scale=1.0, lo=-2, hi=1)
        tensor(0.0500)
    """
    check_equal_shapes(latent, levels, names=("latent", "levels"), hint="give a weight and its own levels")
    if not lo < hi:
        raise ValueError(f"lo={lo}, hi={hi}; expected lo < hi")
    weight = full_precision(latent)
    squares = (weight - levels.detach().to(weight.dtype) * scale).square().flatten()
    # In float first: an int8 level minus -128 would wrap around.
    bins = (levels.detach().to(weight.dtype) - lo).long().flatten()
    # Counted in integers, then summed over weights: exact counts beyond 2^24 and a deterministic sum on accelerators.
    one = torch.ones((), dtype=torch.int64, device=bins.device)
    counts = torch.zeros(int(hi - lo) + 1, dtype=torch.int64, device=bins.device)
    counts = counts.scatter_add(0, bins, one.expand(bins.shape))
    return (squares / counts[bins]).sum()


def oscillation_dampening(latent: Tensor, quantized: Tensor, *, lower: Tensor | float, upper: Tensor | float) -> Tensor:
    """Return the squared distance of weights inside the grid's range from their levels.

    sum of (x^ - clip(x, lower, upper))^2: the regularization pulls weights from the thresholds between levels, where
    they oscillate, to the levels. Clipped weights get no gradient, so that learned scales stay free.

    Args:
        latent: Full-precision weight, any shape.
        quantized: Fake-quantized weight of the same shape.
        lower: Smallest value of the grid, s * lo, broadcastable to the weight.
        upper: Largest value of the grid, s * hi, broadcastable to the weight.

    Returns:
        A scalar >= 0, float32 or float64. A sum, as published: it grows with the layer.

    Raises:
        ValueError: Shapes do not match.

    Source: arXiv:2203.11086, oscillation dampening; its weight rises from 0 along a cosine in the paper's schedule.
    The bounds are constants for the gradient.

    Example:
        >>> weight, quantized = torch.tensor([0.4, 7.0]), torch.tensor([0.0, 1.0])
        >>> oscillation_dampening(weight, quantized, lower=-2.0, upper=1.0)
        tensor(0.1600)
    """
    check_equal_shapes(latent, quantized, names=_PAIR, hint=_HINT)
    weight = full_precision(latent)
    low, high = (torch.as_tensor(bound, dtype=weight.dtype, device=weight.device).detach() for bound in (lower, upper))
    return (full_precision(quantized.detach()) - torch.minimum(torch.maximum(weight, low), high)).square().sum()


def sparsity(latent: Tensor) -> Tensor:
    """Return the mean absolute weight (L1), which pulls all weights to 0 equally hard.

    Args:
        latent: Full-precision weight, any shape, at least one element.

    Returns:
        A scalar >= 0, float32 or float64.

    Source: the lasso, Tibshirani 1996; a mean in the place of the sum, so that layers of all sizes weigh alike.

    Example:
        >>> sparsity(torch.tensor([-1.0, 0.0, 3.0]))
        tensor(1.3333)
    """
    return full_precision(latent).abs().mean()


def smoothness(latent: Tensor, *, dim: int = -1) -> Tensor:
    """Return the mean squared difference of weights that are neighbors along a dimension.

    Args:
        latent: Full-precision weight, any shape.
        dim: The dimension, with at least 2 entries.

    Returns:
        A scalar >= 0, float32 or float64.

    Raises:
        ValueError: There are no neighbors along the dimension.

    Source: the roughness penalty of Whittaker 1923 with first differences; among the penalties of BitNet-Rust's QAT.

    Example:
        >>> smoothness(torch.tensor([[0.0, 1.0, 3.0]]))
        tensor(2.5000)
    """
    if latent.ndim == 0 or latent.shape[dim] < 2:
        raise ValueError(f"latent has shape {list(latent.shape)}; dimension {dim} has no neighbors, choose another one")
    return full_precision(latent).diff(dim=dim).square().mean()
