"""Bits from data beat the same bits everywhere: a perceptron on digits at 2 bits on average, 3 seeds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_qat import Recipe, Ternary, allocate_bits, prepare, recipes


class Run:
    """A float model of a seed and its data: 1400 digits to train on, 397 to measure on."""

    def __init__(self, seed: int) -> None:
        found = load_digits()
        self.x, self.y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
        torch.manual_seed(seed)
        order = torch.randperm(len(self.x))
        self.training, self.test = order[:1400], order[1400:]
        self.model = nn.Sequential(
            nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)
        )  # fmt: skip
        self.train(self.model, 150, 3e-3)

    def loss(self, model: nn.Module, chosen: Tensor) -> Tensor:
        return F.cross_entropy(model(self.x[chosen]), self.y[chosen])

    def train(self, model: nn.Module, num_steps: int, rate: float) -> None:
        optimizer = torch.optim.Adam(model.parameters(), rate)
        for _ in range(num_steps):
            batch = self.training[torch.randint(len(self.training), (256,))]
            optimizer.zero_grad()
            self.loss(model, batch).backward()
            optimizer.step()

    def losses(self, recipe: Recipe) -> tuple[float, float]:
        """Without training, and after 30 steps of training with quantization."""
        model = copy.deepcopy(self.model)
        prepare(model, recipe)
        before = float(self.loss(model, self.test).detach())
        torch.manual_seed(0)
        self.train(model, 30, 1e-3)
        return before, float(self.loss(model, self.test).detach())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_bits_on_average(seed: int) -> None:
    run = Run(seed)
    batch = run.x[run.training[:256]]
    recipe = allocate_bits(run.model, [batch], average_bits=2, candidates=(1, Ternary(), 2, 3, 4, 8))
    uniform, allocated = run.losses(recipes.int2()), run.losses(recipe)
    print(f"seed {seed}: uniform {uniform}, allocated {allocated}")
    assert allocated[0] < uniform[0]
    assert allocated[1] < uniform[1]
