"""The fused forward of prepared linear layers: the numbers of the view, the same hooks, less memory."""

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_qat import (
    AbsMax,
    Clipped,
    HalfInt,
    Int,
    LayerSpec,
    Learned,
    LearnedSoft,
    Normalize,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantizerSpec,
    Recipe,
    Rule,
    StraightThrough,
    accumulation_window,
    bake,
    calibrate,
    float_weights,
    prepare,
    recipes,
    unprepare,
)
from lightning_qat.conversion import fused
from lightning_qat.functional import integer

WEIGHTS = {
    "learned": QuantizerSpec(Int(4)),
    "absmax": QuantizerSpec(Int(8), PerChannel(), AbsMax(), StraightThrough()),
    "grouped": QuantizerSpec(HalfInt(3), PerGroup(4), Learned(), LearnedSoft(0.5)),
}
INPUTS = {
    "float": None,
    "tokens": QuantizerSpec(Int(8, narrow=True), PerToken(), AbsMax(), StraightThrough()),
    "zero point": QuantizerSpec(Int(8, symmetric=False), PerToken(), AbsMax(), StraightThrough()),
    "clipped": QuantizerSpec(Int(4), PerToken(), AbsMax(), Clipped()),
    "learned": QuantizerSpec(Int(4), PerTensor(), Learned()),
    "grouped": QuantizerSpec(HalfInt(4), PerGroup(4), AbsMax(), StraightThrough()),
}


def layer(
    weight: str = "learned", inputs: str = "tokens", arithmetic: str = "simulated", **arguments: Any
) -> nn.Linear:
    module = nn.Linear(12, 9, **arguments)
    prepare(module, Recipe((Rule("*", LayerSpec(WEIGHTS[weight], INPUTS[inputs])),)), arithmetic=arithmetic)
    calibrate(module, [torch.randn(5, 12)])
    return module


@contextmanager
def unfused() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fused, "_fused", lambda module, x, dtype, own_input, integer: fused._unfused(module, x, own_input)
        )
        yield


def step(module: nn.Module, x: Tensor, *, amp: bool = False) -> list[Tensor | None]:
    """Output and gradients."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype))
    return [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_same_numbers_as_the_view(weight: str, inputs: str, amp: bool) -> None:
    for shape, bias in (((5,), True), ((), False), ((2, 3), True), ((0,), True)):
        module = layer(weight, inputs, bias=bias)
        x = torch.randn(*shape, 12)
        found = step(module, x, amp=amp)
        with unfused():
            expected = step(module, x, amp=amp)
        assert torch.equal(found[0], expected[0])
        for one, other in zip(found[1:], expected[1:], strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=1e-2 if amp else 1e-5, atol=1e-2 if amp else 1e-6)


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_same_numbers_as_the_view_while_soft(
    monkeypatch: pytest.MonkeyPatch, weight: str, inputs: str, amp: bool, window: bool
) -> None:
    module, x = layer(weight, inputs, "auto"), torch.randn(5, 12)
    hard = step(module, x, amp=amp)
    module.weight_quantizer.softness = torch.tensor(0.4)
    with accumulation_window(module) if window else nullcontext():
        found = [step(module, x, amp=amp) for _ in range(2)]
    monkeypatch.setattr(fused, "weight_only", lambda module, x: None)
    with unfused():
        expected = step(module, x, amp=amp)
    assert not torch.equal(expected[0], hard[0])
    for each in found:
        assert torch.equal(each[0], expected[0])
        for one, other in zip(each[1:], expected[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2 if amp else 1e-5, atol=1e-2 if amp else 1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # a trace is of one way through Python
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_torch_jit_trace_sees_plain_operations(weight: str, inputs: str) -> None:
    """As Lightning's ``log_graph`` traces a model: with gradients on."""
    module = layer(weight, inputs)
    traced: Any = torch.jit.trace(module, torch.randn(5, 12))
    x = torch.randn(3, 12)
    assert torch.equal(traced(x), module(x))


