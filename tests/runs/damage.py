"""Damage to the files of a run: single bits flipped, files cut, swapped and deleted."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

UNSEALED = (".lock",)
"""Files of a run's folder that say nothing of the run."""


class Case(NamedTuple):
    """One damage: what was done to which file, in a folder that it was done to."""

    kind: str
    name: str
    """Relative to the folder; of two files that were swapped, the first."""
    other: str = ""


def list_files(folder: Path) -> list[str]:
    """Every file of a folder, by its relative name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [name for path in paths if (name := path.relative_to(folder).as_posix()) not in UNSEALED]


def flip(folder: Path, other: Path, name: str, draw: Random) -> Case | None:
    """One bit, anywhere in a file."""
    content = bytearray((folder / name).read_bytes())
    if not content:
        return None
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    (folder / name).write_bytes(content)
    return Case("flip", name)


def cut(folder: Path, other: Path, name: str, draw: Random) -> Case | None:
    """The end of a file, at any byte; of one with lines, every second time at the end of a line."""
    content = (folder / name).read_bytes()
    if not content:
        return None
    ends = [at + 1 for at, byte in enumerate(content[:-1]) if byte == ord("\n")]
    size = draw.choice(ends) if ends and draw.random() < 0.5 else draw.randrange(len(content))
    os.truncate(folder / name, size)
    return Case("cut", name)


def swap(folder: Path, other: Path, name: str, draw: Random) -> Case | None:
    """A file with that of the same name in another run, or, every second time, with another file of the run."""
    content = (folder / name).read_bytes()
    if draw.random() < 0.5 and (other / name).is_file():
        if (other / name).read_bytes() == content:
            return None
        shutil.copyfile(other / name, folder / name)
        return Case("swap", name)
    second = draw.choice(list_files(folder))
    if (folder / second).read_bytes() == content:
        return None
    (folder / name).write_bytes((folder / second).read_bytes())
    (folder / second).write_bytes(content)
    return Case("swap", name, second)


def delete(folder: Path, other: Path, name: str, draw: Random) -> Case | None:
    """A file."""
    (folder / name).unlink()
    return Case("delete", name)


KINDS: dict[str, Callable[[Path, Path, str, Random], Case | None]] = {
    "flip": flip,
    "cut": cut,
    "swap": swap,
    "delete": delete,
}


def damaged_copies(
    kind: str, whole: Path, other: Path, place: Path, count: int, names: list[str] | None = None
) -> Iterator[tuple[Path, Case]]:
    """`count` copies of the run `whole`, one after the other in `place`, each with one damage, file after file."""
    draw, done = Random(f"{kind} {whole.name}"), 0
    names = names or list_files(whole)
    order: list[str] = []
    while done < count:
        order = order or draw.sample(names, len(names))
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole, place)
        if (case := KINDS[kind](place, other, order.pop(), draw)) is not None:
            done += 1
            yield place, case
