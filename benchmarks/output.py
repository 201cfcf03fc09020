"""How results are shown and kept: a table, JSON, a plot; and on what machine they were measured."""

import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, str]:
    """Return what results depend on."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "").split()
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "date": date.today().isoformat(),
        "cpu": f"{model or platform.processor()} ({', '.join(flag for flag in wanted if flag in flags)})",
        "gpu": gpu,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table in Markdown."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_text(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    for line in [columns, ["-" * width for width in widths], *cells]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def _text(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def save(path: Path, settings: dict[str, Any], rows: list[dict[str, Any]], column: str) -> None:
    """Write path.json and path.png, a bar for each row's value in a column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "settings": settings, "rows": rows}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.4 * len(rows) + 1.2), layout="constrained")
    axes.barh([row["variant"] for row in rows], [row[column] for row in rows])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(f"{column}; {', '.join(f'{key} {value}' for key, value in settings.items())}")
    figure.savefig(path.with_suffix(".png"), dpi=120)
