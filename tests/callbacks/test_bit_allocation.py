"""BitAllocation: the grids that data ask for, without a trace elsewhere; checkpoints, resuming, and what it shows."""

import copy
import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import lightning_qat
from lightning_qat import (
    BitAllocation,
    Calibration,
    Distillation,
    FisherError,
    Int,
    LossChange,
    OutputDivergence,
    ProgressiveBitWidth,
    QATCallback,
    QuantizationStatistics,
    Ternary,
    bake,
    codes,
    load_checkpoint,
    prepare,
    recipes,
)
from lightning_qat.callbacks import bit_allocation
from lightning_qat.conversion import Allocation
from lightning_qat.conversion.allocate import find_allocation
from lightning_qat.conversion.regrid import regrid
from tests.callbacks._models import (
    FLAVORS,
    LEARNED_INPUTS,
    Net,
    StatefulLoader,
    assert_equal_states,
    fake_quantizers,
    fit,
    loader,
    state,
    trainer,
)


def grids(model: Any, *, inputs: bool = False) -> dict[str, str]:
    return {
        name.split(".")[0]: quantizer.grid.label
        for name, quantizer in fake_quantizers(model).items()
        if ("input" in name) == inputs
    }


def batches(num: int = 4) -> list[Tensor]:
    return [x for x, _ in itertools.islice(loader(), num)]


def allocated(average: float = 3.0, **options: Any) -> Allocation:
    """What data ask for, found by hand."""
    model = Net()
    prepare(model, recipes.int4())
    return find_allocation(model, options.pop("batches", batches()), average_bits=average, **options)


@pytest.mark.parametrize(("pl", "kind"), FLAVORS)
def test_layers_get_the_widths_that_the_data_ask_for(pl: ModuleType, kind: type[Any]) -> None:
    callback, model = BitAllocation(3.0), kind()
    fit(model, QATCallback(), callback, pl=pl, max_steps=0)
    assert callback.allocation == allocated()
    assert callback.allocation.average_bits <= 3
    expected = {name: grid.label for name, grid in allocated().grids.items()}
    assert grids(model) == expected
    assert set(expected.values()) != {"int4"}
    by_hand = Net()
    prepare(by_hand, recipes.int4())
    for name, grid in allocated().grids.items():
        regrid(by_hand, grid, match=name)
    assert_equal_states(state(model), state(by_hand))


def test_training_goes_on_as_if_the_grids_had_been_there(tmp_path: Path) -> None:
    """Nothing is left in random numbers, the order of the data, or the model."""
    chosen = allocated(2.5, candidates=(Ternary(), 2, 4)).grids
    shuffled = {"train": loader(shuffle=True), "max_epochs": 2}
    torch.manual_seed(3)
    with_callback = Net()
    fit(with_callback, QATCallback(), BitAllocation(2.5, (Ternary(), 2, 4), dataloader=loader()), **shuffled)
    torch.manual_seed(3)
    by_hand = Net()
    prepare(by_hand, recipes.int4())
    for name, grid in chosen.items():
        regrid(by_hand, grid, match=name)
    fit(by_hand, QATCallback(), **shuffled | {"train": loader(shuffle=True)})
    assert_equal_states(state(with_callback), state(by_hand))


def test_inputs_keep_their_grids_and_are_calibrated_afterwards() -> None:
    model = Net()
    fit(model, QATCallback(LEARNED_INPUTS), BitAllocation(3.0), Calibration(), max_epochs=1)
    assert set(grids(model, inputs=True).values()) == {"int8"}
    assert set(grids(model).values()) != {"int4"}


@pytest.mark.parametrize("sensitivity", [LossChange(), FisherError()])
def test_the_loss_is_that_of_the_training_step_alone(sensitivity: Any) -> None:
    """Also where a teacher adds its own, and with quantities logged inside."""
    callback = BitAllocation(3.0, sensitivity=sensitivity)
    fit(Net(), QATCallback(), Distillation(), callback, max_steps=0)
    pairs = list(loader())
    expected = allocated(
        sensitivity=sensitivity, batches=pairs, forward=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
    )
    assert callback.allocation == expected


