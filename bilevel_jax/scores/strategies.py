"""From scores of each response to one number for each way of generating responses: means, mixes, ratios."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Values = Float[np.ndarray, "*some questions strategies"]
Strategies = Float[np.ndarray, "*some strategies"]
Mean = Callable[[Values], Strategies]
"""Over the questions of a block."""

CAP = 10.0
"""The perplexity of a response that `mix` reads at most."""


def mean(values: Values) -> Strategies:
    """The arithmetic mean over the questions: the published one."""
    return values.mean(-2)


def exp_of_mean(values: Values) -> Strategies:
    """exp(mean log): of perplexities the geometric mean, which a few improbable responses move less."""
    return np.exp(np.log(values).mean(-2))


def trimmed(share: float) -> Mean:
    """The arithmetic mean without that share of the questions at either end, rounded down; for each strategy its own.

    Raises ValueError unless 0 <= share < 1/2.
    """
    if not 0 <= share < 0.5:
        raise ValueError(f"a trimmed mean leaves out a share in [0, 0.5) at either end; {share} was given.")

    def average(values: Values) -> Strategies:
        gone = int(share * values.shape[-2])
        return np.sort(values, axis=-2)[..., gone : values.shape[-2] - gone, :].mean(-2)

    return average


def minmax(values: Strategies) -> Strategies:
    """(v - least) / (largest - least) over the strategies; 0 where all are equal."""
    low, high = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
    return (values - low) / np.where(high > low, high - low, 1.0)


def mix(perplexities: Values, distances: Values, beta: float | None = 0.5) -> Strategies:
    """β minmax(mean of perplexities, each at most CAP) + (1 - β) minmax(mean of D); the least wins.

    `beta` None: CV(PPL) / (CV(PPL) + CV(D)), where CV is the standard deviation over the strategies' means divided by
    their mean; 1/2 where neither varies. Where every response is at the cap, D alone is left. Source: arXiv 2502.11779
    v1; that the cap is on each response, and not on the mean, is our reading.
    """
    p, d = mean(np.minimum(perplexities, CAP)), mean(distances)
    if beta is None:
        one, other = (v.std(-1, keepdims=True) / np.maximum(np.abs(v.mean(-1, keepdims=True)), 1e-30) for v in (p, d))
        total = one + other
        weight = np.where(total > 0, one / np.where(total > 0, total, 1.0), 0.5)
    else:
        weight = np.array(beta)
    return weight * minmax(p) + (1 - weight) * minmax(d)


def car(rewards: Values, losses: Values) -> Strategies:
    """Mean reward / (1 + 3 mean ℓ), ℓ in nats per token: the largest wins. Wrong for rewards below 0."""
    return mean(rewards) / (1 + 3 * mean(losses))
