"""Bytes of a LoRA-QAT step, counted for Qwen2.5-0.5B's shapes, and measured where the step runs for real.

    python -m benchmarks.lora_memory                         # count, without computing: 1 x 512 tokens, all bases
    python -m benchmarks.lora_memory --model small --measure # count and run; peak of the process against the count
    python -m benchmarks.lora_memory --measure --device cuda # where there is a GPU, peak of its allocator

Counted are all storages that are alive, operation by operation, in a step on tensors without data (FakeTensorMode):
no formula, but the same code that trains. Workspaces inside operations are not seen. Measured are, in processes of
their own and without the counter, what torch's allocator gave out (its own events), and on a CPU the growth of the
resident set (VmHWM), which holds also what libraries and operations take for themselves.
The step: random weights in bfloat16, Q(W + BA) at 4 bits with learned scales per channel in all linear layers, the tied
embedding and head frozen in bfloat16; activation checkpointing per block; cross-entropy by pieces; AdamW.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from benchmarks.output import machine, show
from lightning_qat import Recipe, Rule, add_lora, prepare, recipes
from lightning_qat.conversion.state import quantizers
from lightning_qat.quantization.low_rank import LowRank

MEGABYTE = 1e6


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder with grouped queries, gated feed-forward and a tied head."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    feed_forward: int
    num_layers: int
    vocabulary: int
    tokens: int = 512


SHAPES = {
    "qwen2.5-0.5b": Shape(896, 14, 2, 4864, 24, 151936),
    "small": Shape(512, 8, 2, 2048, 8, 32768),
}

TINY = Shape(64, 2, 1, 128, 1, 256, 32)


class Block(nn.Module):
    """Attention with rotary positions and a SwiGLU feed-forward layer, each behind an RMSNorm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = shape.num_heads, shape.num_kv_heads, shape.hidden // shape.num_heads
        inner = self.kv_heads * self.width
        self.norm1, self.norm2 = (nn.RMSNorm(shape.hidden, eps=1e-6) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(shape.hidden, n) for n in (shape.hidden, inner, inner))
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.gate, self.up = (nn.Linear(shape.hidden, shape.feed_forward, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.feed_forward, shape.hidden, bias=False)

    def _heads(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        heads = x.unflatten(-1, (-1, self.width)).transpose(1, 2)
        if rotation is None:
            return heads
        left, right = heads.chunk(2, -1)
        return heads * rotation[0] + torch.cat((-right, left), -1) * rotation[1]

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Add attention and feed-forward: [1, tokens, hidden] -> the same."""
        y = self.norm1(x)
        q, k, v = self._heads(self.q(y), rotation), self._heads(self.k(y), rotation), self._heads(self.v(y), None)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a frozen head. The gradient is made in the forward, while a piece's logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, piece: int) -> Tensor:
        """Return the loss: [tokens, hidden], [vocabulary, hidden], [tokens] -> []."""
        total, grad = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
        for start in range(0, len(targets), piece):
            rows = slice(start, start + piece)
            logits = (hidden[rows] @ head.t()).float()
            index = targets[rows].unsqueeze(1)
            maximum = logits.amax(1, keepdim=True)
            picked = logits.gather(1, index) - maximum
            logits.sub_(maximum).exp_()
            normalizer = logits.sum(1, keepdim=True)
            total += (normalizer.log() - picked).sum()
            logits.div_(normalizer).scatter_add_(1, index, -torch.ones_like(picked))
            grad[rows] = (logits.to(head.dtype) @ head) / len(targets)
            del logits
        ctx.save_for_backward(grad)
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the hidden states."""
        return ctx.saved_tensors[0] * grads[0], None, None, None


class Decoder(nn.Module):
    """The language model; returns the loss of next tokens."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-6)

    def _rotation(self, like: Tensor) -> Tensor:
        width = self.shape.hidden // self.shape.num_heads
        speeds = 1e6 ** -(torch.arange(0, width, 2, device=like.device) / width)
        angles = torch.outer(torch.arange(like.shape[1], device=like.device), speeds).repeat(1, 2)
        return torch.stack((angles.cos(), angles.sin())).to(like.dtype)

    def forward(self, ids: Tensor, piece: int, mark: Callable[[str], None]) -> Tensor:
        """Return the loss: [1, tokens + 1] -> []."""
        x = self.embedding(ids[:, :-1]).requires_grad_()  # else a checkpoint of the first block would not be recomputed
        rotation = self._rotation(x)
        for block in self.blocks:
            x = checkpoint(block, x, rotation, use_reentrant=False, preserve_rng_state=False)
        x = self.norm(x).flatten(0, 1)
        mark("forward, blocks")
        loss: Tensor = ChunkedCrossEntropy.apply(x, self.embedding.weight, ids[0, 1:], piece)
        mark("forward, logits and loss")
        return loss


def build(shape: Shape, rank: int, base: str, device: str) -> Decoder:
    """Return a prepared model with adapters, in bfloat16 but for adapters and scales."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Decoder(shape)
    finally:
        torch.set_default_dtype(default)
    prepare(model, Recipe((Rule("embedding", None), *recipes.int4().rules)))
    add_lora(model, rank, 2.0 * rank, base=base)
    return model


def without_data(model: Decoder, mode: FakeTensorMode) -> Decoder:
    """Return a model on the meta device with tensors that say they are on the CPU; its scales count as found."""
    with mode:
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    empty = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                    module._parameters[name] = nn.Parameter(empty, requires_grad=value.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    for quantizer in quantizers(model).values():
        quantizer.stale, quantizer.calibrated = False, True
    return model


def step(
    model: Decoder, ids: Tensor, optimizer: torch.optim.Optimizer, piece: int, mark: Callable[[str], None]
) -> None:
    """Run one training step."""
    loss = model(ids, piece, mark)
    mark("kept for backward")
    loss.backward()
    mark("backward")
    optimizer.step()
    mark("optimizer")


class Alive(TorchDispatchMode):
    """Adds up the storages that exist, and remembers the most since it was last asked."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.total = self.peak = 0
        self.peaks: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns. A tensor without data that is asked for its number says 1."""
        if function is torch.ops.aten._local_scalar_dense.default:
            with unset_fake_temporarily():
                return 1.0 if isinstance(args[0], FakeTensor) else function(*args)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._drop, storage._cdata)
            self.total += storage.nbytes()
            self.peak = max(self.peak, self.total)

    def _drop(self, key: int) -> None:
        self.total -= self.sizes.pop(key)

    def mark(self, phase: str) -> None:
        """Keep the peak of a phase, or what is alive at its end where it is about that."""
        self.peaks[phase] = self.total if phase == "kept for backward" else self.peak
        self.peak = self.total


def size(tensors: Any) -> int:
    """Return the bytes of tensors, each storage once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def components(model: Decoder) -> dict[str, int]:
    """Return the bytes of what stays: parameters, and the buffers that come with them, by what they are."""
    adapters = [m for m in model.modules() if isinstance(m, LowRank)]
    low_rank = [p for m in adapters for p in m.parameters()]
    scales = [p for m in quantizers(model).values() for p in m.parameters()]
    packed = [m.base_scale for m in adapters if m.base_scale is not None]
    special = {id(p) for p in (*low_rank, *scales, model.embedding.weight)}
    base = [p for p in model.parameters() if id(p) not in special]
    return {
        "embedding and head (tied)": size([model.embedding.weight]),
        "frozen base": size([*base, *packed]),
        "adapters": size(low_rank),
        "scales": size(scales),
    }


def count(shape: Shape, rank: int, base: str, piece: int) -> dict[str, float]:
    """Return MB by component for a step without data."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = without_data(build(shape, rank, base, "meta"), mode)
    with mode, Alive() as alive:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=False)
        ids = torch.zeros(1, shape.tokens + 1, dtype=torch.long)
        for parameter in model.parameters():
            alive.add(parameter)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()  # makes its state
        optimizer.zero_grad()
        gc.collect()
        alive.peak, alive.peaks = alive.total, {}
        resident = alive.total
        step(model, ids, optimizer, piece, alive.mark)
        parts = components(model)
        gradients = size([p.grad for p in model.parameters() if p.grad is not None])
        state = size([v for each in optimizer.state.values() for v in each.values() if isinstance(v, Tensor)])
    peaks = alive.peaks
    kept = peaks.pop("kept for backward") - resident
    most = max(peaks.values())
    where = max(peaks, key=lambda phase: peaks[phase])
    of_loss = peaks["forward, logits and loss"] - resident - kept
    found: dict[str, float] = {
        **parts, "optimizer": state, "gradients": gradients, "kept for backward": kept, "logits (transient)": of_loss,
        "other transients at the peak": most - resident - kept - (gradients if where == "backward" else 0),
    }  # fmt: skip
    found["peak"] = most
    return {name: value / MEGABYTE for name, value in found.items()} | {"peak in": where}


def prepared_steps(shape: Shape, rank: int, base: str, piece: int, device: str) -> Iterator[None]:
    """Build a model and train two steps; yield before the second, when all is there that stays."""
    torch.manual_seed(0)
    model = build(shape, rank, base, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=False)
    ids = torch.randint(shape.vocabulary, (1, shape.tokens + 1), device=device)
    step(model, ids, optimizer, piece, lambda phase: None)
    optimizer.zero_grad()
    gc.collect()
    yield
    step(model, ids, optimizer, piece, lambda phase: None)


def resident_peak(*arguments: Any) -> float:
    """Return by how many MB the resident set of this process grows."""
    for _ in prepared_steps(TINY, *arguments[1:]):  # kernels are loaded and compiled, thread pools made
        gc.collect()
    before = _resident("VmRSS")
    for _ in prepared_steps(*arguments):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    return (_resident("VmHWM") - before) / MEGABYTE


def allocated_peak(*arguments: Any) -> float:
    """Return the most MB that torch's allocator had given out, by its own events (CPU) or statistics (GPU)."""
    if arguments[-1] == "cuda":
        for _ in prepared_steps(*arguments):
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / MEGABYTE
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in prepared_steps(*arguments):
            with record_function("second step"):
                pass
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    start = next(event.start_ns() for event in events if event.name() == "second step")
    total = most = 0
    for event in events:
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total) if event.start_ns() > start else 0
    return most / MEGABYTE


