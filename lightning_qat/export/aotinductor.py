"""AOTInductor: a ``.pt2`` package with the model as compiled native code, and the traced program that it came from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_qat.export.archive import check_archive
from lightning_qat.export.backend import Backend, Run, register
from lightning_qat.export.compressed import compress, standing_in
from lightning_qat.export.errors import MissingCompilerError, reading
from lightning_qat.export.pt2 import trace, weights_in
from lightning_qat.export.source import Source

MODEL: Final = "model"
"""The name under which torch's own loaders look for the program and for the compiled model."""


@final
@register
@dataclass(frozen=True)
class AotInductor(Backend):
    """The traced graph, compiled; it dequantizes int8 codes as the graph of the format ``pt2`` does, in fused loops.

    The program lies in the same archive: the weights are read from it, ``torch.export.load(path)`` returns it, and
    ``torch._inductor.aoti_load_package(path)`` returns the compiled model, which holds codes and scales of its own.
    Compiling takes a C++ compiler and about a minute. The result runs on the device and kind of processor of the model.

    Args:
        dynamic_dims: dimensions of every input tensor that may vary from call to call; others keep the size that they
            have in the first batch. A size of 1 in the first batch stays 1.
    """

    name: ClassVar[str] = "aotinductor"
    suffix: ClassVar[str] = ".pt2"
    least_sqnr: ClassVar[float] = 35.0  # a code of a quantized input may flip where fused loops round otherwise

    dynamic_dims: tuple[int, ...] = (0,)

    @override
    def refusal(self, source: Source) -> str | None:
        return None

    @override
    def write(self, source: Source, path: Path) -> None:
        need_compiler()
        program = trace(compress(source), source, self.dynamic_dims)
        files = compiled(program)
        program.example_inputs = None  # the one thing that torch would pickle
        _archive().package_pt2(path, exported_programs={MODEL: program}, aoti_files={MODEL: files})

    @override
    def read(self, path: Path, source: Source) -> tuple[Mapping[str, Tensor], Run]:
        archive = _archive()
        with reading(path, "a package of AOTInductor with its program"):
            check_archive(path)
            contents = archive.load_pt2(path)
            program, runner = contents.exported_programs[MODEL], contents.aoti_runners[MODEL]
            weights, stand = weights_in(program, source), standing_in(source.model, runner)
        return weights, lambda batch: source.forward(stand, batch)


def need_compiler() -> None:
    """Look for the C++ compiler that AOTInductor calls.

    Raises:
        MissingCompilerError: there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise MissingCompilerError(
            "export: format='aotinductor' needs a C++ compiler, and none was found; install g++ (such as: apt install "
            "g++, or conda install gxx) or set the environment variable CXX to one; format='pt2' needs none"
        ) from error


def compiled(program: torch.export.ExportedProgram) -> Any:
    """Return the files that AOTInductor makes of a program, for the package.

    Args:
        program: with the example inputs that it was traced with; stays as it is.
    """
    from torch._inductor import aot_compile

    module: Any = program.module()
    args, kwargs = program.example_inputs
    return aot_compile(module, args, kwargs, options={"aot_inductor.package": True})


def _archive() -> Any:
    try:
        from torch.export.pt2_archive import _package  # torch documents package_pt2 and load_pt2 under this name alone
    except ImportError as error:
        raise ImportError(
            f"export: format='aotinductor' needs torch 2.8 or newer, here is {torch.__version__} ({error}); "
            "install it, or choose format='pt2'"
        ) from error
    return _package
