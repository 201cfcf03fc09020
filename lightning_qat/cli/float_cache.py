"""The float training of a sweep: done once for all jobs that share it."""

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from omegaconf import DictConfig, OmegaConf

PARTS: Final = ("data", "model", "trainer", "callbacks", "seed")


def float_key(cfg: DictConfig) -> str:
    """Return a digest of all that the float weights depend on: data, model, trainer, callbacks, seed, torch's version.

    Where outputs go is left out. A value that differs from job to job gives a key of its own, and a training of its
    own. Code is not part of the key: a cache lives in the folder of one sweep.

    Args:
        cfg: of the float stage, see `lightning_qat.cli.build.stage_config`.
    """
    placeless = copy.deepcopy(cfg)
    placeless.output_dir = ""
    OmegaConf.resolve(placeless)
    parts = OmegaConf.to_container(OmegaConf.masked_copy(placeless, list(PARTS)))
    text = json.dumps([torch.__version__, parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_atomically(target: Path, write: Callable[[str], None]) -> None:
    """Write a file so that other processes see all of it or none.

    Args:
        target: the file. Jobs that finish at the same time write the same content; the last one stays.
        write: called with the path of a temporary file beside it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f"{target.name}.")
    os.close(descriptor)
    try:
        write(temporary)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
