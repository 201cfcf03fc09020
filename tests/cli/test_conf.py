"""The configuration: keys are arguments, every recipe has a file, groups serve other applications."""

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

from lightning_qat import QATCallback, ReasoningMatch, callbacks, recipes
from lightning_qat.callbacks import BatchMask, TargetMask
from lightning_qat.cli.build import build
from lightning_qat.data import DigitsData
from lightning_qat.losses import ReasoningWeights, target_mask
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


def test_every_callback_has_a_node() -> None:
    nodes = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (CONF / "callbacks").glob("*.yaml")]
    found = {get_object(node["_target_"]) for node in targets(nodes)}
    public = {getattr(callbacks, name) for name in callbacks.__all__}
    missing = {each for each in public if isinstance(each, type) and issubclass(each, pl.Callback)} - found
    assert {each.__name__ for each in missing} == set()


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


@pytest.mark.parametrize("callbacks", ["[full,reasoning]", "[default,reasoning]"])
def test_reasoning_joins_a_teacher_or_brings_one(callbacks: str, compose_job: Compose) -> None:
    preset = "callbacks.distillation.reasoning.weights.name=mathematics"
    built = build(compose_job("data=arithmetic", f"callbacks={callbacks}", preset).callbacks)["distillation"]
    assert built.mask == TargetMask()
    assert built.reasoning == ReasoningMatch(
        "backbone.norm",
        boundaries=BatchMask("step_mask"),
        answer=BatchMask("answer_mask"),
        weights=ReasoningWeights.mathematics(),
    )


def test_boundaries_from_a_delimiter_or_a_function(compose_job: Compose) -> None:
    prefix = "callbacks.distillation.reasoning"
    token = "{_target_:lightning_qat.callbacks.DelimiterMask,delimiter:15}"
    kinds = "{_target_:lightning_qat.callbacks.KindWeights,kinds:{15:1}}"
    cfg = compose_job("data=arithmetic", "callbacks=[full,reasoning]", f"~{prefix}.boundaries",
                      f"+{prefix}.boundaries={token}", f"{prefix}.step_weights={kinds}")  # fmt: skip
    reasoning = build(cfg.callbacks)["distillation"].reasoning
    batch = {"tokens": torch.tensor([[3, 15]])}
    assert reasoning.boundaries(batch).tolist() == [[False, True]]
    assert reasoning.step_weights(batch).tolist() == [[1.0, 1.5]]
    function = "{_target_:hydra.utils.get_method,path:lightning_qat.losses.target_mask}"
    cfg = compose_job("data=arithmetic", "callbacks=[full,reasoning]", f"~{prefix}.boundaries",
                      f"+{prefix}.boundaries={function}")  # fmt: skip
    assert build(cfg.callbacks)["distillation"].reasoning.boundaries is target_mask
