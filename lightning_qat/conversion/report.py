"""What became of every weight, as data and as a table."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final, final

QUANTIZED: Final = "quantized"
FLOAT: Final = "float"
UNSUPPORTED: Final = "unsupported"
ONE_DIMENSIONAL: Final = "one-dimensional: biases, norms"
_HEADER: Final = ("weight", "elements", "decision", "how or why")


@final
@dataclass(frozen=True)
class ReportRow:
    """One parameter.

    Args:
        name: dotted name; tied parameters appear once, under their first name.
        kind: type of the module that owns it.
        numel: number of elements.
        decision: ``quantized``, ``float`` or ``unsupported``.
        detail: the quantizers, or the reason.
        rule: the glob of the rule that decided, or "".
        bits: bits per element, scales not counted.
    """

    name: str
    kind: str
    numel: int
    decision: str
    detail: str
    rule: str = ""
    bits: float = 32.0


@final
@dataclass(frozen=True)
class ConversionReport:
    """Accounts for 100 % of the parameters of a model. Printable; :attr:`rows` and :meth:`to_dict` are the data.

    Args:
        rows: one per parameter.
        problems: rules of the user that have no effect, in words.
    """

    rows: tuple[ReportRow, ...]
    problems: tuple[str, ...] = field(default=())

    @property
    def num_weights(self) -> int:
        """Number of elements of all parameters."""
        return sum(row.numel for row in self.rows)

    def share(self, decision: str) -> float:
        """Return the share of the elements with a decision, in [0, 1]."""
        return sum(row.numel for row in self.rows if row.decision == decision) / max(1, self.num_weights)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits per element over all parameters, scales not counted."""
        return sum(row.numel * row.bits for row in self.rows) / max(1, self.num_weights)

    def check(self) -> None:
        """Raise if a rule of the user has no effect.

        Raises:
            ValueError: naming the rules and the reasons.
        """
        if self.problems:
            raise ValueError("\n".join(self.problems))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, readable as JSON."""
        rows = [asdict(row) for row in self.rows]
        return {"num_weights": self.num_weights, "bits_per_weight": self.bits_per_weight, "rows": rows}

    def __iter__(self) -> Iterator[ReportRow]:
        return iter(self.rows)

    def __str__(self) -> str:
        """Return a table; rows that differ only in the numbers of their names are one line."""
        cells = [_HEADER, *map(_cells, _groups(self.rows))]
        widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADER))]
        table = [_line(line, widths) for line in cells]
        shares = ", ".join(f"{100 * self.share(kind):.1f} % {kind}" for kind in (QUANTIZED, FLOAT, UNSUPPORTED))
        table.append(f"{self.num_weights:,} elements: {shares}; {self.bits_per_weight:.2f} bits per weight")
        return "\n".join([*table, *(f"no effect: {problem}" for problem in self.problems)])


def _groups(rows: tuple[ReportRow, ...]) -> list[list[ReportRow]]:
    groups: dict[tuple[str, ...], list[ReportRow]] = {}
    for order in (QUANTIZED, UNSUPPORTED, FLOAT):
        for row in rows:
            if row.decision == order:
                groups.setdefault((*_family(row), row.decision, row.detail), []).append(row)
    return list(groups.values())


def _family(row: ReportRow) -> tuple[str, ...]:
    """Return what groups a row: biases and norms go together, else what the name is apart from its numbers."""
    if row.decision == FLOAT and row.detail == ONE_DIMENSIONAL:
        return ("",)
    return (re.sub(r"\d+", "*", row.name), row.kind)


def _cells(rows: list[ReportRow]) -> tuple[str, str, str, str]:
    first = rows[0]
    name = first.name if len(rows) == 1 else f"{_family(first)[0] or 'others'} ({len(rows)})"
    return name, f"{sum(row.numel for row in rows):,}", first.decision, first.detail


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    name, elements, decision, detail = cells
    padded = (name.ljust(widths[0]), elements.rjust(widths[1]), decision.ljust(widths[2]), detail)
    return "  ".join(padded).rstrip()
