"""allocate_bits(): the program against all choices, sensitivities against formulas of their own, the recipe's rules."""

import copy
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_qat as qat
from lightning_qat import Binary, HalfInt, Int, LayerSpec, QuantizerSpec, Recipe, Rule, Ternary, prepare, recipes
from lightning_qat.conversion import Allocation, allocate_bits
from lightning_qat.conversion.allocate import escaped, find_allocation, units
from lightning_qat.conversion.allocation import cheapest
from lightning_qat.conversion.prepare import prepared_state
from lightning_qat.conversion.sensitivity import FisherError, LossChange, OutputDivergence, OutputError
from tests import _reference as ref

SIZES = (64, 100, 4096, 12288, 896 * 4864, 896 * 151936)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 4))


def batches(num: int = 2, width: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, width, generator=generator) for _ in range(num)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), torch.arange(len(x)) % 4)


def prepared(model: nn.Module | None = None, recipe: Recipe | None = None) -> nn.Module:
    model = model or net()
    prepare(model, recipe or recipes.int4())
    return model


# --- the integer program ---------------------------------------------------------------------------------------------


def best_of_all(costs: Any, bits: Any, sizes: Any, average: float) -> float:
    """The least sum of costs over every choice within the budget."""
    found = math.inf
    for choice in itertools.product(*(range(len(row)) for row in costs)):
        if sum(row[c] * n for row, c, n in zip(bits, choice, sizes, strict=True)) <= average * sum(sizes) + 1e-6:
            found = min(found, sum(row[c] for row, c in zip(costs, choice, strict=True)))
    return found


@pytest.mark.parametrize("seed", range(16))
def test_no_choice_is_better(seed: int) -> None:
    """Costs in whole numbers, so that equal means equal; budgets that are just met included."""
    draw = random.Random(seed)
    for _ in range(3):
        num_layers, num = draw.randint(1, 5), draw.randint(2, 4)
        costs = [[float(draw.randint(0, 20)) for _ in range(num)] for _ in range(num_layers)]
        bits = [[draw.choice([1.0, math.log2(3), 2.0, 3.0, 4.0, 8.0]) for _ in range(num)] for _ in range(num_layers)]
        sizes = [draw.choice(SIZES) for _ in range(num_layers)]
        least = sum(min(row) * n for row, n in zip(bits, sizes, strict=True)) / sum(sizes)
        for average in (least, least + draw.random(), least + 3 * draw.random(), 8.0):
            chosen = cheapest(costs, bits, sizes, average)
            used = sum(row[c] * n for row, c, n in zip(bits, chosen, sizes, strict=True))
            assert used <= average * sum(sizes) * (1 + 1e-11)
            assert sum(row[c] for row, c in zip(costs, chosen, strict=True)) == best_of_all(costs, bits, sizes, average)


def test_costs_of_many_magnitudes() -> None:
    draw = random.Random(0)
    for _ in range(20):
        costs = [[draw.random() * 10 ** draw.uniform(-5, 0) for _ in range(3)] for _ in range(4)]
        chosen = cheapest(costs, [[2, 3, 4]] * 4, [100, 50, 25, 25], 2.7)
        total = sum(row[c] for row, c in zip(costs, chosen, strict=True))
        assert total <= best_of_all(costs, [[2, 3, 4]] * 4, [100, 50, 25, 25], 2.7) + 4e-7


def test_weights_count_and_not_layers() -> None:
    """The small layer gets 8 bits, although the large one is a little more sensitive."""
    assert cheapest([[1.0, 0.0], [1.1, 0.0]], [[2, 8], [2, 8]], [100, 1000], 3.0) == (1, 0)


def test_ties_are_broken_the_same_way_each_time() -> None:
    equal = [[4.0, 1.0]] * 6
    expected = (1, 1, 1, 0, 0, 0)
    assert all(cheapest(equal, [[2, 4]] * 6, [10] * 6, 3.0) == expected for _ in range(5))
    assert cheapest([[0.0, 0.0, 0.0]] * 3, [[2, 4, 8]] * 3, [10, 10, 10], 8.0) == (0, 0, 0)


