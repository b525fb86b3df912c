"""Functions of the user's own, named as path/to/file.py:function."""

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_user_function(location: str, *, key: str) -> Callable[..., Any]:
    """The function that `path/to/file.py:function` names; `key` of the config holds it, for errors.

    Raises FileNotFoundError for a file that is not there, and ValueError for one that fails or lacks the function.
    """
    path, _, name = location.rpartition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{key} names {path}, which is no file. Give path/to/file.py:function.")
    module = _load_module(str(Path(path).resolve()), path)
    function = getattr(module, name, None)
    if not callable(function):
        names = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"{path} has no function {name!r}; it has {names}. Set {key} to {path}:NAME.")
    return function


def _load_module(resolved: str, path: str) -> Any:
    """The file as a module of its own; its name is in sys.modules while it runs, as dataclasses want."""
    name = f"user file {resolved}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be loaded: {type(error).__name__} at {error_location(error, path)}: {error}"
        ) from error
    return module


def error_location(error: BaseException, path: str) -> str:
    """`file:line` where the error arose, in the user's file if it passed through it."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{path}:{error.lineno}"
    resolved_path = str(Path(path).resolve())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == resolved_path]
    return f"{path}:{lines[-1]}" if lines else path
