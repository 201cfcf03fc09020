"""Penalties on latent weights, against formulas written out in float64 NumPy."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_qat import losses

Array = NDArray[np.float64]
LO, HI = -4, 3


def layer(seed: int = 0, channels: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """A latent weight, its codes and its scale; some weights lie outside the grid's range."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(5, 30, generator=generator, dtype=torch.float64)
    scale = 0.3 + 0.4 * torch.rand(5 if channels else 1, 1, generator=generator, dtype=torch.float64)
    return latent, (latent / scale).round().clamp(LO, HI), scale


@pytest.mark.parametrize("channels", [True, False])
def test_grid_distance(channels: bool) -> None:
    latent, codes, scale = layer(channels=channels)
    expected = ((latent.numpy() - (codes * scale).numpy()) ** 2 / scale.numpy() ** 2).mean()
    assert losses.grid_distance(latent, codes * scale, scale=scale).item() == pytest.approx(expected, rel=1e-12)
    doubled = losses.grid_distance(2 * latent, 2 * codes * scale, scale=2 * scale)
    assert doubled.item() == pytest.approx(expected, rel=1e-12)


def test_grid_distance_of_evenly_spread_weights() -> None:
    latent = torch.linspace(-4.5, 3.5, 80001, dtype=torch.float64)
    distance = losses.grid_distance(latent, latent.round().clamp(LO, HI), scale=1.0)
    assert distance.item() == pytest.approx(1 / 12, rel=1e-3)


@pytest.mark.parametrize("channels", [True, False])
def test_bin_regularization(channels: bool) -> None:
    latent, codes, scale = layer(channels=channels)
    latent[0, 0], codes[0, 0] = -9.0, LO
    weight, levels, steps = latent.numpy(), codes.numpy(), np.broadcast_to(scale.numpy(), latent.shape)
    expected = 0.0
    for level in range(LO, HI + 1):
        inside = levels == level
        if not inside.any():
            continue
        if channels:
            expected += ((weight[inside] - level * steps[inside]) ** 2).mean()
        else:
            # The published form: squared error of the mean plus variance within the level.
            expected += (weight[inside].mean() - level * steps[0, 0]) ** 2 + weight[inside].var()
    result = losses.bin_regularization(latent, codes, scale=scale, lo=LO, hi=HI)
    assert result.item() == pytest.approx(expected, rel=1e-12)


def test_bin_regularization_counts_levels_alike() -> None:
    """One weight alone on a level weighs as much as a thousand on another, and empty levels cost nothing."""
    latent = torch.cat([torch.full((1000,), 0.1), torch.tensor([1.1])])
    codes = torch.cat([torch.zeros(1000), torch.ones(1)])
    result = losses.bin_regularization(latent, codes.to(torch.int8), scale=1.0, lo=-128, hi=127)
    assert result.item() == pytest.approx(0.02, rel=1e-5)


@pytest.mark.parametrize(("lo", "hi"), [(-1.5, 1.5), (-0.5, 0.5), (-1, 1)])
def test_bin_regularization_of_grids_without_zero(lo: float, hi: float) -> None:
    """Half-integer levels, and binary ones that are two steps apart."""
    generator = torch.Generator().manual_seed(1)
    levels = torch.arange(lo, hi + 1, dtype=torch.float64) if lo != -1 else torch.tensor([-1.0, 1.0])
    codes = levels.double()[torch.randint(len(levels), (200,), generator=generator)]
    latent = codes + 0.3 * torch.randn(200, generator=generator, dtype=torch.float64)
    expected = sum(((latent - level)[codes == level] ** 2).mean().item() for level in levels)
    assert losses.bin_regularization(latent, codes, scale=1.0, lo=lo, hi=hi).item() == pytest.approx(expected)


@pytest.mark.parametrize("channels", [True, False])
def test_oscillation_dampening(channels: bool) -> None:
    latent, codes, scale = layer(channels=channels)
    lower, upper = LO * scale, HI * scale
    clipped = np.clip(latent.numpy(), lower.numpy(), upper.numpy())
    expected = (((codes * scale).numpy() - clipped) ** 2).sum()
    result = losses.oscillation_dampening(latent, codes * scale, lower=lower, upper=upper)
    assert result.item() == pytest.approx(expected, rel=1e-12)


def test_oscillation_dampening_leaves_clipped_weights_alone() -> None:
    latent = torch.tensor([-3.0, 0.4, 9.0], requires_grad=True)
    quantized = torch.tensor([-2.0, 0.0, 1.0])
    losses.oscillation_dampening(latent, quantized, lower=-2.0, upper=1.0).backward()
    assert latent.grad is not None
    torch.testing.assert_close(latent.grad, torch.tensor([0.0, 0.8, 0.0]))


