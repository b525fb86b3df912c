"""Prefixes shared by several token sequences."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

MIN_PREFIX_LENGTH = 16
"""Tokens. A shorter prefix is not worth a cache: rows are padded by more than that."""


class SharedPrefix(NamedTuple):
    """Sequences start to stop (not included), in sorted order, all begin with the same `length` tokens."""

    start: int
    stop: int
    length: int


def find_shared_prefixes(
    sequences: Sequence[Int[np.ndarray, "len"]], min_length: int = MIN_PREFIX_LENGTH
) -> list[SharedPrefix]:
    """The disjoint prefixes that save the most tokens. `sequences` are sorted; all that begin with a prefix continue
    it.

    A prefix of n tokens that m sequences share saves (m - 1) n. Sorted sequences form a tree of common beginnings, and
    at each of its branchings the choice is between that prefix and the best ones of its branches: one pass finds the
    optimum. Prefixes are not nested: of demonstrations, and a question after them that several responses answer, the
    one that saves more is taken.

    Args:
        sequences: token ids, sorted.
        min_length: tokens of the shortest prefix that is worth a cache.

    Returns:
        Disjoint ranges of sequences and the lengths of their prefixes, in order.

    Example:
        >>> find_shared_prefixes([np.array([1, 2, 3]), np.array([1, 2, 4]), np.array([5])], min_length=2)
        [SharedPrefix(start=0, stop=2, length=2)]
    """
    open_branches = [PrefixBranch(0, 0, 0, [])]  # the path from the root to where the last two sequences part
    for place in range(1, len(sequences) + 1):
        common = 0 if place == len(sequences) else _common_length(sequences[place - 1], sequences[place])
        closed = PrefixBranch(0, place - 1, 0, [])
        while open_branches[-1].depth > common:
            closed = _close_branch(_add_child(open_branches.pop(), closed), place, min_length)
        if open_branches[-1].depth == common:
            open_branches.append(_add_child(open_branches.pop(), closed))
        else:
            open_branches.append(closed._replace(depth=common))
    return open_branches[0].prefixes


class PrefixBranch(NamedTuple):
    """The sequences from `start` on that share `depth` tokens, and the best prefixes among them so far."""

    depth: int
    start: int
    saved_tokens: int
    prefixes: list[SharedPrefix]


def _add_child(parent: PrefixBranch, child: PrefixBranch) -> PrefixBranch:
    parent.prefixes.extend(child.prefixes)
    return parent._replace(saved_tokens=parent.saved_tokens + child.saved_tokens)


def _close_branch(branch: PrefixBranch, stop: int, min_length: int) -> PrefixBranch:
    saved_tokens = (stop - branch.start - 1) * branch.depth
    if branch.depth < min_length or saved_tokens < branch.saved_tokens:
        return branch
    return branch._replace(saved_tokens=saved_tokens, prefixes=[SharedPrefix(branch.start, stop, branch.depth)])


def _common_length(first: Int[np.ndarray, "len"], second: Int[np.ndarray, "len"]) -> int:
    """How many tokens both begin with."""
    length = min(len(first), len(second))
    differ = np.flatnonzero(first[:length] != second[:length])
    return int(differ[0]) if len(differ) else length
