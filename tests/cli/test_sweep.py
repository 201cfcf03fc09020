"""The report of a sweep, from the files that its jobs left."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_qat.cli.sweep import read_jobs, sweep_cells, sweep_rows, write_report

ORDER = {"accuracy": "max", "loss": "min"}


def write_job(folder: Path, number: int, overrides: list[str], accuracy: float, data: str = "digits") -> None:
    recipe = next((o.removeprefix("recipe=") for o in overrides if o.startswith("recipe=")), "int4")
    model = {"accuracy": accuracy, "loss": 1.0, "num_bytes": 1000 + number, "bits_per_weight": 4.5}
    job: dict[str, Any] = {"data": data, "recipe": recipe, "overrides": overrides}
    job |= {"float": {**model, "accuracy": 0.99}, "post_training": {**model, "accuracy": 0.1}, "qat": model}
    target = folder / str(number)
    target.mkdir(parents=True)
    (target / "metrics.json").write_text(json.dumps(job))


def test_jobs_are_read_in_their_order_and_failed_ones_left_out(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        write_job(tmp_path, number, [f"recipe=int{number}"], 0.5)
    (tmp_path / "1").mkdir()
    assert [job["recipe"] for job in read_jobs(tmp_path)] == ["int0", "int2", "int10"]


def test_seeds_make_one_row(tmp_path: Path) -> None:
    runs = [("int4", 0, 0.90), ("int4", 1, 0.92), ("int2", 0, 0.80), ("int2", 1, 0.70)]
    for number, (recipe, seed, accuracy) in enumerate(runs):
        write_job(tmp_path, number, ["model.num_layers=1", f"recipe={recipe}", f"seed={seed}"], accuracy)
    rows = sweep_rows(read_jobs(tmp_path))
    assert [row.label for row in rows] == ["int4", "int2"]
    cells = sweep_cells(rows[0], "accuracy")
    assert cells[:3] == ["int4", "2", "4.50"]
    assert cells[-1] == "91.00 ± 1.41 %"


def test_other_overrides_are_named(tmp_path: Path) -> None:
    for number, (recipe, rate) in enumerate((r, x) for r in ("int4", "int2") for x in (0.1, 0.2)):
        write_job(tmp_path, number, [f"recipe={recipe}", f"qat.model.learning_rate={rate}"], 0.5)
    assert sweep_rows(read_jobs(tmp_path))[1].label == "int4, qat.model.learning_rate=0.2"


def test_report(tmp_path: Path) -> None:
    write_job(tmp_path, 0, ["data=digits", "recipe=int4"], 0.9)
    write_job(tmp_path, 1, ["data=text", "recipe=int4"], 0.3, data="text")
    console = Console(width=160)
    with console.capture() as capture:
        written = write_report(tmp_path, ORDER, console)
    assert [path.name for path in written] == ["results_digits.md", "results_digits.png", "results_text.md",
                                               "results_text.png"]  # fmt: skip
    assert all(path.stat().st_size for path in written)
    assert "90.00 %" in capture.get()
    lines = written[0].read_text().splitlines()
    assert lines[0] == "Sweep, digits: accuracy on the test data"
    assert lines[3] == "| :-- | --: | --: | --: | --: | --: | --: |"
    assert lines[4] == "| int4 | 1 | 4.50 | 1,000 | 99.00 % | 10.00 % | 90.00 % |"


def test_no_results(tmp_path: Path) -> None:
    assert write_report(tmp_path, ORDER, Console()) == []
