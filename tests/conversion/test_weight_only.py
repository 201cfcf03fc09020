"""The short forward of layers with quantized weights alone: when it is taken, and that nothing else changes."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from lightning_qat import (
    AbsMax,
    AbsMean,
    Binary,
    Clipped,
    Int,
    LayerSpec,
    Learned,
    Normalize,
    PerChannel,
    PerGroup,
    PerToken,
    QuantizerSpec,
    Recipe,
    Rule,
    StraightThrough,
    Ternary,
    accumulation_window,
    float_weights,
    prepare,
)
from lightning_qat.conversion import fused, weight_only

WEIGHTS = {
    "dynamic": QuantizerSpec(Int(4), PerChannel(), AbsMax(), StraightThrough()),
    "grouped": QuantizerSpec(Int(4), PerGroup(4), AbsMax(), StraightThrough()),
    "clipped": QuantizerSpec(Ternary(), PerChannel(), AbsMean(), Clipped()),
    "clipped groups": QuantizerSpec(Int(2), PerGroup(4), AbsMean(0.66), Clipped()),
    "learned": QuantizerSpec(Int(4), PerChannel(), Learned()),
}
TOKENS = QuantizerSpec(Int(8, narrow=True), PerToken(), AbsMax(), StraightThrough())


def layer(spec: LayerSpec) -> nn.Linear:
    torch.manual_seed(0)
    module = nn.Linear(12, 8)
    prepare(module, Recipe((Rule("*", spec),)))
    return module


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the short forward answered, each time it was asked."""
    seen: list[bool] = []

    def note(module: nn.Module, x: Tensor) -> Tensor | None:
        y = weight_only.weight_only(module, x)
        seen.append(y is not None)
        return y

    monkeypatch.setattr(fused, "weight_only", note)
    return seen


def steps(module: nn.Module, *, window: bool) -> list[Tensor]:
    """Outputs and gradients of three micro-batches and a step, twice."""
    found: list[Tensor] = []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        optimizer.zero_grad()
        if window:
            with accumulation_window(module):
                for batch in x:
                    found.append(module(batch))
                    found[-1].square().sum().backward()
        else:
            for batch in x:
                found.append(module(batch))
                found[-1].square().sum().backward()
        found.extend(parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None)
        optimizer.step()
    return found


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_numbers(monkeypatch: pytest.MonkeyPatch, taken: list[bool], weight: str, window: bool) -> None:
    found = steps(layer(LayerSpec(WEIGHTS[weight])), window=window)
    assert taken == [True] * 6
    monkeypatch.setattr(fused, "weight_only", lambda module, x: None)
    for one, other in zip(found, steps(layer(LayerSpec(WEIGHTS[weight])), window=False), strict=True):
        assert torch.equal(one, other)


def soften(module: nn.Module, softness: float | None) -> nn.Module:
    quantizer: Any = module.weight_quantizer
    quantizer.softness = None if softness is None else torch.tensor(softness)
    return module


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("weight", [*WEIGHTS, "binary"])
def test_soft_numbers(monkeypatch: pytest.MonkeyPatch, taken: list[bool], weight: str, window: bool) -> None:
    spec = LayerSpec((WEIGHTS | {"binary": QuantizerSpec(Binary())})[weight])
    found = steps(soften(layer(spec), 0.3), window=window)
    assert taken == [True] * 6
    monkeypatch.setattr(fused, "weight_only", lambda module, x: None)
    hard, soft = steps(layer(spec), window=False), steps(soften(layer(spec), 0.3), window=window)
    assert not torch.equal(found[0], hard[0])
    for one, other in zip(found, soft, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("weight", ["dynamic", "clipped", "learned"])
def test_softness_that_changes_in_a_window(weight: str) -> None:
    module, x = layer(LayerSpec(WEIGHTS[weight])), torch.randn(3, 12)
    expected = [soften(module, softness)(x) for softness in (0.7, 0.3, None)]
    assert not torch.equal(expected[0], expected[1])
    with accumulation_window(module):
        for softness, y in zip((0.7, 0.3, None), expected, strict=True):
            assert torch.equal(soften(module, softness)(x), y)
            assert torch.equal(module(x), y)
        soften(module, 0.5)
        assert torch.equal(module.eval()(x), expected[2])  # only training is soft


@pytest.mark.parametrize("weight", ["clipped", "clipped groups", "learned"])
def test_kept_for_backward_while_soft(weight: str) -> None:
    module, x = soften(layer(LayerSpec(WEIGHTS[weight])), 0.3), torch.randn(3, 12)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(x)
    inside = {tensor.data_ptr() for tensor in (x, *module.parameters())}
    assert sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in inside) <= 32  # scales


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "pruning": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "hook": lambda module: module.weight_quantizer.register_forward_hook(lambda *_: None),
    "disabled": lambda module: setattr(module.weight_quantizer, "enabled", False),
    "double": lambda module: module.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_left_to_the_general_forward(taken: list[bool], change: str) -> None:
    module = nn.Linear(12, 8)
    if change == "weight_norm":
        CHANGES[change](module)
    prepare(module, Recipe((Rule("*", LayerSpec(WEIGHTS["dynamic"])),)))
    if change != "weight_norm":
        CHANGES[change](module)
    x = torch.randn(2, 12)
    if change == "double":
        with pytest.raises(RuntimeError, match="dtype"):
            module(x)
    else:
        module(x)
    assert taken == [False]


