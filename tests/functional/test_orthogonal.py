"""Orthogonalization against the singular value decomposition, in float64."""

import pytest
import torch

from lightning_qat.functional import orthogonal
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


@pytest.mark.parametrize("shape", [(4, 6), (4, 8), (4, 12), (12, 4), (1, 3)])  # twice as long: by the Gram matrix
@pytest.mark.parametrize("num_iterations", [1, 2, 3, 5])
def test_the_formula(shape: tuple[int, int], num_iterations: int) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    u, values, v = torch.linalg.svd(x, full_matrices=False)
    values = values / x.norm()
    for _ in range(num_iterations):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    found = orthogonalized(x, num_iterations)
    torch.testing.assert_close(found, u * values @ v, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(orthogonalized(100 * x, num_iterations), found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(48, 64), (48, 96), (200, 48)])
def test_float32_loses_little(shape: tuple[int, int]) -> None:
    x = torch.randn(shape) @ torch.diag(torch.logspace(-4, 0, shape[1]))  # singular values far apart
    expected = orthogonalized(x.double())
    assert float((orthogonalized(x) - expected).norm() / expected.norm()) < 1e-4


def test_zeros_stay_zeros() -> None:
    for shape in ((3, 4), (3, 9)):
        assert torch.equal(orthogonalized(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(128, 180), (400, 128)])
@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_large_matrices(shape: tuple[int, int], has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orthogonal, "_has_bfloat16", lambda: has_bfloat16)
    x = torch.randn(shape)
    expected, found = orthogonalized(x.double()), orthogonalized(x)
    assert found.dtype == torch.float32
    difference = float((found - expected).norm() / expected.norm())
    assert difference < (0.03 if has_bfloat16 else 1e-4)
    assert (difference > 1e-4) == has_bfloat16
    spread = torch.linalg.svdvals(found.double())
    assert float(spread.max()) < 1.25
    assert float(spread.min()) > 0.6