def test_negative_costs_are_improvements() -> None:
    assert cheapest([[-1.0, -3.0], [0.0, -1.0]], [[2, 4], [2, 4]], [1, 1], 3.0) == (1, 0)


def test_what_cannot_be_solved() -> None:
    with pytest.raises(
        ValueError, match=r"average_bits=1.9 cannot be reached: .* narrowest candidate everywhere it is 2"
    ):
        cheapest([[1.0, 0.0]], [[2, 4]], [10], 1.9)
    with pytest.raises(ValueError, match=r"costs\[1\]=\[1.0, nan\] are not all finite"):
        cheapest([[1.0, 0.0], [1.0, math.nan]], [[2, 4]] * 2, [10] * 2, 3.0)


# --- sensitivities ---------------------------------------------------------------------------------------------------


def alone(layer: str, bits: int, recipe: Recipe) -> nn.Module:
    """The model with one layer quantized and all others in float."""
    model = net().double()
    spec = recipe.rules[0].spec
    assert spec is not None
    assert spec.weight is not None
    weight = QuantizerSpec(qat.Pi(bits, 3) if isinstance(spec.weight.grid, qat.Pi) else Int(bits))
    prepare(model, Recipe((Rule(layer, LayerSpec(weight, transforms=spec.transforms)),)))
    return model


def reference(measure: Any, recipe: Recipe) -> list[list[float]]:
    """The table from models of which one layer is quantized, in float64."""
    rows = []
    for layer in ("0", "2", "4"):
        row = []
        for bits in (2, 4):
            quantized, plain = alone(layer, bits, recipe), net().double()
            row.append(float(torch.stack([measure(plain, quantized, x.double()) for x in batches()]).mean()))
        rows.append(row)
    return rows


def divergence(plain: nn.Module, quantized: nn.Module, x: Tensor) -> Tensor:
    p, q = plain(x).softmax(-1), quantized(x).softmax(-1)
    return (p * (p.log() - q.log())).sum(-1).mean().detach()


def squared(plain: nn.Module, quantized: nn.Module, x: Tensor) -> Tensor:
    y = plain(x).detach()
    return (quantized(x).detach() - y).pow(2).mean() / y.var(correction=0)


def change(plain: nn.Module, quantized: nn.Module, x: Tensor) -> Tensor:
    return (loss(quantized, x) - loss(plain, x)).detach()


def second_order(plain: nn.Module, quantized: nn.Module, x: Tensor) -> Tensor:
    plain.zero_grad()
    loss(plain, x).backward()
    total = torch.zeros((), dtype=torch.float64)
    for before, after in zip(plain, quantized, strict=True):
        if isinstance(before, nn.Linear):
            assert before.weight.grad is not None
            total += 0.5 * (before.weight.grad.pow(2) * (after.weight - before.weight).pow(2)).sum().detach()
    return total


CASES = [
    (OutputDivergence(), divergence, recipes.int4()),
    (OutputDivergence(), divergence, recipes.w4a8()),
    (OutputDivergence(), divergence, recipes.piq2()),
    (OutputError(), squared, recipes.int4()),
    (LossChange(), change, recipes.piq2()),
    (FisherError(), second_order, recipes.int4()),
    (FisherError(), second_order, recipes.w4a8()),
]


@pytest.mark.parametrize(("sensitivity", "expected", "recipe"), CASES)
def test_sensitivities_are_those_of_one_quantized_layer(sensitivity: Any, expected: Any, recipe: Recipe) -> None:
    """Whatever the recipe does to inputs, and together with a rotation."""
    found = find_allocation(
        prepared(net().double(), recipe), [x.double() for x in batches()], average_bits=4, candidates=(2, 4),
        sensitivity=sensitivity, forward=loss if sensitivity.needs_loss else None,
    )  # fmt: skip
    torch.testing.assert_close(
        torch.tensor(found.sensitivities, dtype=torch.float64),
        torch.tensor(reference(expected, weight_only(recipe)), dtype=torch.float64),
        rtol=1e-6, atol=1e-12,
    )  # fmt: skip


