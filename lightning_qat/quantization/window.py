"""What the forward passes between two optimizer steps share: weights that are quantized already."""

from dataclasses import dataclass
from typing import Any, Final, final

from torch import Tensor

from lightning_qat.functional.fake_quantize import Setting


@final
@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized weight and what it was made of.

    Args:
        latent: the parameter.
        kind: what else the values depend on, such as their dtype and how soft the rounding is.
        setting: how it was quantized, out of any graph.
        values: codes or values, as the product takes them; in the graph where the gradient is clipped at most.
        complete: whether setting and values are all that another product needs: neither is in a graph.
    """

    latent: Tensor
    kind: tuple[Any, ...]
    setting: Setting
    values: Tensor
    complete: bool


@final
class Window:
    """The quantized weights of one accumulation window, by quantizer.

    Whoever opens a window says that weights do not change before :meth:`drop`. Nothing here looks at version counters:
    fused optimizers, ``p.data.copy_`` and FSDP change weights without them. A copy or a pickle of a quantizer
    is in no window.
    """

    def __init__(self) -> None:
        self._found: Final[dict[int, Quantized]] = {}
        self.paused = False

    def get(self, owner: object, latent: Tensor, kind: tuple[Any, ...]) -> Quantized | None:
        """Return what was kept for a quantizer, if it was made of this very parameter."""
        found = None if self.paused else self._found.get(id(owner))
        return found if found is not None and found.latent is latent and found.kind == kind else None

    def keep(self, owner: object, quantized: Quantized) -> None:
        """Keep a weight until the window ends."""
        if not self.paused:
            self._found[id(owner)] = quantized

    def drop(self) -> None:
        """Forget all weights: the window ends, and the next begins."""
        self._found.clear()

    def __len__(self) -> int:
        """Return the number of weights that are kept."""
        return len(self._found)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as None."""
        return type(None), ()
