"""GGUF: blocks made of the trained codes and float16 scales; the package ``gguf`` writes the container."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from lightning_qat.export.backend import Backend, Run, register
from lightning_qat.export.errors import reading
from lightning_qat.export.integers import as_integers, bits_of, block_scales, is_representable
from lightning_qat.export.source import Source
from lightning_qat.quantization.tensor import QuantizedTensor

Bytes = npt.NDArray[np.uint8]

BLOCK_SIZES: Final = {"Q4_0": 32, "Q8_0": 32, "TQ1_0": 256, "TQ2_0": 256}
_LONGEST_NAME: Final = 63
_DTYPES: Final = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
)  # fmt: skip
_ADVICE: Final = (
    "train with group_size=32 (ternary: 256 or 32) or a multiple, or per channel, and scale_dtype='float16', such as "
    "recipes.int4(group_size=32, scale_dtype='float16'), and leave layers of other widths in float"
)


@final
@register
@dataclass(frozen=True)
class Gguf(Backend):
    """Weight-only matrices as Q4_0, Q8_0, or for ternary codes TQ1_0 / TQ2_0; everything else in its float type.

    The blocks hold our codes and scales, not recomputed ones, so a model is either exact or refused. Codes up to 4 bits
    become Q4_0 (ternary rows that 256 does not divide, too), wider ones Q8_0. llama.cpp rounds the inputs of products
    to 8 bits in blocks; that is its arithmetic, and outputs here are compared in torch.

    Args:
        ternary: ``TQ2_0`` (2.06 bits a weight, faster) or ``TQ1_0`` (1.69 bits).
        architecture: value of ``general.architecture``. Tensors keep their names in the ``state_dict``.
    """

    name: ClassVar[str] = "gguf"
    suffix: ClassVar[str] = ".gguf"
    packages: ClassVar[tuple[str, ...]] = ("gguf",)
    least_sqnr: ClassVar[float] = 100.0  # equal, unless memory layout chooses another kernel

    ternary: str = "TQ2_0"
    architecture: str = "lightning-qat"

    def __post_init__(self) -> None:
        if self.ternary not in ("TQ1_0", "TQ2_0"):
            raise ValueError(f"format='gguf': ternary={self.ternary!r} is not allowed; choose 'TQ1_0' or 'TQ2_0'")

    @override
    def refusal(self, source: Source) -> str | None:
        if source.inputs:
            return (
                f"{next(iter(source.inputs))} transforms or quantizes its input, which GGUF cannot say; "
                "train weights only, such as recipes.int4(group_size=32, scale_dtype='float16')"
            )
        long = [name for name in (*source.weights, *source.floats) if len(name) > _LONGEST_NAME]
        if long:
            return f"{long[0]!r} has more than {_LONGEST_NAME} characters, the most that readers of GGUF accept"
        foreign = [name for name, value in source.floats.items() if value.dtype not in _DTYPES]
        if foreign:
            return f"{foreign[0]} is {source.floats[foreign[0]].dtype}, a type that GGUF does not have; convert it"
        for name, weight in source.weights.items():
            problem = _problem(weight)
            if problem:
                return f"{name}: {problem}; {_ADVICE}"
        return None

    def kind(self, weight: QuantizedTensor) -> str:
        """Return the block type of a weight."""
        codes, _ = as_integers(weight)
        if int(codes.abs().max()) <= 1 and block_scales(weight, 256) is not None:
            return self.ternary
        return "Q4_0" if bits_of(codes) <= 4 else "Q8_0"

    @override
    def write(self, source: Source, path: Path) -> None:
        import gguf

        writer = gguf.GGUFWriter(path, self.architecture)
        if source.recipe is not None:
            writer.add_string("lightning_qat.recipe", json.dumps(source.recipe))
        for name, weight in source.weights.items():
            kind = self.kind(weight)
            writer.add_tensor(name, blocks_of(weight, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
        for name, value in source.floats.items():
            _add_float(writer, name, value.detach().cpu().contiguous())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    @override
    def read(self, path: Path, source: Source) -> tuple[Mapping[str, Tensor], Run]:
        import gguf

        with reading(path, "a GGUF file"):
            values = {each.name: _value_of(each) for each in gguf.GGUFReader(path).tensors}
            state = {n: torch.from_numpy(values[n].copy()).to(w.dtype) for n, w in source.weights.items()}
            state |= {n: _float_of(values[n], like) for n, like in source.floats.items()}
            model = source.with_values(state)
        return state, lambda batch: source.forward(model, batch)


def _problem(weight: QuantizedTensor) -> str | None:
    codes, _ = as_integers(weight)
    if weight.zero_point is not None:
        return f"{weight.grid!r} has zero points, and the blocks have none"
    if bits_of(codes) > 8:
        return f"{weight.grid!r} takes {bits_of(codes)} bits as odd integers, and blocks hold 8"
    scale = block_scales(weight, 32)
    if scale is None:
        return (
            f"a weight of shape {tuple(weight.codes.shape)} with scales per {weight.granularity.label} does not divide "
            "into blocks of 32 along its rows"
        )
    if not is_representable(scale, torch.float16):
        return "its scales are not representable in float16"
    return None


def blocks_of(weight: QuantizedTensor, kind: str) -> Bytes:
    """Return the rows of a matrix as blocks of a type.

    Args:
        weight: a matrix [out, in] that fits, see :func:`block_scales`.
        kind: a key of ``BLOCK_SIZES``.

    Returns:
        Bytes of shape [out, bytes of a row].
    """
    size = BLOCK_SIZES[kind]
    scale = block_scales(weight, size)
    assert scale is not None  # noqa: S101 - refusal() looked
    codes = as_integers(weight)[0].detach().cpu().numpy().reshape(-1, size)
    d = scale.detach().cpu().to(torch.float16).numpy().reshape(-1, 1).view(np.uint8)
    packed = {"Q4_0": _q4_0, "Q8_0": _q8_0, "TQ1_0": _tq1_0, "TQ2_0": _tq2_0}[kind](codes)
    parts = [packed, d] if kind.startswith("TQ") else [d, packed]
    return np.concatenate(parts, axis=1).reshape(weight.codes.shape[0], -1)


def _q8_0(codes: npt.NDArray[np.int16]) -> Bytes:
    return codes.astype(np.int8).view(np.uint8)


def _q4_0(codes: npt.NDArray[np.int16]) -> Bytes:
    """Element i in the low half of byte i, element i + 16 in the high half."""
    nibbles = (codes + 8).astype(np.uint8)
    packed: Bytes = nibbles[:, :16] | (nibbles[:, 16:] << np.uint8(4))
    return packed


def _tq2_0(codes: npt.NDArray[np.int16]) -> Bytes:
    """Two runs of 128 elements; in each, byte i holds elements i, i + 32, i + 64, i + 96."""
    quarters = (codes + 1).astype(np.uint8).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    packed: Bytes = np.bitwise_or.reduce(quarters << shifts, axis=2).reshape(-1, 64)
    return packed


def _tq1_0(codes: npt.NDArray[np.int16]) -> Bytes:
    """Five trits a byte as a fraction of 3^5 in 256ths: runs of 32 x 5, 16 x 5 and 4 x 4 elements."""
    trits = (codes + 1).astype(np.uint16)
    powers = np.array([81, 27, 9, 3, 1], dtype=np.uint16).reshape(1, 5, 1)
    sums = [
        (trits[:, :160].reshape(-1, 5, 32) * powers).sum(1),
        (trits[:, 160:240].reshape(-1, 5, 16) * powers).sum(1),
        (trits[:, 240:].reshape(-1, 4, 4) * powers[:, :4]).sum(1),
    ]
    fractions = (np.concatenate(sums, axis=1).astype(np.uint32) * 256 + 242) // 243
    return fractions.astype(np.uint8)


def _add_float(writer: Any, name: str, value: Tensor) -> None:
    import gguf

    if value.dtype == torch.bfloat16:
        writer.add_tensor(name, _array(value.view(torch.uint8)), raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, _array(value))


def _array(value: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = value.numpy()
    return array.reshape(1) if array.ndim == 0 else array


def _value_of(stored: Any) -> npt.NDArray[Any]:
    """Return a tensor of the reader in floats, or as the integers that it holds, such as counters of BatchNorm."""
    import gguf

    kind = gguf.GGMLQuantizationType
    if stored.tensor_type in (kind.F64, kind.I64, kind.I32, kind.I16, kind.I8):
        return np.asarray(stored.data)
    values: npt.NDArray[Any] = gguf.quants.dequantize(stored.data, stored.tensor_type)
    return values


def _float_of(array: npt.NDArray[Any], like: Tensor) -> Tensor:
    return torch.from_numpy(array.copy()).reshape(like.shape).to(like.dtype)
