"""What the folder of a run tells of it while it runs."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bilevel_jax.runs.infra import seals
from bilevel_jax.runs.infra.journal import list_numbers
from bilevel_jax.runs.infra.progress import PROGRESS_FILE
from bilevel_jax.runs.infra.run_dir import CONFIG_FILE, RESULT_FILE
from bilevel_jax.storage import urls
from bilevel_jax.storage.objects import open_store

COMMAND_SECTIONS = ("tune", "compare", "audit", "rank", "refine", "score", "retrain", "weights", "evaluate")
"""Sections of a config, in an order in which the first that is there tells the command."""
COMMAND_OF_SECTION = {"retrain": "select", "weights": "train"}


class Curve(NamedTuple):
    """A number of the log as the run goes on."""

    name: str
    steps: list[float]
    values: list[float]


class RunState(NamedTuple):
    """A run as its folder tells it at one moment."""

    folder: str
    command: str
    progress: dict[str, Any] | None
    """What progress.json holds; None where the run is not at work."""
    curves: dict[tuple[str, str], list[Curve]]
    """By (part, kind) of the log's records; "" is the whole run. Of parts those of the one that wrote last."""
    parts: dict[str, int]
    """Records of each part of the run."""
    result: dict[str, Any] | None
    """result.json of a run that has ended."""


def read_state(folder: str) -> RunState:
    """Read the folder of a run, of this machine or at a URL; it is neither locked nor changed.

    Raises:
        ValueError: for a folder that holds no run.
    """
    read = _make_reader(folder)
    config = read(CONFIG_FILE)
    if config is None:
        raise ValueError(
            f"{folder} holds no run: {CONFIG_FILE} is missing. Give the folder of a run, output.dir of its config."
        )
    records = list(_parse_records(read(seals.LOG_FILE) or b""))
    parts, last_part = Counter(str(record["part"]) for record in records if "part" in record), ""
    for record in records:
        last_part = record.get("part", last_part)
    return RunState(
        folder,
        _find_command(config),
        _parse_object(read(PROGRESS_FILE)),
        collect_curves([record for record in records if record.get("part", "") in ("", last_part)]),
        dict(parts),
        _parse_object(read(RESULT_FILE)),
    )


def _make_reader(folder: str) -> Callable[[str], bytes | None]:
    """What reads a file of a folder by its name; None where there is none."""
    if urls.is_remote(folder):
        return open_store(folder.rstrip("/")).read_or_none
    root = Path(urls.strip_file_protocol(folder))

    def read(name: str) -> bytes | None:
        try:
            return (root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    return read


def collect_curves(records: list[dict[str, Any]]) -> dict[tuple[str, str], list[Curve]]:
    """The numbers of a log by (part, kind) of its records; of a step that was logged again, the later one."""
    found: dict[tuple[str, str], dict[str, dict[float, float]]] = {}
    for record in records:
        curves = found.setdefault((str(record.get("part", "")), str(record.get("event", ""))), {})
        for name, step, value in list_numbers(record):
            curves.setdefault(name, {})[step] = value
    return {
        place: [Curve(name, *map(list, zip(*sorted(points.items()), strict=True))) for name, points in curves.items()]
        for place, curves in found.items()
    }


def seconds_of_silence(state: RunState) -> float | None:
    """Since the run last wrote how far it is, by the clocks of both machines; None where it is not at work."""
    told = (state.progress or {}).get("time")
    return None if told is None else max(0.0, time.time() - told)


def _parse_records(log: bytes) -> Iterator[dict[str, Any]]:
    """The whole lines of a log that are JSON objects; a line that is being written is passed over.

    Seals are not checked: a copy of a log on its way is to be seen, too.
    """
    for line in log.split(b"\n")[:-1]:
        record = _parse_object(line)
        if record is not None:
            record.pop("seal", None)
            yield record


def _parse_object(text: bytes | None) -> dict[str, Any] | None:
    """The object that JSON holds; None where there is none, or not a whole one."""
    try:
        value = json.loads(text or b"")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _find_command(config: bytes) -> str:
    """The command of a run, told by the sections of its config."""
    try:
        sections = yaml.safe_load(config) or {}
    except (ValueError, yaml.YAMLError):
        return "run"
    name = next((section for section in COMMAND_SECTIONS if section in sections), "")
    return COMMAND_OF_SECTION.get(name, name or "run")
