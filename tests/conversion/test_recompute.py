"""recompute_activations(): the same numbers with less kept, by name, with a way back."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import Recipe, add_lora, bake, prepare, recipes
from lightning_qat.conversion import keep_activations, recompute_activations
from lightning_qat.models import Transformer

SIZES: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "num_layers": 3, "window_size": 6}


def net(dropout: float = 0.1) -> Transformer:
    torch.manual_seed(0)
    return Transformer(16, dropout=dropout, **SIZES)


def step(model: nn.Module) -> list[Tensor]:
    """The loss and all gradients of a step with dropout."""
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(torch.randn(4, 6, 16)).square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def kept(model: nn.Module) -> int:
    """Bytes of tensors, parameters apart, that the graph outside of checkpoints holds."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(4, 6, 16)).sum()
    return sum(storages.values())


def quantized() -> nn.Module:
    prepare(model := net(), recipes.w4a8())
    return model


def adapted(base: str) -> nn.Module:
    prepare(model := net(), recipes.int4())
    add_lora(model, 2, dropout=0.5, base=base)
    return model


MODELS: list[Callable[[], nn.Module]] = [net, quantized, partial(adapted, "same"), partial(adapted, "int4")]


@pytest.mark.parametrize("build", MODELS)
def test_the_same_numbers_with_less_kept(build: Callable[[], nn.Module]) -> None:
    plain, saving = build(), build()
    assert recompute_activations(saving, "blocks.*") == ("blocks.0", "blocks.1", "blocks.2")
    for expected, found in zip(step(plain), step(saving), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert kept(saving) < 0.6 * kept(plain)


@pytest.mark.parametrize("recipe", [recipes.int4(), recipes.bitnet()])
@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Conv1d(6, 6, 1)])
def test_layers_without_a_fused_forward(layer: nn.Module, recipe: Recipe) -> None:
    plain = nn.Sequential(nn.Sequential(copy.deepcopy(layer)), nn.Linear(16, 4))
    prepare(plain, recipe)
    recompute_activations(saving := copy.deepcopy(plain), "0")
    for expected, found in zip(step(plain), step(saving), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_outermost_recomputes_and_again_is_a_no_op() -> None:
    model, calls = net(0.0), []
    model.blocks[0].attention.qkv.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr, operator]
    for _ in range(2):
        assert recompute_activations(model, ["blocks.*", "*.attention"]) == ("blocks.0", "blocks.1", "blocks.2")
    step(model)
    assert len(calls) == 2  # forward and backward; three if it were nested
    keep_activations(model)
    assert not any("forward" in vars(module) for module in model.modules())
    keep_activations(model)


def test_evaluation_computes_once() -> None:
    model, calls = net().eval(), []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    recompute_activations(model, "blocks.*")
    with torch.no_grad():
        model(torch.randn(1, 6, 16))
    assert len(calls) == 1


def test_copies_and_pickles_recompute_by_themselves() -> None:
    model = net(0.0)
    recompute_activations(model, "blocks.*")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        held = vars(other.blocks[0])["forward"]
        assert held.args == (other.blocks[0],)
        for expected, found in zip(step(model), step(other), strict=True):
            assert torch.equal(expected, found)


def test_a_baked_model_has_none_of_it() -> None:
    model = quantized().eval()
    recompute_activations(model, "blocks.*")
    baked = bake(model)
    assert not any("forward" in vars(module) for module in baked.modules())
    x = torch.randn(1, 6, 16)
    assert torch.equal(baked(x), model(x))


def test_exports_and_compiles() -> None:
    model, x = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)), torch.randn(3, 4)
    recompute_activations(model, "0")
    assert torch.equal(torch.export.export(model.eval(), (x,)).module()(x), model(x))
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    model(x).sum().backward()
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


class Normed(nn.Module):
    """A block with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out


def test_refusals() -> None:
    model = net()
    for match in (3, [], "", ["blocks.*", 3]):
        with pytest.raises(TypeError, match=r"match=.* is not a glob over names of modules, such as '\*.blocks.\*'"):
            recompute_activations(model, match)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"match=\['block.\*'\] matches no module with a forward; there are blocks.0, "
    ):
        recompute_activations(model, ["block.*", "blocks.1"])
    with pytest.raises(ValueError, match=r"match=\['blocks'\] matches no module with a forward"):  # a list of modules
        recompute_activations(model, "blocks")
    with pytest.raises(ValueError, match=r"0\.norm is BatchNorm1d, whose statistics would see each batch twice"):
        recompute_activations(nn.Sequential(Normed()), "0")
    model.blocks[1].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"another package has replaced the forward of blocks\.1"):
        recompute_activations(model, "blocks.*")
    assert "forward" not in vars(model.blocks[0])
