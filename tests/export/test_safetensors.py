"""The format safetensors: exact for every recipe, small, and safe against damage."""

import json
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import lightning_qat as qat
from lightning_qat.export import DamagedFileError, RefusedError, VerificationError, describe, export, formats, load
from lightning_qat.quantization import recipes
from tests.export.matrix import ROWS
from tests.export.models import MLP, MODELS, TiedNet, prepared, vectors


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return export(prepared(MLP, "int4"), tmp_path / "mlp.safetensors").path


@pytest.mark.parametrize("kind", ["attention", "convolution", "mlp"])
@pytest.mark.parametrize("recipe", recipes.names())
def test_value(kind: str, recipe: str, tmp_path: Path) -> None:
    build, batches = MODELS[kind]
    model = prepared(build, recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = export(model, tmp_path / "model.safetensors", batches=batches())
    assert (report.exact, report.max_abs, report.num_batches) == (True, 0.0, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training

    torch.manual_seed(99)
    loaded = load(report.path, build())
    baked = qat.bake(model)
    for name, value in baked.state_dict().items():
        if "baked_input" not in name:
            assert torch.equal(loaded.state_dict()[name], value), name
    (x,) = batches(1)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    for name, tensor in qat.codes(loaded).items():  # a loaded model is a baked one: it can be exported further
        assert torch.equal(tensor.codes, qat.codes(model)[name].codes)


@pytest.mark.parametrize(
    "weight",
    [
        qat.QuantizerSpec(qat.Int(5), qat.PerGroup(8)),
        qat.QuantizerSpec(qat.Int(6, symmetric=False), qat.PerTensor(), qat.AbsMax()),
        qat.QuantizerSpec(qat.Int(8, symmetric=False), qat.PerGroup(16)),
        qat.QuantizerSpec(qat.Int(7, narrow=True), qat.PerChannel(), qat.Percentile(99.0)),
        qat.QuantizerSpec(qat.Int(2, narrow=True), qat.PerTensor(), qat.MinimumError()),
        qat.QuantizerSpec(qat.HalfInt(3), scale_dtype="float16"),
        qat.QuantizerSpec(qat.Pi(5, 2)),
        qat.QuantizerSpec(qat.Ternary(0.7), qat.PerGroup(32), qat.AbsMean(), scale_dtype="bfloat16"),
    ],
    ids=lambda spec: spec.label,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_of_other_quantizers(weight: qat.QuantizerSpec, dtype: torch.dtype, tmp_path: Path) -> None:
    token = qat.QuantizerSpec(qat.Int(8, symmetric=False), qat.PerToken(), qat.AbsMax())
    recipe = qat.Recipe((qat.Rule("*", qat.LayerSpec(weight, token, (qat.Normalize(1e-6),))),))
    model = prepared(lambda: MLP().to(dtype), recipe)
    path = export(model, tmp_path / "model", batches=[x.to(dtype) for x in vectors()]).path
    loaded = load(path, MLP()).eval()  # the file decides on the dtype
    x = vectors(1)[0].to(dtype)
    assert torch.equal(loaded(x), model.eval()(x))


@pytest.mark.parametrize("num_outputs", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("width", [30, 32, 64, 100])
def test_layers_that_stay_float_compute_the_same(width: int, num_outputs: int, tmp_path: Path) -> None:
    """Their weights lie anywhere in the file, and products of such memory are off in the last bit."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, num_outputs))

    model = prepared(build, qat.Recipe((qat.Rule("2", None), *recipes.int4().rules)))
    batches = [torch.randn(size, width) for size in (1, 2, 5, 8)]
    assert export(model, tmp_path / "model.safetensors", batches=batches).exact
    loaded = load(tmp_path / "model.safetensors", build()).eval()
    with torch.no_grad():
        assert all(torch.equal(loaded(x), model.eval()(x)) for x in batches)


def test_stored_input_scales(tmp_path: Path) -> None:
    weight = qat.QuantizerSpec(qat.Int(8), scale=qat.AbsMax())
    stored = qat.QuantizerSpec(qat.Int(8, symmetric=False), qat.PerTensor(), qat.Percentile(99.0))
    learned = qat.QuantizerSpec(qat.Int(4), qat.PerTensor(), qat.Learned())
    recipe = qat.Recipe((qat.Rule("up", qat.LayerSpec(weight, stored)), qat.Rule("down", qat.LayerSpec(None, learned))))
    model = prepared(MLP, recipe)
    qat.calibrate(model, vectors())
    path = export(model, tmp_path / "model.safetensors", batches=vectors()).path
    x = vectors(1)[0]
    assert torch.equal(load(path, MLP()).eval()(x), model.eval()(x))
    assert set(load(path)) == {"up.weight", "up.bias", "down.weight", "down.bias"}


def test_without_a_model(tmp_path: Path) -> None:
    model = prepared(TiedNet, qat.Recipe((qat.Rule("*", recipes.ternary().rules[0].spec, types=(nn.Module,)),)))
    path = export(model, tmp_path / "model.safetensors").path
    tensors = load(path)
    assert set(tensors) == set(qat.bake(model).state_dict())
    assert tensors["head.weight"] is tensors["embed.weight"]
    assert torch.equal(tensors["embed.weight"].dequantize(), qat.bake(model).embed.weight)
    assert torch.equal(tensors["encoder.norm1.weight"], model.encoder.norm1.weight)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = prepared(TiedNet, "int8")
    path = export(model, tmp_path / "model.safetensors").path
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert "embed.weight" in names
    assert "head.weight" not in names
    loaded = load(path, TiedNet())
    assert loaded.head.weight is loaded.embed.weight


BITS = {
    "int8": 8, "int4": 4, "int3": 3, "int2": 2, "seq2": 2, "piq3": 3, "piq2": 2, "ternary": 1.6, "binary": 1,
    "w8a8": 8, "w4a8": 4, "ternary_a8": 1.6, "bitnet": 1.6, "bitnet1": 1,
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_size(row: str, tmp_path: Path) -> None:
    """Codes at their bits, float32 scales and biases, a header, and what aligns tensors: nothing else is inside."""
    model = prepared(lambda: MLP(4096), ROWS[row])
    report = export(model, tmp_path / "model")
    with report.path.open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
    num_weights, num_biases = 4096 * 32 + 4096 * 6, 4096 + 6
    num_scales = sum(tensor.scale.numel() for tensor in qat.codes(model).values())
    codes = num_weights * BITS[row.partition("(")[0]] / 8
    assert report.num_bytes == report.path.stat().st_size
    assert 0 <= report.num_bytes - (codes + 4 * num_scales + 4 * num_biases + header + 8) < 8
    assert report.float_bytes == 4 * (num_weights + num_biases)
    assert header < 4096


def test_parametrized_modules_become_plain(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4))

    model = prepared(build, "int4")
    x = torch.randn(5, 8)
    path = export(model, tmp_path / "model.safetensors", batches=[x]).path
    assert torch.equal(load(path, build()).eval()(x), model.eval()(x))


def test_equal_models_give_equal_files(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.safetensors" for number in range(6)]
    for file in files:
        torch.manual_seed(0)
        export(prepared(MLP, "int4"), file)
    assert len({file.read_bytes() for file in files}) == 1


def test_meta_device(tmp_path: Path) -> None:
    model = prepared(MLP, "piq2")
    path = export(model, tmp_path / "model.safetensors").path
    with torch.device("meta"):
        empty = MLP()
    x = vectors(1)[0]
    assert torch.equal(load(path, empty).eval()(x), model.eval()(x))


def test_memory_is_mapped(artifact: Path) -> None:
    """Tensors of the file are views of its pages: their storage is larger than they are."""
    bias = load(artifact, verify=False)["up.bias"]
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert artifact.name in maps.read_text()
    assert bias.shape == (64,)


def test_description_says_how_the_model_was_quantized(artifact: Path) -> None:
    description = describe(artifact)
    assert qat.Recipe.from_dict(description["recipe"]) == recipes.int4()
    assert description["version"] == 1
    assert description["weights"]["up.weight"]["packing"] == "bits4"
    assert description["weights"]["up.weight"]["shape"] == [64, 32]


def test_report(tmp_path: Path) -> None:
    report = export(prepared(MLP, "int4"), tmp_path / "new" / "mlp.safetensors", batches=vectors(1))
    assert "equal bit for bit on 1 batch" in str(report)
    stored = json.loads((tmp_path / "new" / "mlp.safetensors.report.json").read_text())
    assert stored["exact"] is True
    assert stored["num_bytes"] == report.num_bytes == report.path.stat().st_size
    assert "not compared" in str(export(prepared(MLP, "int4"), report.path))
    assert sorted(path.name for path in report.path.parent.iterdir()) == [
        "mlp.safetensors",
        "mlp.safetensors.report.json",
    ]


def test_a_failed_export_leaves_the_old_file(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, files = artifact.read_bytes(), sorted(artifact.parent.iterdir())
    monkeypatch.setattr("lightning_qat.export.safetensors.pack_codes", lambda tensor: _flipped(tensor))
    with pytest.raises(VerificationError, match=r"up\.weight: read back from format='safetensors', it differs"):
        export(prepared(MLP, "int8"), artifact)
    assert artifact.read_bytes() == before
    assert sorted(artifact.parent.iterdir()) == files


def _flipped(tensor: qat.QuantizedTensor) -> Tensor:
    packed = (tensor.codes.to(torch.int16) + 128).to(torch.uint8).flatten()
    packed[3] ^= 1
    return packed


# ---- damage


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    def plain(value: Any) -> Tensor:
        result: Tensor = value.dequantize() if isinstance(value, qat.QuantizedTensor) else value
        return result

    return one.keys() == other.keys() and all(torch.equal(plain(one[key]), plain(other[key])) for key in one)


def test_a_flipped_bit_anywhere_in_the_header_is_noticed_or_harmless(tmp_path: Path) -> None:
    model = prepared(lambda: nn.Sequential(nn.Linear(4, 4)), "int4")
    path = export(model, tmp_path / "model").path
    good, data = load(path), bytearray(path.read_bytes())
    (header,) = struct.unpack("<Q", data[:8])
    noticed = 0
    for position in range(header + 8):
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        try:
            assert same(load(path), good)
        except DamagedFileError:
            noticed += 1
        data[position] ^= 1 << position % 8
    assert noticed > 0.98 * header  # the rest is padding


def test_a_flipped_bit_anywhere_in_the_data_is_noticed(tmp_path: Path) -> None:
    path = export(prepared(lambda: nn.Sequential(nn.Linear(4, 4)), "ternary"), tmp_path / "model").path
    data = bytearray(path.read_bytes())
    (header,) = struct.unpack("<Q", data[:8])
    for position in range(header + 8, len(data)):
        data[position] ^= 4
        path.write_bytes(data)
        with pytest.raises(DamagedFileError):
            load(path)
        data[position] ^= 4


def test_truncated(artifact: Path) -> None:
    data = artifact.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        artifact.write_bytes(data[:length])
        with pytest.raises(DamagedFileError, match=r"mlp\.safetensors"):
            load(artifact)
    artifact.write_bytes(data + b"\0")
    with pytest.raises(DamagedFileError):
        load(artifact)


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**31, 2**62, 2**64 - 1])
def test_hostile_header_size(size: int, artifact: Path) -> None:
    artifact.write_bytes(struct.pack("<Q", size) + artifact.read_bytes()[8:])
    with pytest.raises(DamagedFileError):
        load(artifact, verify=False)


def rewritten(path: Path, change: Any) -> Path:
    """The file with a changed description and no valid checksum."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    description = json.loads(metadata["lightning_qat"])
    change(description, tensors)
    save_file(tensors, path, metadata | {"lightning_qat": json.dumps(description)})
    return path


def _version(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    description["version"] = 2


def _shape(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    description["weights"]["up.weight"]["shape"] = [2**40, 2**40]


def _negative(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    description["weights"]["up.weight"]["shape"] = [-64, -32]


def _grid(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    description["weights"]["up.weight"]["grid"] = {"_target_": "os.system", "bits": 4}


def _kind(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    description["weights"]["up.weight"]["grid"] = {"_target_": "lightning_qat.PerTensor"}


def _list(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    description["weights"]["up.weight"] = []


def _scale(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["up.weight.scale"] = torch.ones(3, 1)


def _nan(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["up.weight.scale"][0] = float("nan")


def _missing(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors["up.weight.codes"]


def _tie(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    description["aliases"]["a"] = "b"


def _tie_to_a_list(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    description["aliases"]["a"] = []


def _bytes(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["up.weight.codes"] = tensors["up.weight.codes"].view(torch.int8)


@pytest.mark.parametrize(
    "change", [_version, _shape, _negative, _grid, _kind, _list, _scale, _nan, _missing, _tie, _tie_to_a_list, _bytes]
)
def test_hostile_description(change: Any, artifact: Path) -> None:
    rewritten(artifact, change)
    for verify in (True, False):
        with pytest.raises(DamagedFileError):
            load(artifact, verify=verify)


def _input_scale(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["up.input.scale"] = torch.ones(3)


def _input_grid(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    description["inputs"]["up"]["grid"]["narrow"] = None


def _integers(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["up.bias"] = torch.ones(64, dtype=torch.int64)


@pytest.mark.parametrize("change", [_input_scale, _input_grid, _integers])
def test_hostile_description_of_an_input(change: Any, tmp_path: Path) -> None:
    """What denies itself only when a model is built of it."""
    token = qat.QuantizerSpec(qat.Int(8, symmetric=False), qat.PerTensor(), qat.Percentile(99.0))
    model = prepared(MLP, qat.Recipe((qat.Rule("*", qat.LayerSpec(qat.QuantizerSpec(qat.Int(4)), token)),)))
    qat.calibrate(model, vectors())
    path = rewritten(export(model, tmp_path / "model").path, change)
    with pytest.raises(DamagedFileError):
        load(path, MLP(), verify=False)


def test_version_error_says_what_to_do(artifact: Path) -> None:
    with pytest.raises(DamagedFileError, match="version 2, this lightning-qat reads version 1; export the checkpoint"):
        load(rewritten(artifact, _version))


def test_verify_false_skips_the_checksum(artifact: Path) -> None:
    def change(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["up.bias"].zero_()

    rewritten(artifact, change)
    assert not load(artifact, verify=False)["up.bias"].any()
    with pytest.raises(DamagedFileError, match="checksum does not match"):
        load(artifact)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save(MLP().state_dict(), tmp_path / "pickle")
    with pytest.raises(DamagedFileError, match="no safetensors file"):
        load(tmp_path / "pickle")


def test_other_safetensors_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(DamagedFileError, match="not one that lightning-qat exported"):
        load(tmp_path / "other.safetensors")


# ---- errors of the caller


def test_error(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match="MLP is of another architecture: the artifact lacks"):
        load(artifact, _with_more())
    with pytest.raises(ValueError, match=r"TiedNet has no (up|down)\.weight"):
        load(artifact, TiedNet())
    with pytest.raises(ValueError, match=r"up\.bias: the model has shape \(65,\), the artifact \(64,\)"):
        load(artifact, MLP(65))
    with pytest.raises(ValueError, match="up is prepared or baked already"):
        load(artifact, prepared(MLP, "int4"))
    with pytest.raises(ValueError, match="MLP is neither prepared nor baked"):
        export(MLP(), tmp_path / "x")
    with pytest.raises(
        ValueError, match=r"format=.safetensor. is unknown; choose one of .*did you mean .safetensors.\?"
    ):
        export(prepared(MLP, "int4"), tmp_path / "x", format="safetensor")
    with pytest.raises(TypeError, match="format='safetensors' has no option opset; it has none"):
        export(prepared(MLP, "int4"), tmp_path / "x", opset=21)
    assert "safetensors" in formats()


def _with_more() -> nn.Module:
    model = MLP()
    model.register_module("more", nn.Linear(2, 2))
    return model


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    with pytest.raises(RefusedError, match="_extra_state: dict in the state_dict is no tensor"):
        export(prepared(lambda: Extra(4, 4), "int4"), tmp_path / "x")


def test_lightning_module(tmp_path: Path) -> None:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = MLP()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = export(prepared(Module, "bitnet"), tmp_path / "model", batches=[(x, None) for x in vectors()])
    assert report.exact
    assert isinstance(load(report.path, Module()), L.LightningModule)


@pytest.mark.parametrize("recipe", ["w8a8", "bitnet"])
def test_integer_products_come_back(recipe: str, tmp_path: Path) -> None:
    """What was trained on products of codes is loaded with products of codes: equal bit for bit in a fresh module."""
    torch.manual_seed(0)
    model, fresh = nn.Sequential(nn.Linear(48, 24)), nn.Sequential(nn.Linear(48, 24))
    qat.prepare(model, recipes.named(recipe), arithmetic="integer")
    inputs = torch.randn(5, 48)
    export(model.eval(), tmp_path / "m.safetensors", batches=[inputs])
    loaded = load(tmp_path / "m.safetensors", fresh).eval()
    assert type(loaded[0]).forward is not nn.Linear.forward
    with torch.no_grad():
        assert torch.equal(loaded(inputs), model(inputs))
