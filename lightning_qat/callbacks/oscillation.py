"""Oscillation: weights that change their code back and forth, watched at every step on a sample."""

from typing import Any, final

from torch import Tensor

from lightning_qat.callbacks.measures import Slot, WatchedWeights
from lightning_qat.metrics import FlipRate, OscillationRate


@final
class Oscillation:
    """Follows the codes of a sample of the weights of each layer; starts anew where the grid of a layer changes.

    Args:
        num_watched: weights per layer; 0 watches nothing.

    Source: arXiv:2203.11086.
    """

    def __init__(self, num_watched: int) -> None:
        self.num_watched = num_watched
        self._watched: dict[str, WatchedWeights] = {}
        self._rates: dict[str, tuple[FlipRate, OscillationRate]] = {}
        self._grids: dict[str, str] = {}
        self._step = -1
        self._restored: dict[str, Any] = {}

    def start(self, weights: list[Slot]) -> None:
        """Choose what to watch, and go on where a checkpoint stopped."""
        if not self.num_watched:
            return
        self._watched = {slot.name: WatchedWeights(slot, self.num_watched) for slot in weights}
        for name, watched in self._watched.items():
            self._rates[name] = (  # weights are equal on all processes
                FlipRate(watched.count, sample_size=None, sync_on_compute=False),
                OscillationRate(watched.count, sample_size=None, sync_on_compute=False),
            )
            self._grids[name] = watched.slot.quantizer.grid.label
            for metric in self._rates[name]:
                metric.to(watched.slot.weight().device)
                metric.persistent(True)
            if self._restored.get(name, {}).get("grid") == self._grids[name]:
                for rate, state in zip(self._rates[name], self._restored[name]["rates"], strict=True):
                    rate.load_state_dict(state)

    def update(self, global_step: int) -> None:
        """Look at the codes, if an optimizer has stepped since."""
        if global_step == self._step:
            return
        self._step = global_step
        for name, watched in self._watched.items():
            grid = watched.slot.quantizer.grid.label
            changed, self._grids[name] = grid != self._grids[name], grid
            codes = watched.codes()
            for metric in self._rates[name]:
                if changed:
                    metric.reset()
                metric.update(codes)

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """Return the rates by weight; those of flips are means since the last call."""
        found = {}
        for name, (flips, oscillations) in self._rates.items():
            found[name] = {"flip_rate": flips.compute(), "oscillation_rate": oscillations.compute()}
            last = flips.codes
            flips.reset()
            flips.codes = last  # the next change is measured against it
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return plain data and tensors."""
        return {
            name: {"grid": self._grids[name], "rates": [metric.state_dict() for metric in rates]}
            for name, rates in self._rates.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, at the start."""
        self._restored = state
