"""export(): write, read back, compare, and only then give the file its name. check(): whether it is still that file."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.export.backend import Backend, Run, backend_for, check_name
from lightning_qat.export.errors import DamagedFileError, RefusedError, VerificationError
from lightning_qat.export.files import checksums, move, place_problem, remove
from lightning_qat.export.report import Comparison, ExportReport, evaluating, path_size, report_path
from lightning_qat.export.source import Forward, Source, read_source


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str = "safetensors",
    batches: Iterable[Any] | None = None,
    forward: Forward | None = None,
    **options: Any,
) -> ExportReport:
    """Write a trained model in a format and prove that the file holds it.

    Weights read back from the file must equal the trained fake-quantized ones bit for bit. Outputs of the artifact are
    compared with the trained model's on ``batches``; the result is in the report and, as JSON, in
    ``<path>.report.json``. A difference beyond what the format promises is an error. Until all is proven the file has
    a temporary name, so that no half-written one stays and an older one is replaced at once or not at all.

    Args:
        model: prepared or baked; it stays as it is.
        path: file to write; its folder is made.
        format: one of :func:`~lightning_qat.export.formats`.
        batches: real inputs for the comparison of outputs. Formats that trace the model need one at least.
        forward: called with (model, batch); by default a dict is passed as keywords, and of a tuple the first element.
        options: fields of the back end.

    Returns:
        Sizes and measured differences.

    Raises:
        ValueError: an unknown format, a path that does not fit it, or a model that is neither prepared nor baked.
        TypeError: an unknown option, or batches that are one batch.
        ImportError: the format needs an extra.
        MissingCompilerError: the format needs a C++ compiler.
        RefusedError: the format cannot hold the trained numbers exactly.
        VerificationError: the written file holds other numbers.
    """
    backend, path = backend_for(format, options), Path(path)
    check_name(path, backend)
    problem = place_problem(path, backend.name, backend.suffix, backend.files)
    if problem:
        raise ValueError(f"export: {problem}")
    source = read_source(model, batches, forward)
    refusal = backend.refusal(source)
    if refusal:
        raise RefusedError(f"format={format!r}: {refusal}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{backend.suffix}")
    try:
        backend.write(source, temporary)
        comparison = _verify(backend, source, model, temporary)
        report = _report(path, temporary, backend, source, comparison)
        move(temporary, path)
        report.save()
    finally:
        remove(temporary)
    return report


def check(path: str | Path) -> dict[str, Any]:
    """Compare an artifact of any format with the checksums that its export stored in ``<path>.report.json``.

    Most formats have no checksum of their own, so that their readers would compute with damaged numbers.

    Args:
        path: the file or folder. Files that were put into the folder later are no concern.

    Returns:
        What the report says, see :class:`ExportReport`.

    Raises:
        FileNotFoundError: no artifact, or no report beside it.
        DamagedFileError: another file than the one that was proven, or a damaged report.
    """
    path = Path(path)
    for needed in (path, report_path(path)):
        if not needed.exists():
            raise FileNotFoundError(f"check: path={str(needed)!r} does not exist")
    try:
        report: dict[str, Any] = json.loads(report_path(path).read_text(encoding="utf-8"))
        proven = dict(report["checksums"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFileError(f"{report_path(path)}: no report of an export ({error!r})") from error
    found = checksums(path)
    changed = [name for name in proven if found.get(name) != proven[name]]
    if changed or not proven:
        names = ", ".join(str(path / name) for name in changed) or path
        raise DamagedFileError(f"{names}: damaged or changed after the export; export the checkpoint again")
    return report


def _verify(backend: Backend, source: Source, trained: nn.Module, path: Path) -> Comparison:
    weights, run = backend.read(path, source)
    state = source.model.state_dict()
    missing = [name for name in source.weights if name not in weights]
    if missing:
        raise VerificationError(f"{', '.join(missing[:5])}: missing in the file that format={backend.name!r} wrote")
    for name, value in weights.items():
        if not is_same(value.cpu(), state[name].cpu()):
            raise VerificationError(f"{name}: read back from format={backend.name!r}, it differs from the trained one")
    comparison = Comparison()
    for batch in source.batches:
        with evaluating(trained):
            expected = source.forward(trained, batch)
        _compare(comparison, expected, run, batch, backend)
    if not comparison.sqnr >= backend.least_sqnr:
        raise VerificationError(
            f"format={backend.name!r}: outputs of the artifact are {comparison.sqnr:.1f} dB from the trained model's "
            f"(max abs {comparison.max_abs:.3g}); at least {backend.least_sqnr:g} dB are required"
        )
    return comparison


def is_same(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal in dtype, shape and every value; NaN equals itself, 0 equals -0."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    return bool(((actual == expected) | ((actual != actual) & (expected != expected))).all())


def _compare(comparison: Comparison, expected: Any, run: Run, batch: Any, backend: Backend) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        try:
            actual = run(batch)
        except Exception as error:  # of a foreign runtime
            raise VerificationError(
                f"format={backend.name!r}: the artifact does not run on batch {comparison.num_batches} ({error})"
            ) from error
    try:
        comparison.update(expected, actual)
    except ValueError as error:
        raise VerificationError(f"format={backend.name!r}: {error}") from error


def _report(path: Path, written: Path, backend: Backend, source: Source, comparison: Comparison) -> ExportReport:
    compared = comparison.num_batches > 0
    return ExportReport(
        path=path,
        format=backend.name,
        num_bytes=path_size(written),
        float_bytes=source.float_bytes,
        exact=comparison.is_equal,
        num_batches=comparison.num_batches,
        max_abs=comparison.max_abs if compared else None,
        sqnr=comparison.sqnr if compared else None,
        agreement=comparison.agreement if compared else None,
        checksums=checksums(written),
    )
