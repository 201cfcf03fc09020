"""Argument checks and masked means that all losses share."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """Return `x` in float32, or in float64 where it already is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which matrix products keep the precision of their operands on the device of `x`."""
    if not torch.compiler.is_compiling() and not torch.amp.is_autocast_available(
        x.device.type
    ):  # older ones stop there
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def check_equal_shapes(first: Tensor, second: Tensor, *, names: tuple[str, str], hint: str) -> None:
    """Raise where two tensors that are compared element by element differ in shape."""
    if first.shape != second.shape:
        raise ValueError(
            f"{names[0]} has shape {list(first.shape)}, {names[1]} has shape {list(second.shape)}; "
            f"they must be equal: {hint}"
        )


def check_mask(mask: Tensor | None, expected: Sequence[int], *, name: str = "mask") -> None:
    """Raise where a mask does not have exactly one entry per position."""
    if mask is not None and list(mask.shape) != list(expected):
        raise ValueError(
            f"{name} has shape {list(mask.shape)}; expected {list(expected)}, one entry per position. "
            "Expand or slice it first"
        )


def check_positive(value: float, *, name: str) -> None:
    """Raise where a number is not positive and finite."""
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name}={value!r}; expected a positive finite number")


def hide(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return `x` with zeros at masked positions, so that NaN or inf in padding reaches neither value nor gradient."""
    if mask is None:
        return x
    keep = (mask != 0).reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return sum(mask * values) / sum(mask), and 0 (with its graph) where nothing is left."""
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    weights = mask.to(values.dtype)
    total = weights.sum()
    return (values * weights).sum() / torch.where(total > 0, total, torch.ones_like(total))


def feature_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the dimensions that the mask does not have; without a mask the values as they are."""
    if mask is None or mask.ndim == values.ndim:
        return values
    return values.mean(tuple(range(mask.ndim, values.ndim)))


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine over the last dimension; 0 without gradient where a vector has norm below 1e-8."""
    alive = (first.norm(dim=-1) > 1e-8) & (second.norm(dim=-1) > 1e-8)
    # Dead vectors are replaced before the division: a mask after it would still send NaN backward.
    first = torch.where(alive[..., None], first, torch.ones_like(first))
    second = torch.where(alive[..., None], second, torch.ones_like(second))
    similarity = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
    return torch.where(alive, similarity, torch.zeros_like(similarity))
