"""The format torchao: its tensor classes hold our codes and scales."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_qat as qat
from lightning_qat.export import DamagedFileError, RefusedError, export
from lightning_qat.export.source import read_source
from lightning_qat.export.torchao import Torchao
from lightning_qat.quantization import recipes
from tests.export.models import MLP, TiedNet, prepared, vectors

torchao: Any = pytest.importorskip("torchao")


@pytest.mark.parametrize(
    "weight",
    [
        qat.QuantizerSpec(qat.Int(4), qat.PerGroup(8)),
        qat.QuantizerSpec(qat.Int(8), qat.PerTensor(), qat.AbsMax()),
        qat.QuantizerSpec(qat.Int(3, symmetric=False), qat.PerGroup(16)),
        qat.QuantizerSpec(qat.Int(8, symmetric=False), qat.PerChannel()),
        qat.QuantizerSpec(qat.HalfInt(7)),
        qat.QuantizerSpec(qat.Binary(), scale_dtype="bfloat16"),
        qat.QuantizerSpec(qat.Ternary()),
    ],
    ids=lambda spec: spec.label,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value(weight: qat.QuantizerSpec, dtype: torch.dtype, tmp_path: Path) -> None:
    model = prepared(lambda: MLP().to(dtype), qat.Recipe((qat.Rule("*", qat.LayerSpec(weight)),)))
    report = export(model, tmp_path / "model.pt", format="torchao", batches=[x.to(dtype) for x in vectors()])
    assert report.exact
    state = torch.load(report.path, weights_only=True)
    assert type(state["up.weight"]).__name__ == "IntxUnpackedToInt8Tensor"
    assert torch.equal(state["up.weight"].dequantize(), qat.codes(model)["up.weight"].dequantize())


def test_quantized_inputs(tmp_path: Path) -> None:
    model = prepared(MLP, "w8a8")
    report = export(model, tmp_path / "model.pt", format="torchao", batches=vectors())
    assert report.sqnr is not None
    assert report.sqnr > 35
    tensor = torch.load(report.path, weights_only=True)["up.weight"]
    assert type(tensor).__name__ == "Int8Tensor"
    assert torch.equal(tensor.qdata, qat.codes(model)["up.weight"].codes)


def test_integer_products(tmp_path: Path) -> None:
    """A layer that multiplies integer codes is a plain linear layer to torchao."""
    torch.manual_seed(0)
    model = MLP()
    qat.prepare(model, recipes.w8a8(), arithmetic="integer")
    report = export(model, tmp_path / "model.pt", format="torchao", batches=vectors())
    assert report.sqnr is not None
    assert report.sqnr > 35
    assert type(torch.load(report.path, weights_only=True)["up.weight"]).__name__ == "Int8Tensor"


def test_embedding(tmp_path: Path) -> None:
    spec = qat.LayerSpec(qat.QuantizerSpec(qat.Int(4)))

    def build() -> nn.Module:
        model = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 11, bias=False))
        model[1].weight = model[0].weight
        return model

    model = prepared(build, qat.Recipe((qat.Rule("*", spec, types=(nn.Embedding, nn.Linear)),)))
    report = export(model, tmp_path / "model.pt", format="torchao", batches=[torch.arange(11)[None]])
    assert report.exact


def test_refused(tmp_path: Path) -> None:
    token = qat.QuantizerSpec(qat.Int(8), qat.PerToken(), qat.AbsMax())
    grouped = qat.Recipe((qat.Rule("*", qat.LayerSpec(qat.QuantizerSpec(qat.Int(4), qat.PerGroup(8)), token)),))
    for build, recipe, reason in (
        (TiedNet, "int8", r"in_proj_weight: MultiheadAttention is no plain linear layer"),
        (MLP, "piq2", "up: torchao's tensors quantize inputs to"),
        (MLP, grouped, "where the weight has a scale per channel or tensor"),
        (MLP, qat.Recipe((qat.Rule("*", qat.LayerSpec(None, token)),)), "up: torchao's tensors quantize inputs to"),
        (MLP, qat.Recipe((qat.Rule("*", qat.LayerSpec(qat.QuantizerSpec(qat.HalfInt(8)))),)), "takes 9 bits"),
        (lambda: MLP().double(), "int4", "float64 is no dtype"),
    ):
        with pytest.raises(RefusedError, match=reason):
            export(prepared(build, recipe), tmp_path / "model.pt", format="torchao")


def test_damaged(tmp_path: Path) -> None:
    model = prepared(MLP, "int4")
    path = export(model, tmp_path / "model.pt", format="torchao").path
    source, data = read_source(model), path.read_bytes()
    for length in (0, 10, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedFileError, match="cannot be read as a state_dict of torchao tensors"):
            Torchao().read(path, source)
