"""What an export proved: sizes, and how far the outputs of the artifact are from the trained model's."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_qat.export.files import move, remove


def report_path(path: Path) -> Path:
    """Return where the report of an artifact lies."""
    return path.with_name(path.name + ".report.json")


@final
@dataclass(frozen=True)
class ExportReport:
    """The result of an export. Its weights equal the trained ones bit for bit, or there would be an error instead.

    Args:
        path: the artifact.
        format: name of the format.
        num_bytes: size on disk.
        float_bytes: size of the same tensors in the dtype of the model.
        exact: whether the outputs on all batches are equal bit for bit, too; without batches, the weights alone.
        num_batches: number of batches that were compared.
        max_abs: largest absolute difference of outputs; None without batches.
        sqnr: signal to noise ratio of outputs in decibels, infinite where exact; None without batches.
        agreement: share of positions with the same largest output (top-1), in [0, 1]; None without batches.
        checksums: SHA-256 of each file by name, of a single file under ``.``; see :func:`lightning_qat.export.check`.
    """

    path: Path
    format: str
    num_bytes: int
    float_bytes: int
    exact: bool
    num_batches: int = 0
    max_abs: float | None = None
    sqnr: float | None = None
    agreement: float | None = None
    checksums: Mapping[str, str] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; an infinite ratio becomes None."""
        finite = {key: None if value == math.inf else value for key, value in asdict(self).items()}
        return finite | {"path": self.path.name}

    def save(self) -> Path:
        """Write the report beside the artifact, as ``<artifact>.report.json``, and return its path."""
        path = report_path(self.path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            move(temporary, path)
        finally:
            remove(temporary)
        return path

    def __str__(self) -> str:
        """Return a short table."""
        rows = [
            ("artifact", str(self.path)),
            ("format", self.format),
            ("size", f"{self.num_bytes:,} bytes ({self._ratio()} than float)"),
            ("weights", "equal to the trained ones bit for bit"),
            ("outputs", self._outputs()),
        ]
        return "\n".join(f"{name:<9} {text}" for name, text in rows)

    def _ratio(self) -> str:
        """The text of a traced graph can outweigh the weights of a small model."""
        if self.num_bytes > self.float_bytes:
            return f"{self.num_bytes / max(1, self.float_bytes):.1f} x larger"
        return f"{self.float_bytes / max(1, self.num_bytes):.1f} x smaller"

    def _outputs(self) -> str:
        if not self.num_batches:
            return "not compared: no batches were given"
        over = f"on {self.num_batches} batch{'es' if self.num_batches > 1 else ''}"
        if self.exact:
            return f"equal bit for bit {over}"
        top = "" if self.agreement is None else f", top-1 agreement {self.agreement:.2%}"
        return f"max abs {self.max_abs:.3g}, SQNR {self.sqnr:.1f} dB{top} {over}"


@final
@dataclass
class Comparison:
    """Accumulates the difference between two streams of outputs."""

    num_batches: int = 0
    is_equal: bool = True
    max_abs: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    agreeing: int = 0
    positions: int = 0

    def update(self, expected: Any, actual: Any) -> None:
        """Add the outputs for one batch: tensors, or any nesting of them.

        Raises:
            ValueError: outputs of different number or shape, or none at all.
        """
        pairs = list(zip(tensors_of(expected), tensors_of(actual), strict=True))
        if not pairs:
            raise ValueError(
                f"outputs ({type(expected).__name__}) hold no tensors to compare; give a forward=function(model, "
                "batch) that returns tensors"
            )
        for index, (want, got) in enumerate(pairs):
            if want.shape != got.shape:
                raise ValueError(f"output {index} has shape {tuple(got.shape)} instead of {tuple(want.shape)}")
            self._add(want, got)
        if pairs and pairs[0][0].dim() > 1 and pairs[0][0].is_floating_point():
            axis = -1 if pairs[0][0].dim() == 3 else 1  # [batch, time, classes], else [batch, classes, ...]
            same = pairs[0][0].argmax(axis) == pairs[0][1].argmax(axis)
            self.agreeing += int(same.sum())
            self.positions += same.numel()
        self.num_batches += 1

    def _add(self, want: Tensor, got: Tensor) -> None:
        wide, other = _as_double(want), _as_double(got)
        same = (wide == other) | (wide.isnan() & other.isnan())  # masks hold -inf, whose difference to itself is NaN
        difference = torch.where(same, 0.0, (wide - other).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
        self.is_equal = self.is_equal and want.dtype == got.dtype and bool(same.all())
        self.max_abs = max(self.max_abs, float(difference.max()) if difference.numel() else 0.0)
        self.signal += float(wide[wide.isfinite()].square().sum())
        self.noise += float(difference.square().sum())

    @property
    def sqnr(self) -> float:
        """Signal to noise ratio in decibels."""
        if self.noise == 0:
            return math.inf
        ratio = self.signal / self.noise
        return 10 * math.log10(ratio) if ratio > 0 else -math.inf

    @property
    def agreement(self) -> float | None:
        """Share of positions with the same largest output."""
        return self.agreeing / self.positions if self.positions else None


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors in an output of any nesting, in order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _as_double(value: Tensor) -> Tensor:
    """Return the numbers in float64; complex ones as pairs."""
    value = value.detach().cpu()
    return (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).double()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode without gradients; training flags and random numbers are restored."""
    training = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def path_size(path: Path) -> int:
    """Return the size in bytes of a file, or of all files of a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
