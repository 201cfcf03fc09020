"""What users install: the wheel holds the whole package and all of conf/, the pins of CI lie within the ranges."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONF_FILES = sorted(path.relative_to(ROOT / "conf").as_posix() for path in (ROOT / "conf").rglob("*.yaml"))
CONF_GROUPS = sorted({Path(name).parent.as_posix() for name in CONF_FILES} - {"."})

# Hydra's own view of pkg://lightning_qat.conf: where the package lies, and the options of each group.
SHOW_CONF = """
import json, sys
import lightning_qat
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra

with initialize_config_module("lightning_qat.conf", version_base="1.3"):
    loader = GlobalHydra.instance().config_loader()
    groups = {group: loader.get_group_options(group) for group in sys.argv[1:]}
print(json.dumps({"package": lightning_qat.__file__, "groups": groups}))
"""


def show_conf(cwd: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Runs SHOW_CONF in a fresh interpreter, away from the repository."""
    result = subprocess.run(
        [sys.executable, "-c", SHOW_CONF, *CONF_GROUPS],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    shown: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return shown


def missing_options(shown: dict[str, Any]) -> set[str]:
    """The files of conf/ that Hydra did not find. It may know more: the group `hydra` has options of its own."""
    found = {f"{group}/{option}.yaml" for group, options in shown["groups"].items() for option in options}
    return {name for name in CONF_FILES if "/" in name} - found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the present sources, built from a copy because a build writes beside what it reads."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("lightning_qat", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        out,
        source,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.glob("lightning_qat-*.whl")
    return built


def test_every_folder_of_the_package_is_listed() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "lightning_qat").rglob("*.py")}
    expected = {".".join(folder.parts) for folder in folders} | {"lightning_qat.conf"}
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert listed == sorted(expected), "change tool.setuptools.packages in pyproject.toml"


def test_wheel_holds_everything(wheel: Path) -> None:
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_qat").rglob("*.py")}
    conf = {
        f"lightning_qat/conf/{path.relative_to(ROOT / 'conf').as_posix()}"
        for path in (ROOT / "conf").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == sources | conf | {"lightning_qat/py.typed"}
    assert "lightning_qat/conf/train.yaml" in names


def test_wheel_is_composable(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with ZipFile(wheel) as archive:
        archive.extractall(site)
    shown = show_conf(tmp_path, os.environ | {"PYTHONPATH": str(site)})
    assert Path(shown["package"]).is_relative_to(site)
    assert missing_options(shown) == set()


def test_installed_package_is_composable(tmp_path: Path) -> None:
    """In an editable installation conf/ lies outside the package's folder."""
    assert {"callbacks", "data", "experiment", "logger", "model", "recipe", "trainer"} <= set(CONF_GROUPS)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    assert missing_options(show_conf(tmp_path, environment)) == set()


@pytest.mark.parametrize("name", ["lightning-qat", "lightning-qat-export"])
def test_console_script(name: str) -> None:
    entry_point = EntryPoint(name, PYPROJECT["project"]["scripts"][name], "console_scripts")
    assert callable(entry_point.load())


def test_pins_lie_within_the_ranges() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert [pin.name for pin in pins] == sorted(versions), "one line for each package, sorted"
    project = PYPROJECT["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text