@pytest.mark.parametrize("weight", ["learned", "absmax"])
def test_integer_products_agree_with_simulated_ones(weight: str) -> None:
    torch.manual_seed(1)
    module = layer(weight, arithmetic="integer")
    x = torch.randn(7, 12)
    assert fused.runs_on_integers(module, "cpu", torch.float32)
    found = step(module, x)
    with unfused():
        expected = step(module, x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)
    with torch.no_grad():
        assert torch.equal(module(x), found[0])
        assert torch.equal(module(x[:3]), found[0][:3])


@pytest.mark.parametrize(
    ("weight", "inputs", "reason"),
    [
        ("learned", "float", "only one"),
        ("grouped", "tokens", "weight per group"),
        ("learned", "grouped", "input per group"),
        ("learned", "zero point", "a zero point"),
    ],
)
def test_layers_that_cannot_run_on_integers(weight: str, inputs: str, reason: str) -> None:
    module = layer(weight, inputs, arithmetic="integer")
    assert reason in str(fused.float_reason(module))
    assert not fused.runs_on_integers(module, "cpu", torch.float32)


def test_report_says_how_products_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "_MEASURED", {("cpu", torch.float32): True, ("cpu", torch.bfloat16): True})
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 8))
    rows = {row.name: row.detail for row in prepare(model, recipes.w8a8())}
    assert rows["0.weight"].endswith("integer products")
    assert rows["1.weight"].endswith("float products")  # too small to pay
    unprepare(model)
    details = [row.detail for row in prepare(model, recipes.w8a8(group_size=4), arithmetic="integer")]
    assert details[0].endswith("float products: scales of the weight per group")
    unprepare(model)
    assert "products" not in "".join(row.detail for row in prepare(model, recipes.int4()))
    assert not [name for module in model.modules() for name in vars(module) if name == fused.ARITHMETIC][2:]


def test_auto_takes_integers_only_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "_MEASURED", {("cpu", torch.float32): True, ("cpu", torch.bfloat16): False})
    model = nn.Linear(128, 128)
    prepare(model, recipes.w8a8())
    assert fused.runs_on_integers(model, "cpu", torch.float32)
    assert not fused.runs_on_integers(model, "cpu", torch.bfloat16)
    assert not fused.runs_on_integers(model, "cpu", torch.float64)


def test_kept_for_backward() -> None:
    """A weight that is only referred to, and a quarter of the input."""
    module = layer("absmax", "tokens")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(torch.randn(64, 12).requires_grad_())
    own = {parameter.data_ptr() for parameter in module.parameters()}
    sizes = {
        tensor.dtype: tensor.nbytes for tensor in kept if tensor.data_ptr() not in own and tensor.numel() >= 64 * 12
    }
    assert sizes == {torch.int8: 64 * 12}


def test_hooks_of_module_and_quantizers_fire() -> None:
    for arithmetic in ("simulated", "integer"):
        module = layer(arithmetic=arithmetic)
        x = torch.randn(4, 12)
        plain = module(x)
        seen: list[str] = []
        module.register_forward_hook(lambda *_, s=seen: s.append("module"))
        module.weight_quantizer.register_forward_hook(lambda *_, s=seen: s.append("weight"))
        module.input_quantizer.register_forward_hook(lambda *_, s=seen: s.append("input"))
        assert torch.equal(module(x), plain)
        assert sorted(seen) == ["input", "module", "weight"]


def test_an_input_is_quantized_once() -> None:
    """Also where a hook of the user's comes after ours, or somebody replaces the forward."""
    x, module = torch.randn(4, 12), layer()
    expected = module(x)
    assert torch.equal(module.forward(x), expected)
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert torch.equal(module(x), expected)
    assert torch.equal(seen[0], module.input_quantizer(x))
    handle.remove()
    original = module.forward
    module.forward = lambda given: (seen.append(given), original(given))[1]
    assert torch.equal(module(x), expected)
    assert torch.equal(seen[1], seen[0])


def test_float_weights_and_observers() -> None:
    module, x = layer("learned", "learned"), torch.randn(4, 12)
    with float_weights(module):
        torch.testing.assert_close(module(x), x @ module._parameters["weight"].t() + module.bias, rtol=1e-6, atol=1e-6)
    before = module.input_quantizer.scale.item()
    calibrate(module, [100 * x])
    assert module.input_quantizer.scale.item() > 10 * before