MEASURES = {"allocated": allocated_peak, "resident": resident_peak}


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure(arguments: argparse.Namespace, base: str, how: str) -> float:
    """Measure in a process of its own, whose C library gives back what is freed."""
    given = ["--model", arguments.model, "--rank", str(arguments.rank), "--piece", str(arguments.piece)]
    command = [sys.executable, "-m", "benchmarks.lora_memory", *given, "--base", base, "--device", arguments.device]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    run = subprocess.run([*command, "--here", how], env=environment, capture_output=True, text=True, check=True)
    return float(run.stdout.splitlines()[-1])


def main() -> None:
    """Count, measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument(
        "--base", nargs="+", default=["same", "int8", "int4"], help="how the base is stored; same: bf16"
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--piece", type=int, default=32, help="tokens whose logits exist at a time")
    parser.add_argument("--measure", action="store_true", help="run a step for real, too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--here", choices=MEASURES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = SHAPES[arguments.model]
    if arguments.here:
        print(MEASURES[arguments.here](shape, arguments.rank, arguments.base[0], arguments.piece, arguments.device))
        return
    rows: list[dict[str, Any]] = []
    for base in arguments.base:
        row: dict[str, Any] = {"base": "bfloat16" if base == "same" else base}
        row |= count(shape, arguments.rank, base, arguments.piece)
        for how in MEASURES if arguments.measure else ():
            if how == "allocated" or arguments.device == "cpu":
                row[f"{how}, measured"] = measure(arguments, base, how)
                row[f"{how} / counted"] = row[f"{how}, measured"] / row["peak"]
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    print(", ".join(f"{key}: {value}" for key, value in machine().items()))
    print(f"{arguments.model}, rank {arguments.rank}, 1 x {shape.tokens} tokens, MB = 1e6 bytes")
    show([{"MB": key, **{row["base"]: row[key] for row in rows}} for key in rows[0] if key != "base"])
    if arguments.output:
        settings = {key: getattr(arguments, key) for key in ("model", "rank", "piece", "device")}
        arguments.output.write_text(
            json.dumps({"machine": machine(), "settings": settings, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
