"""What the documents show is true: code and examples run, links lead somewhere, set-up commands keep their form."""

import re
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks").glob("*.md"))]

FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S[^\n]*-->\s*\Z")
LINK = re.compile(r"""\]\((?P<markdown>[^)\s]+)[^)]*\)|\b(?:src|href|srcset)="(?P<html>[^"]+)\"""")
ELSEWHERE = ("http://", "https://", "mailto:")

MAIN_COMMAND = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e . && .venv/bin/lightning-qat"
TEST_COMMAND = "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[test]' && .venv/bin/pytest -n 2"


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    language: str
    text: str
    line: int
    is_run: bool


def blocks(text: str) -> list[Block]:
    """The fenced blocks in order. `<!-- not run: why -->` right above a block keeps it from being run."""
    return [
        Block(
            language=match["language"],
            text=match["text"],
            line=text.count("\n", 0, match.start("text")) + 1,
            is_run=NOT_RUN.search(text[: match.start()]) is None,
        )
        for match in FENCE.finditer(text)
    ]


def links(text: str) -> list[str]:
    """The targets of links and images outside code that do not lead to another site."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    targets = [match["markdown"] or match["html"] for match in LINK.finditer(prose)]
    return [target for target in targets if not target.startswith(ELSEWHERE)]


def anchors(text: str) -> set[str]:
    """The anchors that headings get: lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(document: Path, root: Path = ROOT) -> list[str]:
    """The links of a document whose file or heading does not exist below root."""
    found = []
    for target in links(document.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        is_there = file.exists() and not Path(path).is_absolute() and file.resolve().is_relative_to(root)
        if not is_there or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            found.append(target)
    return found


README_BLOCKS = blocks(README.read_text(encoding="utf-8"))
PYTHON_BLOCKS = [block for block in README_BLOCKS if block.language in {"python", "py", "pycon"}]


def test_blocks_and_links_are_found() -> None:
    text = "# Use `it`!\n[a](b.md)\n```python\nx = 1\n```\n<!-- not run: needs a GPU -->\n\n```python\n[c](d)\n```\n"
    text += (
        '`[e](f)` ![g](h.png "i") <img src="j.png"> [k](https://l) [m](#use-it)\n<!-- not run: -->\n```bash\nls\n```\n'
    )
    expected = [
        Block("python", "x = 1\n", 4, True),
        Block("python", "[c](d)\n", 9, False),
        Block("bash", "ls\n", 14, True),
    ]
    assert blocks(text) == expected
    assert links(text) == ["b.md", "h.png", "j.png", "#use-it"]
    assert anchors(text) == {"use-it"}


def test_readme_has_two_set_up_commands() -> None:
    """Each is one line that is complete on a fresh machine; .ci/run runs the second. No other comes before."""
    set_up = [block for block in README_BLOCKS if "pip install" in block.text][:2]
    assert [block.text for block in set_up] == [f"{MAIN_COMMAND}\n", f"{TEST_COMMAND}\n"]
    assert [block.language for block in set_up] == ["bash", "bash"]
    assert sum(block.text.startswith("python3 -m venv") for block in README_BLOCKS) == 2


def test_readme_shows_code_that_runs() -> None:
    assert any(block.is_run for block in PYTHON_BLOCKS), "README.md shows the one-line use in a ```python block"
    assert {block.language for block in PYTHON_BLOCKS} == {"python"}, "only ```python blocks are run"


@pytest.mark.parametrize(
    "block", [block for block in PYTHON_BLOCKS if block.is_run], ids=lambda block: f"README.md:{block.line}"
)
def test_readme_block(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs in a module of its own, where pickle finds what it defines, with the line numbers of the README."""
    module = types.ModuleType(f"readme_{block.line}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = "\n" * (block.line - 1) + block.text
    exec(compile(source, str(README), "exec"), module.__dict__)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path: Path, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, path, "--fast"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert result.stdout.strip(), "an example says what it found"


def test_every_example_is_run() -> None:
    """A script in a subfolder, or a notebook, would not be run; an example without --fast would take its full time."""
    listing = sorted(path for path in ROOT.glob("examples/**/*") if path.is_file() and path.suffix != ".pyc")
    assert [path for path in listing if path.suffix != ".md"] == EXAMPLES
    assert [path.name for path in EXAMPLES if "--fast" not in path.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links(document: Path) -> None:
    assert broken(document) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "outside.md").touch()
    root = tmp_path / "root"
    root.mkdir()
    document = root / "a.md"
    document.write_text(f"# One\n[a](b.md) [c](#one) [d](#two) [e]({document}) [f](../outside.md)\n", encoding="utf-8")
    assert broken(document, root) == ["b.md", "#two", str(document), "../outside.md"]