def test_pruned_weights() -> None:
    module, x = layer(), torch.randn(4, 12)
    prune.l1_unstructured(module, "weight", 0.5)
    found = step(module, x)
    with unfused():
        expected = step(module, x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_transforms() -> None:
    spec = LayerSpec(WEIGHTS["absmax"], INPUTS["tokens"], (Normalize(),))
    module, x = nn.Linear(12, 9), torch.randn(4, 12)
    prepare(module, Recipe((Rule("*", spec),)))
    found = step(module, x)
    with unfused():
        expected = step(module, x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_copies_and_pickles() -> None:
    module, x = layer(arithmetic="integer"), torch.randn(4, 12)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), module(x))
        assert fused.runs_on_integers(other, "cpu", torch.float32)


def test_a_subclass_with_a_forward_of_its_own_keeps_it() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    module, x = Doubled(12, 9), torch.randn(4, 12)
    prepare(module, Recipe((Rule("*", LayerSpec(WEIGHTS["absmax"], INPUTS["tokens"])),)), arithmetic="integer")
    expected = 2 * nn.functional.linear(module.input_quantizer(x), module.weight, module.bias)
    assert torch.equal(module(x), expected)
    assert "forward of its own" in str(fused.float_reason(module))


def test_encoder_layer_leaves_its_fast_path() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    prepare(model, recipes.w8a8())
    x = torch.randn(2, 3, 16)
    with_grad = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), with_grad.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("recipe", [recipes.int4(), recipes.w8a8(), recipes.bitnet()])
def test_baked_model_computes_the_same(recipe: Recipe) -> None:
    for arithmetic in ("simulated", "integer"):
        model = nn.Sequential(nn.Linear(20, 12), nn.SiLU(), nn.Linear(12, 5)).eval()
        prepare(model, recipe, arithmetic=arithmetic)
        x = torch.randn(6, 20)
        baked = bake(model)
        with torch.no_grad():
            assert torch.equal(baked(x), model(x))
            assert torch.equal(copy.deepcopy(baked)(x[:1]), model(x[:1]))
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(baked(x), model(x))
        buffer = io.BytesIO()
        torch.save(baked, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), baked(x))
        assert (
            baked.state_dict().keys()
            >= nn.Sequential(nn.Linear(20, 12), nn.SiLU(), nn.Linear(12, 5)).state_dict().keys()
        )


def test_half_integer_weights_baked_to_integers() -> None:
    module, x = layer("learned", arithmetic="integer"), torch.randn(3, 12)
    unprepare(module)
    spec = LayerSpec(QuantizerSpec(HalfInt(3), PerTensor(), AbsMax()), INPUTS["tokens"])
    prepare(module, Recipe((Rule("*", spec),)), arithmetic="integer")
    baked = bake(module)
    assert torch.equal(baked(x), module(x))
    torch.testing.assert_close(baked(x), nn.functional.linear(baked.baked_input(x), baked.weight, baked.bias))


def test_export_sees_the_float_product() -> None:
    module, x = layer("absmax", arithmetic="integer"), torch.randn(3, 12)
    baked = bake(module).eval()
    program = torch.export.export(baked, (x,))
    assert not [node for node in program.graph.nodes if "int_mm" in str(node.target)]
    torch.testing.assert_close(program.module()(x), baked(x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does
@pytest.mark.parametrize(
    ("recipe", "arithmetic"),
    [(recipes.int4(), "simulated"), (recipes.w8a8(), "simulated"), (recipes.w8a8(), "integer")],
)
def test_compiled_as_one_graph_whatever_the_bits(recipe: Recipe, arithmetic: str) -> None:
    model, x = nn.Sequential(nn.Linear(12, 9), nn.SiLU(), nn.Linear(9, 4)), torch.randn(6, 12)
    prepare(model, recipe, arithmetic=arithmetic)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for bits in (8, 4):
        for child in (model[0], model[2]):
            child.weight_quantizer.set_grid(Int(bits))
        for found, expected in zip(step(compiled, x), step(model, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
