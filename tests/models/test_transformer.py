"""The transformer: sizes, values against a float64 reference, causality, errors."""

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.models.transformer import Block, Transformer


def small(embed_dim: int = 6, **arguments: float) -> Transformer:
    sizes = {"hidden_size": 16, "num_heads": 4, "num_layers": 2, "window_size": 9, "dropout": 0.0}
    return Transformer(embed_dim, **{**sizes, **arguments}).eval()  # type: ignore[arg-type]


def reference_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * norm.weight.double() + norm.bias.double()


def reference_block(x: Tensor, block: Block) -> Tensor:
    """One sequence [T, H] in float64, head by head and step by step."""
    parameters = {name: parameter.double() for name, parameter in block.named_parameters()}
    num_steps, hidden_size = x.shape
    size = hidden_size // block.attention.num_heads
    normed = reference_norm(x, block.attention_norm)
    qkv = normed @ parameters["attention.qkv.weight"].T + parameters["attention.qkv.bias"]
    mixed = torch.zeros_like(x)
    for head in range(block.attention.num_heads):
        q, k, v = (qkv[:, part * hidden_size + head * size :][:, :size] for part in range(3))
        for step in range(num_steps):
            weights = torch.softmax(k[: step + 1] @ q[step] / math.sqrt(size), dim=0)
            mixed[step, head * size : (head + 1) * size] = weights @ v[: step + 1]
    x = x + mixed @ parameters["attention.out.weight"].T + parameters["attention.out.bias"]
    inner = reference_norm(x, block.feedforward_norm) @ parameters["feedforward.up.weight"].T
    inner = inner + parameters["feedforward.up.bias"]
    inner = inner / (1 + torch.exp(-inner))
    return x + inner @ parameters["feedforward.down.weight"].T + parameters["feedforward.down.bias"]


def test_value_against_the_formula() -> None:
    model = small()
    x = torch.randn(7, 6)
    expected = x.double() @ model.input_projection.weight.double().T + model.input_projection.bias.double()
    expected = expected + model.positions.weight[:7].double()
    for block in model.blocks:
        assert isinstance(block, Block)
        expected = reference_block(expected, block)
    expected = reference_norm(expected, model.norm)
    torch.testing.assert_close(model.features(x[None])[0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("embed_dim", "num_steps"), [(6, 9), (16, 9), (6, 1), (6, 4)])
def test_shape(embed_dim: int, num_steps: int) -> None:
    model = small(embed_dim)
    x = torch.randn(3, num_steps, embed_dim)
    features = model.features(x)
    assert features.shape == (3, num_steps, 16)
    assert torch.equal(model(x), features[:, -1])


@pytest.mark.parametrize("embed_dim", [6, 16])
def test_number_of_parameters(embed_dim: int) -> None:
    """Counted by hand, layer by layer; the docstring gives the sum."""
    hidden, layers, window = 16, 2, 9
    projection = 0 if embed_dim == hidden else embed_dim * hidden + hidden
    attention = (hidden * 3 * hidden + 3 * hidden) + (hidden * hidden + hidden)
    feedforward = (hidden * 4 * hidden + 4 * hidden) + (4 * hidden * hidden + hidden)
    norm = 2 * hidden
    expected = projection + window * hidden + layers * (attention + feedforward + 2 * norm) + norm
    assert sum(parameter.numel() for parameter in small(embed_dim).parameters()) == expected
    formula = (embed_dim + 1) * hidden * (embed_dim != hidden) + window * hidden
    assert formula + layers * (12 * hidden**2 + 13 * hidden) + 2 * hidden == expected


def test_defaults_are_those_of_the_description() -> None:
    model = Transformer(8)
    assert len(model.blocks) == 4
    assert model.hidden_size == 256
    assert model.window_size == model.positions.num_embeddings == 60
    block = model.blocks[0]
    assert isinstance(block, Block)
    assert block.attention.num_heads == 4
    assert block.dropout.p == 0.1
    assert isinstance(Transformer(256).input_projection, nn.Identity)


def test_names_that_rules_match() -> None:
    linear = [name for name, module in small().named_modules() if isinstance(module, nn.Linear)]
    parts = ("attention.qkv", "attention.out", "feedforward.up", "feedforward.down")
    assert linear == ["input_projection", *(f"blocks.{index}.{part}" for index in range(2) for part in parts)]


@pytest.mark.parametrize("step", range(9))
def test_no_output_depends_on_a_later_input(step: int) -> None:
    """Exactly: the outputs up to a step stay the same bit for bit, those from the changed input on differ."""
    model = small()
    x = torch.randn(2, 9, 6)
    changed = x.clone()
    changed[:, step] += 100.0
    before, after = model.features(x), model.features(changed)
    assert torch.equal(before[:, :step], after[:, :step])
    assert all((before[:, later] != after[:, later]).any() for later in range(step, 9))


def test_gradients_reach_earlier_inputs_only() -> None:
    x = torch.randn(1, 9, 6, requires_grad=True)
    (small().features(x)[0, 4] @ torch.randn(16)).backward()
    assert x.grad is not None
    assert (x.grad[0, :5] != 0).any(dim=1).all()
    assert torch.equal(x.grad[0, 5:], torch.zeros(4, 6))


def test_steps_are_told_apart_by_position() -> None:
    """Attention without positions gives a constant input the same features at all steps."""
    features = small().features(torch.ones(1, 9, 6))[0]
    assert len(features.unique(dim=0)) == 9


def test_dropout_acts_in_training_only() -> None:
    model = small(dropout=0.5)
    x = torch.randn(2, 5, 6)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 18}, r"hidden_size=18 is not a multiple of num_heads=4; choose hidden_size=20 or num"),
        ({"num_layers": 0}, "num_layers=0: expected an integer of at least 1"),
        ({"window_size": 2.5}, "window_size=2.5: expected an integer"),
        ({"dropout": 1.0}, r"dropout=1.0: expected a probability in \[0, 1\)"),
    ],
)
def test_errors_at_construction(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_errors_of_inputs_name_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"got 10 steps, expected at most window_size=9; .* x\[:, -9:\]"):
        small()(torch.zeros(1, 10, 6))
    with pytest.raises(ValueError, match=r"shape \[2, 9, 7\], expected \[batch, steps, 6\]"):
        small()(torch.zeros(2, 9, 7))
    with pytest.raises(ValueError, match=r"shape \[9, 6\], expected \[batch, steps, 6\]"):
        small()(torch.zeros(9, 6))