def weight_only(recipe: Recipe) -> Recipe:
    spec = recipe.rules[0].spec
    assert spec is not None
    return Recipe((Rule("*", LayerSpec(spec.weight, transforms=spec.transforms)),))


def test_second_order_of_a_rotated_layer_is_in_rotated_coordinates() -> None:
    model, x = prepared(net().double(), recipes.piq2()), batches(1)[0].double()
    found = find_allocation(
        model, [x], average_bits=4, candidates=(2, 4), sensitivity=FisherError(), forward=loss
    ).sensitivities[1]
    plain: Any = net().double()
    loss(plain, x).backward()
    layer: Any = model[2]  # type: ignore[index]
    matrix = layer.quantizer_transforms[0].signs.double().diag() @ ref.walsh_hadamard_matrix(16) / 4
    gradient, weight = plain[2].weight.grad @ matrix, plain[2].weight.detach() @ matrix
    for bits, measured in zip((2, 4), found, strict=True):
        quantized: Any = alone("2", bits, recipes.piq2())[2]  # type: ignore[index]
        expected = 0.5 * (gradient.pow(2) * (quantized.weight.detach() - weight).pow(2)).sum()
        assert measured == pytest.approx(float(expected), rel=1e-6)


def test_sums_are_gathered_from_all_processes() -> None:
    model, first, second = prepared(), batches()[:1], batches()[1:]
    whole = find_allocation(model, batches(), average_bits=3)
    sums: list[Tensor] = []
    find_allocation(model, second, average_bits=3, gather=lambda part: sums.append(part) or part)  # type: ignore[func-returns-value]
    gathered = find_allocation(model, first, average_bits=3, gather=lambda part: part + sums[0])
    torch.testing.assert_close(torch.tensor(gathered.sensitivities), torch.tensor(whole.sensitivities))


def test_the_model_stays_as_it_is() -> None:
    for sensitivity, forward in ((OutputDivergence(), None), (FisherError(), loss)):
        for model in (net().train(), prepared(net()).train()):
            before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
            modules, randomness = list(model.modules()), torch.get_rng_state()
            allocate_bits(model, batches(), average_bits=3, sensitivity=sensitivity, forward=forward)
            if prepared_state(model) is not None:
                find_allocation(model, batches(), average_bits=3, sensitivity=sensitivity, forward=forward)
            assert [type(module) for module in model.modules()] == kinds
            assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            assert all(module.training for module in model.modules())
            assert all(parameter.grad is None for parameter in model.parameters())
            assert torch.equal(torch.get_rng_state(), randomness)


def test_frozen_weights_have_a_second_order() -> None:
    free, frozen = net(), net()
    frozen[0].requires_grad_(False)
    tables = [
        find_allocation(prepared(m), batches(), average_bits=3, sensitivity=FisherError(), forward=loss).sensitivities
        for m in (free, frozen)
    ]
    assert tables[0] == tables[1]
    assert not frozen[0]._parameters["weight"].requires_grad  # type: ignore[union-attr]


# --- what the recipe says --------------------------------------------------------------------------------------------


def widths(recipe: Recipe) -> dict[str, str]:
    return {rule.match: rule.spec.weight.grid.label for rule in recipe.rules if rule.spec and rule.spec.weight}


def test_the_sensitive_layer_gets_the_bits() -> None:
    model = net()
    with torch.no_grad():
        model[4].weight *= 30  # type: ignore[operator]
        model[2].weight *= 0.01  # type: ignore[operator]
        model[2].bias.zero_()  # type: ignore[operator, union-attr]
        model[4].bias.normal_()  # type: ignore[operator, union-attr]
    found = widths(allocate_bits(model, batches(), average_bits=2.9, candidates=(2, 8)))
    assert found == {"0": "int2", "2": "int2", "4": "int8"}


def test_one_rule_per_layer_prepares_the_model_without_complaint() -> None:
    model = net()
    recipe = allocate_bits(model, batches(), average_bits=3)
    assert [rule.match for rule in recipe.rules] == ["0", "2", "4"]
    report = prepare(model, recipe)
    rows = [row for row in report if row.decision == "quantized"]
    assert sum(row.numel * row.bits for row in rows) <= 3 * sum(row.numel for row in rows)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_equal_runs_give_equal_recipes() -> None:
    assert allocate_bits(net(), batches(), average_bits=2.5) == allocate_bits(net(), batches(), average_bits=2.5)


