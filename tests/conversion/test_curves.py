"""Training on integer products and on float products of the same values: curves that coincide within noise."""

import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_qat import Recipe, prepare, recipes

SEEDS, STEPS = 3, 40


def curve(recipe: Recipe, arithmetic: str, seed: int) -> list[float]:
    """The losses of a classifier of which of three features is the largest."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 32), nn.SiLU(), nn.Linear(32, 3))
    prepare(model, recipe, arithmetic=arithmetic)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(32, 12, generator=generator)
        loss = F.cross_entropy(model(x), x[:, :3].argmax(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("recipe", [recipes.w8a8(), recipes.bitnet()])
def test_curves_coincide(recipe: Recipe) -> None:
    ends: dict[str, list[float]] = {"simulated": [], "integer": []}
    for seed in range(SEEDS):
        curves = {arithmetic: curve(recipe, arithmetic, seed) for arithmetic in ends}
        assert curves["integer"][0] == pytest.approx(curves["simulated"][0], rel=1e-5)
        assert curves["integer"] != curves["simulated"]  # they do round differently
        for arithmetic, losses in curves.items():
            ends[arithmetic].append(statistics.fmean(losses[-10:]))
            assert ends[arithmetic][-1] < 0.7 * losses[0]
    paired = [one - other for one, other in zip(ends["integer"], ends["simulated"], strict=True)]
    assert abs(statistics.fmean(paired)) < statistics.stdev(ends["simulated"])
