"""Names on the Hugging Face hub in a config, and the commits that they mean."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from bilevel_jax.lm.checkpoint.folders import find_base_name
from bilevel_jax.lm.hub.downloads import keep_commit, resolve_commit
from bilevel_jax.lm.hub.names import HubName, parse_dataset_name, parse_model_name
from bilevel_jax.runs.config.rules import is_evaluation, names_service

MODEL_KEYS = (
    "model.name_or_path", "score.model", "reinforce.model", "candidates.model", "evaluate.model", "evaluate.baseline",
    "evaluate.base",
)  # fmt: skip
"""Keys that name a model: a folder, or a name on the hub."""
BASE_KEY = "evaluate.base"
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
    """The names on the hub in a config whose names have commits, and those of adapters' bases."""
    names = [(key, str(name)) for key, value, parse in _iterate_names(config) if (name := parse(value))]
    for base in map(parse_model_name, _list_bases(config)):
        if base is not None:
            names.append((BASE_KEY, str(base.with_commit(resolve_commit(base)))))
    return [HubRecord(*name, asked) for name in dict.fromkeys(names) for asked in _asked.get(name, [name[1]])]


def find_commits(config: Any, records: Sequence[HubRecord] = ()) -> dict[str, dict[str, str]]:
    """key -> name on the hub there -> the same with its commit: as the records say, or as the hub says now.

    Where all adapters stand on one base on the hub, and evaluate.base is empty, that base is what it means.

    Raises:
        OSError: for what is not on the hub or may not be read, in one sentence.
    """
    known = {(record.key, record.asked): record.name for record in records}
    pinned: dict[str, dict[str, str]] = {}

    def pin(key: str, value: str, name: HubName) -> None:
        found = known.get((key, str(name)))
        pinned.setdefault(key, {})[value] = found or str(name.with_commit(resolve_commit(name)))
        asked = _asked.setdefault((key, pinned[key][value]), [])
        asked += [str(name)] if str(name) not in asked else []

    for key, value, parse in _iterate_names(config):
        if name := parse(value):
            pin(key, value, name)
    bases = set(_list_bases(replace_names(config, pinned)))
    for base in bases:
        if name := parse_model_name(base):
            pin(BASE_KEY, "" if len(bases) == 1 else base, name)
    return pinned


def keep_base_commits(pinned: Mapping[str, Mapping[str, str]]) -> None:
    """Have the bases that adapters name mean their commits in this process: of two bases no key says it."""
    for value, pinned_value in pinned.get(BASE_KEY, {}).items():
        name, pinned_name = parse_model_name(value), parse_model_name(pinned_value)
        if name is not None and pinned_name is not None:
            keep_commit(name, pinned_name.revision)


def replace_names(config: ConfigT, pinned: Mapping[str, Mapping[str, str]]) -> ConfigT:
    """The config with each name replaced by the one that has a commit, which `find_commits` gives."""
    changes: dict[str, dict[str, Any]] = {}
    for key, names in pinned.items():
        section, _, field = key.partition(".")
        value = getattr(getattr(config, section), field)
        new = tuple(names.get(item, item) for item in value) if isinstance(value, tuple) else names.get(value, value)
        if new != value:
            changes.setdefault(section, {})[field] = new
    sections: dict[str, Any] = {
        section: replace(getattr(config, section), **fields) for section, fields in changes.items()
    }
    return replace(config, **sections) if sections else config  # type: ignore[type-var]


def _list_bases(config: Any) -> list[str]:
    """What the adapters that are asked stand on, where no key says it: names on the hub, or folders."""
    if not is_evaluation(config) or config.evaluate.base:
        return []
    paths = [path for path in (config.evaluate.model, config.evaluate.baseline) if path and not names_service(path)]
    return [base for base in map(find_base_name, paths) if base]


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
