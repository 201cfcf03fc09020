"""The setting that is found in few calls is, bit for bit, the one that the quantizer finds piece by piece."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.quantization import (
    AbsMax,
    AbsMean,
    Binary,
    FakeQuantizer,
    Granularity,
    Grid,
    HalfInt,
    Int,
    Learned,
    LearnedSoft,
    PerChannel,
    PerGroup,
    PerTensor,
    Pi,
    QuantizerSpec,
    Scale,
    Ternary,
)
from lightning_qat.quantization.brief import brief_setting

EXTREMES = {
    "usual": [0.5], "NaN": [torch.nan], "infinite": [torch.inf, -torch.inf], "both": [torch.inf, torch.nan],
    "large": [3e38], "small": [1e-38, 1e-45], "zero": [-0.0],
}  # fmt: skip


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def check(quantizer: FakeQuantizer, weight: Tensor) -> None:
    grouped, expected = quantizer.detached_setting(weight)
    found = brief_setting(quantizer, quantizer.grouped(weight))
    assert found is not None
    same(found.scale, expected.scale)
    same(found.fake_quantized(grouped), expected.fake_quantized(grouped))
    assert found.parameter is expected.parameter
    for name in ("lo", "hi", "rounding", "rule", "learned", "ends", "zero_point", "temperature"):
        assert getattr(found, name) is getattr(expected, name) or getattr(found, name) == getattr(expected, name)


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", [Int(4), Int(8, narrow=True), HalfInt(2), Ternary(), Binary()], ids=repr)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(8)], ids=repr)
@pytest.mark.parametrize("scale", [AbsMax(), AbsMean(), AbsMean(0.66), Learned(init=AbsMax())], ids=repr)
@pytest.mark.parametrize("rows", [6, 600])  # below and above the size from which on scales are looked at
def test_value(extreme: str, dtype: torch.dtype, grid: Grid, granularity: Granularity, scale: Scale, rows: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(rows, 32, dtype=dtype)
    weight[:, :8] *= 0.0 if extreme in ("small", "zero") else 1.0
    weight[1] = torch.tensor(EXTREMES[extreme], dtype=dtype).repeat(32)[:32]
    quantizer = FakeQuantizer(QuantizerSpec(grid, granularity, scale), tuple(weight.shape))
    if isinstance(quantizer._parameters.get("scale"), nn.Parameter):
        with torch.no_grad():
            quantizer.scale.normal_().view(-1)[0] = EXTREMES[extreme][0]
        quantizer.stale = False
    check(quantizer, nn.Parameter(weight))


@pytest.mark.parametrize("scale", [AbsMax(), AbsMean(0.66)], ids=repr)
def test_follows_the_quantizer(scale: Scale) -> None:
    weight = torch.randn(4, 8)
    quantizer = FakeQuantizer(QuantizerSpec(Int(8), PerChannel(), scale), (4, 8))
    for bits in (8, 3, 2, 8):
        quantizer.set_grid(Int(bits))
        check(quantizer, weight)
        for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), quantizer.to(torch.float64)):
            check(other, weight)
            check(other, weight.double())
            other.set_grid(Int(bits - 1 if bits > 2 else 5))
            check(other, weight)
    state = FakeQuantizer(QuantizerSpec(Int(4), PerChannel(), scale), (4, 8)).state_dict()
    quantizer.load_state_dict(state)
    assert quantizer.grid == Int(4)
    check(quantizer, weight)


@pytest.mark.parametrize(
    "spec",
    [
        QuantizerSpec(Int(4, symmetric=False), PerChannel(), AbsMax()),
        QuantizerSpec(Pi(3, 4), PerChannel(), AbsMax()),
        QuantizerSpec(Int(4), PerChannel(), AbsMax(), scale_dtype="bfloat16"),
        QuantizerSpec(Int(4), PerChannel(), AbsMax(), LearnedSoft(0.5)),
    ],
    ids=lambda spec: spec.label,
)
def test_others_are_not_served(spec: QuantizerSpec) -> None:
    assert brief_setting(FakeQuantizer(spec, (4, 8)), torch.randn(4, 8)) is None


def test_16_bit_weights_are_not_served() -> None:
    quantizer = FakeQuantizer(QuantizerSpec(Int(4), PerChannel(), AbsMax()), (4, 8))
    assert brief_setting(quantizer, torch.randn(4, 8, dtype=torch.bfloat16)) is None
