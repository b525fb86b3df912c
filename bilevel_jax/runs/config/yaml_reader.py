"""YAML config reader that reports all errors with line numbers"""

import dataclasses
import difflib
import math
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from bilevel_jax.runs.config.renamed_keys import RENAMED_SECTIONS, describe_renaming, new_key

ConfigT = TypeVar("ConfigT")


def read_yaml_config(config_class: type[ConfigT], path: Path, ignored_sections: Collection[str] = ()) -> ConfigT:
    """Read a YAML file into a config class: a dataclass of sections, each a dataclass of plain fields with defaults.

    Args:
        config_class: the class to return.
        path: the file.
        ignored_sections: sections of other commands, which the file may hold too.

    Raises:
        ValueError: that lists every unknown, renamed, repeated or wrongly typed key with its line.
    """
    root, content = read_yaml(path)
    defaults = config_class()  # a command may have its own for a section
    if root is None or content is None:
        return defaults
    if not isinstance(content, dict):
        sections = ", ".join(field_types(config_class))
        raise ValueError(f"{path}: holds {describe_value(content)}; wanted sections: {sections}.")
    lines, errors = _locate_keys(root, str(path))
    errors += _find_odd_numbers(root, str(path))
    values_by_section, value_errors = decode_sections(
        config_class, content, lambda key: lines.get(key, str(path)), ignored_sections
    )
    if errors or value_errors:
        raise ValueError("\n".join([*errors, *value_errors]))
    return replace_values(defaults, values_by_section)


def decode_sections(
    config_class: type, content: Mapping[Any, Any], locate: Callable[[str], str], ignored_sections: Collection[str] = ()
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The values of a config class in nested dicts, as YAML holds them, by section and key.

    Args:
        config_class: the class of the config.
        content: section -> key -> value.
        locate: `section` or `section.key` -> where it stands, for errors.
        ignored_sections: sections of other commands, which are passed over.

    Returns:
        The values, each of the type of its key, and a line for each key that is unknown, renamed or wrongly typed.
    """
    sections = field_types(config_class)
    errors: list[str] = []
    values_by_section = {}
    for name, values in content.items():
        location = locate(str(name))
        if name not in sections and name in ignored_sections:
            continue
        if name not in sections and name in RENAMED_SECTIONS:
            errors += _describe_renamed_section(name, values, locate)
        elif name not in sections:
            keys = [f"{section}.{name}" for section in sections if name in field_types(sections[section])]
            hint = suggest_nearest(name, sections) if not keys else f"did you mean '{keys[0]}'? "
            errors.append(f"{location}: unknown section '{name}'; {hint}the sections: {', '.join(sections)}.")
        elif not isinstance(values, dict | None):
            own_keys = ", ".join(field_types(sections[name]))
            errors.append(f"{location}: {name} is {describe_value(values)}; wanted its keys: {own_keys}.")
        else:
            section_values = {}
            for key, value in (values or {}).items():
                location = locate(f"{name}.{key}")
                try:
                    section_values[key] = decode_value(_key_type(sections, name, key), value)
                except KeyError as error:
                    errors.append(f"{location}: {error.args[0]}")
                except ValueError as error:
                    errors.append(f"{location}: {name}.{key} is {describe_value(value)}; wanted {error}.")
            values_by_section[name] = section_values
    return values_by_section, errors


def replace_values(config: ConfigT, values_by_section: Mapping[str, Mapping[str, Any]]) -> ConfigT:
    """The config with the given values of its sections; the others stay."""
    sections = {
        name: dataclasses.replace(getattr(config, name), **values) for name, values in values_by_section.items()
    }
    return dataclasses.replace(config, **sections)  # type: ignore[type-var]


def read_yaml(path: Path) -> tuple[yaml.Node | None, Any]:
    """The nodes of a YAML file and what they hold, None for an empty one.

    Raises:
        ValueError: one sentence with the line for what is no YAML of one document, for another encoding than UTF-8, for
            an alias, which may stand for more than any memory holds, and for more than MAX_DEPTH levels.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}). Save the file as text in UTF-8.") from None
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1 if event.start_mark else 1
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"{path}:{line}: *{event.anchor} stands for another value. Write the value itself.")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"{path}:{line}: more than {MAX_DEPTH} levels; a config has sections, keys and lists.")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        return root, yaml.SafeLoader("").construct_document(root) if root is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = " ".join(filter(None, [error.context, error.problem]))
        hint = " Indent with spaces." if "\\t" in problem else " Look at the line and at those before it."
        raise ValueError(f"{place}: not YAML: {problem}.{hint}") from None
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: a value that cannot be read ({error}). Write it in fewer digits.") from None
    except yaml.reader.ReaderError as error:
        raise ValueError(
            f"{path}: not YAML: the character U+{int(error.character):04X} at {error.position}. Remove it."
        ) from None


MAX_DEPTH = 20
"""Levels of a config file: sections, keys, lists."""


