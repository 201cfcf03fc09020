"""Transforms: what happens to weight and input of a layer before they are quantized."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_qat.functional.hadamard import hadamard_rotate, random_signs
from lightning_qat.quantization._checks import check_positive


class Transform(ABC):
    """A frozen value that builds the module which does the work."""

    changes_input: ClassVar[bool] = True
    changes_weight: ClassVar[bool] = True

    @abstractmethod
    def build(self, in_features: int) -> "TransformModule":
        """Return the module for a layer with this input width."""

    @property
    def label(self) -> str:
        """Compact name used in logs."""
        return type(self).__name__.lower()


class TransformModule(nn.Module, ABC):
    """The working half of a transform; holds no state that a checkpoint needs."""

    @property
    @abstractmethod
    def value(self) -> Transform:
        """The frozen value that built this module."""

    def weight(self, weight: Tensor) -> Tensor:
        """Transform the latent weight."""
        return weight

    def input(self, x: Tensor) -> Tensor:
        """Transform the input."""
        return x


@final
@dataclass(frozen=True)
class Center(Transform):
    """Subtract the mean of the weight before it is quantized. Source: BitNet, arXiv:2310.11453 eq. 1-3."""

    changes_input: ClassVar[bool] = False

    @override
    def build(self, in_features: int) -> TransformModule:
        return _Centering()


@final
@dataclass(frozen=True)
class Hadamard(Transform):
    """Rotate the input dimension of weight and input by the same random orthogonal matrix: equal in float, less spiky.

    Args:
        seed: of the random signs, an integer from -2^63 to 2^63 - 1.

    Raises:
        TypeError: seed is no integer.
        ValueError: seed outside 64 bits.

    Source: QuIP#, arXiv:2402.04396; QuaRot, arXiv:2404.00456.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f"Hadamard: seed={self.seed!r} is not an integer; choose one such as 0")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"Hadamard: seed={self.seed} is not allowed; choose an integer of 64 bits, such as 0")

    @override
    def build(self, in_features: int) -> TransformModule:
        return _Rotation(in_features, self.seed)

    @property
    @override
    def label(self) -> str:
        return f"hadamard{self.seed}"


@final
@dataclass(frozen=True)
class Normalize(Transform):
    """Normalize each token of the input to unit root mean square, without parameters, before it is quantized.

    Args:
        eps: added to the mean square, positive and finite.

    Raises:
        ValueError: eps that is not positive or not finite.

    Source: the normalization inside BitLinear, arXiv:2310.11453 section 2.1 (there LayerNorm), arXiv:2402.17764.
    """

    eps: float = 1e-5
    changes_weight: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive("Normalize: eps", self.eps)

    @override
    def build(self, in_features: int) -> TransformModule:
        return _Normalization(self.eps)


@final
class _Centering(TransformModule):
    @property
    @override
    def value(self) -> Transform:
        return Center()

    @override
    def weight(self, weight: Tensor) -> Tensor:
        wide = weight if weight.dtype == torch.float64 else weight.float()
        return (wide - wide.mean()).to(weight.dtype)


@final
class _Rotation(TransformModule):
    signs: Tensor

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        self.seed = seed
        # On the device of the context: on meta, to_empty() must know that there were no values to keep.
        self.register_buffer("signs", random_signs(size, seed).to(torch.get_default_device()), persistent=False)

    @property
    @override
    def value(self) -> Transform:
        return Hadamard(self.seed)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was_meta = self.signs.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.signs.is_meta:  # to_empty() leaves garbage where signs belong
            self.signs.copy_(random_signs(self.signs.numel(), self.seed))
        return self

    @override
    def weight(self, weight: Tensor) -> Tensor:
        return hadamard_rotate(weight, self.signs)

    @override
    def input(self, x: Tensor) -> Tensor:
        return hadamard_rotate(x, self.signs)


@final
class _Normalization(TransformModule):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    @property
    @override
    def value(self) -> Transform:
        return Normalize(self.eps)

    @override
    def input(self, x: Tensor) -> Tensor:
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
