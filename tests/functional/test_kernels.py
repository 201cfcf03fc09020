"""Kernels compiled on their own: the numbers of eager mode, few compilations, and a way on without a compiler."""

import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_qat import AbsMax, Clipped, Int, Learned, PerChannel, PerGroup, QuantizerSpec, StraightThrough
from lightning_qat.functional import kernels
from lightning_qat.functional.kernels import compiled_kernels
from lightning_qat.quantization import FakeQuantizer

implementation = importlib.import_module("lightning_qat.functional.fake_quantize")  # the name is a function's, too
SPECS = {
    "learned": QuantizerSpec(Int(4), PerChannel(), Learned(init=AbsMax())),
    "clipped": QuantizerSpec(Int(3, symmetric=False), PerGroup(4), AbsMax(), Clipped()),
}


@pytest.fixture(autouse=True)
def _small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(implementation, "_LARGE", 1)
    monkeypatch.setattr(implementation, "_WORTHWHILE", 1)
    torch.compiler.reset()
    kernels._COMPILED.clear()
    yield
    torch.compiler.reset()
    kernels._COMPILED.clear()


def results(quantizer: FakeQuantizer, x: Tensor) -> list[Tensor]:
    inputs = x.clone().requires_grad_()
    y = quantizer(inputs)
    return [y, *torch.autograd.grad(y, [inputs, *quantizer.parameters()], torch.ones_like(y).cumsum(0))]


@pytest.mark.parametrize("name", SPECS)
def test_numbers_of_eager_mode(name: str) -> None:
    quantizer, x = FakeQuantizer(SPECS[name], (12, 8)), 2 * torch.randn(12, 8)
    x[0, 0], x[1, 1] = torch.nan, torch.inf
    expected = results(quantizer, x)
    with compiled_kernels("aot_eager"):
        found = results(quantizer, x)
    assert len(kernels._COMPILED) == 2
    assert all(torch.equal(one, two) for one, two in zip(found[:2], expected[:2], strict=True))
    torch.testing.assert_close(found, expected)


def test_one_compilation_for_all_bit_widths_and_sizes() -> None:
    torch._dynamo.utils.counters.clear()
    with compiled_kernels("aot_eager"):
        for rows, bits in ((12, 4), (20, 3), (28, 2)):
            quantizer, x = FakeQuantizer(SPECS["learned"], (rows, 8)), torch.randn(rows, 8)
            quantizer.set_grid(Int(bits))
            results(quantizer, x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_only_inside_and_not_without_a_gradient_to_compute() -> None:
    spec = QuantizerSpec(Int(4), PerChannel(), AbsMax(), StraightThrough())
    quantizer, x = FakeQuantizer(spec, (6, 4)), torch.randn(6, 4)
    results(quantizer, x)
    assert not kernels._COMPILED
    with compiled_kernels("aot_eager"):
        results(quantizer, x)
    assert len(kernels._COMPILED) == 1
    results(quantizer, x)
    assert len(kernels._COMPILED) == 1


def test_without_being_asked_where_that_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_default", lambda device: {"cpu": "aot_eager"}[device])
    monkeypatch.setattr(kernels, "_UNASKED", 96)
    quantizer, x = FakeQuantizer(SPECS["learned"], (12, 8)), torch.randn(12, 8)
    with compiled_kernels(None):
        expected = results(quantizer, x)
    assert not kernels._COMPILED
    torch.testing.assert_close(results(quantizer, x), expected)
    assert len(kernels._COMPILED) == 2
    kernels._COMPILED.clear()
    monkeypatch.setattr(kernels, "_UNASKED", 97)
    results(quantizer, x)
    assert not kernels._COMPILED


def test_default_of_devices() -> None:
    kernels._default.cache_clear()
    assert kernels._default("cpu") is None
    assert kernels._default("cuda") == ("inductor" if importlib.util.find_spec("triton") else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_values_in_the_dtype_of_a_product(dtype: torch.dtype) -> None:
    """A softness is a number on CPUs, where it is read anyway, and a tensor elsewhere."""
    quantizer, x = FakeQuantizer(SPECS["learned"], (12, 8)), torch.randn(12, 8)
    setting = quantizer.detached_setting(x)[1]
    expected = replace(setting, softness=0.25).fake_quantized(x, dtype)
    with compiled_kernels("aot_eager"):
        found = replace(setting, softness=torch.tensor(0.25)).fake_quantized(x, dtype)
    assert len(kernels._COMPILED) == 1
    assert found.dtype == dtype
    assert not torch.equal(found, setting.fake_quantized(x, dtype))
    torch.testing.assert_close(found, expected)


def test_goes_on_without_a_compiler(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, x = FakeQuantizer(SPECS["learned"], (12, 8)), torch.randn(12, 8)
    expected = results(quantizer, x)

    def failing(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> Any:
            raise RuntimeError("no C++ compiler\nand more")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    with compiled_kernels(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = results(quantizer, x)
            assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert [record.getMessage() for record in caplog.records] == [
        "Kernels are not compiled, the eager operations go on: no C++ compiler"
    ]
