"""Two CPU processes: DistributedDataParallel, fully_shard (FSDP2), and what is refused by name."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_qat import prepare
from tests.conversion import two_processes
from tests.conversion.cases import network
from tests.conversion.two_processes import LEARNED, WEIGHTS, batches, losses, start, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes found, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.conversion.two_processes", str(folder)]
    started = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=f"{name}: {got[name]} {value}")


@pytest.mark.parametrize("scenario", ["fsdp_trains", "ddp_trains"])
def test_trains_as_one_process(ranks: list[dict[str, Any]], scenario: str) -> None:
    """Gradients of the first step, scales included, and parameters after three steps."""
    expected = train(start(), slice(None))
    assert sum("quantizer" in name and bool(value.any()) for name, value in expected.items()) == 4
    for rank in ranks:
        assert_close({name.replace("module.", ""): value for name, value in rank[scenario].items()}, expected)


def test_older_fsdp_trains_as_one_process(ranks: list[dict[str, Any]]) -> None:
    expected = losses(start(), slice(None))
    for rank in ranks:
        torch.testing.assert_close(rank["older_fsdp_trains"]["losses"], expected)


@pytest.mark.parametrize("broadcast", [False, True])
def test_sharded_model_loads_checkpoints_of_both_kinds(ranks: list[dict[str, Any]], broadcast: bool) -> None:
    torch.manual_seed(7)
    plain = network()
    prepare(plain, WEIGHTS)
    trained = start(WEIGHTS)
    with torch.no_grad():
        trained[0].weight_quantizer.scale.mul_(1.5)
    for rank in ranks:
        found = rank["fsdp_from_checkpoints"]
        for kind, model in (("float", plain), ("quantized", trained)):
            torch.testing.assert_close(found[f"{kind} broadcast={broadcast}"], model(batches()[0]).detach())
            for name, parameter in model.named_parameters():
                if "scale" in name:
                    assert torch.equal(found[f"{kind} {name}"], parameter.detach())


def test_sharded_model_initialized_last(ranks: list[dict[str, Any]]) -> None:
    torch.manual_seed(7)
    model = network()
    prepare(model, WEIGHTS)
    for rank in ranks:
        found = rank["fsdp_initialized_after_sharding"]
        torch.testing.assert_close(found["first"], model(batches()[0]).detach())
        assert torch.equal(found["first"], found["second"])


@pytest.mark.parametrize(
    ("scenario", "case", "message"),
    [
        ("fsdp_refusals", "bf16", r"RuntimeError: 0\.weight: FSDP cannot shard torch\.bfloat16 .*bf16-mixed"),
        ("fsdp_refusals", "late", r"ValueError: 0\.weight: .* sharded already .* between building and fully_shard"),
        ("fsdp_refusals", "unprepare", r"RuntimeError: 0: its class was changed to FSDPLinear after prepare\(\)"),
        ("fsdp_refusals", "codes", r"ValueError: 0\.weight: the parameter is sharded .* not sharded"),
        ("fsdp_refusals", "bake", r"ValueError: 0\.weight: the parameter is sharded .* not sharded"),
        ("tensor_parallel_refusals", "after", r"RuntimeError: 0\.weight is a DTensor .* tensor parallelism .*FSDP2"),
        ("tensor_parallel_refusals", "before", r"ValueError: 0\.weight: the parameter is sharded already \(DTensor\)"),
    ],
)
def test_errors(ranks: list[dict[str, Any]], scenario: str, case: str, message: str) -> None:
    for rank in ranks:
        assert re.match(message, rank[scenario][case]), rank[scenario][case]


def test_every_parameter_has_a_gradient_while_quantization_is_off(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["ddp_with_float_weights"]
        assert {name for name, value in found.items() if not value.any()} == {
            name for name in found if "quantizer" in name
        }


def test_calibration_sees_the_data_of_all(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["calibrates"] for rank in ranks)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    torch.manual_seed(7)
    model = network()
    prepare(model, LEARNED)
    data = [(1 + 9 * rank) * batch[rank::2] for rank in range(2) for batch in batches()]
    two_processes.calibrate(model, data)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in first.items())
    assert first["0.input_quantizer.scale"].item() > 10 * 2 / 255
