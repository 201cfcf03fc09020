"""torch.export: the model's graph with integer weights, as a ``.pt2`` file that runs without the model's code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_qat.export.archive import check_archive, has_plain_archives
from lightning_qat.export.backend import Backend, Run, register
from lightning_qat.export.compressed import compress, example_arguments, parts_of, rebuilt, standing_in
from lightning_qat.export.errors import reading
from lightning_qat.export.report import tensors_of
from lightning_qat.export.source import Source


@final
@register
@dataclass(frozen=True)
class Pt2(Backend):
    """The traced graph; weights lie in it as int8 codes and scales that the graph dequantizes: one byte per weight.

    Outputs are equal bit for bit, except where the traced graph cannot hold a fused kernel that the eager model uses
    (the fast path of ``nn.TransformerEncoderLayer``).

    Args:
        dynamic_dims: dimensions of every input tensor that may vary from call to call; others keep the size that they
            have in the first batch. A size of 1 in the first batch stays 1.
    """

    name: ClassVar[str] = "pt2"
    suffix: ClassVar[str] = ".pt2"
    least_sqnr: ClassVar[float] = 35.0  # a code of a quantized input may flip where a fused kernel rounded otherwise

    dynamic_dims: tuple[int, ...] = (0,)

    @override
    def refusal(self, source: Source) -> str | None:
        return None

    @override
    def write(self, source: Source, path: Path) -> None:
        program = trace(compress(source), source, self.dynamic_dims)
        program.example_inputs = None  # the one thing that torch would pickle
        torch.export.save(program, path)

    @override
    def read(self, path: Path, source: Source) -> tuple[Mapping[str, Tensor], Run]:
        with reading(path, "a torch.export program"):
            if has_plain_archives():
                check_archive(path)
            program = torch.export.load(path)
            weights, stand = weights_in(program, source), standing_in(source.model, program.module())
        return weights, lambda batch: source.forward(stand, batch)


def weights_in(program: torch.export.ExportedProgram, source: Source) -> dict[str, Tensor]:
    """Return the dequantized weights of a program by name.

    Args:
        program: of :func:`trace`, whose ``state_dict`` holds codes and scales.
        source: names the weights and describes their integers.
    """
    state = program.state_dict
    return {
        name: rebuilt(weight, {part: state[f"{name}_{part}"] for part in parts_of(weight)}).dequantize()
        for name, weight in source.weights.items()
    }


def trace(model: nn.Module, source: Source, dynamic_dims: Sequence[int]) -> torch.export.ExportedProgram:
    """Return the program of a model for the arguments that the first batch gives.

    Args:
        model: of the source, possibly compressed.
        source: gives the batch.
        dynamic_dims: dimensions of the input tensors that may vary.

    Raises:
        ValueError: no batches to trace with.
    """
    args, kwargs = example_arguments(source)
    shapes: Any = torch.export.ShapesCollection()
    for tensor in tensors_of((args, kwargs)):
        shapes[tensor] = {dim: torch.export.Dim.AUTO for dim in dynamic_dims if dim < tensor.dim()}
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    for graph in program.graph_module.modules():
        for node in getattr(getattr(graph, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # it names folders of this machine and can outweigh the weights
    return program
