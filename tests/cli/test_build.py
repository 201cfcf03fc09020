"""Stages: what changes for which, and that frozen values survive the configuration."""

import pytest
from omegaconf import OmegaConf

from lightning_qat import Binary, Int, Ternary
from lightning_qat.cli.build import FLOAT, QAT, build, build_stage, stage_config
from tests.cli.conftest import Compose


def test_stages_change_only_what_they_say(compose_job: Compose) -> None:
    cfg = compose_job("qat.model.learning_rate=0.5", "qat.trainer.max_epochs=7", "float.callbacks=[checkpoint]")
    before = OmegaConf.to_container(cfg)
    floats, quantized = stage_config(cfg, FLOAT), stage_config(cfg, QAT)
    assert OmegaConf.to_container(cfg) == before
    assert list(floats.callbacks) == ["checkpoint"]
    assert "qat" in quantized.callbacks
    assert (floats.trainer.max_epochs, quantized.trainer.max_epochs) == (30, 7)
    assert (floats.model.learning_rate, quantized.model.learning_rate) == (3e-3, 0.5)
    assert floats.callbacks.checkpoint.filename == "float"
    assert quantized.callbacks.checkpoint.filename == "qat"


def test_more_arguments_of_the_trainer(compose_job: Compose) -> None:
    cfg = stage_config(compose_job("+qat.trainer.limit_val_batches=2"), QAT)
    assert cfg.trainer.limit_val_batches == 2


def test_unknown_callback_of_the_float_stage(compose_job: Compose) -> None:
    with pytest.raises(ValueError, match=r"float.callbacks=\['ema'\]: 'ema' is not in callbacks; choose from"):
        stage_config(compose_job("float.callbacks=[ema]"), FLOAT)


def test_removed_parts(compose_job: Compose) -> None:
    cfg = compose_job("~callbacks", "~logger", "float.callbacks=[]", "+trainer.enable_checkpointing=false",
                      "+trainer.enable_progress_bar=false")  # fmt: skip
    stage = build_stage(stage_config(cfg, FLOAT))
    assert stage.trainer.loggers == []
    cfg = compose_job("callbacks.progress_bar=null", "float.callbacks=[progress_bar]")
    assert build_stage(stage_config(cfg, FLOAT)).trainer.logger is not None


def test_frozen_values_in_lists(compose_job: Compose) -> None:
    recipe = build(compose_job("experiment=digits_mixed").recipe)
    specs = [rule.spec for rule in recipe.rules]
    assert specs[:2] == [None, None]
    assert [spec.weight.grid for spec in specs[2:]] == [Int(8), Ternary()]
    assert isinstance(recipe.rules, tuple)
    assert build({"_target_": "lightning_qat.Binary"}) == Binary()