def test_a_function_data_and_number_of_batches_of_its_own() -> None:
    domains = {"a": loader(16), "b": [(10 * x, y) for x, y in loader(8)]}
    callback = BitAllocation(3.0, num_batches=2, dataloader=domains, forward=lambda module, batch: module(2 * batch[0]))
    fit(Net(), QATCallback(), callback, max_steps=0)
    first = batches(2)
    assert callback.allocation == allocated(batches=[2 * first[0], 20 * first[0], 2 * first[1]])


def test_parts_of_a_model() -> None:
    model = Net()
    head, first = BitAllocation(2.0, (2, 8), match="head"), BitAllocation(8.0, (4, 8), match="first")
    fit(model, QATCallback(), head, first, max_steps=0)
    assert grids(model) == {"first": "int8", "head": "int2"}
    assert head.state_key != first.state_key


def saved_run(folder: Path, num_epochs: int = 1) -> tuple[Any, Path]:
    """A trained module and its checkpoint."""
    model = Net()
    made = fit(model, QATCallback(), BitAllocation(2.5, (Ternary(), 2, 4)), max_epochs=num_epochs)
    made.save_checkpoint(folder / f"{num_epochs}.ckpt")
    return model, folder / f"{num_epochs}.ckpt"


def refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("allocated again")


def test_a_resumed_run_keeps_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = saved_run(tmp_path, 2)
    checkpoint = saved_run(tmp_path)[1]
    monkeypatch.setattr(bit_allocation, "find_allocation", refuse)
    resumed, callback = Net(seed=1), BitAllocation(2.5, (Ternary(), 2, 4))
    fit(resumed, QATCallback(), callback, max_epochs=2, ckpt=checkpoint)
    assert callback.allocation == allocated(2.5, candidates=(Ternary(), 2, 4))
    assert_equal_states(state(resumed), state(whole))
    with pytest.warns(UserWarning, match=r"average_bits=4 is given, but the checkpoint was allocated for 2.5, which"):
        fit(Net(), QATCallback(), BitAllocation(4.0), max_epochs=2, ckpt=checkpoint)


def test_resuming_mid_epoch(tmp_path: Path) -> None:
    def run(model: Any, max_steps: int, ckpt: Path | None = None) -> Any:
        train = StatefulLoader(list(loader(64)))
        return fit(model, QATCallback(), BitAllocation(3.0), train=train, max_steps=max_steps, max_epochs=-1, ckpt=ckpt)

    run(Net(), 3).save_checkpoint(tmp_path / "a.ckpt")
    whole, resumed = Net(), Net(seed=1)
    run(whole, 6)
    run(resumed, 6, tmp_path / "a.ckpt")
    assert_equal_states(state(resumed), state(whole))


def test_checkpoints_and_codes_hold_the_grids(tmp_path: Path) -> None:
    trained, last = saved_run(tmp_path)
    expected = grids(trained)
    assert torch.load(last, weights_only=True)["lightning_qat"]["grids"]["head.weight_quantizer"][1] < 4
    loaded = load_checkpoint(Net(seed=1), last, quantized=True)
    assert grids(loaded) == expected
    assert_equal_states(state(loaded), state(trained))
    found = {name.split(".")[0]: tensor.grid.label for name, tensor in codes(bake(loaded)).items()}
    assert found == expected
    tested = Net(seed=1)
    trainer(QATCallback(), BitAllocation(3.0)).test(tested, loader(), str(last), verbose=False)
    assert_equal_states(state(tested), state(trained))


