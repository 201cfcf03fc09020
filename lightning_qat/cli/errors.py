"""One readable message in place of a stack trace, for what a user can put right."""

import difflib
import importlib.resources
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

FULL_ERROR: Final = "HYDRA_FULL_ERROR"
_NO_DEFAULT: Final = re.compile(r"Could not override '([^']+)'. No match in the defaults list")
_UNEXPECTED: Final = re.compile(r"unexpected keyword argument '([^']+)'")
_MISSING_POSITIONAL: Final = re.compile(r"missing \d+ required positional argument")
_FULL_KEY: Final = re.compile(r"full_key: (\S+)")


@contextmanager
def one_message(program: str) -> Iterator[None]:
    """Print the message of an error that the user can put right and exit with status 1; let others pass.

    With ``HYDRA_FULL_ERROR=1`` every error passes.

    Args:
        program: what the message starts with.
    """
    wants_trace = os.environ.get(FULL_ERROR) == "1"
    before = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"  # Hydra then hands its errors over, instead of printing them itself
    try:
        yield
    except Exception as error:
        message = None if wants_trace else explain(error)
        if message is None:
            raise
        print(f"{program}: {message}", file=sys.stderr)
        sys.exit(1)
    finally:
        os.environ.pop(FULL_ERROR) if before is None else os.environ.update({FULL_ERROR: before})


def explain(error: Exception) -> str | None:
    """Return what to tell the user: the key, what is allowed, and the nearest match. None for a bug.

    Args:
        error: as Hydra raised it, or as the job did.
    """
    cause = error.__cause__
    if isinstance(error, MissingConfigException):
        return _missing_config(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read: {str(error).splitlines()[0]}"
    if isinstance(error, InstantiationException):
        return _failed_call(error)
    if isinstance(error, HydraException):
        unmatched = _NO_DEFAULT.search(str(error))
        if unmatched is not None:
            return _unknown(unmatched.group(1), _groups(), what="group")
        if isinstance(cause, OmegaConfBaseException) and isinstance(cause.parent_node, DictConfig):
            return _unknown_key(str(cause.full_key), cause.parent_node)
        return str(error)
    if isinstance(error, MissingMandatoryValue):
        return _without_value(str(error))
    if isinstance(error, OmegaConfBaseException):
        return str(error).splitlines()[0]
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if "Config group override must be a string or a list" in str(error):
        return "GROUP=null: a group takes the name of an option; leave it out with ~GROUP"
    return str(error) if _is_for_users(error) else None


def _without_value(message: str) -> str:
    key = message.splitlines()[0].rpartition(" ")[2]
    return f"{key}: no value is given, and there is no default; set it in the config, or here: {key}=VALUE"


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return a hint at the most similar name, or nothing.

    Example:
        >>> nearest("hiden_size", ["hidden_size", "num_heads"])
        ' Did you mean hidden_size?'
    """
    found = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {found[0]}?" if found else ""


def _unknown(key: str, allowed: Iterable[str], *, what: str) -> str:
    names = sorted(allowed)
    last = key.rpartition(".")[2]
    return f"{key}: no such {what}; choose from {', '.join(names)}.{nearest(last, names)}"


def _missing_config(error: MissingConfigException) -> str:
    wanted = error.missing_cfg_file or ""
    group, _, option = wanted.rpartition("/")
    options = sorted(error.options or _options(group))  # Hydra knows none of a list, as in callbacks=[full,lora]
    if not group or not options:
        return str(error).splitlines()[0]
    return f"{group}={option}: no such option; choose from {', '.join(options)}.{nearest(option, options)}"


def _unknown_key(key: str, parent: DictConfig) -> str:
    """Tell keys of the node from arguments of its target that the configuration does not list."""
    present = [str(name) for name in parent if not str(name).startswith("_")]
    node, _, name = key.rpartition(".")
    target = _target(node, parent)
    arguments = _arguments(target)
    if name in arguments:
        return f"{key}: the configuration does not list this argument; add it with +{key}=..."
    if "." not in key:
        return _unknown(key, {*present, *_groups()}, what="key or group")
    more = sorted(set(arguments) - set(present))
    hint = nearest(name, [*present, *more])
    added = f" Other arguments of {target}: +{node}.NAME=VALUE." if more else ""
    added = f" Options of the format: +{node}.NAME=VALUE." if node == "export" else added
    choice = f"; choose from {', '.join(present)}" if present else ""
    return f"{key}: no such key{choice}.{hint}{added}"


def _target(key: str, node: DictConfig) -> Any:
    """Return what a node builds; of the nodes in ``float`` and ``qat``, what the node that they change does."""
    stage, _, changed = key.partition(".")
    if stage in ("float", "qat") and changed:
        return OmegaConf.select(node._get_root(), f"{changed}._target_")
    return OmegaConf.select(node, "_target_")


def _arguments(target: Any) -> list[str]:
    """Return the names of the arguments of what a node builds."""
    if not isinstance(target, str):
        return []
    try:
        signature = inspect.signature(get_object(target))
    except (ImportError, ValueError, TypeError):
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, parameter in signature.parameters.items() if parameter.kind in named]


def _failed_call(error: InstantiationException) -> str:
    """Return what a constructor objected to, under the key of its node."""
    found = _FULL_KEY.search(str(error))
    key = found.group(1) if found else ""
    cause = error.__cause__
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    if cause is None:
        return str(error)
    unexpected = _UNEXPECTED.search(str(cause))
    if unexpected is not None:
        target = re.search(r"target '([^']+)'", str(error))
        arguments = _arguments(target.group(1)) if target else []
        return _unknown(f"{key}.{unexpected.group(1)}".lstrip("."), arguments, what="argument")
    text = " ".join(str(cause).split())
    if _MISSING_POSITIONAL.search(text):
        text += "; give them, or add _partial_: true where the function itself is wanted"
    return f"{key}: {text}" if key else text


def _groups() -> list[str]:
    """Return the groups of our configuration."""
    folder = importlib.resources.files("lightning_qat.conf")
    return [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("_")]


def _options(group: str) -> list[str]:
    """Return the options of one of our groups."""
    folder = importlib.resources.files("lightning_qat.conf") / group
    return [entry.name.removesuffix(".yaml") for entry in folder.iterdir()] if group in _groups() else []


def _is_for_users(error: Exception) -> bool:
    """Whether our code, or Lightning's check of its settings, raised the error for the user to read."""
    if type(error).__name__ == "MisconfigurationException":
        return True
    if not isinstance(error, ValueError | TypeError | ImportError | OSError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return str(module).split(".")[0] == "lightning_qat"
