"""Record of a run's input files by size and hash, and of names on the hub by commit."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from bilevel_jax.lm.checkpoint.folders import find_model_folder
from bilevel_jax.runs.config.hub_names import (
    HubRecord,
    describe_hub_names,
    find_commits,
    keep_base_commits,
    replace_names,
)
from bilevel_jax.runs.config.rules import flatten_config, is_evaluation, names_function
from bilevel_jax.runs.infra import distributed, run_dir, seals
from bilevel_jax.storage import copies, urls

INPUTS_FILE, HUB_FILE = seals.INPUTS_FILE, seals.HUB_FILE
ConfigT = TypeVar("ConfigT")
INPUT_FILE_KEYS = (
    "model.name_or_path", "data.train", "data.validation", "data.dev", "data.test", "weights.file", "weights.tokens",
    "objective.reference", "rank.own_answers", "rank.accuracies", "rank.records", "rater.file",
    "scores.embedding_file", "rater.embedding_file",
    "score.rater", "score.model", "score.file", "score.embedding_file", "evaluate.model", "evaluate.baseline",
    "evaluate.base", "evaluate.prompts", "judge.template", "judge.safety_template",
    "target.losses", "verifier.name", "reinforce.model", "candidates.model",
)  # fmt: skip
"""The config keys whose values name input files."""
FUNCTION_KEYS = ("target.losses", "verifier.name")
"""Those whose values may be path/to/file.py:function; their other values are no files."""
RUN_MODEL_KEYS = ("evaluate.model", "evaluate.baseline")
"""Those that may name the folder of a run for its model, or an adapter, which stands on a base; of `evaluate` alone."""
END_BYTES = 1 << 24
"""Bytes at each end of a file that `hash_file_ends` reads."""


def list_input_files(config: Any) -> dict[str, list[Path]]:
    """key of the config -> the files that its value names; of a folder, all that lie in it; of a URL, a copy.

    Hub names and built-in tasks name no file: the first have a commit, the second are made from the config.
    """
    files_by_key: dict[str, list[Path]] = {}
    for key, value in _list_file_values(config):
        if key in RUN_MODEL_KEYS and value and Path(value).is_dir():
            folders = find_model_folder(value, config.evaluate.base).folders
            files_by_key[key] = [file for folder in folders for file in _list_files(folder)]
            continue
        if key_files := [file for path in _list_paths(key, value) for file in _list_files(path)]:
            files_by_key[key] = key_files
    return files_by_key


def copy_inputs(config: Any) -> Any:
    """The config with the path of a copy in place of each URL of an input; those of data are copied by their reader."""
    for key, value in _list_file_values(config):
        if not key.startswith("data."):
            copied = tuple(map(_copy_input, value)) if isinstance(value, tuple) else _copy_input(value)
            if copied != value:
                section, name = key.split(".")
                config = replace(config, **{section: replace(getattr(config, section), **{name: copied})})
    return config


def _copy_input(value: Any) -> Any:
    if not urls.is_url(value):
        return value
    path, colon, function = value.rpartition(":") if names_function(value) else (value, "", "")
    return f"{copies.local_path(path)}{colon}{function}"


def name_by_urls(config: Any) -> Any:
    """The config that `copy_inputs` was given: what is recorded and compared."""
    for section in fields(config):
        values = getattr(config, section.name)
        named = {
            field.name: tuple(map(_show, value)) if isinstance(value, tuple) else _show(value)
            for field in fields(values)
            if isinstance(value := getattr(values, field.name), str | tuple)
        }
        config = replace(config, **{section.name: replace(values, **named)})
    return config


def _show(value: Any) -> Any:
    return copies.show(value) if isinstance(value, str) else value


def check_inputs_whole(config: Any) -> None:
    """Raise seals.DamagedFileError for an input file of a run's folder that is not what that run wrote."""
    for key, value in _list_file_values(config):
        for path in _list_paths(key, value):
            seals.check(path)


def _list_file_values(config: Any) -> list[tuple[str, Any]]:
    """("section.key", value) of every key whose value names input files."""
    unread = () if is_evaluation(config) else RUN_MODEL_KEYS  # where evaluate.baseline is the name of an arm
    return [(key, value) for key, value in flatten_config(config) if key in INPUT_FILE_KEYS and key not in unread]


def record_inputs(config: Any, folder: Path) -> None:
    """Write inputs.json, once: every file's size, time of change and SHA-256. Reads all of them: seconds per 10 GB."""
    path = folder / INPUTS_FILE
    if not path.exists():
        file_records = {
            key: {copies.show(str(file)): _describe_file(file) for file in key_files}
            for key, key_files in list_input_files(config).items()
        }
        run_dir.write_json(path, file_records)


