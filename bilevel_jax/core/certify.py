"""Certificates of a hypergradient by finite differences and retraining."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bilevel_jax.core import tree
from bilevel_jax.core.types import Checks, Hyper

RetrainFn = Callable[[Hyper], float]
"""hyper -> L_v of the estimand itself, in nats: trained again (unrolled) or solved again (implicit)."""


class FiniteDifferences(NamedTuple):
    """Central differences of the estimand along w * sign(grad), over the slope that the estimate predicts."""

    steps: tuple[float, ...]
    ratios: tuple[float, ...]


class RemovalPrediction(NamedTuple):
    """Predicted and actual changes of L_v (nats) when random examples leave the training set."""

    fraction: float
    """The share of the examples that each retrain left out."""
    predicted: tuple[float, ...]
    actual: tuple[float, ...]
    rank: float
    """Spearman's rank correlation of the two: the linear-datamodelling score."""
    slope: float
    """Least-squares slope of actual on predicted."""


class Certificates(NamedTuple):
    """What was checked of one estimate; None where a check was not made."""

    finite_differences: FiniteDifferences | None
    metasmoothness: float | None
    """cos(grad(w), grad(w without a fifth of the examples)), over the examples that stay."""
    removal_prediction: RemovalPrediction | None
    checks: Checks


class Verdict(NamedTuple):
    """The sentence that a person reads first."""

    level: str
    """BELIEVE, DO NOT BELIEVE or UNDECIDED."""
    scope: str
    """How large a change of the weights the level is about."""
    reason: str
    remedy: str

    def __str__(self) -> str:
        head = f"{self.level} {self.scope}".strip()
        return " ".join(filter(None, [f"{head}:", self.reason, self.remedy]))


def check_finite_differences(
    retrain: RetrainFn, weights: Hyper, grad: Hyper, step_sizes: Sequence[float] = (0.1, 0.03, 0.01, 0.003)
) -> FiniteDifferences:
    """Central differences of the estimand over the slope that the estimate predicts: 1 where `grad` is right.

        ratio(s) = [L_v(w + s d) - L_v(w - s d)] / (2 s <grad, d>)  with d = w * sign(grad)

    Every weight changes by the share s of itself, so none turns negative. Along the signs of grad nothing cancels;
    along a random direction <grad, d> does, and in float32 the ratio would be off by percents for a gradient that is
    right to 1e-4. The largest step also tells regimes apart: its ratio leaves 1 where training is chaotic, although
    the derivative is right. Costs two retrains a step.

    Args:
        retrain: weights -> L_v of the estimand, nats.
        weights: the outer variable at which `grad` was estimated.
        grad: shaped as `weights`, nats per unit of weight.
        step_sizes: the shares s.

    Returns:
        The ratio for each step size; nan where `grad` is 0.

    Example:
        >>> def retrain(weights):
        ...     return float(jnp.sum(weights**2))
        >>> weights = jnp.array([1.0, 2.0])
        >>> check = bj.certify.check_finite_differences(retrain, weights, 2 * weights, step_sizes=(0.1,))
        >>> round(check.ratios[0], 3)
        1.0
    """
    direction = jax.tree.map(lambda w, g: w * jnp.sign(g), weights, grad)
    predicted_slope = float(optax.tree.vdot(grad, direction))
    if predicted_slope == 0:
        return FiniteDifferences(tuple(step_sizes), (float("nan"),) * len(step_sizes))
    ratios = []
    for step_size in step_sizes:
        up, down = (retrain(optax.tree.add_scale(weights, sign * step_size, direction)) for sign in (1.0, -1.0))
        ratios.append((up - down) / (2 * step_size * predicted_slope))
    return FiniteDifferences(tuple(step_sizes), tuple(ratios))


def drop_random_examples(key: Array, weights: Float[Array, "examples"], fraction: float) -> Float[Array, "examples"]:
    """The weights with a random `fraction` of the examples set to 0.

    Args:
        key: of the choice.
        weights: float[examples].
        fraction: of the examples, rounded to a whole number of them.

    Returns:
        float[examples].

    Example:
        >>> int(jnp.sum(bj.certify.drop_random_examples(jax.random.key(0), jnp.ones(10), 0.3) == 0))
        3
    """
    count = round(fraction * weights.shape[0])
    dropped = jax.random.permutation(key, weights.shape[0])[:count]
    return weights.at[dropped].set(0)


def metasmoothness(
    estimate: Callable[[Hyper], Hyper],
    key: Array,
    weights: Float[Array, "examples"],
    grad: Float[Array, "examples"],
    removed: float = 0.2,
) -> float:
    """Metasmoothness in its cosine form: how far the hypergradient stays the same when random examples leave.

        cos(grad(w), grad(w with a random share `removed` of the examples left out)), over the examples that stay

    Near 1 where the landscape is smooth at the size of the changes one makes; near 0 where it is noise. Costs one more
    estimate.

    Args:
        estimate: weights -> their hypergradient, float[examples].
        key: of the choice of examples.
        weights: float[examples].
        grad: the hypergradient at `weights`, float[examples].
        removed: share of the examples left out.

    Returns:
        The cosine.

    Example:
        >>> weights = jnp.arange(1.0, 6.0)
        >>> round(bj.certify.metasmoothness(lambda w: 2 * w, jax.random.key(0), weights, 2 * weights), 3)
        1.0
    """
    subset_weights = drop_random_examples(key, weights, removed)
    remaining = subset_weights != 0
    return float(tree.cosine(jnp.where(remaining, grad, 0), jnp.where(remaining, estimate(subset_weights), 0)))


