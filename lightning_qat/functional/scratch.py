"""Memory for temporaries."""

import torch
from torch import Tensor


class Scratch:
    """Memory that the pieces of a tensor share, one after the other: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._taken: int | None = None

    def begin(self, *, shared: bool) -> None:
        """Start a piece, the first the largest; where there is but one, nothing is shared."""
        self._taken = 0 if shared else None

    def take(self, like: Tensor, other: Tensor) -> Tensor | None:
        """Return the next buffer of a piece, for a result in the shape of the first tensor; None: a fresh one."""
        if self._taken is None:
            return None
        if self._taken == len(self._buffers):
            self._buffers.append(torch.empty(like.numel(), dtype=torch.result_type(like, other)))
        self._taken += 1
        return self._buffers[self._taken - 1][: like.numel()].view(like.shape)