def test_a_prepared_model_keeps_its_recipe_for_the_rest() -> None:
    base = Recipe((Rule("4", None), Rule("0", LayerSpec(QuantizerSpec(HalfInt(4)), None)), *recipes.w4a8().rules))
    recipe = allocate_bits(prepared(net(), base), batches(), average_bits=3, candidates=(2, 4))
    assert [rule.match for rule in recipe.rules] == ["0", "2", "4"]
    assert recipe.rules[2] == Rule("4", None)
    first, second = recipe.rules[0].spec, recipe.rules[1].spec
    assert first is not None
    assert second is not None
    assert first.weight is not None
    assert isinstance(first.weight.grid, HalfInt)
    assert first.input is None
    assert second.input == recipes.w4a8().rules[0].spec.input  # type: ignore[union-attr]
    assert recipe == allocate_bits(net(), batches(), average_bits=3, candidates=(2, 4), recipe=base)


def test_candidates_of_every_kind() -> None:
    kinds = (2, Ternary(), recipes.int8())
    found = allocate_bits(net(), batches(), average_bits=8, candidates=kinds)
    assert [rule.spec for rule in found.rules] == [recipes.int8().rules[0].spec] * 3
    assert set(widths(allocate_bits(net(), batches(), average_bits=2, candidates=kinds)).values()) <= {
        "int2",
        "ternary",
    }


