"""The reasoning term of Distillation: where steps end, where the answer stands, what each term weighs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_qat.callbacks.capture import describe, find_layers, find_tensor
from lightning_qat.losses import ReasoningOutputs, ReasoningTerms, ReasoningWeights, chain_of_thought_fidelity
from lightning_qat.quantization._checks import check_number

_ALL = ReasoningWeights()


@final
@dataclass(frozen=True)
class ReasoningMatch:
    r"""The student reasons in the teacher's steps: :math:`weight \cdot L_{reasoning}` next to the distillation loss.

    L_reasoning = weights.step * (1 - cosine of hidden states at the ends of steps) + weights.trajectory * (1 - cosine
    of their change from step to step) + weights.answer * KL on the answer, see
    :func:`lightning_qat.losses.chain_of_thought_fidelity`. Student and teacher each run once: logits and hidden states
    come from the forwards that `Distillation` sees.

    Args:
        match: glob over dotted module names that matches the one layer whose outputs ``[batch, seq, features]`` are the
            hidden states, usually the last block or the norm after it.
        boundaries: function of the batch: boolean ``[batch, seq]``, True at the last token of each step. `BatchMask`
            where the batch holds it, `DelimiterMask` where a token ends a step.
        answer: function of the batch: boolean ``[batch, seq]``, True where logits predict the answer. None where the
            data marks none: then ``weights.answer`` must be 0.
        step_weights: function of the batch: weights ``[batch, seq]`` of the steps that end there, such as
            `KindWeights`; None: all 1.
        weights: of the three terms; ``ReasoningWeights.named("mathematics")`` and ``"code"`` are presets.
        weight: factor of the sum, not negative.
        max_steps: only the last so many steps of each sequence; less memory.
        select: takes the hidden states from the layer's output; by default as :class:`Distillation` does.

    Raises:
        TypeError: what is no function where one is needed, weights of another kind.
        ValueError: values out of range, an answer term without ``answer``. At fit start: a pattern that does not match
            one layer. In the first step: a batch without the named entry, masks of another shape than the tokens.

    Source: as `lightning_qat.losses.reasoning`.
    """

    match: str
    boundaries: Callable[[Any], Tensor]
    answer: Callable[[Any], Tensor] | None = None
    step_weights: Callable[[Any], Tensor] | None = None
    weights: ReasoningWeights = _ALL
    weight: float = 1.0
    max_steps: int | None = None
    select: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        self._check_kinds()
        at_least_0 = "a value not negative"
        check_number("ReasoningMatch: weight", self.weight, at_least_0, holds=lambda v: 0 <= v < float("inf"))
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"ReasoningMatch: max_steps={self.max_steps}; choose at least 1, or None for all steps")
        if self.answer is None and self.weights.answer > 0:
            raise ValueError(
                f"ReasoningMatch: weights.answer={self.weights.answer} without answer=...; pass a function of the "
                "batch that marks the answer, such as BatchMask('answer_mask'), or weights=ReasoningWeights(answer=0.0)"
            )

    def _check_kinds(self) -> None:
        for name in ("boundaries", "answer", "step_weights", "select"):
            value = getattr(self, name)
            if not callable(value) and (value is not None or name == "boundaries"):
                hint = f"BatchMask({value!r})" if isinstance(value, str) else f"DelimiterMask({value!r})"
                raise TypeError(
                    f"ReasoningMatch: {name}={value!r} is not a function{'' if name == 'select' else ' of the batch'}; "
                    f"give one{f', such as {hint}' if name in ('boundaries', 'answer') and value is not None else ''}"
                )
        if not isinstance(self.weights, ReasoningWeights):
            raise TypeError(
                f"ReasoningMatch: weights={self.weights!r} is not a ReasoningWeights; give ReasoningWeights(step=0.3, "
                "trajectory=0.5, answer=0.2), or a preset, ReasoningWeights.named('mathematics')"
            )

    def find_layer(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the one layer that ``match`` names, by its name.

        Raises:
            ValueError: none matches, or several do.
        """
        found = find_layers(model, self.match, "ReasoningMatch")
        if len(found) > 1:
            raise ValueError(
                f"Distillation: ReasoningMatch(match={self.match!r}) matches {len(found)} modules of "
                f"{type(model).__name__}, expected one; choose one of {list(found)[:8]}"
            )
        return found

    def terms(self, student: tuple[Any, Tensor], teacher: tuple[Any, Tensor], batch: Any) -> ReasoningTerms:
        """Return the reasoning loss, without ``weight``, and its terms.

        Args:
            student: output of the layer, and logits `[batch, seq, classes]`.
            teacher: the same of the teacher.
            batch: of the training step.
        """
        boundaries = self.boundaries(batch)
        return chain_of_thought_fidelity(
            self._outputs(*student),
            self._outputs(*teacher),
            boundaries=boundaries,
            answer_mask=torch.zeros_like(boundaries) if self.answer is None else self.answer(batch),
            weights=self.weights,
            kind_weights=None if self.step_weights is None else self.step_weights(batch),
            max_steps=self.max_steps,
        )

    def _outputs(self, output: Any, logits: Tensor) -> ReasoningOutputs:
        hidden = find_tensor(output) if self.select is None else self.select(output)
        if hidden is None or hidden.dim() != 3:
            what = describe(output) if hidden is None else f"a tensor of shape {list(hidden.shape)}"
            raise ValueError(
                f"Distillation: ReasoningMatch(match={self.match!r}): the layer gives {what}, expected hidden states "
                "[batch, seq, features]; match another layer, or pass select=lambda output: ..."
            )
        return ReasoningOutputs(hidden, logits)
