"""Tables and the plot of benchmarks/accuracy.py."""

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.accuracy_methods import (
    ABLATIONS,
    AFTER_TRAINING,
    ALL_CALLBACKS,
    AS_MANY_BITS,
    BITS,
    LEARNED_TOO,
    OURS,
    SLOWER_SCALES,
    TEACHER,
    TEACHER_OF_BLOCKS,
    WIDTHS,
    methods,
)
from benchmarks.accuracy_tasks import TASKS
from benchmarks.peers import PEERS

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # Student's t, two-sided, for so many seeds


def summary(values: list[float]) -> tuple[float, float]:
    """Return the mean and half of its 95 % confidence interval."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def excess(results: dict[str, Any], task: str, width: str, method: str) -> list[float]:
    """Return the losses above the float reference, by seed."""
    own = results.get(f"{task}/{width}/{method}", {})
    reference = results.get(f"{task}/float/float", {})
    return [own[seed]["loss"] - reference[seed]["loss"] for seed in sorted(own) if seed in reference]


def table(results: dict[str, Any], task: str) -> list[dict[str, str]]:
    """Return a row for each method and a column for each width: excess loss and half its 95 % interval."""
    found: dict[str, dict[str, str]] = {}
    for width in WIDTHS:
        taught = [f"{each}{teacher}" for each in ("float", *PEERS) for teacher in (TEACHER, TEACHER_OF_BLOCKS)]
        after = [AFTER_TRAINING, f"{AFTER_TRAINING}, absmax"]
        for method in [
            *methods("float"),
            *after,
            *PEERS,
            *taught,
            *LEARNED_TOO,
            *ABLATIONS,
            SLOWER_SCALES,
            *ALL_CALLBACKS,
        ]:
            values = excess(results, task, width, method)
            if values:
                mean, half = summary(values)
                found.setdefault(method, {"method": method})[width] = f"{mean:.4f} ± {half:.4f}"
    return list(found.values())


def comparison(results: dict[str, Any], task: str) -> list[dict[str, str]]:
    """Return a row for each width: the best peer, ours, and what ours recovers of the loss of rounding alone."""
    rows = []
    for width in WIDTHS:
        same = AS_MANY_BITS.get(width, width)
        peers = {name: values for name in PEERS if (values := excess(results, task, same, name))}
        own, after = excess(results, task, width, OURS), excess(results, task, same, AFTER_TRAINING)
        if not peers or not own or not after:
            continue
        best = min(peers, key=lambda name: statistics.fmean(peers[name]))
        pairs = [ours - peer for ours, peer in zip(own, peers[best], strict=True)]
        ours, peer = statistics.fmean(own), statistics.fmean(peers[best])
        rows.append(
            {
                "width": width, "best peer": best, "excess": f"{peer:.4f}", "ours": f"{ours:.4f}",
                "paired": "{:+.4f} ± {:.4f}".format(*summary(pairs)), "ratio": f"{ours / peer:.2f}",
                "recovered": f"{1 - ours / statistics.fmean(after):.1%}",
            }
        )  # fmt: skip
    return rows


def show(columns: list[str], rows: list[dict[str, str]]) -> None:
    """Print a table in Markdown."""
    for line in (columns, ["---"] * len(columns), *([row.get(c, "") for c in columns] for row in rows)):
        print("| " + " | ".join(line) + " |")


def report(results: dict[str, Any]) -> None:
    """Print two tables for each task."""
    for task in TASKS:
        rows = table(results, task)
        if not rows:
            continue
        reference = [entry["loss"] for entry in results[f"{task}/float/float"].values()]
        print(f"\n{task}: excess loss (float, same budget: {statistics.fmean(reference):.4f})\n")
        show(["method", *(width for width in WIDTHS if any(width in row for row in rows))], rows)
        print()
        against = comparison(results, task)
        show(list(against[0]) if against else [], against)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw excess loss against the bits of a weight: ours, the peers, post-training; not of tasks that saturate."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in ("text", "arithmetic") if table(results, task)]
    figure, axes = plt.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for number, method in enumerate([AFTER_TRAINING, *PEERS, "ours, QATCallback alone", OURS]):
            means = {w: statistics.fmean(v) for w in BITS if (v := excess(results, task, w, method))}
            style = {"linewidth": 2.5, "color": "black", "zorder": 3} if method == OURS else {"color": f"C{number}"}
            places = [list(BITS).index(width) for width in means]
            axis.plot(places, list(means.values()), marker="o", markersize=3, label=method, **style)
        if half_integers := excess(results, task, "seq2", OURS):
            axis.plot(list(BITS).index("int2"), statistics.fmean(half_integers), "k*", zorder=3, label="ours, seq2")
        axis.axhline(0.0, color="gray", linestyle=":", label="float, same budget")
        axis.set(
            title=task, xlabel="bits per weight", xticks=range(len(BITS)), xticklabels=[f"{b:g}" for b in BITS.values()]
        )
        axis.set_yscale("symlog", linthresh=0.01 if task == "text" else 0.001)
    axes[0][0].set_ylabel("loss above float, nats")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=120)
