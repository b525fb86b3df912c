"""Data scores, one number per training example, larger is better.

Each score is a module: `scores.perplexity`, `scores.ifd`, imported when it is first read.
"""

import importlib
import pkgutil
from typing import Any

__all__ = [module.name for module in pkgutil.iter_modules(__path__)]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
