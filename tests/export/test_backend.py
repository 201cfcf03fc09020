"""The registry of formats: names, options, extras, and what a format of one's own needs."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import pytest
import torch
from torch import Tensor

import lightning_qat as qat
from lightning_qat.export import Backend, Run, Source, VerificationError, export, formats, register
from lightning_qat.export import backend as registry
from lightning_qat.export.report import Comparison, ExportReport
from tests.export.models import MLP, prepared, vectors


def test_formats() -> None:
    assert formats() == ("aotinductor", "compressed-tensors", "gguf", "onnx", "pt2", "safetensors", "torchao")


@pytest.mark.parametrize("format", [name for name in formats() if registry._BACKENDS[name].packages])
def test_missing_extra(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = registry._BACKENDS[format].packages[0]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"format='{format}' needs the package '{package}'.*lightning-qat\[export\]"):
        export(prepared(MLP, "int4"), tmp_path / "x", format=format, batches=vectors())


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> type[Backend]:
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))

    @final
    @register
    @dataclass(frozen=True)
    class Numbers(Backend):
        """torch.save of float weights, on purpose wrong by an amount."""

        name: ClassVar[str] = "numbers"
        suffix: ClassVar[str] = ".pt"
        least_sqnr: ClassVar[float] = 60.0

        shift: float = 0.0
        noise: float = 0.0
        forgets: str = ""
        shape: int = 6

        def refusal(self, source: Source) -> str | None:
            return None

        def write(self, source: Source, path: Path) -> None:
            values = {name: w.dequantize() + self.shift for name, w in source.weights.items() if name != self.forgets}
            torch.save(values, path)

        def read(self, path: Path, source: Source) -> tuple[Mapping[str, Tensor], Run]:
            def run(batch: Tensor) -> Tensor:
                out: Tensor = source.forward(source.model, batch)
                return (out + self.noise)[:, : self.shape]

            return torch.load(path, weights_only=True), run

    return Numbers


def test_comparison() -> None:
    comparison = Comparison()
    image = torch.zeros(1, 3, 2, 2)
    image[:, 1] = 1
    other = image.clone()
    other[0, 2, 0, 0] = 3
    comparison.update({"a": image, "b": [torch.tensor(2.0)]}, {"a": other, "b": [torch.tensor(2.0)]})
    assert comparison.max_abs == 3
    assert comparison.agreement == 0.75
    assert comparison.sqnr == pytest.approx(10 * math.log10(8 / 9))
    assert not comparison.is_equal
    with pytest.raises(ValueError, match="argument 2 is longer"):
        comparison.update([image], [image, image])


def test_comparison_of_masks() -> None:
    """-inf minus itself is NaN, which is below no bound."""
    comparison, masked = Comparison(), torch.tensor([[1.0, -math.inf], [2.0, math.nan]])
    comparison.update(masked, masked.clone())
    assert comparison.is_equal
    assert comparison.sqnr == math.inf
    comparison.update(masked, masked.nan_to_num(neginf=-math.inf))
    assert not comparison.is_equal
    assert (comparison.max_abs, comparison.sqnr) == (math.inf, -math.inf)


def test_comparison_of_complex_outputs() -> None:
    comparison = Comparison()
    comparison.update(torch.tensor([1 + 2j]), torch.tensor([1 + 3j]))
    assert comparison.max_abs == 1


def test_own_format(own: type[Backend], tmp_path: Path) -> None:
    model = prepared(MLP, "int4")
    assert export(model, tmp_path / "a.pt", format="numbers", batches=vectors()).exact
    report = export(qat.bake(model), tmp_path / "a.pt", format="numbers", batches=vectors(), noise=1e-4)
    assert not report.exact
    assert report.max_abs == pytest.approx(1e-4, rel=1e-2)
    assert report.sqnr is not None
    assert report.sqnr > 60
    assert "max abs 0.0001" in str(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 1e-8}, "up.weight: read back from format='numbers', it differs"),
        ({"forgets": "down.weight"}, "down.weight: missing in the file"),
        ({"noise": 0.1}, r"dB from the trained model's \(max abs 0.1\); at least 60 dB are required"),
        ({"noise": math.nan}, r"outputs of the artifact are -inf dB from the trained model's \(max abs inf\)"),
        ({"noise": "a"}, r"format='numbers': the artifact does not run on batch 0 \("),
        ({"shape": 5}, r"output 0 has shape \(9, 5\) instead of \(9, 6\)"),
    ],
)
def test_proof_fails(own: type[Backend], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=message):
        export(prepared(MLP, "int8"), tmp_path / "a.pt", format="numbers", batches=vectors(), **options)
    assert list(tmp_path.iterdir()) == []


def test_outputs_without_tensors(tmp_path: Path) -> None:
    """Nothing was compared, so that nothing may be called equal."""
    with pytest.raises(VerificationError, match=r"outputs \(list\) hold no tensors to compare; give a forward="):
        export(prepared(MLP, "int4"), tmp_path / "a", batches=vectors(), forward=lambda m, b: m(b).tolist())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("num_bytes", "said"), [(50, "2.0 x smaller"), (100, "1.0 x smaller"), (150, "1.5 x larger")])
def test_ratio(num_bytes: int, said: str) -> None:
    report = ExportReport(Path("a"), "pt2", num_bytes=num_bytes, float_bytes=100, exact=True)
    assert f"{num_bytes} bytes ({said} than float)" in str(report)