def decode_value(expected_type: Any, value: Any) -> Any:
    """Convert a value read from YAML to the expected type; a ValueError says what was wanted."""
    origin, arguments = typing.get_origin(expected_type), typing.get_args(expected_type)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            suggestion = suggest_nearest(value, [choice for choice in arguments if choice]).strip()
            names = ", ".join(choice or "''" for choice in arguments)
            raise ValueError(f"one of {names}{suggestion and f' ({suggestion})'}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list) else [value]  # a single item needs no brackets
        if arguments[-1] is ...:
            return tuple(decode_value(arguments[0], item) for item in items)
        if len(items) != len(arguments):
            raise ValueError(f"a list of {len(arguments)}")
        return tuple(decode_value(item_type, item) for item_type, item in zip(arguments, items, strict=True))
    if expected_type in (str, bool) and isinstance(value, expected_type):
        return value
    if expected_type in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        number = _parse_number(value)
        if expected_type is float and not math.isnan(number):
            return float(number) if abs(number) <= sys.float_info.max else math.copysign(math.inf, number)
        if expected_type is int and math.isfinite(number) and number == int(number):
            if abs(number) < 2**63:
                return int(number)
            raise ValueError("a whole number below 2^63")
    raise ValueError(describe_type(expected_type))


def _parse_number(value: int | float | str) -> int | float:
    """A number as YAML or a command line gives it; nan for what is none. A whole number keeps all of its digits."""
    try:
        return int(value) if isinstance(value, int | str) else value
    except ValueError:  # of a text: YAML 1.1 reads 1e-5 as one
        try:
            return float(value)
        except ValueError:
            return math.nan


def describe_type(expected_type: Any) -> str:
    """What `decode_value` wants for a type."""
    if typing.get_origin(expected_type) is Literal:
        return f"one of {', '.join(choice or repr('') for choice in typing.get_args(expected_type))}"
    if typing.get_origin(expected_type) is tuple:
        return "a list"
    return TYPE_DESCRIPTIONS[expected_type]


TYPE_DESCRIPTIONS = {
    str: "text (quote what looks like a number or a date)",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}


def field_types(dataclass_type: Any) -> dict[str, Any]:
    """The fields of a dataclass and their types."""
    hints = typing.get_type_hints(dataclass_type)
    return {field.name: hints[field.name] for field in dataclasses.fields(dataclass_type)}


def _key_type(sections: dict[str, Any], name: str, key: str) -> Any:
    """The type of a key, or a KeyError that names the nearest one, also of another section."""
    key_types = field_types(sections[name])
    if key in key_types:
        return key_types[key]
    if (new_name := new_key(f"{name}.{key}")) and new_name.partition(".")[0] in sections:
        raise KeyError(f"'{name}.{key}' {describe_renaming(f'{name}.{key}')}.")
    keys_elsewhere = [f"{section}.{key}" for section in sections if key in field_types(sections[section])]
    hint = f"did you mean '{keys_elsewhere[0]}'? " if keys_elsewhere else ""
    if not hint or difflib.get_close_matches(str(key), key_types, 1, cutoff=0.85):
        hint = suggest_nearest(key, key_types)
    raise KeyError(f"unknown key '{name}.{key}'; {hint}the keys of {name}: {', '.join(key_types)}.")


def _describe_renamed_section(name: str, values: Any, locate: Callable[[str], str]) -> list[str]:
    """An error for a section with a former name, or for each of its keys."""
    if not isinstance(values, dict) or not values:
        return [f"{locate(name)}: section '{name}' is now '{RENAMED_SECTIONS[name]}'."]
    return [f"{locate(f'{name}.{key}')}: '{name}.{key}' {describe_renaming(f'{name}.{key}')}." for key in values]


def suggest_nearest(name: Any, names: Iterable[str]) -> str:
    """`did you mean ...?` with the name most similar to the given one, or nothing where none is similar."""
    names = list(names)
    same = [known for known in names if known.lower() == str(name).lower()]  # adamW is adamw, and not adam
    matches = same or difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean '{matches[0]}'? " if matches else ""


def describe_value(value: Any) -> str:
    """A value and its type, for errors, in one line."""
    text = " ".join(repr(value).split())
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return "empty" if value is None else f"{shown} ({type(value).__name__})"


def _find_odd_numbers(root: yaml.Node, path: str) -> list[str]:
    """An error for each number that YAML 1.1 reads as another than a person does: 010 is 8, 1:30 is 90."""
    errors = []
    for node in _list_scalars(root):
        is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if is_number and re.match(r"[-+]?0[0-9_]|[-+]?0[bx]|.*:", node.value):
            number = node.value if len(node.value) <= 40 else f"{node.value[:37]}..."
            errors.append(
                f"{path}:{node.start_mark.line + 1}: {number} is no decimal number. Write its digits, or quote it."
            )
    return errors


def _list_scalars(node: yaml.Node) -> Iterable[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            for part in pair:
                yield from _list_scalars(part)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _list_scalars(item)


def _locate_keys(root: yaml.Node, path: str) -> tuple[dict[str, str], list[str]]:
    """file:line of each section and key, and an error for each that occurs twice (YAML would take the last)."""
    lines: dict[str, str] = {}
    duplicates: list[str] = []

    def walk(node, prefix):
        for key, value in node.value:
            name, location = f"{prefix}{key.value}", f"{path}:{key.start_mark.line + 1}"
            if name in lines:
                duplicates.append(f"{location}: '{name}' stands twice; the first is at {lines[name]}.")
            lines[name] = location
            if prefix == "" and isinstance(value, yaml.MappingNode):
                walk(value, f"{name}.")

    walk(root, "")
    return lines, duplicates
