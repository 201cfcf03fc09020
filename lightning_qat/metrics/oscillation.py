"""Weights that change their code from step to step, and those that do so back and forth.

A weight oscillates at a step where its code changes in the direction opposite to that of its previous change. The
frequency of a weight is the exponential moving average of that event, and the oscillation rate the share of weights
whose frequency exceeds a threshold.

Source: arXiv:2203.11086, "Overcoming Oscillations in Quantization-Aware Training". Codes are compared per observed
update: to measure what the paper measures, update after every optimizer step.
"""

import random
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torchmetrics import Metric

# Two bytes that hold every code and half-integer level exactly; neither gloo nor NCCL gathers int16. NaN: not yet seen.
_CODES = torch.float16


class OscillationState(NamedTuple):
    """What is known per weight.

    Args:
        codes: The code of the last update, float16; NaN before the first.
        direction: The sign of the last change (0: none yet), int8.
        frequency: Moving average of oscillations, float32 in 0 .. 1.
    """

    codes: Tensor
    direction: Tensor
    frequency: Tensor


def flip_rate(previous: Tensor, codes: Tensor) -> Tensor:
    """Return the share of weights whose code differs from the one before.

    Args:
        previous: Codes of the earlier step, any shape and dtype.
        codes: Codes of the later step, the same shape.

    Returns:
        A float32 scalar in 0 .. 1.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> flip_rate(torch.tensor([0, 1, 1, -2]), torch.tensor([0, 1, 0, -2]))
        tensor(0.2500)
    """
    if previous.shape != codes.shape:
        raise ValueError(
            f"previous has shape {list(previous.shape)}, codes has shape {list(codes.shape)}; "
            "give codes of the same weight"
        )
    return (previous != codes).float().mean()


def start_oscillation(codes: Tensor) -> OscillationState:
    """Return the state after the first sight of codes: no change and no oscillation yet.

    Args:
        codes: Integer codes or half-integer levels, any shape and dtype.

    Returns:
        The state, 7 bytes per weight.

    Example:
        >>> start_oscillation(torch.tensor([1, -2])).frequency
        tensor([0., 0.])
    """
    seen = codes.detach().to(_CODES)
    direction = torch.zeros_like(seen, dtype=torch.int8)
    return OscillationState(seen, direction, torch.zeros_like(seen, dtype=torch.float32))


def track_oscillation(state: OscillationState, codes: Tensor, *, momentum: float = 0.01) -> OscillationState:
    """Return the state after one more step.

    o = [sign(change) = -sign(previous change)], f = momentum * o + (1 - momentum) * f.

    Args:
        state: The state before.
        codes: Codes of this step, shaped as before.
        momentum: Weight of this step in the moving average, 0 < momentum <= 1.

    Returns:
        A new state.

    Raises:
        ValueError: The shape differs, or `momentum` is out of range.

    Example:
        >>> state = start_oscillation(torch.tensor([0, 0]))
        >>> for codes in ([1, 1], [0, 2], [1, 3]):
        ...     state = track_oscillation(state, torch.tensor(codes), momentum=0.5)
        >>> state.frequency
        tensor([0.7500, 0.0000])
    """
    _check_momentum(momentum)
    if codes.shape != state.codes.shape:
        raise ValueError(
            f"codes has shape {list(codes.shape)}, the state has shape {list(state.codes.shape)}; "
            "a state belongs to one weight"
        )
    seen = codes.detach().to(_CODES)
    change = (seen - state.codes).sign_().nan_to_num_().to(torch.int8)
    oscillated = change * state.direction == -1
    direction = torch.where(change != 0, change, state.direction)
    return OscillationState(seen, direction, state.frequency.lerp(oscillated.float(), momentum))


def oscillation_rate(frequency: Tensor, *, threshold: float = 0.005) -> Tensor:
    """Return the share of weights that oscillate more often than a threshold.

    Args:
        frequency: Frequencies of oscillation, any shape.
        threshold: Frequency above which a weight counts; with momentum 0.01 a single oscillation counts for 70 steps.

    Returns:
        A float32 scalar in 0 .. 1.

    Example:
        >>> oscillation_rate(torch.tensor([0.0, 0.001, 0.01, 0.3]))
        tensor(0.5000)
    """
    return (frequency > threshold).float().mean()


def sample_indices(num_weights: int, sample_size: int | None, *, seed: int = 0) -> Tensor | None:
    """Return which weights to watch: the same ones in every run and on every rank.

    Args:
        num_weights: Number of weights, >= 1.
        sample_size: How many to draw without replacement, >= 1. None: all.
        seed: Seed of the draw.

    Returns:
        Ascending indices into the flattened weight, int32 (int64 from 2^31 weights on), or None where all are watched.

    Raises:
        ValueError: A number is below 1.

    Example:
        >>> sample_indices(1000, 4, seed=1)
        tensor([137, 582, 821, 867], dtype=torch.int32)
    """
    if num_weights < 1 or (sample_size is not None and sample_size < 1):
        raise ValueError(f"num_weights={num_weights}, sample_size={sample_size}; expected at least 1 of each")
    if sample_size is None or sample_size >= num_weights:
        return None
    # Python's generator: torch.randperm would shuffle all weights of the layer for a few thousand of them.
    drawn = sorted(random.Random(seed).sample(range(num_weights), sample_size))
    return torch.tensor(drawn, dtype=torch.int32 if num_weights < 2**31 else torch.int64)


