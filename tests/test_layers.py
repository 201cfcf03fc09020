"""The shape of the code: imports go down only, optional packages are imported late, files and functions stay short."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_qat"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# From the bottom to the top. A module imports from lower layers, and within its own package. The empty name is
# lightning_qat/__init__.py, which gathers the public API from below; the command line may use that API.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"functional"}),
    frozenset({"quantization"}),
    frozenset({"conversion", "losses", "metrics", "schedules"}),
    frozenset({"export"}),
    frozenset({"models", "data", "callbacks"}),
    frozenset({""}),
    frozenset({"cli"}),
)
ONLY_IN_CLI = frozenset({"hydra"})
OPTIONAL = frozenset({"brevitas", "compressed_tensors", "gguf", "onnx", "onnxruntime", "onnxscript", "torchao"})
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60  # without the docstring


def module_name(path: Path) -> str:
    """`lightning_qat/a/b.py` -> `lightning_qat.a.b`, `lightning_qat/a/__init__.py` -> `lightning_qat.a`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(nodes: Iterable[ast.AST], module: str, *, is_package: bool) -> Iterator[tuple[str, int]]:
    """Every imported module as (absolute dotted name, line). `from a import b` counts as `a.b`: b may be a module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: those outside functions and `if TYPE_CHECKING`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield from run_at_import(child)


def unit(module: str) -> str:
    """The package or file right below lightning_qat that a dotted name belongs to; empty for lightning_qat itself."""
    candidate = [*module.split("."), ""][1]
    is_unit = (PACKAGE / candidate).is_dir() or (PACKAGE / f"{candidate}.py").is_file()
    return candidate if is_unit else ""


def level(name: str) -> int:
    """The position of a unit in LAYERS."""
    found = [index for index, layer in enumerate(LAYERS) if name in layer]
    assert found, (
        f"lightning_qat.{name} has no place in LAYERS of tests/test_layers.py: put it in the lowest that works"
    )
    return found[0]


def is_allowed(importer: str, imported: str) -> bool:
    """Whether one unit may import another."""
    return importer == imported or level(imported) < level(importer)


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    assert node.end_lineno is not None
    total = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None and first.end_lineno is not None:
        total -= first.end_lineno - first.lineno + 1
    return total


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_name(path))


def test_the_sources_were_found() -> None:
    assert PACKAGE / "__init__.py" in SOURCES
    assert {path.parent for path in SOURCES if path.name == "__init__.py"} == {path.parent for path in SOURCES}


def test_imports_are_resolved() -> None:
    code = "import a.b\nfrom x import y as z\ndef f():\n    from .c import d\n    from .. import e\n"
    code += "if TYPE_CHECKING:\n    import g\n"
    found = [name for name, _ in imports(ast.walk(ast.parse(code)), "lightning_qat.p.m", is_package=False)]
    assert sorted(found) == ["a.b", "g", "lightning_qat.e", "lightning_qat.p.c.d", "x.y"]
    found = [name for name, _ in imports(ast.walk(ast.parse("from .c import d")), "lightning_qat.p", is_package=True)]
    assert found == ["lightning_qat.p.c.d"]
    found = [name for name, _ in imports(run_at_import(ast.parse(code)), "lightning_qat.p.m", is_package=False)]
    assert found == ["a.b", "x.y"]


def test_order_of_the_layers() -> None:
    assert is_allowed("conversion", "functional")
    assert is_allowed("callbacks", "callbacks")
    assert is_allowed("", "export")
    assert is_allowed("cli", "")
    assert not is_allowed("functional", "quantization")
    assert not is_allowed("losses", "metrics")
    assert not is_allowed("models", "")
    assert not is_allowed("", "cli")


def test_function_lines() -> None:
    function = ast.parse('def f(\n    a: int,\n) -> int:\n    """One.\n\n    Two.\n    """\n    return a\n').body[0]
    assert isinstance(function, ast.FunctionDef)
    assert function_lines(function) == 4


@each_source
def test_imports_go_down(path: Path) -> None:
    module = module_name(path)
    found = imports(ast.walk(parsed(path)), module, is_package=path.name == "__init__.py")
    ours = [(name, line) for name, line in found if name.split(".")[0] == "lightning_qat"]
    wrong = [f"line {line}: {name}" for name, line in ours if not is_allowed(unit(module), unit(name))]
    assert not wrong, f"{module} may import only from its own package and from lower layers"


@each_source
def test_only_the_command_line_knows_hydra(path: Path) -> None:
    module = module_name(path)
    found = {name.split(".")[0] for name, _ in imports(ast.walk(parsed(path)), module, is_package=False)}
    assert unit(module) == "cli" or not found & ONLY_IN_CLI


@each_source
def test_optional_packages_are_imported_late(path: Path) -> None:
    nodes = run_at_import(parsed(path))
    found = {name.split(".")[0] for name, _ in imports(nodes, module_name(path), is_package=False)}
    assert not found & OPTIONAL, f"import {found & OPTIONAL} inside the function that needs it: it is an extra"


@each_source
def test_files_and_functions_are_short(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES, "split it"
    functions = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: function_lines(node) for node in functions}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.name == "__init__.py"], ids=lambda path: module_name(path)
)
def test_public_names_are_listed(path: Path) -> None:
    """What a package's `__init__.py` binds is its public API, and `__all__` names exactly that."""
    bound: set[str] = set()
    listed: list[str] = []
    for node in parsed(path).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            bound |= names
            if "__all__" in names and node.value is not None:
                listed = ast.literal_eval(node.value)
    assert "__all__" in bound, f"{module_name(path)} has no __all__"
    assert set(listed) - {"__version__"} == {name for name in bound if not name.startswith("_")}
