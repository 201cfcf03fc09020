"""The four pieces and the specs as frozen values: comparable, hashable, printable, and strict about their arguments."""

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lightning_qat.quantization as q
from lightning_qat.quantization import (
    AbsMax,
    AbsMean,
    Binary,
    Center,
    Clipped,
    ElementwiseScaling,
    Entropy,
    Hadamard,
    HalfInt,
    Int,
    LayerSpec,
    Layout,
    Learned,
    LearnedSoft,
    MinimumError,
    MovingAverage,
    Normalize,
    Percentile,
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
from lightning_qat.quantization.grid import decode_grid, with_bits
from tests import _reference as ref
from tests.quantization.combinations import FEW_GRIDS, GRADIENTS, GRIDS, PLACES, SCALES, reference

VALUES: tuple[Any, ...] = (
    *GRIDS, *SCALES, *GRADIENTS, PerTensor(), PerChannel(), PerToken(), PerGroup(32),
    Layout(), Layout(1), Layout(None, 3),
    Center(), Hadamard(7), Normalize(1e-6), Percentile(50), Clipped(threshold=2.0), Ternary(1 / 3),
    QuantizerSpec(Int(4)),
    QuantizerSpec(Pi(3, 4), PerGroup(8), Learned(Percentile(99.5)), LearnedSoft(0.1), "bfloat16"),
    LayerSpec(weight=QuantizerSpec(Int(4))),
    LayerSpec(QuantizerSpec(Ternary(), scale=AbsMean()), QuantizerSpec(Int(8, narrow=True), PerToken(), AbsMax()),
              (Normalize(), Hadamard(1))),
)  # fmt: skip
each_value = pytest.mark.parametrize("value", VALUES, ids=repr)
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.label)


@each_value
def test_repr_evaluates_back(value: object) -> None:
    assert eval(repr(value), vars(q)) == value


@each_value
def test_values_are_frozen_hashable_and_copied_equal(value: Any) -> None:
    for copied in (
        copy.copy(value),
        copy.deepcopy(value),
        pickle.loads(pickle.dumps(value)),
        dataclasses.replace(value),
    ):
        assert copied == value
        assert hash(copied) == hash(value)
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)


def test_different_values_differ() -> None:
    assert len(set(VALUES)) == len(VALUES)
    labels = [spec.label for spec in VALUES if isinstance(spec, QuantizerSpec | LayerSpec)]
    assert len(set(labels)) == len(labels)
    assert len({grid.label for grid in GRIDS}) == len(GRIDS)


@each_grid
def test_levels_of_each_grid(grid: q.Grid) -> None:
    levels = ref.levels(reference(grid))
    assert (grid.lo, grid.hi) == grid.bounds == (min(levels), max(levels))
    assert grid.num_levels == len(levels)
    assert grid.bits_per_weight == math.log2(len(levels))
    assert grid.has_zero == (0.0 in levels)
    assert {(level - grid.offset) % 1 for level in levels} == {0.0}
    u = torch.linspace(grid.lo, grid.hi, 101)
    distance = grid.border_distance(u.clone())
    if not isinstance(grid, Ternary) or grid.threshold == 0.5:
        assert distance.abs().max() <= grid.half_cell


@each_grid
def test_grids_are_encoded_as_plain_numbers(grid: q.Grid) -> None:
    code = grid.encode()
    assert all(type(number) is float for number in code)
    stored = torch.tensor(code, dtype=torch.float32)
    assert decode_grid(tuple(stored.tolist())) == grid
    assert len({other.encode() for other in GRIDS}) == len(GRIDS)


def test_unknown_grid_families_are_named() -> None:
    with pytest.raises(ValueError, match=r"grid family 9 is unknown; this version knows .*Int.*Pi"):
        decode_grid((9.0, 4.0, 0.0))


