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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors read; at run time the names are imported when they are first read
    from bilevel_jax.commands.functions import (
        audit,
        compare,
        estimate,
        evaluate,
        export,
        inspect,
        rank,
        refine,
        score,
        select,
        train,
        tune,
    )
    from bilevel_jax.commands.results import (
        AuditResult,
        CompareResult,
        EstimateResult,
        EvaluateResult,
        ExportResult,
        ExtremeRemovals,
        InspectedPart,
        InspectResult,
        RankRecordsResult,
        RankResult,
        RefineResult,
        ScoreResult,
        SelectResult,
        TrainResult,
        TriedSetting,
        TuneResult,
        read_result,
    )
    from bilevel_jax.runs.config import schema
    from bilevel_jax.runs.config.load import (
        AuditConfig,
        CompareConfig,
        EstimateConfig,
        EvaluateConfig,
        ExportConfig,
        InspectConfig,
        RankConfig,
        RefineConfig,
        ScoreConfig,
        SelectConfig,
        TrainConfig,
        TuneConfig,
    )
    from bilevel_jax.runs.infra.session import Interrupted

COMMAND_NAMES = (
    "audit", "compare", "estimate", "evaluate", "export", "inspect", "rank", "refine", "score", "select", "train",
    "tune",
)  # fmt: skip
__all__ = [
    "AuditConfig",
    "AuditResult",
    "CompareConfig",
    "CompareResult",
    "EstimateConfig",
    "EstimateResult",
    "EvaluateConfig",
    "EvaluateResult",
    "ExportConfig",
    "ExportResult",
    "ExtremeRemovals",
    "InspectConfig",
    "InspectResult",
    "InspectedPart",
    "Interrupted",
    "RankConfig",
    "RankRecordsResult",
    "RankResult",
    "RefineConfig",
    "RefineResult",
    "ScoreConfig",
    "ScoreResult",
    "SelectConfig",
    "SelectResult",
    "TrainConfig",
    "TrainResult",
    "TriedSetting",
    "TuneConfig",
    "TuneResult",
    "audit",
    "compare",
    "estimate",
    "evaluate",
    "export",
    "inspect",
    "rank",
    "read_result",
    "refine",
    "schema",
    "score",
    "select",
    "train",
    "tune",
]
_HOMES = {
    "bilevel_jax.commands.functions": COMMAND_NAMES,
    "bilevel_jax.commands.results": [
        name for name in __all__ if name.endswith(("Result", "_result", "Part", "Removals", "Setting"))
    ],
    "bilevel_jax.runs.config.load": [*(name for name in __all__ if name.endswith("Config")), "schema"],
    "bilevel_jax.runs.infra.session": ["Interrupted"],
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}


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
