"""Quantized tensors and inputs as plain data, and back, with every number checked on the way back."""

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from lightning_qat.conversion.restore import InputDescription
from lightning_qat.export.errors import DamagedFileError
from lightning_qat.functional.packing import pack, packed_size, unpack
from lightning_qat.quantization.granularity import Granularity, Layout
from lightning_qat.quantization.grid import Binary, Grid
from lightning_qat.quantization.recipe import from_plain, to_plain
from lightning_qat.quantization.spec import QuantizerSpec
from lightning_qat.quantization.tensor import QuantizedTensor
from lightning_qat.quantization.transform import Transform

DTYPES: Final = {
    str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
_FAILURES: Final = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError, RecursionError)


def code_range(grid: Grid) -> tuple[int, int]:
    """Return the smallest code and the distance between codes: 2 for the codes -1 and 1 of ``Binary()``.

    >>> from lightning_qat.quantization import HalfInt
    >>> code_range(Binary()), code_range(HalfInt(2))
    ((-1, 2), (-2, 1))
    """
    return int(grid.lo - grid.offset), 2 if isinstance(grid, Binary) else 1


def pack_codes(tensor: QuantizedTensor) -> Tensor:
    """Return the codes as bytes, at the least whole number of bits (ternary: 1.6 bits) per weight."""
    low, step = code_range(tensor.grid)
    shifted = tensor.codes.to(torch.int16) - low
    return pack(shifted // step if step > 1 else shifted, tensor.grid.num_levels)


def unpack_codes(packed: Tensor, grid: Grid, shape: tuple[int, ...]) -> Tensor:
    """Undo :func:`pack_codes`; int8."""
    low, step = code_range(grid)
    values = unpack(packed, grid.num_levels, math.prod(shape)).to(torch.int16)
    return (values * step + low).to(torch.int8).reshape(shape)


def describe_weight(tensor: QuantizedTensor) -> dict[str, Any]:
    """Return everything about a quantized weight except its numbers."""
    three = tensor.grid.num_levels == 3
    return {
        "grid": to_plain(tensor.grid),
        "granularity": to_plain(tensor.granularity),
        "layout": to_plain(tensor.layout),
        "shape": list(tensor.codes.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "packing": "trits" if three else f"bits{(tensor.grid.num_levels - 1).bit_length()}",
        "has_zero_point": tensor.zero_point is not None,
    }


def build_weight(name: str, data: Any, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """Return the quantized weight that a description and its packed tensors hold.

    Raises:
        DamagedFileError: anything that does not fit together.
    """
    try:
        grid = _instance(Grid, data["grid"])
        granularity = _instance(Granularity, data["granularity"])
        layout = _instance(Layout, data["layout"])
        shape = tuple(int(n) for n in data["shape"])
        packed, scale = tensors[f"{name}.codes"], tensors[f"{name}.scale"]
        if min(shape, default=1) < 0 or packed.shape != (packed_size(math.prod(shape), grid.num_levels),):
            raise ValueError(f"{tuple(packed.shape)} bytes do not hold codes of shape {shape}")
        problem = granularity.problem(shape, layout)
        if problem:
            raise ValueError(problem)
        codes = unpack_codes(packed, grid, shape)
        zero_point = tensors[f"{name}.zero_point"].to(scale.dtype) if data["has_zero_point"] else None
        grouped = granularity.group(codes, layout).shape
        for each in (scale, zero_point):
            if each is not None and torch.broadcast_shapes(each.shape, grouped) != grouped:
                raise ValueError(f"scales of shape {tuple(each.shape)} do not fit codes of shape {shape}")
        if not bool(torch.isfinite(scale).all()):
            raise ValueError("a scale is not finite")
        return QuantizedTensor(codes, scale, zero_point, grid.offset, grid, granularity, layout, DTYPES[data["dtype"]])
    except _FAILURES as error:
        raise DamagedFileError(f"{name}: the description does not fit the tensors ({_short(error)})") from error


def describe_input(described: InputDescription) -> dict[str, Any]:
    """Return everything about a quantized input except its numbers."""
    return {
        "transforms": [to_plain(transform) for transform in described.transforms],
        "spec": None if described.spec is None else to_plain(described.spec),
        "grid": None if described.grid is None else to_plain(described.grid),
        "layout": to_plain(described.layout),
        "has_scale": described.scale is not None,
        "has_zero_point": described.zero_point is not None,
        "integer_products": [str(dtype).removeprefix("torch.") for dtype in described.integer],
    }


def build_input(name: str, data: Any, tensors: Mapping[str, Tensor]) -> InputDescription:
    """Undo :func:`describe_input`.

    Raises:
        DamagedFileError: anything that does not fit together.
    """
    try:
        transforms = tuple(_instance(Transform, item) for item in data["transforms"])
        spec = None if data["spec"] is None else _instance(QuantizerSpec, data["spec"])
        grid = None if data["grid"] is None else _instance(Grid, data["grid"])
        scale = tensors[f"{name}.input.scale"] if data["has_scale"] else None
        zero_point = tensors[f"{name}.input.zero_point"].float() if data["has_zero_point"] else None
        layout, integer = _instance(Layout, data["layout"]), tuple(DTYPES[item] for item in data["integer_products"])
        return InputDescription(transforms, spec, grid, layout, scale, zero_point, integer)
    except _FAILURES as error:
        raise DamagedFileError(f"{name}: the description of its input cannot be read ({_short(error)})") from error


def _instance(kind: Any, data: Any) -> Any:
    value = from_plain(data)
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]
