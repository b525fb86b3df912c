"""What a run was given: its files by size and hash, so that it is never resumed with others."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bilevel_jax.runs import files
from bilevel_jax.runs.rules import leaves

NAME = "inputs.json"
KEYS = (
    "model.name_or_path", "data.train", "data.validation", "data.dev", "data.test", "weights.file", "objective.reference",
    "rank.own_answers", "rank.accuracies",
)  # fmt: skip
"""Of the configs: those whose values name files."""


def given(config: Any) -> dict[str, list[Path]]:
    """key of the config -> the files that its value names; of a folder, all that lie in it.

    Hub names and built-in tasks name no file: the first are not watched, the second are made from the config.
    """
    found: dict[str, list[Path]] = {}
    for key, value in leaves(config):
        if key not in KEYS:
            continue
        paths = [Path(one) for one in (value if isinstance(value, tuple) else (value,)) if one]
        if there := [file for path in paths for file in _files(path)]:
            found[key] = there
    return found


def record(config: Any, folder: Path) -> None:
    """Write inputs.json, once: every file's size, time of change and SHA-256. Reads all of them: seconds per 10 GB."""
    path = folder / NAME
    if not path.exists():
        told = {key: {str(file): _seen(file) for file in some} for key, some in given(config).items()}
        files.write_json(path, told)


def refuse_changed(config: Any, folder: Path) -> None:
    """Raise ValueError, with every difference named, where a run's files are not those that it was started with.

    A file of the same size and time of change is taken for the same; any other is read and compared by its hash.
    """
    path = folder / NAME
    if not path.exists():
        return  # stopped before it had read its input
    then = json.loads(path.read_text("utf-8"))
    now = {key: {str(file): file for file in some} for key, some in given(config).items()}
    changed = [
        f"{key}: {name} {words}"
        for key in sorted({*then, *now})
        for name in sorted({*then.get(key, {}), *now.get(key, {})})
        if (words := _difference(then.get(key, {}).get(name), now.get(key, {}).get(name)))
    ]
    if changed:
        raise ValueError(
            f"{folder} was started with other files, so it cannot be resumed: {'; '.join(changed)}. Put back what was "
            "there, or start a new run with --out."
        )


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.is_file())
    elif path.is_file():
        yield path


def _seen(file: Path) -> dict[str, Any]:
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "changed_ns": file.stat().st_mtime_ns, "sha256": digest}


def _difference(then: dict[str, Any] | None, file: Path | None) -> str:
    if then is None:
        return "was not there then"
    if file is None:
        return "is not there now"
    size = file.stat().st_size
    if size != then["bytes"]:
        return f"had {then['bytes']:,} bytes then and has {size:,} now"
    if file.stat().st_mtime_ns != then["changed_ns"] and _seen(file)["sha256"] != then["sha256"]:
        return "has another content of the same size"
    return ""
