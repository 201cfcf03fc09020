"""What can go wrong while a model is written or read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final


@final
class DamagedFileError(ValueError):
    """A file that is truncated, changed, of another version, or no artifact at all."""


@final
class MissingCompilerError(OSError):
    """A compiler that a format needs is not installed; the message says what to install."""


@final
class RefusedError(ValueError):
    """A format that cannot hold the trained numbers exactly; the message says what to train with instead."""


@final
class VerificationError(RuntimeError):
    """A written file whose numbers differ from the trained ones. The file is removed."""


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one clear error.

    Readers of other projects raise errors of all kinds for a damaged file, some outside every common base.

    Args:
        path: the file, for the message.
        kind: what it should be, for the message.

    Raises:
        DamagedFileError: anything went wrong inside.
    """
    try:
        yield
    except DamagedFileError:
        raise
    except Exception as error:
        raise DamagedFileError(f"{path}: cannot be read as {kind} ({type(error).__name__}: {error})") from error
