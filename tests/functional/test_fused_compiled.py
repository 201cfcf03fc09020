"""The fused linear function in a step that is compiled as a whole: what is kept for backward, and the same gradients.

The backend splits the step as the default one does, but runs the parts without a C++ compiler.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import AbsMax, Int, LayerSpec, PerChannel, QuantizerSpec, Recipe, Rule, StraightThrough, prepare
from lightning_qat import recipes as named

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
