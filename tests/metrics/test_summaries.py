"""Scales, gradients and sizes as functions."""

import math

import pytest
import torch

from lightning_qat import metrics


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_scale_summary(count: int) -> None:
    scale = torch.rand(count, generator=torch.Generator().manual_seed(count))
    ordered = sorted(scale.tolist())
    summary = {key: value.item() for key, value in metrics.scale_summary(scale.reshape(count, 1)).items()}
    assert summary == {"min": ordered[0], "median": ordered[(count - 1) // 2], "max": ordered[-1]}


def test_scale_summary_keeps_what_it_saw() -> None:
    scale = torch.tensor([1.0, 2.0])
    metric = metrics.ScaleSummary()
    metric.update(scale)
    scale.mul_(100)
    assert metric.compute()["max"].item() == 2


def test_scale_summary_error() -> None:
    with pytest.raises(ValueError, match=r"scale has shape \[0\]; expected at least one"):
        metrics.scale_summary(torch.zeros(0))


def test_gradient_norm() -> None:
    gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = math.sqrt(sum(x**2 for x in gradient.flatten().tolist()))
    assert metrics.gradient_norm(gradient).item() == pytest.approx(expected, rel=1e-6)
    assert metrics.gradient_norm(gradient.half()).dtype == torch.float32
    assert metrics.gradient_norm(torch.full((4,), 300.0, dtype=torch.float16)).item() == 600


@pytest.mark.parametrize(
    ("num_weights", "bits", "options", "expected_bits", "expected_bytes"),
    [
        (4096, 4, {"num_scales": 128, "scale_bits": 16}, 4.5, 2048 + 256),
        (1000, 8, {"num_scales": 10}, 8.32, 1000 + 40),
        (1000, 8, {"num_scales": 10, "scale_bits": 40}, 8.4, 1000 + 50),
        (3, 1, {}, 1.0, 1),
        (9, 1, {}, 1.0, 2),
        (5, 1.6, {}, 1.6, 1),
        (10, 1.6, {"num_scales": 1}, 4.8, 2 + 4),
        (7, 32, {}, 32.0, 28),
    ],
)
def test_sizes(
    num_weights: int, bits: float, options: dict[str, int], expected_bits: float, expected_bytes: int
) -> None:
    assert metrics.effective_bits(num_weights, bits, **options) == pytest.approx(expected_bits, rel=1e-12)
    assert metrics.model_size(num_weights, bits, **options) == expected_bytes


@pytest.mark.parametrize("function", [metrics.effective_bits, metrics.model_size])
def test_size_errors(function: object) -> None:
    assert callable(function)
    for arguments in ((0, 4), (10, 0), (10, math.inf)):
        with pytest.raises(ValueError, match="expected num_weights >= 1, bits > 0"):
            function(*arguments)
    for options in ({"num_scales": -1}, {"scale_bits": -1}):
        with pytest.raises(ValueError, match="num_scales >= 0"):
            function(10, 4, **options)
