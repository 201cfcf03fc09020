"""What calibration sees: exact counts that add up in any order, and the scales that follow from them."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_qat.quantization import (
    AbsMax,
    AbsMean,
    Entropy,
    FakeQuantizer,
    Grid,
    HalfInt,
    Int,
    Learned,
    MinimumError,
    MovingAverage,
    Observer,
    Percentile,
    PerTensor,
    QuantizerSpec,
    Scale,
    Ternary,
)
from lightning_qat.quantization import observer as module
from tests import _reference as ref
from tests.quantization.combinations import build, reference

SPEC = QuantizerSpec(Int(8), PerTensor(), MinimumError())


def batches() -> list[Tensor]:
    """Batches whose ranges differ by orders of magnitude, so that histograms must be widened and merged."""
    sizes = (1e-3, 2.0, 0.5, 1e3, 1e-6, 40.0)
    return [size * torch.randn(50, 7) for size in sizes] + [torch.zeros(3, 7), torch.tensor([[1.0, -1.0]])]


def observed(parts: list[Tensor], momentum: float = 0.9) -> Observer:
    observer = Observer(momentum)
    for part in parts:
        observer.update(part)
    return observer


def test_counts_are_those_of_one_histogram_over_all_data() -> None:
    parts = batches()
    stepwise, at_once = observed(parts), observed([torch.cat([part.flatten() for part in parts])])
    assert torch.equal(stepwise.counts, at_once.counts)
    assert stepwise.counts.sum().item() == sum(part.numel() for part in parts)
    assert (stepwise.minimum, stepwise.maximum) == (at_once.minimum, at_once.maximum)


def test_counts_are_those_of_a_naive_loop() -> None:
    x = 3 * torch.randn(2000)
    observer = observed([x])
    assert observer.exponent is not None
    limit, num_bins = 2.0**observer.exponent, observer.counts.numel()
    expected = [0] * num_bins
    for value in x.tolist():
        expected[math.floor(value / limit * num_bins / 2) + num_bins // 2] += 1
    assert observer.counts.tolist() == expected


def test_order_of_batches_does_not_matter() -> None:
    parts = batches()
    forward, backward = observed(parts), observed(parts[::-1])
    assert torch.equal(forward.counts, backward.counts)
    assert forward.exponent == backward.exponent
    assert forward.sample().range() == backward.sample().range()


def test_moving_average_of_the_absolute_maximum() -> None:
    parts = batches()
    for momentum in (0.0, 0.5, 0.9):
        expected = ref.moving_average([float(part.abs().max()) for part in parts], momentum)
        assert observed(parts, momentum).average_amax == pytest.approx(expected, rel=1e-6)
        quantizer = FakeQuantizer(QuantizerSpec(Int(8), PerTensor(), MovingAverage(momentum)))
        calibrate(quantizer, parts)
        assert torch.as_tensor(quantizer.scale).item() == pytest.approx(expected / 128, rel=1e-6)


def calibrate(quantizer: FakeQuantizer, parts: list[Tensor]) -> None:
    quantizer.observer = quantizer.new_observer()
    for part in parts:
        assert quantizer(part) is part
    quantizer.find_scale()
    quantizer.observer = None


@pytest.mark.parametrize("num_processes", [2, 3])
def test_observers_of_all_processes_become_one(num_processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal on all ranks, and equal to one process that saw everything (trap 41)."""
    parts = batches()
    ranks = [observed(parts[rank::num_processes]) for rank in range(num_processes)] + [Observer()]
    states = [copy.deepcopy(vars(rank)) for rank in ranks]

    def gather(into: list[Any], own: Any) -> None:
        into[:] = copy.deepcopy(states)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: len(ranks))
    monkeypatch.setattr(dist, "all_gather_object", gather)
    alone = observed(parts)
    average = sum(float(rank.average_amax) for rank in ranks[:-1]) / num_processes
    for rank in ranks:
        rank.synchronize()
        assert torch.equal(rank.counts, alone.counts)
        assert (rank.minimum, rank.maximum, rank.num_batches) == (alone.minimum, alone.maximum, alone.num_batches)
        assert rank.average_amax == pytest.approx(average)
        assert torch.equal(rank.sample().values, alone.sample().values)


def test_one_process_keeps_its_own() -> None:
    observer = observed(batches())
    before = copy.deepcopy(vars(observer))
    observer.synchronize()
    assert torch.equal(observer.counts, before["counts"])
    assert observer.average_amax == before["average_amax"]


@pytest.mark.parametrize("percentile", [0.1, 25.0, 50.0, 99.0, 99.9, 100.0])
def test_percentiles_are_near_exact(percentile: float) -> None:
    x = torch.randn(20_000)
    quantizer = FakeQuantizer(QuantizerSpec(Int(8), PerTensor(), Percentile(percentile)))
    calibrate(quantizer, list(x.split(1000)))
    found = torch.as_tensor(quantizer.scale).item() * 128
    bin_width = 2 * 2.0 ** math.frexp(float(x.abs().max()))[1] / 4096
    one = 100 / x.numel()  # to the neighboring order statistics, then to the border of the bin
    lowest, highest = (ref.percentile(x.abs(), min(100.0, max(0.0, percentile + shift))) for shift in (-one, one))
    assert lowest - bin_width <= found <= highest + bin_width


