"""Elementwise parts compiled on their own, where asked for: one kernel each way instead of ten passes."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

_log: Final = logging.getLogger(__name__)
T = TypeVar("T")
_COMPILED: Final[dict[Any, Callable[..., Any]]] = {}
_STATE: Final[dict[str, str | None]] = {"backend": None}


@contextmanager
def compiled_kernels(backend: str = "inductor") -> Iterator[None]:
    """Compile the elementwise parts of fake quantization, forward and backward, inside; process-wide.

    A kernel is compiled when it is first needed, which takes seconds, and serves all shapes and all bit widths of a
    grid. Values and the gradients of values are those of the eager operations, bit for bit; the gradients of learned
    scales, which are sums, up to float rounding. Nothing changes inside a step that is compiled as a whole. Where no
    compiler works, a warning is logged once and everything is computed by the eager operations.

    Args:
        backend: of ``torch.compile``.

    Example::

        with compiled_kernels():
            trainer.fit(model)
    """
    before = _STATE["backend"]
    _STATE["backend"] = backend
    try:
        yield
    finally:
        _STATE["backend"] = before


def wanted(x: Tensor, least: int) -> bool:
    """Whether a compiled kernel is to compute on a tensor of at least so many elements."""
    return _STATE["backend"] is not None and x.numel() >= least and not torch.compiler.is_compiling()


def run(function: Callable[..., T], key: Any, *arguments: Any) -> T:
    """Call a function compiled; by itself where that fails.

    Args:
        function: fullgraph-compilable, without effect on its arguments.
        key: what of the arguments is compiled in; one compilation for each.
        *arguments: tensors of any size, and what the key describes.
    """
    backend = _STATE["backend"]
    if backend is None:
        return function(*arguments)
    key = (function, backend, key)
    if key not in _COMPILED:
        _COMPILED[key] = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    try:
        with torch.no_grad():
            found: T = _COMPILED[key](*(a.detach() if isinstance(a, Tensor) else a for a in arguments))
            return found
    except Exception as error:  # whatever a compiler, or its absence, raises
        _log.warning("Kernels are not compiled, the eager operations go on: %s", str(error).partition("\n")[0])
        _STATE["backend"] = None
        return function(*arguments)
