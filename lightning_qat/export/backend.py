"""The one interface behind which all formats lie, and their registry."""

import difflib
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from lightning_qat.export.files import name_problem
from lightning_qat.export.source import Source

Run = Callable[[Any], Any]
"""Called with a batch, returns what the artifact computes for it."""


class Backend(ABC):
    """Writes a baked model in one format, and reads it back. Instances are frozen values; fields are the options."""

    name: ClassVar[str]
    suffix: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[str, ...]] = ()
    """Names of the files of a format that writes a folder."""
    least_sqnr: ClassVar[float]
    """Decibels below which the outputs of an artifact are an error."""

    @abstractmethod
    def refusal(self, source: Source) -> str | None:
        """Return why this format cannot hold the model exactly and what to do instead, or None."""

    @abstractmethod
    def write(self, source: Source, path: Path) -> None:
        """Write the model to a path that does not exist yet."""

    @abstractmethod
    def read(self, path: Path, source: Source) -> tuple[Mapping[str, Tensor], Run]:
        """Return the dequantized weights (and other tensors) by name, and a function that computes outputs.

        The source may serve for what a format does not hold, such as the code of the model, never for numbers that it
        does hold.
        """


_BACKENDS: dict[str, type[Backend]] = {}
_Backend = TypeVar("_Backend", bound=type[Backend])


def register(backend: _Backend) -> _Backend:
    """Make a back end known by its name; a class decorator."""
    _BACKENDS[backend.name] = backend
    return backend


def formats() -> tuple[str, ...]:
    """Return the names of all formats."""
    return tuple(sorted(_BACKENDS))


def backend_for(format: str, options: Mapping[str, Any]) -> Backend:
    """Return the back end of a format.

    Args:
        format: one of :func:`formats`.
        options: fields of that back end.

    Raises:
        ValueError: an unknown format; the message lists all and the nearest.
        TypeError: an option that the format does not have.
        ImportError: a package that an extra installs.
    """
    if format not in _BACKENDS:
        near = difflib.get_close_matches(str(format).lower(), _BACKENDS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"export: format={format!r} is unknown; choose one of {', '.join(formats())}{hint}")
    kind = _BACKENDS[format]
    allowed = list(inspect.signature(kind).parameters)
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise TypeError(
            f"export: format={format!r} has no option {', '.join(unknown)}; "
            + (f"it has {', '.join(allowed)}" if allowed else "it has none")
        )
    for package in kind.packages:
        need(package, format)
    return kind(**options)


def check_name(path: Path, backend: Backend) -> None:
    """Look whether a path fits a format by its name.

    Args:
        path: of the artifact.
        backend: of the format.

    Raises:
        ValueError: no name, or the ending of another format.
    """
    others = [(name, kind.suffix) for name, kind in sorted(_BACKENDS.items())]
    problem = name_problem(path, backend.name, backend.suffix, others)
    if problem:
        raise ValueError(f"export: {problem}")


def need(package: str, format: str) -> Any:
    """Import an optional package, with an error that names the extra.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"export: format={format!r} needs the package {package!r} ({error}); "
            "install the extra: pip install 'lightning-qat[export]'"
        ) from error
