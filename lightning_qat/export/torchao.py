"""torchao: a state_dict of its tensor subclasses, made of our codes and scales instead of recomputed ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_qat.conversion.baked_linear import class_on_floats
from lightning_qat.conversion.restore import InputDescription
from lightning_qat.export.backend import Backend, Run, register
from lightning_qat.export.errors import reading
from lightning_qat.export.integers import as_integers, bits_of
from lightning_qat.export.source import Source, blank
from lightning_qat.quantization.granularity import PerGroup, PerTensor, PerToken
from lightning_qat.quantization.grid import Int
from lightning_qat.quantization.scale import AbsMax
from lightning_qat.quantization.tensor import QuantizedTensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@final
@register
@dataclass(frozen=True)
class Torchao(Backend):
    """``torch.save`` of a ``state_dict`` for the plain model: ``model.load_state_dict(torch.load(path), assign=True)``.

    Weights of linear layers and embeddings become ``IntxUnpackedToInt8Tensor`` (one byte a weight in the file, whatever
    its bits). Where the input is 8 bits per token, the weight becomes ``Int8Tensor`` with dynamic quantization of the
    input; torchao's scale of an input is amax / 127.5 where ours is amax / 127 or 128, so that outputs are bounded.

    Reading needs torchao imported; ``torch.load`` then restores these classes and no others.
    """

    name: ClassVar[str] = "torchao"
    suffix: ClassVar[str] = ".pt"
    packages: ClassVar[tuple[str, ...]] = ("torchao",)
    least_sqnr: ClassVar[float] = 25.0  # of inputs in 8 bits, with another scale than in training

    @override
    def refusal(self, source: Source) -> str | None:
        for name, weight in source.weights.items():
            owner = source.model.get_submodule(name.rpartition(".")[0])
            problem = _problem(weight, owner)
            if problem:
                return f"{name}: {problem}"
        for name, described in source.inputs.items():
            weight_or_none = source.weights.get(f"{name}.weight")
            tied = f"{name}.weight" in source.aliases.values()
            if tied or weight_or_none is None or not _is_dynamic(described, weight_or_none):
                return (
                    f"{name}: torchao's tensors quantize inputs to Int(8) per token by AbsMax(), without transforms, "
                    "where the weight has a scale per channel or tensor and is not tied; use format='safetensors'"
                )
        return None

    @override
    def write(self, source: Source, path: Path) -> None:
        state: dict[str, Tensor] = dict(source.floats)
        for name, weight in source.weights.items():
            dynamic = name.rpartition(".")[0] in source.inputs
            state[name] = _int8_tensor(weight) if dynamic else _intx_tensor(weight)
        state |= {name: state[first] for name, first in source.aliases.items()}
        torch.save(state, path)

    @override
    def read(self, path: Path, source: Source) -> tuple[Mapping[str, Tensor], Run]:
        model = blank(source.model).eval()
        with reading(path, "a state_dict of torchao tensors"):
            state: dict[str, Any] = torch.load(path, weights_only=True)
            model.load_state_dict(state, assign=True)
            values = {name: state[name].dequantize() for name in source.weights}
            values |= {name: state[name] for name in source.floats}
        return values, lambda batch: source.forward(model, batch)


def _problem(weight: QuantizedTensor, owner: nn.Module) -> str | None:
    kind = class_on_floats(owner)
    if not issubclass(kind, nn.Linear | nn.Embedding) or kind.forward not in (
        nn.Linear.forward,
        nn.Embedding.forward,
    ):
        return f"{kind.__name__} is no plain linear layer or embedding; leave it in float, or use format='safetensors'"
    if weight.dtype not in _DTYPES:
        return f"{weight.dtype} is no dtype of torchao's tensors; call model.float() first"
    bits = bits_of(as_integers(weight)[0])
    return f"{weight.grid!r} takes {bits} bits as odd integers, and torchao holds 8" if bits > 8 else None


def _is_dynamic(described: InputDescription, weight: QuantizedTensor) -> bool:
    spec = described.spec
    if (
        weight.zero_point is not None
        or isinstance(weight.granularity, PerGroup)
        or described.transforms
        or spec is None
        or not isinstance(described.grid, Int)
    ):
        return False
    symmetric = described.grid.bits == 8 and described.grid.symmetric
    return symmetric and isinstance(spec.granularity, PerToken) and isinstance(spec.scale, AbsMax)


def _block(weight: QuantizedTensor) -> tuple[int, int]:
    rows, columns = weight.codes.shape
    if isinstance(weight.granularity, PerGroup):
        return 1, weight.granularity.size
    return (rows, columns) if isinstance(weight.granularity, PerTensor) else (1, columns)


def _intx_tensor(weight: QuantizedTensor) -> Tensor:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    codes, scale = as_integers(weight)
    block = _block(weight)
    blocks = (codes.shape[0] // block[0], codes.shape[1] // block[1])
    zero_point = torch.zeros(blocks) if weight.zero_point is None else weight.zero_point.reshape(blocks)
    kind = getattr(torch, f"int{bits_of(codes)}")
    tensor: Tensor = IntxUnpackedToInt8Tensor(
        codes.to(torch.int8), scale.reshape(blocks).clone(), zero_point.to(torch.int8), kind, block, weight.dtype, None
    )
    return tensor


def _int8_tensor(weight: QuantizedTensor) -> Tensor:
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

    codes, scale = as_integers(weight)
    rows, columns = codes.shape
    tensor: Tensor = Int8Tensor(
        codes.to(torch.int8), scale.reshape(-1, 1).expand(rows, 1).clone(), [1, columns], weight.dtype,
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow()),
    )  # fmt: skip
    return tensor
