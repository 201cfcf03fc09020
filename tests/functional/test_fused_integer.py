"""Products of int8 codes: exact for every shape and layout, and scaled with no more than the epilogue's roundings."""

import pytest
import torch
from torch import Tensor

from lightning_qat.functional import integer
from lightning_qat.functional.integer import integer_product, integers_are_exact, integers_pay, scaled_product


def random_codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (17, 33, 65), (0, 4, 3), (4, 0, 3), (4, 3, 0), (1, 300, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_value_of_product(shape: tuple[int, int, int], transposed: bool) -> None:
    tokens, features, outputs = shape
    a = random_codes(features, tokens).t() if transposed else random_codes(tokens, features)
    b = random_codes(features, outputs).t() if transposed else random_codes(outputs, features)
    found = integer_product(a, b)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), a.long() @ b.long().t())


def test_sums_use_all_32_bits() -> None:
    a = torch.full((1, integer.MAX_FEATURES - 1), -128, dtype=torch.int8)
    assert integer_product(a, a).item() == 2**14 * (2**17 - 1)


@pytest.mark.parametrize("chunk", [1, 40, 1 << 17])
def test_value_of_scaled_product(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "_CHUNK", chunk)
    a, b, s, t, bias = random_codes(11, 19), random_codes(5, 19), torch.rand(11, 1), torch.rand(1, 5), torch.randn(5)
    expected = (a.double() @ b.double().t()) * s.double() * t.double() + bias.double()
    found = scaled_product(a, b, s, t, bias, dtype=torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=4 * 2**-24, atol=1e-4)  # three roundings, one absorbed
    assert torch.equal(found, torch.cat([scaled_product(a[i : i + 1], b, s[i : i + 1], t, bias, dtype=torch.float32)
                                         for i in range(11)]))  # fmt: skip


def test_padding_changes_nothing() -> None:
    for tokens, features, outputs in [(1, 1, 1), (5, 13, 3), (40, 8, 8), (0, 5, 2)]:
        a, b = random_codes(tokens, features), random_codes(outputs, features)
        assert torch.equal(integer._padded_product(a, b).long(), a.long() @ b.long().t())


def test_capability_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(integer, "_MEASURED", {})
    monkeypatch.setattr(integer, "_seconds", lambda run, device: calls.append(device) or float(len(calls) % 2))
    assert integers_pay("cpu", torch.float32) is integers_are_exact("cpu")  # floats take 1 s, integers 0 s
    assert integers_pay("cpu", torch.float32) is integers_are_exact("cpu")
    assert len(calls) == 2 * integer._REPETITIONS * integers_are_exact("cpu")
    assert not integers_pay("cpu", torch.float64)
    assert not integers_pay("meta", torch.float32)


def test_a_device_without_kernel_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(a: Tensor, b: Tensor) -> Tensor:
        raise RuntimeError("not implemented")

    monkeypatch.setattr(integer, "integer_product", refuse)
    monkeypatch.setattr(integer, "_EXACT", {})
    assert not integers_are_exact("cpu")


def test_a_device_that_saturates_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(a: Tensor, b: Tensor) -> Tensor:
        pairs = (a.int()[:, None] * b.int()).unflatten(-1, (-1, 2)).sum(-1)
        return pairs.clamp(-32768, 32767).sum(-1).int()

    monkeypatch.setattr(integer, "integer_product", saturating)
    monkeypatch.setattr(integer, "_EXACT", {})
    a = torch.tensor([[-128, -128]], dtype=torch.int8)
    assert saturating(a, a).item() == 32767  # what it should be is 32768
    assert not integers_are_exact("cpu")
