"""The fused linear function in a step that is compiled as a whole: what is kept for backward, and the same gradients.

The backend splits the step as the default one does, but runs the parts without a C++ compiler.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from lightning_qat import (
    AbsMax,
    Clipped,
    FakeQuantizer,
    Int,
    LayerSpec,
    Learned,
    PerChannel,
    PerToken,
    QuantizerSpec,
    Recipe,
    Rule,
    StraightThrough,
    prepare,
)
from lightning_qat import recipes as named
from lightning_qat.quantization.granularity import Layout

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does
DYNAMIC = Recipe((Rule("*", LayerSpec(QuantizerSpec(Int(4), PerChannel(), AbsMax(), StraightThrough()))),))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def prepared(recipe: Recipe) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40))
    prepare(model, recipe)
    return model


@pytest.mark.parametrize("recipe", [DYNAMIC, named.w8a8()])
def test_keeps_no_quantized_weight(recipe: Recipe) -> None:
    model, x = prepared(recipe)[0], torch.randn(5, 24, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    compiled(x).sum().backward()
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compiled(x)
    sizes = {tensor.numel() for tensor in kept if tensor.data_ptr() not in parameters}
    assert 24 * 40 not in sizes
    assert 5 * 24 in sizes  # the input, or its codes


@pytest.mark.parametrize(
    ("extreme", "dtype", "bound"),
    [(0.5, torch.float64, 1e-12), (torch.inf, torch.float32, 1e-6), (torch.nan, torch.bfloat16, 1e-2)],
)
def test_gradients_are_those_of_eager_mode(extreme: float, dtype: torch.dtype, bound: float) -> None:
    """The first number of the gradient is read, and must not matter."""
    model, x = prepared(DYNAMIC)[0].to(dtype), torch.randn(5, 24, dtype=dtype)
    grad = torch.randn(5, 40, dtype=dtype)
    grad[0, 0] = extreme
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    found = []
    for run in (compiled, model):
        inputs = x.clone().requires_grad_()
        run(inputs).backward(grad)
        found.append([inputs.grad, *(parameter.grad for parameter in model.parameters())])
        model.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=bound, atol=bound)


def test_no_tokens() -> None:
    model, x = prepared(DYNAMIC)[0], torch.zeros(0, 24, requires_grad=True)
    torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")(x).sum().backward()
    assert x.grad is not None
    assert not any(parameter.grad.any() for parameter in model.parameters())


TOKENS = LayerSpec(
    QuantizerSpec(Int(4), PerChannel(), AbsMax(), Clipped()),
    QuantizerSpec(Int(8, symmetric=False), PerToken(), AbsMax()),
)


CASES = {name: named.named(name) for name in named.names()} | {"asymmetric": Recipe((Rule("*", TOKENS),))}


@pytest.mark.parametrize(
    ("name", "arithmetic"),
    [*((name, "simulated") for name in CASES), ("w8a8", "integer"), ("bitnet", "integer"), ("asymmetric", "integer")],
)
def test_as_many_tokens_as_the_data_say(name: str, arithmetic: Literal["simulated", "integer"]) -> None:
    """One graph for all counts, which the compiler cannot know where a router chooses the tokens, as experts do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8))
    prepare(model, CASES[name], arithmetic=arithmetic)

    def chosen(x: Tensor) -> Tensor:
        found: Tensor = model(x[x[:, 0] > 0])
        return found.square().mean()

    compiled = torch.compile(chosen, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True, capture_dynamic_output_shape_ops=True):
        for num_tokens in (6, 30, 2000):
            x = torch.randn(num_tokens, 24)
            found = torch.autograd.grad(compiled(x), list(model.parameters()))
            expected = torch.autograd.grad(chosen(x), list(model.parameters()))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("channel_axis", [0, 1])
@pytest.mark.parametrize("scale", [AbsMax(), Learned(init=AbsMax())], ids=repr)
def test_scales_that_are_written_out_are_the_same(scale: AbsMax | Learned, channel_axis: int) -> None:
    x = torch.randn(6, 8, requires_grad=True)
    layout = Layout(channel_axis=channel_axis)
    quantizer = FakeQuantizer(QuantizerSpec(Int(3), PerChannel(), scale), (6, 8), layout)
    quantizer.find_scale(x.detach())
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)  # type: ignore[no-any-return]

    compiled = torch.compile(quantizer, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    wanted = [x, *quantizer.parameters()]
    found = torch.autograd.grad(compiled(x).square().sum(), wanted)
    expected = torch.autograd.grad(quantizer(x).square().sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    assert "as_strided" in graphs[0].code
