"""Measures of error as functions, and where they degenerate."""

import math

import numpy as np
import pytest
import torch

from lightning_qat import metrics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_values(dtype: torch.dtype, seed: int) -> None:
    latent = torch.randn(30, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    quantized = (latent / 0.4).round().clamp(-4, 3) * 0.4
    x, q = latent.to(dtype).double().numpy(), quantized.to(dtype).double().numpy()
    rel = 1e-12 if dtype == torch.float64 else 1e-5
    noise, signal = ((x - q) ** 2).sum(), (x**2).sum()
    arguments = latent.to(dtype), quantized.to(dtype)
    assert metrics.sqnr(*arguments).item() == pytest.approx(10 * np.log10(signal / noise), rel=rel)
    assert metrics.relative_error(*arguments).item() == pytest.approx(np.sqrt(noise / signal), rel=rel)
    assert metrics.quantization_mse(*arguments).item() == pytest.approx(noise / x.size, rel=rel)
    assert metrics.sqnr(*arguments).dtype == dtype


def test_six_decibels_per_bit() -> None:
    latent = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    for bits in (2, 4, 8):
        step = 2.0 / 2**bits
        quantized = ((latent / step - 0.5).round() + 0.5) * step
        assert metrics.sqnr(latent, quantized).item() == pytest.approx(20 * math.log10(2) * bits, abs=0.1)


def test_degenerate_values() -> None:
    x, zero = torch.tensor([1.0, -2.0]), torch.zeros(2)
    assert metrics.sqnr(x, x).item() == math.inf
    assert metrics.relative_error(x, x).item() == 0
    assert metrics.sqnr(x, zero).item() == 0
    assert metrics.relative_error(x, zero).item() == 1
    assert metrics.sqnr(zero, x).item() == -math.inf
    assert metrics.relative_error(zero, x).item() == math.inf
    assert metrics.sqnr(zero, zero).item() == math.inf
    assert metrics.relative_error(zero, zero).item() == 0
    assert math.isnan(metrics.relative_error(torch.tensor([math.nan]), torch.zeros(1)).item())


def test_large_tensors_keep_their_digits() -> None:
    """Float32 sums of a million squares stay within 1e-5 of float64, in one update and in a thousand."""
    latent = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    quantized = (latent / 0.1).round().clamp(-128, 127) * 0.1
    exact = metrics.relative_error(latent.double(), quantized.double()).item()
    assert metrics.relative_error(latent, quantized).item() == pytest.approx(exact, rel=1e-5)
    metric = metrics.RelativeError()
    for x, q in zip(latent.chunk(1000), quantized.chunk(1000), strict=True):
        metric.update(x, q)
    assert metric.compute().item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("name", ["sqnr", "relative_error", "quantization_mse"])
def test_shape_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"latent has shape \[2\], quantized has shape \[3\]"):
        getattr(metrics, name)(torch.zeros(2), torch.zeros(3))
