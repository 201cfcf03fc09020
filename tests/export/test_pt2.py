"""The format pt2: codes in a traced graph that runs without the model's code."""

import subprocess
import sys
import zipfile
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_qat as qat
from lightning_qat.export import DamagedFileError, Pt2, VerificationError, export, read_source
from lightning_qat.quantization import recipes
from tests.export.models import MLP, MODELS, prepared, vectors


@pytest.mark.parametrize("kind", ["mlp", "convolution"])
@pytest.mark.parametrize("recipe", ["int4", "w8a8", "bitnet1"])
def test_value(kind: str, recipe: str, tmp_path: Path) -> None:
    build, batches = MODELS[kind]
    model = prepared(build, recipe)
    report = export(model, tmp_path / "model.pt2", format="pt2", batches=batches())
    assert report.exact
    program = torch.export.load(report.path)
    state = program.state_dict
    for name, tensor in qat.codes(model).items():
        assert state[f"{name}_codes"].dtype == torch.int8
        assert torch.equal(state[f"{name}_codes"], tensor.codes)
        assert name not in state
    (x,) = batches(1)
    small = x[:2]  # another batch size than the one it was traced with
    assert torch.equal(program.module()(small), model.eval()(small))


def test_attention_is_close(tmp_path: Path) -> None:
    """Eager evaluation takes a fused kernel that a traced graph cannot hold."""
    build, batches = MODELS["attention"]
    report = export(prepared(build, "int4"), tmp_path / "model.pt2", format="pt2", batches=batches())
    assert report.sqnr is not None
    assert report.sqnr > 100
    assert report.agreement == 1


def test_other_forwards(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor, *, shift: Tensor) -> dict[str, Tensor]:
            return {"logits": self.fc(x) + shift}

    batches = [{"x": torch.randn(5, 8), "shift": torch.randn(5, 4)} for _ in range(2)]
    model = prepared(Two, "int4")
    assert export(model, tmp_path / "a.pt2", format="pt2", batches=batches).exact
    pairs = [(batch["x"], batch["shift"]) for batch in batches]
    report = export(
        model, tmp_path / "b.pt2", format="pt2", batches=pairs, forward=lambda m, b: m(b[0], shift=b[1])["logits"]
    )
    assert report.exact
    with pytest.raises(ValueError, match="forward= does not call the model"):
        export(model, tmp_path / "c.pt2", format="pt2", batches=pairs, forward=lambda m, b: m.fc(b[0]))


def test_lightning_module(tmp_path: Path) -> None:
    """What predict_step makes of the output is compared, too, though the file holds the forward alone."""

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = MLP()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self(batch).argmax(-1)  # type: ignore[no-any-return]

    model = prepared(Module, "int4")
    path = tmp_path / "model.pt2"
    assert export(model, path, format="pt2", batches=vectors(), forward=lambda m, b: m.predict_step(b, 0)).exact
    assert torch.export.load(path).module()(vectors(1)[0]).shape == (9, 6)


def test_a_single_layer_with_a_quantized_input(tmp_path: Path) -> None:
    """The hook that quantizes the input sits on the model itself, and acts once."""
    model = prepared(lambda: nn.Linear(32, 6), "w8a8")
    assert export(model, tmp_path / "model.pt2", format="pt2", batches=vectors()).exact


def test_runs_without_our_code(tmp_path: Path) -> None:
    path = export(prepared(MLP, "w4a8"), tmp_path / "model.pt2", format="pt2", batches=vectors()).path
    code = (
        "import sys, torch; m = torch.export.load(sys.argv[1]).module(); print(tuple(m(torch.randn(3, 32)).shape)); "
        "assert 'lightning_qat' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout.strip() == "(3, 6)", done.stderr


def test_size_and_privacy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MLP(4096)
    qat.prepare(model, recipes.w8a8(), arithmetic="integer")
    report = export(model, tmp_path / "model.pt2", format="pt2", batches=vectors())
    num_weights, rows = 4096 * 38, 4096 + 6
    assert report.num_bytes < 1.03 * (num_weights + 8 * rows) + 100_000  # the text of the graph
    assert str(Path(__file__).parents[2]).encode() not in report.path.read_bytes()


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = export(prepared(MLP, "w4a8"), tmp_path / "model.pt2", format="pt2", batches=vectors()).path
    with zipfile.ZipFile(path) as archive:
        assert not [entry.filename for entry in archive.infolist() if archive.read(entry).startswith(b"PK")]
        assert not [entry.filename for entry in archive.infolist() if b"\x80\x02" in archive.read(entry)[:2]]
    program = torch.export.load(path)
    program.example_inputs = ((vectors(1)[0],), {})
    torch.export.save(program, path)  # as torch writes it by itself: reading it would unpickle the inputs
    with pytest.raises(DamagedFileError, match="packages that unpickle anything are not read"):
        Pt2().read(path, read_source(prepared(MLP, "w4a8")))


def test_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(MLP, "int4")
    with pytest.raises(ValueError, match=r"needs a real input; give batches=\[one or more\]"):
        export(model, tmp_path / "model.pt2", format="pt2")
    monkeypatch.setattr("lightning_qat.export.report.Comparison.sqnr", 10.0)
    with pytest.raises(VerificationError, match=r"10.0 dB from the trained model's .* at least 35 dB"):
        export(model, tmp_path / "model.pt2", format="pt2", batches=vectors())
    assert list(tmp_path.iterdir()) == []