@pytest.mark.parametrize(
    "spec", [LayerSpec(WEIGHTS["dynamic"], TOKENS), LayerSpec(WEIGHTS["dynamic"], None, (Normalize(),))], ids=repr
)
def test_more_than_a_weight(taken: list[bool], spec: LayerSpec) -> None:
    layer(spec)(torch.randn(2, 12))
    assert taken == [False]


@pytest.mark.parametrize("weight", ["dynamic", "clipped", "clipped groups"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(96,), (3, 96), (2, 3, 96), (3, 2, 96), (8, 16, 96)])
def test_shapes_in_a_window(taken: list[bool], shape: tuple[int, ...], bias: bool, weight: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(96, 64, bias=bias)
    prepare(module, Recipe((Rule("*", LayerSpec(WEIGHTS[weight])),)))
    x = torch.randn(shape)
    x = (x.transpose(0, 1) if shape == (3, 2, 96) else x).requires_grad_()
    found: list[list[Tensor]] = []
    for window in (False, True):
        with accumulation_window(module) if window else nullcontext():
            for _ in range(2):
                y = module(x)
                found.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
    assert taken == [True, True, *[shape != (3, 2, 96)] * 2]  # that input is not contiguous
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_checkpointing_in_a_window(weight: str, reentrant: bool) -> None:
    module, x = layer(LayerSpec(WEIGHTS[weight])), torch.randn(3, 12, requires_grad=True)
    module(x).square().sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    with accumulation_window(module):
        checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(one, two.grad) for one, two in zip(gradients, module.parameters(), strict=True))


def test_a_weight_that_changes_in_a_window() -> None:
    module, x = layer(LayerSpec(WEIGHTS["clipped"])), torch.randn(3, 12)
    with accumulation_window(module):
        y = module(x).sum()
        with torch.no_grad():
            module._parameters["weight"].add_(1.0)
        with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
            y.backward()


def test_a_frozen_weight_in_a_window() -> None:
    module, x = layer(LayerSpec(WEIGHTS["clipped"])), torch.randn(3, 12, requires_grad=True)
    expected = torch.autograd.grad(module(x).square().sum(), x)[0]
    module._parameters["weight"].requires_grad_(False)
    with accumulation_window(module):
        for _ in range(2):
            assert torch.equal(torch.autograd.grad(module(x).square().sum(), x)[0], expected)


def test_contexts(taken: list[bool]) -> None:
    module, x = layer(LayerSpec(WEIGHTS["dynamic"])), torch.randn(2, 12)
    with torch.no_grad():
        module(x)
    with torch.autocast("cpu", torch.bfloat16):
        module(x)
    with float_weights(module):
        module(x)
    torch.func.grad(lambda x: module(x).sum())(x)
    assert taken == [False] * 4
    module(x)
    assert taken[4:] == [True]
