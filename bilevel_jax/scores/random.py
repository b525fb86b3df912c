"""Random numbers as scores: what every other score must beat."""

import numpy as np

from bilevel_jax.scores.embedding import number
from bilevel_jax.scores.requests import Plan, Rows, Score, plan


def random(seed: int = 0) -> Score:
    """s_i ~ uniform on [0, 1), a hash of the row's id and the seed, so that it does not depend on where it stands."""

    def score(rows: Rows, holdout: Rows) -> Plan:
        drawn = np.array([number(example.id, seed) for example in rows.examples]) / 2.0**64
        asked: list = [[] for _ in drawn]
        return plan(asked, lambda nats, tokens: drawn, np.zeros(len(drawn), int), 0)

    return score
