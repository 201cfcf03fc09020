"""The layout of compressed-tensors, against its definition in NumPy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lightning_qat as qat
from lightning_qat.export import DamagedFileError, RefusedError, export
from lightning_qat.export.compressed_tensors import CompressedTensors, pack_words, unpack_words
from lightning_qat.export.source import read_source
from lightning_qat.quantization import recipes
from tests.export.models import MLP, TiedNet, prepared, vectors


def reference_words(codes: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.int32]:
    """Each row as one stream of bits, lowest first, in little-endian 32-bit words."""
    rows, columns = codes.shape
    stream = ((codes + 2 ** (bits - 1))[:, :, None] >> np.arange(bits)) & 1
    flat = stream.reshape(rows, columns * bits).astype(np.uint8)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return np.packbits(flat, axis=1, bitorder="little").view("<i4")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("columns", [1, 8, 31, 32, 40])
def test_words(bits: int, columns: int) -> None:
    codes = np.random.default_rng(bits).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), size=(3, columns))
    words = pack_words(torch.from_numpy(codes), bits)
    # columns that do not fill a word are filled with level 0, which is the lowest code
    filled = np.pad(codes, ((0, 0), (0, -columns % 32)), constant_values=-(2 ** (bits - 1)))
    expected = reference_words(filled, bits)[:, : -(-columns * bits // 32)]
    assert np.array_equal(words.numpy(), expected)
    assert np.array_equal(unpack_words(words, bits, columns).numpy(), codes)


def dequantized(tensors: dict[str, Tensor], name: str, bits: int) -> npt.NDArray[np.float32]:
    rows, columns = tensors[f"{name}_shape"].tolist()
    packed = tensors[f"{name}_packed"].numpy().view(np.uint8).reshape(rows, -1)
    stream = np.unpackbits(packed, axis=1, bitorder="little")[:, : columns * bits].reshape(rows, columns, bits)
    codes = (stream.astype(np.int64) << np.arange(bits)).sum(-1) - 2 ** (bits - 1)
    scale = tensors[f"{name}_scale"].float().numpy()
    return codes.astype(np.float32) * np.repeat(scale, columns // scale.shape[1], 1)


@pytest.mark.parametrize(
    ("recipe", "bits", "group"),
    [
        (recipes.int4(), 4, None),
        (recipes.int4(8), 4, 8),
        (recipes.int8(32), 8, 32),
        (recipes.seq2(), 4, None),
        (recipes.ternary(16), 4, 16),
    ],
)
def test_weights_only(recipe: qat.Recipe, bits: int, group: int | None, tmp_path: Path) -> None:
    model = prepared(MLP, qat.Recipe((qat.Rule("down", None), *recipe.rules)))
    report = export(model, tmp_path / "model", format="compressed-tensors", batches=vectors(), config={"a": 1})
    assert report.exact
    tensors = load_file(report.path / "model.safetensors")
    assert np.array_equal(dequantized(tensors, "up.weight", bits), qat.codes(model)["up.weight"].dequantize().numpy())
    config = json.loads((report.path / "config.json").read_text())
    assert config["a"] == 1
    described = config["quantization_config"]
    assert (described["quant_method"], described["format"]) == ("compressed-tensors", "pack-quantized")
    assert described["ignore"] == ["down"]
    weights = described["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"]) == (bits, group)
    assert weights["strategy"] == ("group" if group else "channel")


def test_two_widths(tmp_path: Path) -> None:
    model = prepared(MLP, qat.Recipe((*recipes.int8().rules[:0], qat.Rule("up", recipes.int8().rules[0].spec),
                                      qat.Rule("down", recipes.int4(16).rules[0].spec))))  # fmt: skip
    report = export(model, tmp_path / "model", format="compressed-tensors", batches=vectors())
    assert report.exact
    groups = json.loads((report.path / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["up"], ["down"]]


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
def test_quantized_inputs(recipe: str, tmp_path: Path) -> None:
    model = prepared(MLP, recipe)
    path = export(model, tmp_path / "model", format="compressed-tensors", batches=vectors()).path
    tensors = load_file(path / "model.safetensors")
    assert tensors["up.weight"].dtype == torch.int8
    assert torch.equal(tensors["up.weight"], qat.codes(model)["up.weight"].codes)
    group = json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert group["input_activations"]["dynamic"] is True
    assert group["input_activations"]["strategy"] == "token"


def test_bfloat16(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return MLP().bfloat16()

    with pytest.raises(
        RefusedError, match="not representable in bfloat16, the dtype of the model; train with scale_dtype"
    ):
        export(prepared(build, recipes.int4(32)), tmp_path / "model", format="compressed-tensors")
    model = prepared(build, recipes.int4(32, "bfloat16"))
    report = export(model, tmp_path / "model", format="compressed-tensors", batches=[x.bfloat16() for x in vectors()])
    assert report.exact


def test_refused(tmp_path: Path) -> None:
    token = qat.QuantizerSpec(qat.Int(8, narrow=True), qat.PerToken(), qat.AbsMax())
    wide = qat.QuantizerSpec(qat.Int(8), qat.PerToken(), qat.AbsMax())
    int8 = qat.QuantizerSpec(qat.Int(8))
    cases: list[tuple[Any, Any, str]] = [
        (TiedNet, "int8", "in_proj_weight: MultiheadAttention is no linear layer"),
        (MLP, qat.Recipe((qat.Rule("*", qat.LayerSpec(int8, wide)),)), "knows inputs in Int"),
        (MLP, "piq2", "without transforms"),
        (
            MLP,
            qat.Recipe((qat.Rule("up", qat.LayerSpec(int8, token)), qat.Rule("*", qat.LayerSpec(int8)))),
            "down: its",
        ),
        (MLP, recipes.w4a8(8), "leave group_size out"),
        (
            MLP,
            qat.Recipe((qat.Rule("*", qat.LayerSpec(qat.QuantizerSpec(qat.Int(4, symmetric=False)))),)),
            "zero points",
        ),
        (MLP, qat.Recipe((qat.Rule("*", qat.LayerSpec(qat.QuantizerSpec(qat.HalfInt(8)))),)), "takes 9 bits"),
        (MLP, qat.Recipe((qat.Rule("*", qat.LayerSpec(None, token)),)), "no weight is quantized"),
    ]
    for build, recipe, reason in cases:
        with pytest.raises(RefusedError, match=reason):
            export(prepared(build, recipe), tmp_path / "model", format="compressed-tensors")
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_replaced(tmp_path: Path) -> None:
    model = prepared(MLP, "int4")
    path = export(model, tmp_path / "model", format="compressed-tensors").path
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-9])
    with pytest.raises(DamagedFileError, match="cannot be read as a compressed-tensors model"):
        CompressedTensors().read(path, read_source(model))
    export(model, path, format="compressed-tensors")  # a folder that is there is replaced
    assert (path / "model.safetensors").read_bytes() == data
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model", "model.report.json"]
