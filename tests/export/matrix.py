"""The matrix of docs/export.md: what becomes of every recipe in every format, measured by exporting.

python -m tests.export.matrix        writes docs/export.md anew; tests/export/test_matrix.py compares it.
"""

import re
import tempfile
from pathlib import Path
from typing import Final

import torch

import lightning_qat as qat
from lightning_qat.export import RefusedError, export, formats
from lightning_qat.quantization import recipes
from tests.export.models import MLP, prepared, vectors

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "export.md"
BEGIN: Final = "<!-- matrix: begin, written by python -m tests.export.matrix -->"
END: Final = "<!-- matrix: end -->"
BOUNDS: Final = (100, 50, 35, 20)
"""Signal to noise ratios in decibels that a cell may promise; the largest that holds is shown."""

WEIGHT_ONLY: Final = ("binary", "int2", "int3", "int4", "int8", "seq2", "ternary")
FORMATS: Final = tuple(name for name in formats() if name != "aotinductor")
"""The columns. What AOTInductor compiles is the program of ``pt2``, and a cell would take a minute."""
ROWS: Final[dict[str, qat.Recipe]] = {
    **{name: recipes.named(name) for name in recipes.names()},
    **{
        f"{name}(group_size=32, scale_dtype='float16')": recipes.named(name, group_size=32, scale_dtype="float16")
        for name in WEIGHT_ONLY
    },
}


def outcome(row: str, format: str, folder: Path) -> str:
    """Exports a small trained model by a recipe, and says exact, bounded, or why it was refused."""
    model = prepared(MLP, ROWS[row])
    torch.manual_seed(3)
    try:
        report = export(model, folder / "model", format=format, batches=vectors())
    except RefusedError as error:
        return "refused: " + reason(str(error))
    if report.exact:
        return "exact"
    assert report.sqnr is not None
    assert report.agreement == 1.0 or report.sqnr < 100
    return f"bounded: > {next(bound for bound in BOUNDS if report.sqnr > bound)} dB"


def reason(message: str) -> str:
    """The reason in a refusal, without the format, the layer and the advice."""
    text = re.sub(r"^format='[\w-]+': ", "", message).split("; ")[0]
    return re.sub(r"^(up|down)(\.weight)?:? ", "", text)


def render(cells: dict[tuple[str, str], str]) -> str:
    """The table in Markdown; reasons become numbered notes below it."""
    notes: list[str] = []
    lines = ["| recipe | " + " | ".join(FORMATS) + " |", "|---" * (len(FORMATS) + 1) + "|"]
    for row in ROWS:
        shown = []
        for format in FORMATS:
            cell = cells[row, format]
            if cell.startswith("refused: "):
                note = cell.removeprefix("refused: ")
                notes += [] if note in notes else [note]
                cell = f"refused ({notes.index(note) + 1})"
            shown.append(cell)
        lines.append(f"| `{row}` | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


def committed() -> dict[tuple[str, str], str]:
    """The cells of docs/export.md, with the reasons of refusals in full."""
    text = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    notes = dict(re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE))
    lines = [
        [part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    cells = {}
    for row, *found in lines[2:]:
        for format, cell in zip(lines[0][1:], found, strict=True):
            number = re.fullmatch(r"refused \((\d+)\)", cell)
            cells[row.strip("`"), format] = f"refused: {notes[number[1]]}" if number else cell
    return cells


def main() -> None:
    """Measures all cells and writes them into the document."""
    cells = {}
    for row in ROWS:
        for format in FORMATS:
            with tempfile.TemporaryDirectory() as folder:
                cells[row, format] = outcome(row, format, Path(folder))
    head, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    DOCUMENT.write_text(f"{head}{BEGIN}\n\n{render(cells)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
