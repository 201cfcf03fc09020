"""Every metric with a few batches of data, for the tests that all of them have to pass.

References are float64 NumPy and import nothing from the package.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]
LO, HI = -4, 3


@dataclass(frozen=True)
class Case:
    """A metric class, its arguments, the arguments of successive updates, and the value over all of them."""

    name: str
    updates: tuple[Call, ...]
    reference: Callable[[tuple[Call, ...]], Any]
    arguments: tuple[tuple[str, Any], ...] = ()
    history: bool = False  # updates follow one another in time, so that ranks all see the same ones


def weights(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latent weights, their levels and their scale per channel."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(4, 25, generator=generator)
    scale = 0.2 + 0.3 * torch.rand(4, 1, generator=generator)
    return latent, (latent / scale).round().clamp(LO, HI), scale


def walk(seed: int, steps: int) -> tuple[Call, ...]:
    """Codes of 40 weights that move back and forth."""
    generator = torch.Generator().manual_seed(seed)
    path = torch.randint(-1, 2, (steps, 5, 8), generator=generator).cumsum(0) % 3
    return tuple(((codes.to(torch.int8),), {}) for codes in path)


def joined(updates: tuple[Call, ...], position: int) -> Array:
    return np.concatenate([call[0][position].double().numpy().ravel() for call in updates])


def sqnr(updates: tuple[Call, ...]) -> float:
    x, q = joined(updates, 0), joined(updates, 1)
    return float(10 * np.log10((x**2).sum() / ((x - q) ** 2).sum()))


def relative_error(updates: tuple[Call, ...]) -> float:
    x, q = joined(updates, 0), joined(updates, 1)
    return float(np.linalg.norm(x - q) / np.linalg.norm(x))


def mse(updates: tuple[Call, ...]) -> float:
    return float(((joined(updates, 0) - joined(updates, 1)) ** 2).mean())


def clip_rate(updates: tuple[Call, ...]) -> float:
    units = np.concatenate([(call[0][0].double() / call[1]["scale"].double()).numpy().ravel() for call in updates])
    return float(((units < LO) | (units > HI)).mean())


def entropy(updates: tuple[Call, ...]) -> float:
    _, counts = np.unique(joined(updates, 0), return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def zero_rate(updates: tuple[Call, ...]) -> float:
    return float((joined(updates, 0) == 0).mean())


def scales(updates: tuple[Call, ...]) -> dict[str, float]:
    ordered = np.sort(joined(updates, 0))
    return {"min": ordered[0], "median": ordered[(len(ordered) - 1) // 2], "max": ordered[-1]}


def gradient_norm(updates: tuple[Call, ...]) -> float:
    norms = [np.linalg.norm(call[0][0].double().numpy()) for call in updates]
    return float(np.sqrt(np.mean(np.square(norms))))


def flip_rate(updates: tuple[Call, ...]) -> float:
    path = np.stack([call[0][0].numpy().ravel() for call in updates])
    return float((path[1:] != path[:-1]).mean())


def frequencies(path: Array, momentum: float) -> list[float]:
    """The frequency of every weight, by a loop over its codes."""
    result = []
    for codes in path.reshape(len(path), -1).T:
        frequency, last = 0.0, 0.0
        for before, after in itertools.pairwise(codes):
            change = np.sign(float(after) - float(before))
            oscillated = change != 0 and change == -last
            last = change if change != 0 else last
            frequency = momentum * oscillated + (1 - momentum) * frequency
        result.append(frequency)
    return result


def oscillation_rate(updates: tuple[Call, ...]) -> float:
    path = np.stack([call[0][0].numpy() for call in updates])
    return float((np.array(frequencies(path, 0.1)) > 0.2).mean())


def effective_bits(updates: tuple[Call, ...]) -> float:
    total = sum(n * bits + options.get("num_scales", 0) * 32 for (n, bits), options in updates)
    return float(total / sum(n for (n, _), _ in updates))


def model_size(updates: tuple[Call, ...]) -> int:
    return sum(math.ceil(n * bits / 8) + 4 * options.get("num_scales", 0) for (n, bits), options in updates)


PAIRS: tuple[Call, ...] = tuple(((latent, levels * scale), {}) for latent, levels, scale in map(weights, range(6)))
SIZES: tuple[Call, ...] = (((1000, 4), {"num_scales": 10}), ((77, 32), {}), ((501, 2), {"num_scales": 3}))

CASES: tuple[Case, ...] = (
    Case("SQNR", PAIRS, sqnr),
    Case("RelativeError", PAIRS, relative_error),
    Case("QuantizationMSE", PAIRS, mse),
    Case(
        "ClipRate",
        tuple(((latent,), {"scale": scale, "lo": LO, "hi": HI}) for latent, _, scale in map(weights, range(6))),
        clip_rate,
    ),
    Case("LevelEntropy", tuple(((levels,), {"lo": LO}) for _, levels, _ in map(weights, range(6))), entropy),
    Case("ZeroRate", tuple(((levels * scale,), {}) for _, levels, scale in map(weights, range(6))), zero_rate),
    Case("ScaleSummary", tuple(((scale,), {}) for _, _, scale in map(weights, range(6))), scales),
    Case("GradientNorm", tuple(((latent,), {}) for latent, _, _ in map(weights, range(6))), gradient_norm),
    Case("FlipRate", walk(0, 12), flip_rate, (("num_weights", 40),), history=True),
    Case(
        "OscillationRate",
        walk(1, 12),
        oscillation_rate,
        (("num_weights", 40), ("momentum", 0.1), ("threshold", 0.2)),
        history=True,
    ),
    Case("EffectiveBits", SIZES, effective_bits, history=True),
    Case("ModelSize", SIZES, model_size, history=True),
)
