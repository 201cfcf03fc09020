"""Remarks of other packages that are no use to somebody who runs our configurations."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

HINTS: Final = (
    "The '.*' does not have many workers",  # the data lies in memory
    "The number of training batches .* is smaller than the logging interval",
    "Checkpoint directory .* exists and is not empty",  # the second training writes beside the first
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 on torch 2.13
    "GPU available but not used",
)


@contextmanager
def without_hints() -> Iterator[None]:
    """Leave these warnings out inside the context; all others are shown."""
    with warnings.catch_warnings():
        for hint in HINTS:
            warnings.filterwarnings("ignore", hint)
        yield
