"""A mixture of sources by a regression over proxy runs.

As RegMix (Liu et al. 2024, arXiv 2407.01492) and the data mixing laws (Ye et al. 2024, arXiv 2403.16952): train on
mixtures that are drawn, fit the loss as a function of the mixture, and take the mixture whose predicted loss is least.
A proxy here is a whole training of the task, the best proxy that there is.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from bilevel_jax.runs.tasks.sources import MAX_USAGE, Mixture

Mixtures = Float[np.ndarray, "mixtures sources"]

TEMPERATURE = 0.5
"""The mixtures are drawn around the natural one to this power, which lets small sources count (RegMix)."""
MIN_STRENGTH, MAX_STRENGTH = 0.1, 5.0
"""Sum of the parameters of the Dirichlet distributions, log-uniform: from nearly one source alone to nearly all alike
(RegMix)."""
NUM_CANDIDATES, NUM_BEST = 65_536, 100
"""Mixtures whose loss is predicted, and those of least prediction whose mean is taken (RegMix)."""
SMALLEST_REST = 1e-9
"""Of 1 - H_ii, which is rounding where a law goes through every point."""
MAX_EXPONENT = 50.0
RIDGES = tuple(10.0**power for power in range(-6, 2))
OFFSETS = (np.nan, 0.0, 0.005, 0.02, 0.1, 0.5, 2.0)
"""Distance of the mixing law's floor c below the least loss of a proxy, in ranges of their losses; 0: c = 0, where all
losses are above; nan: the loss itself, and no logarithm."""
MIN_PROXIES = 4
"""Proxies with a finite loss that a law needs."""
NUM_FOLDS = 32
"""Parts of the proxies, each of which the laws of the others predict; of fewer proxies each is a part."""


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
    """Root mean square of the errors with which proxies are predicted by the law that the others alone give, its form,
    its floor and its ridge penalty too: of log losses, and of losses where some are not above 0. A prediction beyond
    the losses of the others counts as the least or the largest of these: one mixture that a law exaggerates is no
    verdict on the order of all."""
    constant_error: float
    """The same of a law without mixtures: the mean of the others, of their logarithms where errors are of these."""

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
    regressions, whose leave-one-out predictions need no further fit: little more points than sources are enough, and a
    law of more coefficients than points is taken only where it predicts the others better. The floor of each prediction
    is that of the other proxies. The least of many errors is too low, so that of the law (`MixingLaw.error`) is of
    proxies that had no part in the choice either.
    """
    if not np.ptp(losses):
        raise ValueError("all proxies have the same loss: there is nothing to fit.")
    predicted, means = np.empty_like(losses, float), np.empty_like(losses, float)
    for fold in np.array_split(np.arange(len(losses)), min(NUM_FOLDS, len(losses))):
        others = np.setdiff1d(np.arange(len(losses)), fold)
        law = _fit_best(mixtures[others], losses[others])
        predicted[fold] = np.clip(law.predict(mixtures[fold]), losses[others].min(), losses[others].max())
        means[fold] = _mean(losses[others], in_logarithms=losses.min() > 0)
    return _fit_best(mixtures, losses)._replace(
        error=float(_prediction_error(predicted, losses)), constant_error=float(_prediction_error(means, losses))
    )


def choose_mixture(
    natural: Mixture, mixtures: Mixtures, losses: Float[np.ndarray, "mixtures"], seed: tuple[int, ...]
) -> tuple[Mixture, MixingLaw]:
    """(the mixture to train on, the law that says so), from the losses of some proxies.

    The minimum of the law, and the natural mixture where the law predicts the proxies no better than their mean does.
    """
    law = fit_mixing_law(mixtures, losses)
    return (find_minimum(law, natural, mixtures, seed) if law.predicts else natural), law


