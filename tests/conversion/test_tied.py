"""One parameter in several modules: one decision, one quantizer, one value."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_qat import (
    AbsMax,
    Center,
    Int,
    LayerSpec,
    QuantizerSpec,
    Recipe,
    Rule,
    bake,
    codes,
    load_checkpoint,
    prepare,
    recipes,
)
from lightning_qat.conversion import ConversionReport, ReportRow
from lightning_qat.conversion.view import is_view
from tests.conversion.cases import TOKENS, WEIGHT, WEIGHT_ONLY, Table, Tied, absmax_int4, recipe_for

BOTH = recipe_for(LayerSpec(WEIGHT), nn.Embedding, nn.Linear)
BOTH_LEARNED = recipe_for(LayerSpec(QuantizerSpec(Int(4))), nn.Embedding, nn.Linear)
IDS = torch.tensor([[1, 4, 8]])


def rows(report: ConversionReport) -> dict[str, ReportRow]:
    return {row.name: row for row in report}


class TestDecision:
    def test_embedding_without_rule_keeps_the_head_float(self) -> None:
        model = Tied()
        report = prepare(model, WEIGHT_ONLY)
        row = rows(report)["embed.weight"]
        assert row.decision == "float"
        assert row.detail == (
            "shared by embed.weight and head.weight; embed.weight stays float: no rule is for Embedding"
        )
        assert not is_view(model.head)
        assert is_view(model.body)
        assert model.head.weight is model.embed.weight

    def test_head_in_float_keeps_the_embedding_float(self) -> None:
        model = Tied()
        report = prepare(model, Recipe((Rule("head", None), *BOTH.rules)))
        row = rows(report)["embed.weight"]
        assert row.decision == "float"
        assert "head.weight stays float: rule 'head'" in row.detail
        assert not is_view(model.embed)

    def test_both_quantized(self) -> None:
        model = Tied()
        weight = model.embed.weight
        report = prepare(model, BOTH_LEARNED)
        assert rows(report)["embed.weight"].detail.endswith("also head.weight")
        assert "head.weight" not in rows(report)
        assert model.embed.weight_quantizer is model.head.weight_quantizer
        assert model.get_parameter("embed.weight") is model.get_parameter("head.weight") is weight
        assert torch.equal(model.embed.weight, model.head.weight)
        model(IDS).square().sum().backward()
        assert weight.grad is not None
        assert model.embed.weight_quantizer.scale.grad is not None

    def test_value(self) -> None:
        model, plain = Tied(), Tied()
        plain.load_state_dict(model.state_dict())
        prepare(model, BOTH)
        plain.body.weight = nn.Parameter(absmax_int4(plain.body.weight))
        plain.embed.weight.data = absmax_int4(plain.embed.weight)
        torch.testing.assert_close(model(IDS), plain(IDS))

    def test_report_counts_the_weight_once(self) -> None:
        report = prepare(Tied(), BOTH)
        assert report.num_weights == 9 * 6 + 6 * 6 + 6
        assert sum(row.numel for row in report) == report.num_weights

    def test_only_one_owner_may_also_quantize_its_input(self) -> None:
        model = Tied()
        rules = (Rule("head", LayerSpec(WEIGHT, TOKENS)), *BOTH.rules)
        prepare(model, Recipe(rules))
        assert hasattr(model.head, "input_quantizer")
        assert not hasattr(model.embed, "input_quantizer")

    def test_owner_that_no_rule_can_reach(self) -> None:
        class Reader(nn.Module):
            def __init__(self, table: nn.Parameter) -> None:
                super().__init__()
                self.table = table

        model = nn.ModuleDict({"head": nn.Linear(6, 5)})
        model["reader"] = Reader(model["head"].weight)
        report = prepare(model, recipes.int4())
        assert not is_view(model["head"])
        assert "reader.table is out of reach of rules" in rows(report)["head.weight"].detail

    def test_types_of_the_user(self) -> None:
        model = nn.ModuleDict({"table": Table(), "head": nn.Linear(6, 5)})
        model["head"].weight = model["table"].weight
        report = prepare(model, WEIGHT_ONLY)
        assert "table.weight stays float: no rule is for Table" in rows(report)["table.weight"].detail
        assert not is_view(model["head"])


class TestErrors:
    def test_different_quantizers(self) -> None:
        model = Tied()
        other = LayerSpec(QuantizerSpec(Int(8), scale=AbsMax()))
        with pytest.raises(ValueError, match=r"embed\.weight and head\.weight are one weight, .* the same weight q"):
            prepare(model, Recipe((Rule("head", other), *BOTH.rules)))
        assert not any(map(is_view, model.modules()))

    def test_different_transforms(self) -> None:
        rules = (Rule("head", LayerSpec(WEIGHT, transforms=(Center(),))), *BOTH.rules)
        with pytest.raises(ValueError, match="the same weight quantizer and transforms"):
            prepare(Tied(), Recipe(rules))

    def test_tied_to_a_float_weight_after_prepare(self) -> None:
        model = Tied()
        model.head.weight = nn.Parameter(torch.randn(9, 6))
        prepare(model, WEIGHT_ONLY)
        model.head.weight = model.embed.weight
        with pytest.raises(ValueError, match=r"head\.weight is quantized already, but now it would stay float: shared"):
            prepare(model, WEIGHT_ONLY)


def test_tied_after_prepare_shares_the_quantizer() -> None:
    model = nn.ModuleDict({"first": nn.Linear(6, 6)})
    prepare(model, recipes.int4())
    model["second"] = nn.Linear(6, 6)
    model["second"].weight = model["first"].get_parameter("weight")
    prepare(model, recipes.int4())
    assert model["first"].weight_quantizer is model["second"].weight_quantizer
    assert torch.equal(model["first"].weight, model["second"].weight)


class TestRoundTrip:
    @pytest.mark.parametrize("recipe", [BOTH, BOTH_LEARNED], ids=["absmax", "learned"])
    def test_state_dict(self, recipe: Recipe) -> None:
        model, other = Tied(), Tied()
        prepare(model, recipe)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        prepare(other, recipe)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(IDS), model(IDS))
        assert other.get_parameter("embed.weight") is other.get_parameter("head.weight")
        assert other.embed.weight_quantizer is other.head.weight_quantizer

    def test_float_checkpoint(self, tmp_path: Path) -> None:
        source, model = Tied(), Tied()
        torch.save(source.state_dict(), tmp_path / "float.pt")
        prepare(model, BOTH_LEARNED)
        load_checkpoint(model, tmp_path / "float.pt")
        prepare(source, BOTH_LEARNED)
        assert torch.equal(model(IDS), source(IDS))

    @pytest.mark.parametrize("recipe", [BOTH, BOTH_LEARNED], ids=["absmax", "learned"])
    def test_bake(self, recipe: Recipe) -> None:
        model = Tied()
        prepare(model, recipe)
        baked = bake(model)
        assert baked.embed.weight is baked.head.weight
        assert torch.equal(baked(IDS), model(IDS))
        assert list(codes(model)) == list(codes(baked)) == ["embed.weight", "body.weight"]
        assert torch.equal(codes(baked)["embed.weight"].dequantize(), baked.embed.weight)
