"""Export: what was trained is what is deployed, proven on the user's own model.

``export(model, path, format=...)`` writes a prepared or baked model, reads the file back, compares its weights with the
trained ones bit for bit and its outputs on real batches, and returns an :class:`ExportReport`. ``load(path)`` reads the
format ``safetensors`` into ``{name: QuantizedTensor or Tensor}``; ``load(path, model)`` fills a freshly built module.
``check(path)`` says of a file of any format whether it is still the one that was proven.
"""

from lightning_qat.export.aotinductor import AotInductor
from lightning_qat.export.api import check, export
from lightning_qat.export.backend import Backend, Run, formats, register
from lightning_qat.export.compressed_tensors import CompressedTensors
from lightning_qat.export.errors import DamagedFileError, MissingCompilerError, RefusedError, VerificationError
from lightning_qat.export.gguf import Gguf
from lightning_qat.export.onnx import Onnx
from lightning_qat.export.pt2 import Pt2
from lightning_qat.export.report import ExportReport
from lightning_qat.export.safetensors import Safetensors, describe, load
from lightning_qat.export.source import Source, read_source
from lightning_qat.export.torchao import Torchao

__all__ = [
    "AotInductor",
    "Backend",
    "CompressedTensors",
    "DamagedFileError",
    "ExportReport",
    "Gguf",
    "MissingCompilerError",
    "Onnx",
    "Pt2",
    "RefusedError",
    "Run",
    "Safetensors",
    "Source",
    "Torchao",
    "VerificationError",
    "check",
    "describe",
    "export",
    "formats",
    "load",
    "read_source",
    "register",
]
