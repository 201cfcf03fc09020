"""From a configuration to objects: one stage of the job, built anew from its nodes."""

import copy
from dataclasses import dataclass
from typing import Any, Final, final

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

FLOAT: Final = "float"
QAT: Final = "qat"


@final
@dataclass(frozen=True)
class Stage:
    """What a training needs.

    Args:
        data: the data.
        model: freshly initialized, in float.
        trainer: with its callbacks and loggers.
    """

    data: L.LightningDataModule
    model: L.LightningModule
    trainer: L.Trainer


def build(node: Any, **arguments: Any) -> Any:
    """Instantiate a node. The only place that does, since frozen values need plain lists and dictionaries.

    Args:
        node: with ``_target_``, or a dictionary of such nodes.
        arguments: more arguments of the target, not converted.
    """
    return instantiate(node, _convert_="all", **arguments)


def stage_config(cfg: DictConfig, name: str) -> DictConfig:
    """Return the configuration of a stage: a copy in which ``cfg[name].model`` and ``.trainer`` change these nodes.

    The float stage keeps the callbacks that ``cfg.float.callbacks`` names.

    Args:
        cfg: of the whole job.
        name: ``"float"`` or ``"qat"``.

    Raises:
        ValueError: a name in ``float.callbacks`` that ``callbacks`` lacks.
    """
    changed = copy.deepcopy(cfg)
    changed.stage = name
    with open_dict(changed):
        for node in ("model", "trainer"):
            changed[node] = OmegaConf.merge(changed[node], cfg[name][node])
        if name == FLOAT:
            present = changed.get("callbacks") or {}
            unknown = [key for key in cfg.float.callbacks if key not in present]
            if unknown:
                raise ValueError(
                    f"float.callbacks={list(cfg.float.callbacks)}: {unknown[0]!r} is not in callbacks; "
                    f"choose from {sorted(map(str, present))}"
                )
            changed.callbacks = {key: present[key] for key in cfg.float.callbacks}
    return changed


def build_stage(cfg: DictConfig) -> Stage:
    """Seed everything and build a stage, so that its numbers do not depend on what ran before it.

    Args:
        cfg: of the stage, see `stage_config`.
    """
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    return Stage(
        data=build(cfg.data),
        model=build(cfg.model),
        trainer=build(cfg.trainer, callbacks=build_callbacks(cfg), logger=_values(cfg.get("logger")) or False),
    )


def build_callbacks(cfg: DictConfig) -> list[L.Callback]:
    """Return the callbacks of a stage, freshly built.

    Args:
        cfg: of the stage.
    """
    return _values(cfg.get("callbacks"))


def build_evaluator(cfg: DictConfig) -> L.Trainer:
    """Return a trainer for evaluation alone: no callbacks but the progress bar, nothing logged.

    Args:
        cfg: of a stage.
    """
    callbacks = {name: node for name, node in (cfg.get("callbacks") or {}).items() if name == "progress_bar"}
    trainer: L.Trainer = build(cfg.trainer, callbacks=_values(callbacks), logger=False, enable_checkpointing=False)
    return trainer


def _values(nodes: Any) -> list[Any]:
    """Instantiate the nodes of a dictionary, those removed by ``name: null`` left out."""
    return [build(node) for node in (nodes or {}).values() if node is not None]
