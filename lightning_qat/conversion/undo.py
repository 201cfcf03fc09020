"""The way back from prepare(): for good, or for the length of a context."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_qat.conversion._checks import check_model
from lightning_qat.conversion.fused import ARITHMETIC
from lightning_qat.conversion.inputs import ARGUMENTS, quantize_inputs, remove_hook
from lightning_qat.conversion.lora import fold_adapters
from lightning_qat.conversion.nested import restore_nested
from lightning_qat.conversion.state import forget, quantizers, refresh_after_load
from lightning_qat.conversion.view import (
    INPUT_QUANTIZER,
    QUANTIZER_SUFFIX,
    TRANSFORMS,
    check_detachable,
    detach,
    view_names,
)


def unprepare(model: nn.Module) -> nn.Module:
    """Give back the plain float model with its latent weights, in place; a model that is not prepared stays as it is.

    LoRA adapters are merged into the weights, which get the dtype that their layers compute in.

    Raises:
        TypeError: if model is no module.
        RuntimeError: if a class was put on top of a prepared module since (``fully_shard``).
    """
    check_model("unprepare", model)
    for module in model.modules():
        check_detachable(module)
    fold_adapters(model, exact=False)
    for module in list(model.modules()):
        ours = [name + QUANTIZER_SUFFIX for name in view_names(module)]
        if ours:
            detach(module)
        if ARGUMENTS in vars(module):
            remove_hook(module, quantize_inputs)
            delattr(module, ARGUMENTS)
            ours.append(INPUT_QUANTIZER)
        for name in (*ours, TRANSFORMS):
            module._modules.pop(name, None)
        for key, hook in list(module._load_state_dict_post_hooks.items()):
            if hook is refresh_after_load:
                del module._load_state_dict_post_hooks[key]
        vars(module).pop(ARITHMETIC, None)
        restore_nested(module)
        forget(module)
    return model


@contextmanager
def float_weights(model: nn.Module) -> Iterator[None]:
    """Turn quantization of weights and inputs off inside the context: the model computes with its latent weights."""
    check_model("float_weights", model)
    present = list(quantizers(model).values())
    before = [quantizer.enabled for quantizer in present]
    try:
        for quantizer in present:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, enabled in zip(present, before, strict=True):
            quantizer.enabled = enabled
