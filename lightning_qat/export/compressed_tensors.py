"""The layout of compressed-tensors, which vLLM loads: a folder with config.json and model.safetensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import override

from lightning_qat.conversion.restore import InputDescription
from lightning_qat.export.backend import Backend, Run, register
from lightning_qat.export.errors import reading
from lightning_qat.export.files import share
from lightning_qat.export.integers import as_integers, bits_of, is_representable
from lightning_qat.export.source import Source, separate
from lightning_qat.functional.packing import pack_bits, unpack_bits
from lightning_qat.quantization.granularity import PerGroup, PerToken
from lightning_qat.quantization.grid import Int
from lightning_qat.quantization.scale import AbsMax
from lightning_qat.quantization.tensor import QuantizedTensor

_INPUTS: Final = Int(8, narrow=True)
_WORD: Final = 32
_VERSION: Final = "0.9.0"


@final
@register
@dataclass(frozen=True)
class CompressedTensors(Backend):
    """Linear layers as ``pack-quantized`` int4 / int8 weights, or with 8-bit inputs per token as ``int-quantized``.

    Codes up to 4 bits take 4, wider ones 8. Scales are stored in the dtype of the model, as vLLM keeps them, so that
    16-bit models are exact only if they were trained with such scales. Names stay those of the ``state_dict``. Outputs
    are compared in torch on the weights of the file; vLLM quantizes an input per token with the scale amax / 127, which
    is that of ``Int(8, narrow=True)`` with ``AbsMax()``.

    Args:
        config: what else ``config.json`` is to say, such as the architecture of a Hugging Face model.
    """

    name: ClassVar[str] = "compressed-tensors"
    suffix: ClassVar[str] = ""
    least_sqnr: ClassVar[float] = 100.0
    files: ClassVar[tuple[str, ...]] = ("config.json", "model.safetensors")

    config: Mapping[str, Any] = field(default_factory=dict)

    @override
    def refusal(self, source: Source) -> str | None:
        if not source.weights:
            return "no weight is quantized; use format='safetensors'"
        for name, weight in source.weights.items():
            problem = _problem(weight, source.model.get_submodule(name.rpartition(".")[0]))
            problem = "the weight is tied, and the layout holds each by itself" if name in tied(source) else problem
            if problem:
                return f"{name}: {problem}; use format='safetensors'"
        layers = {name.rpartition(".")[0] for name in source.weights}
        for name, described in source.inputs.items():
            if not _is_dynamic(described) or name not in layers:
                return (
                    f"{name}: the layout knows inputs in Int(8, narrow=True) per token by AbsMax(), without "
                    "transforms, of layers with quantized weights; use format='safetensors'"
                )
        if source.inputs and layers != set(source.inputs):
            return f"{min(layers - set(source.inputs))}: its input is float and others are not; give all the same rule"
        if source.inputs and any(isinstance(w.granularity, PerGroup) for w in source.weights.values()):
            return "8-bit inputs go with weights that have one scale per channel or tensor; leave group_size out"
        return None

    @override
    def write(self, source: Source, path: Path) -> None:
        path.mkdir()
        tensors = separate(source.floats)
        for name, weight in source.weights.items():
            tensors |= {f"{name}{part}": value for part, value in _stored(weight, bool(source.inputs)).items()}
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        share(path / "model.safetensors")
        config = dict(self.config) | {"quantization_config": quantization_config(source)}
        if source.recipe is not None:
            config["lightning_qat_recipe"] = source.recipe
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @override
    def read(self, path: Path, source: Source) -> tuple[Mapping[str, Tensor], Run]:
        with reading(path, "a compressed-tensors model"):
            found = load_file(path / "model.safetensors")
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            groups = config["quantization_config"]["config_groups"]
            bits = {layer: group["weights"]["num_bits"] for group in groups.values() for layer in group["targets"]}
            state = {name: found[name] for name in source.floats}
            for name, weight in source.weights.items():
                num_bits = bits.get("Linear") or bits[name.rpartition(".")[0]]
                state[name] = _restored(found, name, num_bits).to(weight.dtype)
            model = source.with_values(state)
        return state, lambda batch: source.forward(model, batch)


def tied(source: Source) -> set[str]:
    """Return the quantized weights that have a second name."""
    return set(source.aliases.values()) & set(source.weights)


def _problem(weight: QuantizedTensor, owner: nn.Module) -> str | None:
    if not isinstance(owner, nn.Linear):
        return f"{type(owner).__name__} is no linear layer"
    if weight.zero_point is not None:
        return f"{weight.grid!r} has zero points, and the layers here are symmetric"
    codes, scale = as_integers(weight)
    if bits_of(codes) > 8:
        return f"{weight.grid!r} takes {bits_of(codes)} bits as odd integers, and the layout holds 8"
    if weight.dtype == torch.float64 or not is_representable(scale, weight.dtype):
        kind = str(weight.dtype).removeprefix("torch.")
        return f"its scales are not representable in {kind}, the dtype of the model; train with scale_dtype={kind!r}"
    return None


def _is_dynamic(described: InputDescription) -> bool:
    spec = described.spec
    if described.transforms or spec is None or described.grid != _INPUTS:
        return False
    return isinstance(spec.granularity, PerToken) and isinstance(spec.scale, AbsMax)


def _num_bits(weight: QuantizedTensor) -> int:
    return 4 if bits_of(as_integers(weight)[0]) <= 4 else 8


def _stored(weight: QuantizedTensor, with_inputs: bool) -> dict[str, Tensor]:
    codes, scale = as_integers(weight)
    rows = codes.shape[0]
    scale = (
        scale.reshape(rows, -1) if isinstance(weight.granularity, PerGroup) else scale.reshape(-1, 1).expand(rows, 1)
    )
    scale = scale.to(weight.dtype).cpu().contiguous()
    if with_inputs:
        return {"": codes.to(torch.int8).cpu(), "_scale": scale}
    packed = pack_words(codes.cpu(), _num_bits(weight))
    return {"_packed": packed, "_scale": scale, "_shape": torch.tensor(codes.shape)}


def pack_words(codes: Tensor, num_bits: int) -> Tensor:
    """Pack the rows of a matrix of signed integers into 32-bit words, lowest bits first, rows filled up.

    Args:
        codes: int of shape [rows, columns], -2^(num_bits - 1) .. 2^(num_bits - 1) - 1.
        num_bits: 1 to 8.

    Returns:
        int32 of shape [rows, ceil(columns * num_bits / 32)].

    >>> pack_words(torch.tensor([[-8, 1]]), 4)
    tensor([[144]], dtype=torch.int32)
    """
    rows, columns = codes.shape
    levels = codes.to(torch.int16) + 2 ** (num_bits - 1)
    filled = torch.nn.functional.pad(levels, (0, -columns % _WORD))
    words = pack_bits(filled, num_bits).view(torch.int32).reshape(rows, -1)
    return words[:, : -(-columns * num_bits // _WORD)].contiguous()


def unpack_words(words: Tensor, num_bits: int, columns: int) -> Tensor:
    """Undo :func:`pack_words`; int16."""
    rows = words.shape[0]
    filled = torch.nn.functional.pad(words, (0, -words.shape[1] % num_bits)).contiguous()
    levels = unpack_bits(filled.view(torch.uint8).flatten(), num_bits).reshape(rows, -1)
    codes: Tensor = levels[:, :columns].to(torch.int16) - 2 ** (num_bits - 1)
    return codes


def _restored(found: Mapping[str, Tensor], name: str, num_bits: int) -> Tensor:
    scale = found[f"{name}_scale"].float()
    if name in found:
        codes = found[name].to(torch.int16)
    else:
        codes = unpack_words(found[f"{name}_packed"], num_bits, int(found[f"{name}_shape"][1]))
    grouped = codes.float().reshape(codes.shape[0], scale.shape[1], -1)
    values: Tensor = grouped * scale.unsqueeze(-1)
    return values.reshape(codes.shape)


def quantization_config(source: Source) -> dict[str, Any]:
    """Return what ``config.json`` says of the quantization: one group per width and strategy."""
    schemes: dict[tuple[int, int], list[str]] = {}
    for name, weight in source.weights.items():
        size = weight.granularity.size if isinstance(weight.granularity, PerGroup) else 0
        key = (8 if source.inputs else _num_bits(weight), size)
        schemes.setdefault(key, []).append(name.rpartition(".")[0])
    layers = {layer for names in schemes.values() for layer in names}
    linear = [name for name, module in source.model.named_modules() if isinstance(module, nn.Linear)]
    inputs = _arguments(8, "token", dynamic=True) if source.inputs else None
    groups = {}
    for index, ((bits, size), names) in enumerate(schemes.items()):
        weights = _arguments(bits, "group" if size else "channel", group_size=size or None)
        targets = ["Linear"] if len(schemes) == 1 else names
        groups[f"group_{index}"] = {"targets": targets, "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if source.inputs else "pack-quantized",
        "quantization_status": "compressed",
        "version": _VERSION,
        "config_groups": groups,
        "ignore": [name for name in linear if name not in layers],
        "kv_cache_scheme": None,
    }


def _arguments(bits: int, strategy: str, *, group_size: int | None = None, dynamic: bool = False) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
    }
