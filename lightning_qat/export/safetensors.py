"""The project's own format: packed codes, scales, and a JSON description, in a safetensors file."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from typing_extensions import override

from lightning_qat.conversion.restore import restore_baked
from lightning_qat.export.backend import Backend, Run, register
from lightning_qat.export.description import build_input, build_weight, describe_input, describe_weight, pack_codes
from lightning_qat.export.errors import DamagedFileError
from lightning_qat.export.files import share
from lightning_qat.export.source import Source, blank, separate
from lightning_qat.quantization.tensor import QuantizedTensor

VERSION: Final = 1
"""Version of the description. A reader refuses any other."""

_DESCRIPTION: Final = "lightning_qat"
_CHECKSUM: Final = "sha256"


@final
@register
@dataclass(frozen=True)
class Safetensors(Backend):
    """Codes at the bits they need, scales in float32, all else as it is; one memory-mapped file that runs no code.

    Of a weight ``layer.weight`` the file holds ``layer.weight.codes`` (uint8, see
    :func:`lightning_qat.functional.packing.pack`), ``layer.weight.scale`` and where there is one
    ``layer.weight.zero_point`` (int8). The metadata entry ``lightning_qat`` is JSON: version, recipe, and grid,
    granularity, layout, shape and dtype of each weight. The entry ``sha256`` covers that JSON and all tensors.
    """

    name: ClassVar[str] = "safetensors"
    suffix: ClassVar[str] = ".safetensors"
    least_sqnr: ClassVar[float] = 100.0  # equal, unless memory layout chooses another kernel (channels_last)

    @override
    def refusal(self, source: Source) -> str | None:
        return None

    @override
    def write(self, source: Source, path: Path) -> None:
        tensors = packed_tensors(source)
        description = json.dumps(_description(source), sort_keys=True, separators=(",", ":"))
        metadata = {"format": "pt", _DESCRIPTION: description, _CHECKSUM: checksum(description, tensors.items())}
        save_file(tensors, path, metadata)
        _order_metadata(path)
        share(path)

    @override
    def read(self, path: Path, source: Source) -> tuple[Mapping[str, Tensor], Run]:
        model = load(path, blank(source.model)).eval()
        state = model.state_dict()
        kept = {name: state[name] for name in (*source.weights, *source.floats)}
        return kept, lambda batch: source.forward(model, batch)


def _order_metadata(path: Path) -> None:
    """Sort the metadata of a file in place: save_file() takes them in another order each time, equal models differ."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:
            file.seek(8)
            file.write(text)


def packed_tensors(source: Source) -> dict[str, Tensor]:
    """Return what the file holds: packed codes, scales, zero points, and all other tensors."""
    tensors = separate(source.floats)
    for name, weight in source.weights.items():
        tensors[f"{name}.codes"] = pack_codes(weight).cpu()
        tensors[f"{name}.scale"] = weight.scale.detach().cpu().contiguous()
        if weight.zero_point is not None:
            tensors[f"{name}.zero_point"] = _small_integers(weight.zero_point)
    for name, described in source.inputs.items():
        if described.scale is not None:
            tensors[f"{name}.input.scale"] = described.scale.detach().cpu().contiguous()
        if described.zero_point is not None:
            tensors[f"{name}.input.zero_point"] = described.zero_point.detach().cpu().contiguous()
    return tensors


def _small_integers(zero_point: Tensor) -> Tensor:
    small = zero_point.detach().cpu().to(torch.int8).contiguous()
    return small if torch.equal(small.to(zero_point.dtype), zero_point.detach().cpu()) else zero_point.detach().cpu()


def _description(source: Source) -> dict[str, Any]:
    return {
        "version": VERSION,
        "recipe": source.recipe,
        "weights": {name: describe_weight(weight) for name, weight in source.weights.items()},
        "inputs": {name: describe_input(described) for name, described in source.inputs.items()},
        "aliases": dict(source.aliases),
    }


