"""Arithmetic and state are float32, whatever the precision of the model, of autocast, of checkpoints or by default."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from lightning_qat.quantization import (
    AbsMax,
    AbsMean,
    Clipped,
    ElementwiseScaling,
    Entropy,
    FakeQuantizer,
    Grid,
    Int,
    Learned,
    LearnedSoft,
    MinimumError,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantizerSpec,
    Soft,
    StraightThrough,
)
from tests.quantization.combinations import FEW_GRIDS, SHAPE, build, meaningful

ASYMMETRIC = QuantizerSpec(Int(4, symmetric=False), PerGroup(4), Learned(), LearnedSoft(0.3))
DTYPES = (torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "spec", [ASYMMETRIC, QuantizerSpec(Int(4)), QuantizerSpec(Int(4), scale=MinimumError())], ids=repr
)
def test_scales_stay_in_float32(spec: QuantizerSpec, dtype: torch.dtype) -> None:
    x = torch.randn(4, 8)
    quantizer = build(spec, x)
    before, expected = copy.deepcopy(quantizer.state_dict()), quantizer(x)
    layer = nn.Sequential(quantizer, nn.Linear(8, 8))
    for move in (
        lambda: layer.to(dtype), lambda: layer.half(), lambda: layer.bfloat16(), lambda: layer.double(),
        lambda: layer.type(dtype), lambda: layer.to("cpu", dtype), lambda: layer.to(torch.zeros(1, dtype=dtype)),
    ):  # fmt: skip
        move()  # type: ignore[no-untyped-call]
        assert next(layer[1].parameters()).dtype != torch.float32
        for tensor in (*quantizer.parameters(), *quantizer.buffers(), quantizer.lo, quantizer.hi):
            assert tensor.dtype == torch.float32
        assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())
        assert torch.equal(quantizer(x), expected)
    out = quantizer(x.to(dtype))
    assert out.dtype == dtype


@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_in_half_precision_load_into_float32(assign: bool) -> None:
    trained = build(ASYMMETRIC, torch.randn(4, 8))
    loaded = FakeQuantizer(ASYMMETRIC, (4, 8))
    rounded = {name: tensor.bfloat16() for name, tensor in trained.state_dict().items()}
    loaded.load_state_dict(dict(rounded), assign=assign)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, rounded[name].float())
    assert loaded.grid == ASYMMETRIC.grid


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_has_no_influence(dtype: torch.dtype) -> None:
    """Lightning builds models of `bf16-true` under a default dtype of bfloat16."""
    x = torch.randn(4, 8)
    try:
        torch.set_default_dtype(dtype)
        quantizers = [
            build(dataclasses.replace(ASYMMETRIC, scale=scale), x) for scale in (Learned(), Entropy(), AbsMax())
        ]
        observing = FakeQuantizer(QuantizerSpec(Int(8), PerTensor(), Entropy()))
        observing.observer = observing.new_observer()
        observing(x)
        observing.find_scale()
        outputs = [quantizer(x) for quantizer in quantizers]
    finally:
        torch.set_default_dtype(torch.float32)
    for quantizer in (*quantizers, observing):
        for tensor in (*quantizer.parameters(), *quantizer.buffers(), quantizer.lo, *quantizer.state_dict().values()):
            assert tensor.dtype == torch.float32
    for out, scale in zip(outputs, (Learned(), Entropy(), AbsMax()), strict=True):
        assert torch.equal(out, build(dataclasses.replace(ASYMMETRIC, scale=scale), x)(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", FEW_GRIDS, ids=lambda grid: grid.label)
def test_precision_does_not_change_the_codes(grid: Grid, dtype: torch.dtype) -> None:
    """The same under autocast; and codes of a 16-bit master are those of its values in float32 (trap 26)."""
    x = torch.randn(*SHAPE)
    for granularity, layout, scale in meaningful(grid, (AbsMax(), AbsMean(), MinimumError(), Learned(AbsMax()))):
        quantizer = build(QuantizerSpec(grid, granularity, scale), x, layout)
        with torch.autocast("cpu", dtype=dtype):
            cast, codes = quantizer(x), quantizer.quantize(x).codes
            again = build(quantizer.spec, x, layout).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in quantizer.state_dict().items())
        assert torch.equal(cast, quantizer(x))
        assert torch.equal(codes, quantizer.quantize(x).codes)
        master = x.to(dtype)
        quantized = build(QuantizerSpec(grid, granularity, scale), master, layout).quantize(master)
        wide = build(QuantizerSpec(grid, granularity, scale), master.float(), layout).quantize(master.float())
        assert torch.equal(quantized.codes, wide.codes)
        assert torch.equal(quantized.scale, wide.scale)
        assert quantized.scale.dtype == torch.float32


@pytest.mark.parametrize(
    "gradient", [StraightThrough(), Clipped(), Soft(), LearnedSoft(), ElementwiseScaling()], ids=repr
)
def test_gradients_of_half_precision_come_back_in_half_precision(gradient: Any) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(4, 8).to(dtype).requires_grad_()
        quantizer = build(QuantizerSpec(Int(4), PerChannel(), Learned(), gradient), x)
        quantizer(x).sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == dtype
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in quantizer.parameters())
