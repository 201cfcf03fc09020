"""Which layer gets how many bits: the integer program, and its result as a table and as plain data."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from lightning_qat.quantization.grid import Grid
from lightning_qat.quantization.recipe import from_plain, to_plain
from lightning_qat.quantization.spec import QuantizerSpec

_FORMAT: Final = "lightning_qat.allocation"
_VERSION: Final = 1
_RESOLUTION: Final = 2.0**26  # costs become integers up to this, so that the solver's tolerances cannot decide
_SLACK: Final = 1 + 1e-12  # of sums of logarithms, such as 1.58 bits


@final
@dataclass(frozen=True)
class Allocation:
    """Sensitivities of all layers at all candidate widths, and what was chosen.

    Args:
        layers: dotted names that get one width together: of one layer, or of all that share a weight.
        num_weights: of each.
        specs: by layer and candidate, how the weights would be quantized.
        sensitivities: by layer and candidate, the measure's mean over batches.
        chosen: index of the candidate of each layer.
        limit: the most bits per weight on average.
        measure: what the sensitivities are, in words.
    """

    layers: tuple[tuple[str, ...], ...]
    num_weights: tuple[int, ...]
    specs: tuple[tuple[QuantizerSpec, ...], ...]
    sensitivities: tuple[tuple[float, ...], ...]
    chosen: tuple[int, ...]
    limit: float
    measure: str

    @property
    def average_bits(self) -> float:
        """Bits of codes per weight on average; scales are not counted."""
        used = [spec.grid.bits_per_weight * n for spec, n in zip(self.chosen_specs, self.num_weights, strict=True)]
        return sum(used) / sum(self.num_weights)

    @property
    def chosen_specs(self) -> tuple[QuantizerSpec, ...]:
        """What each of ``layers`` gets."""
        return tuple(specs[index] for specs, index in zip(self.specs, self.chosen, strict=True))

    @property
    def grids(self) -> dict[str, Grid]:
        """The grid of each layer by dotted name."""
        pairs = zip(self.layers, self.chosen_specs, strict=True)
        return {name: spec.grid for names, spec in pairs for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, readable as JSON."""
        rows = [
            {"layers": list(names), "weights": n, "chosen": chosen, "sensitivities": list(costs),
             "specs": [to_plain(spec) for spec in specs]}
            for names, n, specs, costs, chosen in zip(
                self.layers, self.num_weights, self.specs, self.sensitivities, self.chosen, strict=True
            )
        ]  # fmt: skip
        head = {"format": _FORMAT, "version": _VERSION, "limit": self.limit, "average_bits": self.average_bits}
        return {**head, "measure": self.measure, "layers": rows}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Allocation":
        """Return the allocation that :meth:`to_dict` described. Nothing is imported or executed.

        Raises:
            ValueError: other data.
        """
        if data.get("format") != _FORMAT or data.get("version") != _VERSION:
            raise ValueError(f"Allocation.from_dict: format={data.get('format')!r} is not {_FORMAT!r} {_VERSION}")
        rows = data["layers"]
        return Allocation(
            tuple(tuple(map(str, row["layers"])) for row in rows),
            tuple(int(row["weights"]) for row in rows),
            tuple(tuple(from_plain(spec) for spec in row["specs"]) for row in rows),
            tuple(tuple(map(float, row["sensitivities"])) for row in rows),
            tuple(int(row["chosen"]) for row in rows),
            float(data["limit"]),
            str(data["measure"]),
        )

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> "Allocation":
        """Return what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of another kind.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"Allocation.load: path={str(path)!r} is not a file; save() writes one")
        return Allocation.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    @property
    def rows(self) -> list[list[str]]:
        """The table: a head, then a row per layer; the chosen candidate is marked with ``*``."""
        found = [["layer", "weights", *(spec.grid.label for spec in self.specs[0]), "chosen"]]
        for names, n, specs, costs, chosen in zip(
            self.layers, self.num_weights, self.specs, self.sensitivities, self.chosen, strict=True
        ):
            cells = [f"{cost:.2e}{'*' if index == chosen else ''}" for index, cost in enumerate(costs)]
            found.append([" = ".join(names), f"{n:,}", *cells, specs[chosen].grid.label])
        return found

    @property
    def caption(self) -> str:
        """What the table shows, in a sentence."""
        return (
            f"sensitivity: {self.measure}, with one layer quantized at a time; "
            f"{self.average_bits:.3f} bits per weight on average, at most {self.limit:g} were allowed"
        )

    def __str__(self) -> str:
        """Return the table and its caption."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(w) if 0 < i < len(row) - 1 else cell.ljust(w) for i, (cell, w) in enumerate(pairs))
            for row in self.rows
            if (pairs := list(zip(row, widths, strict=True)))
        ]
        return "\n".join([*(line.rstrip() for line in lines), self.caption])


