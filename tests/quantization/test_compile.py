"""torch.compile: one graph without breaks, one compilation for all widths of a family, the numbers of eager mode."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch._inductor.utils import run_and_get_code

from lightning_qat.quantization import (
    AbsMax,
    AbsMean,
    Binary,
    Clipped,
    ElementwiseScaling,
    FakeQuantizer,
    Grid,
    HalfInt,
    Int,
    Learned,
    LearnedSoft,
    MinimumError,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Pi,
    QuantizerSpec,
    Soft,
    StraightThrough,
    Ternary,
)

# torch.compile itself makes an instance of the class while it traces an autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
WEIGHTS = (
    QuantizerSpec(Int(8), PerChannel(), AbsMax(), StraightThrough()),
    QuantizerSpec(Int(8), PerGroup(4), Learned(), Clipped()),
)
SPECS = (
    *WEIGHTS,
    QuantizerSpec(Int(4, symmetric=False), PerGroup(4), MinimumError(), ElementwiseScaling(0.2)),
    QuantizerSpec(HalfInt(2), PerChannel(), Learned(AbsMax()), LearnedSoft(0.3)),
    QuantizerSpec(Pi(3, 4), PerTensor(), AbsMax(), Soft(0.3)),
    QuantizerSpec(Ternary(0.3), PerTensor(), Learned(), Clipped(0.5), "bfloat16"),
)
INPUTS = (
    QuantizerSpec(Int(8, narrow=True), PerToken(), AbsMax(), StraightThrough()),
    QuantizerSpec(Int(8, symmetric=False), PerToken(), AbsMax(), Clipped()),
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counter:
    """A backend that counts how often something is compiled."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.num_graphs += 1
        compiled: Callable[..., Any] = lookup_backend("aot_eager")(graph, inputs)
        return compiled


def ready(spec: QuantizerSpec, x: Tensor) -> FakeQuantizer:
    is_input = isinstance(spec.granularity, PerToken)
    quantizer = FakeQuantizer(spec, () if is_input else tuple(x.shape))
    quantizer.find_scale(x)
    return quantizer


