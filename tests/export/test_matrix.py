"""Every cell of the matrix in docs/export.md is true."""

from pathlib import Path

import pytest

from lightning_qat.export.backend import _BACKENDS
from tests.export.matrix import BEGIN, DOCUMENT, END, FORMATS, ROWS, committed, outcome, render


def test_the_document_holds_all_recipes_and_formats() -> None:
    cells = committed()
    assert set(cells) == {(row, format) for row in ROWS for format in FORMATS}
    table = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    assert table.strip() == render(cells), "run: python -m tests.export.matrix"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("row", ROWS)
def test_cell(row: str, format: str, tmp_path: Path) -> None:
    for package in _BACKENDS[format].packages:
        pytest.importorskip(package)
    assert outcome(row, format, tmp_path) == committed()[row, format], "run: python -m tests.export.matrix"
