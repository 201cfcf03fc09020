"""QATCallback by itself: arguments, messages, report, copies."""

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import lightning_qat
from lightning_qat import (
    AbsMax,
    Binary,
    Calibration,
    Int,
    LayerSpec,
    PerTensor,
    PerToken,
    QATCallback,
    QuantizerSpec,
    Recipe,
    Rule,
    StraightThrough,
    prepare,
    recipes,
    unprepare,
)
from lightning_qat.callbacks.differences import differences
from lightning_qat.conversion.state import prepared_state
from tests.callbacks._models import LEARNED_INPUTS, Net, fake_quantizers, fit, grid_distance, loader, state, trainer
from tests.learned import learned

NAMESPACE = {**vars(lightning_qat), "torch": torch}


@pytest.mark.parametrize(
    "callback",
    [
        QATCallback(),
        QATCallback(recipes.int2(group_size=4), arithmetic="simulated", scale_lr_multiplier=0.1),
        QATCallback(LEARNED_INPUTS),
        Calibration(),
        Calibration(num_batches=3),
        Calibration(num_batches=2, dataloader=[1, 2]),
    ],
)
def test_repr_evaluates(callback: Any) -> None:
    twin = eval(repr(callback), dict(NAMESPACE))
    assert repr(twin) == repr(callback)
    assert getattr(twin, "recipe", None) == getattr(callback, "recipe", None)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_callbacks_copy_after_use(copier: Any) -> None:
    callbacks = [QATCallback(LEARNED_INPUTS), Calibration(2)]
    fit(Net(), *callbacks)
    for callback in callbacks:
        assert repr(copier(callback)) == repr(callback)
    fit(Net(), *map(copier, callbacks))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"recipe": "int4"}, TypeError, r"recipe='int4' is not a Recipe; try recipes.int4\(\)"),
        ({"recipe": LayerSpec(QuantizerSpec(Int(4)))}, TypeError, r"is not a Recipe"),
        ({"scale_lr_multiplier": 0.0}, ValueError, "scale_lr_multiplier=0.0 must be positive"),
        ({"scale_lr_multiplier": -1.0}, ValueError, "scale_lr_multiplier=-1.0 must be positive"),
        ({"scale_lr_multiplier": float("nan")}, ValueError, "scale_lr_multiplier=nan must be positive"),
        ({"scale_lr_multiplier": float("inf")}, ValueError, "scale_lr_multiplier=inf must be positive"),
    ],
)
def test_arguments_are_checked_at_construction(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        QATCallback(**arguments)


def test_the_default_recipe_is_int4() -> None:
    model = Net()
    fit(model, QATCallback())
    found = prepared_state(model)
    assert found is not None
    assert found.recipe == recipes.int4()
    assert grid_distance(model, "first") < 1e-5


def test_the_report_is_printed_once(caplog: pytest.LogCaptureFixture) -> None:
    model, callback = Net(), QATCallback()
    with caplog.at_level(logging.INFO):
        made = fit(model, callback)
        made.validate(model, loader(), verbose=False)
        made.test(model, loader(), verbose=False)
    reports = [record.getMessage() for record in caplog.records if "QATCallback:" in record.getMessage()]
    assert len(reports) == 1
    assert "first.weight" in reports[0]
    assert "86.7 % quantized, 13.3 % float, 0.0 % unsupported" in reports[0]


def test_two_callbacks_and_two_fits_prepare_once() -> None:
    model = Net()
    fit(model, QATCallback(), QATCallback())
    before = {name: id(quantizer) for name, quantizer in fake_quantizers(model).items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    fit(model, QATCallback())
    assert {name: id(quantizer) for name, quantizer in fake_quantizers(model).items()} == before
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert len(model.first._forward_pre_hooks) == 0


def test_a_second_fit_of_one_trainer_goes_on() -> None:
    model = Net()
    made = fit(model, QATCallback(LEARNED_INPUTS), Calibration())
    before = state(model)
    made.fit_loop.max_epochs = 2
    made.fit(model, loader())
    after = state(model)
    assert before.keys() == after.keys()
    assert not torch.equal(before["first.weight_quantizer.scale"], after["first.weight_quantizer.scale"])


def test_a_prepared_model_is_left_alone() -> None:
    model = Net()
    prepare(model, recipes.int2(), arithmetic="simulated")
    before = {name: id(quantizer) for name, quantizer in fake_quantizers(model).items()}
    fit(model, QATCallback())
    assert {name: id(quantizer) for name, quantizer in fake_quantizers(model).items()} == before
    found = prepared_state(model)
    assert found is not None
    assert (found.recipe, found.arithmetic) == (recipes.int2(), "simulated")


def test_parts_that_the_user_prepared_are_left_alone() -> None:
    model = Net()
    prepare(model.first, recipes.int2())
    fit(model, QATCallback())
    assert set(fake_quantizers(model)) == {"first.weight_quantizer"}


def test_a_model_of_another_recipe_is_an_error() -> None:
    model = Net()
    prepare(model, learned("int2"))
    message = (
        r"the model is prepared by another recipe.\n  rule '\*': weight.grid.bits: model 2, callback 4\n"
        r"Leave the recipe out, QATCallback\(\), or call unprepare"
    )
    with pytest.raises(ValueError, match=message):
        fit(model, QATCallback(recipes.int4()))
    unprepare(model)
    fit(model, QATCallback(recipes.int4()))


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_rule_without_effect_is_an_error_at_every_stage(stage: str) -> None:
    recipe = Recipe((Rule("haed", None), *recipes.int4().rules))
    made = trainer(QATCallback(recipe))
    with pytest.raises(ValueError, match=r"'haed'.*head"):
        getattr(made, stage)(Net(), loader())


def test_a_rule_for_a_layer_that_comes_late_has_effect() -> None:
    recipe = Recipe((Rule("head", None), *recipes.int4().rules))
    model = Net(where="configure_model")
    fit(model, QATCallback(recipe))
    assert set(fake_quantizers(model)) == {"first.weight_quantizer"}


def test_uncalibrated_inputs_are_an_error_before_any_batch() -> None:
    class Never(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise AssertionError("sanity validation ran")

    message = (
        r"stored scale of first.input_quantizer, head.input_quantizer was never found. "
        r"Train with Calibration\(\) among the callbacks, .* or call calibrate"
    )
    with pytest.raises(ValueError, match=message):
        fit(Never(), QATCallback(LEARNED_INPUTS), val=loader())


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_uncalibrated_inputs_are_an_error_outside_fit(stage: str) -> None:
    made = trainer(QATCallback(LEARNED_INPUTS), Calibration())
    with pytest.raises(ValueError, match=r"head.input_quantizer was never found"):
        getattr(made, stage)(Net(), loader())


def test_frozen_layers_keep_their_scales() -> None:
    model = Net()
    model.first.requires_grad_(False)
    before = {key: value.clone() for key, value in model.first.state_dict().items()}
    fit(model, QATCallback(LEARNED_INPUTS), Calibration())
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        "first.weight",
        "first.bias",
        "first.weight_quantizer.scale",
        "first.input_quantizer.scale",
    }
    assert all(torch.equal(before[key], model.first.state_dict()[key]) for key in before)


def test_scales_of_weights_that_the_user_froze_after_prepare_train() -> None:
    """Training the scales alone is a method of its own; who asks for it gets it."""
    model = Net()
    prepare(model, recipes.int4())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("quantizer" in name)
    before = state(model)
    fit(model, QATCallback())
    changed = {key for key, value in state(model).items() if not torch.equal(before[key], value)}
    assert changed == {"first.weight_quantizer.scale", "head.weight_quantizer.scale"}


def test_strategies_that_would_lose_the_scales_are_refused() -> None:
    made = trainer(QATCallback())
    launcher = type("_MultiProcessingLauncher", (), {})()
    made.strategy._launcher = launcher
    made.strategy.__class__ = type("Strategy", (type(made.strategy),), {"launcher": property(lambda self: launcher)})
    model = Net()
    with pytest.raises(ValueError, match=r"would lose all scales. Call prepare\(model, recipe\) before trainer.fit"):
        QATCallback().setup(made, model, "fit")
    prepare(model, recipes.int4())
    QATCallback().setup(made, model, "fit")


def test_grids_come_with_checkpoints_of_sharded_models() -> None:
    """Lightning restores their parameters and buffers itself, and hands over a checkpoint without the state_dict."""
    model, callback, checkpoint = Net(), QATCallback(LEARNED_INPUTS), {}
    fit(model, callback, Calibration())
    model.first.weight_quantizer.set_grid(Int(2))
    callback.saving_checkpoint(model, checkpoint)
    fresh = Net()
    prepare(fresh, LEARNED_INPUTS)
    callback.loading_checkpoint(fresh, checkpoint)
    assert fresh.first.weight_quantizer.grid == Int(2)
    assert all(not quantizer.needs_calibration for quantizer in fake_quantizers(fresh).values())


# --- differences of recipes ------------------------------------------------------------------------------------------


INT8_TOKENS = QuantizerSpec(Int(8, narrow=True), PerToken(), AbsMax(), StraightThrough())


def _weights(spec: QuantizerSpec) -> Rule:
    return Rule("*", LayerSpec(spec))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (recipes.int4(), recipes.int4(), ()),
        (recipes.int4(), Recipe((_weights(QuantizerSpec(Int(4))),)), ()),  # a name makes no difference
        (
            Recipe((_weights(QuantizerSpec(Int(4), scale=AbsMax())),)),
            Recipe((_weights(QuantizerSpec(Binary(), PerTensor(), scale=AbsMax())),)),
            (
                "rule '*': weight.grid: a Int(bits=4, narrow=False, symmetric=True), b Binary()",
                "rule '*': weight.granularity: a PerChannel(), b PerTensor()",
            ),
        ),
        (
            recipes.w8a8(),
            Recipe((Rule("*", LayerSpec(recipes.w8a8().rules[0].spec.weight)),)),  # type: ignore[union-attr]
            (f"rule '*': input: a {INT8_TOKENS!r}, b None",),
        ),
        (
            Recipe((Rule("head", None), *recipes.int4().rules)),
            recipes.int4(),
            ("only a: Rule('head', None)",),
        ),
        (
            Recipe((Rule("head", None),)),
            Recipe((Rule("tail", None, types=(nn.Embedding,)),)),
            ("a Rule('head', None), b Rule('tail', None, types=(Embedding))",),
        ),
    ],
)  # fmt: skip
def test_differences(first: Recipe, second: Recipe, expected: tuple[str, ...]) -> None:
    assert differences(first, second, ("a", "b")) == expected


def test_messages_of_differences_are_short() -> None:
    for name in recipes.names():
        for line in differences(recipes.int4(), recipes.named(name), ("checkpoint", "callback")):
            assert len(line) < 250
