"""Flips and oscillations, against loops over the codes of each weight."""

import pytest
import torch
from torch import Tensor

from lightning_qat import metrics
from tests.metrics.cases import frequencies


def path(seed: int, steps: int = 60, shape: tuple[int, ...] = (4, 5)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (steps, *shape), generator=generator).cumsum(0).clamp(-8, 7)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("momentum", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("halves", [False, True])
def test_frequency(seed: int, momentum: float, halves: bool) -> None:
    codes = path(seed) + 0.5 if halves else path(seed).to(torch.int8)
    state = metrics.start_oscillation(codes[0])
    for step in codes[1:]:
        state = metrics.track_oscillation(state, step, momentum=momentum)
    expected = torch.tensor(frequencies(codes.numpy(), momentum)).reshape(4, 5)
    torch.testing.assert_close(state.frequency.double(), expected, rtol=1e-5, atol=1e-7)
    assert expected.max() > 0
    assert state.frequency.element_size() + state.codes.element_size() + state.direction.element_size() == 7


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 1, 0, 1, 0], 3),  # the first change has no direction to oppose
        ([0, 1, 2, 3, 4], 0),  # a drift is no oscillation
        ([0, 1, 1, 1, 0], 1),  # pauses do not hide the turn
        ([0, 0, 0, 0, 0], 0),
        ([0, 3, -2, 3, 3], 2),  # steps of any size
        ([-128, 127, -128, 127, -128], 3),  # the widest codes do not overflow
    ],
)
def test_events(codes: list[int], expected: int) -> None:
    state = metrics.start_oscillation(torch.tensor(codes[:1]))
    events = 0.0
    for code in codes[1:]:
        state = metrics.track_oscillation(state, torch.tensor([code]), momentum=1.0)
        events += state.frequency.item()
    assert events == expected


def test_the_state_is_not_written_to() -> None:
    state = metrics.start_oscillation(torch.tensor([0, 1]))
    before = [x.clone() for x in state]
    metrics.track_oscillation(state, torch.tensor([1, 0]))
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))


def test_rates() -> None:
    assert metrics.oscillation_rate(torch.tensor([0.0, 0.005, 0.0051, 1.0])).item() == 0.5
    assert metrics.oscillation_rate(torch.tensor([0.0, 0.2]), threshold=0.5).item() == 0
    assert metrics.flip_rate(torch.tensor([1, 2, 3]), torch.tensor([1, 0, 0])).item() == pytest.approx(2 / 3)


def test_a_sample_is_drawn_once_for_all_runs() -> None:
    sample = metrics.sample_indices(100_000, 50, seed=3)
    assert sample is not None
    assert torch.equal(sample, metrics.sample_indices(100_000, 50, seed=3))  # type: ignore[arg-type]
    assert not torch.equal(sample, metrics.sample_indices(100_000, 50, seed=4))  # type: ignore[arg-type]
    assert len(set(sample.tolist())) == 50
    assert sample.tolist() == sorted(sample.tolist())
    assert 0 <= sample.min() < sample.max() < 100_000
    assert metrics.sample_indices(50, 50) is None
    assert metrics.sample_indices(50, None) is None


def test_drawing_a_sample_leaves_the_generators_alone() -> None:
    before = torch.get_rng_state()
    metrics.OscillationRate(num_weights=10_000, sample_size=10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["FlipRate", "OscillationRate"])
def test_a_sampled_metric_watches_its_sample(name: str) -> None:
    codes = path(5, shape=(30, 10))
    sampled = getattr(metrics, name)(num_weights=300, sample_size=40, seed=2)
    index = metrics.sample_indices(300, 40, seed=2)
    assert index is not None
    whole = getattr(metrics, name)(num_weights=40, sample_size=None)
    for step in codes:
        sampled.update(step)
        whole.update(step.flatten()[index.long()])
    assert sampled.compute().item() == whole.compute().item() > 0


@pytest.mark.parametrize(("name", "per_weight"), [("FlipRate", 4), ("OscillationRate", 14)])
def test_memory(name: str, per_weight: int) -> None:
    """As documented: states and torchmetrics' copies of their defaults, plus 4 bytes for the index of a sample."""

    def size(sample_size: int | None) -> int:
        metric = getattr(metrics, name)(num_weights=100_000, sample_size=sample_size)
        metric.update(torch.zeros(100_000, dtype=torch.int8))
        held = [getattr(metric, state) for state in metric.metric_state]
        held += list(metric._defaults.values()) + list(metric.buffers())
        return sum(x.numel() * x.element_size() for x in held)

    scalars = 32 if name == "FlipRate" else 0
    assert size(None) == 100_000 * per_weight + scalars
    assert size(1000) == 1000 * (per_weight + 4) + scalars


def test_before_there_is_anything_to_compare() -> None:
    metric = metrics.FlipRate(num_weights=3)
    metric.update(torch.tensor([1, 2, 3]))
    assert metric.compute().isnan()
    oscillation = metrics.OscillationRate(num_weights=3)
    oscillation.update(torch.tensor([1, 2, 3]))
    assert oscillation.compute().item() == 0


def test_errors() -> None:
    for momentum in (0.0, 1.5, -0.1):
        with pytest.raises(ValueError, match="expected 0 < momentum <= 1"):
            metrics.OscillationRate(num_weights=3, momentum=momentum)
        with pytest.raises(ValueError, match="expected 0 < momentum <= 1"):
            metrics.track_oscillation(metrics.start_oscillation(torch.zeros(2)), torch.zeros(2), momentum=momentum)
    with pytest.raises(ValueError, match=r"codes has shape \[3\], the state has shape \[2\]"):
        metrics.track_oscillation(metrics.start_oscillation(torch.zeros(2)), torch.zeros(3))
    with pytest.raises(ValueError, match=r"previous has shape \[2\], codes has shape \[3\]"):
        metrics.flip_rate(torch.zeros(2), torch.zeros(3))
    for name in ("FlipRate", "OscillationRate"):
        with pytest.raises(ValueError, match=r"codes has shape \[4\]; the metric was made for num_weights=3"):
            getattr(metrics, name)(num_weights=3).update(torch.zeros(4))
        for sizes in ((0, None), (3, 0)):
            with pytest.raises(ValueError, match="expected at least 1 of each"):
                getattr(metrics, name)(num_weights=sizes[0], sample_size=sizes[1])
