"""Targets of a tokenized dialogue, their weights, and what truncation leaves."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from bilevel_jax.lm.data.encode import TurnMask, common_prefix_length
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.lm.data.render import Tokenizer
from bilevel_jax.lm.data.turns import MAX_TURN_WEIGHT


class EncodedSide(NamedTuple):
    """One dialogue as tokens."""

    ids: list[int]
    mask: TurnMask
    weights: list[float] = []  # noqa: RUF012 (never written to)
    """Of each token; empty where all are 1."""


class TokenWeights(NamedTuple):
    """Factors of the losses of an example's targets, and where they stand."""

    values: Float[np.ndarray, "targets"]
    where: str
    """For errors, as `file:line`."""


def choose_targets(side: Example, example: Example, train_on: str) -> list[int]:
    """Which turns of one side of an example are answers to learn."""
    answers = [i for i, turn in enumerate(side.turns) if turn.role == "assistant"]
    answers = answers[_count_shared_answers(example) if example.rejected else 0 :]
    if train_on == "last_turn":
        answers = answers[-1:]
    targets = [i for i in answers if side.turns[i].is_target]
    if answers and not targets:
        raise ValueError(
            f"{example.where}: the {'last answer' if train_on == 'last_turn' else 'response'} is marked as no target "
            "(weight 0, or train, loss or trainable false), so no token is left to learn. Remove the mark or the row"
            + (", or set data.train_on to 'all_turns'." if train_on == "last_turn" else ".")
        )
    return targets


def _count_shared_answers(example: Example) -> int:
    """Assistant turns that both sides of a pair begin with; beyond them, both must answer."""
    shared = common_prefix_length(example.turns, example.rejected)
    differing = example.turns[shared : shared + 1] + example.rejected[shared : shared + 1]
    if not differing:
        raise ValueError(f"{example.where}: the chosen and the rejected response are the same. Remove the pair.")
    if [turn.role for turn in differing] != ["assistant", "assistant"]:
        raise ValueError(
            f"{example.where}: the two sides of the pair differ at message {shared + 1} before the assistant answers; "
            "a preference compares two responses to one prompt. Give both the same messages up to the response."
        )
    return sum(turn.role == "assistant" for turn in example.turns[:shared])


def weigh_targets(
    side: EncodedSide, dialogue: Example, targets: Sequence[int], given: TokenWeights | None
) -> EncodedSide:
    """The tokens with the weights of their turns, times those that were given for the targets."""
    of_turns = [dialogue.turns[turn].weight for turn in targets]
    if given is None and all(weight == 1 for weight in of_turns):
        return side
    weights = [of_turns[turn - 1] if turn and of_turns else 1.0 for turn in side.mask]
    if given is not None:
        places = [i for i, turn in enumerate(side.mask) if turn]
        problem = _describe_bad_weights(given.values, len(places), dialogue)
        if problem:
            raise ValueError(f"{given.where}: {problem}")
        for i, value in zip(places, given.values.tolist(), strict=True):
            weights[i] *= value
    return side._replace(weights=weights)


def _describe_bad_weights(values: np.ndarray, num_targets: int, dialogue: Example) -> str:
    who = f"the example {dialogue.id} ({dialogue.where})"
    if dialogue.rejected:
        return f"token weights for {who}, which is a preference pair; they are read for single responses alone."
    if len(values) != num_targets:
        return (
            f"{len(values)} token weights for {who}, which has {num_targets} targets, its end token included. Give one "
            "weight for each, in order."
        )
    bad = np.flatnonzero(~((values >= 0) & (values <= MAX_TURN_WEIGHT)))
    if bad.size:
        return (
            f"token weight {bad[0] + 1} for {who} is {values[bad[0]]:g}; a number from 0 to {MAX_TURN_WEIGHT:,.0f} is "
            "wanted."
        )
    if not values.any():
        return f"all token weights for {who} are 0, so there is nothing to learn from. Remove the example."
    return ""


def leave_out_weightless(side: EncodedSide) -> EncodedSide:
    """Tokens of weight 0 are no targets, as turns of weight 0 are none."""
    if not side.weights:
        return side
    return side._replace(mask=[turn if weight else 0 for turn, weight in zip(side.mask, side.weights, strict=True)])


def add_bos_and_eos(ids: list[int], mask: TurnMask, tokenizer: Tokenizer) -> EncodedSide:
    """Exactly one BOS in front, nothing after the last target, EOS at its end."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None:
        num_bos = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        ids, mask = [bos, *ids[num_bos:]], [0, *mask[num_bos:]]
    end = len(mask) - next((i for i, is_target in enumerate(reversed(mask)) if is_target), len(mask))
    ids, mask = ids[:end], mask[:end]
    if end and eos is not None and ids[-1] != eos:
        ids, mask = [*ids, eos], [*mask, mask[-1]]
    if mask:
        mask[0] = 0  # nothing stands before it to predict it from
    return EncodedSide(ids, mask)


def truncate_sides(
    sides: list[EncodedSide], max_length: int, truncation: str, num_bos: int
) -> tuple[list[EncodedSide], list[str]]:
    """The sides of an example within max_length, and which cuts were made; `num_bos` = 1 where a BOS comes first."""
    if truncation == "drop":
        return [EncodedSide([], []) for _ in sides], ["drop"]
    cuts = []
    if truncation == "left" and all(any(side.mask) for side in sides):
        # up to the response that must stay: of a pair the first target, of a dialogue the last answer's. Without BOS
        # one token stays before it, to predict it from.
        response_starts = [
            side.mask.index(max(side.mask) if len(sides) == 1 else next(filter(None, side.mask))) for side in sides
        ]
        num_removed = min(max(len(side.ids) for side in sides) - max_length, min(response_starts) - 1)
        if num_removed:
            sides = [_delete_tokens(side, num_bos, num_bos + num_removed) for side in sides]
            cuts.append("left")
    if any(len(side.ids) > max_length for side in sides):
        sides = [EncodedSide(ids[:max_length], mask[:max_length], w[:max_length]) for ids, mask, w in sides]
        cuts.append("error" if truncation == "error" else "right")
    return sides, cuts


def _delete_tokens(side: EncodedSide, start: int, stop: int) -> EncodedSide:
    """The sequence without some tokens. An answer that loses its first words is no target: only something to read."""
    ids, mask, weights = side
    split_turn = mask[stop - 1] if mask[stop - 1] == mask[stop] else 0
    remaining_mask = mask[:start] + [0 if turn == split_turn else turn for turn in mask[stop:]]
    remaining_mask[0] = 0
    return EncodedSide(ids[:start] + ids[stop:], remaining_mask, weights[:start] + weights[stop:])
