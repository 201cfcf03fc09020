"""Clipping, entropy and zeros as functions."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_qat import metrics
from lightning_qat.metrics.usage import _scatter_counts


def entropy(values: Tensor) -> float:
    _, counts = np.unique(values.double().numpy(), return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


@pytest.mark.parametrize("zero_point", [0.0, 2.0, -3.0])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_clip_rate(zero_point: float, as_tensors: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(8, 50, generator=generator)
    scale = 0.2 + torch.rand(8, 1, generator=generator)
    units = latent.double().numpy() / scale.double().numpy() + zero_point
    expected = ((units < -4) | (units > 3)).mean()
    lo, hi = (torch.tensor(-4.0), torch.tensor(3.0)) if as_tensors else (-4, 3)
    rate = metrics.clip_rate(latent, scale=scale, lo=lo, hi=hi, zero_point=zero_point)
    assert rate.item() == pytest.approx(expected)
    assert 0 < expected < 1


def test_the_bounds_themselves_are_not_clipped() -> None:
    assert metrics.clip_rate(torch.tensor([-2.0, 1.0]), scale=1.0, lo=-2, hi=1).item() == 0
    assert metrics.clip_rate(torch.tensor([-2.01, 1.01]), scale=1.0, lo=-2, hi=1).item() == 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32])
def test_entropy_of_integers(bits: int, dtype: torch.dtype) -> None:
    lo, hi = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    latent = torch.randn(5000, generator=torch.Generator().manual_seed(bits)) * hi / 2
    codes = latent.round().clamp(lo, hi).to(dtype)
    value = metrics.level_entropy(codes, lo=lo, num_levels=2**bits)
    assert value.item() == pytest.approx(entropy(codes), rel=1e-5)
    roomy = metrics.level_entropy(codes, lo=torch.tensor(float(lo)), num_levels=256)
    assert roomy.item() == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("levels", "lo", "num_levels"), [([-1.5, -0.5, 0.5, 1.5], -1.5, 4), ([-1.0, 1.0], -1, 3), ([-1.0, 0.0, 1.0], -1, 3)]
)
def test_entropy_of_other_grids(levels: list[float], lo: float, num_levels: int) -> None:
    """Half-integers as levels and as integer codes below them, binary levels two steps apart, ternary."""
    drawn = torch.tensor(levels)[torch.randint(len(levels), (300,), generator=torch.Generator().manual_seed(0))]
    assert metrics.level_entropy(drawn, lo=lo, num_levels=num_levels).item() == pytest.approx(entropy(drawn), rel=1e-5)
    codes = (drawn - lo % 1).to(torch.int8)
    assert metrics.level_entropy(codes, lo=lo, num_levels=num_levels).item() == pytest.approx(entropy(drawn), rel=1e-5)


def test_entropy_bounds() -> None:
    every = torch.arange(-128, 128).repeat(3)
    assert metrics.level_entropy(every, lo=-128, num_levels=256).item() == pytest.approx(8)
    dead = metrics.level_entropy(torch.full((10,), 3), lo=-8, num_levels=16)
    assert dead.item() == 0
    assert math.copysign(1, dead.item()) == 1


@pytest.mark.parametrize("outside", [-3.0, 2.0, 500.0, math.nan])
def test_entropy_of_foreign_codes_is_nan(outside: float) -> None:
    codes = torch.tensor([-2.0, 1.0, 0.0, outside])
    assert math.isnan(metrics.level_entropy(codes, lo=-2, num_levels=4).item())
    metric = metrics.LevelEntropy(num_levels=4)
    metric.update(codes, lo=-2)
    assert math.isnan(metric.compute().item())


def test_counts_on_an_accelerator_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    index = torch.randint(17, (1000,), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(_scatter_counts(index, 17), torch.bincount(index.long(), minlength=17))

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("bincount waits for the accelerator")

    monkeypatch.setattr(torch, "bincount", fail)
    assert metrics.level_entropy(index.to("meta"), lo=0, num_levels=16).shape == ()


def test_zero_rate() -> None:
    assert metrics.zero_rate(torch.tensor([0, 1, 0, 0], dtype=torch.int8)).item() == 0.75
    assert metrics.zero_rate(torch.tensor([1e-30, -0.0])).item() == 0.5


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"num_levels=1; expected hi - lo \+ 1"):
        metrics.level_entropy(torch.zeros(2), lo=0, num_levels=1)
    with pytest.raises(ValueError, match="num_levels=0"):
        metrics.LevelEntropy(num_levels=0)
