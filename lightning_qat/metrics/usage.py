"""How a grid is used: what it clips, which of its levels are taken, how much becomes zero."""

from typing import Any, final

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_qat.metrics._common import plain_values


def clip_rate(
    latent: Tensor, *, scale: Tensor | float, lo: Tensor | float, hi: Tensor | float, zero_point: Tensor | float = 0.0
) -> Tensor:
    """Return the share of values outside the range of the grid, whose gradient `Clipped` masks.

    mean of [x / s + z < lo or x / s + z > hi].

    Args:
        latent: Values before quantization, any shape and floating dtype.
        scale: Step s > 0, broadcastable to the values.
        lo: Smallest level, in steps.
        hi: Largest level, in steps.
        zero_point: Integer z, broadcastable to the values.

    Returns:
        A float32 scalar in 0 .. 1.

    Example:
        >>> clip_rate(torch.tensor([-2.5, -1.0, 0.2, 1.4]), scale=1.0, lo=-2, hi=1)
        tensor(0.5000)
    """
    return _share(_num_clipped(latent, scale, lo, hi, zero_point), latent.numel())


def level_entropy(codes: Tensor, *, lo: Tensor | float, num_levels: int) -> Tensor:
    """Return the entropy of the codes in bits: how much of the width is used.

    -sum_i p_i log2 p_i, p_i the share of code lo + i: log2(num_levels) where all levels are taken alike, 0 where the
    layer is dead (all codes equal).

    Args:
        codes: Integer codes or levels (with or without the half of half-integer grids), any shape and dtype.
        lo: Smallest level of the grid.
        num_levels: hi - lo + 1, the levels that lie within the bounds; 3 for a binary grid, whose two are two steps
            apart. More than the grid has is allowed: those stay empty.

    Returns:
        A float32 scalar in 0 .. log2(num_levels); NaN where a code lies outside.

    Raises:
        ValueError: `num_levels` is below 2.

    Example:
        >>> level_entropy(torch.tensor([-2, -1, 0, 1]), lo=-2, num_levels=4)
        tensor(2.)
    """
    return _entropy(_level_counts(codes, lo, _checked_levels(num_levels)))


def zero_rate(quantized: Tensor) -> Tensor:
    """Return the share of values that are exactly zero.

    Args:
        quantized: Fake-quantized values, or codes less their zero point; any shape and dtype.

    Returns:
        A float32 scalar in 0 .. 1.

    Example:
        >>> zero_rate(torch.tensor([0.0, -0.5, 0.0, 1.0]))
        tensor(0.5000)
    """
    return _share((quantized.detach() == 0).sum(), quantized.numel())


@final
class ClipRate(Metric):
    """Share of values outside the range of the grid, see `clip_rate`.

    Args:
        kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = ClipRate()
        >>> metric.update(torch.tensor([-2.5, -1.0, 0.2, 1.4]), scale=1.0, lo=-2, hi=1)
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    clipped: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("clipped", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        latent: Tensor,
        *,
        scale: Tensor | float,
        lo: Tensor | float,
        hi: Tensor | float,
        zero_point: Tensor | float = 0.0,
    ) -> None:
        """Add a tensor and the range of its grid; arguments as in `clip_rate`."""
        self.clipped = self.clipped + _num_clipped(latent, scale, lo, hi, zero_point)
        self.count = self.count + latent.numel()

    def compute(self) -> Tensor:
        """Return the share over all updates."""
        return self.clipped / self.count


@final
class LevelEntropy(Metric):
    """Entropy of the codes in bits, see `level_entropy`.

    Args:
        num_levels: Room for so many levels, at least hi - lo + 1 of the widest grid that will be seen. 256 serves all
            grids up to 8 bits, also where bits fall during the run (updates with different `lo` are to be separated
            by `reset`).
        kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: `num_levels` is below 2.

    Example:
        >>> metric = LevelEntropy()
        >>> metric.update(torch.tensor([-2, -1, 0, 1]), lo=-2)
        >>> metric.compute()
        tensor(2.)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(self, num_levels: int = 256, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_levels = _checked_levels(num_levels)
        self.add_state("counts", torch.zeros(num_levels + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Tensor, *, lo: Tensor | float) -> None:
        """Add codes; arguments as in `level_entropy`."""
        self.counts = self.counts + _level_counts(codes, lo, self.num_levels)

    def compute(self) -> Tensor:
        """Return the entropy in bits over all updates."""
        return _entropy(self.counts)


@final
class ZeroRate(Metric):
    """Share of values that are exactly zero, see `zero_rate`.

    Args:
        kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = ZeroRate()
        >>> metric.update(torch.tensor([0.0, -0.5, 0.0, 1.0]))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    zeros: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("zeros", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, quantized: Tensor) -> None:
        """Add values; arguments as in `zero_rate`."""
        self.zeros = self.zeros + (quantized.detach() == 0).sum()
        self.count = self.count + quantized.numel()

    def compute(self) -> Tensor:
        """Return the share over all updates."""
        return self.zeros / self.count


def _share(part: Tensor, count: int) -> Tensor:
    return part / torch.full_like(part, count)


def _num_clipped(
    latent: Tensor, scale: Tensor | float, lo: Tensor | float, hi: Tensor | float, zero_point: Tensor | float
) -> Tensor:
    steps = plain_values(latent) / scale + zero_point
    return ((steps < lo) | (steps > hi)).sum()


def _checked_levels(num_levels: int) -> int:
    if num_levels < 2:
        raise ValueError(f"num_levels={num_levels}; expected hi - lo + 1 of the grid, at least 2")
    return num_levels


def _level_counts(codes: Tensor, lo: Tensor | float, num_levels: int) -> Tensor:
    """Return how often each level occurs; one more entry at the end counts codes outside of them."""
    # In float first: an int8 code less -128 would wrap around. Rounded up: codes of half-integer levels lie below them.
    level = (codes.detach().flatten().float() - lo).ceil_()
    index = torch.where((level >= 0) & (level < num_levels), level, num_levels)
    if index.device.type == "cpu":
        return torch.bincount(index.int(), minlength=num_levels + 1)
    return _scatter_counts(index, num_levels + 1)


def _scatter_counts(index: Tensor, size: int) -> Tensor:
    """Count like `bincount`, which would wait for the accelerator to learn the largest index."""
    one = torch.ones((), dtype=torch.int64, device=index.device)
    counts = torch.zeros(size, dtype=torch.int64, device=index.device)
    return counts.scatter_add(0, index.long(), one.expand(index.shape))


def _entropy(counts: Tensor) -> Tensor:
    inside, outside = counts[:-1], counts[-1]
    shares = inside / inside.sum()
    entropy = -torch.xlogy(shares, shares).sum() / torch.log(torch.full_like(shares[0], 2.0))
    # Adding 0 turns the -0 of a single level into 0.
    return torch.where(outside == 0, entropy + 0.0, torch.full_like(entropy, torch.nan))
