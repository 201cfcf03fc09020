"""Functions of a model say so where they get something else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lightning_qat as lq
from lightning_qat import conversion, recipes
from lightning_qat.export import export

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "add_lora": lq.add_lora,
    "adopt_peft": lambda model: lq.adopt_peft(model, recipes.int4()),
    "allocate_bits": lambda model: lq.allocate_bits(model, [], average_bits=4.0),
    "bake": lq.bake,
    "calibrate": lambda model: lq.calibrate(model, []),
    "codes": lq.codes,
    "export": lambda model: export(model, Path("nowhere.safetensors")),
    "fold_batchnorm": lambda model: conversion.fold_batchnorm(model, None),
    "fold_rotations": lambda model: conversion.fold_rotations(model, None),
    "gptq": lambda model: lq.gptq(model, []),
    "keep_activations": conversion.keep_activations,
    "load_checkpoint": lambda model: lq.load_checkpoint(model, "nowhere.ckpt"),
    "merge_lora": lq.merge_lora,
    "online_rotations": conversion.online_rotations,
    "prepare": lambda model: lq.prepare(model, recipes.int4()),
    "recompute_activations": lambda model: conversion.recompute_activations(model, "*"),
    "reestimate_batchnorm": lambda model: conversion.reestimate_batchnorm(model, []),
    "rotate_between": lambda model: conversion.rotate_between(model, "up", "down", None),
    "unprepare": lq.unprepare,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("given", [None, "model.pt", nn.Linear])
def test_what_is_no_module(name: str, given: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: mod(el|ule)=.* is not a torch\.nn\.Module$"):
        FUNCTIONS[name](given)


@pytest.mark.parametrize("context", [lq.accumulation_window, lq.float_weights])
def test_what_is_no_module_in_a_context(context: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"model=None is not a torch\.nn\.Module"), context(None):
        pass


@pytest.mark.parametrize("given", [None, lq.Int(4), "int4"])
def test_quantizers_want_a_spec(given: Any) -> None:
    with pytest.raises(TypeError, match=r"^FakeQuantizer: spec=.* is not a QuantizerSpec"):
        lq.FakeQuantizer(given)
