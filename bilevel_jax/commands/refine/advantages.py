"""Advantages of a generator's responses and tokens, from their rewards."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

MIN_SPREAD = 1e-6
"""Rewards of a group that differ by less, as a share of the root mean square of all, are taken for equal."""


class Advantages(NamedTuple):
    """How much better than the other responses to its question each token's continuation was."""

    tokens: list[Float[np.ndarray, "tokens"]]
    num_equal: int
    """Groups whose rewards are all equal, which teach nothing."""


def compute_advantages(
    rewards: Sequence[Float[np.ndarray, "tokens"]], draws: int, mode: str, *, by_token: bool
) -> Advantages:
    """The advantages of all tokens; the responses of a group of `draws` are neighbours.

    A token is credited with R_t, the reward of its response, or, with `by_token`, its own reward and those that follow
    it (0 once a response has ended), less the mean of R_t over the other responses of the group at the same place:

        A_jt = (R_jt - mean of R_kt over the others k) / spread,   spread = root mean square of the differences
               over the tokens of the group (mode `group`) or of the round (`batch`)

    What is taken off does not depend on what token t is, so it changes no expectation. Under `group` each question
    counts the same, however little its responses differ.

    Args:
        rewards: of each token of each response; without `by_token`, the response's reward is their sum.
        draws: responses to a question, at least 2.
        mode: `group` or `batch`.
        by_token: whether a token is credited with what comes from it on alone.

    Returns:
        Advantages of the tokens of each response.
    """
    counts = np.array([len(own) for own in rewards])
    credit = np.zeros((len(rewards), max(1, counts.max(initial=1))))
    for row, own in enumerate(rewards):
        credit[row, : len(own)] = np.cumsum(own[::-1])[::-1]
        if not by_token:
            credit[row] = own.sum()
    groups = credit.reshape(-1, draws, credit.shape[1])
    present = (np.arange(credit.shape[1]) < counts[:, None]).reshape(groups.shape)
    others = (groups.sum(1, keepdims=True) - groups) / (draws - 1)
    differences = np.where(present, groups - others, 0)
    squares = (differences**2).sum((1, 2), keepdims=True)
    spread = np.sqrt(squares / np.maximum(present.sum((1, 2), keepdims=True), 1))
    scale = np.sqrt((np.where(present, groups, 0) ** 2).sum() / max(present.sum(), 1))
    is_equal = spread <= MIN_SPREAD * scale
    overall = np.sqrt(squares.sum() / max(present.sum(), 1))
    divisor = spread if mode == "group" else np.full_like(spread, overall)
    values = np.divide(differences, divisor, out=np.zeros_like(differences), where=~is_equal & (divisor > 0))
    flat = values.reshape(credit.shape)
    return Advantages([flat[row, :count] for row, count in enumerate(counts)], int(is_equal.sum()))


def share_rewards_of_equal_responses(
    rewards: Sequence[Float[np.ndarray, "tokens"]], responses: Sequence[Int[np.ndarray, "tokens"]], draws: int
) -> list[Float[np.ndarray, "tokens"]]:
    """Rewards in which responses of a group that are equal token for token have their mean.

    They are the same action, so that differences between them, where in training each stood, say nothing of it.
    """
    shared: dict[tuple[int, ...], list[int]] = {}
    for row, tokens in enumerate(responses):
        shared.setdefault((row // draws, *(int(token) for token in tokens)), []).append(row)
    means = {row: np.mean([rewards[other] for other in rows], axis=0) for rows in shared.values() for row in rows}
    return [means[row] for row in range(len(responses))]