def test_with_bits_stays_in_the_family() -> None:
    assert with_bits(Int(8, narrow=True), 2) == Int(2, narrow=True)
    assert with_bits(Int(8, symmetric=False), 3) == Int(3, symmetric=False)
    assert with_bits(HalfInt(4), 2) == HalfInt(2)
    assert with_bits(Pi(5, 3), 2) == Pi(2, 3)
    assert with_bits(Ternary(), 4) == with_bits(Binary(), 4) == Int(4)
    assert all(with_bits(grid, 1) == Binary() for grid in FEW_GRIDS)
    for grid, bits in ((Int(4), 9), (Pi(3, 4), 8), (HalfInt(2), 0)):
        with pytest.raises(ValueError, match=f"bits={bits} is not allowed"):
            with_bits(grid, bits)


Build = Callable[[], object]
REFUSED: tuple[tuple[Build, type[Exception], str], ...] = (
    *((lambda bits=bits: Int(bits), ValueError, rf"Int: bits={bits!r} is not allowed; choose an integer from 2 to 8"
       r" \(for 1 bit use Binary\(\), for 1.58 bits Ternary\(\)\)") for bits in (1, 0, -1, 9)),
    (lambda: Int(4.0), ValueError, r"Int: bits=4.0 is not allowed; choose an integer from 2 to 8"),  # type: ignore[arg-type]
    (lambda: Int("4"), ValueError, r"Int: bits='4' is not allowed"),  # type: ignore[arg-type]
    (lambda: Int(True), ValueError, r"Int: bits=True is not allowed"),
    *((lambda v=v: Int(8, narrow=v), ValueError, rf"Int: narrow={v!r} is not allowed; choose True or False")
      for v in (2, 1, "no", None)),
    (lambda: Int(8, symmetric="False"), ValueError, r"Int: symmetric='False' is not allowed; choose True or False"),  # type: ignore[arg-type]
    (lambda: Int(4, narrow=True, symmetric=False), ValueError, r"Int: narrow=True needs symmetric=True"),
    (lambda: HalfInt(1), ValueError, r"HalfInt: bits=1 is not allowed; choose an integer from 2 to 8"),
    (lambda: HalfInt(9), ValueError, r"HalfInt: bits=9 is not allowed"),
    (lambda: Pi(6, 4), ValueError, r"Pi: bits=6 is not allowed; choose an integer from 2 to 5"),
    (lambda: Pi(3, 1), ValueError, r"Pi: k=1 is not allowed; choose an integer from 2 to 5"),
    (lambda: Pi(3, 6), ValueError, r"Pi: k=6 is not allowed"),
    (lambda: Pi(3, 2.5), ValueError, r"Pi: k=2.5 is not allowed"),  # type: ignore[arg-type]
    *((lambda t=t: Ternary(t), ValueError, rf"Ternary: threshold={t} is not allowed; choose .* \(0, 1\)")
      for t in (0.0, 1.0, -0.5, math.nan, math.inf)),
    *((lambda p=p: Percentile(p), ValueError, rf"Percentile: percentile={p} is not allowed; choose .* \(0, 100\]")
      for p in (0.0, -1.0, 100.1, math.nan, math.inf)),
    *((lambda m=m: MovingAverage(m), ValueError, rf"MovingAverage: momentum={m} is not allowed; choose .* \[0, 1\)")
      for m in (1.0, -0.1, math.nan)),
    *((lambda t=t: Clipped(t), ValueError, rf"Clipped: threshold={t} is not allowed; choose .*positive and finite")
      for t in (0.0, -1.0, math.nan, math.inf)),
    *((lambda t=t: Soft(t), ValueError, rf"Soft: temperature={t} is not allowed; choose .*positive and finite")
      for t in (0.0, -1.0, math.nan, math.inf)),
    *((lambda t=t: LearnedSoft(t), ValueError, rf"LearnedSoft: temperature={t} is not allowed; choose .*0.03 to 1000")
      for t in (0.0, -1.0, 0.02, 1001.0, math.nan, math.inf)),
    *((lambda d=d: ElementwiseScaling(d), ValueError, rf"ElementwiseScaling: delta={d} is not allowed; .*not negative")
      for d in (-0.1, math.nan, math.inf)),
    *((lambda s=s: PerGroup(s), ValueError, rf"PerGroup: size={s!r} is not allowed; choose a positive integer")
      for s in (0, -4, 2.0, True, "32")),
    (lambda: Learned(Learned()), ValueError, r"Learned: init=Learned\(.*\) is not allowed; choose a scale that is not"),
    (lambda: Learned("mse"), ValueError, r"Learned: init='mse' is not allowed"),  # type: ignore[arg-type]
    (lambda: Learned(MinimumError), ValueError, r"Learned: init=<class .*MinimumError'> is not allowed"),  # type: ignore[arg-type]
    (lambda: Normalize(0.0), ValueError, r"Normalize: eps=0.0 is not allowed; choose .*positive and finite"),
    (lambda: Normalize(math.inf), ValueError, r"Normalize: eps=inf is not allowed"),
    *((make, ValueError, rf"{where}='0.5' is not allowed; choose ") for make, where in (
        (lambda: AbsMean("0.5"), "AbsMean: multiple"),  # type: ignore[arg-type]
        (lambda: Ternary("0.5"), "Ternary: threshold"), (lambda: Percentile("0.5"), "Percentile: percentile"),  # type: ignore[arg-type]
        (lambda: MovingAverage("0.5"), "MovingAverage: momentum"), (lambda: Soft("0.5"), "Soft: temperature"),  # type: ignore[arg-type]
        (lambda: Clipped("0.5"), "Clipped: threshold"), (lambda: Normalize("0.5"), "Normalize: eps"),  # type: ignore[arg-type]
        (lambda: LearnedSoft("0.5"), "LearnedSoft: temperature"),  # type: ignore[arg-type]
        (lambda: ElementwiseScaling("0.5"), "ElementwiseScaling: delta"),  # type: ignore[arg-type]
    )),
    *((lambda multiple=multiple: AbsMean(multiple), ValueError, rf"AbsMean: multiple={multiple} is not allowed; choose")
      for multiple in (0, -1.0, math.inf, math.nan)),
    (lambda: Hadamard(1.5), TypeError, r"Hadamard: seed=1.5 is not an integer"),  # type: ignore[arg-type]
    (lambda: Hadamard(2**63), ValueError, r"Hadamard: seed=9223372036854775808 is not allowed; choose .* 64 bits"),
    (lambda: Layout(-1), ValueError, r"Layout: channel_axis=-1 is not allowed"),
    (lambda: Layout(None, 0), ValueError, r"Layout: num_features=0 is not allowed"),
    (lambda: QuantizerSpec(Int), TypeError, r"grid=<class .*> is not a Grid; choose one of Int\(bits\)"),  # type: ignore[arg-type]
    (lambda: QuantizerSpec(4), TypeError, r"QuantizerSpec: grid=4 is not a Grid"),  # type: ignore[arg-type]
    (lambda: QuantizerSpec(Int(4), "per_group"), TypeError, r"granularity='per_group' is not a Gran"),  # type: ignore[arg-type]
    (lambda: QuantizerSpec(Int(4), scale=Clipped()), TypeError, r"scale=Clipped\(.*is not a Scale"),  # type: ignore[arg-type]
    (lambda: QuantizerSpec(Int(4), gradient="ste"), TypeError, r"QuantizerSpec: gradient='ste' is not a Gradient"),  # type: ignore[arg-type]
    (lambda: QuantizerSpec(Int(4), scale_dtype="float64"), ValueError,
     r"QuantizerSpec: scale_dtype='float64'; choose one of \['bfloat16', 'float16', 'float32'\]"),
    (lambda: QuantizerSpec(Int(4), scale_dtype=["float16"]), ValueError, r"scale_dtype=\['float16'\]; choose"),  # type: ignore[arg-type]
    (lambda: QuantizerSpec(Int(4), PerToken()), ValueError, r"cannot be stored per token.*AbsMax\(\) and AbsMean\(\)"),
    (lambda: QuantizerSpec(Int(4, symmetric=False), scale=AbsMean()), ValueError,
     r"AbsMean\(multiple=1.0\) finds no zero point for Int\(.*symmetric=False\).*MinimumError\(\)"),
    (lambda: QuantizerSpec(Int(4, symmetric=False), scale=Learned(MovingAverage())), ValueError, r"no zero point"),
    (lambda: QuantizerSpec(Binary(), scale=Entropy()), ValueError, r"Entropy\(\) cannot choose a scale for Binary\(\)"),
    (lambda: QuantizerSpec(Int(4, symmetric=False), scale=Percentile(50)), ValueError,
     r"Percentile\(percentile=50\) leaves an empty range.*choose a percentile in \(50, 100\]"),
    (lambda: LayerSpec(), ValueError, r"LayerSpec: neither weight nor input is given; .*Rule\(..., None\)"),
    (lambda: LayerSpec(weight=Int(4)), TypeError, r"LayerSpec: weight=Int\(.*is not a QuantizerSpec"),  # type: ignore[arg-type]
    (lambda: LayerSpec(weight=QuantizerSpec(Int(4), PerToken(), AbsMax())), ValueError,
     r"weight.granularity=PerToken\(\) has no meaning for a weight.*PerGroup\(size\)"),
    (lambda: LayerSpec(input=QuantizerSpec(Int(8), PerChannel(), AbsMax())), ValueError,
     r"input.granularity=PerChannel\(\) would scale the dimension that is summed over.*PerToken\(\)"),
    (lambda: LayerSpec(input=QuantizerSpec(Int(8), PerGroup(8), Learned())), ValueError,
     r"cannot be stored per group of an input.*PerTensor\(\)"),
    (lambda: LayerSpec(weight=QuantizerSpec(Int(4)), transforms=Center()), TypeError, r"transforms=Center\(\) is not"),  # type: ignore[arg-type]
    (lambda: LayerSpec(weight=QuantizerSpec(Int(4)), transforms=("center",)), TypeError, r"='center' is not a"),  # type: ignore[arg-type]
)  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refused_arguments(make: Build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_lists_from_a_config_become_tuples() -> None:
    spec = LayerSpec(weight=QuantizerSpec(Int(4)), transforms=[Center(), Hadamard(0)])  # type: ignore[arg-type]
    assert spec == LayerSpec(weight=QuantizerSpec(Int(4)), transforms=(Center(), Hadamard(0)))
    assert hash(spec)


def test_defaults() -> None:
    """4 bits per channel with learned scales started at minimum error is what the design calls the default."""
    spec = QuantizerSpec(Int(4))
    assert spec == QuantizerSpec(Int(4), PerChannel(), Learned(MinimumError()), Clipped(), "float32")
    assert spec.label == "int4:channel:learned(mse):clipped"
    assert LayerSpec(weight=spec) == LayerSpec(spec, None, ())


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        (QuantizerSpec(Int(8, narrow=True), PerToken(), AbsMax(), StraightThrough()), "int8-narrow:token:absmax:ste"),
        (
            QuantizerSpec(Int(4, symmetric=False), PerGroup(32), Percentile(99.9)),
            "int4-asymmetric:group32:percentile99.9:clipped",
        ),
        (
            QuantizerSpec(Ternary(0.7), scale=AbsMean(), gradient=ElementwiseScaling()),
            "ternary0.7:channel:absmean:ewgs",
        ),
        (QuantizerSpec(HalfInt(2), PerTensor(), Entropy(), Soft()), "halfint2:tensor:entropy:soft"),
        (
            QuantizerSpec(Pi(3, 4), scale=MovingAverage(), scale_dtype="float16"),
            "pi3k4:channel:movingaverage:clipped:float16",
        ),
    ],
)
def test_labels(spec: QuantizerSpec, label: str) -> None:
    assert spec.label == label


@pytest.mark.parametrize(("granularity", "layout"), PLACES, ids=str)
def test_places_have_no_problem(granularity: q.Granularity, layout: Layout) -> None:
    assert granularity.problem(() if layout.is_input else (4, 8), layout) is None
