"""Configs from Python values: dataclasses, nested dicts and keywords, under the rules of a YAML file"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bilevel_jax.runs.config.flags import short_flags
from bilevel_jax.runs.config.load import (
    COMMANDS,
    ConfigT,
    EstimateConfig,
    choose_config_to_estimate,
    find_config,
    ignored_sections,
    read_yaml_config,
)
from bilevel_jax.runs.config.rules import check_config
from bilevel_jax.runs.config.schema import EstimateSection
from bilevel_jax.runs.config.yaml_reader import decode_sections, describe_value, field_types, replace_values

DATA_KEYS = ("train", "validation", "dev", "test")
"""Keys of data that name files, in whose place examples themselves are often given."""


def make_config(config_class: type[ConfigT], config: Any, sections: Mapping[str, Any]) -> ConfigT:
    """The config of a command from Python values, with every value checked.

    Args:
        config_class: the config class of the command.
        config: a config of that class, a dict of sections, or a YAML file; None for the defaults of the keys.
        sections: sections, or single keys by `section.key`, which override those of `config`.

    Raises:
        ValueError: that lists every unknown, renamed or wrongly typed key; or all values that violate a bound or a
            rule.
    """
    command = COMMANDS[config_class]
    resolved = decode_config(config_class, config, sections)
    check_config(resolved, f"{f'{config} and ' if isinstance(config, str | Path) else ''}the arguments of {command}")
    return resolved


def decode_config(config_class: type[ConfigT], config: Any, sections: Mapping[str, Any]) -> ConfigT:
    """As `make_config`, without the check of bounds and rules."""
    command = COMMANDS[config_class]
    base = config_class()
    errors: list[str] = []
    more_errors: list[str]
    ignored = ignored_sections(config_class)
    if isinstance(config, str | os.PathLike):
        path = find_config(os.fspath(config))
        try:
            base = read_yaml_config(config_class, path, ignored)
        except ValueError as error:
            errors = [str(error)]
    else:
        base_values, errors = _decode(config_class, command, _unfold_config(config_class, config), ignored)
        base = replace_values(base, base_values)
    values, more_errors = _decode(config_class, command, sections, ())
    if errors or more_errors:
        raise ValueError("\n".join([*errors, *more_errors]))
    return replace_values(base, values)


def make_config_to_estimate(config: Any, sections: Mapping[str, Any]) -> tuple[Any, EstimateSection]:
    """The config of the run to estimate, as its command takes it, and the settings of the estimate.

    Args:
        config: the config of a run of a command that can be estimated, as for `make_config`.
        sections: sections of that config, which override it, and the section `estimate`.

    Raises:
        ValueError: as `make_config`, and for a config that no such command takes, or that several take.
    """
    own = {name: value for name, value in sections.items() if name.partition(".")[0] == "estimate"}
    others = {name: value for name, value in sections.items() if name not in own}
    values, errors = _decode(EstimateConfig, "estimate", own, ())
    if errors:
        raise ValueError("\n".join(errors))
    options = replace_values(EstimateConfig(), values)
    check_config(options, "the arguments of estimate")
    if config is None and not others:
        raise ValueError("estimate: give the config of a run, or the folder of one that is finished.")
    if type(config) in COMMANDS:
        config_class = type(config)
    else:
        source = str(config) if isinstance(config, str | os.PathLike) else "the config"
        config_class = choose_config_to_estimate(
            options.estimate.command, lambda config_class: decode_config(config_class, config, others), source
        )
    return make_config(config_class, config, others), options.estimate


def split_sections(content: Mapping[Any, Any]) -> tuple[dict[Any, Any], list[str]]:
    """section -> its keys or what stands for them, of a dict whose keys are sections or `section.key`; the errors."""
    split: dict[Any, Any] = {}
    errors = []
    dotted = [name for name in content if isinstance(name, str) and "." in name]
    for name, values in content.items():
        if name not in dotted:
            split[name] = to_plain(values)
    for name in dotted:
        section, _, key = name.partition(".")
        keys = split.setdefault(section, {})
        if keys is None:
            keys = split[section] = {}
        if not isinstance(keys, dict):
            continue  # what stands for the section is an error of its own
        if key in keys:
            errors.append(f"'{name}' stands twice, as a key of '{section}' and by itself. Give it once.")
        keys[key] = to_plain(content[name])
    return split, errors


def to_plain(value: Any) -> Any:
    """A value as YAML would hold it: dicts for sections, text for paths, numbers and lists for those of NumPy."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic | np.ndarray):
        return to_plain(value.tolist())
    return [to_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _unfold_config(config_class: type, config: Any) -> Mapping[Any, Any]:
    """Its sections by name."""
    command = COMMANDS.get(config_class, "estimate")
    wanted = f"wanted a {config_class.__name__}, a dict of sections, or the name of a YAML file"
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return config
    if isinstance(config, type):
        raise ValueError(f"{command}: the class {config.__name__} was given; {wanted}. Call it: {config.__name__}().")
    if type(config) in (*COMMANDS, EstimateConfig):
        own = {name: section for name, section in vars(config).items() if name in field_types(config_class)}
        if type(config) is not config_class and not ignored_sections(config_class):
            raise ValueError(f"{command}: a {type(config).__name__} was given; {wanted}.")
        return own
    raise ValueError(f"{command}: {describe_value(config)} was given; {wanted}.")


def _decode(
    config_class: type, command: str, content: Mapping[Any, Any], ignored: Any
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The values by section and key, and the errors."""
    types = field_types(config_class)
    wrong = {
        name: f"{command}: {name} is a {type(value).__name__}; wanted a {types[name].__name__}, or a dict of its keys."
        for name, value in content.items()
        if name in types and dataclasses.is_dataclass(value) and not isinstance(value, types[name])
    }
    for flag, long_name in short_flags(config_class()).items():
        name, (section, _, key) = flag.removeprefix("--"), long_name.partition(".")
        if name in content and not isinstance(value := to_plain(content[name]), dict | None):
            shown = f"{name}={describe_value(value)} is the flag {flag}"
            wrong[name] = f"{command}: {shown}; in Python give {section}={{'{key}': ...}}."
    split, errors = split_sections({name: value for name, value in content.items() if name not in wrong})
    errors = [*wrong.values(), *(f"{command}: {error}" for error in errors)]
    data = split.get("data")
    data = data if isinstance(data, dict) else {}
    for key in DATA_KEYS:
        value = data.get(key, "")
        items = value if isinstance(value, list) else [value]
        if odd := [item for item in items if not isinstance(item, str)]:
            errors.append(
                f"{command}: data.{key} names files, and {describe_value(odd[0])} was given. Write examples to a file "
                "of jsonl, one to a line, and give its name."
            )
            del data[key]
    values, more_errors = decode_sections(config_class, split, lambda key: command, ignored)
    return values, [*errors, *more_errors]