def test_exports_hold_the_grids(tmp_path: Path) -> None:
    from lightning_qat import ExportCallback
    from lightning_qat.export import load

    model = Net()
    fit(model, QATCallback(), BitAllocation(2.5, (Ternary(), 2, 4)), ExportCallback(tmp_path / "a.safetensors"))
    fresh = Net(seed=1)
    load(tmp_path / "a.safetensors", fresh)
    assert {name.split(".")[0]: t.grid.label for name, t in codes(fresh).items()} == grids(model)
    x = batches(1)[0]
    assert torch.equal(fresh(x), bake(model)(x))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    fit(Net(), QATCallback(), max_epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="a checkpoint of a run without BitAllocation"):
        fit(Net(), QATCallback(), BitAllocation(3.0), max_epochs=2, ckpt=tmp_path / "plain.ckpt")


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_averages_get_the_grids() -> None:
    average = EMAWeightAveraging(decay=0.5)
    model = Net()
    fit(model, QATCallback(), average, BitAllocation(2.5, (Ternary(), 2, 4)), max_epochs=1)
    present = {q.grid.label for q in fake_quantizers(average._average_model).values()}
    assert present == set(grids(model).values())


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.filterwarnings("ignore:QuantizationStatistics. .* of the (values lie outside|scales have collapsed)")
def test_all_together_resumes_bit_for_bit(tmp_path: Path) -> None:
    def run(seed: int = 0, ckpt: Path | None = None) -> Any:
        model = Net(seed=seed)
        callbacks = [
            QATCallback(LEARNED_INPUTS), BitAllocation(2.5, (Ternary(), 2, 4)), Calibration(1), Distillation(),
            QuantizationStatistics(1), EMAWeightAveraging(decay=0.5),
            ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False),
        ]  # fmt: skip
        fit(model, *callbacks, max_epochs=2, logger=CSVLogger(tmp_path), log_every_n_steps=1, ckpt=ckpt)
        return model

    whole, resumed = run(), run(1, tmp_path / "epoch=0.ckpt")
    assert grids(resumed) == grids(whole)
    assert_equal_states(state(resumed), state(whole))


def test_two_processes_choose_alike_from_the_data_of_both(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PL_", "LOCAL_RANK"))}
    command = [sys.executable, "-m", "tests.callbacks._two_processes", "bits", str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (Allocation.load(tmp_path / f"bits{rank}.json") for rank in range(2))
    assert first == second
    assert first.chosen == allocated().chosen
    torch.testing.assert_close(torch.tensor(first.sensitivities), torch.tensor(allocated().sensitivities))
    for when in ("start", "end"):
        states = [torch.load(tmp_path / f"{when}{rank}.pt", weights_only=True) for rank in range(2)]
        assert_equal_states(*states)


# --- what it shows ---------------------------------------------------------------------------------------------------


def test_table_and_figure_are_logged_and_written(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, name="", version="run"), CSVLogger(tmp_path, name="", version="csv")]
    callback = BitAllocation(3.0, (2, 3, 4), path="tables/bits.json")
    fit(Net(), QATCallback(), callback, QuantizationStatistics(1), logger=loggers, log_every_n_steps=1,
        default_root_dir=tmp_path)  # fmt: skip
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0, "images": 0, "scalars": 0})
    events.Reload()
    assert "quantization/allocation" in events.Tags()["images"]
    text = events.Tensors("quantization/allocation/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("| layer | weights | int2 | int3 | int4 | chosen |\n| --- |")
    assert "| first | 48 |" in text
    assert callback.allocation is not None
    assert events.Scalars("quantization/allocation/average_bits")[0].value == pytest.approx(
        callback.allocation.average_bits
    )
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["quantization/allocation/head/bits"]) in (2, 3, 4)
    assert float(row["quantization/allocation/head/sensitivity_int2"]) == callback.allocation.sensitivities[1][0]
    assert Allocation.load(tmp_path / "tables" / "bits.json") == callback.allocation
    assert (tmp_path / "tables" / "bits.png").stat().st_size > 1000


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    fit(Net(), QATCallback(), BitAllocation(3.0, path=tmp_path / "bits.json"), fast_dev_run=1)
    assert list(tmp_path.iterdir()) == []


def test_figures_of_what_has_no_logarithm() -> None:
    found = allocated()
    flat = Allocation(found.layers, found.num_weights, found.specs, ((0.0,) * 4, (-1.0,) * 4), (0, 0), 3.0, "none")
    assert bit_allocation.draw_allocation(flat).axes[0].get_title().startswith("none; chosen: 2.00 bits")


