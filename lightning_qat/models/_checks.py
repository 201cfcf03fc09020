"""Argument checks that the models share."""

from typing import Any

from torch import Tensor, nn


def check_dimensions(**sizes: int) -> None:
    """Raise a ValueError that names the first size below 1, or a hidden_size that num_heads does not divide."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r}: expected an integer of at least 1")
    hidden_size, num_heads = sizes.get("hidden_size", 0), sizes.get("num_heads", 1)
    if hidden_size % num_heads:
        fits = hidden_size + num_heads - hidden_size % num_heads
        divisors = [heads for heads in range(1, min(hidden_size, 64) + 1) if hidden_size % heads == 0]
        raise ValueError(
            f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}; "
            f"choose hidden_size={fits} or num_heads from {divisors}"
        )


def check_dropout(dropout: float) -> None:
    """Raise a ValueError unless the probability is in [0, 1)."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout}: expected a probability in [0, 1), such as 0.1")


def check_optimizer(*, learning_rate: float, weight_decay: float, warmup_fraction: float) -> None:
    """Raise a ValueError that names the first setting out of range."""
    if not learning_rate > 0:
        raise ValueError(f"learning_rate={learning_rate}: expected a number above 0, such as 1e-3")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay}: expected 0 or more, such as 0.01")
    if not 0 <= warmup_fraction <= 1:
        raise ValueError(f"warmup_fraction={warmup_fraction}: expected a share of the steps in [0, 1], such as 0.1")


def check_samples(model: nn.Module, samples: Any, num_dims: int, *, floating: bool, expected: str) -> None:
    """Raise a TypeError where a model gets the batches of another model's data.

    Args:
        model: that is called.
        samples: what it is called with.
        num_dims: that they should have.
        floating: whether they should be floating-point numbers.
        expected: what they should be, in words.
    """
    if isinstance(samples, Tensor) and samples.dim() == num_dims and samples.is_floating_point() == floating:
        return
    given = f"{samples.dtype} {list(samples.shape)}" if isinstance(samples, Tensor) else type(samples).__name__
    raise TypeError(f"{type(model).__name__}: got {given} where {expected} are expected; does the data fit the model?")