@final
class FlipRate(Metric):
    """Share of weights whose code changes from one update to the next, averaged over updates.

    Keeps 4 bytes per watched weight (the codes, and torchmetrics' copy for `reset`) plus 4 for its index in a sample;
    `reset` it when the grid changes.

    Args:
        num_weights: Number of weights of the layer.
        sample_size: Watch so many of them, drawn once. None: all.
        seed: Seed of the draw.
        kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: A number is below 1.

    Example:
        >>> metric = FlipRate(num_weights=4)
        >>> for codes in ([0, 1, 1, -2], [0, 1, 0, -2], [0, 1, 1, -1]):
        ...     metric.update(torch.tensor(codes))
        >>> metric.compute()
        tensor(0.3750)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = True
    codes: Tensor
    flips: Tensor
    count: Tensor
    index: Tensor | None

    def __init__(self, num_weights: int, *, sample_size: int | None = 4096, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_weights = num_weights
        self.register_buffer("index", sample_indices(num_weights, sample_size, seed=seed), persistent=False)
        watched = num_weights if self.index is None else self.index.numel()
        self.add_state("codes", torch.full((watched,), torch.nan, dtype=_CODES), dist_reduce_fx=None)
        self.add_state("flips", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Tensor) -> None:
        """Add the codes of one step, shaped like the weight."""
        watched = _watched(codes, self.index, self.num_weights).to(_CODES)
        comparable = ~self.codes.isnan()
        self.flips = self.flips + (comparable & (watched != self.codes)).sum()
        self.count = self.count + comparable.sum()
        self.codes = watched

    def compute(self) -> Tensor:
        """Return the share of changed codes; NaN before the second update."""
        return self.flips / self.count


@final
class OscillationRate(Metric):
    """Share of weights whose frequency of oscillation exceeds a threshold, see `track_oscillation`.

    Keeps 14 bytes per watched weight (code, direction and frequency, and torchmetrics' copy for `reset`) plus 4 for
    its index in a sample. It is a running measure: `reset` it when the grid changes, not at every log.

    Args:
        num_weights: Number of weights of the layer.
        sample_size: Watch so many of them, drawn once. None: all.
        momentum: Weight of a step in the moving average, 0 < momentum <= 1.
        threshold: Frequency above which a weight counts as oscillating.
        seed: Seed of the draw.
        kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: A number is below 1, or `momentum` is out of range.

    Example:
        >>> metric = OscillationRate(num_weights=2)
        >>> for codes in ([0, 0], [1, 1], [0, 2], [1, 3]):
        ...     metric.update(torch.tensor(codes))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = True
    codes: Tensor
    direction: Tensor
    frequency: Tensor
    index: Tensor | None

    def __init__(
        self,
        num_weights: int,
        *,
        sample_size: int | None = 4096,
        momentum: float = 0.01,
        threshold: float = 0.005,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_momentum(momentum)
        self.num_weights, self.momentum, self.threshold = num_weights, momentum, threshold
        self.register_buffer("index", sample_indices(num_weights, sample_size, seed=seed), persistent=False)
        watched = num_weights if self.index is None else self.index.numel()
        # Unreduced: ranks are stacked, and the share is taken over all of them.
        self.add_state("codes", torch.full((watched,), torch.nan, dtype=_CODES), dist_reduce_fx=None)
        self.add_state("direction", torch.zeros(watched, dtype=torch.int8), dist_reduce_fx=None)
        self.add_state("frequency", torch.zeros(watched), dist_reduce_fx=None)

    def update(self, codes: Tensor) -> None:
        """Add the codes of one step, shaped like the weight."""
        before = OscillationState(self.codes, self.direction, self.frequency)
        after = track_oscillation(before, _watched(codes, self.index, self.num_weights), momentum=self.momentum)
        self.codes, self.direction, self.frequency = after

    def compute(self) -> Tensor:
        """Return the share of oscillating weights."""
        return oscillation_rate(self.frequency, threshold=self.threshold)


def _watched(codes: Tensor, index: Tensor | None, num_weights: int) -> Tensor:
    if codes.numel() != num_weights:
        raise ValueError(f"codes has shape {list(codes.shape)}; the metric was made for num_weights={num_weights}")
    flat = codes.detach().flatten()
    return flat if index is None else flat.index_select(0, index)


def _check_momentum(momentum: float) -> None:
    if not 0 < momentum <= 1:
        raise ValueError(f"momentum={momentum}; expected 0 < momentum <= 1")