def cheapest(
    costs: Sequence[Sequence[float]], bits: Sequence[Sequence[float]], sizes: Sequence[int], average_bits: float
) -> tuple[int, ...]:
    r"""Choose one candidate per layer so that the sum of costs is least within a budget of bits.

    .. math:: \min \sum_{lc} cost_{lc} x_{lc} \quad \sum_c x_{lc} = 1, \quad
              \sum_{lc} bits_{lc} n_l x_{lc} \le average \sum_l n_l, \quad x_{lc} \in \{0, 1\}

    Solved to optimality by HiGHS, with costs rounded to multiples of the largest difference / 2^26. Among equally good
    choices, later layers get the candidates that come first in the order given: the result depends on nothing else.

    Args:
        costs: by layer and candidate, finite.
        bits: of a weight, by layer and candidate, positive.
        sizes: number of weights of each layer, positive.
        average_bits: the most bits per weight on average over all layers.

    Returns:
        The index of the candidate of each layer.

    Raises:
        ValueError: a budget that even the fewest bits exceed, or a cost that is not finite.

    Source: the integer linear program of HAWQ-V3, arXiv:2011.10680 section 3.4; deviation: sensitivities are measured.

    >>> cheapest([[9.0, 1.0], [5.0, 4.0]], [[2, 4], [2, 4]], [100, 100], 3.0)
    (1, 0)
    """
    for index, row in enumerate(costs):
        if not all(map(math.isfinite, row)):
            raise ValueError(f"cheapest: costs[{index}]={list(row)} are not all finite")
    used = [[b * n for b in row] for row, n in zip(bits, sizes, strict=True)]
    budget = average_bits * sum(sizes) * _SLACK
    least = sum(map(min, used))
    if least > budget:
        raise ValueError(
            f"average_bits={average_bits:g} cannot be reached: with the narrowest candidate everywhere it is "
            f"{least / sum(sizes):.4g}; allow more bits, or add a narrower candidate such as 1 or Ternary()"
        )
    return _solve(_objective(costs), used, budget)


def _objective(costs: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return integers that are proportional to the costs, plus less than 1 in total that decides between equal sums."""
    shifted = [[cost - min(row) for cost in row] for row in costs]
    largest = max(map(max, shifted)) or 1.0
    preference = [math.sqrt(index + 1) for index in range(len(costs))]
    most = sum(weight * (len(row) - 1) for weight, row in zip(preference, costs, strict=True)) or 1.0
    return [
        [round(cost / largest * _RESOLUTION) + 0.9 * weight * index / most for index, cost in enumerate(row)]
        for weight, row in zip(preference, shifted, strict=True)
    ]


def _solve(objective: list[list[float]], used: list[list[float]], budget: float) -> tuple[int, ...]:
    from scipy.optimize import Bounds, LinearConstraint, milp

    num_layers = len(objective)
    owner = np.repeat(np.arange(num_layers), [len(row) for row in objective])
    costs, flat_used = np.concatenate(objective), np.concatenate(used)
    least = np.array([min(row) for row in used])
    # In shares of what is left when every layer has the least: sizes of layers may differ by a factor of millions, and
    # the solver's tolerances are absolute. What alone takes more than all of it is out.
    spare, extra = budget - float(least.sum()), flat_used - least[owner]
    shares = np.where((extra > 0) & (extra <= spare), extra / max(spare, 1e-300), 0.0)
    one_each = (owner[None, :] == np.arange(num_layers)[:, None]).astype(float)
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(shares[None, :], -np.inf, 1.0)]
    while True:
        found = milp(
            costs, integrality=np.ones_like(costs), bounds=Bounds(0, (extra <= spare).astype(float)),
            constraints=constraints, options={"mip_rel_gap": 0.0},
        )  # fmt: skip
        if found.x is None:
            raise RuntimeError(f"cheapest: HiGHS found no allocation ({found.message}); please report this")
        x = np.round(found.x)
        if float(flat_used @ x) <= budget:
            return tuple(int(np.argmax(x[owner == layer])) for layer in range(num_layers))
        # Within the solver's tolerance, but not within ours: this one choice is out, all others remain.
        constraints.append(LinearConstraint(x[None, :], -np.inf, num_layers - 1))
