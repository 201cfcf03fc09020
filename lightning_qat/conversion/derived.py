"""Classes made at run time, of which the classes of the user hear nothing."""

from typing import Any


class _Unannounced:
    """A first base class whose ``__init_subclass__`` ends there."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Do nothing."""


def derive(base: type, namespace: dict[str, Any]) -> Any:
    """Return a subclass of the same name; an instance of its base may change to it.

    An ``__init_subclass__`` of the user is not called. It may keep a registry, in which a class that only we can build
    would take the place of its base, or ask for arguments that nobody could give.

    Args:
        base: class of a module.
        namespace: what the subclass adds.
    """
    listens = any("__init_subclass__" in vars(kind) for kind in base.__mro__[:-1])
    return type(base.__name__, (_Unannounced, base) if listens else (base,), namespace)
