"""Losses as functions: distillation, matching of activations, reasoning, regularization."""

from lightning_qat.losses.boundaries import (
    StepKind,
    boundaries_from_delimiter,
    boundaries_from_function,
    boundaries_from_mask,
    boundary_indices,
    kinds_from_delimiters,
    step_weights,
)
from lightning_qat.losses.distillation import (
    causal_shift,
    jensen_shannon,
    kl_divergence,
    mean_squared_error,
    next_token_mask,
    reverse_kl_divergence,
    soft_cross_entropy,
    target_mask,
    top1_agreement,
)
from lightning_qat.losses.matching import (
    attention_relation_loss,
    hidden_state_cosine,
    hidden_state_mse,
    merge_heads,
)
from lightning_qat.losses.reasoning import (
    ReasoningOutputs,
    ReasoningTerms,
    ReasoningWeights,
    answer_agreement,
    chain_of_thought_fidelity,
    step_consistency,
    trajectory_consistency,
)
from lightning_qat.losses.regularization import (
    bin_regularization,
    grid_distance,
    oscillation_dampening,
    smoothness,
    sparsity,
)

__all__ = [
    "ReasoningOutputs",
    "ReasoningTerms",
    "ReasoningWeights",
    "StepKind",
    "answer_agreement",
    "attention_relation_loss",
    "bin_regularization",
    "boundaries_from_delimiter",
    "boundaries_from_function",
    "boundaries_from_mask",
    "boundary_indices",
    "causal_shift",
    "chain_of_thought_fidelity",
    "grid_distance",
    "hidden_state_cosine",
    "hidden_state_mse",
    "jensen_shannon",
    "kinds_from_delimiters",
    "kl_divergence",
    "mean_squared_error",
    "merge_heads",
    "next_token_mask",
    "oscillation_dampening",
    "reverse_kl_divergence",
    "smoothness",
    "soft_cross_entropy",
    "sparsity",
    "step_consistency",
    "step_weights",
    "target_mask",
    "top1_agreement",
    "trajectory_consistency",
]
