"""What a quantized model weighs."""

import math
from typing import Any, final

import torch
from torch import Tensor
from torchmetrics import Metric


def effective_bits(num_weights: int, bits: float, *, num_scales: int = 0, scale_bits: int = 32) -> float:
    """Return the bits stored per weight, scales included.

    bits + num_scales * scale_bits / num_weights.

    Args:
        num_weights: Number of weights, >= 1.
        bits: Bits per code, > 0; 32 or 16 for weights that stay float, 1.6 for ternary codes packed five to a byte.
        num_scales: Number of scales, >= 0.
        scale_bits: Bits stored per scale; 8 more with a zero point.

    Returns:
        Bits per weight.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> effective_bits(4096, 4, num_scales=128, scale_bits=16)
        4.5
    """
    _check(num_weights, bits, num_scales, scale_bits)
    return bits + num_scales * scale_bits / num_weights


def model_size(num_weights: int, bits: float, *, num_scales: int = 0, scale_bits: int = 32) -> int:
    """Return the bytes of a tensor of codes and its scales, each rounded up to whole bytes.

    Args:
        num_weights: Number of weights, >= 1.
        bits: Bits per code, > 0.
        num_scales: Number of scales, >= 0.
        scale_bits: Bits stored per scale; 8 more with a zero point.

    Returns:
        Bytes.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> model_size(4096, 4, num_scales=128, scale_bits=16)
        2304
    """
    _check(num_weights, bits, num_scales, scale_bits)
    return math.ceil(round(num_weights * bits, 3) / 8) + math.ceil(num_scales * scale_bits / 8)


@final
class EffectiveBits(Metric):
    """Bits stored per weight over several tensors, see `effective_bits`.

    Every rank describes the whole model, so ranks are not added up.

    Args:
        kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = EffectiveBits()
        >>> metric.update(3000, 4)
        >>> metric.update(1000, 32)
        >>> metric.compute()
        tensor(11.)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    bits: Tensor
    weights: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("bits", torch.zeros(()), dist_reduce_fx="max")
        self.add_state("weights", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    def update(self, num_weights: int, bits: float, *, num_scales: int = 0, scale_bits: int = 32) -> None:
        """Add a tensor; arguments as in `effective_bits`."""
        per_weight = effective_bits(num_weights, bits, num_scales=num_scales, scale_bits=scale_bits)
        self.bits = self.bits + per_weight * num_weights
        self.weights = self.weights + num_weights

    def compute(self) -> Tensor:
        """Return the bits per weight over all updates."""
        return self.bits / self.weights


@final
class ModelSize(Metric):
    """Bytes of several tensors of codes with their scales, see `model_size`.

    Every rank describes the whole model, so ranks are not added up.

    Args:
        kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = ModelSize()
        >>> metric.update(3000, 4)
        >>> metric.update(1000, 32)
        >>> metric.compute()
        tensor(5500)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    num_bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("num_bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    def update(self, num_weights: int, bits: float, *, num_scales: int = 0, scale_bits: int = 32) -> None:
        """Add a tensor; arguments as in `model_size`."""
        size = model_size(num_weights, bits, num_scales=num_scales, scale_bits=scale_bits)
        self.num_bytes = self.num_bytes + size

    def compute(self) -> Tensor:
        """Return the bytes over all updates."""
        return self.num_bytes


def _check(num_weights: int, bits: float, num_scales: int, scale_bits: int) -> None:
    if num_weights < 1 or not 0 < bits < math.inf or num_scales < 0 or scale_bits < 0:
        raise ValueError(
            f"num_weights={num_weights}, bits={bits}, num_scales={num_scales}, scale_bits={scale_bits}; expected "
            "num_weights >= 1, bits > 0, num_scales >= 0 and scale_bits >= 0"
        )
