"""From a YAML file to frozen dataclasses: all trouble at once, each with its line and what was wanted."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

Config = TypeVar("Config")


def read(kind: type[Config], path: Path, others: Collection[str] = ()) -> Config:
    """`path` as a `kind`: a dataclass of sections, each a dataclass of plain fields, all with defaults.

    Raises one ValueError that lists every unknown, repeated or wrongly typed key. Sections, and keys of a section, that
    are named in `others` or that `kind` lacks there are passed over: the file was written for another verb.
    """
    text = path.read_text(encoding="utf-8")
    try:
        root, content = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    sections = fields(kind)
    if root is None or content is None:
        return kind()
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {_said(content)}; wanted sections: {', '.join(sections)}.")
    lines, trouble = _lines(root, str(path))
    given = {}
    for name, values in content.items():
        at = lines.get(str(name), str(path))
        if name not in sections and name in others:
            continue
        if name not in sections:
            trouble.append(
                f"{at}: unknown section '{name}'; {nearest(name, sections)}the sections: {', '.join(sections)}."
            )
        elif not isinstance(values, dict | None):
            trouble.append(f"{at}: {name} is {_said(values)}; wanted its keys: {', '.join(fields(sections[name]))}.")
        else:
            chosen = {}
            for key, value in (values or {}).items():
                at = lines.get(f"{name}.{key}", str(path))
                try:
                    chosen[key] = decode(_field(sections, name, key), value)
                except KeyError as error:
                    trouble.append(f"{at}: {error.args[0]}")
                except ValueError as error:
                    trouble.append(f"{at}: {name}.{key} is {_said(value)}; wanted {error}.")
            given[name] = chosen
    if trouble:
        raise ValueError("\n".join(trouble))
    defaults = kind()  # a verb may have its own for a section
    return kind(**{name: dataclasses.replace(getattr(defaults, name), **chosen) for name, chosen in given.items()})


def decode(kind: Any, value: Any) -> Any:
    """`value`, as YAML gave it, as the type `kind`; a ValueError says what was wanted."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments:
            close = nearest(value, [one for one in arguments if one]).strip()
            names = ", ".join(one or "''" for one in arguments)
            raise ValueError(f"one of {names}{close and f' ({close})'}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list) else [value]  # a single item needs no brackets
        if arguments[-1] is ...:
            return tuple(decode(arguments[0], item) for item in items)
        if len(items) != len(arguments):
            raise ValueError(f"a list of {len(arguments)}")
        return tuple(decode(each, item) for each, item in zip(arguments, items, strict=True))
    if kind in (str, bool) and isinstance(value, kind):
        return value
    if kind in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-5 as text
        except ValueError:
            number = math.nan
        if kind is float and not math.isnan(number):
            return number
        if kind is int and number.is_integer():
            return value if isinstance(value, int) else int(number)
    raise ValueError(WANTED[kind])


WANTED = {
    str: "text (quote what looks like a number or a date)",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}


def fields(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass and their types."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _field(sections: dict[str, Any], name: str, key: str) -> Any:
    """The type of a key, or a KeyError that names the nearest one, also of another section."""
    known = fields(sections[name])
    if key in known:
        return known[key]
    elsewhere = [f"{section}.{key}" for section in sections if key in fields(sections[section])]
    hint = f"did you mean '{elsewhere[0]}'? " if elsewhere else nearest(key, known)
    raise KeyError(f"unknown key '{name}.{key}'; {hint}the keys of {name}: {', '.join(known)}.")


def nearest(name: Any, names: Iterable[str]) -> str:
    """`did you mean ...?` with the name that is most like the given one; nothing where none is alike."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f"did you mean '{close[0]}'? " if close else ""


def _said(value: Any) -> str:
    return "empty" if value is None else f"{value!r} ({type(value).__name__})"


def _lines(root: yaml.Node, path: str) -> tuple[dict[str, str], list[str]]:
    """file:line of each section and key, and a complaint for each that stands twice (YAML would take the last)."""
    lines: dict[str, str] = {}
    twice: list[str] = []

    def walk(node, prefix):
        for key, value in node.value:
            name, at = f"{prefix}{key.value}", f"{path}:{key.start_mark.line + 1}"
            if name in lines:
                twice.append(f"{at}: '{name}' stands twice; the first is at {lines[name]}.")
            lines[name] = at
            if prefix == "" and isinstance(value, yaml.MappingNode):
                walk(value, f"{name}.")

    walk(root, "")
    return lines, twice
