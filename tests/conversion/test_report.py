"""The report accounts for every parameter once, and reads well."""

import json
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_qat import (
    Hadamard,
    Int,
    LayerSpec,
    QuantizerSpec,
    Recipe,
    Rule,
    prepare,
    recipes,
)
from lightning_qat.conversion.prepare import report_of
from tests.conversion.cases import TOKENS, WEIGHT, OwnForward, Table, Tied, network, recipe_for

INT4 = "weight int4:channel:learned(mse):clipped"


class Odd(nn.Module):
    """Parameters in every place: on the root, in lists, shared modules, modules without parameters, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 5, 6))
        self.gain = nn.Parameter(torch.ones(6))
        self.mixing = nn.ParameterList([nn.Parameter(torch.randn(3, 3)) for _ in range(2)])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(2))})
        self.shared = nn.Linear(6, 6)
        self.again = self.shared
        self.act = nn.Sequential(nn.ReLU(), nn.Dropout())
        self.norm = nn.BatchNorm1d(6)
        self.no_bias = nn.Linear(6, 2, bias=False)
        self.nothing = None
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def normalized() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), parametrizations.orthogonal(nn.Linear(4, 4)))


def pruned() -> nn.Module:
    model = network()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "network": network,
    "root": lambda: nn.Linear(3, 3),
    "odd": Odd,
    "tied": Tied,
    "attention": lambda: nn.MultiheadAttention(8, 2, kdim=4),
    "transformer": lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
    "recurrent": lambda: nn.Sequential(nn.LSTM(4, 3), nn.GRUCell(3, 3)),
    "norms": normalized,
    "pruned": pruned,
    "user types": lambda: nn.Sequential(OwnForward(6, 6), Table()),
    "empty": nn.ReLU,
    "compiled": lambda: nn.Sequential(torch.compile(nn.Linear(4, 4)), nn.Linear(4, 4)),
}  # fmt: skip


def total(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in {id(p): p for p in model.parameters()}.values())


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("recipe", ["int4", "w8a8"])
class TestEveryModel:
    def test_every_parameter_once(self, build: Callable[[], nn.Module], recipe: str) -> None:
        model = build()
        expected = total(model)
        report = prepare(model, recipes.named(recipe))
        assert report.num_weights == sum(row.numel for row in report) == expected
        names = [row.name for row in report]
        assert len(set(names)) == len(names)
        if expected:
            assert sum(map(report.share, ("quantized", "float", "unsupported"))) == pytest.approx(1.0, abs=1e-12)

    def test_same_later(self, build: Callable[[], nn.Module], recipe: str) -> None:
        model = build()
        report = prepare(model, recipes.named(recipe))
        assert report_of(model) == report

    def test_every_row_says_why(self, build: Callable[[], nn.Module], recipe: str) -> None:
        for row in prepare(build(), recipes.named(recipe)):
            assert row.decision in ("quantized", "float", "unsupported")
            assert row.detail

    def test_plain_data_and_table(self, build: Callable[[], nn.Module], recipe: str) -> None:
        report = prepare(build(), recipes.named(recipe))
        data = json.loads(json.dumps(report.to_dict()))
        assert sum(row["numel"] for row in data["rows"]) == data["num_weights"]
        lines = str(report).splitlines()
        assert lines[0].split()[:3] == ["weight", "elements", "decision"]
        assert lines[-1].startswith(f"{report.num_weights:,} elements: ")
        cells = [line.split() for line in lines[1:-1]]
        counts = [int(next(c for c in line if c.replace(",", "").isdigit()).replace(",", "")) for line in cells]
        assert sum(counts) == report.num_weights


def test_reasons() -> None:
    report = prepare(Odd(), Recipe((Rule("no_bias", None), *recipes.int4().rules)))
    reasons = {row.name: (row.decision, row.detail) for row in report}
    assert reasons == {
        "position": ("unsupported", "a parameter of Odd itself, which no rule can reach"),
        "gain": ("float", "one-dimensional: biases, norms"),
        "mixing.0": ("unsupported", "a parameter of ParameterList itself, which no rule can reach"),
        "mixing.1": ("unsupported", "a parameter of ParameterList itself, which no rule can reach"),
        "named.a": ("float", "one-dimensional: biases, norms"),
        "shared.weight": ("quantized", INT4),
        "shared.bias": ("float", "one-dimensional: biases, norms"),
        "norm.weight": ("float", "one-dimensional: biases, norms"),
        "norm.bias": ("float", "one-dimensional: biases, norms"),
        "no_bias.weight": ("float", "rule 'no_bias'"),
        "frozen.weight": ("quantized", INT4),
        "frozen.bias": ("float", "one-dimensional: biases, norms"),
    }


def test_table() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.ModuleDict({"layers": nn.TransformerEncoder(layer, 2), "lstm": nn.LSTM(4, 4), "head": nn.Linear(8, 2)})
    report = prepare(model, Recipe((Rule("head", None), *recipes.int4().rules)))
    lines = str(report).splitlines()
    assert [re.split(r"\s{2,}", line) for line in lines[:-1]] == [
        ["weight", "elements", "decision", "how or why"],
        ["layers.layers.*.self_attn.in_proj_weight (2)", "384", "quantized", INT4],
        ["layers.layers.*.self_attn.out_proj.weight (2)", "128", "quantized", INT4],
        ["layers.layers.*.linear*.weight (4)", "512", "quantized", INT4],
        ["lstm.weight_ih_l0", "64", "unsupported", "LSTM reads its weights as one flat buffer"],
        ["lstm.weight_hh_l0", "64", "unsupported", "LSTM reads its weights as one flat buffer"],
        ["head.weight", "16", "float", "rule 'head'"],
        ["others (19)", "210", "float", "one-dimensional: biases, norms"],
    ]
    assert lines[-1] == "1,378 elements: 74.3 % quantized, 16.4 % float, 9.3 % unsupported; 11.19 bits per weight"
    assert lines[1].index("quantized") == lines[-2].index("float")


def test_details_name_every_part() -> None:
    layer = LayerSpec(QuantizerSpec(Int(4)), TOKENS, (Hadamard(5),))
    report = prepare(nn.Linear(6, 5), recipe_for(layer))
    detail = report.rows[0].detail
    assert detail.startswith("weight int4:channel:learned(mse):clipped, input int8-narrow:token:absmax:ste, hadamard5")


def test_bits_are_those_of_now_and_of_the_dtype() -> None:
    model = network().bfloat16()
    prepare(model, recipe_for(LayerSpec(WEIGHT)))
    assert {row.bits for row in report_of(model)} == {4.0, 16.0}
    model[0].weight_quantizer.set_grid(Int(2))
    report = report_of(model)
    assert [row.bits for row in report][:2] == [2.0, 4.0]
    assert "int2" in report.rows[0].detail
    assert report.bits_per_weight == pytest.approx((48 * 2 + 32 * 4 + 12 * 16) / 92)


def test_problems_are_in_the_table_and_in_check() -> None:
    from lightning_qat.conversion.prepare import convert

    report = convert(network(), Recipe((Rule("heda", None), *recipes.int4().rules)))
    assert "no effect: Rule('heda', ...): matches no layer" in str(report)
    with pytest.raises(ValueError, match="matches no layer"):
        report.check()
