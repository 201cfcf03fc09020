"""The configuration: keys are arguments, every recipe has a file, groups serve other applications."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

from lightning_qat import QATCallback, recipes
from lightning_qat.cli.build import build
from lightning_qat.data import DigitsData
from tests.cli.conftest import Compose

CONF = Path(__file__).parents[2] / "conf"
NODES = sorted(path for group in ("callbacks", "data", "logger", "model", "recipe", "trainer")
               for path in (CONF / group).glob("*.yaml"))  # fmt: skip


def targets(node: Any) -> list[dict[str, Any]]:
    """Every dictionary with a `_target_` in a tree."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    found = [target for child in children for target in targets(child)]
    return [node, *found] if isinstance(node, dict) and "_target_" in node else found


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.relative_to(CONF).as_posix())
def test_keys_are_constructor_arguments(path: Path) -> None:
    for node in targets(yaml.safe_load(path.read_text(encoding="utf-8"))):
        arguments = {name: value for name, value in node.items() if not name.startswith("_")}
        inspect.signature(get_object(node["_target_"])).bind_partial(**arguments)


@pytest.mark.parametrize("group", ["data", "model"])
def test_nodes_list_every_argument(group: str) -> None:
    for path in (CONF / group).glob("*.yaml"):
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
        arguments = inspect.signature(get_object(node["_target_"])).parameters
        assert set(node) - {"_target_"} == set(arguments), path.name


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_has_a_file(name: str, compose_job: Compose) -> None:
    assert build(compose_job(f"recipe={name}").recipe) == recipes.named(name)


def test_every_recipe_file_has_a_recipe() -> None:
    assert {path.stem for path in (CONF / "recipe").glob("*.yaml")} == {*recipes.names(), "custom"}


def test_arguments_of_a_recipe(compose_job: Compose) -> None:
    assert build(compose_job("recipe.group_size=32").recipe) == recipes.int4(group_size=32)


def test_data_brings_its_model(compose_job: Compose) -> None:
    assert compose_job("data=text").model._target_ == "lightning_qat.models.LanguageModel"
    assert compose_job("data=text", "model=digits").model._target_ == "lightning_qat.models.SequenceClassifier"
    assert compose_job("experiment=text_int2").model._target_ == "lightning_qat.models.LanguageModel"
    assert {path.stem for path in (CONF / "data").glob("*.yaml")} <= {p.stem for p in (CONF / "model").glob("*.yaml")}


def test_seed_reaches_the_data(compose_job: Compose) -> None:
    cfg = compose_job("seed=3")
    assert cfg.data.seed == 3
    assert cfg.data.split_seed == 0


def test_another_application_composes_our_groups(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "defaults:\n  - data: digits\n  - recipe: w4a8\n  - callbacks: [qat, calibration]\n  - _self_\n"
        "batches: 3\ncallbacks: {calibration: {num_batches: 3}}\n"
        "hydra: {searchpath: ['pkg://lightning_qat.conf']}\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("config", ["data.batch_size=16"])
    assert "seed" not in cfg
    callbacks = build(cfg.callbacks)
    assert isinstance(callbacks["qat"], QATCallback)
    assert callbacks["qat"].recipe == recipes.w4a8()
    assert callbacks["calibration"].num_batches == 3
    data = build(cfg.data)
    assert isinstance(data, DigitsData)
    assert (data.batch_size, data.seed) == (16, 0)


def test_sweep_files(compose_job: Compose) -> None:
    for path in (CONF / "sweep").glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert text.splitlines()[:2] == ["# @package _global_", f"# lightning-qat sweep={path.stem}"]
        node = OmegaConf.create(text)
        for key, values in node.hydra.sweeper.params.items():
            for value in str(values).split(","):
                compose_job(f"{key}={value}")
