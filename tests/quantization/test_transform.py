"""Transforms around the quantizers: equal in float, exact in reversal, without state in checkpoints."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from lightning_qat.quantization import Center, Hadamard, Normalize, Transform

TRANSFORMS: tuple[Transform, ...] = (Center(), Hadamard(0), Hadamard(5), Normalize())
each_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)


@pytest.mark.parametrize("size", [1, 8, 12, 31])
def test_hadamard_leaves_the_product_as_it_is(size: int) -> None:
    rotation = Hadamard(3).build(size)
    x, weight = torch.randn(5, size), torch.randn(4, size)
    rotated = rotation.input(x) @ rotation.weight(weight).T
    torch.testing.assert_close(rotated, x @ weight.T, rtol=1e-4, atol=1e-4)
    if size > 1:
        assert not torch.allclose(rotation.weight(weight), weight)


def test_center_subtracts_the_mean_of_the_weight_alone() -> None:
    centering = Center().build(8)
    weight, x = torch.randn(4, 8) + 3, torch.randn(2, 8)
    torch.testing.assert_close(
        centering.weight(weight).double(), weight.double() - weight.double().mean(), rtol=0, atol=1e-6
    )
    assert centering.input(x) is x
    assert not Center().changes_input


def test_center_of_half_precision_is_computed_in_float32() -> None:
    weight = (torch.randn(64, 64) + 300).bfloat16()
    out = Center().build(64).weight(weight)
    assert out.dtype == torch.bfloat16
    wide = weight.float()
    assert torch.equal(out, (wide - wide.mean()).bfloat16())


def test_normalize_gives_tokens_unit_root_mean_square() -> None:
    normalization = Normalize(1e-12).build(8)
    x, weight = 7 * torch.randn(3, 5, 8), torch.randn(4, 8)
    torch.testing.assert_close(normalization.input(x).square().mean(-1), torch.ones(3, 5))
    assert normalization.weight(weight) is weight
    assert torch.isfinite(Normalize().build(8).input(torch.zeros(2, 8))).all()
    strong = Normalize(1.0).build(1).input(torch.tensor([[1.0]]))
    assert strong.item() == pytest.approx(2**-0.5)


@each_transform
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(transform: Transform, dtype: torch.dtype) -> None:
    built = transform.build(8)
    x = torch.randn(4, 8, dtype=dtype)
    assert built.input(x).dtype == dtype
    assert built.weight(x).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(built.input(x), transform.build(8).input(x))


@each_transform
def test_gradients_pass(transform: Transform) -> None:
    built = transform.build(6).double()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(built.input, (x,))
    assert torch.autograd.gradcheck(built.weight, (x,))


@each_transform
def test_no_state_and_the_same_after_copies_moves_and_meta(transform: Transform) -> None:
    built = transform.build(12)
    assert not built.state_dict()
    x = torch.randn(2, 12)
    expected = built.input(x), built.weight(x)
    with torch.device("meta"):
        born = transform.build(12)

    def same(other: torch.nn.Module) -> bool:
        found: tuple[Tensor, Tensor] = other.input(x), other.weight(x)  # type: ignore[operator]
        return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))

    assert same(copy.deepcopy(built))
    assert same(pickle.loads(pickle.dumps(built)))
    assert same(transform.build(12))
    assert same(born.to_empty(device="cpu"))
    assert same(built.to("meta").to_empty(device="cpu"))
    assert same(transform.build(12).bfloat16().float())