def test_sparsity_and_smoothness() -> None:
    latent, _, _ = layer()
    weight = latent.numpy()
    assert losses.sparsity(latent).item() == pytest.approx(np.abs(weight).mean(), rel=1e-12)
    assert losses.smoothness(latent).item() == pytest.approx((np.diff(weight, axis=1) ** 2).mean(), rel=1e-12)
    assert losses.smoothness(latent, dim=0).item() == pytest.approx((np.diff(weight, axis=0) ** 2).mean(), rel=1e-12)


def test_gradients() -> None:
    latent, codes, scale = layer()
    quantized = codes * scale
    latent.requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda x: losses.grid_distance(x, quantized, scale=scale), (latent,))
    assert check(
        lambda x, s: losses.bin_regularization(x, codes, scale=s, lo=LO, hi=HI),
        (latent, scale.clone().requires_grad_()),
    )
    assert check(lambda x: losses.oscillation_dampening(x, quantized, lower=LO * scale, upper=HI * scale), (latent,))
    assert check(losses.sparsity, (latent,))
    assert check(lambda x: losses.smoothness(x, dim=0), (latent,))


def test_a_straight_through_value_does_not_cancel_the_gradient() -> None:
    """With x^ attached, x - x^ would have gradient 0: the penalty would do nothing."""
    latent, codes, scale = layer()
    latent.requires_grad_()
    scale.requires_grad_()
    attached = latent + (codes * scale - latent).detach()
    losses.grid_distance(latent, attached, scale=scale).backward()
    expected = 2 * (latent - codes * scale).detach() / scale.detach() ** 2 / latent.numel()
    torch.testing.assert_close(latent.grad, expected)
    assert scale.grad is None
    latent.grad = None
    losses.oscillation_dampening(latent, attached, lower=LO * scale, upper=HI * scale).backward()
    assert latent.grad is not None
    assert (latent.grad != 0).float().mean() > 0.8
    assert scale.grad is None


@pytest.mark.parametrize("penalty", ["grid", "bins", "dampening"])
def test_descent_pulls_weights_to_their_levels(penalty: str) -> None:
    latent, codes, scale = layer()
    latent = latent.clamp(LO * scale, HI * scale).requires_grad_()
    quantized = codes * scale
    before = (latent - quantized).abs().mean().item()
    rate, loss = {
        "grid": (1.0, lambda x: losses.grid_distance(x, quantized, scale=scale)),
        "bins": (0.1, lambda x: losses.bin_regularization(x, codes, scale=scale, lo=LO, hi=HI)),
        "dampening": (0.1, lambda x: losses.oscillation_dampening(x, quantized, lower=LO * scale, upper=HI * scale)),
    }[penalty]
    for _ in range(300):
        (gradient,) = torch.autograd.grad(loss(latent), latent)
        latent = (latent - rate * gradient).detach().requires_grad_()
    assert (latent - quantized).abs().mean().item() < 0.1 * before


def test_arithmetic_is_float32() -> None:
    latent, codes, scale = (x.bfloat16() for x in layer())
    wide = [x.double() for x in (latent, codes * scale, scale)]
    result = losses.grid_distance(latent, codes * scale, scale=scale)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), losses.grid_distance(*wide[:2], scale=wide[2]), rtol=1e-5, atol=0)
    bins = losses.bin_regularization(latent, codes, scale=scale.float(), lo=LO, hi=HI)
    reference = losses.bin_regularization(latent.double(), codes, scale=scale.double(), lo=LO, hi=HI)
    assert bins.dtype == torch.float32
    torch.testing.assert_close(bins.double(), reference, rtol=1e-5, atol=0)
    assert losses.sparsity(latent).dtype == losses.smoothness(latent).dtype == torch.float32


def test_errors() -> None:
    latent, codes, scale = layer()
    with pytest.raises(ValueError, match=r"latent has shape \[5, 30\], quantized has shape \[5, 29\]"):
        losses.grid_distance(latent, codes[:, 1:], scale=scale)
    with pytest.raises(ValueError, match=r"quantized has shape \[4, 30\]"):
        losses.oscillation_dampening(latent, codes[1:], lower=-1.0, upper=1.0)
    with pytest.raises(ValueError, match=r"levels has shape \[4, 30\]"):
        losses.bin_regularization(latent, codes[1:], scale=scale, lo=LO, hi=HI)
    with pytest.raises(ValueError, match="expected lo < hi"):
        losses.bin_regularization(latent, codes, scale=scale, lo=1, hi=1)
    with pytest.raises(RuntimeError, match="out of bounds"):
        losses.bin_regularization(latent, codes, scale=scale, lo=LO, hi=HI - 2)
    for shape, dim in (((3, 1), -1), ((1, 3), 0), ((), -1)):
        with pytest.raises(ValueError, match="no neighbors"):
            losses.smoothness(torch.zeros(shape), dim=dim)