def check_inputs_unchanged(config: Any, folder: Path) -> None:
    """Raise ValueError, with every difference named, where a run's files are not those that it was started with.

    A file of the same size and time of change is taken for the same; any other is read and compared by its hash.
    """
    path = folder / INPUTS_FILE
    if not path.exists():
        return  # stopped before it had read its input
    recorded = run_dir.read_json(path)
    current = {
        key: {copies.show(str(file)): file for file in key_files} for key, key_files in list_input_files(config).items()
    }
    changes = [
        f"{key}: {name} {words}"
        for key in sorted({*recorded, *current})
        for name in sorted({*recorded.get(key, {}), *current.get(key, {})})
        if (words := _describe_change(recorded.get(key, {}).get(name), current.get(key, {}).get(name)))
    ]
    if changes:
        raise ValueError(
            f"{folder} was started with other files, so it cannot be resumed: {'; '.join(changes)}. Put back what was "
            "there, or start a new run with --out."
        )


def hash_file_ends(config: Any) -> dict[str, str]:
    """key of the config -> hash of the names, sizes and contents of its files; of a large file, of its two ends.

    Tells whether several processes see the same files, without reading all of a large model in each of them.
    """
    hashes = {}
    for key, key_files in list_input_files(config).items():
        digest = hashlib.sha256()
        for file in key_files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size};".encode())
            with open(file, "rb") as content:
                digest.update(content.read(END_BYTES))
                content.seek(max(size - END_BYTES, 0))
                digest.update(content.read(END_BYTES))
        hashes[key] = f"{len(key_files):,} files with hash {digest.hexdigest()[:12]}"
    return hashes


def pin_hub_names(config: ConfigT) -> ConfigT:
    """The config with a commit in each name on the hub: that of the run which is resumed, or the one that it means now.

    Of several processes all call this, and the first asks. Raises OSError for what is not there or may not be read.
    """
    output: Any = getattr(config, "output", None)
    records = _read_resumed_records(output.dir) if output is not None and output.resume else []
    commits = json.loads(
        distributed.share_text("the names on the hub", lambda: json.dumps(find_commits(config, records)))
    )
    keep_base_commits(commits)
    return replace_names(config, commits)


def _read_resumed_records(folder: str) -> list[HubRecord]:
    """The names on the hub that a run reads which is to be resumed, wherever its folder lies."""
    if not urls.is_url(folder):
        return read_hub_records(Path(folder))
    try:
        return read_hub_records(copies.local_path(urls.join_url(folder, HUB_FILE)).parent)
    except FileNotFoundError:
        return []


def record_hub_names(config: Any, folder: Path) -> None:
    """Write hub.json, where the config has names on the hub: each with its commit and as it was given."""
    if records := describe_hub_names(config):
        run_dir.write_json(folder / HUB_FILE, [record._asdict() for record in records])


def read_hub_records(folder: Path) -> list[HubRecord]:
    """The names on the hub that a run reads; none of a run without any."""
    path = folder / HUB_FILE
    return [HubRecord(**record) for record in run_dir.read_json(path)] if path.exists() else []


def _list_paths(key: str, value: Any) -> Iterator[Path]:
    """The paths that a config's value names; of `folder@split` the folder, of `file.py:function` the file."""
    for item in filter(None, value if isinstance(value, tuple) else (value,)):
        if key in FUNCTION_KEYS:
            if names_function(item):
                yield copies.local_path(item.rpartition(":")[0])
            continue
        if urls.is_url(item):
            yield copies.local_path(urls.split_dataset_url(item)[0])
            continue
        folder, at, _ = str(item).partition("@")
        yield Path(folder) if at and not Path(item).exists() and Path(folder).is_dir() else Path(item)


def _list_files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.is_file())
    elif path.is_file():
        yield path


def _describe_file(file: Path) -> dict[str, Any]:
    return {**seals.describe_file(file), "changed_ns": file.stat().st_mtime_ns}


def _describe_change(recorded: dict[str, Any] | None, file: Path | None) -> str:
    if recorded is None:
        return "was not there then"
    if file is None:
        return "is not there now"
    size = file.stat().st_size
    if size != recorded["bytes"]:
        return f"had {recorded['bytes']:,} bytes then and has {size:,} now"
    if file.stat().st_mtime_ns != recorded["changed_ns"] and _describe_file(file)["sha256"] != recorded["sha256"]:
        return "has another content of the same size"
    return ""
