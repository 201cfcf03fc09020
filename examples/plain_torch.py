"""Without a Trainer: prepare, train in a loop of your own, bake, and prove that nothing changed.

Run: python examples/plain_torch.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_qat import bake, codes, prepare, recipes


def main() -> None:
    """Train a small network at ternary weights."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="a few steps only")
    steps = 5 if parser.parse_args().fast else 300

    torch.manual_seed(0)
    pixels, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    pixels = pixels.float() / 16
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    print(prepare(model, recipes.ternary()))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"accuracy {(model(pixels).argmax(-1) == labels).float().mean():.3f}")

    model.eval()
    baked = bake(model)  # plain modules
    assert torch.equal(baked(pixels), model(pixels)), "what is deployed is what was trained"
    for name, tensor in codes(baked).items():
        print(name, tensor.codes.unique().tolist(), f"{tensor.num_bytes:,} bytes")


if __name__ == "__main__":
    main()
