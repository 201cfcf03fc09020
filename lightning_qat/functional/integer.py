"""Products of integer codes: int8 x int8 with int32 accumulation, exact, and whether they pay on a device."""

import time
from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_FEATURES: Final = 1 << 17
"""Up to here, exclusive, a sum of products of two int8 codes fits into int32, whatever the codes."""

_CHUNK: Final = 1 << 17  # elements of the result that are scaled at a time: they then stay in the cache
_WORTHWHILE: Final = 1.25  # how many times faster integers must be to be chosen; below, the measurement is noise
_SAMPLE: Final = {"cpu": (512, 512, 512), "cuda": (2048, 2048, 2048)}  # tokens, inputs, outputs of the timed product
_REPETITIONS: Final = 5
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_EXACT: Final[dict[str, bool]] = {}
_MEASURED: Final[dict[tuple[str, torch.dtype], bool]] = {}


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    r"""Return :math:`a b^T` exactly, in int32.

    Args:
        a: int8, [tokens, features], fewer than 2^17 features.
        b: int8, [outputs, features].

    >>> integer_product(torch.tensor([[-128, 1]], dtype=torch.int8), torch.tensor([[127, 3]], dtype=torch.int8))
    tensor([[-16253]], dtype=torch.int32)
    """
    if a.device.type == "cuda":
        return _padded_product(a, b)
    if 0 in (*a.shape, *b.shape):
        return torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    # Flattened and back: strides of dimensions of size 1 may be anything, and the kernel on CPU believes them.
    return torch._int_mm(a.flatten().view(a.shape), b.flatten().view(b.shape).t())


def _padded_product(a: Tensor, b: Tensor) -> Tensor:
    """Pad with zeros to what cuBLAS takes: more than 16 tokens, features and outputs in multiples of 8."""
    (tokens, features), outputs = a.shape, b.shape[0]
    a, b = _padded(a, max(17, tokens), _eights(features)), _padded(b, _eights(outputs), _eights(features))
    product = torch._int_mm(a.contiguous(), b.contiguous().t())
    return product if product.shape == (tokens, outputs) else product[:tokens, :outputs]


def _eights(size: int) -> int:
    return max(8, -(-size // 8) * 8)


def _padded(codes: Tensor, rows: int, features: int) -> Tensor:
    missing = features - codes.shape[1], rows - codes.shape[0]
    return F.pad(codes, (0, missing[0], 0, missing[1])) if any(missing) else codes  # pad() copies in any case


def scaled_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, *, dtype: torch.dtype
) -> Tensor:
    r"""Return :math:`(\sum_k a_{ik} b_{jk}) s_i t_j + bias_j`: exact up to the roundings of the epilogue.

    Every element depends on its own row and column alone, so that results do not depend on how a batch is split.

    Args:
        a: int8 codes, [tokens, features].
        b: int8 codes, [outputs, features].
        a_scale: s, [tokens, 1] or [1, 1], float32 or float64; the epilogue is computed in its dtype.
        b_scale: t, [1, outputs] or [1, 1].
        bias: [outputs] or None.
        dtype: of the result.

    >>> a, b = torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([[3, 4]], dtype=torch.int8)
    >>> scaled_product(a, b, torch.tensor([[0.5]]), torch.tensor([[0.1]]), None, dtype=torch.float32)
    tensor([[0.5500]])
    """
    total = integer_product(a, b)
    shift = None if bias is None else bias.to(a_scale.dtype)
    rows = max(1, _CHUNK // max(1, total.shape[1]))
    if total.device.type != "cpu" or torch.compiler.is_compiling() or rows >= total.shape[0]:
        return _scaled(total, a_scale, b_scale, shift).to(dtype)
    out = torch.empty(total.shape, dtype=dtype)
    for start in range(0, total.shape[0], rows):
        part = slice(start, start + rows)
        out[part] = _scaled(total[part], a_scale if a_scale.shape[0] == 1 else a_scale[part], b_scale, shift)
    return out


def _scaled(total: Tensor, a_scale: Tensor, b_scale: Tensor, shift: Tensor | None) -> Tensor:
    out = total.to(a_scale.dtype).mul_(a_scale).mul_(b_scale)
    return out if shift is None else out.add_(shift)


def integers_are_exact(device: str) -> bool:
    """Whether a device multiplies int8 matrices, and exactly: some CPUs saturate sums of pairs at 16 bits.

    Tried once per process. While ``torch.compile`` traces nothing can be tried: what was not tried before is not exact.

    Args:
        device: type of the device, such as ``"cpu"``.
    """
    if device not in _EXACT and not torch.compiler.is_compiling():
        _EXACT[device] = device in ("cpu", "cuda") and _try_extremes(device)
    return _EXACT.get(device, False)


def _try_extremes(device: str) -> bool:
    extremes = torch.tensor([-128, -127, 1, 127], dtype=torch.int8, device="cpu")  # whatever the default device is
    a, b = extremes.repeat(8).unsqueeze(1).repeat(1, 64), extremes.repeat(2).unsqueeze(1).repeat(1, 64)
    try:
        found = integer_product(a.to(device), b.to(device))
    except RuntimeError:  # no kernel for this device
        return False
    return torch.equal(found.long().cpu(), a.long() @ b.long().t())


def integers_pay(device: str, dtype: torch.dtype) -> bool:
    """Whether integer products are exact and faster than those of a floating dtype, measured once per process.

    While ``torch.compile`` traces nothing can be measured: what was not measured before does not pay then.

    Args:
        device: type of the device, such as ``"cpu"``.
        dtype: in which the layer would compute otherwise.
    """
    key = (device, dtype)
    if key not in _MEASURED and not torch.compiler.is_compiling():
        _MEASURED[key] = _measure(device, dtype)
    return _MEASURED.get(key, False)


def measure_integers() -> None:
    """Measure, for every device and dtype that training uses here, whether integer products pay."""
    for dtype in _DTYPES:
        if torch.cuda.is_available():
            integers_pay("cuda", dtype)
        if dtype != torch.float16:  # CPUs train in the other two
            integers_pay("cpu", dtype)


@torch.no_grad()
def _measure(device: str, dtype: torch.dtype) -> bool:
    if dtype not in _DTYPES or not integers_are_exact(device):
        return False
    tokens, features, outputs = _SAMPLE[device]
    x, w = (torch.ones(n, features, device=device, dtype=dtype) for n in (tokens, outputs))
    a, b = (torch.ones(n, features, device=device, dtype=torch.int8) for n in (tokens, outputs))
    times = [
        (_seconds(lambda: torch.mm(x, w.t()), device), _seconds(lambda: integer_product(a, b), device))
        for _ in range(_REPETITIONS)
    ][1:]  # the first warms up
    return min(floats for floats, _ in times) > _WORTHWHILE * min(integers for _, integers in times)


def _seconds(run: Callable[[], Tensor], device: str) -> float:
    """Return how long a call takes; on a CPU its CPU time, so that other processes do not change the decision."""
    if device != "cuda":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start
