"""What became of every weight."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final, final

from lightning_qat.quantization.recipe import Rule

QUANTIZED: Final = "quantized"
FLOAT: Final = "float"
UNSUPPORTED: Final = "unsupported"


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
        problems: rules of the user that match nothing or are shadowed, in words.
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
        """Return plain data."""
        return {"num_weights": self.num_weights, "rows": [asdict(row) for row in self.rows]}

    def __iter__(self) -> Iterator[ReportRow]:
        return iter(self.rows)

    def __str__(self) -> str:
        """Return a table; small float parameters of one kind are summed up."""
        lines = [(row.name, f"{row.numel:,}", row.decision, row.detail) for row in self.rows if row.decision != FLOAT]
        lines += [(row.name, f"{row.numel:,}", row.decision, row.detail) for row in self._large_floats()]
        small = [row for row in self.rows if row.decision == FLOAT and row not in self._large_floats()]
        if small:
            total = sum(row.numel for row in small)
            lines.append((f"({len(small)} biases, norms, ...)", f"{total:,}", FLOAT, "one-dimensional"))
        header = ("weight", "elements", "decision", "how or why")
        widths = [max(len(line[i]) for line in [header, *lines]) for i in range(4)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                 for line in [header, *lines]]  # fmt: skip
        shares = ", ".join(f"{100 * self.share(kind):.1f} % {kind}" for kind in (QUANTIZED, FLOAT, UNSUPPORTED))
        return "\n".join(
            [*table, f"{self.num_weights:,} elements: {shares}; {self.bits_per_weight:.2f} bits per weight"]
        )

    def _large_floats(self) -> list[ReportRow]:
        return [row for row in self.rows if row.decision == FLOAT and row.detail != "one-dimensional"]


def rule_problems(rules: tuple[Rule, ...], modules: dict[str, Any]) -> tuple[str, ...]:
    """Return what is wrong with rules of the user: they match nothing, or an earlier rule takes all they match."""
    problems = []
    for index, rule in enumerate(rules):
        if rule.source:
            continue
        by_name = [name for name in modules if rule.matches_name(name)]
        matched = [name for name in by_name if rule.matches_type(modules[name])]
        if not matched:
            problems.append(_nothing_matched(rule, by_name, modules))
            continue
        first = {name: next(i for i, r in enumerate(rules) if r.matches(name, modules[name])) for name in matched}
        if all(i < index for i in first.values()):
            earlier = rules[min(first.values())]
            problems.append(
                f"{rule!r}: everything it matches is taken by an earlier rule, {earlier.match!r}; move it up"
            )
    return tuple(problems)


def _nothing_matched(rule: Rule, by_name: list[str], modules: dict[str, Any]) -> str:
    if by_name:
        kinds = sorted({type(modules[name]).__name__ for name in by_name})
        return (
            f"Rule({rule.match!r}, ...) matches {by_name[0]!r} by name, but of types {kinds} it is for none; "
            "name the types in types=(...)"
        )
    import difflib

    near = difflib.get_close_matches(rule.match.strip("*."), [name for name in modules if name], n=3, cutoff=0.3)
    return f"Rule({rule.match!r}, ...) matches no layer; similar names: {near or sorted(filter(None, modules))[:8]}"
