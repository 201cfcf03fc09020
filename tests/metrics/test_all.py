"""What holds for every metric: its value, accumulation, reset, pickling, state_dict, two ranks."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics import Metric, MetricCollection

from lightning_qat import metrics
from tests.metrics.cases import CASES, PAIRS, Case

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
ROOT = Path(__file__).parents[2]


def fresh(case: Case) -> Metric:
    metric = getattr(metrics, case.name)(**dict(case.arguments))
    assert isinstance(metric, Metric)
    return metric


def updated(case: Case, calls: Any = None) -> Metric:
    metric = fresh(case)
    for args, kwargs in case.updates if calls is None else calls:
        metric.update(*args, **kwargs)
    return metric


def plain(value: Any) -> Any:
    return {key: entry.item() for key, entry in value.items()} if isinstance(value, dict) else value.item()


def test_every_metric_has_a_case() -> None:
    classes = {name for name in metrics.__all__ if isinstance(getattr(metrics, name), type)} - {"OscillationState"}
    assert {case.name for case in CASES} == classes


@each_case
def test_value(case: Case) -> None:
    """Float32 sums against float64: 1e-5 is more than they lose over six updates."""
    assert plain(updated(case).compute()) == pytest.approx(case.reference(case.updates), rel=1e-5)
    assert plain(updated(case, case.updates[:2]).compute()) == pytest.approx(case.reference(case.updates[:2]), rel=1e-5)


@each_case
def test_reset(case: Case) -> None:
    metric = updated(case, case.updates[1:])
    metric.reset()
    for args, kwargs in case.updates:
        metric.update(*args, **kwargs)
    assert plain(metric.compute()) == plain(updated(case).compute())


@each_case
def test_copies_continue(case: Case) -> None:
    """A pickled, a deep-copied and a reloaded metric go on where the original stood."""
    half = updated(case, case.updates[:2])
    half.persistent(True)
    reloaded = fresh(case)
    reloaded.persistent(True)
    reloaded.load_state_dict(half.state_dict())
    if case.name != "ScaleSummary":  # torchmetrics gives lists back as they were, and copies no update count
        assert set(half.state_dict()) == set(half.metric_state)
    for twin in (pickle.loads(pickle.dumps(half)), copy.deepcopy(half), reloaded):
        for args, kwargs in case.updates[2:]:
            twin.update(*args, **kwargs)
        assert plain(twin.compute()) == plain(updated(case).compute())


@each_case
def test_states_are_not_in_checkpoints_unless_asked(case: Case) -> None:
    assert not updated(case).state_dict()


@each_case
def test_attributes(case: Case) -> None:
    metric = fresh(case)
    assert metric.is_differentiable is False
    assert metric.full_state_update is (case.name in {"FlipRate", "OscillationRate"})
    assert not list(metric.parameters())
    assert repr(metric) == f"{case.name}()"


@each_case
def test_no_graph_is_kept(case: Case) -> None:
    def attached(value: Any) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.clone().requires_grad_() if is_float else value

    metric = fresh(case)
    for args, kwargs in case.updates:
        metric.update(*map(attached, args), **{key: attached(value) for key, value in kwargs.items()})
    for name in metric.metric_state:
        state = getattr(metric, name)
        assert not any(entry.requires_grad for entry in (state if isinstance(state, list) else [state]))


@each_case
def test_inference_mode_and_training_mix(case: Case) -> None:
    metric = fresh(case)
    with torch.inference_mode():
        metric.reset()
    args, kwargs = case.updates[0]
    metric.update(*args, **kwargs)
    with torch.inference_mode():
        args, kwargs = case.updates[1]
        metric.update(*args, **kwargs)
    for args, kwargs in case.updates[2:]:
        metric.update(*args, **kwargs)
    assert plain(metric.compute()) == plain(updated(case).compute())


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_in_float32(case: Case, dtype: torch.dtype) -> None:
    def cast(value: Any, to: torch.dtype) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(to) if is_float else value

    def all_cast(calls: Any, to: torch.dtype) -> Any:
        return [([cast(x, to) for x in args], {key: cast(x, to) for key, x in kw.items()}) for args, kw in calls]

    halves = all_cast(case.updates, dtype)
    wide = all_cast(halves, torch.float32)
    assert plain(updated(case, halves).compute()) == plain(updated(case, wide).compute())


@each_case
def test_nothing_waits_for_the_device(case: Case) -> None:
    """On the meta device nothing can look at data, as nothing may that has to wait for an accelerator."""

    def meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    metric = fresh(case).to("meta")
    for args, kwargs in case.updates:
        metric.update(*map(meta, args), **{key: meta(value) for key, value in kwargs.items()})
    value = metric.compute()
    assert all(x.is_meta for x in (value.values() if isinstance(value, dict) else [value]))


def test_functions_keep_no_graph() -> None:
    x = torch.tensor([0.5, -1.5], requires_grad=True)
    results = [
        metrics.sqnr(x, x + 1),
        metrics.relative_error(x, x + 1),
        metrics.quantization_mse(x, x + 1),
        metrics.clip_rate(x, scale=1.0, lo=-1, hi=1),
        metrics.level_entropy(x, lo=-1.5, num_levels=4),
        metrics.zero_rate(x),
        metrics.gradient_norm(x),
        metrics.flip_rate(x, x),
        *metrics.scale_summary(x).values(),
        *metrics.start_oscillation(x),
    ]
    assert not any(result.requires_grad for result in results)


def test_a_collection_computes_the_sums_once() -> None:
    """Measures of error share their states, so torchmetrics updates one of them."""
    collection = MetricCollection([metrics.SQNR(), metrics.RelativeError(), metrics.QuantizationMSE()])
    for args, _ in PAIRS:
        collection.update(*args)
    assert len(collection.compute_groups) == 1
    values = collection.compute()
    for case in CASES[:3]:
        assert values[case.name].item() == pytest.approx(case.reference(case.updates), rel=1e-5)


def test_two_ranks(tmp_path: Path) -> None:
    """Two processes that each saw half of the data say what one says that saw all of it, and keep their own states."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.metrics.two_processes", str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], errors
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case in CASES:
        expected = plain(updated(case).compute())
        for result in results:
            assert plain(result[case.name]) == pytest.approx(expected, rel=1e-6), case.name
        if not case.history:
            assert results[0][f"{case.name} unsynced"] != results[1][f"{case.name} unsynced"]
