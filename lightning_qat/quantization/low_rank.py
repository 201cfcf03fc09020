"""LowRank: the trainable correction of a frozen weight, merged before the weight is quantized."""

import math
from collections.abc import Callable
from typing import Any, Final, Self, final

import torch
from torch import Tensor, nn

from lightning_qat.functional.low_rank import merge_low_rank, pack_base, unpack_base
from lightning_qat.quantization._checks import check_number

BASES: Final = {"same": None, "bfloat16": 16, "int8": 8, "int4": 4}
"""How the frozen weight is stored, and in how many bits."""


@final
class LowRank(nn.Module):
    r"""Adds :math:`\frac{\alpha}{r} B A` to a weight, so that what is quantized is the merged weight.

    State: ``a`` and ``b`` in float32 (they stay so under ``.to(bfloat16)`` and ``.half()``), ``base_scale`` where the
    base is packed, and a tensor with alpha, by which a checkpoint of another setting is told. A starts uniform, B at
    zero: the layer starts as it was.

    Dropout multiplies the input features of the correction, as in LoRA, but by one mask for all tokens of a forward:
    there is one merged weight, so that a mask per token is not possible. Only forwards in training mode draw one.

    Args:
        shape: of the weight; all dimensions but the first count as inputs.
        rank: r, 1 to min(outputs, inputs).
        alpha: positive.
        dropout: probability in [0, 1).
        base: how the weight is stored: ``"same"``, ``"bfloat16"``, ``"int8"``, ``"int4"``.
        dtype: dtype that the layer computes in.
        name: dotted name of the weight, for messages.

    Raises:
        ValueError: a value that is not allowed; a rank above min(outputs, inputs).

    Source: LoRA, arXiv:2106.09685 (the correction, its start and its dropout).
    """

    base_scale: Tensor | None

    def __init__(
        self, shape: tuple[int, ...], rank: int, alpha: float, dropout: float = 0.0, *, base: str = "same",
        dtype: torch.dtype = torch.float32, name: str = "weight",
    ) -> None:  # fmt: skip
        super().__init__()
        check_low_rank(rank, alpha, dropout, base)
        outputs, inputs = shape[0], math.prod(shape[1:])
        largest = min(outputs, inputs)
        if rank > largest:
            raise ValueError(
                f"{name}: rank={rank} exceeds min(outputs, inputs) = min({outputs}, {inputs}) = {largest}; choose a "
                "smaller rank, or leave the layer out by match="
            )
        self.shape, self.rank, self.alpha, self.dropout = tuple(shape), rank, float(alpha), float(dropout)
        self.base, self.dtype, self.name = base, dtype, name
        self.a = nn.Parameter(torch.empty(rank, inputs, dtype=torch.float32))
        self.b = nn.Parameter(torch.empty(outputs, rank, dtype=torch.float32))
        self.register_buffer("base_scale", None)
        self.reset()

    @property
    def scaling(self) -> float:
        """Alpha / rank."""
        return self.alpha / self.rank

    @property
    def packed(self) -> bool:
        """Whether the weight is stored as integers."""
        return self.base in ("int8", "int4")

    @torch.no_grad()
    def reset(self) -> None:
        """Start anew: the correction is zero."""
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.b.zero_()

    @torch.no_grad()
    def store(self, weight: Tensor) -> Tensor:
        """Return a floating weight as it is stored; the scales of a packed one are kept here."""
        if not self.packed:
            return weight.to(torch.bfloat16) if self.base == "bfloat16" else weight
        codes, scale = pack_base(weight, BASES[self.base] or 0)
        if self.base_scale is None or self.base_scale.is_meta:
            self.base_scale = scale
        else:
            self.base_scale.copy_(scale)
        return codes

    def sources(self, weight: Tensor) -> tuple[Tensor | None, ...]:
        """Return what :meth:`merge` takes, with a fresh mask of dropout in training.

        Args:
            weight: as it is stored.
        """
        keep = None
        if self.training and self.dropout:
            left = 1.0 - self.dropout
            keep = torch.empty(self.a.shape[1], device=self.a.device).bernoulli_(left).div_(left)
        return weight, self.a, self.b, keep, self.base_scale

    def merge(
        self, weight: Tensor, a: Tensor, b: Tensor, keep: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """Return the merged weight in float32 (float64 for a float64 weight)."""
        base = weight if scale is None else unpack_base(weight, scale, self.shape)
        return merge_low_rank(base, a, b, self.scaling, keep)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the merged weight as this forward computes with it."""
        return self.merge(*self.sources(weight))  # type: ignore[arg-type]

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """Return the merged weight as it is deployed: without dropout, without gradient."""
        return self.merge(weight, self.a, self.b, None, self.base_scale)

    def extra_repr(self) -> str:
        """Return the settings."""
        shown = f"rank={self.rank}, alpha={self.alpha:g}"
        shown += f", dropout={self.dropout:g}" if self.dropout else ""
        return shown + (f", base={self.base!r}" if self.base != "same" else "")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_float32(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if out.dtype == tensor.dtype:
                return out
            return torch.empty_like(tensor, device=out.device) if tensor.is_meta else tensor.to(out.device)

        was_meta = self.a.is_meta
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.a.device)).dtype
        super()._apply(keep_float32, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.a.is_meta:  # to_empty() leaves garbage
            self.reset()
        return self

    def get_extra_state(self) -> Tensor:
        """Return alpha as a tensor of one number."""
        return torch.tensor([self.alpha], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: that alpha is the same was checked before."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        scale = state_dict.get(f"{prefix}base_scale")
        if f"{prefix}a" not in state_dict:  # a checkpoint without adapters: the correction of its weights is zero
            if isinstance(scale, Tensor) and self.base_scale is not None:
                self.base_scale.copy_(scale)
            with torch.no_grad():
                self.b.zero_()
            return
        problem = self._problem(state_dict, prefix)
        if problem:
            errors.append(f"{self.name}: {problem}")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _problem(self, state_dict: dict[str, Any], prefix: str) -> str:
        a, alpha = state_dict[f"{prefix}a"], state_dict.get(f"{prefix}_extra_state")
        if isinstance(a, Tensor) and a.dim() == 2 and a.shape[0] != self.rank:
            return f"the checkpoint has rank={a.shape[0]}, the model rank={self.rank}; use the checkpoint's"
        if isinstance(alpha, Tensor) and float(alpha[0]) != self.alpha:
            return f"the checkpoint has alpha={float(alpha[0]):g}, the model alpha={self.alpha:g}; use the checkpoint's"
        return ""


def check_low_rank(rank: int, alpha: float, dropout: float, base: str, who: str = "LowRank") -> None:
    """Check what does not depend on a layer.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{who}: rank={rank!r} is not allowed; choose a positive integer such as 8")
    positive = f"a positive number such as {2 * rank}"
    check_number(f"{who}: alpha", alpha, positive, holds=lambda v: 0 < v < float("inf"))
    check_number(f"{who}: dropout", dropout, "a probability below 1, such as 0.05", holds=lambda v: 0 <= v < 1)
    if base not in BASES:
        raise ValueError(f"{who}: base={base!r} is not allowed; choose one of {sorted(BASES)}")
