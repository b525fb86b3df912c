"""Short names of this machine's files, for results that leave it."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any


def short_file_names(paths: Iterable[str]) -> dict[str, str]:
    """Each path -> what of it can be told: a relative one as it is, of an absolute one the end that no other shares.

    Example:
        >>> short_file_names(["data/rows.jsonl", "/home/me/a/rows.jsonl", "/home/me/b/rows.jsonl", "/home/me/m"])
        {'data/rows.jsonl': 'data/rows.jsonl', '/home/me/a/rows.jsonl': 'a/rows.jsonl', \
'/home/me/b/rows.jsonl': 'b/rows.jsonl', '/home/me/m': 'm'}
    """
    paths = list(dict.fromkeys(paths))
    parts = {path: PurePosixPath(path).parts[1:] for path in paths if PurePosixPath(path).is_absolute()}

    ends = Counter(own[-length:] for own in parts.values() for length in range(1, len(own) + 1))

    def shorten(path: str) -> str:
        own = parts[path]
        length = next((n for n in range(1, len(own) + 1) if ends[own[-n:]] == 1), len(own))
        return "/".join(own[-length:]) or path

    return {path: shorten(path) if path in parts else path for path in paths}


def hide_local_paths(value: Any, settings: Any) -> Any:
    """`value` (JSON) with the absolute paths that stand in `settings` (JSON, too) by their short names.

    A path within a folder of the settings is shortened with the folder.
    """
    texts = list(_iterate_strings(settings))
    texts += [text.partition("@")[0] for text in texts if "@" in text]  # of folder@split the folder
    absolute = [text for text in texts if PurePosixPath(text).is_absolute()]
    names = {path.rstrip("/"): name for path, name in short_file_names(absolute).items() if path.strip("/")}
    if not names:
        return value
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w./-])({'|'.join(map(re.escape, longest_first))})(?![\w-])")

    def hide(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [hide(item) for item in value]
        return pattern.sub(lambda match: names[match[1]], value) if isinstance(value, str) else value

    return hide(value)


def hide_paths_in_arguments(arguments: Iterable[str]) -> list[str]:
    """The arguments of a command with each absolute path, also behind `--key=`, by its last part."""
    return [
        re.sub(r"^(--?[\w.-]+=)?(/.*)$", lambda match: (match[1] or "") + PurePosixPath(match[2]).name, argument)
        for argument in arguments
    ]


def _iterate_strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _iterate_strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _iterate_strings(item)
