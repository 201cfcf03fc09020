"""BatchNorm folding: against the formula in float64, for every grid, sign and granularity; and what is left alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_qat as qat
from lightning_qat.conversion import fold_batchnorm, reestimate_batchnorm
from lightning_qat.export import export, load

GRIDS = [
    qat.Int(8), qat.Int(3), qat.Int(4, narrow=True), qat.Int(4, symmetric=False), qat.Ternary(), qat.Binary(),
    qat.HalfInt(2), qat.Pi(3, 4),
]  # fmt: skip


class Net(nn.Module):
    def __init__(self, kind: str = "conv") -> None:
        super().__init__()
        self.layer: nn.Module = {
            "conv": nn.Conv2d(4, 6, 2, bias=False),
            "grouped": nn.Conv2d(4, 6, 2, groups=2),
            "transposed": nn.ConvTranspose2d(4, 6, 2),
        }[kind]
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.layer(x)))


def trained(model: nn.Module, weight: qat.QuantizerSpec | None, token: qat.QuantizerSpec | None = None) -> nn.Module:
    """Prepared, with statistics and factors of both signs; the second half of the negative channels hits the end."""
    model = model.double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            with torch.no_grad():
                norm.weight.copy_(torch.linspace(-1.5, 2, norm.num_features))
                norm.bias.normal_()
                norm.running_mean.normal_()  # type: ignore[union-attr]
                norm.running_var.uniform_(0.3, 3)  # type: ignore[union-attr]
    if weight is not None:
        qat.prepare(model, qat.Recipe((qat.Rule("*", qat.LayerSpec(weight, token)),)))
    return model


def images(num: int = 3) -> Tensor:
    return torch.randn(num, 4, 5, 5, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["conv", "grouped", "transposed"])
@pytest.mark.parametrize("granularity", [qat.PerTensor(), qat.PerChannel(), qat.PerGroup(4)], ids=lambda g: g.label)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.label)
def test_value(grid: Any, granularity: Any, kind: str) -> None:
    scale: Any = qat.AbsMax() if grid.symmetric else qat.Learned()
    model = trained(Net(kind), qat.QuantizerSpec(grid, granularity, scale))
    x = images()
    folded: Any = fold_batchnorm(model, x)
    assert isinstance(folded.norm, nn.Identity)
    model.eval()
    assert torch.allclose(folded(x), model(x), rtol=1e-12, atol=1e-12)

    before, after = qat.codes(model)["layer.weight"], qat.codes(folded)["layer.weight"]
    factor = (model.norm.weight / torch.sqrt(model.norm.running_var + model.norm.eps)).detach()  # type: ignore[union-attr]
    axis = 1 if kind == "transposed" else 0
    expected = before.dequantize() * factor.reshape([-1 if d == axis else 1 for d in range(4)])
    assert torch.allclose(after.dequantize(), expected, rtol=1e-14, atol=0)
    assert torch.equal(after.dequantize(), folded.layer.weight)
    assert after.codes.min() >= int(after.grid.lo - after.offset)
    assert after.codes.max() <= int(after.grid.hi - after.offset)
    assert (after.scale > 0).all()
    positive = (factor > 0).nonzero().flatten()
    assert torch.equal(after.codes.index_select(axis, positive), before.codes.index_select(axis, positive))


def test_a_code_without_negative_gets_a_zero_point() -> None:
    model = trained(Net(), qat.QuantizerSpec(qat.Int(2), qat.PerChannel(), qat.AbsMax()))
    with torch.no_grad():
        model.layer._parameters["weight"][0, 0, 0, 0] = -9  # type: ignore[index]
    folded = fold_batchnorm(model, images())
    tensor = qat.codes(folded)["layer.weight"]
    assert tensor.zero_point is not None
    assert set(tensor.zero_point.flatten().tolist()) == {-1.0, 0.0}
    assert tensor.codes[0, 0, 0, 0] == 1
    assert torch.allclose(folded(images(2) * 0), model.eval()(images(2) * 0), rtol=1e-12)


def test_linear_float_and_quantized_inputs() -> None:
    token = qat.QuantizerSpec(qat.Int(8, narrow=True), qat.PerToken(), qat.AbsMax())
    body = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5))
    for weight in (qat.QuantizerSpec(qat.Int(4)), None):
        model = trained(nn.Sequential(body), weight, token if weight else None)
        if weight is None:
            qat.prepare(model, qat.Recipe((qat.Rule("0.0", None), qat.Rule("0.3", qat.LayerSpec(None, token)))))
        x = torch.randn(7, 8, dtype=torch.float64)
        folded = fold_batchnorm(model, x)
        assert [type(m).__name__ for m in folded[0]] == ["Linear", "Identity", "ReLU", "Linear", "Identity"]  # type: ignore[index]
        assert torch.allclose(folded(x), model.eval()(x), rtol=1e-9)
        qat.unprepare(model)


def test_half_precision() -> None:
    """Many layers in a row round further apart than two percent, and folding is not to blame."""
    torch.manual_seed(6)  # means nearly cancel the signal, and 8 bits of it are left
    dtype = torch.bfloat16
    layers = [module for _ in range(12) for module in (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))]
    model = trained(nn.Sequential(*layers), None).to(dtype)
    qat.prepare(model, qat.Recipe((qat.Rule("*", qat.LayerSpec(qat.QuantizerSpec(qat.Int(4)))),)))
    x = images(8).to(dtype)
    folded, model = fold_batchnorm(model, x), model.eval()
    exact = copy.deepcopy(qat.bake(model)).double()(x.double())
    with torch.no_grad():
        errors = [float((m(x).double() - exact).norm() / exact.norm()) for m in (model, folded)]
    assert max(errors) < 0.25
    assert errors[1] < 4 * errors[0]
    assert errors[1] > 0.02


def test_zero_factor() -> None:
    model = trained(Net(), qat.QuantizerSpec(qat.Int(4, symmetric=False)))
    with torch.no_grad():
        model.norm.weight[2] = 0  # type: ignore[index, union-attr]
    x = images()
    assert torch.allclose(fold_batchnorm(model, x)(x), model.eval()(x), rtol=1e-12)
    model = trained(Net(), qat.QuantizerSpec(qat.Binary()))
    with torch.no_grad():
        model.norm.weight[2] = 0  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match=r"layer: its BatchNorm multiplies a channel by 0, and Binary\(\) has no 0"):
        fold_batchnorm(model, x)


class Branching(nn.Module):
    """Its convolution feeds a BatchNorm and something else."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), way

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        z = self.norm(y)
        if self.way == "residual":
            return z + y
        if self.way == "returned":
            return {"out": z, "before": y}
        if self.way == "twice":
            return self.norm(self.conv(z))
        if self.way == "activation":
            return self.norm(F.relu(y))
        return z if y.shape[0] else y  # reading a shape is no use


