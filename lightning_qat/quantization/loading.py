"""What ``load_state_dict`` leaves out."""

from collections.abc import Iterable


def layer_is_left_out(prefix: str, missing: Iterable[str]) -> bool:
    """Whether a load that lacks a quantizer lacks the weight of its layer, too, so that its scale still fits.

    Args:
        prefix: that of the quantizer's keys.
        missing: keys that were looked for in vain, those of the layer among them.

    >>> layer_is_left_out("0.weight_quantizer.", ["0.weight", "0.bias"])
    True
    >>> layer_is_left_out("1.weight_quantizer.", ["0.weight", "1.bias"])
    False
    """
    layer = prefix.removesuffix(".").rpartition(".")
    within = "".join(layer[:2])
    rest = [key.removeprefix(within) for key in missing if key.startswith(within)]
    return any("weight" in key and ("." not in key or key.startswith("parametrizations.")) for key in rest)
