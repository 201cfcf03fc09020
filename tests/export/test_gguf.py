"""The format GGUF: our codes in its blocks, read back by the package's own dequantization."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lightning_qat as qat
from lightning_qat.export import DamagedFileError, RefusedError, export
from lightning_qat.export.gguf import Gguf
from lightning_qat.export.source import read_source
from lightning_qat.quantization import recipes
from tests.export.models import MLP, ConvNet, prepared, vectors

gguf: Any = pytest.importorskip("gguf")


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 7))


def stored(path: Path) -> dict[str, tuple[str, Any]]:
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type)) for t in tensors}


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        (recipes.int4(32, "float16"), "Q4_0"),
        (recipes.int4(64, "float16"), "Q4_0"),
        (recipes.int4(None, "float16"), "Q4_0"),
        (recipes.int8(32, "float16"), "Q8_0"),
        (recipes.int2(32, "float16"), "Q4_0"),
        (recipes.seq2(32, "float16"), "Q4_0"),
        (recipes.binary(32, "float16"), "Q4_0"),
        (recipes.ternary(32, "float16"), "Q4_0"),
        (recipes.ternary(256, "float16"), "TQ2_0"),
    ],
)
def test_value(recipe: qat.Recipe, kind: str, tmp_path: Path) -> None:
    only_first = qat.Recipe((qat.Rule("2", None), *recipe.rules))
    model = prepared(wide, only_first)
    x = [torch.randn(3, 512)]
    report = export(model, tmp_path / "model.gguf", format="gguf", batches=x)
    assert report.exact
    found = stored(report.path)
    assert found["0.weight"][0] == kind
    assert np.array_equal(found["0.weight"][1], qat.codes(model)["0.weight"].dequantize().numpy())
    assert np.array_equal(found["2.weight"][1], model[2].weight.detach().numpy())
    assert found["2.weight"][0] == "F32"


@pytest.mark.parametrize(("ternary", "bits"), [("TQ1_0", 1.6875), ("TQ2_0", 2.0625)])
def test_ternary(ternary: str, bits: float, tmp_path: Path) -> None:
    model = prepared(lambda: nn.Sequential(nn.Linear(1024, 64, bias=False)), recipes.ternary(256, "float16"))
    path = export(model, tmp_path / "model.gguf", format="gguf", ternary=ternary).path
    kind, values = stored(path)["0.weight"]
    assert kind == ternary
    assert np.array_equal(values, qat.codes(model)["0.weight"].dequantize().numpy())
    overhead = path.stat().st_size - 1024 * 64 * bits / 8
    assert 0 < overhead < 1200


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = prepared(lambda: MLP().to(dtype), recipes.int4(32, "float16"))
    report = export(model, tmp_path / "model.gguf", format="gguf", batches=[x.to(dtype) for x in vectors()])
    assert report.exact
    assert stored(report.path)["up.bias"][0] == ("BF16" if dtype == torch.bfloat16 else "F16")


@pytest.mark.parametrize(
    ("build", "recipe", "reason"),
    [
        (MLP, recipes.int4(32), r"up\.weight: its scales are not representable in float16; train with group_size=32"),
        (
            MLP,
            recipes.int4(16, "float16"),
            r"shape \(64, 32\) with scales per group16 does not divide into blocks of 32",
        ),
        (MLP, recipes.w4a8(32, "float16"), "up transforms or quantizes its input, which GGUF cannot say"),
        (MLP, recipes.piq3(32, "float16"), "not representable in float16"),
        (ConvNet, recipes.int8(None, "float16"), r"conv\.weight: a weight of shape \(8, 2, 3, 3\)"),
    ],
)
def test_refused(build: Any, recipe: qat.Recipe, reason: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=reason):
        export(prepared(build, recipe), tmp_path / "model.gguf", format="gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (qat.QuantizerSpec(qat.Int(4, symmetric=False), scale_dtype="float16"), "has zero points"),
        (qat.QuantizerSpec(qat.HalfInt(8), scale_dtype="float16"), "takes 9 bits as odd integers"),
    ],
)
def test_refused_grids(weight: qat.QuantizerSpec, reason: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=reason):
        export(
            prepared(MLP, qat.Recipe((qat.Rule("*", qat.LayerSpec(weight)),))), tmp_path / "model.gguf", format="gguf"
        )


class Counting(nn.Module):
    """A BatchNorm, which counts batches in int64, and a buffer."""

    def __init__(self, buffer: torch.Tensor) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(32, 8), nn.BatchNorm1d(8)
        self.register_buffer("buffer", buffer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.fc(x))  # type: ignore[no-any-return]


def test_counters(tmp_path: Path) -> None:
    model = prepared(lambda: Counting(torch.tensor([2**24 + 1.0], dtype=torch.float64)), recipes.int4(32, "float16"))
    model.norm.num_batches_tracked.fill_(2**24 + 1)  # type: ignore[operator, union-attr]
    report = export(model, tmp_path / "model.gguf", format="gguf", batches=vectors())
    assert report.exact
    types = {each.name: each.tensor_type.name for each in gguf.GGUFReader(report.path).tensors}
    assert (types["norm.num_batches_tracked"], types["buffer"]) == ("I64", "F64")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.complex64])
def test_refused_buffers(dtype: torch.dtype, tmp_path: Path) -> None:
    model = prepared(lambda: Counting(torch.ones(1, dtype=dtype)), recipes.int4(32, "float16"))
    with pytest.raises(RefusedError, match=f"buffer is {dtype}, a type that GGUF does not have"):
        export(model, tmp_path / "model.gguf", format="gguf")


def test_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ternary='TQ3_0' is not allowed; choose 'TQ1_0' or 'TQ2_0'"):
        export(prepared(MLP, "int4"), tmp_path / "x", format="gguf", ternary="TQ3_0")
    name = "a_layer_with_a_name_that_is_longer_than_what_readers_of_this_format_accept"
    model = prepared(lambda: nn.ModuleDict({name: nn.Linear(32, 32)}), recipes.int4(32, "float16"))
    with pytest.raises(RefusedError, match="more than 63 characters"):
        export(model, tmp_path / "x", format="gguf")


def test_damaged(tmp_path: Path) -> None:
    model = prepared(MLP, recipes.int4(32, "float16"))
    path = export(model, tmp_path / "model.gguf", format="gguf").path
    source, data = read_source(model), path.read_bytes()
    for length in (0, 3, 20, 100, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedFileError, match=r"model\.gguf: cannot be read as a GGUF file"):
            Gguf().read(path, source)
