"""AdamW with weight decay where it belongs and a schedule of warm-up and cosine."""

import math
from functools import cache, partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.nn.modules.conv import _ConvNd


def weight_decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups: weights of linear, convolution and attention layers decay, all else does not.

    All else is biases, norms, embeddings, a weight tied to an embedding, and scales. Frozen parameters are left out.

    Args:
        module: the model.
        weight_decay: of the first group, 0 or more.

    Example:
        >>> groups = weight_decay_groups(nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2)), 0.1)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.1), (3, 0.0)]
    """
    owners = (nn.Linear, nn.MultiheadAttention, _ConvNd)
    others = {
        id(parameter)
        for owner in module.modules()
        for parameter in owner.parameters(recurse=False)
        if not isinstance(owner, owners) or parameter.dim() < 2
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in others], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in others], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def warmup_cosine(step: int, *, num_steps: int, num_warmup: int) -> float:
    """Return the factor of the learning rate at an optimizer step.

    (step + 1) / num_warmup while step < num_warmup, then (1 + cos(pi t)) / 2 with t = the share of the remaining steps
    that is done: 1 at the end of the warm-up, 0 after num_steps.

    Args:
        step: counted from 0.
        num_steps: of the whole training, at least 1.
        num_warmup: 0 .. num_steps.

    Example:
        >>> [round(warmup_cosine(step, num_steps=6, num_warmup=2), 3) for step in range(7)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < num_warmup:
        return (step + 1) / num_warmup
    done = min(1.0, (step - num_warmup) / max(1, num_steps - num_warmup))
    return (1.0 + math.cos(math.pi * done)) / 2.0


def adamw_with_cosine(
    module: L.LightningModule, *, learning_rate: float, weight_decay: float, warmup_fraction: float
) -> OptimizerLRScheduler:
    """Return what ``configure_optimizers`` gives: AdamW and `warmup_cosine` over all steps, stepped at each of them.

    Args:
        module: attached to a trainer, whose ``estimated_stepping_batches`` is the length of the schedule.
        learning_rate: the highest, after the warm-up.
        weight_decay: of weights, see `weight_decay_groups`.
        warmup_fraction: share of the steps in the warm-up, [0, 1].

    Raises:
        ValueError: if the trainer has no end (neither max_epochs nor max_steps); on resume at the first step.
    """
    num_steps = cache(partial(_num_steps, module))
    if not module.trainer.ckpt_path:
        num_steps()  # a run without end is an error now
    optimizer = torch.optim.AdamW(weight_decay_groups(module, weight_decay), lr=learning_rate)

    def factor(step: int) -> float:
        if step == 0 and module.trainer.ckpt_path:
            return 0.0  # of no effect: the optimizer takes its rates from the checkpoint
        return warmup_cosine(step, num_steps=num_steps(), num_warmup=round(warmup_fraction * num_steps()))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _num_steps(module: L.LightningModule) -> int:
    """Return the number of optimizer steps of the run.

    Counting makes Lightning set up the data, and data that are set up before a resumed run has restored its loops start
    the epoch again: on resume this must wait for the first step.
    """
    found = module.trainer.estimated_stepping_batches
    if math.isinf(found):
        raise ValueError(
            f"{type(module).__name__}: the cosine schedule needs an end of training, but the trainer has none; "
            "give Trainer(max_steps=...), or max_epochs=... with data of known length"
        )
    return int(found)
