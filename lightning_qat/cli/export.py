"""`lightning-qat-export CHECKPOINT format=...`: a checkpoint of quantized training, exported and verified."""

import importlib.resources
import sys
from itertools import islice
from pathlib import Path
from typing import Any, Final

import lightning as L
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from lightning_qat.cli.build import build
from lightning_qat.cli.errors import nearest, one_message
from lightning_qat.cli.quiet import without_hints
from lightning_qat.cli.results import wide_console
from lightning_qat.cli.stages import run_batch
from lightning_qat.conversion import load_checkpoint
from lightning_qat.export import ExportReport, export, formats
from lightning_qat.export.backend import backend_for, check_name

USAGE: Final = """\
lightning-qat-export CHECKPOINT [format=FORMAT] [output=FILE] [options.NAME=VALUE ...] [model.NAME=VALUE ...]

Exports a model that was trained quantized, reads the file back, and compares it with the model.

CHECKPOINT is the output folder of a run, or a Lightning checkpoint that QATCallback took part in. The model and the
data come from the run's config.yaml. For a checkpoint of another program name the class of the model:

  lightning-qat-export outputs/2025-01-31/12-00-00 format=onnx
  lightning-qat-export epoch=3-step=80.ckpt model._target_=package.module.MyModel

Formats: {formats}
All values and their meaning: conf/export.yaml
"""

RUN_CONFIG: Final = "config.yaml"
_ARGUMENT_NODES: Final = ("model", "data", "options")


def checkpoint_of(path: Path) -> Path:
    """Return the checkpoint that a path stands for: itself, or that of the quantized training in a run's folder.

    Raises:
        ValueError: no such file, or a folder without the checkpoint.
    """
    found = path / "checkpoints" / "qat.ckpt" if path.is_dir() else path
    if not found.is_file():
        hint = "; the checkpoint comes first, then NAME=VALUE" if "=" in path.name and not path.suffix else ""
        raise ValueError(f"{path}: no checkpoint; expected a file, or a run's folder with checkpoints/qat.ckpt{hint}")
    return found


def run_config(checkpoint: Path) -> DictConfig:
    """Return the nodes ``model`` and ``data`` of the run that wrote a checkpoint; empty if there is no such run."""
    for folder in list(checkpoint.resolve().parents)[:3]:
        if (folder / RUN_CONFIG).is_file():
            found = OmegaConf.load(folder / RUN_CONFIG)
            if isinstance(found, DictConfig) and "model" in found:
                return OmegaConf.masked_copy(found, [name for name in ("model", "data") if name in found])
    return OmegaConf.create({})


def export_config(checkpoint: Path, overrides: list[str]) -> DictConfig:
    """Return conf/export.yaml with what the run's configuration and the command line say.

    Args:
        checkpoint: the file.
        overrides: in Hydra's grammar, such as ``format=onnx`` and ``model.hidden_size=64``.

    Raises:
        ValueError: a key that does not exist; the message lists those that do and the nearest. A value out of range.
    """
    dashed = next((each for each in overrides if each.startswith("-")), None)
    if dashed is not None:
        raise ValueError(f"{dashed}: values are given without dashes, as NAME=VALUE, such as format=onnx")
    text = importlib.resources.files("lightning_qat.conf").joinpath("export.yaml").read_text(encoding="utf-8")
    cfg = OmegaConf.merge(OmegaConf.create(text), run_config(checkpoint))
    assert isinstance(cfg, DictConfig)  # noqa: S101
    known = [str(name) for name in cfg]
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        root, _, rest = key.partition(".")
        if root not in known or (rest and root not in _ARGUMENT_NODES):
            raise ValueError(f"{key}: no such key; choose from {', '.join(known)}.{nearest(root, known)}")
        if not rest and root in _ARGUMENT_NODES:
            raise ValueError(f"{key}: holds several values; set one of them, such as {root}._target_=...")
        OmegaConf.update(cfg, key, override.value(), force_add=True)
    if not isinstance(cfg.num_batches, int) or cfg.num_batches < 0:
        raise ValueError(f"num_batches={cfg.num_batches!r} is not allowed; choose 0 or more")
    return cfg


def load_trained(cfg: DictConfig, checkpoint: Path) -> L.LightningModule:
    """Return the quantized model of a checkpoint.

    Args:
        cfg: see `export_config`.
        checkpoint: the file.

    Raises:
        ValueError: the class of the model is not known, or the checkpoint holds no recipe.
    """
    saved = _read(checkpoint)
    node = dict(cfg.model)
    if "_target_" not in node:
        raise ValueError(
            f"{checkpoint}: there is no {RUN_CONFIG} of a run above it, so the class of the model is not known; add "
            "model._target_=package.module.Class and those of its arguments that it did not save as hyperparameters"
        )
    if not run_config(checkpoint):
        node = {**saved.get("hyper_parameters", {}), **node}
    model: L.LightningModule = load_checkpoint(build(node), checkpoint, quantized=True)
    return model


def _read(checkpoint: Path) -> dict[str, Any]:
    try:
        saved: Any = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes of another or damaged file make of a pickle
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{checkpoint}: cannot be read as a checkpoint: {type(error).__name__}: {reason}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{checkpoint}: cannot be read as a checkpoint: it holds a {type(saved).__name__}")
    return saved


def export_checkpoint(path: Path, overrides: list[str]) -> ExportReport:
    """Export a checkpoint.

    Args:
        path: a checkpoint, or the folder of a run.
        overrides: of conf/export.yaml, in Hydra's grammar.

    Raises:
        ValueError: an artifact that would take the place of the checkpoint, or has the ending of another format.
    """
    checkpoint = checkpoint_of(path)
    cfg = export_config(checkpoint, overrides)
    options: dict[str, Any] = dict(cfg.options)
    backend = backend_for(cfg.format, options)
    output = Path(str(cfg.output)) if cfg.output else checkpoint.with_name(f"{checkpoint.stem}{backend.suffix}")
    if output.resolve() == checkpoint.resolve():
        raise ValueError(f"{output}: is the checkpoint, which the artifact would replace; give output=ANOTHER_NAME")
    check_name(output, backend)
    model = load_trained(cfg, checkpoint)
    batches = _batches(cfg)
    return export(model, output, format=cfg.format, batches=batches, forward=run_batch, **options)


def _batches(cfg: DictConfig) -> list[Any]:
    if "_target_" not in cfg.data:
        return []
    data: L.LightningDataModule = build(cfg.data)
    data.prepare_data()
    data.setup("test")
    return list(islice(data.test_dataloader(), cfg.num_batches))


def main() -> None:
    """Run the console script ``lightning-qat-export``."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(formats=", ".join(formats())), end="")
        sys.exit(0 if arguments else 2)
    with one_message("lightning-qat-export"), without_hints():
        wide_console().print(str(export_checkpoint(Path(arguments[0]), arguments[1:])), highlight=False)


if __name__ == "__main__":
    main()
