"""What calibration sees of an input: a histogram whose range is a power of two, so that histograms add exactly."""

import math
from typing import Final, final

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_qat.functional.scaling import Sample

_BINS: Final = 4096
_CHUNK: Final = 1 << 18  # values counted at a time on CPU: their indices then stay in the cache
_ACCELERATOR_CHUNK: Final = 1 << 24
_LEAST_EXPONENT: Final = -99  # the range where every value is zero; scales are never smaller


@final
class Observer:
    """Accumulates the distribution of a tensor over batches; mergeable across processes.

    Args:
        momentum: share of the past in the moving average of the absolute maximum, in [0, 1).

    Non-finite values are not counted.
    """

    def __init__(self, momentum: float = 0.9) -> None:
        self.momentum = momentum
        self.num_batches = 0
        self.average_amax = 0.0
        self.minimum, self.maximum = math.inf, -math.inf
        self.exponent: int | None = None  # the histogram spans -2**exponent .. 2**exponent
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Count the finite values of a batch."""
        values = x.detach().float().flatten()
        if values.numel() == 0:
            return
        minimum, maximum = float(values.amin()), float(values.amax())
        if not (math.isfinite(minimum) and math.isfinite(maximum)):  # rare, and slow: aminmax() and masks are, too
            self.update(values[torch.isfinite(values)])
            return
        amax = max(-minimum, maximum)
        self.minimum, self.maximum = min(self.minimum, minimum), max(self.maximum, maximum)
        self.num_batches += 1
        past = self.average_amax if self.num_batches > 1 else amax
        self.average_amax = self.momentum * past + (1 - self.momentum) * amax
        self._widen(max(math.frexp(amax)[1], _LEAST_EXPONENT) if amax > 0 else _LEAST_EXPONENT)
        for part in values.split(_CHUNK if values.device.type == "cpu" else _ACCELERATOR_CHUNK):
            self.counts += self._count(part)

    def _count(self, values: Tensor) -> Tensor:
        """Count values per bin, exactly: torch.histc rounds at the borders of bins and stops counting at 2**24."""
        assert self.exponent is not None  # noqa: S101 - set by _widen
        bins_per_unit = math.ldexp(_BINS / 2, -self.exponent)
        index = (values * bins_per_unit).floor_().add_(_BINS // 2)  # small integers, exact as floats
        return torch.bincount(index.to(torch.int16), minlength=_BINS).double().cpu()

    def _widen(self, exponent: int) -> None:
        """Merge pairs of bins around the center until the range is 2**exponent."""
        if self.exponent is None:
            self.exponent = exponent
        while self.exponent < exponent:
            merged = self.counts.reshape(-1, 2).sum(-1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[_BINS // 4 : _BINS - _BINS // 4] = merged
            self.exponent += 1

    def synchronize(self) -> None:
        """Combine the observers of all processes; afterwards all are equal. A no-op in a single process."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        parts: list[dict[str, object] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self.__dict__)
        observers = [Observer.__new__(Observer) for _ in parts]
        for observer, state in zip(observers, parts, strict=True):
            observer.__dict__.update(state or {})
        self._merge([observer for observer in observers if observer.num_batches])

    def _merge(self, seen: list["Observer"]) -> None:
        if not seen:
            return
        exponent = max(o.exponent for o in seen if o.exponent is not None)
        for observer in seen:
            observer._widen(exponent)
        self.exponent = exponent
        self.counts = torch.stack([o.counts for o in seen]).sum(0)
        self.minimum, self.maximum = min(o.minimum for o in seen), max(o.maximum for o in seen)
        self.num_batches = sum(o.num_batches for o in seen)
        self.average_amax = sum(o.average_amax for o in seen) / len(seen)

    def sample(self) -> Sample:
        """Return what was seen as weighted values, for :meth:`Scale.find`.

        Raises:
            ValueError: if nothing was seen.
        """
        if self.exponent is None:
            raise ValueError("no finite value was observed")
        limit = 2.0**self.exponent
        centers = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (2 * limit / _BINS) - limit
        filled = self.counts > 0
        values = centers[filled].clamp(self.minimum, self.maximum).float()
        numbers = torch.tensor([[self.minimum], [self.maximum], [self.average_amax]], dtype=torch.float32)
        return Sample(values, (0,), self.counts[filled], (numbers[0], numbers[1]), numbers[2])