def step(module: Callable[[Tensor], Tensor], quantizer: nn.Module, x: Tensor) -> list[Tensor]:
    """Forward and backward: the output and all gradients."""
    latent = x.clone().requires_grad_()
    quantizer.zero_grad()
    out = module(latent)
    (out * torch.linspace(-1, 1, x.numel()).reshape(x.shape)).sum().backward()
    gradients = [latent.grad, *(parameter.grad for parameter in quantizer.parameters())]
    return [out.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("spec", [*SPECS, *INPUTS], ids=lambda spec: spec.label)
def test_compiled_numbers_are_those_of_eager_mode(spec: QuantizerSpec) -> None:
    x = torch.randn(4, 8)
    quantizer = ready(spec, x)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    found, expected = step(compiled, quantizer, x), step(quantizer, quantizer, x)
    assert torch.equal(found[0], expected[0])
    assert len(found) == len(expected) == 2 + len(list(quantizer.parameters()))
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("spec", [*WEIGHTS, INPUTS[0]], ids=lambda spec: spec.label)
def test_one_compilation_for_all_widths(spec: QuantizerSpec) -> None:
    """Bits live in tensors, so a schedule from 8 to 2 bits never compiles again (trap 44)."""
    x, counter = torch.randn(4, 8), Counter()
    quantizer = ready(spec, x)
    compiled = torch.compile(quantizer, fullgraph=True, backend=counter)
    for bits in range(8, 1, -1):
        quantizer.set_grid(dataclasses.replace(spec.grid, bits=bits))  # type: ignore[type-var]
        quantizer.find_scale(x)
        found, expected = step(compiled, quantizer, x), step(quantizer, quantizer, x)
        assert torch.equal(found[0], expected[0])
        assert torch.allclose(found[1], expected[1])
        assert found[0].unique().numel() > 1
    assert counter.num_graphs == 1


@pytest.mark.parametrize("spec", [*WEIGHTS, QuantizerSpec(Ternary(), scale=AbsMean(), gradient=Clipped())], ids=repr)
def test_rounding_that_sets_in_compiles_once_and_once_more_when_it_is_complete(spec: QuantizerSpec) -> None:
    x, counter = torch.randn(4, 8), Counter()
    quantizer = ready(spec, x)
    compiled = torch.compile(quantizer, fullgraph=True, backend=counter)
    quantizer.softness = torch.tensor(1.0)
    for softness in (1.0, 0.4, 0.1, None):
        quantizer.softness = None if softness is None else quantizer.softness.fill_(softness)
        found, expected = step(compiled, quantizer, x), step(quantizer, quantizer, x)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert counter.num_graphs == (2 if softness is None else 1)


@pytest.mark.parametrize("spec", INPUTS, ids=lambda spec: spec.label)
def test_one_compilation_for_all_sizes(spec: QuantizerSpec) -> None:
    """Also beyond those from which on eager mode, or a compiler that knows the size, goes another way."""
    quantizer = ready(spec, torch.randn(4, 8))
    compiled = torch.compile(quantizer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_tokens in (3, 100, 1000, 3000):
            x = torch.randn(num_tokens, 512)
            assert torch.equal(compiled(x), quantizer(x))


def test_another_family_compiles_once_more() -> None:
    x, counter = torch.randn(4, 8), Counter()
    quantizer = ready(QuantizerSpec(Int(8), scale=AbsMean()), x)
    compiled = torch.compile(quantizer, fullgraph=True, backend=counter)
    stages: tuple[Grid, ...] = (Int(8), Int(4), Ternary(), Ternary(), Binary())
    for grid in stages:
        quantizer.set_grid(grid)
        assert torch.equal(compiled(x), quantizer(x))
    assert counter.num_graphs == 3


def test_inductor() -> None:
    """Bit for bit where scales are stored or AbsMax; gradients within rounding."""
    x = torch.randn(6, 16)
    quantizers = nn.Sequential(*(ready(spec, x) for spec in (WEIGHTS[0], SPECS[3])))
    compiled = torch.compile(quantizers, fullgraph=True)
    found, expected = step(compiled, quantizers, x), step(quantizers, quantizers, x)
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


NOT_FINITE = (
    QuantizerSpec(Int(4), PerChannel(), AbsMax()),
    QuantizerSpec(Int(4), PerChannel(), Learned(AbsMax())),
    QuantizerSpec(Int(3, symmetric=False), PerGroup(8), AbsMax(), Clipped()),
    QuantizerSpec(Ternary(), PerChannel(), AbsMax(), Clipped()),
    QuantizerSpec(HalfInt(2), PerTensor(), AbsMax(), ElementwiseScaling(0.2)),
    QuantizerSpec(Binary(), PerChannel(), Learned(AbsMax())),
)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("spec", NOT_FINITE, ids=lambda spec: spec.label)
@pytest.mark.parametrize("large", [False, True])
def test_values_that_are_not_finite(
    backend: str, spec: QuantizerSpec, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for CPUs, magnitudes are found on bits, values clipped by comparisons, large ones in joined loops."""
    monkeypatch.setattr(sys.modules["lightning_qat.functional.fake_quantize"], "_LARGE", 1 if large else 1 << 20)
    x = torch.randn(7, 16)
    x[0, 1], x[1, 2], x[2, 3], x[3], x[4] = torch.nan, torch.inf, -torch.inf, 0.0, -0.0
    x[5, :2] = torch.tensor([torch.inf, -torch.nan])
    quantizer = ready(spec, x)
    compiled = torch.compile(quantizer, fullgraph=True, backend=backend)
    for one, other in zip(step(compiled, quantizer, x), step(quantizer, quantizer, x), strict=True):
        summed = 0 if spec.scale.recomputed else 1e-6  # a learned scale has a gradient, which is a sum
        torch.testing.assert_close(one, other, rtol=summed, atol=summed / 10, equal_nan=True)


@pytest.mark.parametrize("scale", [AbsMax(), AbsMean()])
def test_large_values_are_quantized_row_by_row(scale: AbsMax | AbsMean) -> None:
    """Compiled for CPUs: one loop over rows finds the scale and quantizes, so that memory is read once."""
    quantizer = ready(QuantizerSpec(Int(4), PerChannel(), scale, StraightThrough()), x := torch.randn(1024, 1024))
    found, (code,) = run_and_get_code(torch.compile(quantizer, fullgraph=True), x)
    assert torch.equal(found, quantizer(x)) or isinstance(scale, AbsMean)  # a sum rounds, so that a level may differ
    assert code.count("for(int64_t x0=") == 1
