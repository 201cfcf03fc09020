"""What can go wrong while a model is written or read."""

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