def checksum(description: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 over the description and the names, dtypes, shapes and bytes of all tensors.

    >>> checksum("{}", {"a": torch.zeros(2)}.items())[:16]
    '...'
    """
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(path: str | Path, model: nn.Module | None = None, *, verify: bool = True) -> Any:
    """Read a file written by :class:`Safetensors`, memory-mapped. Nothing in it is executed or unpickled.

    A model gets copies of float tensors that begin elsewhere than torch's own memory would: of those, products differ
    in the last bit.

    Args:
        path: the file.
        model: freshly built plain float module of the architecture that was trained, or None. It is changed in place:
            its weights become the trained quantized values, its inputs are transformed and quantized as in training.
        verify: compare the checksum, which reads the whole file.

    Returns:
        The model; without one ``{name: QuantizedTensor}`` for quantized weights and ``{name: Tensor}`` for all else.
        The second names of tied weights are there, too.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: truncated, changed, of another version, or no artifact.
        ValueError: a model of another architecture.
    """
    metadata, tensors = _open(path, with_tensors=True)
    description = _read_description(path, metadata)
    if verify and checksum(metadata[_DESCRIPTION], tensors.items()) != metadata.get(_CHECKSUM):
        raise DamagedFileError(f"{path}: the checksum does not match; the file was damaged or changed after the export")
    weights, inputs, floats = _contents(description, tensors)
    aliases = _aliases(description, weights, floats)
    if model is None:
        found: dict[str, QuantizedTensor | Tensor] = {**weights, **floats}
        return found | {name: found[first] for name, first in aliases.items()}
    try:
        return restore_baked(model, weights, inputs, floats, aliases)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AttributeError) as error:  # parts of a description that deny each other
        raise DamagedFileError(f"{path}: its description does not fit its tensors or the model ({error})") from error


def describe(path: str | Path) -> dict[str, Any]:
    """Return what a file says of itself: version, recipe (see ``Recipe.from_dict``), weights, inputs, ties.

    Args:
        path: the file; its tensors are not read.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: of another version, or no artifact.
    """
    return _read_description(path, _open(path)[0])


def _open(path: str | Path, *, with_tensors: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"load: path={str(path)!r} is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys() if with_tensors else ()
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DamagedFileError(f"{path}: damaged or no safetensors file ({error})") from error


def _read_description(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if _DESCRIPTION not in metadata:
        raise DamagedFileError(f"{path}: a safetensors file, but not one that lightning-qat exported")
    try:
        description = json.loads(metadata[_DESCRIPTION])
        version = description["version"]
        parts = [description[key] for key in ("weights", "inputs", "aliases")]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFileError(f"{path}: its description cannot be read ({error})") from error
    if version != VERSION or not all(isinstance(part, dict) for part in parts):
        raise DamagedFileError(
            f"{path}: description of version {version!r}, this lightning-qat reads version {VERSION}; "
            "export the checkpoint again, or read it with the release that wrote it"
        )
    return dict(description)


def _contents(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Any, Any, dict[str, Tensor]]:
    weights = {name: build_weight(name, data, tensors) for name, data in description["weights"].items()}
    inputs = {name: build_input(name, data, tensors) for name, data in description["inputs"].items()}
    parts = {f"{name}.{part}" for name in weights for part in ("codes", "scale", "zero_point")}
    parts |= {f"{name}.input.{part}" for name in inputs for part in ("scale", "zero_point")}
    return weights, inputs, {name: tensor for name, tensor in tensors.items() if name not in parts}


def _aliases(description: Mapping[str, Any], *holders: Mapping[str, Any]) -> dict[str, str]:
    aliases: dict[str, str] = description["aliases"]
    for name, first in aliases.items():
        if not isinstance(first, str) or not any(first in holder for holder in holders):
            raise DamagedFileError(f"{name}: tied to {first!r}, which the file does not hold")
    return aliases