@pytest.mark.parametrize("way", ["residual", "returned", "twice", "activation", "plain"])
def test_only_pairs_that_nobody_else_reads(way: str) -> None:
    model = trained(Branching(way), qat.QuantizerSpec(qat.Int(4)))
    folded = fold_batchnorm(model, images())
    assert isinstance(folded.norm, nn.Identity) == (way == "plain")


def test_tied_and_three_dimensional_are_left() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[2].weight = model[0].weight
    folded: Any = fold_batchnorm(trained(model, qat.QuantizerSpec(qat.Int(4))), images())
    assert isinstance(folded[1], nn.BatchNorm2d)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))  # normalizes the middle dimension, not the features
    folded = fold_batchnorm(trained(model, qat.QuantizerSpec(qat.Int(4))), torch.randn(5, 6, 6, dtype=torch.float64))
    assert isinstance(folded[1], nn.BatchNorm1d)


def test_export_after_folding(tmp_path: Path) -> None:
    model = trained(Net(), qat.QuantizerSpec(qat.Int(3), qat.PerTensor())).float()
    x = images().float()
    folded = fold_batchnorm(model, x)
    path = export(folded, tmp_path / "model.safetensors", batches=[x]).path
    fresh = Net()
    fresh.norm = nn.Identity()  # type: ignore[assignment]
    fresh.layer.bias = nn.Parameter(torch.zeros(6))
    assert torch.equal(load(path, fresh).eval()(x), folded(x))


def test_error() -> None:
    with pytest.raises(ValueError, match="Net is neither prepared nor baked"):
        fold_batchnorm(Net(), images().float())


def test_reestimation() -> None:
    model = trained(Net(), qat.QuantizerSpec(qat.Int(2)))
    batches = [images(8), images(8)]
    layer = qat.bake(model).layer
    assert reestimate_batchnorm(model, batches) is model
    outputs = [layer(x) for x in batches]  # type: ignore[operator]
    mean = sum(y.mean((0, 2, 3)) for y in outputs) / 2
    variance = sum(y.transpose(0, 1).flatten(1).var(1) for y in outputs) / 2
    assert torch.allclose(model.norm.running_mean, mean)  # type: ignore[union-attr, arg-type]
    assert torch.allclose(model.norm.running_var, variance)  # type: ignore[union-attr, arg-type]
    assert model.training
    assert model.norm.momentum == 0.1  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="no batches were given"):
        reestimate_batchnorm(model, [])
