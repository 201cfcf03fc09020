"""Orthogonalization against the singular value decomposition, in float64."""

import pytest
import torch

from lightning_qat.functional.orthogonal import orthogonalized


@pytest.mark.parametrize("shape", [(8, 8), (3, 17), (17, 3), (1, 5), (5, 1), (64, 48)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_vectors_stay_and_values_become_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    u, values, v = torch.linalg.svd(x.double(), full_matrices=False)
    result = orthogonalized(x)
    assert result.dtype == dtype
    assert result.shape == x.shape
    found = u.T @ result.double() @ v.T
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    assert float((found - found.diag().diag()).abs().max()) < tolerance
    large = found.diag()[values > 0.002 * values.norm()]
    assert float(large.min()) > 0.68 - tolerance
    assert float(large.max()) < 1.21 + tolerance


def test_the_formula() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    u, values, v = torch.linalg.svd(x, full_matrices=False)
    values = values / x.norm()
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonalized(x, 3), u * values @ v, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(orthogonalized(100 * x), orthogonalized(x), rtol=1e-9, atol=1e-12)


def test_zeros_stay_zeros() -> None:
    assert torch.equal(orthogonalized(torch.zeros(3, 4)), torch.zeros(3, 4))