class Tied(nn.Module):
    """An embedding whose table is the head, an attention whose projections are three weights, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, x[..., :4], x[..., 4:], need_weights=False)[0]
        out: Tensor = self.head(self.convolution(x.transpose(1, 2)).transpose(1, 2))
        return out


def test_layers_that_share_a_weight_get_one_width() -> None:
    weight = LayerSpec(QuantizerSpec(Int(4)))
    base = Recipe((Rule("*", weight, types=(nn.Embedding,)), *recipes.int4().rules))
    model = Tied()
    tokens = [torch.randint(9, (2, 5), generator=torch.Generator().manual_seed(0))]
    allocation = find_allocation(prepared(Tied(), base), tokens, average_bits=3, candidates=(2, 3, 4))
    assert allocation.layers == (("embedding", "head"), ("attention",), ("attention.out_proj",), ("convolution",))
    assert allocation.num_weights == (72, 128, 64, 192)
    recipe = allocate_bits(model, tokens, average_bits=3, candidates=(2, 3, 4), recipe=base)
    assert [rule.match for rule in recipe.rules][:2] == ["embedding", "head"]
    assert recipe.rules[0].types == (nn.Embedding,)
    prepare(model, recipe)
    assert model.head.weight_quantizer is model.embedding.weight_quantizer
    fisher = find_allocation(
        prepared(Tied(), base), tokens, average_bits=3, candidates=(2, 4), sensitivity=FisherError(),
        forward=lambda m, x: F.cross_entropy(m(x).flatten(0, 1), x.flatten()),
    )  # fmt: skip
    assert all(row[0] > row[1] > 0 for row in fisher.sensitivities)


def test_names_are_exact() -> None:
    model = nn.ModuleDict({"a[0]": nn.Linear(4, 4), "a0": nn.Linear(4, 4)})
    assert escaped("a[0]") == "a[[]0]"
    recipe = allocate_bits(
        model, [torch.ones(2, 4)], average_bits=4, candidates=(2, 4), forward=lambda m, x: m["a0"](m["a[0]"](x))
    )
    assert recipe.rules[0].matches_name("a[0]")
    assert not recipe.rules[0].matches_name("a0")
    prepare(model, recipe)


def test_a_part_of_the_layers() -> None:
    model = prepared()
    assert [list(unit.owners) for unit in units(model, "[24]")] == [["2"], ["4"]]
    with pytest.raises(ValueError, match=r"match='x' matches no quantized layer; there are \['0', '2', '4'\]"):
        units(model, "x")


# --- as plain data ---------------------------------------------------------------------------------------------------


def test_an_allocation_is_written_and_read(tmp_path: Path) -> None:
    found = find_allocation(prepared(), batches(), average_bits=3, candidates=(Binary(), 3, Int(4)))
    found.save(tmp_path / "a.json")
    assert Allocation.load(tmp_path / "a.json") == found
    assert json.loads((tmp_path / "a.json").read_text())["average_bits"] == found.average_bits
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "weights", "binary", "int3", "int4", "chosen"]
    assert len(lines) == 5
    assert all("*" in line for line in lines[1:4])
    with pytest.raises(FileNotFoundError, match=r"Allocation\.load: path='nowhere' is not a file"):
        Allocation.load("nowhere")
    with pytest.raises(ValueError, match="format='other' is not"):
        Allocation.from_dict({"format": "other"})


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"average_bits": 0}, ValueError, "average_bits=0 is not allowed; choose a number above 0, up to 8"),
        ({"average_bits": True}, ValueError, "average_bits=True is not allowed"),
        ({"average_bits": 1.5}, ValueError, "average_bits=1.5 cannot be reached: .* it is 2; allow more bits"),
        ({"candidates": (2,)}, ValueError, "give two or more different ones"),
        ({"candidates": (2, 3, 2)}, ValueError, "give two or more different ones"),
        ({"candidates": (2, "int4")}, TypeError, "'int4' is neither bits .* nor a recipe"),
        ({"candidates": (2, 9)}, ValueError, "candidates: 9 bits are not allowed; choose 1 to 8"),
        ({"candidates": 4}, TypeError, r"candidates=4 is not a list; give two or more, such as \(2, 3, 4, 8\)"),
        ({"sensitivity": "kl"}, TypeError, r"allocate_bits: sensitivity='kl' is not a Sensitivity; give OutputDiv"),
        ({"batches": torch.zeros(2, 6)}, TypeError, r"batches is one tensor, .* give a list, \[batches\]"),
        ({"candidates": (2, Int(4, symmetric=False))}, ValueError, "0.weight: cannot change .* one has a zero point"),
        ({"candidates": (2, Recipe((Rule("0", None),)))}, ValueError, "0: a candidate recipe leaves"),
        ({"batches": []}, ValueError, "^allocate_bits: no batches were given"),
        ({"forward": lambda m, x: [m(x)]}, TypeError, "the model returned a list, not a tensor of logits"),
        ({"forward": lambda m, x: m(x).argmax(-1)}, TypeError, "the model returned a torch.int64 tensor"),
        ({"forward": lambda m, x: m(x)[..., :1]}, ValueError, r"\[8, 1\] has no classes in dimension -1; choose dim="),
        ({"sensitivity": LossChange()}, TypeError, "the model returned a Tensor, not a loss"),
        ({"sensitivity": FisherError(), "forward": lambda m, x: torch.ones(())}, ValueError, "no gradient of the loss"),
        ({"forward": lambda m, x: m(x) * math.nan}, ValueError, r"0: its sensitivities \[nan, .*\] are not finite"),
        ({"recipe": Recipe((Rule("*", None),))}, ValueError, "matches no quantized layer"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"average_bits": 3, "batches": batches()} | options
    with pytest.raises(kind, match=message):
        allocate_bits(net(), arguments.pop("batches"), **arguments)


def test_a_prepared_model_has_its_recipe_already() -> None:
    with pytest.raises(ValueError, match="prepared by another recipe; leave recipe= out"):
        allocate_bits(prepared(), batches(), average_bits=3, recipe=recipes.int2())


def test_zeros_that_must_stay() -> None:
    base = Recipe((Rule("*", LayerSpec(QuantizerSpec(Int(4))), types=(nn.Embedding,)),))
    table = nn.Sequential(nn.Embedding(4, 3, padding_idx=0))
    with pytest.raises(ValueError, match=r"0: Binary\(\) has no zero, .* padding_idx could not stay zero"):
        allocate_bits(table, [torch.arange(4)], average_bits=3, candidates=(1, 4), recipe=base)
