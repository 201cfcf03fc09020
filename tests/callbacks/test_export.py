"""ExportCallback: a verified artifact at fit end, of the model as it stands then."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader, IterableDataset

import lightning_qat as qat
from lightning_qat.callbacks import ExportCallback
from lightning_qat.export import VerificationError, load
from lightning_qat.quantization import recipes
from tests.callbacks._models import FLAVORS, Net, data, fit, loader


@pytest.mark.parametrize(("pl", "net"), FLAVORS, ids=["lightning", "pytorch_lightning"])
def test_value(pl: ModuleType, net: Any, tmp_path: Path) -> None:
    model = net()
    made = fit(
        model, qat.QATCallback(recipes.w4a8()), ExportCallback("out/model.safetensors"), pl=pl, val=loader(),
        default_root_dir=tmp_path,
    )  # fmt: skip
    report = (tmp_path / "out" / "model.safetensors.report.json").read_text()
    assert '"exact": true' in report
    assert '"num_batches": 1' in report
    fresh = load(tmp_path / "out" / "model.safetensors", net(seed=1))
    x = data().tensors[0]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert made.callback_metrics["val_loss"].isfinite()


def test_training_is_as_without_it(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [ExportCallback(tmp_path / "model.safetensors")]):
        model = Net()
        fit(model, qat.QATCallback(recipes.int4()), *callbacks, train=loader(shuffle=True), max_epochs=2)
        states.append((model.state_dict(), torch.get_rng_state(), model.training))
    assert all(torch.equal(states[0][0][name], value) for name, value in states[1][0].items())
    assert torch.equal(states[0][1], states[1][1])
    assert states[0][2] == states[1][2]


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model:UserWarning")
def test_averaged_weights_are_exported(tmp_path: Path) -> None:
    model = Net()
    average = EMAWeightAveraging(decay=0.5)
    fit(model, qat.QATCallback(recipes.int8()), average, ExportCallback(tmp_path / "model.safetensors"))
    loaded = load(tmp_path / "model.safetensors", Net())
    assert torch.equal(loaded.head.weight, qat.bake(model).head.weight)


def test_another_format(tmp_path: Path) -> None:
    callback = ExportCallback(tmp_path / "model.pt2", format="pt2", dynamic_dims=(0,))
    fit(Net(), qat.QATCallback(recipes.int4()), callback)
    out = torch.export.load(tmp_path / "model.pt2").module()(torch.randn(5, 6))
    assert out.shape == (5, 3)


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    fit(Net(), qat.QATCallback(recipes.int4()), ExportCallback(tmp_path / "model.safetensors"), fast_dev_run=True)
    assert not list(tmp_path.glob("*.safetensors"))


class Once(IterableDataset[Any]):
    """A stream that is used up by reading it."""

    def __init__(self) -> None:
        self.samples: Iterator[Any] = iter(data())

    def __iter__(self) -> Iterator[Any]:
        return self.samples


def test_data_that_can_be_read_once(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="ExportCallback: the data can be read only once"):
        fit(Net(), qat.QATCallback(recipes.int4()), ExportCallback(path), train=DataLoader(Once(), 8))
    fit(Net(), qat.QATCallback(recipes.int4()), ExportCallback(path, num_batches=0), train=DataLoader(Once(), 8))
    assert path.exists()
    path.unlink()
    callback = ExportCallback(path, dataloader=loader(), forward=lambda module, batch: module(batch[0]))
    fit(Net(), qat.QATCallback(recipes.int4()), callback, train=DataLoader(Once(), 8))
    assert path.exists()


def test_a_failed_proof_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_qat.export.report.Comparison.sqnr", 3.0)
    with pytest.raises(VerificationError, match=r"3\.0 dB"):
        fit(Net(), qat.QATCallback(recipes.int4()), ExportCallback(tmp_path / "model.safetensors"))
    assert not list(tmp_path.iterdir())


def test_repr() -> None:
    callback = ExportCallback("a/b.pt2", format="pt2", num_batches=2, dynamic_dims=(0, 1))
    assert repr(callback) == "ExportCallback('a/b.pt2', format='pt2', num_batches=2, dynamic_dims=(0, 1))"
    assert repr(eval(repr(callback))) == repr(callback)
    assert callback.state_dict() == {}


def test_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_batches=-1 is not allowed"):
        ExportCallback("x", num_batches=-1)
    with pytest.raises(ValueError, match="format='onx' is unknown"):
        ExportCallback("x", format="onx")
    with pytest.raises(TypeError, match="has no option bits"):
        ExportCallback("x", bits=4)
    with pytest.raises(ValueError, match="Net is neither prepared nor baked"):
        fit(Net(), ExportCallback(tmp_path / "x"))
