"""Where an artifact lies: names that fit its format, its checksums, and the moment at which it gets its name."""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_CHUNK: Final = 2**20


def name_problem(path: Path, format: str, suffix: str, others: Iterable[tuple[str, str]]) -> str | None:
    """Return why a path does not fit a format by its name alone, or None.

    Args:
        path: of the artifact.
        format: that was chosen.
        suffix: of that format.
        others: name and suffix of every format.

    >>> name_problem(Path("a.onnx"), "safetensors", ".safetensors", [("onnx", ".onnx")])
    "path='a.onnx' ends as format='onnx' does, and format='safetensors' was chosen; change one of them"
    """
    if not path.name:
        return f"path={str(path)!r} has no name; give a file, such as 'model{suffix}'"
    owners = [name for name, ending in others if ending and ending == path.suffix != suffix]
    if not owners:
        return None
    ends = " or ".join(f"format={name!r}" for name in owners)
    return f"path={str(path)!r} ends as {ends} does, and format={format!r} was chosen; change one of them"


def place_problem(path: Path, format: str, suffix: str, files: tuple[str, ...]) -> str | None:
    """Return why an artifact cannot take the place of what lies at its path, or None.

    Args:
        path: of the artifact.
        format: that was chosen.
        suffix: of that format.
        files: what a format writes into a folder; empty where it writes one file.
    """
    if not files:
        hint = path / f"model{suffix}"
        return f"path={str(path)!r} is a folder; give a file in it, such as {str(hint)!r}" if path.is_dir() else None
    if path.exists() and not path.is_dir():
        return f"path={str(path)!r} is a file, and format={format!r} writes a folder; choose another name"
    foreign = sorted(each.name for each in path.iterdir() if each.name not in files) if path.is_dir() else []
    if foreign:
        return (
            f"path={str(path)!r} is a folder that also holds {', '.join(foreign[:3])}, which an export would remove; "
            "choose a new folder"
        )
    return None


def checksums(path: Path) -> dict[str, str]:
    """Return the SHA-256 of a file under the name ``.``, or of each file of a folder under its name."""
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return {each.relative_to(path).as_posix(): _sha256(each) for each in files}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def move(temporary: Path, path: Path) -> None:
    """Give a finished artifact its name. An older one stays until then; a file is replaced at once.

    Args:
        temporary: a file or folder beside the path.
        path: its final name.
    """
    if not (temporary.is_dir() and path.is_dir()):
        os.replace(temporary, path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")  # a folder cannot be replaced at once
    os.replace(path, old)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old)


def share(path: Path) -> None:
    """Give a file the permissions of any new file; safetensors makes it readable for its owner alone.

    Args:
        path: a file beside which another can be made for a moment.
    """
    sample = path.with_name(f"{path.name}.mode")
    sample.touch()
    try:
        path.chmod(sample.stat().st_mode)
    finally:
        sample.unlink()


def remove(path: Path) -> None:
    """Remove a file or folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
