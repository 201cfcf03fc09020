"""Fast randomized Hadamard rotation of the last dimension."""

import torch
from torch import Tensor


def power_of_two_blocks(size: int) -> list[int]:
    """Split a dimension into powers of two, largest first.

    >>> power_of_two_blocks(96)
    [64, 32]
    """
    return [1 << bit for bit in reversed(range(size.bit_length())) if size >> bit & 1]


def walsh_hadamard(x: Tensor) -> Tensor:
    r"""Multiply the last dimension by the Hadamard matrix H (Sylvester order), :math:`H H^T = n I`, in O(n log n).

    Args:
        x: [..., n] with n a power of two.

    Raises:
        ValueError: if n is not a power of two.

    >>> walsh_hadamard(torch.tensor([1.0, 2.0]))
    tensor([ 3., -1.])
    """
    size = int(x.shape[-1])  # torch.jit.trace makes tensors of sizes
    if size < 1 or size & (size - 1):
        raise ValueError(f"walsh_hadamard: the last dimension, {size}, is no power of two; use hadamard_rotate")
    shape, half = x.shape, 1
    while half < size:
        pairs = x.reshape(*shape[:-1], size // (2 * half), 2, half)
        first, second = pairs.unbind(-2)
        x = torch.stack((first + second, first - second), dim=-2).reshape(shape)
        half *= 2
    return x


def random_signs(size: int, seed: int) -> Tensor:
    """Return a reproducible vector of +1 and -1, shape [size], that leaves the global generator alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (size,), generator=generator, device="cpu").mul_(2).sub_(1).float()


def _rotated_blocks(x: Tensor) -> list[Tensor]:
    sizes = power_of_two_blocks(int(x.shape[-1]))
    return [walsh_hadamard(block) * size**-0.5 for block, size in zip(x.split(sizes, dim=-1), sizes, strict=True)]


def hadamard_rotate(x: Tensor, signs: Tensor) -> Tensor:
    r"""Rotate the last dimension by an orthogonal randomized Hadamard matrix R, computed in float32 or wider.

    Any size works: the dimension is split into blocks of powers of two, each rotated by :math:`H D / \sqrt{n}`, in
    O(n log n). Features mix within their block alone: an odd size leaves the last one as it is, but for its sign. For a
    linear layer, :math:`(x R) (W R)^T = x W^T`.

    Args:
        x: [..., n].
        signs: diagonal D of +-1, shape [n].

    Source: QuIP#, arXiv:2402.04396 section 3; deviation: blocks instead of a Kronecker factor for other sizes.

    >>> hadamard_rotate(torch.tensor([1.0, 1.0]), torch.ones(2))
    tensor([1.4142, 0.0000])
    """
    wide = (x if x.dtype in (torch.float32, torch.float64) else x.float()) * signs
    return torch.cat(_rotated_blocks(wide), dim=-1).to(x.dtype)


def hadamard_unrotate(x: Tensor, signs: Tensor) -> Tensor:
    """Apply the inverse of :func:`hadamard_rotate` to the last dimension."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return (torch.cat(_rotated_blocks(wide), dim=-1) * signs).to(x.dtype)
