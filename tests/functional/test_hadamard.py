"""Hadamard rotation: orthogonal, exact where integers allow it, reproducible."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_qat.functional import hadamard_rotate, hadamard_unrotate, random_signs, walsh_hadamard
from lightning_qat.functional.hadamard import power_of_two_blocks
from tests import _reference as ref

SIZES = (1, 2, 3, 5, 7, 12, 31, 64, 96, 100, 127, 257)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 64])
def test_matrix_is_the_sylvester_matrix(size: int) -> None:
    matrix = walsh_hadamard(torch.eye(size, dtype=torch.float64))
    assert torch.equal(matrix, ref.walsh_hadamard_matrix(size))


@pytest.mark.parametrize("size", [1, 2, 4, 32, 256, 1024])
def test_matrix_times_its_transpose(size: int) -> None:
    """INV-4: H Ht = n I, exactly (integers)."""
    matrix = walsh_hadamard(torch.eye(size))
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size))
    assert torch.equal(walsh_hadamard(walsh_hadamard(torch.eye(size))), size * torch.eye(size))


@pytest.mark.parametrize("size", [2**18, 2**18 - 1])
def test_a_large_dimension_does_not_need_the_matrix(size: int) -> None:
    """The matrix would take 256 GiB; n log n takes a moment. Ones become one number per block."""
    if size == 2**18:
        expected = torch.zeros(size)
        expected[0] = size
        assert torch.equal(walsh_hadamard(torch.ones(size)), expected)
    x, signs = torch.ones(1, size), random_signs(size, 0)
    rotated = hadamard_rotate(x, signs)
    torch.testing.assert_close(hadamard_unrotate(rotated, signs), x, rtol=1e-5, atol=1e-5)
    assert float(rotated.norm()) == pytest.approx(size**0.5, rel=1e-5)


@pytest.mark.parametrize("size", [4, 64, 256, 4096])
def test_number_of_operations_is_n_log_n(size: int) -> None:
    """Additions and subtractions, counted: one per element and level."""
    counted = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal counted
            result = func(*args, **(kwargs or {}))
            counted += result.numel() if func in (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor) else 0
            assert func not in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
            return result

    with Count():
        walsh_hadamard(torch.ones(size))
    assert counted == size * (size.bit_length() - 1)


@pytest.mark.parametrize("size", [0, 3, 6, 12, 100])
def test_sizes_that_are_no_power_of_two_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=rf"walsh_hadamard: .*{size}.*power of two.*hadamard_rotate"):
        walsh_hadamard(torch.ones(2, size))


@pytest.mark.parametrize("size", SIZES)
def test_rotation_is_orthogonal_and_undone(size: int) -> None:
    signs = random_signs(size, seed=3)
    matrix = hadamard_rotate(torch.eye(size, dtype=torch.float64), signs)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0.0, atol=1e-12)
    x = torch.randn(2, 3, size)
    torch.testing.assert_close(hadamard_unrotate(hadamard_rotate(x, signs), signs), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_rotation_is_the_matrix_of_its_blocks(size: int) -> None:
    signs = random_signs(size, seed=1)
    blocks = [ref.walsh_hadamard_matrix(n) / n**0.5 for n in power_of_two_blocks(size)]
    x = torch.randn(4, size, dtype=torch.float64)
    expected = (x * signs) @ torch.block_diag(*blocks)
    torch.testing.assert_close(hadamard_rotate(x, signs), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_products_of_rotated_tensors_are_the_same(size: int) -> None:
    """INV-4: rotated and unrotated float forwards agree."""
    x, weight, signs = torch.randn(6, size), torch.randn(5, size), random_signs(size, seed=0)
    rotated = hadamard_rotate(x, signs) @ hadamard_rotate(weight, signs).T
    torch.testing.assert_close(rotated, x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", range(1, 70))
def test_blocks_add_up(size: int) -> None:
    blocks = power_of_two_blocks(size)
    assert sum(blocks) == size
    assert all(n & (n - 1) == 0 for n in blocks)
    assert blocks == sorted(set(blocks), reverse=True)


def test_rotation_spreads_a_spike() -> None:
    spike = torch.zeros(64)
    spike[17] = 8.0
    torch.testing.assert_close(hadamard_rotate(spike, random_signs(64, 0)).abs(), torch.ones(64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_arithmetic_is_float32_or_wider(dtype: torch.dtype) -> None:
    x, signs = torch.randn(3, 96).to(dtype), random_signs(96, 0)
    rotated = hadamard_rotate(x, signs)
    assert rotated.dtype == dtype
    wide = dtype if dtype == torch.float64 else torch.float32
    assert torch.equal(rotated, hadamard_rotate(x.to(wide), signs).to(dtype))
    assert hadamard_unrotate(rotated, signs).dtype == dtype


def test_gradient_is_the_inverse_rotation() -> None:
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    signs = random_signs(12, 5).double()
    assert torch.autograd.gradcheck(lambda v: hadamard_rotate(v, signs), (x,))


def test_signs_are_reproducible_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first = random_signs(1000, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, random_signs(1000, seed=7))
    assert not torch.equal(first, random_signs(1000, seed=8))
    assert first.abs().eq(1).all()
    assert 400 < int((first > 0).sum()) < 600
    with torch.device("meta"):
        assert torch.equal(random_signs(1000, seed=7), first)
