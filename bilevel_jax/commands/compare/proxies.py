"""A mixture of sources by a regression over proxy runs.

As RegMix (Liu et al. 2024, arXiv 2407.01492) and the data mixing laws (Ye et al. 2024, arXiv 2403.16952): train on
mixtures that are drawn, fit the loss as a function of the mixture, and take the mixture whose predicted loss is least.
A proxy here is a whole training of the task, the best proxy that there is.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from bilevel_jax.runs.tasks.sources import Mixture

Mixtures = Float[np.ndarray, "mixtures sources"]

TEMPERATURE = 0.5
"""The mixtures are drawn around the natural one to this power, which lets small sources count (RegMix)."""
MIN_STRENGTH, MAX_STRENGTH = 0.1, 5.0
"""Sum of the parameters of the Dirichlet distributions, log-uniform: from nearly one source alone to nearly all alike
(RegMix)."""
MAX_USAGE = 15.0
"""The largest share of a source over its natural one: no example weighs more (RegMix)."""
NUM_CANDIDATES, NUM_BEST = 65_536, 100
"""Mixtures whose loss is predicted, and those of least prediction whose mean is taken (RegMix)."""
SMALLEST_REST = 1e-9
"""Of 1 - H_ii, which is rounding where a law goes through every point."""
MAX_EXPONENT = 50.0
RIDGES = tuple(10.0**power for power in range(-6, 2))
OFFSETS = (0.005, 0.02, 0.1, 0.5, 2.0)
"""Distance of the mixing law's floor c below the least loss of a proxy, in ranges of their losses."""


class MixingLaw(NamedTuple):
    """The loss as a function of the mixture p, as it was fitted.

    L = z or L = c + exp(z), with z = a + t.p or z = a + t.p + p.Q p
    """

    is_quadratic: bool
    floor: float
    """c; nan where the loss is z itself."""
    center: Mixture
    feature_means: Float[np.ndarray, "features"]
    coefficients: Float[np.ndarray, "features"]
    intercept: float
    error: float
    """Root mean square of the leave-one-out errors: of log losses, and of losses where some are not above 0. The
    floor c is that of all proxies."""
    constant_error: float
    """The same of a law without mixtures: the mean of the other proxies."""

    @property
    def predicts(self) -> bool:
        """Whether it predicts a proxy that is left out better than the mean of the others does."""
        return self.error < self.constant_error

    @property
    def form(self) -> str:
        """The formula in words, for the log."""
        shape = "quadratic" if self.is_quadratic else "linear"
        return f"{shape} in the loss" if np.isnan(self.floor) else f"{shape} in log(loss - {self.floor:.3g})"

    def predict(self, mixtures: Mixtures) -> Float[np.ndarray, "mixtures"]:
        """The loss of each mixture."""
        features = _make_features(mixtures - self.center, self.is_quadratic) - self.feature_means
        return _to_losses(self.intercept + features @ self.coefficients, self.floor)


def draw_mixtures(natural: Mixture, count: int, seed: tuple[int, ...]) -> Mixtures:
    """Mixtures around the natural one, from Dirichlet distributions of many strengths.

    One that gives a source more than MAX_USAGE times its natural share is moved towards the natural mixture until it
    gives just that.
    """
    random = np.random.default_rng(seed)
    present = natural > 0
    base = natural[present] ** TEMPERATURE
    base /= base.sum()
    strengths = np.exp(random.uniform(np.log(MIN_STRENGTH), np.log(MAX_STRENGTH), count))
    # logarithms of gamma variables, as those of small shapes underflow (Marsaglia and Tsang 2000)
    shapes = strengths[:, None] * base
    gammas = np.log(random.standard_gamma(shapes + 1)) + np.log1p(-random.random(shapes.shape)) / shapes
    drawn = np.exp(gammas - gammas.max(1, keepdims=True))
    drawn /= drawn.sum(1, keepdims=True)
    beyond = drawn - natural[present]
    room = (MAX_USAGE - 1) * natural[present]
    far = np.max(beyond / room, axis=1, keepdims=True)
    mixtures = np.zeros((count, len(natural)))
    mixtures[:, present] = natural[present] + beyond / np.maximum(far, 1)
    return mixtures