@pytest.mark.parametrize(
    "grid", [Int(8), Int(4, narrow=True), Int(4, symmetric=False), Ternary(), HalfInt(3)], ids=repr
)
@pytest.mark.parametrize(
    "scale", [MinimumError(), Entropy(), Learned(), Learned(AbsMax()), Learned(AbsMean())], ids=repr
)
def test_scales_from_a_histogram_are_near_those_from_the_values(grid: Grid, scale: Scale) -> None:
    if not grid.symmetric and scale == Learned(AbsMean()):
        return  # no such combination
    x = torch.randn(30_000) + 0.3
    quantizer = FakeQuantizer(QuantizerSpec(grid, PerTensor(), scale))
    calibrate(quantizer, list(x.split(3000)))
    direct = build(quantizer.spec, x, quantizer.layout)
    assert not quantizer.needs_calibration
    plain = reference(grid)
    errors = [
        ref.squared_error(x, part.quantize(x).scale, 0.0 if part.zero_point is None else part.zero_point, plain)
        for part in (quantizer, direct)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.5 if scale == Entropy() else 0.02)


def test_absmax_of_a_calibrated_input_is_exact() -> None:
    """Bins limit the resolution of percentiles, not of the range."""
    parts = batches()
    for grid in (Int(8), Int(8, symmetric=False)):
        quantizer = FakeQuantizer(QuantizerSpec(grid, PerTensor(), Learned(AbsMax())))
        calibrate(quantizer, parts)
        whole = torch.cat([part.flatten() for part in parts])
        assert torch.equal(
            torch.as_tensor(quantizer.scale), torch.as_tensor(build(quantizer.spec, whole, quantizer.layout).scale)
        )


def test_values_that_are_not_finite_are_not_counted() -> None:
    observer = observed([torch.tensor([math.nan, math.inf, -math.inf, 1.0, -3.0]), torch.tensor([math.nan])])
    assert observer.counts.sum().item() == 2
    assert (observer.minimum, observer.maximum, observer.num_batches) == (-3.0, 1.0, 1)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 1.0, 1024.0, 3.4e38, -3.4e38])
def test_extreme_ranges(value: float) -> None:
    observer = observed([torch.full((5,), value), torch.tensor([value, 0.0])])
    assert observer.counts.sum().item() == 7
    sample = observer.sample()
    assert torch.isfinite(sample.values).all()
    assert sample.range()[1].item() == max(float(torch.tensor(value)), 0.0)
    for scale in (MinimumError(), Entropy(), Percentile(99.0), MovingAverage(), Learned(AbsMean())):
        quantizer = FakeQuantizer(QuantizerSpec(Int(8), PerTensor(), scale))
        calibrate(quantizer, [torch.full((5,), value)])
        found = torch.as_tensor(quantizer.scale)
        assert torch.isfinite(found).all()
        assert (found > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
def test_all_dtypes_are_observed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(100).to(dtype)
    assert torch.equal(observed([x]).counts, observed([x.float()]).counts)


def test_counts_do_not_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the values of a large batch after a ReLU fall into one bin: more than a float32 can count to."""
    num = (1 << 24) + 10_001
    observer = observed([torch.zeros(1).expand(num)])
    assert observer.counts.max().item() == num
    x = torch.randn(1000)
    expected = observed([x]).counts
    monkeypatch.setattr(module, "_CHUNK", 7)
    assert torch.equal(observed([x]).counts, expected)


def test_nothing_seen_is_an_error_that_names_the_layer() -> None:
    with pytest.raises(ValueError, match="no finite value was observed"):
        Observer().sample()
    quantizer = FakeQuantizer(SPEC, name="encoder.fc1.input")
    quantizer.observer = quantizer.new_observer()
    quantizer(torch.tensor([math.nan]))
    with pytest.raises(ValueError, match=r"encoder\.fc1\.input: calibration saw no finite value"):
        quantizer.find_scale()
    assert quantizer.needs_calibration


def test_observers_are_copied_and_pickled() -> None:
    """INV-5: the artifact of a calibration can be kept and gives the same scale."""
    observer = observed(batches())
    for copied in (copy.deepcopy(observer), pickle.loads(pickle.dumps(observer))):
        assert torch.equal(copied.counts, observer.counts)
        scales = []
        for source in (observer, copied):
            quantizer = FakeQuantizer(SPEC)
            quantizer.observer = source
            quantizer.find_scale()
            scales.append(torch.as_tensor(quantizer.scale))
        assert torch.equal(*scales)


def test_observing_leaves_the_tensor_and_its_gradient_alone() -> None:
    quantizer = FakeQuantizer(SPEC)
    quantizer.observer = quantizer.new_observer()
    x = torch.randn(3, 4, requires_grad=True)
    before = x.detach().clone()
    out = quantizer(x)
    assert out is x
    assert torch.equal(x.detach(), before)
    assert quantizer.new_observer().momentum == 0.9
    assert FakeQuantizer(QuantizerSpec(Int(8), PerTensor(), Learned(MovingAverage(0.3)))).new_observer().momentum == 0.3
