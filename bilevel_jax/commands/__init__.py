"""The commands as functions, which take a config and return a typed result.

    result = bj.commands.select("configs/quickstart.yaml", outer={"steps": 3})
    result.ids[result.weights > 1], result.verdict, result.report

Each command is a folder of its own, `commands/select/`, and a function of the same name. As an attribute of this module
the name is the function; the folder's modules are imported by their path, as in
`from bilevel_jax.commands.select.run import select`, which takes a checked config. The names below are imported when
they are first read.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

COMMAND_NAMES = ("audit", "compare", "estimate", "export", "inspect", "rank", "refine", "select", "train")
_MODULE_OF = {
    **dict.fromkeys(COMMAND_NAMES, "bilevel_jax.commands.functions"),
    # configs, one to a command
    "AuditConfig": "bilevel_jax.runs.config.load",
    "CompareConfig": "bilevel_jax.runs.config.load",
    "EstimateConfig": "bilevel_jax.runs.config.load",
    "ExportConfig": "bilevel_jax.runs.config.load",
    "InspectConfig": "bilevel_jax.runs.config.load",
    "RankConfig": "bilevel_jax.runs.config.load",
    "RefineConfig": "bilevel_jax.runs.config.load",
    "SelectConfig": "bilevel_jax.runs.config.load",
    "TrainConfig": "bilevel_jax.runs.config.load",
    "schema": "bilevel_jax.runs.config.load",  # the module of the sections' dataclasses
    # results
    "AuditResult": "bilevel_jax.commands.results",
    "CompareResult": "bilevel_jax.commands.results",
    "EstimateResult": "bilevel_jax.commands.results",
    "ExportResult": "bilevel_jax.commands.results",
    "InspectResult": "bilevel_jax.commands.results",
    "InspectedPart": "bilevel_jax.commands.results",
    "RankResult": "bilevel_jax.commands.results",
    "RefineResult": "bilevel_jax.commands.results",
    "SelectResult": "bilevel_jax.commands.results",
    "TrainResult": "bilevel_jax.commands.results",
    "read_result": "bilevel_jax.commands.results",
    # of a run that was asked to stop
    "Interrupted": "bilevel_jax.runs.infra.session",
}
__all__ = sorted(_MODULE_OF)


class _Commands(ModuleType):
    """A module whose attributes are the public names, each imported when it is first read."""

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


def _name(name: str) -> property:
    def read_value(module: ModuleType) -> Any:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)

    def keep_value(module: ModuleType, subpackage: ModuleType) -> None:
        """Importing a subpackage assigns it to its parent; here the function of the same name stays."""

    return property(read_value, keep_value)


for _key in _MODULE_OF:
    setattr(_Commands, _key, _name(_key))
sys.modules[__name__].__class__ = _Commands
