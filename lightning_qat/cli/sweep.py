"""The report of a sweep: one table and one picture over all jobs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Final, final

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from lightning_qat.cli.plots import SweepPoint, save_figure, sweep_figure
from lightning_qat.cli.results import TITLES, format_spread, metric_title, shown_metrics, wide_console

METRICS_FILE: Final = "metrics.json"


@final
@dataclass(frozen=True)
class SweepRow:
    """The jobs of a sweep that differ in nothing but the seed.

    Args:
        label: the overrides in which they differ from others, the recipe by its name alone.
        jobs: their metrics.json.
    """

    label: str
    jobs: Sequence[Mapping[str, Any]]

    def values(self, model: str, name: str) -> list[float]:
        """Return a value of a model, one for each job."""
        return [job[model][name] for job in self.jobs]


def read_jobs(folder: Path) -> list[dict[str, Any]]:
    """Return what the jobs of a sweep wrote to metrics.json, in the order of their folders' numbers.

    Args:
        folder: of the sweep; each job has a folder in it. Jobs that failed have no file and are left out.
    """
    files = sorted(folder.glob(f"*/{METRICS_FILE}"), key=lambda file: (len(file.parent.name), file.parent.name))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def sweep_rows(jobs: Sequence[Mapping[str, Any]]) -> list[SweepRow]:
    """Return the jobs grouped by what distinguishes them, seeds together.

    Args:
        jobs: at least one; each with ``overrides`` and ``recipe``.

    Example:
        >>> jobs = [{"overrides": ["recipe=int4", f"seed={seed}"], "recipe": "int4"} for seed in (0, 1)]
        >>> [(row.label, len(row.jobs)) for row in sweep_rows(jobs)]
        [('int4', 2)]
    """
    common = set.intersection(*(set(job["overrides"]) for job in jobs))
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for job in jobs:
        special = [o for o in job["overrides"] if o not in common and not o.startswith("seed=")]
        label = ", ".join(override.removeprefix("recipe=") for override in special) or job["recipe"]
        rows.setdefault(label, []).append(job)
    return [SweepRow(label, same) for label, same in rows.items()]


COLUMNS: Final = ("run", "seeds", "bits per weight", "size in bytes", *TITLES.values())


def sweep_cells(row: SweepRow, metric: str) -> list[str]:
    """Return a line of the table; over several seeds the mean and the standard deviation."""
    cells = [row.label, str(len(row.jobs)), f"{mean(row.values('qat', 'bits_per_weight')):.2f}"]
    cells.append(f"{round(mean(row.values('qat', 'num_bytes'))):,}")
    return cells + [format_spread(metric, row.values(model, metric)) for model in TITLES]


def write_report(folder: Path, order: Mapping[str, str], console: Console) -> list[Path]:
    """Print the table of a sweep, write it as Markdown and draw the picture; one of each for every data set.

    Args:
        folder: of the sweep.
        order: ``report.metrics``.
        console: where to print.

    Returns:
        The files; none if no job left results.
    """
    jobs = read_jobs(folder)
    data_sets = list(dict.fromkeys(job["data"] for job in jobs))
    written = []
    for data in data_sets:
        rows = sweep_rows([job for job in jobs if job["data"] == data])
        metric = shown_metrics(order, rows[0].jobs[0]["qat"])[0]
        name = "results" if len(data_sets) == 1 else f"results_{data}"
        written += [folder / f"{name}.md", folder / f"{name}.png"]
        _write_table(written[-2], rows, metric, data, console)
        points = [
            SweepPoint(
                row.label,
                mean(row.values("qat", "bits_per_weight")),
                {model: row.values(model, metric) for model in TITLES},
            )
            for row in rows
        ]
        title = f"Quality against bits, {data}"
        save_figure(sweep_figure(title, points, metric, order.get(metric, "min")), written[-1])
    return written


def _write_table(path: Path, rows: Sequence[SweepRow], metric: str, data: str, console: Console) -> None:
    title = f"Sweep, {data}: {metric_title(metric)} on the test data"
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index == 0 else "right")
    lines = [sweep_cells(row, metric) for row in rows]
    for cells in lines:
        table.add_row(*cells)
    rule = [":--", *["--:"] * (len(COLUMNS) - 1)]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in (COLUMNS, rule, *lines))
    path.write_text(f"{title}\n\n{text}\n", encoding="utf-8")
    console.print(table)


@final
class SweepReport(Callback):
    """Hydra's callback that writes the report when all jobs of a sweep are done, whatever launcher ran them."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the report into the directory of the sweep."""
        console = wide_console()
        folder = Path(config.hydra.sweep.dir)
        written = write_report(folder, config.report.metrics, console)
        if written:
            console.print(f"Table and picture: {', '.join(str(path) for path in written)}")
        else:
            console.print(f"No job left results in {folder}.")
