"""Random scores and random numbers from hashes of example ids."""

import hashlib

import numpy as np

from bilevel_jax.scores.requests import ScoreFn, ScorePlan, TokenizedExamples, make_score_plan


def random_score(seed: int = 0) -> ScoreFn:
    """s_i ~ uniform on [0, 1), a hash of the row's id and the seed, so that it does not depend on where it stands."""

    def score(candidates: TokenizedExamples, holdout: TokenizedExamples) -> ScorePlan:
        random_values = np.array([hash_to_int(example.id, seed) for example in candidates.examples]) / 2.0**64
        requests_by_sequence: list = [[] for _ in random_values]
        return make_score_plan(
            requests_by_sequence, lambda nats, tokens: random_values, np.zeros(len(random_values), int), 0
        )

    return score


def hash_to_int(text: str, seed: int = 0) -> int:
    """64 bits that depend on nothing but the text and the seed: draws by id do not depend on where a row stands."""
    return int.from_bytes(hashlib.sha256(f"{seed} {text}".encode()).digest()[:8], "big")