def find_minimum(law: MixingLaw, natural: Mixture, mixtures: Mixtures, seed: tuple[int, ...]) -> Mixture:
    """The mean of the NUM_BEST mixtures of least predicted loss.

    They are among NUM_CANDIDATES further draws and the proxies' own. No share of a source is above its largest or below
    its smallest one of a proxy: a law says nothing of what is beyond.
    """
    candidates = draw_mixtures(natural, NUM_CANDIDATES, seed)
    inside = np.all((candidates >= mixtures.min(0)) & (candidates <= mixtures.max(0)), axis=1)
    pool = np.concatenate([mixtures, candidates[inside]])
    best = np.argsort(law.predict(pool), kind="stable")[: min(NUM_BEST, max(1, len(pool) // 100))]
    return pool[best].mean(0)


def _make_features(mixtures: Mixtures, is_quadratic: bool) -> Float[np.ndarray, "mixtures features"]:
    if not is_quadratic:
        return mixtures
    rows, columns = np.triu_indices(mixtures.shape[1])
    return np.concatenate([mixtures, mixtures[:, rows] * mixtures[:, columns]], axis=1)


def _fit_best(mixtures: Mixtures, losses: Float[np.ndarray, "mixtures"]) -> MixingLaw:
    """The law of least leave-one-out error, which is its `error`."""
    offsets = [offset for offset in OFFSETS if offset or losses.min() > 0]
    laws = [law for is_quadratic in (False, True) for law in _fit_ridges(mixtures, losses, is_quadratic, offsets)]
    return min(laws, key=lambda law: law.error)


def _fit_ridges(
    mixtures: Mixtures, losses: Float[np.ndarray, "mixtures"], is_quadratic: bool, offsets: Sequence[float]
) -> Iterator[MixingLaw]:
    """The law of each floor and each ridge penalty, which the intercept does not pay, with its leave-one-out error.

    What predicts proxy i is sum_{j != i} H_ij z_j / (1 - H_ii), where z has the floor of the proxies j.
    """
    count, center = len(losses), mixtures.mean(0)
    features = _make_features(mixtures - center, is_quadratic)
    means = features.mean(0)
    left, singular, right = np.linalg.svd(features - means, full_matrices=False)
    ridges = np.array(RIDGES)[:, None]
    hats = (left * (singular**2 / (singular**2 + ridges))[:, None]) @ left.T + 1 / count
    rests = np.maximum(1 - np.diagonal(hats, axis1=1, axis2=2), SMALLEST_REST)
    is_left_out = np.eye(count, dtype=bool)
    for offset in offsets:
        floor = _find_floor(losses, offset)
        floors = np.array([_find_floor(losses[~row], offset) for row in is_left_out])
        values = _to_values(losses, floor)
        values_of_others = np.where(is_left_out, 0.0, _to_values(losses, floors[:, None]))
        left_out = np.sum(hats * values_of_others, axis=2) / rests
        coefficients = (singular / (singular**2 + ridges) * (left.T @ values)) @ right
        errors = _prediction_error(_to_losses(left_out, floors), losses)
        for fitted, error in zip(coefficients, errors, strict=True):
            yield MixingLaw(is_quadratic, floor, center, means, fitted, float(values.mean()), float(error), np.nan)


def _mean(losses: np.ndarray, *, in_logarithms: bool) -> float:
    """The constant of least error in the measure of `_prediction_error`."""
    return float(np.exp(np.log(losses).mean()) if in_logarithms else losses.mean())


def _find_floor(losses: np.ndarray, offset: float) -> float:
    if not offset or np.isnan(offset):
        return offset
    least = float(losses.min())
    return least - offset * (float(np.ptp(losses)) or abs(least) or 1.0)


def _to_values(losses: np.ndarray, floors: np.ndarray | float) -> np.ndarray:
    """log(L - c), or L without a floor; nan for the one loss that may be below a floor of the others."""
    above = losses - floors
    return np.where(np.isnan(floors), losses, np.log(above, out=np.full_like(above, np.nan), where=above > 0))


def _to_losses(values: np.ndarray, floors: np.ndarray | float) -> np.ndarray:
    return np.where(np.isnan(floors), values, floors + np.exp(np.minimum(values, MAX_EXPONENT)))


def _prediction_error(
    predicted: Float[np.ndarray, "*laws mixtures"], losses: Float[np.ndarray, "mixtures"]
) -> Float[np.ndarray, "*laws"]:
    """Relative where losses are above 0, as some mixtures have a loss many times that of others; a prediction of 0 or
    less then counts as a thousandth of the least loss."""
    if losses.min() > 0:
        predicted, losses = np.log(np.maximum(predicted, 1e-3 * losses.min())), np.log(losses)
    return np.sqrt(np.mean((predicted - losses) ** 2, axis=-1))
