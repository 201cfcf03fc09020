"""Every type of layer: which weights read as quantized, which inputs, against naive formulas."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import LayerSpec, prepare
from lightning_qat.conversion.view import latent
from tests.conversion.cases import (
    EVERYTHING,
    LAYERS,
    TOKENS,
    WEIGHT,
    WEIGHT_ONLY,
    OwnForward,
    Table,
    absmax_int4,
    absmax_int8_tokens,
    recipe_for,
    run,
)

each_layer = pytest.mark.parametrize(("build", "sample", "axis"), LAYERS.values(), ids=LAYERS)
CONVOLUTIONS = [name for name in LAYERS if name.startswith(("conv", "trans"))]


@each_layer
def test_weight_reads_as_the_naive_formula(
    build: Callable[[], nn.Module], sample: Callable[[], Tensor], axis: int
) -> None:
    layer = build()
    plain = build()
    plain.load_state_dict(layer.state_dict())
    prepare(layer, recipe_for(LayerSpec(WEIGHT), *EVERYTHING))
    expected = absmax_int4(plain.weight, axis)
    assert torch.equal(layer.weight, expected)
    plain.weight = nn.Parameter(expected)
    x = sample()
    assert torch.equal(run(layer, x), run(plain, x))


@each_layer
def test_gradient_reaches_the_latent_weight(
    build: Callable[[], nn.Module], sample: Callable[[], Tensor], axis: int
) -> None:
    layer = build()
    parameter = layer.weight
    prepare(layer, recipe_for(LayerSpec(WEIGHT), *EVERYTHING))
    run(layer, sample()).square().sum().backward()
    assert dict(layer.named_parameters())["weight"] is parameter
    assert parameter.grad is not None
    assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["linear", *CONVOLUTIONS])
def test_input_reads_as_the_naive_formula(name: str) -> None:
    build, sample, axis = LAYERS[name]
    layer, plain = build(), build()
    plain.load_state_dict(layer.state_dict())
    plain.weight = nn.Parameter(absmax_int4(plain.weight, axis))
    prepare(layer, recipe_for(LayerSpec(WEIGHT, TOKENS)))
    x = sample()
    expected = plain(absmax_int8_tokens(x, x.dim() - 1 if name != "linear" else 1))
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer(input=x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["embedding", "bag", "bilinear"])
def test_error_where_an_input_cannot_be_quantized(name: str) -> None:
    with pytest.raises(ValueError, match=r"input of .* cannot be quantized: .*; use LayerSpec\(weight=\.\.\.\)"):
        prepare(LAYERS[name][0](), recipe_for(LayerSpec(WEIGHT, TOKENS), *EVERYTHING))


def test_convolution_without_batch() -> None:
    layer = nn.Conv2d(3, 4, 3)
    prepare(layer, recipe_for(LayerSpec(WEIGHT, TOKENS)))
    x = torch.randn(3, 6, 6)
    torch.testing.assert_close(layer(x), layer(x[None])[0])


class TestAttention:
    def pair(self, **arguments: int) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
        attention = nn.MultiheadAttention(8, 2, batch_first=True, **arguments)
        plain = nn.MultiheadAttention(8, 2, batch_first=True, **arguments)
        plain.load_state_dict(attention.state_dict())
        names = [name for name, p in plain.named_parameters() if p.dim() == 2]
        assert len(names) == (4 if arguments else 2)
        with torch.no_grad():
            for name in names:
                plain.get_parameter(name).copy_(absmax_int4(plain.get_parameter(name)))
        return attention, plain

    @pytest.mark.parametrize("arguments", [{}, {"kdim": 6, "vdim": 4}], ids=["packed", "separate"])
    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    def test_value(self, arguments: dict[str, int], grad: bool, training: bool) -> None:
        attention, plain = self.pair(**arguments)
        prepare(attention, WEIGHT_ONLY)
        attention.train(training)
        plain.train(training)
        query = torch.randn(2, 3, 8)
        key, value = torch.randn(2, 5, arguments.get("kdim", 8)), torch.randn(2, 5, arguments.get("vdim", 8))
        with torch.set_grad_enabled(grad):
            got, expected = attention(query, key, value), plain(query, key, value)
        torch.testing.assert_close(got, expected)

    def test_every_projection_matters(self) -> None:
        attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
        prepare(attention, WEIGHT_ONLY)
        attention(torch.randn(3, 2, 8), torch.randn(3, 2, 6), torch.randn(3, 2, 4))[0].square().sum().backward()
        weights = {name: p for name, p in attention.named_parameters() if p.dim() == 2}
        assert sorted(weights) == ["k_proj_weight", "out_proj.weight", "q_proj_weight", "v_proj_weight"]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in weights.values())

    @pytest.mark.parametrize("arguments", [{}, {"kdim": 6, "vdim": 4}], ids=["packed", "separate"])
    def test_inputs(self, arguments: dict[str, int]) -> None:
        attention, plain = self.pair(**arguments)
        report = prepare(attention, recipe_for(LayerSpec(WEIGHT, TOKENS)))
        inputs = (
            torch.randn(2, 3, 8),
            torch.randn(2, 5, arguments.get("kdim", 8)),
            torch.randn(2, 5, arguments.get("vdim", 8)),
        )
        expected = plain(*map(absmax_int8_tokens, inputs))[0]
        torch.testing.assert_close(attention(*inputs)[0], expected)
        torch.testing.assert_close(attention(query=inputs[0], key=inputs[1], value=inputs[2])[0], expected)
        assert "weight only" in next(row for row in report if row.name == "out_proj.weight").detail

    def test_same_tensor_stays_the_same(self) -> None:
        """Attention tests whether query, key and value are one object."""
        attention, _ = self.pair()
        prepare(attention, recipe_for(LayerSpec(WEIGHT, TOKENS)))
        x = torch.randn(2, 3, 8)
        seen: list[tuple[Tensor, ...]] = []
        attention.register_forward_pre_hook(lambda module, args: seen.append(args))
        attention(x, x, x)
        assert seen[0][0] is seen[0][1] is seen[0][2]
        assert seen[0][0] is not x


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("inputs", [None, TOKENS], ids=["weights", "weights and inputs"])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_evaluates_as_it_trains(
    context: Callable[[], torch.no_grad], inputs: None, masked: bool, recwarn: pytest.WarningsRecorder
) -> None:
    """The fast path of nn.TransformerEncoderLayer, nested tensors included, reads the quantized weights."""
    float_model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = torch.randn(3, 4, 8)
    mask = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]]).bool() if masked else None
    before = float_model(x, src_key_padding_mask=mask)
    prepare(float_model, recipe_for(LayerSpec(WEIGHT, inputs)))
    expected = float_model(x, src_key_padding_mask=mask)
    with context():
        got = float_model(x, src_key_padding_mask=mask)
    keep = slice(None) if mask is None else ~mask  # the fast path leaves zeros where nothing is attended
    torch.testing.assert_close(got[keep], expected[keep].detach())
    assert (expected - before).abs().max() > 0.01


def test_own_forward_is_kept() -> None:
    layer = OwnForward(6, 5)
    weight = absmax_int4(layer.weight)
    prepare(layer, recipe_for(LayerSpec(WEIGHT, TOKENS)))
    x = torch.randn(3, 6)
    expected = 2.0 * (absmax_int8_tokens(x) @ weight.T) + 7.0
    torch.testing.assert_close(layer(x, gain=2.0), expected)
    torch.testing.assert_close(layer(tokens=x, gain=2.0), expected)


def test_type_of_the_user() -> None:
    layer = nn.ModuleDict({"table": Table()})
    report = prepare(layer, recipe_for(LayerSpec(WEIGHT, TOKENS), Table))
    weight = absmax_int4(latent(layer["table"], "weight"))
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer["table"](features=x), absmax_int8_tokens(x) @ weight.T)
    assert report.share("quantized") == 1.0


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_recurrent_cells(kind: Callable[[int, int], nn.Module]) -> None:
    cell, plain = kind(4, 3), kind(4, 3)
    plain.load_state_dict(cell.state_dict())
    prepare(cell, recipe_for(LayerSpec(WEIGHT), nn.RNNCellBase))
    for name in ("weight_ih", "weight_hh"):
        setattr(plain, name, nn.Parameter(absmax_int4(plain.get_parameter(name))))
    x = torch.randn(2, 4)
    torch.testing.assert_close(cell(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_other_dtypes_are_reported(dtype: torch.dtype) -> None:
    """As of layers that somebody else has quantized: codes are no weights."""
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(packed.weight.detach().to(dtype), requires_grad=False)
    rows = {row.name: row for row in prepare(nn.Sequential(packed, nn.Linear(4, 4)), recipe_for(LayerSpec(WEIGHT)))}
    assert rows["0.weight"].decision == "unsupported"
    assert rows["0.weight"].detail == f"its weight is in {dtype}, not in floating point of 16 bits or more"
    assert rows["1.weight"].decision == "quantized"
    assert packed.weight is packed._parameters["weight"]


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_are_reported(kind: Callable[[int, int], nn.Module]) -> None:
    model = nn.ModuleDict({"recurrent": kind(4, 3), "head": nn.Linear(3, 2)})
    report = prepare(model, WEIGHT_ONLY)
    rows = {row.name: row for row in report}
    assert rows["recurrent.weight_hh_l0"].decision == "unsupported"
    assert "flat buffer" in rows["recurrent.weight_hh_l0"].detail
    assert rows["head.weight"].decision == "quantized"


class TestEmbedding:
    def test_gathered_rows_equal_the_quantized_table(self) -> None:
        layer = nn.Embedding(9, 4)
        table = absmax_int4(layer.weight)
        prepare(layer, recipe_for(LayerSpec(WEIGHT), nn.Embedding))
        ids = torch.tensor([3, 3, 8])
        assert torch.equal(layer(ids), table[ids])

    def test_padding_row_stays_zero(self) -> None:
        layer = nn.Embedding(9, 4, padding_idx=2)
        prepare(layer, recipe_for(LayerSpec(WEIGHT), nn.Embedding))
        layer(torch.arange(9)).square().sum().backward()
        assert torch.equal(layer(torch.tensor([2])), torch.zeros(1, 4))
        grad = layer._parameters["weight"].grad
        assert torch.equal(grad[2], torch.zeros(4))

    @pytest.mark.parametrize("arguments", [{"max_norm": 1.0}, {"sparse": True}])
    def test_what_acts_on_the_table_itself_is_reported(self, arguments: dict[str, float]) -> None:
        layer = nn.ModuleDict({"embed": nn.Embedding(9, 4, **arguments), "other": nn.Embedding(9, 4)})
        report = prepare(layer, recipe_for(LayerSpec(WEIGHT), nn.Embedding))
        assert [row.decision for row in report] == ["unsupported", "quantized"]
        assert next(iter(arguments)) in report.rows[0].detail
