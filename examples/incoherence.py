"""Incoherence: a random rotation spreads spikes in weights, and what of it remains to be computed afterwards.

Run: python examples/incoherence.py
"""

import argparse

import torch
from torch import nn

from lightning_qat import Recipe, Rule, prepare, recipes
from lightning_qat.conversion import fold_rotations, online_rotations, rotate_between


def error(layer: nn.Linear, recipe: Recipe, x: torch.Tensor) -> float:
    """Return the relative error of a layer's output after quantization without training."""
    expected = layer(x)
    prepare(layer, recipe)
    return float((layer(x) - expected).norm() / expected.norm())


def main() -> None:
    """Quantize a spiky layer with and without a rotation, then get rid of rotations that need not be computed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="a smaller layer")
    size = 64 if parser.parse_args().fast else 512

    torch.set_grad_enabled(False)
    x = torch.randn(64, size)
    for name, recipe in (("int2", recipes.int2()), ("piq2 (rotated)", recipes.piq2())):
        torch.manual_seed(0)
        spiky = nn.Linear(size, size, bias=False)
        spiky.weight.copy_(torch.distributions.StudentT(3.0).sample((size, size)))
        print(f"{name}: relative error of the output {error(spiky, recipe, x):.2f}")

    # After training: what comes from layers in float is folded into them, the rest rotates while the model runs.
    model = nn.Sequential(nn.Embedding(100, size), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 10))
    prepare(model, recipes.piq2())
    folded = fold_rotations(model, torch.arange(100))
    print("rotates while it runs:", online_rotations(folded))

    # Before training: between two layers with nothing but linear operations between them nothing is left at all.
    pair = nn.Sequential(nn.Linear(size, size), nn.Linear(size, 10))
    rotate_between(pair, "0", "1", x)
    prepare(pair, Recipe((Rule("*", recipes.int2().rules[0].spec),)))
    print("rotated between two layers:", pair(x).shape)


if __name__ == "__main__":
    main()
