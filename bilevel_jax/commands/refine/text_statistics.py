"""Repetition, length and entropy of a round's responses, and what they say of degenerate text."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.commands.refine.rollouts import Rollouts
from bilevel_jax.runs.stats import rank_correlation

NGRAM = 4
"""Tokens of the pieces whose repetition is counted."""
REPEATED_RISE, DUPLICATES_RISE = 0.2, 0.3
"""How much more repetition than in the first round is told, as shares."""
OVERFITTING_FACTOR = 1.05
"""A dev loss that ends this much above its least is told where validation loss fell on."""
LENGTH_FACTOR, ENTROPY_FACTOR, LENGTH_CORRELATION = 1.5, 0.25, 0.8
"""What change of length or of entropy is told, and from which rank correlation a reward orders by length alone."""


def measure_responses(rollouts: Rollouts, rewards: Float[np.ndarray, "responses"]) -> dict[str, float | None]:
    """What the record of a round holds of its responses' text.

    repeated: mean share of a response's 4-grams of tokens that stood in it before; duplicates: share of the responses
    that another one to the same question equals; empty: share without text; entropy: mean of -log q over all tokens,
    nats per token; length: mean, in tokens; reward_by_length: rank correlation of reward and length.
    """
    lengths = np.array([len(own) for own in rollouts.tokens])
    log_probs = np.concatenate(rollouts.log_probs) if lengths.sum() else np.zeros(1)
    correlation = rank_correlation(rewards, lengths) if len(lengths) > 2 else float("nan")
    return {
        "repeated": float(np.mean([share_of_repeated_ngrams(own) for own in rollouts.tokens])),
        "duplicates": share_of_duplicates(rollouts.tokens, rollouts.num_generations),
        "empty": float(np.mean([not text.strip() for text in rollouts.texts])),
        "entropy": float(-log_probs.mean()),
        "length": float(lengths.mean()),
        "reward_by_length": float(correlation) if np.isfinite(correlation) else None,
    }


def share_of_repeated_ngrams(tokens: Int[np.ndarray, "length"], size: int = NGRAM) -> float:
    """The share of a response's n-grams that stood in it before; 0 for one that is shorter."""
    ngrams = [tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def share_of_duplicates(tokens: Sequence[Int[np.ndarray, "length"]], draws: int) -> float:
    """The share of the responses that another one to the same question equals token for token."""
    counts = Counter((at // draws, tuple(own)) for at, own in enumerate(tokens))
    return sum(count for count in counts.values() if count > 1) / max(1, len(tokens))


def describe_degeneration(first: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """What a person should know of the text of the last round beside the first: a sentence each; none is good."""
    found = []
    if last["repeated"] > first["repeated"] + REPEATED_RISE:
        found.append(
            f"Responses repeat themselves: {last['repeated']:.0%} of their {NGRAM}-grams stood in them before, against "
            f"{first['repeated']:.0%} in the first round. Raise reinforce.kl_coefficient."
        )
    if last["duplicates"] > first["duplicates"] + DUPLICATES_RISE:
        found.append(
            f"{last['duplicates']:.0%} of the responses equal another one to the same question, against "
            f"{first['duplicates']:.0%} in the first round: a group of equal responses teaches nothing. Raise "
            "reinforce.kl_coefficient, or stop earlier."
        )
    if last["entropy"] < ENTROPY_FACTOR * first["entropy"]:
        found.append(
            f"The generator is almost deterministic: its entropy fell from {first['entropy']:.2f} to "
            f"{last['entropy']:.2f} nats per token. Raise reinforce.kl_coefficient, or lower reinforce.learning_rate."
        )
    factor = last["length"] / max(first["length"], 1e-9)
    if not 1 / LENGTH_FACTOR < factor < LENGTH_FACTOR:
        found.append(
            f"Responses have {last['length']:.0f} tokens on average, against {first['length']:.0f} in the first round: "
            "length itself may be what is rewarded."
        )
    correlation = last["reward_by_length"]
    if correlation is not None and abs(correlation) > LENGTH_CORRELATION:
        found.append(
            f"Rewards order the responses by little but their length (rank correlation {correlation:+.2f} in the last "
            "round)."
        )
    return found


def describe_overfitting(rounds: list[dict[str, Any]]) -> list[str]:
    """A sentence where dev loss of the students rose again while validation, which rewards, fell on; none is good.

    Of students that each start from the same model: one that goes on from the last is over-trained with any generator.
    """
    best = int(np.argmin([record["dev_loss"] for record in rounds]))
    at_best, last = rounds[best], rounds[-1]
    if last["target_loss"] >= at_best["target_loss"] or last["dev_loss"] < OVERFITTING_FACTOR * at_best["dev_loss"]:
        return []
    return [
        f"After round {best} the generator follows the validation examples themselves: validation loss of the student "
        f"went on from {at_best['target_loss']:.4f} to {last['target_loss']:.4f}, its dev loss rose from "
        f"{at_best['dev_loss']:.4f} to {last['dev_loss']:.4f}. Take fewer rounds, a larger "
        "reinforce.kl_coefficient, or more validation examples."
    ]
