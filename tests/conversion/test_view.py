"""The weight view: what torch and users do with a prepared module, and what they find."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from lightning_qat import (
    Hadamard,
    HalfInt,
    Int,
    LayerSpec,
    LearnedSoft,
    PerChannel,
    PerTensor,
    QuantizerSpec,
    Recipe,
    Rule,
    bake,
    calibrate,
    codes,
    prepare,
    recipes,
    unprepare,
)
from lightning_qat.conversion.view import is_view, latent, view_class
from tests.conversion.cases import (
    LEARNED_INPUT,
    TOKENS,
    WEIGHT,
    WEIGHT_ONLY,
    OwnForward,
    absmax_int4,
    network,
    recipe_for,
)

# torch.compile of any autograd function makes torch raise its own deprecation.
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
LEARNED = recipe_for(LayerSpec(QuantizerSpec(Int(4)), TOKENS))


class TestIdentity:
    def test_keys_parameters_and_class_stay(self) -> None:
        model = network()
        keys, parameters = list(model.state_dict()), list(model.parameters())
        prepare(model, LEARNED)
        assert [key for key in model.state_dict() if "quantizer" not in key] == keys
        assert isinstance(model[0], nn.Linear)
        assert type(model[0]).__name__ == "Linear"
        assert all(any(p is q for q in model.parameters()) for p in parameters)
        added = {key: value for key, value in model.state_dict().items() if key not in keys}
        assert all(isinstance(value, Tensor) and value.isfinite().all() for value in added.values())

    def test_hooks_flags_and_attributes_stay(self) -> None:
        model = network().eval()
        calls: list[int] = []
        model[0].register_forward_hook(lambda *_: calls.append(1))
        model[0].note = "kept"
        model[2].weight.requires_grad = False
        prepare(model, LEARNED)
        model(torch.randn(2, 6))
        assert calls == [1]
        assert model[0].note == "kept"
        assert not model[0].training
        assert not any(module.training for module in model.modules())
        assert not latent(model[2], "weight").requires_grad

    def test_one_class_per_kind(self) -> None:
        model = network()
        prepare(model, WEIGHT_ONLY)
        assert type(model[0]) is type(model[2])
        assert type(model[0]) is not nn.Linear

    def test_get_parameter_gives_the_parameter(self) -> None:
        model = network()
        weight = model[0].weight
        prepare(model, WEIGHT_ONLY)
        assert model.get_parameter("0.weight") is weight

    def test_no_parameter_is_a_number(self) -> None:
        """FSDP refuses parameters without dimensions."""
        model = network()
        prepare(model, recipe_for(LayerSpec(QuantizerSpec(Int(4), PerTensor(), gradient=LearnedSoft()), LEARNED_INPUT)))
        assert sum(1 for _ in model.parameters()) == 10
        assert all(parameter.dim() > 0 for parameter in model.parameters())

    def test_print(self) -> None:
        model = network()
        prepare(model, LEARNED)
        assert "Linear(\n    in_features=6" in str(model)
        assert "int4:channel:learned(mse):clipped" in str(model)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    result: nn.Module = pickle.loads(pickle.dumps(model))
    return result


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    result: nn.Module = torch.load(buffer, weights_only=False)
    return result


_REGISTRY: dict[str, type[nn.Module]] = {}


class _Registered(nn.Linear):
    def __init_subclass__(cls, *, key: str) -> None:
        _REGISTRY[key] = cls


class _Layer(_Registered, key="layer"):
    pass


@pytest.mark.parametrize("recipe", ["int4", "w8a8"])
def test_a_registry_of_subclasses_stays(recipe: str) -> None:
    """What ``__init_subclass__`` of the user does is for classes that the user writes."""
    model = nn.Sequential(_Layer(8, 4))
    prepare(model, recipes.named(recipe), arithmetic="integer")
    baked, x = bake(model), torch.randn(3, 8)
    assert {"layer": _Layer} == _REGISTRY
    assert isinstance(model[0], _Layer)
    assert torch.equal(pickle.loads(pickle.dumps(baked))(x), model.eval()(x))
    assert type(unprepare(model)[0]) is _Layer


@pytest.mark.parametrize("duplicate", [copied, pickled, saved])
class TestCopies:
    def test_equal_and_independent(self, duplicate: Callable[[nn.Module], nn.Module]) -> None:
        model = nn.Sequential(nn.Linear(6, 6), OwnForward(6, 4))
        prepare(model, recipe_for(LayerSpec(QuantizerSpec(Int(4)), TOKENS)))
        x = torch.randn(2, 6)
        before = model(x)
        other = duplicate(model)
        assert torch.equal(other(x), before)
        assert type(other[0]) is type(model[0])
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(3.0)
        assert torch.equal(model(x), before)
        assert not torch.equal(other(x), before)

    def test_input_quantizer_is_the_copys_own(self, duplicate: Callable[[nn.Module], nn.Module]) -> None:
        model = network()
        prepare(model, LEARNED)
        other = duplicate(model)
        x = torch.randn(2, 6)
        expected = model(x)
        for module in other.modules():
            if hasattr(module, "input_quantizer"):
                module.input_quantizer.enabled = False
        assert torch.equal(model(x), expected)
        assert not torch.equal(other(x), expected)

    def test_copy_of_a_copy_can_go_back(self, duplicate: Callable[[nn.Module], nn.Module]) -> None:
        model = network()
        plain = copy.deepcopy(model)
        prepare(model, LEARNED)
        back = unprepare(duplicate(duplicate(model)))
        x = torch.randn(2, 6)
        assert torch.equal(back(x), plain(x))
        assert type(back[0]) is nn.Linear


class TestTransformationsOfTorch:
    def test_functional_call(self) -> None:
        model = network()
        prepare(model, WEIGHT_ONLY)
        x = torch.randn(2, 6)
        weights = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        expected = torch.relu(x @ absmax_int4(weights["0.weight"]).T + weights["0.bias"])
        expected = expected @ absmax_int4(weights["2.weight"]).T + weights["2.bias"]
        torch.testing.assert_close(torch.func.functional_call(model, weights, x), expected)

    def test_gradients_by_functional_call(self) -> None:
        model = network()
        prepare(model, LEARNED)
        x = torch.randn(2, 6)

        def loss(weights: dict[str, Tensor]) -> Tensor:
            result: Tensor = torch.func.functional_call(model, weights, x).square().sum()
            return result

        weights = dict(model.named_parameters())
        grads = torch.autograd.grad(loss(weights), list(weights.values()))
        model(x).square().sum().backward()
        for got, parameter in zip(grads, weights.values(), strict=True):
            torch.testing.assert_close(got, parameter.grad)

    @compiles
    @pytest.mark.parametrize("recipe", ["int4", "w8a8"])
    def test_whole_model_compiles_without_a_break(self, recipe: str) -> None:
        model = network()
        prepare(model, recipes.named(recipe))
        x = torch.randn(2, 6)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
        compiled(x).sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters())

    @compiles
    def test_compiled_before_prepare(self) -> None:
        """A model that was compiled, and ran, in float."""
        plain = network()
        compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 6)
        before = compiled(x)
        report = prepare(compiled, WEIGHT_ONLY)
        assert [row.name for row in report][:2] == ["0.weight", "2.weight"]
        assert torch.equal(compiled(x), plain(x))
        assert not torch.equal(compiled(x), before)
        unprepare(compiled)
        assert torch.equal(compiled(x), before)

    @compiles
    def test_compiled_child(self) -> None:
        model = nn.Sequential(torch.compile(nn.Linear(6, 8), backend="aot_eager"), nn.Linear(8, 4))
        report = prepare(model, WEIGHT_ONLY)
        assert [row.name for row in report] == ["0.weight", "1.weight", "0.bias", "1.bias"]
        child = model[0]._orig_mod
        x = torch.randn(2, 6)
        torch.testing.assert_close(model[0](x), x @ absmax_int4(latent(child, "weight")).T + child.bias)

    def test_scripted_child_is_refused_by_name(self) -> None:
        with pytest.warns(DeprecationWarning, match="torch.jit.script"):
            scripted = torch.jit.script(nn.Linear(6, 8))
        model = nn.Sequential(scripted, nn.Linear(8, 4))
        with pytest.raises(ValueError, match=r"0: a scripted module .* script it after training, .*Rule\('0', None\)"):
            prepare(model, WEIGHT_ONLY)
        assert not is_view(model[1])
        prepare(model, Recipe((Rule("0", None), *WEIGHT_ONLY.rules)))
        assert is_view(model[1])

    def test_exports(self) -> None:
        model = network().eval()
        prepare(model, WEIGHT_ONLY)
        x = torch.randn(2, 6)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))

    @compiles
    def test_bit_widths_do_not_recompile(self) -> None:
        torch._dynamo.reset()  # the limit of recompilations counts those of other tests
        model = network()
        prepare(model, recipes.w8a8())
        counter = CompileCounter()
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        x = torch.randn(2, 6)
        for bits in (8, 6, 5, 4, 3, 2):
            for layer in (model[0], model[2]):
                layer.weight_quantizer.set_grid(Int(bits))
            torch.testing.assert_close(compiled(x), model(x))
        assert counter.frame_count == 1


class TestChangesOfTheWeight:
    @pytest.mark.parametrize("recipe", [WEIGHT_ONLY, LEARNED], ids=["absmax", "learned"])
    def test_assignment(self, recipe: Recipe) -> None:
        layer = nn.Linear(6, 5, bias=False)
        prepare(layer, recipe)
        weight = nn.Parameter(100 * torch.randn(5, 6))
        layer.weight = weight
        assert layer.get_parameter("weight") is weight
        assert (layer.weight - weight).abs().max() < 20  # the scale was found anew
        assert torch.unique(layer.weight / layer.weight.abs().amax(1, keepdim=True)).numel() > 8

    def test_assignment_of_a_tensor_is_refused_as_ever(self) -> None:
        layer = nn.Linear(6, 5)
        prepare(layer, WEIGHT_ONLY)
        with pytest.raises(TypeError, match="cannot assign"):
            layer.weight = torch.randn(5, 6)

    @pytest.mark.parametrize("build", [lambda: nn.Linear(6, 5), lambda: nn.MultiheadAttention(8, 2)])
    def test_reset_parameters(self, build: Callable[[], nn.Module]) -> None:
        layer = build()
        prepare(layer, LEARNED)
        name, parameter = next((n, p) for n, p in layer.named_parameters() if p.dim() == 2)
        with torch.no_grad():
            parameter.fill_(50.0)
        getattr(layer, "reset_parameters", getattr(layer, "_reset_parameters", None))()
        assert parameter.abs().max() < 1
        assert (getattr(layer, name) - parameter).abs().max() < 0.2

    def test_initializer_that_calls_another(self) -> None:
        class Layer(nn.Linear):
            def reset_parameters(self) -> None:
                self._reset_parameters()
                nn.init.ones_(self.weight)

            def _reset_parameters(self) -> None:
                nn.init.zeros_(self.weight)

        layer = Layer(4, 4)
        prepare(layer, WEIGHT_ONLY)
        with torch.no_grad():
            layer.get_parameter("weight").fill_(3.0)
        layer.reset_parameters()
        assert torch.equal(layer.get_parameter("weight"), torch.ones(4, 4))

    def test_error_of_the_quantizer_is_not_taken_for_a_missing_attribute(self) -> None:
        """nn.Module.__getattr__ would answer with the float weight."""
        layer = nn.Linear(6, 5)
        prepare(nn.Sequential(layer), WEIGHT_ONLY)
        layer.weight_quantizer.forward = lambda x: x.no_such_attribute
        with pytest.raises(RuntimeError, match=r"0\.weight: cannot be fake-quantized: .*no_such_attribute"):
            _ = layer.weight


class TestDtypes:
    @pytest.mark.parametrize("convert", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
    def test_scales_stay_float32(self, convert: Callable[[nn.Module], nn.Module]) -> None:
        model = network()
        prepare(model, LEARNED)
        scales = {name: p.clone() for name, p in model.named_parameters() if "quantizer" in name}
        convert(model)
        dtype = model.get_parameter("0.weight").dtype
        assert dtype != torch.float32
        for name, before in scales.items():
            assert torch.equal(model.get_parameter(name), before)
        assert model[0].weight.dtype == dtype
        assert model(torch.randn(2, 6, dtype=dtype)).dtype == dtype

    def test_bfloat16_weights_dequantize_bit_for_bit(self) -> None:
        model = network().bfloat16()
        prepare(model, LEARNED)
        for name, tensor in codes(model).items():
            module, _, slot = name.rpartition(".")
            weight = getattr(model.get_submodule(module), slot)
            assert weight.dtype == torch.bfloat16
            assert torch.equal(tensor.dequantize(), weight)

    def test_autocast(self) -> None:
        layer = nn.Linear(6, 5)
        prepare(layer, WEIGHT_ONLY)
        expected = absmax_int4(latent(layer, "weight"))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer.weight, expected)
            assert layer(torch.randn(2, 6)).dtype == torch.bfloat16


class TestMeta:
    def test_build_on_meta_then_load_a_float_checkpoint(self) -> None:
        source = network()
        with torch.device("meta"):
            model = network()
        prepare(model, LEARNED)
        assert all(p.is_meta for p in model.parameters())
        model.to_empty(device="cpu")
        model.load_state_dict(source.state_dict())
        expected = network()
        expected.load_state_dict(source.state_dict())
        prepare(expected, LEARNED)
        x = torch.randn(2, 6)
        assert torch.equal(model(x), expected(x))
        assert model.state_dict().keys() == expected.state_dict().keys()

    def test_build_on_meta_then_load_a_quantized_checkpoint(self) -> None:
        source = network()
        prepare(source, LEARNED)
        with torch.no_grad():
            source[0].weight_quantizer.scale.mul_(1.5)
        with torch.device("meta"):
            model = network()
        prepare(model, LEARNED)
        model.to_empty(device="cpu").load_state_dict(source.state_dict())
        x = torch.randn(2, 6)
        assert torch.equal(model(x), source(x))

    def test_assigning_load(self) -> None:
        source = network()
        prepare(source, LEARNED)
        with torch.device("meta"):
            model = network()
        prepare(model, LEARNED)
        model.load_state_dict(source.state_dict(), assign=True)
        x = torch.randn(2, 6)
        assert torch.equal(model(x), source(x))

    @pytest.mark.parametrize("quantized", [False, True])
    @pytest.mark.parametrize("transforms", [(), (Hadamard(1),)])
    def test_assigning_load_of_what_is_lacking(self, transforms: tuple[Hadamard, ...], quantized: bool) -> None:
        """Scales in a float checkpoint, signs of a rotation in any: they would stay on meta."""
        spec = LayerSpec(QuantizerSpec(Int(4, symmetric=False), gradient=LearnedSoft()), LEARNED_INPUT, transforms)
        expected = nn.Linear(8, 4)
        with torch.device("meta"):
            model = nn.Linear(8, 4)
        prepare(model, recipe_for(spec))
        state = expected.state_dict()
        prepare(expected, recipe_for(spec))
        calibrate(expected, [torch.randn(5, 8)])
        model.load_state_dict(expected.state_dict() if quantized else state, assign=True)
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert torch.equal(model.weight, expected.weight)
        assert model.input_quantizer.calibrated is quantized

    def test_initializing_after_to_empty(self) -> None:
        with torch.device("meta"):
            model = network()
        prepare(model, LEARNED)
        model.to_empty(device="cpu")
        for layer in (model[0], model[2]):
            layer.reset_parameters()
        model(torch.randn(2, 6)).sum().backward()
        assert (model[0].weight - latent(model[0], "weight")).abs().max() < 0.1


def new_weight_norm(layer: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(layer)


def new_spectral_norm(layer: nn.Module) -> nn.Module:
    return parametrizations.spectral_norm(layer)


def old_weight_norm_(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return old_weight_norm(layer)


NORMS = [new_weight_norm, new_spectral_norm, old_weight_norm_, old_spectral_norm]


@pytest.mark.parametrize("norm", NORMS)
class TestNormalizedWeights:
    def test_before_prepare(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        """The normalized weight is quantized, gradients reach the parts, and codes are those of the present parts."""
        layer = norm(nn.Linear(6, 5, bias=False))
        x = torch.randn(3, 6)
        layer(x)
        report = prepare(layer, WEIGHT_ONLY)
        assert report.share("quantized") == 1.0
        before = {name: p.clone() for name, p in layer.named_parameters()}
        layer(x).square().sum().backward()
        for parameter in layer.parameters():
            assert parameter.grad is not None
            with torch.no_grad():
                parameter.add_(0.5 * parameter.grad)
        assert any(not torch.equal(before[name], p) for name, p in layer.named_parameters())
        found = codes(layer)["weight"].dequantize()
        layer.eval()
        torch.testing.assert_close(layer(x), x @ found.T)
        assert torch.equal(layer.weight, found)
        assert torch.equal(found, absmax_int4(latent(layer, "weight")))

    def test_codes_leave_no_trace_in_training(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        layer = norm(nn.Linear(6, 5))
        prepare(layer, WEIGHT_ONLY)
        before = copy.deepcopy(layer.state_dict())
        codes(layer)
        assert layer.training
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())

    def test_prepare_leaves_no_trace(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        """Reading a weight under spectral_norm in training is a step of its power iteration."""
        layer = norm(nn.Linear(6, 5))
        before = copy.deepcopy(layer.state_dict())
        prepare(layer, LEARNED)
        assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())

    def test_two_of_them_are_not_taken_for_one(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        model = nn.Sequential(norm(nn.Linear(6, 6)), norm(nn.Linear(6, 6)))
        prepare(model, WEIGHT_ONLY)
        found = codes(model)
        assert list(found) == ["0.weight", "1.weight"]
        assert not torch.equal(found["0.weight"].codes, found["1.weight"].codes)

    def test_unprepare(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        layer = norm(nn.Linear(6, 5)).eval()
        x = torch.randn(3, 6)
        expected, kind = layer(x), type(layer)
        prepare(layer, WEIGHT_ONLY)
        assert not torch.equal(layer(x), expected)
        unprepare(layer)
        assert torch.equal(layer(x), expected)
        assert type(layer) is kind


@pytest.mark.parametrize("norm", [old_weight_norm_, old_spectral_norm])
def test_old_norms_after_prepare_act_on_the_latent_weight(norm: Callable[[nn.Module], nn.Module]) -> None:
    layer, plain = nn.Linear(6, 5), nn.Linear(6, 5)
    plain.load_state_dict(layer.state_dict())
    prepare(layer, recipe_for(LayerSpec(QuantizerSpec(HalfInt(2), PerChannel()))))
    torch.manual_seed(1)
    norm(layer)
    torch.manual_seed(1)
    norm(plain)
    x = torch.randn(3, 6)
    layer(x)
    plain(x)
    torch.testing.assert_close(latent(layer, "weight"), plain.weight)
    assert len(torch.unique((layer.weight / layer.weight_quantizer.scale).round(decimals=3))) == 4


@pytest.mark.parametrize("norm", [new_weight_norm, new_spectral_norm])
def test_parametrizations_after_prepare_are_refused(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    prepare(model, WEIGHT_ONLY)
    with pytest.raises(RuntimeError, match=r"0\.weight: parametrizations .* change them before prepare\(\), or unprep"):
        norm(model[0])


def test_removing_a_parametrization_after_prepare_is_refused() -> None:
    model = nn.Sequential(new_weight_norm(nn.Linear(6, 5)))
    prepare(model, WEIGHT_ONLY)
    with pytest.raises(RuntimeError, match=r"0\.weight: parametrizations of a prepared weight cannot change"):
        parametrize.remove_parametrizations(model[0], "weight")


def test_classes_are_shared_while_they_live() -> None:
    first = view_class(nn.Linear, ("weight",))
    assert view_class(nn.Linear, ("weight",)) is first
    assert first.__mro__[1] is nn.Linear


def test_weight_spec_is_part_of_the_cases() -> None:
    """The naive formula of these tests describes the spec that they use."""
    assert WEIGHT.label == "int4:channel:absmax:ste"


@pytest.mark.parametrize("recipe", ["int4", "w8a8"])
def test_power_iteration_goes_on_as_in_float(recipe: str) -> None:
    layer, plain = new_spectral_norm(nn.Linear(6, 5)), new_spectral_norm(nn.Linear(6, 5))
    plain.load_state_dict(layer.state_dict())
    prepare(layer, recipes.named(recipe))
    for _ in range(2):
        layer(torch.randn(3, 6))
        plain(torch.randn(3, 6))
    for key, value in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value)
