"""The command functions, which take a config and return a result.

Each command is a folder of its own, `commands/select/`, and a function of the same name. As an attribute of this module
the name is the function; the folder's modules are imported by their path, as in
`from bilevel_jax.commands.select.run import select`. A config is read by `bilevel_jax.runs.config.load.load_config`.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

__all__ = ["audit", "compare", "estimate", "export", "inspect", "rank", "refine", "select", "train"]  # noqa: F822


class _Commands(ModuleType):
    """A module whose attributes are the commands' functions, each imported when it is first read."""

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


def _command(name: str) -> property:
    def read_function(module: ModuleType) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{name}.run"), name)

    def keep_function(module: ModuleType, subpackage: ModuleType) -> None:
        """Importing a subpackage assigns it to its parent; here the function of the same name stays."""

    return property(read_function, keep_function)


for _name in __all__:
    setattr(_Commands, _name, _command(_name))
sys.modules[__name__].__class__ = _Commands
