"""What holds for every loss: it never waits for an accelerator, and it compiles into one graph."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_qat import losses
from lightning_qat.losses import ReasoningOutputs

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def fidelity(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return losses.chain_of_thought_fidelity(
        ReasoningOutputs(student, student), ReasoningOutputs(teacher, teacher), boundaries=mask, answer_mask=mask
    ).total


RUNS: dict[str, Run] = {
    "kl_divergence": lambda s, t, m: losses.kl_divergence(s, t, mask=m),
    "reverse_kl_divergence": lambda s, t, m: losses.reverse_kl_divergence(s, t, mask=m),
    "jensen_shannon": lambda s, t, m: losses.jensen_shannon(s, t, mask=m),
    "soft_cross_entropy": lambda s, t, m: losses.soft_cross_entropy(s, t, mask=m),
    "mean_squared_error": lambda s, t, m: losses.mean_squared_error(s, t, mask=m),
    "top1_agreement": lambda s, t, m: losses.top1_agreement(s, t, mask=m),
    "hidden_state_mse": lambda s, t, m: losses.hidden_state_mse(s, t, mask=m),
    "hidden_state_nmse": lambda s, t, m: losses.hidden_state_nmse(s, t, mask=m),
    "hidden_state_log_nmse": lambda s, t, m: losses.hidden_state_log_nmse(s, t, mask=m),
    "hidden_state_cosine": lambda s, t, m: losses.hidden_state_cosine(s, t, mask=m),
    "relations": lambda s, t, m: losses.attention_relation_loss([s], [t], num_relation_heads=2, mask=m),
    "fidelity": fidelity,
    "grid_distance": lambda s, t, m: losses.grid_distance(s, t, scale=0.5),
    "bin_regularization": lambda s, t, m: losses.bin_regularization(s, t.round().clamp(-2, 1), scale=0.5, lo=-2, hi=1),
    "oscillation_dampening": lambda s, t, m: losses.oscillation_dampening(s, t, lower=-1.0, upper=1.0),
    "sparsity": lambda s, t, m: losses.sparsity(s),
    "smoothness": lambda s, t, m: losses.smoothness(s),
}
each_loss = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 6, generator=generator) for _ in range(2))
    return student, teacher, torch.rand(2, 5, generator=generator) < 0.6


@each_loss
def test_nothing_waits_for_the_device(run: Run) -> None:
    """On the meta device nothing can look at data, as nothing may that has to wait for an accelerator."""
    result = run(*(x.to("meta") for x in data()))
    assert result.is_meta
    assert result.shape == ()


@each_loss
def test_one_graph(run: Run) -> None:
    """Traced without a break, value and gradient are those of eager mode."""

    def gradient(function: Run) -> tuple[Tensor, Tensor | None]:
        student, teacher, mask = data()
        student.requires_grad_()
        loss = function(student, teacher, mask)
        if loss.requires_grad:
            loss.backward()
        return loss.detach(), student.grad

    torch.compiler.reset()
    traced = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(traced), gradient(run), rtol=1e-6, atol=1e-7)