def fit_mixing_law(mixtures: Mixtures, losses: Float[np.ndarray, "mixtures"]) -> MixingLaw:
    """The law with the least leave-one-out error, among the forms of `MixingLaw`, floors and ridge penalties.

    L = a + t.p is RegMix's linear regression, L = c + exp(a + t.p) the data mixing law. For a given floor all are ridge
    regressions, whose leave-one-out residuals are r_i / (1 - H_ii) without fitting again: little more points than
    sources are enough, and a law of more coefficients than points is taken only where it predicts the others better.
    """
    spread, least = float(np.ptp(losses)), float(losses.min())
    if not spread:
        raise ValueError("all proxies have the same loss: there is nothing to fit.")
    floors = [np.nan, *([0.0] if least > 0 else []), *(least - offset * spread for offset in OFFSETS)]
    laws = [
        law
        for floor in floors
        for is_quadratic in (False, True)
        for law in _fit_ridges(mixtures, losses, is_quadratic, floor)
    ]
    return min(laws, key=lambda law: law.error)


def choose_mixture(
    natural: Mixture, mixtures: Mixtures, losses: Float[np.ndarray, "mixtures"], seed: tuple[int, ...]
) -> tuple[Mixture, MixingLaw]:
    """(the mixture to train on, the law that says so), from the losses of some proxies.

    The natural mixture where the law predicts the proxies no better than their mean does.

    The mean of the NUM_BEST mixtures of least predicted loss among NUM_CANDIDATES further draws and the proxies' own,
    where the share of no source is above its largest or below its smallest one of a proxy: a law says nothing of what
    is beyond.
    """
    law = fit_mixing_law(mixtures, losses)
    if not law.predicts:
        return natural, law
    candidates = draw_mixtures(natural, NUM_CANDIDATES, seed)
    inside = np.all((candidates >= mixtures.min(0)) & (candidates <= mixtures.max(0)), axis=1)
    pool = np.concatenate([mixtures, candidates[inside]])
    best = np.argsort(law.predict(pool), kind="stable")[: min(NUM_BEST, max(1, len(pool) // 100))]
    return pool[best].mean(0), law


def _make_features(mixtures: Mixtures, is_quadratic: bool) -> Float[np.ndarray, "mixtures features"]:
    if not is_quadratic:
        return mixtures
    rows, columns = np.triu_indices(mixtures.shape[1])
    return np.concatenate([mixtures, mixtures[:, rows] * mixtures[:, columns]], axis=1)


def _fit_ridges(
    mixtures: Mixtures, losses: Float[np.ndarray, "mixtures"], is_quadratic: bool, floor: float
) -> Iterator[MixingLaw]:
    """The law of each ridge penalty, which the intercept does not pay."""
    values = losses if np.isnan(floor) else np.log(losses - floor)
    center, count = mixtures.mean(0), len(losses)
    constant_error = _prediction_error((losses.sum() - losses) / (count - 1), losses)
    features = _make_features(mixtures - center, is_quadratic)
    means, intercept = features.mean(0), float(values.mean())
    left, singular, right = np.linalg.svd(features - means, full_matrices=False)
    for ridge in RIDGES:
        hat = (left * (singular**2 / (singular**2 + ridge))) @ left.T + 1 / len(values)
        left_out = values - (values - hat @ values) / np.maximum(1 - np.diagonal(hat), SMALLEST_REST)
        coefficients = right.T @ (singular / (singular**2 + ridge) * (left.T @ values))
        error = _prediction_error(_to_losses(left_out, floor), losses)
        yield MixingLaw(is_quadratic, floor, center, means, coefficients, intercept, error, constant_error)


def _to_losses(values: np.ndarray, floor: float) -> np.ndarray:
    return values if np.isnan(floor) else floor + np.exp(np.minimum(values, MAX_EXPONENT))


def _prediction_error(predicted: np.ndarray, losses: np.ndarray) -> float:
    """Relative where losses are above 0, as some mixtures have a loss many times that of others; a prediction of 0 or
    less then counts as a thousandth of the least loss."""
    if losses.min() > 0:
        predicted, losses = np.log(np.maximum(predicted, 1e-3 * losses.min())), np.log(losses)
    return float(np.sqrt(np.mean((predicted - losses) ** 2)))
