"""Loss and perplexity of a row under the model: two scores that ask the same and point in opposite directions."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from bilevel_jax.scores.requests import Plan, Rows, per_token, plan, targets


def loss(rows: Rows, holdout: Rows) -> Plan:
    """s_i = ℓ_i = -(1/|y_i|) Σ_t log p(y_it | x_i, y_i<t), nats per token: rows that the model finds hard come first.

    The loss of `losses.sft` under the same tokens; of a pair, that of the chosen response. The holdout is not read.
    The order of online batch selection (Loshchilov & Hutter, arXiv 1511.06343). Wrong where labels are: noise is hard.
    """
    return _of_own_likelihood(rows, lambda mean: -mean)


def perplexity(rows: Rows, holdout: Rows) -> Plan:
    """s_i = -exp(ℓ_i): rows that the model finds likely come first, with ℓ_i as in `loss`, whose order it reverses.

    The filter of CCNet (Wenzek et al., arXiv 1911.00359). Wrong where the model already knows what it likes.
    """
    return _of_own_likelihood(rows, lambda mean: -np.exp(-mean))


def _of_own_likelihood(rows: Rows, score: Callable[[Float[np.ndarray, "rows"]], Float[np.ndarray, "rows"]]) -> Plan:
    asked = [targets(rows.sides(i)[0]) for i in range(len(rows.examples))]
    return plan(asked, lambda nats, tokens: score(per_token(nats, tokens)), np.zeros(len(asked), int), 0)
