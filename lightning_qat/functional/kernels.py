"""Elementwise parts compiled on their own, on GPUs or where asked for: one kernel each way instead of ten passes."""

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

_log: Final = logging.getLogger(__name__)
T = TypeVar("T")
_COMPILED: Final[dict[Any, Callable[..., Any]]] = {}
_AUTO: Final = "auto"
_UNASKED: Final = 1 << 23  # elements from which on a kernel is compiled without being asked for
_STATE: Final[dict[str, str | None]] = {"backend": _AUTO}


@contextmanager
def compiled_kernels(backend: str | None = "inductor") -> Iterator[None]:
    """Compile the elementwise parts of fake quantization, forward and backward, inside; process-wide.

    On CUDA devices, large tensors are computed so anyway where Triton is installed (None keeps them, too, to eager
    operations): from 8 million elements on, where memory takes longer than the call of a compiled function. On CPUs,
    compilation takes longer than it saves in a short run.

    A kernel is compiled when it is first needed, which takes seconds, and serves all shapes and all bit widths of a
    grid. Values and the gradients of values are those of the eager operations, bit for bit; the gradients of learned
    scales, which are sums, up to float rounding. Nothing changes inside a step that is compiled as a whole. Where no
    compiler works, a warning is logged once and everything is computed by the eager operations.

    Args:
        backend: of ``torch.compile``, or None to compile nothing.

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


@functools.cache
def _default(device: str) -> str | None:
    """Return what compiles for a type of device without being asked."""
    return "inductor" if device == "cuda" and importlib.util.find_spec("triton") is not None else None


def wanted(x: Tensor, least: int) -> bool:
    """Whether a compiled kernel is to compute on a tensor of at least so many elements."""
    if torch.compiler.is_compiling() or x.numel() < least:  # in this order: a compiler may not know a size
        return False
    backend = _STATE["backend"]
    return backend is not None and (backend != _AUTO or (x.numel() >= _UNASKED and bool(_default(x.device.type))))


def run(function: Callable[..., T], device: str, key: Any, *arguments: Any) -> T:
    """Call a function compiled; by itself where that fails.

    Args:
        function: fullgraph-compilable, without effect on its arguments.
        device: type of the device that it runs on.
        key: what else is compiled in; one compilation for each.
        *arguments: tensors of any size, and what the key describes.
    """
    backend = _default(device) if _STATE["backend"] == _AUTO else _STATE["backend"]
    if backend is None:
        return function(*arguments)
    key = (function, backend, device, key)
    if key not in _COMPILED:
        _log.debug("Compiling %s for %s", function.__name__, device)
        _COMPILED[key] = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    try:
        with torch.no_grad():
            found: T = _COMPILED[key](*(a.detach() if isinstance(a, Tensor) else a for a in arguments))
            return found
    except Exception as error:  # whatever a compiler, or its absence, raises
        _log.warning("Kernels are not compiled, the eager operations go on: %s", str(error).partition("\n")[0])
        _STATE["backend"] = None
        return function(*arguments)
