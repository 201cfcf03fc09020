"""Baked linear layers that multiply integer codes, as the prepared layers that they were made of do."""

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lightning_qat.conversion.baked_input import BAKED_INPUT, INTEGER_DTYPES, integer_dtype
from lightning_qat.conversion.derived import derive
from lightning_qat.conversion.fused import runs_on_integers
from lightning_qat.functional.integer import scaled_product
from lightning_qat.quantization.tensor import QuantizedTensor

_CODES, _SCALE = "integer_weight", "integer_scale"
_BAKED: WeakValueDictionary[type, type[nn.Module]] = WeakValueDictionary()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def integer_dtypes(module: nn.Module) -> tuple[torch.dtype, ...]:
    """Return in which dtypes the products of a prepared layer run on integers instead, on its present device."""
    device = next(iter(module.parameters())).device.type
    return tuple(dtype for dtype in _DTYPES if runs_on_integers(module, device, dtype))


def multiply_integers(module: nn.Module, weight: QuantizedTensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Let a baked linear layer multiply integer codes, in place.

    ``torch.export`` sees the float product of the same values, which every runtime knows.

    Args:
        module: a baked layer with stock forward and baked input.
        weight: its codes, per output or per tensor.
        dtypes: of the products that are replaced.
    """
    codes, scale = weight.codes, weight.scale.reshape(1, -1)
    if weight.offset:  # half-integer levels: twice as large they are integers
        codes, scale = 2 * codes + 1, scale * 0.5
    module.register_buffer(_CODES, codes, persistent=False)
    module.register_buffer(_SCALE, scale, persistent=False)
    setattr(module, INTEGER_DTYPES, dtypes)
    module.__class__ = _baked_class(type(module))


def multiply_floats(module: nn.Module) -> None:
    """Undo :func:`multiply_integers`; a layer that multiplies floats already stays as it is."""
    base = class_on_floats(module)
    if base is type(module):
        return
    module.__class__ = base
    for name in (_CODES, _SCALE):
        delattr(module, name)
    delattr(module, INTEGER_DTYPES)


def class_on_floats(module: nn.Module) -> type[nn.Module]:
    """Return the class that a layer has, or had before it multiplied integers."""
    base: type[nn.Module] = getattr(type(module), "_baked_base", type(module))
    return base


def _forward(self: Any, input: Tensor) -> Tensor:
    dtype = integer_dtype(self, input)
    if dtype is None:
        output: Tensor = nn.Linear.forward(self, input)
        return output
    levels, scale, _ = self._modules[BAKED_INPUT].levels(input)
    rows = scale.expand(*input.shape[:-1], 1).reshape(-1, 1)
    codes = levels.to(torch.int8).reshape(-1, levels.shape[-1])
    y = scaled_product(codes, self._buffers[_CODES], rows, self._buffers[_SCALE], self.bias, dtype=dtype)
    return y.reshape(*input.shape[:-1], y.shape[-1])


def _baked_class(base: type[nn.Module]) -> type[nn.Module]:
    known = _BAKED.get(base)
    if known is not None:
        return known
    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_baked_base": base,
        "forward": _forward,
    }
    return _BAKED.setdefault(base, derive(base, namespace))


def _reduce(self: Any, protocol: Any) -> Any:
    return _rebuild, (type(self)._baked_base,), self.__getstate__()


def _rebuild(base: type[nn.Module]) -> nn.Module:
    baked = _baked_class(base)
    return baked.__new__(baked)
