"""Accumulation windows: a weight is quantized once between optimizer steps, and nothing else changes."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import optimizer
from torch.utils.checkpoint import checkpoint

from lightning_qat import (
    AbsMax,
    HalfInt,
    Int,
    LayerSpec,
    Learned,
    PerChannel,
    PerGroup,
    PerToken,
    QuantizerSpec,
    Recipe,
    Rule,
    StraightThrough,
    accumulation_window,
    float_weights,
    prepare,
    recipes,
)
from lightning_qat.conversion import weight_only
from lightning_qat.quantization import quantizer as implementation
from lightning_qat.quantization.brief import brief_setting

TOKENS = QuantizerSpec(Int(8, narrow=True), PerToken(), AbsMax(), StraightThrough())
SPECS = {
    "dynamic": LayerSpec(QuantizerSpec(Int(4), PerChannel(), AbsMax(), StraightThrough())),
    "zero point": LayerSpec(QuantizerSpec(Int(4, symmetric=False), PerChannel(), AbsMax(), StraightThrough())),
    "grouped": LayerSpec(QuantizerSpec(Int(4), PerGroup(4), AbsMax(), StraightThrough())),
    "learned": LayerSpec(QuantizerSpec(Int(4), PerChannel(), Learned())),
    "tokens": LayerSpec(QuantizerSpec(Int(8), PerChannel(), AbsMax(), StraightThrough()), TOKENS),
    "half-integers": LayerSpec(QuantizerSpec(HalfInt(2), PerChannel(), Learned()), TOKENS),
}


def prepared(spec: str = "dynamic", arithmetic: str = "auto") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.SiLU(), nn.Linear(16, 8))
    prepare(model, Recipe((Rule("*", SPECS[spec]),)), arithmetic=arithmetic)
    return model


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 12, generator=generator) for _ in range(3)]


def accumulate(model: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Outputs of three micro-batches, and the gradients."""
    outputs = [run(batch) for batch in batches()[:1]]
    outputs[0].square().sum().backward()
    for batch in batches()[1:]:
        outputs.append(run(batch))
        outputs[-1].square().sum().backward()
    return [*outputs, *(parameter.grad for parameter in model.parameters())]


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of elements of every weight that is quantized or whose scale is found."""
    seen: list[int] = []
    original = implementation.FakeQuantizer.step_and_zero_point

    def note(self: Any, sample: Any) -> Any:
        seen.extend([sample.values.numel()] if not self.layout.is_input else [])
        return original(self, sample)

    def note_brief(quantizer: Any, weight: Tensor) -> Any:
        seen.append(weight.numel())
        return brief_setting(quantizer, weight)

    monkeypatch.setattr(implementation.FakeQuantizer, "step_and_zero_point", note)
    monkeypatch.setattr(weight_only, "brief_setting", note_brief)
    return seen


@pytest.mark.parametrize(
    ("spec", "arithmetic"),
    [*((spec, "simulated") for spec in SPECS), ("tokens", "integer"), ("half-integers", "integer")],
)
@pytest.mark.parametrize("amp", [False, True])
def test_same_numbers(spec: str, arithmetic: str, amp: bool) -> None:
    model = prepared(spec, arithmetic)
    other = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        expected = accumulate(other, other)
        with accumulation_window(model):
            found = accumulate(model, model)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_scale_is_found_once(quantized: list[int]) -> None:
    model = prepared()
    quantized.clear()
    with accumulation_window(model):
        accumulate(model, model)
    assert sorted(quantized) == [16 * 8, 12 * 16]
    quantized.clear()
    accumulate(model, model)
    assert len(quantized) == 6


def test_checkpointing_finds_what_the_forward_kept(quantized: list[int]) -> None:
    model = prepared("tokens")
    other = copy.deepcopy(model)
    quantized.clear()
    with accumulation_window(model):
        found = accumulate(model, lambda x: checkpoint(model, x, use_reentrant=False))
    assert len(quantized) == 2
    expected = accumulate(other, lambda x: checkpoint(other, x, use_reentrant=False))
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "optimizer step": lambda model: torch.optim.SGD(model.parameters(), lr=0.1).step(),
    "fused optimizer step": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step(),
    "load_state_dict": lambda model: model.load_state_dict(prepared("tokens").double().float().state_dict()),
    "load of a float model": lambda model: model.load_state_dict(
        nn.Sequential(nn.Linear(12, 16), nn.SiLU(), nn.Linear(16, 8)).state_dict()
    ),
    "eval and back": lambda model: (model.eval(), model[0]._parameters["weight"].data.mul_(3.0), model.train()),
    "to": lambda model: (model[0]._parameters["weight"].data.mul_(3.0), model.to("cpu")),
    "assigned": lambda model: setattr(model[0], "weight", nn.Parameter(torch.randn(16, 12))),
    "initialized": lambda model: model[0].reset_parameters(),
    "another grid": lambda model: model[0].weight_quantizer.set_grid(Int(3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_quantized_anew(change: str) -> None:
    model, x = prepared("tokens", "integer"), batches()[0]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with accumulation_window(model):
        before = model(x)
        CHANGES[change](model)
        after = model(x)
    assert torch.equal(after, model(x))
    assert not torch.equal(after, before) or change == "load_state_dict"


def test_closures_of_lbfgs_see_moving_weights() -> None:
    losses: dict[bool, list[float]] = {}
    for inside in (True, False):
        model, x = prepared(), batches()[0]
        lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
        losses[inside] = []

        def closure(model: nn.Module = model, x: Tensor = x, seen: list[float] = losses[inside]) -> Tensor:
            model.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            seen.append(loss.item())
            return loss

        with accumulation_window(model if inside else nn.Identity()):
            lbfgs.step(closure)
    assert losses[True] == losses[False]
    assert len(set(losses[True])) > 1


def test_evaluation_and_float_contexts_see_no_window() -> None:
    model, x = prepared(), batches()[0]
    with accumulation_window(model):
        model(x)
        weight = model[0]._parameters["weight"]
        weight.data.mul_(2.0)
        with torch.no_grad():
            assert torch.equal(model(x), copy.deepcopy(model)(x))
        with float_weights(model):
            expected = nn.functional.linear(x, weight, model[0].bias)
            assert torch.equal(model[0](x), expected)


def test_weights_that_are_computed_are_not_kept() -> None:
    """spectral_norm moves at every read."""
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(12, 16)))
    prepare(model, Recipe((Rule("*", SPECS["dynamic"]),)))
    with accumulation_window(model):
        model(batches()[0])
        assert len(model[0].weight_quantizer.window) == 0


def test_ends_with_the_context_also_by_an_exception() -> None:
    model = prepared()
    hooks = len(optimizer._global_optimizer_post_hooks)

    def run() -> None:
        with accumulation_window(model):
            with accumulation_window(model):  # the outer one goes on
                model(batches()[0])
            assert len(model[0].weight_quantizer.window) == 2
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run()
    assert model[0].weight_quantizer.window is None
    assert len(optimizer._global_optimizer_post_hooks) == hooks


def test_copies_and_pickles_are_in_no_window() -> None:
    model = prepared()
    with accumulation_window(model):
        model(batches()[0])
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert other[0].weight_quantizer.window is None


def test_nothing_to_quantize() -> None:
    with accumulation_window(nn.Linear(2, 2)) as nothing:
        assert nothing is None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does
def test_compiled_steps_ignore_windows() -> None:
    model, x = prepared(), batches()[0]
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    with accumulation_window(model):
        torch.testing.assert_close(compiled(x), before)
        assert len(model[0].weight_quantizer.window) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_named_recipes_keep_codes_or_values() -> None:
    for recipe, arithmetic, dtype in ((recipes.int4(), "auto", torch.float32), (recipes.w8a8(), "integer", torch.int8)):
        model = nn.Sequential(nn.Linear(12, 16))
        prepare(model, recipe, arithmetic=arithmetic)
        with accumulation_window(model):
            model(batches()[0])
            (kept,) = model[0].weight_quantizer.window._found.values()
        assert kept.values.dtype == dtype
