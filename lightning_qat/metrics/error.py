"""How far fake-quantized values are from the values they stand for."""

from abc import ABC
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_qat.metrics._common import plain_values


class _Sums(NamedTuple):
    """Sums of squares of the error and of the signal, and the number of values."""

    noise: Tensor
    signal: Tensor
    num_values: int


def sqnr(latent: Tensor, quantized: Tensor) -> Tensor:
    """Return the signal-to-quantization-noise ratio in decibels.

    10 log10(sum x^2 / sum (x - x^)^2) = -20 log10(relative error); about 6 dB per bit.

    Args:
        latent: Values before quantization, any shape and floating dtype.
        quantized: Fake-quantized values, the same shape.

    Returns:
        A scalar in dB; inf where nothing was lost.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> sqnr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]))
        tensor(20.)
    """
    sums = _sums(latent, quantized)
    return _sqnr(sums.noise, sums.signal)


def relative_error(latent: Tensor, quantized: Tensor) -> Tensor:
    """Return the size of the error in units of the size of the signal.

    sqrt(sum (x - x^)^2 / sum x^2), the root of the relative mean squared error.

    Args:
        latent: Values before quantization, any shape and floating dtype.
        quantized: Fake-quantized values, the same shape.

    Returns:
        A scalar >= 0; 0 where nothing was lost, 1 where everything became 0.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]))
        tensor(0.1000)
    """
    sums = _sums(latent, quantized)
    return _relative_error(sums.noise, sums.signal)


def quantization_mse(latent: Tensor, quantized: Tensor) -> Tensor:
    """Return the mean squared error of quantization, mean (x - x^)^2.

    Args:
        latent: Values before quantization, any shape and floating dtype.
        quantized: Fake-quantized values, the same shape.

    Returns:
        A scalar >= 0.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> quantization_mse(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]))
        tensor(0.1250)
    """
    sums = _sums(latent, quantized)
    return sums.noise / sums.num_values


class ErrorMetric(Metric, ABC):
    """The sums that all measures of error share; in a `MetricCollection` they are computed once for all of them.

    Args:
        kwargs: Arguments of `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    noise: Tensor
    signal: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("noise", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("signal", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @final
    def update(self, latent: Tensor, quantized: Tensor) -> None:
        """Add a tensor and its fake-quantized values.

        Args:
            latent: Values before quantization.
            quantized: Fake-quantized values, the same shape.
        """
        sums = _sums(latent, quantized)
        # Out of place throughout: a state that was reset under inference mode may not be written to outside of it.
        self.noise = self.noise + sums.noise.to(self.noise.dtype)
        self.signal = self.signal + sums.signal.to(self.signal.dtype)
        self.count = self.count + sums.num_values


@final
class SQNR(ErrorMetric):
    """Signal-to-quantization-noise ratio in decibels, see `sqnr`.

    Example:
        >>> metric = SQNR()
        >>> metric.update(torch.tensor([3.0]), torch.tensor([3.0]))
        >>> metric.update(torch.tensor([4.0]), torch.tensor([3.5]))
        >>> metric.compute()
        tensor(20.)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """Return the ratio in dB over all updates."""
        return _sqnr(self.noise, self.signal)


@final
class RelativeError(ErrorMetric):
    """Size of the error in units of the size of the signal, see `relative_error`.

    Example:
        >>> metric = RelativeError()
        >>> metric.update(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]))
        >>> metric.compute()
        tensor(0.1000)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the relative error over all updates."""
        return _relative_error(self.noise, self.signal)


@final
class QuantizationMSE(ErrorMetric):
    """Mean squared error of quantization, see `quantization_mse`.

    Example:
        >>> metric = QuantizationMSE()
        >>> metric.update(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]))
        >>> metric.compute()
        tensor(0.1250)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the mean squared error over all updates."""
        return self.noise / self.count


def _sums(latent: Tensor, quantized: Tensor) -> _Sums:
    if latent.shape != quantized.shape:
        raise ValueError(
            f"latent has shape {list(latent.shape)}, quantized has shape {list(quantized.shape)}; "
            "give a tensor and its own fake-quantized values"
        )
    signal = plain_values(latent)
    noise = signal - quantized.detach()
    return _Sums(noise.square_().sum(), signal.square().sum(), latent.numel())


def _relative_error(noise: Tensor, signal: Tensor) -> Tensor:
    return torch.where(noise == 0, torch.zeros_like(noise), (noise / signal).sqrt())


def _sqnr(noise: Tensor, signal: Tensor) -> Tensor:
    return -20 * _relative_error(noise, signal).log10()