@pytest.mark.parametrize(
    "callback",
    [
        BitAllocation(3.0),
        BitAllocation(2, (1, Ternary(), 4), num_batches=2, sensitivity=FisherError(), match="head", path="a.json"),
        BitAllocation(3.0, [2, 4], sensitivity=OutputDivergence(1)),
    ],
)
def test_prints_and_copies(callback: BitAllocation) -> None:
    again = eval(repr(callback), vars(lightning_qat))
    assert repr(again) == repr(callback) == repr(copy.deepcopy(callback))
    model = Net()
    fit(model, QATCallback(), copy.deepcopy(callback) if callback.sensitivity != OutputDivergence(1) else again,
        max_steps=0)  # fmt: skip
    assert grids(model)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"average_bits": 9}, ValueError, "BitAllocation: average_bits=9 is not allowed"),
        ({"candidates": (2,)}, ValueError, "BitAllocation: candidates=.* two or more"),
        ({"candidates": (2, "4")}, TypeError, "BitAllocation: candidates: '4' is neither"),
        ({"candidates": 4}, TypeError, "BitAllocation: candidates=4 is not a list"),
        ({"candidates": (2, 16)}, ValueError, "BitAllocation: candidates: 16 bits are not allowed; choose 1 to 8"),
        ({"sensitivity": OutputDivergence}, TypeError, "BitAllocation: sensitivity=<class .* is not a Sensitivity"),
        ({"candidates": (2, recipes.int8())}, TypeError, r"a recipe is no candidate here, .* QATCallback\(recipe\)"),
        ({"num_batches": 0}, ValueError, "BitAllocation: num_batches=0 is not allowed; choose a positive integer"),
        ({"dataloader": {}}, ValueError, "BitAllocation: dataloader={} is empty"),
        ({"dataloader": 3}, TypeError, "BitAllocation: dataloader=3 cannot be iterated"),
    ],
)
def test_errors_at_construction(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        BitAllocation(**{"average_bits": 3.0} | arguments)


class ByHand(Net):
    """Optimizes by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("model", "callbacks", "message"),
    [
        (Net, [BitAllocation(3.0)], "BitAllocation: the model is not prepared; add QATCallback"),
        (Net, [QATCallback(), BitAllocation(1.5)], "BitAllocation: average_bits=1.5 cannot be reached"),
        (
            Net,
            [QATCallback(), BitAllocation(3.0, (2, Int(4, symmetric=False)))],
            "BitAllocation: first.weight: cannot change",
        ),
        (Net, [QATCallback(), BitAllocation(3.0, match="x")], "BitAllocation: match='x' matches no quantized layer"),
        (Net, [QATCallback(), BitAllocation(3.0, dataloader=[])], "BitAllocation: no batches were given"),
        (Net, [QATCallback(), BitAllocation(3.0, dataloader=[{"x": 1}])], "cannot tell how to run Net .*pass forward="),
        (
            Net,
            [QATCallback(), BitAllocation(3.0), ProgressiveBitWidth({0: 8, 1: 4}, match="head")],
            "match='\\*' and match='head' of another callback both set head",
        ),
        (ByHand, [QATCallback(), BitAllocation(3.0, sensitivity=LossChange())], "training_step optimizes by hand"),
    ],
)
def test_errors_at_fit_start(model: Any, callbacks: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(model(), *callbacks, max_steps=1)


def test_data_that_can_be_read_once() -> None:
    with pytest.raises(ValueError, match=r"BitAllocation: the training data can be read only once, .*dataloader="):
        fit(Net(), QATCallback(), BitAllocation(3.0), train=iter(list(loader())), limit_train_batches=1)


def test_a_second_run_allocates_anew() -> None:
    callback = BitAllocation(3.0)
    fit(Net(), QATCallback(), callback, max_steps=0)
    first = callback.allocation
    other = Net(seed=5)
    fit(other, QATCallback(), callback, train=[(x, y) for x, y in loader(batch_size=4)], max_steps=0)
    assert callback.allocation != first
