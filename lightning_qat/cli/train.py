"""`lightning-qat`: a float model, its quantization after training, and training with quantization, compared."""

import time
from itertools import islice
from pathlib import Path
from typing import Any, Final

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_qat.cli.build import QAT, build_evaluator, stage_config
from lightning_qat.cli.errors import one_message
from lightning_qat.cli.plots import largest_weight, run_figure, save_figure, weight_view
from lightning_qat.cli.quiet import without_hints
from lightning_qat.cli.results import results_table, shown_metrics, wide_console, write_json
from lightning_qat.cli.stages import (
    bake_and_compare,
    check_early,
    evaluate,
    export_options,
    measured,
    quantize_after_training,
    run_batch,
    train_float,
    train_quantized,
)
from lightning_qat.conversion import bake
from lightning_qat.export import ExportReport, describe, export
from lightning_qat.export.backend import backend_for

FLOAT_CACHE: Final = "float"
"""Folder in a sweep's directory that holds the float weights its jobs share."""

_VERIFIED_BATCHES: Final = 2


def train(cfg: DictConfig, *, float_cache: Path | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the main job and leave its files in ``cfg.output_dir``.

    Files: ``metrics.json``, ``results.png``, ``layers.txt`` (what became of each weight), ``config.yaml`` (resolved),
    the exported ``model.*`` with its report (and ``model.json``, what the safetensors file says of itself),
    ``checkpoints/float.ckpt`` and ``qat.ckpt``, ``tensorboard/float`` and ``tensorboard/qat``.

    Args:
        cfg: composed from ``conf/train.yaml``, with an ``output_dir`` that needs no Hydra to resolve.
        float_cache: folder of float weights shared with other runs, see `lightning_qat.cli.float_cache`.

    Returns:
        What metrics.json holds, and the objects: ``float_model``, ``post_training_model``, ``model`` (trained
        quantized), ``baked``, ``trainer``, ``data``, ``report``, ``measurements``, ``export``.
    """
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    check_early(cfg)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    console, start = wide_console(), time.monotonic()
    with without_hints():
        objects = _run_stages(cfg, float_cache, console)
        objects["export"] = _export(cfg, objects, folder)
    measurements = objects["measurements"]
    metrics = {
        **_choices(cfg),
        **{key: measurement.to_dict() for key, measurement in measurements.items()},
        "baked_equals_trained": True,  # bake_and_compare raises otherwise
        "export": objects["export"].to_dict(),
        "seconds": round(time.monotonic() - start, 1),
    }
    _write_files(cfg, folder, objects, metrics)
    console.print(results_table(_title(metrics), measurements, cfg.report.metrics))
    _say_where(console, folder, objects["export"], metrics["seconds"])
    return metrics, objects


def _run_stages(cfg: DictConfig, float_cache: Path | None, console: Console) -> dict[str, Any]:
    console.print("[bold]1/4[/] float training")
    floats = train_float(cfg, float_cache)
    num_weights = sum(parameter.numel() for parameter in floats.model.parameters())
    metrics = evaluate(floats.trainer, floats.model, floats.data)
    measurements = {"float": measured(metrics, floats.model, num_weights)}
    console.print("[bold]2/4[/] post-training quantization")
    after, report = quantize_after_training(cfg, floats.model)
    metrics = evaluate(build_evaluator(stage_config(cfg, QAT)), after, floats.data)
    measurements["post_training"] = measured(metrics, bake(after), num_weights)
    console.print("[bold]3/4[/] quantization-aware training")
    stage = train_quantized(cfg, floats.model.state_dict())
    console.print("[bold]4/4[/] baking and export")
    baked, metrics = bake_and_compare(cfg, stage)
    measurements["qat"] = measured(metrics, baked, num_weights)
    return {
        "float_model": floats.model,
        "post_training_model": after,
        "model": stage.model,
        "baked": baked,
        "trainer": stage.trainer,
        "data": stage.data,
        "report": report,
        "measurements": measurements,
    }


def _export(cfg: DictConfig, objects: dict[str, Any], folder: Path) -> ExportReport:
    options = export_options(cfg)
    suffix = backend_for(cfg.export.format, options).suffix
    batches = islice(objects["data"].test_dataloader(), _VERIFIED_BATCHES)
    path = folder / f"model{suffix}"
    report = export(objects["model"], path, format=cfg.export.format, batches=batches, forward=run_batch, **options)
    if cfg.export.format == "safetensors":
        write_json(folder / "model.json", describe(path))
    return report


def _write_files(cfg: DictConfig, folder: Path, objects: dict[str, Any], metrics: dict[str, Any]) -> None:
    write_json(folder / "metrics.json", metrics)
    (folder / "layers.txt").write_text(f"{objects['report']}\n", encoding="utf-8")
    name = largest_weight(objects["model"])
    views = {key: weight_view(objects[model], name) for key, model in _PREPARED.items()}
    figure = run_figure(_title(metrics), objects["measurements"], cfg.report.metrics, (name, views))
    save_figure(figure, folder / "results.png")


_PREPARED: Final = {"post_training": "post_training_model", "qat": "model"}


def _choices(cfg: DictConfig) -> dict[str, Any]:
    """Return what was chosen, by name where Hydra knows the names, else by class or function."""
    groups = ("data", "model", "recipe")
    if HydraConfig.initialized():
        runtime = HydraConfig.get()
        names = {group: runtime.runtime.choices.get(group) for group in (*groups, "experiment")}
        overrides = list(runtime.overrides.task)
    else:
        names = {group: str(cfg[group]["_target_"]).rpartition(".")[2] for group in groups} | {"experiment": None}
        overrides = []
    return {**names, "seed": cfg.seed, "overrides": overrides}


def _title(metrics: dict[str, Any]) -> str:
    return f"{metrics['data']}, {metrics['recipe']}" if metrics["experiment"] is None else metrics["experiment"]


def _say_where(console: Console, folder: Path, report: ExportReport, seconds: float) -> None:
    console.print("The baked model reproduces the trained one bit for bit on all test data.")
    console.print(f"{report.path.name}: {report.num_bytes:,} bytes, weights read back bit for bit.")
    console.print(f"Results in [bold]{folder}[/] after {seconds:.0f} s: {', '.join(_entries(folder))}")


def _entries(folder: Path) -> list[str]:
    """Return what a run left, also what its callbacks wrote; a folder ends with a slash."""
    found = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name))
    return [path.name + "/" * path.is_dir() for path in found if not path.name.startswith(".")]


def _sweep_cache() -> Path | None:
    """Return where the jobs of a sweep keep the float weights they share, or None for a single run."""
    config = HydraConfig.get()
    return Path(config.sweep.dir) / FLOAT_CACHE if config.mode == RunMode.MULTIRUN else None


@hydra.main(config_path="pkg://lightning_qat.conf", config_name="train", version_base="1.3")
def _application(cfg: DictConfig) -> float:
    metrics, objects = train(cfg, float_cache=_sweep_cache())
    logged = objects["measurements"]["qat"].metrics
    value: float = metrics["qat"][shown_metrics(cfg.report.metrics, logged)[0]]
    return value  # what Hydra's sweepers optimize


def main() -> None:
    """Run the console script ``lightning-qat``."""
    with one_message("lightning-qat"):
        _application()


if __name__ == "__main__":
    main()
