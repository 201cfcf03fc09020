"""What can be told to be wrong in a configuration before anything is built, under the key where it stands."""

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from lightning_qat.cli.build import FLOAT, QAT
from lightning_qat.cli.errors import nearest

_PLAIN: Final = (int, float, bool, str, NoneType)
_MOST_SEED: Final = 2**32 - 1
_DIRECTIONS: Final = ("min", "max")


def check_values(cfg: DictConfig) -> None:
    """Check seed, files, directions of metrics, and the arguments of data, model and trainer of both stages.

    Text is refused where an argument is annotated with other plain types alone, as most of ours and Lightning's are.

    Args:
        cfg: of the job.

    Raises:
        ValueError: naming the key, what was given, and what is allowed.
    """
    if type(cfg.seed) is not int or not 0 <= cfg.seed <= _MOST_SEED:
        raise ValueError(f"seed={cfg.seed!r} is not allowed; choose an integer from 0 to {_MOST_SEED}")
    for stage in (FLOAT, QAT):
        path = cfg[stage].checkpoint
        if path is not None and not Path(str(path)).is_file() and not (stage == QAT and _is_lightnings(str(path))):
            raise ValueError(f"{stage}.checkpoint={str(path)!r} is not a file; give a checkpoint, or null for none")
    _check_directions(cfg.report.metrics)
    for name in ("data", "model", "trainer"):
        _check_node(name, _plain(cfg.get(name)), {})
        for stage in (FLOAT, QAT):
            _check_node(f"{stage}.{name}", _plain(cfg[stage].get(name)), _plain(cfg.get(name)))


def _is_lightnings(path: str) -> bool:
    """Whether a path is one that Trainer.fit alone understands: a word, or an address."""
    return path in ("best", "last", "hpc") or path.startswith("registry") or "://" in path


def _check_directions(metrics: Any) -> None:
    if not isinstance(metrics, Mapping) or not metrics:
        raise ValueError(f"report.metrics={metrics!r} is not allowed; give metrics by name, such as {{accuracy: max}}")
    for name, direction in metrics.items():
        if direction not in _DIRECTIONS:
            raise ValueError(f"report.metrics.{name}={direction!r} is not allowed; choose min or max")


def _plain(node: Any) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else {}
    return dict(plain)


def _check_node(key: str, node: dict[str, Any], base: dict[str, Any]) -> None:
    """Check the arguments that a node gives to its target, or to that of the node which it changes."""
    try:
        target = get_object(str(node.get("_target_", base.get("_target_"))))
        parameters = inspect.signature(target).parameters
    except (ImportError, ValueError, TypeError):
        return  # Hydra says so when it builds the node
    takes_more = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    types = _types(target)
    for name, value in node.items():
        if name.startswith("_") or value == "???":
            continue
        if name not in parameters and not takes_more:
            raise ValueError(
                f"{key}.{name}: no such argument; choose from {', '.join(parameters)}.{nearest(name, parameters)}"
            )
        allowed = types.get(name, ())
        if isinstance(value, str) and allowed and str not in allowed:
            names = [each.__name__ for each in allowed if each is not NoneType]
            null = ", or null" * (NoneType in allowed)
            raise ValueError(f"{key}.{name}={value!r} is not allowed; expected {' or '.join(names)}{null}")


def _types(target: Any) -> dict[str, tuple[type, ...]]:
    """Return what is allowed of arguments that are annotated with plain types alone."""
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):
        return {}  # annotations that only a type checker can read
    found = {name: tuple(_members(hint)) for name, hint in hints.items()}
    return {name: types for name, types in found.items() if all(each in _PLAIN for each in types)}


def _members(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, UnionType):
        for each in get_args(hint):
            yield from _members(each)
    else:
        yield hint
