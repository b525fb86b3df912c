"""The beginnings that sequences of tokens have in common: which of them to read once, and for which sequences."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

LEAST = 16
"""Tokens. A shorter stem is not worth a cache: rows are padded by more than that."""


class Stem(NamedTuple):
    """Sequences start to stop (not included), in sorted order, all begin with the same `length` tokens."""

    start: int
    stop: int
    length: int


def stems(sequences: Sequence[Int[np.ndarray, "len"]], least: int = LEAST) -> list[Stem]:
    """The disjoint stems that save the most tokens. `sequences` are sorted; all that begin with a stem continue it.

    A stem of n tokens that m sequences share saves (m - 1) n. Sorted sequences form a tree of common beginnings, and
    at each of its branchings the choice is between that stem and the best ones of its branches: one pass finds the
    optimum. Stems are not nested: of demonstrations, and a question after them that several responses answer, the one
    that saves more is taken.
    """
    chosen = [Branch(0, 0, 0, [])]  # the path from the root to where the last two sequences part
    for place in range(1, len(sequences) + 1):
        common = 0 if place == len(sequences) else _common(sequences[place - 1], sequences[place])
        closed = Branch(0, place - 1, 0, [])
        while chosen[-1].depth > common:
            closed = _close(_add(chosen.pop(), closed), place, least)
        if chosen[-1].depth == common:
            chosen.append(_add(chosen.pop(), closed))
        else:
            chosen.append(closed._replace(depth=common))
    return chosen[0].stems


class Branch(NamedTuple):
    """The sequences from `start` on that share `depth` tokens, and the best stems among them so far."""

    depth: int
    start: int
    saved: int
    stems: list[Stem]


def _add(parent: Branch, child: Branch) -> Branch:
    parent.stems.extend(child.stems)
    return parent._replace(saved=parent.saved + child.saved)


def _close(branch: Branch, stop: int, least: int) -> Branch:
    saved = (stop - branch.start - 1) * branch.depth
    if branch.depth < least or saved < branch.saved:
        return branch
    return branch._replace(saved=saved, stems=[Stem(branch.start, stop, branch.depth)])


def _common(one: Int[np.ndarray, "len"], two: Int[np.ndarray, "len"]) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(two))
    differ = np.flatnonzero(one[:length] != two[:length])
    return int(differ[0]) if len(differ) else length
