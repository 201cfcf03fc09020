"""The format onnx: integers in the file, the trained numbers in ONNX Runtime."""

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_qat as qat
from lightning_qat.export import DamagedFileError, RefusedError, VerificationError, export
from lightning_qat.export.onnx import Onnx
from lightning_qat.export.source import read_source
from tests.export.models import MLP, MODELS, prepared, vectors

onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def reference(path: Path, name: str) -> Any:
    """The weight in NumPy, by the definition of DequantizeLinear."""
    model = onnx.load(str(path))
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    (node,) = (n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == f"{name}.codes")
    attributes = {each.name: each.i for each in node.attribute}
    codes, scale = constants[node.input[0]].astype(np.float32), constants[node.input[1]]
    zero = constants[node.input[2]].astype(np.float32) if len(node.input) > 2 else np.zeros_like(scale)
    if attributes.get("block_size"):
        scale, zero = (np.repeat(v, attributes["block_size"], attributes["axis"]) for v in (scale, zero))
    elif scale.ndim:
        shape = [-1 if axis == attributes.get("axis", 1) else 1 for axis in range(codes.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return constants[node.input[0]].dtype.name, (codes - zero) * scale


@pytest.mark.parametrize(("recipe", "kind"), [("int4", "int4"), ("int8", "int8"), ("seq2", "int4"), ("w8a8", "int8")])
def test_value(recipe: str, kind: str, tmp_path: Path) -> None:
    model = prepared(MLP, recipe)
    report = export(model, tmp_path / "model.onnx", format="onnx", batches=vectors())
    assert report.sqnr is not None
    assert report.sqnr > 100
    dtype, weight = reference(report.path, "up.weight")
    assert dtype == kind
    assert np.array_equal(weight, qat.codes(model)["up.weight"].dequantize().numpy())


@pytest.mark.parametrize("kind", ["attention", "convolution"])
def test_other_models(kind: str, tmp_path: Path) -> None:
    build, batches = MODELS[kind]
    report = export(prepared(build, "int8"), tmp_path / "model.onnx", format="onnx", batches=batches())
    assert report.sqnr is not None
    assert report.sqnr > 100
    assert report.agreement == 1


@pytest.mark.parametrize(
    "weight",
    [
        qat.QuantizerSpec(qat.Int(8, symmetric=False), qat.PerGroup(4)),
        qat.QuantizerSpec(qat.Int(4, symmetric=False), qat.PerChannel(), qat.AbsMax()),
        qat.QuantizerSpec(qat.HalfInt(8), qat.PerTensor()),
    ],
    ids=lambda spec: spec.label,
)
def test_groups_and_zero_points(weight: qat.QuantizerSpec, tmp_path: Path) -> None:
    """A transposed convolution in groups: its output dimension is the second."""

    def build() -> nn.Module:
        return nn.Sequential(nn.ConvTranspose2d(4, 6, 2), nn.Conv2d(6, 4, 2))

    batches = [torch.randn(2, 4, 5, 5)]
    model = prepared(build, qat.Recipe((qat.Rule("*", qat.LayerSpec(weight)),)))
    report = export(model, tmp_path / "model.onnx", format="onnx", batches=batches)
    assert report.sqnr is not None
    assert report.sqnr > 100


def test_static_and_dynamic_inputs(tmp_path: Path) -> None:
    weight = qat.QuantizerSpec(qat.Int(8), scale=qat.AbsMax())
    static = qat.QuantizerSpec(qat.Int(8, symmetric=False), qat.PerTensor(), qat.MinimumError())
    dynamic = qat.QuantizerSpec(qat.Int(8), qat.PerToken(), qat.AbsMax())
    recipe = qat.Recipe(
        (qat.Rule("up", qat.LayerSpec(weight, static)), qat.Rule("down", qat.LayerSpec(weight, dynamic)))
    )
    model = prepared(MLP, recipe)
    qat.calibrate(model, vectors())
    report = export(model, tmp_path / "model.onnx", format="onnx", batches=vectors())
    assert report.sqnr is not None
    assert report.sqnr > 100
    count = collections.Counter(node.op_type for node in onnx.load(str(report.path)).graph.node)
    assert (count["QuantizeLinear"], count["DequantizeLinear"]) == (2, 4)


@pytest.mark.parametrize("recipe", ["w8a8", "bitnet"])
def test_quantized_inputs_in_half_precision(recipe: str, tmp_path: Path) -> None:
    """QuantizeLinear takes an input and a scale of one type, and scales are float32."""
    model = prepared(lambda: MLP().half(), recipe)
    batches = [x.half() for x in vectors()]
    report = export(model, tmp_path / "model.onnx", format="onnx", batches=batches)
    assert report.sqnr is not None
    assert report.sqnr > 45
    count = collections.Counter(node.op_type for node in onnx.load(str(report.path)).graph.node)
    assert count["QuantizeLinear"] == 2


def test_dict_batches(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
            return {"logits": self.fc(x) - shift}

    batches = [{"shift": torch.randn(5, 4), "x": torch.randn(5, 8)}]  # another order than the forward's
    report = export(prepared(Two, "int4"), tmp_path / "model.onnx", format="onnx", batches=batches)
    assert report.sqnr is not None
    assert report.sqnr > 100


def test_size_and_privacy(tmp_path: Path) -> None:
    model = prepared(lambda: MLP(4096), "int4")
    report = export(model, tmp_path / "model.onnx", format="onnx", batches=vectors())
    rows = 4096 + 6
    assert report.num_bytes < 1.03 * (4096 * 38 / 2 + 8 * rows) + 3000
    assert str(Path(__file__).parents[2]).encode() not in report.path.read_bytes()


def test_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="opset=20 has no int4"):
        export(prepared(MLP, "int4"), tmp_path / "x", format="onnx", opset=20)
    with pytest.raises(RefusedError, match=r"up\.weight is torch\.float64"):
        export(prepared(lambda: MLP().double(), "int4"), tmp_path / "x", format="onnx")
    with pytest.raises(TypeError, match="no option optset; it has opset, accuracy_level, dynamic_dims"):
        export(prepared(MLP, "int4"), tmp_path / "x", format="onnx", optset=21)


def test_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(MLP, "int4")
    path = export(model, tmp_path / "model.onnx", format="onnx", batches=vectors()).path
    source = read_source(model)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match=r"model\.onnx: cannot be read as an ONNX model"):
        Onnx().read(path, source)


def test_another_weight_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_qat.export import onnx_weights

    def wrong(weight: qat.QuantizedTensor) -> onnx_weights.LinearCodes:
        codes = weight.codes.clone()
        codes[0, 0] = 1 - codes[0, 0].clamp(0, 1)
        return onnx_weights.linear_codes(
            qat.QuantizedTensor(codes, weight.scale, None, 0.0, weight.grid, weight.granularity, weight.layout)
        )

    monkeypatch.setattr("lightning_qat.export.onnx.linear_codes", wrong)
    with pytest.raises(VerificationError, match=r"weight: read back from format='onnx', it differs"):
        export(prepared(MLP, "int4"), tmp_path / "model.onnx", format="onnx", batches=vectors())
    assert list(tmp_path.iterdir()) == []