def predict_removals(
    retrain: RetrainFn,
    key: Array,
    weights: Float[Array, "examples"],
    grad: Float[Array, "examples"],
    validation_loss: float,
    *,
    fraction: float = 0.5,
    num_retrains: int = 8,
) -> RemovalPrediction:
    """How well <grad, change> predicts the change of L_v when a random `fraction` of the examples is left out.

    Ranks hold better than magnitudes, so read `rank` first (the linear datamodelling score, LDS). With 8 retrains its
    standard error is about .35 around 0: enough to tell .9 from noise, not .8 from .6.

    Args:
        retrain: weights -> L_v of the estimand, nats.
        key: of the choices of examples.
        weights: float[examples].
        grad: the hypergradient at `weights`, float[examples], nats per unit of weight.
        validation_loss: L_v at `weights`, nats.
        fraction: of the examples that each retrain leaves out.
        num_retrains: retrains, each without other examples.

    Returns:
        Predicted and actual changes, their rank correlation and slope.

    Example:
        >>> grad = jnp.array([-3.0, 1.0, 2.0, -0.5])
        >>> prediction = bj.certify.predict_removals(
        ...     lambda w: float(w @ grad), jax.random.key(0), jnp.ones(4), grad, validation_loss=-0.5
        ... )
        >>> round(prediction.rank, 3), round(prediction.slope, 3)
        (1.0, 1.0)
    """
    predicted, actual = [], []
    for subkey in jax.random.split(key, num_retrains):
        subset_weights = drop_random_examples(subkey, weights, fraction)
        predicted.append(float(jnp.vdot(grad, subset_weights - weights)))
        actual.append(retrain(subset_weights) - validation_loss)
    p, a = jnp.array(predicted), jnp.array(actual)
    slope = jnp.vdot(p - p.mean(), a - a.mean()) / jnp.vdot(p - p.mean(), p - p.mean())
    return RemovalPrediction(fraction, tuple(predicted), tuple(actual), spearman(p, a), float(slope))


def spearman(first: Float[Array, "n"], second: Float[Array, "n"]) -> float:
    """Spearman's rank correlation; ties take the mean of their ranks.

    Args:
        first: float[n].
        second: float[n].

    Returns:
        Between -1 and 1; nan where one of the two is constant.

    Example:
        >>> round(bj.certify.spearman(jnp.array([1.0, 2.0, 3.0]), jnp.array([10.0, 30.0, 20.0])), 3)
        0.5
    """

    def ranks(values):
        below = jnp.sum(values[:, None] > values[None, :], axis=1)
        ties = jnp.sum(values[:, None] == values[None, :], axis=1)
        return below + (ties - 1) / 2

    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    return float(jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))


def judge_certificates(certificates: Certificates) -> Verdict:
    """The certificates as one level with its reason and remedy.

    BELIEVE for small changes where the ratio at step .1 lies in [.95, 1.05] and the metasmoothness is at least .7, for
    changes of half of the data where it is at least .9; DO NOT BELIEVE where that ratio leaves [.9, 1.1],
    metasmoothness is below .5, or a number is not finite; in between, or with checks missing, UNDECIDED. The
    thresholds come from ten calibrated settings of small language models, not from a theorem.

    Args:
        certificates: the checks of one estimate.

    Returns:
        The verdict; `str(verdict)` is its sentence.

    Example:
        >>> differences = bj.certify.FiniteDifferences(steps=(0.1,), ratios=(1.01,))
        >>> verdict = bj.certify.judge_certificates(bj.certify.Certificates(differences, 0.95, None, bj.Checks()))
        >>> verdict.level
        'BELIEVE'
    """
    checks = certificates.checks
    if not checks.replayed:
        reason = "replaying the training run did not end where training did."
        return Verdict("DO NOT BELIEVE", "", reason, "Run again on one kind of device.")
    if checks.curvature <= 0:
        reason = f"the curvature is not positive definite ({checks.curvature:.2g})."
        return Verdict("DO NOT BELIEVE", "", reason, "Raise the prior, or use Gauss-Newton curvature, or unrolled.")
    if checks.residual > 0.1:
        reason = f"the linear system was not solved (relative residual {checks.residual:.2g})."
        return Verdict("DO NOT BELIEVE", "", reason, "Raise the number of iterations or the prior.")
    if certificates.finite_differences is None or certificates.metasmoothness is None:
        return Verdict("UNDECIDED", "", "the certificates were not computed.", "Compute them (run without --fast).")
    step_size, ratio, cosine = (
        certificates.finite_differences.steps[0],
        certificates.finite_differences.ratios[0],
        certificates.metasmoothness,
    )
    reason = (
        f"a change of every weight by {step_size:.0%} moves L_v by {ratio:.3f} of what the gradient predicts, and "
        f"without a fifth of the examples the gradient keeps a cosine of {cosine:.3f}."
    )
    remedy = "Lower the learning rate, lengthen the warm-up, raise eps_root, or use a window."
    if not 0.9 <= ratio <= 1.1 or not cosine >= 0.5:
        return Verdict("DO NOT BELIEVE", "", reason, remedy)
    if 0.95 <= ratio <= 1.05 and cosine >= 0.9:
        return Verdict("BELIEVE", "changes up to half of the data", reason, "")
    if 0.95 <= ratio <= 1.05 and cosine >= 0.7:
        return Verdict("BELIEVE", "small changes", reason, "")
    return Verdict("UNDECIDED", "", reason, remedy)
