"""Composes jobs without Hydra's launcher, and leaves Hydra as it was."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

Compose = Callable[..., DictConfig]


@pytest.fixture
def compose_job(tmp_path: Path) -> Compose:
    """`compose_job("recipe=int8")`: the configuration of the main job, its results below tmp_path."""

    def composed(*overrides: str, folder: str = "run") -> DictConfig:
        with initialize_config_module("lightning_qat.conf", version_base="1.3"):
            return compose("train", [f"output_dir={tmp_path / folder}", "trainer=cpu", *overrides])

    GlobalHydra.instance().clear()
    return composed
