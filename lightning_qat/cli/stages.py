"""The stages of the main job: float training, post-training quantization, quantized training, baking."""

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final, final

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_qat.cli.build import (
    FLOAT,
    QAT,
    Stage,
    build,
    build_callbacks,
    build_evaluator,
    build_stage,
    stage_config,
)
from lightning_qat.cli.checks import check_values
from lightning_qat.cli.float_cache import float_key, write_atomically
from lightning_qat.cli.results import Measurement, num_bytes, test_metrics
from lightning_qat.conversion import ConversionReport, bake, calibrate, load_checkpoint, prepare
from lightning_qat.conversion.calibrate import default_forward
from lightning_qat.conversion.prepare import convert
from lightning_qat.export.backend import backend_for

CALIBRATION_BATCHES: Final = 8


@final
class OutputDigest:
    """A digest of what a model returns, call for call.

    Attributes:
        sha: over dtype, shape and bytes of all tensors.
        num_calls: how often the model, or a part of it outside the model's own forward, was called.
    """

    def __init__(self) -> None:
        self.sha = hashlib.sha256()
        self.num_calls = 0
        self._depth = 0

    def enter(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook."""
        self._depth += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: adds the tensors of an outermost call."""
        self._depth -= 1
        if self._depth:
            return
        self.num_calls += 1
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.sha.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
                self.sha.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


@contextmanager
def recorded_outputs(model: nn.Module) -> Iterator[OutputDigest]:
    """Digest the outputs of a model inside the context, also where its parts are called without it.

    Args:
        model: the model; its direct children are watched, too, since a ``test_step`` may call only them.
    """
    digest = OutputDigest()
    hooks = []
    for module in (model, *model.children()):
        hooks += [module.register_forward_pre_hook(digest.enter), module.register_forward_hook(digest.leave)]
    try:
        yield digest
    finally:
        for hook in hooks:
            hook.remove()


def check_early(cfg: DictConfig) -> None:
    """Raise what would otherwise come up only after the float training: recipes, callbacks, formats that do not fit.

    Args:
        cfg: of the job.

    Raises:
        InstantiationException: a callback objects to its arguments.
        ValueError: a value that is not allowed, a recipe that does not fit the model, no such format of export.
    """
    check_values(cfg)
    backend_for(cfg.export.format, export_options(cfg))
    build_callbacks(stage_config(cfg, QAT))
    convert(build(cfg.model), build(cfg.recipe))


def export_options(cfg: DictConfig) -> dict[str, Any]:
    """Return the options of the format."""
    return {str(name): value for name, value in cfg.export.items() if name != "format"}


def train_float(cfg: DictConfig, cache: Path | None = None) -> Stage:
    """Return the stage with the model trained in float, or with its weights from a checkpoint or the cache.

    Args:
        cfg: of the job. ``float.checkpoint`` takes the place of training.
        cache: folder of float weights that the jobs of a sweep share, or None.
    """
    stage_cfg = stage_config(cfg, FLOAT)
    stage = build_stage(stage_cfg)
    cached = None if cache is None else cache / f"{float_key(stage_cfg)}.ckpt"
    source = cfg.float.checkpoint or (cached if cached is not None and cached.exists() else None)
    if source is not None:
        load_checkpoint(stage.model, source)
        return stage
    stage.trainer.fit(stage.model, datamodule=stage.data)
    if cached is not None:
        write_atomically(cached, lambda path: torch.save(stage.model.state_dict(), path))
    return stage


def quantize_after_training(cfg: DictConfig, trained: L.LightningModule) -> tuple[L.LightningModule, ConversionReport]:
    """Return a prepared and calibrated copy of the float model, and what became of its weights.

    Args:
        cfg: of the job.
        trained: the float model; it stays as it is.
    """
    stage_cfg = stage_config(cfg, QAT)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    model = copy.deepcopy(trained)
    report = prepare(model, build(cfg.recipe))
    data = build(stage_cfg.data)
    data.prepare_data()
    data.setup("fit")
    batches = islice(data.train_dataloader(), CALIBRATION_BATCHES)
    calibrate(model, batches, run_batch)
    return model, report


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Run a module on a batch as prediction does, or, without a ``predict_step`` of its own, on the batch's input."""
    if isinstance(model, L.LightningModule) and is_overridden("predict_step", model):
        return model.predict_step(batch, 0)
    return default_forward(model, batch)


def train_quantized(cfg: DictConfig, float_state: Mapping[str, Tensor]) -> Stage:
    """Return the stage with the model trained quantized, from the float weights.

    Args:
        cfg: of the job. ``qat.checkpoint`` resumes from there.
        float_state: the ``state_dict`` of the float model.
    """
    stage = build_stage(stage_config(cfg, QAT))
    stage.model.load_state_dict(float_state)
    stage.trainer.fit(stage.model, datamodule=stage.data, ckpt_path=cfg.qat.checkpoint)
    return stage


def evaluate(trainer: L.Trainer, model: L.LightningModule, data: L.LightningDataModule) -> dict[str, float]:
    """Return the test metrics of a model as it is.

    Args:
        trainer: runs the test.
        model: float, prepared or baked.
        data: its test loader is used.
    """
    logged = trainer.test(model, datamodule=data, verbose=False)
    return test_metrics({name: value for loader in logged for name, value in loader.items()})


def measured(metrics: Mapping[str, float], model: nn.Module, num_weights: int) -> Measurement:
    """Return the measurement of a float or baked model.

    Args:
        metrics: of the test.
        model: float or baked.
        num_weights: number of parameters of the float model.
    """
    size = num_bytes(model)
    return Measurement(metrics, size, 8 * size / num_weights)


def bake_and_compare(cfg: DictConfig, stage: Stage) -> tuple[L.LightningModule, dict[str, float]]:
    """Test the trained model and its baked copy, and return the copy and the metrics of both, which are the same.

    Compared are the metrics and every output of the model during the test, bit for bit.

    Args:
        cfg: of the job.
        stage: after quantized training.

    Raises:
        RuntimeError: if anything differs.
    """
    baked = bake(stage.model)
    with recorded_outputs(stage.model) as trained:
        metrics = evaluate(stage.trainer, stage.model, stage.data)
    with recorded_outputs(baked) as plain:
        again = evaluate(build_evaluator(stage_config(cfg, QAT)), baked, stage.data)
    if trained.sha.digest() != plain.sha.digest() or again != metrics:
        raise RuntimeError(
            f"the baked model does not reproduce the trained one over {trained.num_calls} calls: trained {metrics}, "
            f"baked {again}; please report this with the configuration"
        )
    return baked, metrics
