"""Names on the Hugging Face hub in a config, and the commits that they mean."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from bilevel_jax.lm.hub.downloads import resolve_commit
from bilevel_jax.lm.hub.names import HubName, parse_dataset_name, parse_model_name
from bilevel_jax.runs.config.rules import is_evaluation, names_service

MODEL_KEYS = (
    "model.name_or_path", "score.model", "reinforce.model", "candidates.model", "evaluate.model", "evaluate.baseline",
    "evaluate.base",
)  # fmt: skip
"""Keys that name a model: a folder, or a name on the hub."""
DATA_KEYS = ("data.train", "data.validation", "data.dev", "data.test", "evaluate.prompts")
"""Keys that name rows."""
ConfigT = TypeVar("ConfigT")


class HubRecord(NamedTuple):
    """A name on the hub that a run read, for its hub.json and result.json."""

    key: str
    """Of the config."""
    name: str
    """With its commit."""
    asked: str
    """As it was given, with the prefix."""


_asked: dict[tuple[str, str], list[str]] = {}
"""(key, name with its commit) -> the names, as they were given there, that this process took for it."""


def describe_hub_names(config: Any) -> list[HubRecord]:
    """The names on the hub in a config whose names have commits."""
    names = dict.fromkeys((key, str(name)) for key, value, parse in _iterate_names(config) if (name := parse(value)))
    return [HubRecord(*name, asked) for name in names for asked in _asked.get(name, [name[1]])]


def find_commits(config: Any, records: Sequence[HubRecord] = ()) -> dict[str, str]:
    """Name on the hub in a config -> the same name with its commit: as the records say, or as the hub says now.

    Raises:
        OSError: for what is not on the hub or may not be read, in one sentence.
    """
    known = {record.asked: record.name for record in records}
    pinned = {}
    for key, value, parse in _iterate_names(config):
        if name := parse(value):
            pinned[value] = known.get(str(name)) or str(name.with_commit(resolve_commit(name)))
            asked = _asked.setdefault((key, pinned[value]), [])
            asked += [str(name)] if str(name) not in asked else []
    return pinned


def replace_names(config: ConfigT, pinned: Mapping[str, str]) -> ConfigT:
    """The config with each name replaced by the one that has a commit."""
    changes: dict[str, dict[str, Any]] = {}
    for key in (*MODEL_KEYS, *DATA_KEYS):
        section, _, field = key.partition(".")
        value = getattr(getattr(config, section, None), field, None)
        if value is None or not _is_read_as_file(config, key):
            continue
        new = tuple(pinned.get(item, item) for item in value) if isinstance(value, tuple) else pinned.get(value, value)
        if new != value:
            changes.setdefault(section, {})[field] = new
    sections: dict[str, Any] = {
        section: replace(getattr(config, section), **fields) for section, fields in changes.items()
    }
    return replace(config, **sections) if sections else config  # type: ignore[type-var]


def _iterate_names(config: Any) -> Iterator[tuple[str, str, Callable[[str], HubName | None]]]:
    """(key, value, how it is parsed) of all values that could name something on the hub."""
    parsers: tuple[tuple[tuple[str, ...], Callable[[str], HubName | None]], ...] = (
        (MODEL_KEYS, parse_model_name), (DATA_KEYS, parse_dataset_name),
    )  # fmt: skip
    for keys, parse in parsers:
        for key in keys:
            section, _, field = key.partition(".")
            value = getattr(getattr(config, section, None), field, None) or ()
            if not _is_read_as_file(config, key):
                continue
            for item in (value,) if isinstance(value, str) else value:
                if not names_service(item):
                    yield key, item, parse


def _is_read_as_file(config: Any, key: str) -> bool:
    """Whether the key names a model: evaluate.baseline of a command that asks its own models is the name of an arm."""
    return key not in ("evaluate.model", "evaluate.baseline", "evaluate.base") or is_evaluation(config)
