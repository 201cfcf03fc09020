"""The command line: Hydra applications on top of the public API, and the only code that imports Hydra."""

__all__: list[str] = []
