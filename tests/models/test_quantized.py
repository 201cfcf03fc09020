"""The quantized transformer, BitNet and the layers for people who build by hand."""

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.conversion import codes
from lightning_qat.models import (
    BitLinear,
    BitNet,
    QATBlock,
    QuantizedTransformer,
    QuantLinear,
    Transformer,
    output_size,
    recommended_defaults,
)
from lightning_qat.quantization import Normalize, recipes

SIZES = {"hidden_size": 16, "num_heads": 2, "num_layers": 2, "window_size": 7, "dropout": 0.0}
BLOCK_LAYERS = [
    f"blocks.{index}.{name}.weight"
    for index in range(2)
    for name in ("attention.out", "attention.qkv", "feedforward.down", "feedforward.up")
]


def build(kind: str, quantize: str, embed_dim: int = 5) -> Transformer:
    model = {"transformer": QuantizedTransformer, "bitnet": BitNet}[kind]
    return model(embed_dim, quantize=quantize, **SIZES)  # type: ignore[arg-type, no-any-return, operator]


EVERY_MODE = [("transformer", name) for name in recipes.names()] + [("bitnet", "ternary"), ("bitnet", "binary")]


@pytest.mark.parametrize(("kind", "quantize"), EVERY_MODE)
def test_every_mode_trains(kind: str, quantize: str) -> None:
    model = build(kind, quantize)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, wanted = torch.randn(8, 7, 5), torch.randn(8, 16)
    losses = []
    for _ in range(6):
        loss = (model(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    latents = [parameter for name, parameter in model.named_parameters() if name in BLOCK_LAYERS]
    assert all(parameter.grad is not None and (parameter.grad != 0).any() for parameter in latents)


@pytest.mark.parametrize(("kind", "quantize"), EVERY_MODE)
def test_no_output_depends_on_a_later_input(kind: str, quantize: str) -> None:
    model = build(kind, quantize).eval()
    x = torch.randn(2, 7, 5)
    changed = x.clone()
    changed[:, 4] += 10.0
    before, after = model.features(x), model.features(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any()


@pytest.mark.parametrize("quantize", ["ternary", "binary"])
def test_bitnet_with_normalized_inputs_trains_and_stays_causal(quantize: str) -> None:
    model = BitNet(5, quantize=quantize, normalize=Normalize(), **SIZES)  # type: ignore[arg-type]
    x = torch.randn(2, 7, 5, requires_grad=True)
    model.features(x)[:, 3].square().sum().backward()
    assert x.grad is not None
    assert not x.grad[:, 4:].any()
    assert all(x.grad[:, step].any() for step in range(4))
    for name, parameter in model.named_parameters():
        assert name not in BLOCK_LAYERS or (parameter.grad is not None and parameter.grad.any())


@pytest.mark.parametrize("kind", ["transformer", "bitnet"])
@pytest.mark.parametrize("step", range(6))
def test_gradients_reach_earlier_inputs_only(kind: str, step: int) -> None:
    model = build(kind, "ternary")
    x = torch.randn(2, 7, 5, requires_grad=True)
    model.features(x)[:, step].square().sum().backward()
    assert x.grad is not None
    assert not x.grad[:, step + 1 :].any()
    assert x.grad[:, : step + 1].flatten(2).any(-1).all()


@pytest.mark.parametrize(("kind", "quantize"), EVERY_MODE)
@pytest.mark.parametrize(("embed_dim", "num_steps"), [(5, 7), (5, 1), (16, 3)])
def test_shapes_of_the_description(kind: str, quantize: str, embed_dim: int, num_steps: int) -> None:
    """[batch, seq_len, embed_dim] -> the last step [batch, hidden_size], which is the last of all steps' features."""
    model = build(kind, quantize, embed_dim).eval()
    x = torch.randn(3, num_steps, embed_dim)
    assert model.features(x).shape == (3, num_steps, 16)
    assert torch.equal(model(x), model.features(x)[:, -1])
    assert isinstance(model.input_projection, nn.Identity) == (embed_dim == 16)


LEARNED = frozenset({"binary", "int4", "w4a8", "piq2", "piq3"})
"""Recipes of which every output channel of a quantized layer has a learned scale."""


@pytest.mark.parametrize(("kind", "quantize"), EVERY_MODE)
@pytest.mark.parametrize("embed_dim", [5, 16])
def test_number_of_parameters(kind: str, quantize: str, embed_dim: int) -> None:
    """QKV, out, up, down with biases, two norms for each block; projection, positions, last norm; learned scales."""
    hidden, layers, window = 16, 2, 7
    projection = 0 if embed_dim == hidden else (embed_dim + 1) * hidden
    attention = (hidden + 1) * 3 * hidden + (hidden + 1) * hidden
    feedforward = (hidden + 1) * 4 * hidden + (4 * hidden + 1) * hidden
    expected = projection + window * hidden + layers * (attention + feedforward + 2 * 2 * hidden) + 2 * hidden
    channels = layers * (3 * hidden + hidden + 4 * hidden + hidden)
    learned = channels if kind == "transformer" and quantize in LEARNED else 0  # BitNet's scales are computed
    model = build(kind, quantize, embed_dim)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected + learned


@pytest.mark.parametrize(("kind", "quantize"), [("transformer", "int4"), ("bitnet", "ternary")])
def test_the_blocks_are_quantized_and_nothing_else(kind: str, quantize: str) -> None:
    model = build(kind, quantize)
    assert sorted(codes(model)) == BLOCK_LAYERS
    assert isinstance(model.input_projection, nn.Linear)
    plain = Transformer(5, **SIZES)  # type: ignore[arg-type]
    names = [name for name, _ in model.named_parameters() if "quantizer" not in name]
    assert names == [name for name, _ in plain.named_parameters()]
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert all(sizes[name] == parameter.shape for name, parameter in plain.named_parameters())


def test_an_input_of_the_hidden_size_needs_no_projection() -> None:
    model = build("transformer", "int4", embed_dim=16)
    assert isinstance(model.input_projection, nn.Identity)
    assert model(torch.zeros(2, 3, 16)).shape == (2, 16)


@pytest.mark.parametrize(
    ("quantize", "num_levels"), [("binary", 2), ("ternary", 3), ("int2", 4), ("int3", 8), ("int4", 16)]
)
def test_number_of_levels(quantize: str, num_levels: int) -> None:
    layer = QuantLinear(4096, 2, quantize=quantize)
    # The lowest of an even number of levels has no counterpart above; the least error may do without it.
    assert all(max(2, num_levels - 1) <= len(row.unique()) <= num_levels for row in layer.weight)


def reference_bitlinear(x: Tensor, latent: Tensor, *, binary: bool) -> Tensor:
    """The formulas of the papers in float64."""
    latent, x = latent.double(), x.double()
    if binary:
        centered = latent - latent.mean()
        weight = centered.abs().mean() * torch.where(centered >= 0, 1.0, -1.0).double()
    else:
        gamma = latent.abs().mean()
        weight = gamma * (latent / gamma).round().clamp(-1, 1)
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    return ((x / scale).round() * scale) @ weight.T


@pytest.mark.parametrize("quantize", ["ternary", "binary"])
def test_bitlinear_against_the_papers(quantize: str) -> None:
    layer = BitLinear(24, 5, quantize=quantize)
    x = torch.randn(3, 4, 24)
    latent = dict(layer.named_parameters())["weight"]
    expected = reference_bitlinear(x, latent, binary=quantize == "binary")
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)
    assert layer.bias is None


def test_bitlinear_can_normalize_its_input() -> None:
    layer = BitLinear(24, 5, normalize=Normalize(eps=1e-5))
    x = torch.randn(3, 24)
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    latent = dict(layer.named_parameters())["weight"]
    expected = reference_bitlinear(normed, latent, binary=False)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(100 * x), layer(x), rtol=1e-4, atol=1e-4)  # the size of the input is gone


def test_a_block_maps_its_own_size() -> None:
    block = QATBlock(16, num_heads=4, dropout=0.0, quantize="int8")
    assert block(torch.zeros(2, 3, 16)).shape == (2, 3, 16)
    assert len(codes(block)) == 4


@pytest.mark.parametrize(
    "make", [lambda: QuantLinear(6, 3), lambda: BitLinear(6, 3), lambda: build("bitnet", "binary")]
)
def test_copies_and_pickles(make: Callable[[], nn.Module]) -> None:
    layer = make().eval()
    x = torch.randn(2, 7, 5) if isinstance(layer, BitNet) else torch.randn(2, 6)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    assert isinstance(layer, QuantLinear | BitLinear | BitNet)


def test_a_state_dict_of_the_float_model_loads() -> None:
    plain = Transformer(5, **SIZES)  # type: ignore[arg-type]
    model = build("transformer", "int4")
    model.load_state_dict(plain.state_dict())
    for name, parameter in model.named_parameters():
        if "quantizer" not in name:
            assert torch.equal(parameter, plain.get_parameter(name))


def test_recommended_defaults_are_the_defaults() -> None:
    for kind in (QuantizedTransformer, BitNet):
        parameters = inspect.signature(kind).parameters
        defaults = {name: p.default for name, p in parameters.items() if name not in ("embed_dim", "normalize")}
        assert defaults == recommended_defaults()


def test_output_size() -> None:
    assert output_size() == 256
    assert output_size({"hidden_size": 16}) == build("transformer", "int8")(torch.zeros(1, 2, 5)).shape[1]
    with pytest.raises(ValueError, match=r"options \['hidden'\] do not exist; expected some of \['dropout'"):
        output_size({"hidden": 3})


def test_errors_list_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"'int5' is not a recipe; choose one of .*int4"):
        QuantizedTransformer(5, quantize="int5")
    with pytest.raises(ValueError, match=r"quantize='int4': expected one of \['binary', 'ternary'\]"):
        BitNet(5, quantize="int4")
    with pytest.raises(TypeError, match=r"normalize=True: expected lightning_qat.Normalize\(\), or None"):
        BitLinear(6, 3, normalize=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hidden_size=30 is not a multiple of num_heads=4"):
        QuantizedTransformer(5, hidden_size=30)
