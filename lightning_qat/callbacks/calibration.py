"""Calibration: stored scales of inputs from data, at fit start."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import load_file, save_file
from torch import nn
from typing_extensions import override

from lightning_qat.callbacks.attachment import averaged_models
from lightning_qat.callbacks.batches import (
    check_loaders,
    describe_shares,
    flattened,
    named_loaders,
    num_samples,
    prepared_batches,
)
from lightning_qat.callbacks.running import Forward, call_module, find_forward
from lightning_qat.callbacks.untouched import without_trace
from lightning_qat.conversion.calibrate import (
    calibration_state,
    find_input_scales,
    load_calibration_state,
    stored_inputs,
    uncalibrated,
)
from lightning_qat.conversion.undisturbed import undisturbed_loaders
from lightning_qat.quantization.quantizer import FakeQuantizer

_FORMAT: Final = "lightning_qat.calibration"
_VERSION: Final = 1


@final
class Calibration(pl.Callback):
    """Sets the stored scales of inputs from data at fit start; skipped where they are known, as on resume.

    The model runs in evaluation mode on batches that pass the module's own preprocessing. Afterwards random number
    generators (those of loader, sampler and data set included), BatchNorm statistics, metrics and the order of the
    data are as if nothing had happened, and nothing was logged. All processes of a distributed run end with equal
    scales, found from the data of all.

    Args:
        num_batches: batches per process and domain, positive.
        dataloader: where they come from, by default the training data; several domains as a dict of dataloaders by
            name, read in turn. Training data that can be read only once needs a dataloader of its own here.
        forward: called with (module, batch). By default ``predict_step`` if the module has one that takes training
            batches, else the module itself: with the entries of a dict that its ``forward`` names, or with as many
            elements of a tuple as it requires.
        path: safetensors file to write what was found to, with a JSON file beside it; a relative one in the trainer's
            ``default_root_dir``. Nothing is written by ``fast_dev_run``. See :meth:`save`.
        artifact: such a file of an earlier calibration: the scales are taken from there and no data is looked at.

    Attributes:
        samples: how many samples each domain gave in the last calibration, over all processes.

    Raises:
        TypeError: dataloaders that cannot be iterated.
        ValueError: ``num_batches`` below 1, no dataloader in a dict; at fit start: data that can be read only once, a
            model that cannot be run on the batches, layers that no data reached, an artifact of another model.
        FileNotFoundError: at fit start: no such artifact.
    """

    calibrates: ClassVar[bool] = True

    def __init__(
        self,
        num_batches: int = 8,
        dataloader: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
        *,
        forward: Forward | None = None,
        path: str | Path | None = None,
        artifact: str | Path | None = None,
    ) -> None:
        if not isinstance(num_batches, int) or num_batches < 1:
            raise ValueError(f"Calibration: num_batches={num_batches!r} is not allowed; choose a positive integer")
        check_loaders(dataloader, "Calibration")
        self.num_batches = num_batches
        self.dataloader = dataloader
        self.forward = forward
        self.path = None if path is None else Path(path)
        self.artifact = None if artifact is None else Path(artifact)
        self.samples: dict[str, int] = {}

    def __repr__(self) -> str:
        """Return an expression that evaluates back where no dataloader or function is held."""
        loader = "" if self.dataloader is None else f", dataloader={self.dataloader!r}"
        forward = "" if self.forward is None else f", forward={self.forward!r}"
        files = {"path": self.path, "artifact": self.artifact}
        paths = "".join(f", {name}={str(path)!r}" for name, path in files.items() if path is not None)
        return f"Calibration(num_batches={self.num_batches}{loader}{forward}{paths})"

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        restored_later = trainer.strategy.restore_checkpoint_after_setup and trainer.ckpt_path is not None
        if not restored_later:  # else the scales arrive with the checkpoint, after this hook
            self._calibrate(trainer, pl_module)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if uncalibrated(pl_module):
            self._calibrate(trainer, pl_module)

    def _calibrate(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        missing = uncalibrated(pl_module)
        if not missing:
            rank_zero_info("Calibration: nothing to calibrate, every scale is known or recomputed.")
            return
        if self.artifact is not None:
            self.load(pl_module, self.artifact)
            found = f"{len(missing)} input scales in {self.artifact}, once found from"
        else:
            self._find(trainer, pl_module, missing)
            found = f"found {len(missing)} input scales from"
        _tell_averages(trainer, pl_module)
        rank_zero_info(f"Calibration: {found} {describe_shares(self.samples)}.")
        if self.path is not None and trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            path = Path(trainer.default_root_dir) / self.path
            path.parent.mkdir(parents=True, exist_ok=True)
            self.save(pl_module, path)

    def _find(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", missing: dict[str, FakeQuantizer]) -> None:
        with without_trace(pl_module):
            loaders = named_loaders(trainer, self.dataloader, "Calibration")
            with undisturbed_loaders(flattened(loaders.values())), trainer.precision_plugin.forward_context():
                run, batches = self._runner(pl_module, self._batches(trainer, pl_module, loaders))
                find_input_scales(pl_module, missing, batches, run)
        self.samples = _summed(trainer, self.samples)

    def _batches(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loaders: dict[str, Any]
    ) -> Iterator[Any]:
        """Yield this process's share of the batches of all domains, and count their samples."""
        self.samples = dict.fromkeys(loaders, 0)
        for name, batch in prepared_batches(trainer, pl_module, loaders, self.num_batches):
            self.samples[name] += num_samples(batch)
            yield batch

    def _runner(self, pl_module: "pl.LightningModule", batches: Iterator[Any]) -> tuple[Forward, Iterator[Any]]:
        """Return what runs the model on a batch, found out on the first one, and all batches."""
        if self.forward is not None:
            return self.forward, batches
        first = list(itertools.islice(batches, 1))
        run = find_forward(pl_module, first[0]) if first else call_module
        return run, itertools.chain(first, batches)

    def save(self, pl_module: nn.Module, path: str | Path) -> None:
        """Write the scales of inputs to a safetensors file, and beside it a JSON file that says what they are.

        The JSON file names the quantizer of each input, and how many samples of which domain the scales are from, with
        their shares.
        """
        path = Path(path)
        total = max(1, sum(self.samples.values()))
        description = {
            "format": _FORMAT,
            "version": _VERSION,
            "inputs": _labels(pl_module),
            "domains": {name: {"samples": n, "share": n / total} for name, n in self.samples.items()},
        }
        save_file(calibration_state(pl_module), str(path), {"format": _FORMAT, "version": str(_VERSION)})
        path.with_suffix(".json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    def load(self, pl_module: nn.Module, path: str | Path) -> None:
        """Set the scales of inputs from a file that :meth:`save` wrote, bit for bit; calibration is then skipped.

        Raises:
            FileNotFoundError: no such file, or not the JSON file beside it.
            ValueError: if the files are of another model, or of inputs that are quantized in another way.
        """
        path = Path(path)
        for file in (path, path.with_suffix(".json")):
            if not file.is_file():
                raise FileNotFoundError(f"Calibration.load: path={str(file)!r} is not a file; save() writes one")
        described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if described.get("format") != _FORMAT or described.get("version") != _VERSION:
            raise ValueError(f"Calibration.load: {path.with_suffix('.json')} does not say {_FORMAT!r} {_VERSION}")
        state, present = load_file(str(path)), _labels(pl_module)
        for name, label in described["inputs"].items():
            if present.get(name, label) != label:
                raise ValueError(f"{name} is {present[name]}, but the scale in {path} was found for {label}")
        load_calibration_state(pl_module, state)
        self.samples = {name: int(domain["samples"]) for name, domain in described["domains"].items()}


def _labels(pl_module: nn.Module) -> dict[str, str]:
    return {name: quantizer.extra_repr() for name, quantizer in stored_inputs(pl_module).items()}


def _summed(trainer: "pl.Trainer", samples: dict[str, int]) -> dict[str, int]:
    if trainer.world_size < 2:
        return samples
    counts = torch.tensor(list(samples.values()), device=trainer.strategy.root_device)
    summed = trainer.strategy.reduce(counts, reduce_op="sum")
    return dict(zip(samples, map(int, summed), strict=True))


def _tell_averages(trainer: "pl.Trainer", pl_module: nn.Module) -> None:
    """Give averaged models the scales that were found: they were copied before, and average what is equal."""
    found = stored_inputs(pl_module)
    for _, averaged in averaged_models(trainer):
        for name, quantizer in stored_inputs(averaged).items():
            if quantizer.needs_calibration and name in found:
                quantizer.load_state_dict(found[name].state_dict())
