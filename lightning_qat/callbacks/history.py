"""History: the signal-to-noise ratios of a run, a bounded table of layers over time."""

from collections.abc import Sequence
from typing import Any, Final, final

import torch
from torch import Tensor

_MAX_COLUMNS: Final = 256


@final
class History:
    """A table of layers over steps; beyond 256 columns every second one is dropped, so that memory stays bounded."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.steps: list[int] = []
        self._columns: list[list[float]] = []
        self._num_added = 0

    def add(self, layers: Sequence[str], step: int, values: Sequence[float]) -> bool:
        """Add a column; return whether it is time to draw: after 16, 32, 64, ... columns, so that it stays cheap."""
        if list(layers) != self.layers:
            self.layers, self.steps, self._columns, self._num_added = list(layers), [], [], 0
        self.steps.append(step)
        self._columns.append(list(values))
        self._num_added += 1
        if len(self.steps) > _MAX_COLUMNS:
            self.steps, self._columns = self.steps[::2], self._columns[::2]
        return self._num_added >= 16 and self._num_added & (self._num_added - 1) == 0

    def table(self) -> Tensor:
        """Return the values, [layers, steps]."""
        return torch.tensor(self._columns, dtype=torch.float64).T

    def state_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"layers": self.layers, "steps": self.steps, "columns": self._columns, "num_added": self._num_added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.layers, self.steps = list(state["layers"]), list(state["steps"])
        self._columns, self._num_added = [list(column) for column in state["columns"]], state["num_added"]
