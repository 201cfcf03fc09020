"""ONNX: weights as int4 or int8 initializers behind DequantizeLinear; the other nodes as torch.export traced them."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_qat.export.backend import Backend, Run, register
from lightning_qat.export.compressed import standing_in
from lightning_qat.export.errors import reading
from lightning_qat.export.onnx_inputs import with_onnx_inputs
from lightning_qat.export.onnx_weights import LinearCodes, linear_codes
from lightning_qat.export.pt2 import trace
from lightning_qat.export.report import tensors_of
from lightning_qat.export.source import Source

_CODES: Final = ".codes"
_SCALE: Final = ".scale"
_ZERO_POINT: Final = ".zero_point"


@final
@register
@dataclass(frozen=True)
class Onnx(Backend):
    """Weights as integers behind DequantizeLinear (4 bits up to int4, else 8, half-integer grids doubled); QDQ inputs.

    Needs float32 or float16 models. 2-bit, ternary and binary codes take 4 bits each, as ONNX Runtime knows no less.
    Static and per-token dynamic 8-bit inputs become QuantizeLinear / DequantizeLinear pairs, others plain operations.

    ONNX Runtime fuses DequantizeLinear with MatMul, and by default the fused kernel rounds its input to 8 bits, which
    nobody trained (59 dB instead of 137 dB in a small attention layer, measured with 1.31). Where that is not wanted,
    set ``SessionOptions.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")``, as the check does.

    Args:
        opset: version of the operator set, 21 or more (int4 and blocks came with 21).
        accuracy_level: with which the check runs: 1 computes in float32, 4 is ONNX Runtime's own default.
        dynamic_dims: dimensions of every input tensor that may vary from call to call.
    """

    name: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    least_sqnr: ClassVar[float] = 35.0  # a code of a quantized input may flip where sums are ordered otherwise

    opset: int = 21
    accuracy_level: int = 1
    dynamic_dims: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.opset < 21:
            raise ValueError(f"format='onnx': opset={self.opset} has no int4 and no blocks; choose 21 or more")

    @override
    def refusal(self, source: Source) -> str | None:
        for name, weight in source.weights.items():
            if weight.dtype not in (torch.float32, torch.float16):
                return (
                    f"{name} is {weight.dtype}, and ONNX Runtime computes float32 and float16; call model.float() first"
                )
        if sum(tensor.nbytes for tensor in source.floats.values()) >= 2**31:
            return "float tensors of more than 2 GiB do not fit one protobuf file; quantize more of the model"
        return None

    @override
    def write(self, source: Source, path: Path) -> None:
        import onnx
        import onnxscript.optimizer

        program = trace(with_onnx_inputs(source), source, self.dynamic_dims)
        with _quiet():
            exported = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False, opset_version=self.opset)
        model: Any = exported.model_proto if exported is not None else None
        for name, weight in source.weights.items():
            names = [name, *(alias for alias, first in source.aliases.items() if first == name)]
            _insert(model.graph, names, linear_codes(weight))
        model = onnxscript.optimizer.optimize(model)
        _forget_origin(model)
        if source.recipe is not None:
            onnx.helper.set_model_props(model, {"lightning_qat.recipe": json.dumps(source.recipe)})
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString())

    @override
    def read(self, path: Path, source: Source) -> tuple[Mapping[str, Tensor], Run]:
        import onnx

        with reading(path, "an ONNX model"):
            model: Any = onnx.load(str(path))
            weights = _weights_in(model.graph, source)
            stand = standing_in(source.model, _Session(path, self.accuracy_level))
        return weights, lambda batch: source.forward(stand, batch)


def _weights_in(graph: Any, source: Source) -> dict[str, Tensor]:
    """Return the dequantized weights that the graph uses, by name."""
    import onnx

    constants = {each.name: _to_torch(onnx.numpy_helper.to_array(each)) for each in graph.initializer}
    used = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.input}
    weights = {}
    for name, weight in source.weights.items():
        if name + _CODES in used:
            zero_point = constants.get(name + _ZERO_POINT)
            parts = LinearCodes(constants[name + _CODES], constants[name + _SCALE], zero_point, 0, 0, "")
            weights[name] = parts.dequantize(weight)
    return weights


def _forget_origin(model: Any) -> None:
    """Leave out the stack traces: they name folders of this machine and can outweigh the weights."""
    for node in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    model.graph.ClearField("metadata_props")


def _to_torch(array: Any) -> Tensor:
    """Return an initializer as a tensor; 4-bit integers come as a type that torch does not know."""
    return torch.from_numpy(array.astype("int8") if array.dtype.name in ("int4", "uint4") else array.copy())


def _insert(graph: Any, names: Sequence[str], linear: LinearCodes) -> None:
    """Put integer initializers and DequantizeLinear in the place of a float initializer, for all tied names."""
    import onnx

    present = [each for each in graph.initializer if each.name in names]
    if not present:
        raise ValueError(f"{names[0]}: the traced graph does not use this weight; leave it out with Rule(..., None)")
    first = names[0]
    inputs = [_initializer(graph, first + _CODES, linear.codes, linear.onnx_type)]
    inputs.append(_initializer(graph, first + _SCALE, linear.scale, ""))
    if linear.zero_point is not None:
        inputs.append(_initializer(graph, first + _ZERO_POINT, linear.zero_point, linear.onnx_type))
    attributes: dict[str, Any] = {"axis": linear.axis} if linear.scale.dim() else {}
    attributes |= {"block_size": linear.block_size} if linear.block_size else {}
    nodes = [onnx.helper.make_node("DequantizeLinear", inputs, [first + ".linear"], first + ".dq", **attributes)]
    shape = _initializer(graph, first + ".shape", torch.tensor(linear.moved_shape), "")
    nodes.append(onnx.helper.make_node("Reshape", [first + ".linear", shape], [first + ".moved"]))
    nodes.append(onnx.helper.make_node("Transpose", [first + ".moved"], [first + ".turned"], perm=linear.permutation))
    to = present[0].data_type
    nodes.append(onnx.helper.make_node("Cast", [first + ".turned"], [first + ".value"], to=to))
    for each in present:
        graph.initializer.remove(each)
        nodes.append(onnx.helper.make_node("Identity", [first + ".value"], [each.name]))
    for node in reversed(nodes):
        graph.node.insert(0, node)


def _initializer(graph: Any, name: str, value: Tensor, onnx_type: str) -> str:
    import onnx

    array = value.detach().cpu().contiguous().numpy()
    if onnx_type:
        kind = getattr(onnx.TensorProto, onnx_type)
        array = array.astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
    graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return name


@final
class _Session:
    """Runs a file in ONNX Runtime on the CPU, called like the model."""

    def __init__(self, path: Path, accuracy_level: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return one tensor, or a tuple."""
        names = [each.name for each in self.session.get_inputs()]
        given = {name: value for name, value in kwargs.items() if name in names}
        others = tensors_of((args, {name: value for name, value in kwargs.items() if name not in given}))
        given |= dict(zip([name for name in names if name not in given], others, strict=True))
        outputs = self.session.run(None, {name: tensor.detach().cpu().numpy() for name, tensor in given.items()})
        tensors = tuple(torch.from_numpy(output) for output in outputs)
        return tensors[0] if len(tensors) == 1 else tensors


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from telling that torchvision is not installed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
