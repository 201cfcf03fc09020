"""The quantizer module: its state, how it is copied, moved, saved and loaded, and how its grid changes."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_qat.quantization import (
    AbsMax,
    AbsMean,
    Binary,
    Entropy,
    FakeQuantizer,
    Granularity,
    Grid,
    HalfInt,
    Int,
    Layout,
    Learned,
    LearnedSoft,
    MinimumError,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Pi,
    QuantizerSpec,
    StraightThrough,
    Ternary,
)
from tests.quantization.combinations import GRIDS, INPUT, SHAPE, build, meaningful

ASYMMETRIC = QuantizerSpec(Int(4, symmetric=False), PerGroup(4), Learned(), LearnedSoft(0.3))
DTYPES = (torch.bfloat16, torch.float16, torch.float64)


def state_of(quantizer: FakeQuantizer) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def assert_same_state(one: FakeQuantizer, other: FakeQuantizer) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (QuantizerSpec(Int(4), scale=AbsMax()), set()),
        (QuantizerSpec(Int(4), scale=MinimumError()), {"scale"}),
        (QuantizerSpec(Int(4)), {"scale"}),
        (QuantizerSpec(Int(4), scale=AbsMean(), gradient=LearnedSoft()), {"temperature"}),
        (ASYMMETRIC, {"scale", "zero_point", "temperature"}),
    ],
    ids=lambda value: getattr(value, "label", None),
)
def test_names_in_the_state_dict(spec: QuantizerSpec, names: set[str]) -> None:
    layer = nn.Module()
    layer.weight_quantizer = FakeQuantizer(spec, (4, 8))
    state = layer.state_dict()
    assert set(state) == {f"weight_quantizer.{name}" for name in (*names, "_extra_state")}
    for tensor in state.values():
        assert isinstance(tensor, torch.Tensor)
        assert torch.isfinite(tensor).all()
        assert tensor.dtype == torch.float32
    parameters = {name for name, _ in layer.named_parameters()}
    assert parameters == {
        f"weight_quantizer.{n}" for n in names & ({"scale", "temperature"} if spec.scale.learned else {"temperature"})
    }


def test_no_parameter_has_zero_dimensions() -> None:
    """FSDP refuses them."""
    for granularity in (PerTensor(), PerChannel(), PerGroup(4)):
        spec = dataclasses.replace(ASYMMETRIC, granularity=granularity)
        assert all(parameter.dim() > 0 for parameter in FakeQuantizer(spec, (4, 8)).parameters())


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.label)
def test_copies_and_pickles_compute_the_same(grid: Grid) -> None:
    x = torch.randn(*SHAPE)
    for granularity, layout, scale in meaningful(grid, (AbsMax(), MinimumError(), Learned(AbsMax()))):
        quantizer = build(QuantizerSpec(grid, granularity, scale, LearnedSoft(0.3)), x, layout)
        for copied in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
            assert torch.equal(copied(x), quantizer(x))
            assert_same_state(copied, quantizer)
            assert not {id(p) for p in copied.parameters()} & {id(p) for p in quantizer.parameters()}
            assert repr(copied) == repr(quantizer)


def test_copies_are_independent() -> None:
    x = torch.randn(4, 8)
    quantizer = build(QuantizerSpec(Int(8)), x)
    before = quantizer(x)
    copied = copy.deepcopy(quantizer)
    copied.set_grid(Int(2))
    assert torch.equal(quantizer(x), before)
    assert copied.quantize(x).codes.unique().numel() <= 4


@pytest.mark.parametrize(
    "spec", [ASYMMETRIC, QuantizerSpec(Int(4)), QuantizerSpec(Ternary(), scale=AbsMean())], ids=repr
)
def test_meta_device_and_back(spec: QuantizerSpec) -> None:
    x = torch.randn(4, 8)
    expected = build(spec, x)(x)
    with torch.device("meta"):
        born = FakeQuantizer(spec, (4, 8))
    for quantizer in (born, FakeQuantizer(spec, (4, 8)).to("meta"), build(spec, 5 * x).to("meta").to(torch.bfloat16)):
        assert all(tensor.is_meta for tensor in (*quantizer.parameters(), *quantizer.buffers()))
        quantizer.to_empty(device="cpu")
        assert not any(tensor.is_meta for tensor in (*quantizer.parameters(), *quantizer.buffers()))
        assert quantizer.needs_calibration == quantizer.stored
        assert torch.equal(quantizer(x), expected)  # found anew from the weight
        assert all(tensor.dtype == torch.float32 for tensor in quantizer.state_dict().values())


def test_meta_device_and_a_checkpoint() -> None:
    x = torch.randn(4, 8)
    trained = build(ASYMMETRIC, x)
    for assign in (True, False):
        with torch.device("meta"):
            quantizer = FakeQuantizer(dataclasses.replace(ASYMMETRIC, grid=Int(8, symmetric=False)), (4, 8))
        if not assign:
            quantizer.to_empty(device="cpu")
        quantizer.load_state_dict(state_of(trained), assign=assign)
        assert quantizer.grid == Int(4, symmetric=False)
        assert torch.equal(quantizer(x), trained(x))


@pytest.mark.parametrize("assign", [False, True])
def test_checkpoint_of_another_width_loads_strictly(assign: bool) -> None:
    """A 2-bit checkpoint into a freshly built 8-bit quantizer: no key and no shape depends on the stage (trap 4)."""
    x = torch.randn(4, 8)
    trained = build(QuantizerSpec(Int(8)), x)
    trained.set_grid(Int(2))
    trained.find_scale(x)
    fresh = FakeQuantizer(QuantizerSpec(Int(8)), (4, 8))
    fresh.load_state_dict(state_of(trained), assign=assign)
    assert fresh.grid == Int(2)
    assert fresh.spec.grid == Int(8)
    assert repr(fresh).endswith("(int2:channel:learned(mse):clipped)")
    assert torch.equal(fresh(x), trained(x))
    assert fresh.quantize(x).codes.unique().numel() <= 4
    assert fresh.quantize(x).grid == Int(2)
    assert not fresh.needs_calibration


@pytest.mark.parametrize(
    "grid", [Ternary(1 / 3), Ternary(0.7), Ternary(), HalfInt(3), Pi(3, 5), Binary(), Int(3, narrow=True)]
)
def test_grids_survive_a_checkpoint(grid: Grid) -> None:
    x = torch.randn(4, 8)
    trained = build(QuantizerSpec(grid), x)
    same, other = FakeQuantizer(QuantizerSpec(grid), (4, 8)), FakeQuantizer(QuantizerSpec(Int(8)), (4, 8))
    for quantizer in (same, other):
        quantizer.load_state_dict(state_of(trained))
        assert torch.equal(quantizer(x), trained(x))
    assert same.grid == grid


def test_float_checkpoint_asks_for_a_new_scale() -> None:
    """Its keys are not missing, and the scale of other weights is not kept."""
    x = torch.randn(4, 8)
    layer = nn.Module()
    layer.weight = nn.Parameter(x.clone())
    layer.weight_quantizer = build(ASYMMETRIC, x)
    incompatible = layer.load_state_dict({"weight": 3 * x}, strict=True)
    assert not incompatible.missing_keys
    assert layer.weight_quantizer.needs_calibration
    assert torch.equal(layer.weight_quantizer(3 * x), build(ASYMMETRIC, 3 * x)(3 * x))
    calibrated = build(QuantizerSpec(Int(8), PerTensor(), MinimumError()), x, INPUT)
    calibrated.load_state_dict({})
    assert calibrated.needs_calibration


def test_checkpoint_without_its_scale_is_an_error() -> None:
    state = state_of(build(QuantizerSpec(Int(4)), torch.randn(4, 8)))
    del state["scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*scale"):
        FakeQuantizer(QuantizerSpec(Int(4)), (4, 8)).load_state_dict(state)


def test_checkpoint_before_the_scale_was_found() -> None:
    """What waited for its scale when it was saved waits for it when it is loaded."""
    x = torch.randn(4, 8)
    for layout, shape in ((Layout(), (4, 8)), (INPUT, ())):
        unused = FakeQuantizer(QuantizerSpec(Int(4), PerTensor()), shape, layout)
        loaded = build(QuantizerSpec(Int(4), PerTensor()), x, layout)
        loaded.load_state_dict(state_of(unused))
        assert loaded.needs_calibration
    weight = FakeQuantizer(QuantizerSpec(Int(4), PerTensor()), (4, 8))
    weight.load_state_dict(state_of(FakeQuantizer(QuantizerSpec(Int(4), PerTensor()), (4, 8))))
    assert torch.equal(weight(x), build(QuantizerSpec(Int(4), PerTensor()), x)(x))


@pytest.mark.parametrize(
    ("spec", "grid", "message"),
    [
        (
            QuantizerSpec(Int(4)),
            Int(4, symmetric=False),
            r"cannot change from Int\(.*one has a zero point, the other has none",
        ),
        (QuantizerSpec(Int(4, symmetric=False)), Binary(), r"one has a zero point, the other has none"),
        (QuantizerSpec(Int(4), scale=Entropy()), Binary(), r"Entropy\(\) cannot choose a scale for Binary\(\)"),
    ],
    ids=repr,
)
def test_grids_that_do_not_fit_are_refused(spec: QuantizerSpec, grid: Grid, message: str) -> None:
    quantizer = FakeQuantizer(spec, (4, 8), name="head.weight")
    with pytest.raises(ValueError, match=rf"head\.weight: {message}|head\.weight: cannot change .*{message}"):
        quantizer.set_grid(grid)
    assert quantizer.grid == spec.grid
    other = FakeQuantizer(dataclasses.replace(spec, grid=grid, scale=Learned(AbsMax())), (4, 8))
    if grid.symmetric != spec.grid.symmetric:
        with pytest.raises(ValueError, match="zero point"):
            quantizer.load_state_dict(other.state_dict(), strict=False)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.symmetric], ids=lambda grid: grid.label)
def test_a_changed_grid_equals_one_that_was_built(grid: Grid) -> None:
    x = torch.randn(4, 8)
    for scale in (AbsMax(), AbsMean(), MinimumError(), Learned()):
        for start in (Int(8), Ternary(), Pi(2, 2)):
            quantizer = build(QuantizerSpec(start, PerChannel(), scale), x)
            quantizer.set_grid(grid)
            quantizer.find_scale(x)
            built = build(QuantizerSpec(grid, PerChannel(), scale), x)
            assert torch.equal(quantizer(x), built(x))
            assert torch.equal(quantizer.quantize(x).codes, built.quantize(x).codes)
            assert quantizer.quantize(x).grid == grid
            assert quantizer.extra_repr() == built.extra_repr()


def test_a_changed_grid_keeps_the_scale_until_it_is_found_anew() -> None:
    x = torch.randn(4, 8)
    quantizer = build(QuantizerSpec(Int(8)), x)
    before = torch.as_tensor(quantizer.scale).detach().clone()
    quantizer.set_grid(Int(2))
    assert torch.equal(torch.as_tensor(quantizer.scale).detach(), before)


def test_disabled_quantizers_pass_the_tensor_on() -> None:
    x = torch.randn(4, 8)
    quantizer = build(ASYMMETRIC, x)
    quantizer.enabled = False
    for dtype in (torch.float32, *DTYPES):
        assert torch.equal(quantizer(x.to(dtype)), x.to(dtype))
        assert quantizer(x.to(dtype)).dtype == dtype
    quantizer(x).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in quantizer.parameters() if p.grad is not None)
    assert all(parameter.grad is not None for parameter in quantizer.parameters())
    with torch.no_grad():
        assert quantizer(x) is x


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(4)], ids=repr)
def test_straight_through_keeps_nothing_for_backward(granularity: Granularity) -> None:
    kept: list[torch.Tensor] = []
    weight = torch.randn(4, 8, requires_grad=True)
    for scale in (AbsMax(), AbsMean()):
        for grid in (Int(4), Ternary(), Binary(), Pi(3, 4)):
            quantizer = FakeQuantizer(QuantizerSpec(grid, granularity, scale, StraightThrough()), (4, 8))
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda none: none):
                out = quantizer(weight)
            assert not kept
            assert torch.equal(torch.autograd.grad(out.sum(), weight)[0], torch.ones(4, 8))


def test_representation_names_the_present_grid() -> None:
    quantizer = FakeQuantizer(QuantizerSpec(Int(8), PerToken(), AbsMax()))
    assert repr(quantizer) == "FakeQuantizer(int8:token:absmax:clipped)"
    quantizer.set_grid(Int(4))
    assert repr(quantizer) == "FakeQuantizer(int4:token:absmax:clipped)"
