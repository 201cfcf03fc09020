"""The nearest matrix with orthogonal rows or columns, approximately."""

import functools
from typing import Final

import torch
from torch import Tensor

_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
_SMALLEST_NORM: Final = 1e-7
_LARGE: Final = 128  # shorter side from which on products in bfloat16 are faster on CPUs that have them


def orthogonalized(matrix: Tensor, num_iterations: int = 5) -> Tensor:
    r"""Return a matrix with the singular vectors of another and singular values near 1, in its dtype.

    :math:`X \leftarrow a X + b (X X^T) X + c (X X^T)^2 X`, started at the matrix over its Frobenius norm.
    After 5 iterations singular values that were at least 0.2 % of that norm lie within 0.68 .. 1.21. Zeros stay zeros.

    Args:
        matrix: (rows, columns), floating point, m the shorter side and n the longer.
        num_iterations: 1 or more. Each takes 4 m^2 n + 2 m^3 multiplications and additions; where n is at least 2 m,
            not in bfloat16, the first takes 4 m^2 n + 2 m^3 and each further one 8 m^3.

    Source: Newton-Schulz with the coefficients of K. Jordan's Muon (2024). It is computed in bfloat16 on CUDA, as
    there, and from m = 128 on, on CPUs with instructions for it (AVX-512, AMX); else in float32, float64 in float64.

    >>> x = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0]])
    >>> orthogonalized(x).abs().gt(0.6).tolist()
    [[True, False, False], [False, True, False]]
    """
    x = matrix.to(_dtype(matrix))
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=_SMALLEST_NORM)
    if x.dtype != torch.bfloat16 and x.shape[1] >= 2 * x.shape[0]:
        x = _factor(x @ x.T, num_iterations) @ x
    else:
        a, b, c = _COEFFICIENTS
        for _ in range(num_iterations):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    found: Tensor = (x.T if tall else x).to(matrix.dtype)
    return found


def _dtype(matrix: Tensor) -> torch.dtype:
    if matrix.dtype == torch.float64:
        return torch.float64
    fast = matrix.is_cuda or (matrix.is_cpu and min(matrix.shape) >= _LARGE and _has_bfloat16())
    return torch.bfloat16 if fast else torch.float32


@functools.cache
def _has_bfloat16() -> bool:
    """Whether the CPU has instructions for products in bfloat16; without them they are slower than in float32."""
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _polynomial(gram: Tensor) -> Tensor:
    """Return a I + b G + c G^2."""
    a, b, c = _COEFFICIENTS
    found: Tensor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    found.diagonal().add_(a)
    return found


def _factor(gram: Tensor, num_iterations: int) -> Tensor:
    """Return what all iterations multiply X by, from its Gram matrix alone; not in bfloat16, which G would not survive.

    An iteration makes p(G)^2 G of the Gram matrix: polynomials of it commute.
    """
    factor = polynomial = _polynomial(gram)
    for _ in range(num_iterations - 1):
        gram = polynomial @ (polynomial @ gram)
        polynomial = _polynomial(gram)
        factor = polynomial @ factor
    return factor
