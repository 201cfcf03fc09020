"""recommended_callbacks and faster_others: one set of callbacks for each width."""

from typing import Any

import pytest
import torch

from lightning_qat import (
    GPTQ,
    AbsMax,
    Calibration,
    Distillation,
    GradualQuantization,
    Int,
    LayerSpec,
    OrthogonalUpdates,
    PerTensor,
    QATCallback,
    QuantizerSpec,
    Recipe,
    Rule,
    faster_others,
    recipes,
    recommended_callbacks,
)
from lightning_qat.callbacks import TargetMask
from tests.callbacks._models import LEARNED_INPUTS, Net, fit, state

FACTORS = {
    "binary": 8, "bitnet1": 8, "ternary": 8, "ternary_a8": 8, "bitnet": 8, "int2": 4, "seq2": 4, "piq2": 4,
    "int3": 4, "piq3": 4, "int4": 1, "w4a8": 1, "int8": 1, "w8a8": 1,
}  # fmt: skip


def test_every_recipe_has_its_factor() -> None:
    assert {name: faster_others(recipes.named(name)).lr_multiplier for name in recipes.names()} == FACTORS


def test_the_coarsest_weights_decide_and_float_layers_do_not_count() -> None:
    rules = (Rule("head", None), Rule("first", recipes.int8().rules[0].spec), *recipes.int2().rules)
    assert faster_others(Recipe(rules)).lr_multiplier == 4.0
    inputs_alone = Recipe((Rule("*", LayerSpec(input=QuantizerSpec(Int(2), PerTensor(), AbsMax()))),))
    assert faster_others(inputs_alone).lr_multiplier == 1.0


@pytest.mark.parametrize("name", sorted(FACTORS))
def test_a_run_equals_the_list_written_down(name: str) -> None:
    """Also where a part has nothing to do, as GPTQ where no scale is stored."""
    recipe = recipes.named(name)
    groups = () if FACTORS[name] == 1 else (faster_others(recipe),)
    written: list[Any] = [
        QATCallback(recipe, groups=groups),
        GPTQ(),
        OrthogonalUpdates(),
        GradualQuantization(),
        Distillation(fade_below=1.0, max_odds=100.0),
    ]
    models = Net(), Net()
    fit(models[0], *recommended_callbacks(recipe))
    fit(models[1], *written)
    ours, theirs = (state(model) for model in models)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert ours.keys() == theirs.keys()


def test_scales_of_inputs_are_calibrated() -> None:
    model = Net()
    fit(model, *recommended_callbacks(LEARNED_INPUTS))
    assert (model.first.input_quantizer.scale.detach() > 0).all()


def test_arguments_reach_their_callbacks() -> None:
    teacher, mask = Net(seed=1), TargetMask()

    def forward(module: Any, batch: Any) -> Any:
        return module(batch[0])

    found = {
        type(each): each for each in recommended_callbacks(recipes.int2(), teacher=teacher, mask=mask, forward=forward)
    }
    distillation: Any = found[Distillation]
    assert distillation.teacher.source is teacher
    assert distillation.mask is mask
    assert found[Calibration].forward is forward  # type: ignore[attr-defined]
    assert found[GPTQ].forward is forward  # type: ignore[attr-defined]


def test_a_name_is_no_recipe() -> None:
    with pytest.raises(TypeError, match=r"recommended_callbacks: recipe='int4' is no Recipe; pass recipes\."):
        recommended_callbacks("int4")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"faster_others: recipe='int4' is no Recipe"):
        faster_others("int4")  # type: ignore[arg-type]
