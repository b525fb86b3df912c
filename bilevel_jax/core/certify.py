"""Certificates of a hypergradient by finite differences and retraining."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from bilevel_jax.core import tree
from bilevel_jax.core.solve.solution import STATUS_REMEDIES, BilevelSolver, Solution, Status
from bilevel_jax.core.types import Checks, Frozen, Hyper, ModelState, PyTree

RetrainFn = Callable[[Hyper], float]
"""hyper -> L_v of the estimand itself, in nats: trained again (unrolled) or solved again (implicit)."""


class FiniteDifferences(NamedTuple):
    """Central differences of the estimand along w * sign(grad), over the slope that the estimate predicts."""

    steps: tuple[float, ...]
    ratios: tuple[float, ...]
    noise: tuple[float, ...] = ()
    """The part of each ratio that may be rounding; empty where it was not measured."""


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


class Certificates(NamedTuple):
    """What was checked of one estimate; None where a check was not made."""

    finite_differences: FiniteDifferences | None
    metasmoothness: float | None
    """cos(grad(w), grad(w without a fifth of the examples)), over the examples that stay."""
    removal_prediction: RemovalPrediction | None
    checks: Checks
    status: Status = Status.OK
    """Of the solution."""
    is_per_example: bool = True
    """Whether the outer variable holds a number for each training example; else only the differences apply."""
    missing: str = ""
    """Why no check was made, and what helps."""

    @property
    def verdict(self) -> Verdict:
        """The sentence that a person reads first."""
        return judge_certificates(self)

    def __str__(self) -> str:
        lines = [str(self.verdict)]
        if self.finite_differences is not None:
            for size, ratio in zip(self.finite_differences.steps, self.finite_differences.ratios, strict=True):
                lines.append(f"  change by {size:<7g} actual / predicted {ratio:.4f}")
        if self.metasmoothness is not None:
            lines.append(f"  cosine without a fifth of the examples {self.metasmoothness:.4f}")
        if self.removal_prediction is not None:
            removal = self.removal_prediction
            count = len(removal.actual)
            lines.append(
                f"  {count} retrains without {removal.fraction:.0%} of the examples: rank correlation of predicted and "
                f"actual {removal.rank:.3f}, slope {removal.slope:.3f}"
            )
        measured = {
            name: value
            for name, value in self.checks._asdict().items()
            if not np.isnan(float(value)) and (name != "batches" or value)
        }
        lines.append("  " + ", ".join(f"{name} {float(value):.3g}" for name, value in measured.items()))
        return "\n".join(lines)


STEP_SIZES = (0.1, 0.03, 0.01, 0.003)
SMALLEST_STEP = 1e-7


def check(
    solver: BilevelSolver,
    solution: Solution,
    train: PyTree,
    valid: PyTree,
    *,
    key: Any = None,
    frozen: Frozen = (),
    model_state: ModelState = (),
    step_sizes: Sequence[float] = STEP_SIZES,
    num_retrains: int = 8,
    fraction: float = 0.5,
    seed: int = 0,
) -> Certificates:
    """All certificates of a solution in one call, with a verdict; `print` shows them.

    Differences of the estimand along the signs of the gradient, at the step sizes given and, where their ratios are
    not near 1 yet, at ever smaller ones down to rounding; metasmoothness; and retrains without a part of the examples.
    A weight of 0 does not move in the differences, so that they say nothing of its derivative.
    With the defaults it costs 9 to 19 trainings for the differences, one more solution, and 8 trainings. For an outer
    variable that is not one weight for each example only the differences apply: every entry then moves by the step
    itself, not by a share of it.

    Args:
        solver: as it made the solution.
        solution: of `solver.run`, outside of transformations.
        train: as `run` was given it.
        valid: likewise.
        key: likewise.
        frozen: likewise.
        model_state: likewise.
        step_sizes: of the differences, largest first.
        num_retrains: retrains without some examples; 0 for none.
        fraction: of the examples that each of them leaves out.
        seed: of the choices of examples.

    Returns:
        The certificates; `verdict` is their sentence. Where the solver has no gradient, or does not train again, it is
        UNDECIDED and says why.

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> train, valid = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0]), jnp.array([4.0])
        >>> solver = bj.unroll(problem, optax.sgd(0.1), steps=5)
        >>> solution = solver.run(jnp.array(0.0), jnp.ones(5), train, valid)
        >>> bj.certify.check(solver, solution, train, valid, num_retrains=0).verdict.level
        'BELIEVE'
    """
    if jnp.ndim(solution.status):
        raise ValueError(
            f"the solution holds {jnp.size(solution.status)} solutions; give one of them: "
            "jax.tree.map(lambda leaf: leaf[0], solution)."
        )
    checks, status = jax.tree.map(np.asarray, solution.checks), Status(int(solution.status))
    given = {"key": key, "frozen": frozen, "model_state": model_state}
    without = Certificates(None, None, None, checks, status, solver.is_per_example)
    if not jax.tree.leaves(solution.grad):
        return without._replace(missing="the method has no hypergradient. Use unroll, implicit or penalty for one.")
    if not solver.is_retrained:
        return without._replace(
            missing="the solver was given the minimizer and cannot find another one. Give it an optimizer and steps."
        )
    if status in (Status.EMPTY, Status.NOT_FINITE):
        return without

    def retrain(hyper: Hyper) -> float:
        return float(solver.value(solution.start, hyper, train, valid, **given))

    hyper, grad, value = solution.hyper, solution.grad, float(solution.value)
    direction = _direction(hyper, grad, is_relative=solver.is_per_example)
    slope = float(optax.tree.vdot(grad, direction))
    if slope == 0:
        return without._replace(
            missing="the gradient is 0 wherever the outer variable is not: no change by a share of a weight tests it. "
            "Compute it at weights above 0."
            if solver.is_per_example
            else "the gradient is 0: it predicts no change that a difference could test."
        )
    again = retrain(hyper)
    if not abs(again - value) <= max(0.05 * step_sizes[0] * abs(slope), 1e-6 * abs(value)):
        return without._replace(
            missing=f"the same outer variable gives L_v = {again:.6g} now, and {value:.6g} in the solution. Give check "
            "the train, valid, key, frozen and model_state that run was given; if it has them, training amplifies "
            "rounding: lower the learning rate, or use float64."
        )
    differences = check_finite_differences(
        retrain, hyper, grad, step_sizes, is_relative=solver.is_per_example, value=value
    )
    if not solver.is_per_example:
        return without._replace(finite_differences=differences)

    def estimate(weights: Hyper) -> Hyper:
        return solver.run(solution.start, weights, train, valid, throw=False, **given).grad

    smoothness_key, removal_key = jax.random.split(jax.random.key(seed))
    removal = None
    if num_retrains:
        removal = predict_removals(
            retrain, removal_key, hyper, grad, value, fraction=fraction, num_retrains=num_retrains
        )
    return without._replace(
        finite_differences=differences,
        metasmoothness=metasmoothness(estimate, smoothness_key, hyper, grad),
        removal_prediction=removal,
    )


def check_finite_differences(
    retrain: RetrainFn,
    weights: Hyper,
    grad: Hyper,
    step_sizes: Sequence[float] = STEP_SIZES,
    *,
    is_relative: bool = True,
    value: float | None = None,
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
        step_sizes: the shares s, largest first.
        is_relative: False: every entry moves by s itself, d = sign(grad), for an outer variable that is no table of
            weights.
        value: L_v at `weights`, nats. Where it is given, what rounding does to a ratio is measured, by one retrain at
            weights that differ in their last bits; and as long as the last ratio is not within 5 % of 1 and rounding
            allows, a step a tenth as large follows, down to 1e-7: a ratio that never comes near 1 is that of a kink.

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
    direction = _direction(weights, grad, is_relative=is_relative)
    predicted_slope = float(optax.tree.vdot(grad, direction))
    if predicted_slope == 0:
        return FiniteDifferences(tuple(step_sizes), (float("nan"),) * len(step_sizes))

    def ratio_at(step_size: float) -> float:
        up, down = (retrain(optax.tree.add_scale(weights, sign * step_size, direction)) for sign in (1.0, -1.0))
        return (up - down) / (2 * step_size * predicted_slope)

    sizes, ratios = list(step_sizes), [ratio_at(step_size) for step_size in step_sizes]
    if value is None:
        return FiniteDifferences(tuple(sizes), tuple(ratios))
    eps = max(float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in jax.tree.leaves(weights))
    nearby = retrain(optax.tree.add_scale(weights, 4 * eps, direction))
    rounding = max(abs(nearby - value), 8 * eps * abs(value)) / abs(predicted_slope)
    while abs(ratios[-1] - 1) > 0.05 and sizes[-1] / 10 >= SMALLEST_STEP and rounding / (sizes[-1] / 10) < 0.02:
        sizes.append(sizes[-1] / 10)
        ratios.append(ratio_at(sizes[-1]))
    return FiniteDifferences(tuple(sizes), tuple(ratios), tuple(rounding / size for size in sizes))


def _direction(weights: Hyper, grad: Hyper, *, is_relative: bool) -> Hyper:
    return jax.tree.map(lambda w, g: jnp.sign(g) * (w if is_relative else 1), weights, grad)


def has_kinks(differences: FiniteDifferences) -> bool:
    """Whether the ratios fail to tend to 1 as the step falls: L_v(w) jumps, as it does for a network of ReLU units.

    Central differences of a smooth function come nearer to its slope as the step falls, until rounding shows. Kinks are
    seen where a ratio that is nearly right at the largest step gets worse at a smaller one (by half, and more than .1
    off), where one is far off (by 3 and more) and three times as far as at every larger step, or where ratios are off
    still at the smallest step that rounding allows and have not settled there (those that have are of a number that is
    not the derivative). Where training is chaotic, but smooth, ratios are far off at large steps and right at small
    ones.

    Args:
        differences: the ratios, largest step first, with what rounding does to them (`noise`).

    Returns:
        Whether kinks were seen; False where rounding was not measured, as nothing can be told then.

    Example:
        >>> exact = (0.0,) * 3  # no rounding to speak of
        >>> bj.certify.has_kinks(bj.certify.FiniteDifferences((0.1, 0.03, 0.01), (0.945, 0.896, 0.882), exact))
        True
        >>> bj.certify.has_kinks(bj.certify.FiniteDifferences((0.1, 0.03, 0.01), (0.7, 0.96, 0.995), exact))
        False
        >>> bj.certify.has_kinks(bj.certify.FiniteDifferences((0.1, 3e-5, 3e-6), (0.66, 28.0, 1.0), exact))
        True
    """
    if not differences.noise:
        return False
    errors = [abs(ratio - 1) for ratio in differences.ratios]
    limits = [max(0.1, 3 * noise) for noise in differences.noise]
    gets_worse = errors[0] < 0.3 and any(
        error > limit and error > 1.5 * min(errors[:place], default=error)
        for place, (error, limit) in enumerate(zip(errors, limits, strict=True))
    )
    grows = any(  # one jump J adds J / (2 s slope), also where the largest step is off for another reason
        error > max(3.0, limit, 3 * max(errors[:place], default=error))
        for place, (error, limit) in enumerate(zip(errors, limits, strict=True))
    )
    is_off_at_the_end = errors[-1] > limits[-1] and differences.steps[-1] <= 1e-4
    return gets_worse or grows or (is_off_at_the_end and not _has_another_slope(differences))


def _has_another_slope(differences: FiniteDifferences) -> bool:
    """Whether the ratios settle away from 1 as the step falls: L_v is smooth, and its slope another."""
    if not differences.noise or len(differences.ratios) < 3 or differences.steps[-1] > 1e-4:
        return False
    last, noise = differences.ratios[-3:], 3 * max(differences.noise[-3:])
    is_settled = max(last) - min(last) <= 0.01 * abs(last[-1]) + noise
    return is_settled and noise < 0.1 and abs(last[-1] - 1) > 0.1


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
    metasmoothness is below .5, a number is not finite or the solution's status is bad; in between, with checks missing,
    or where the ratios do not tend to 1 as the step falls (`has_kinks`), UNDECIDED. For an outer variable that is not
    one weight for each example the ratio alone decides. The thresholds come from ten calibrated settings of small
    language models, not from a theorem.

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
    if certificates.status != Status.OK:
        return Verdict("DO NOT BELIEVE", "", STATUS_REMEDIES[certificates.status], "")
    if certificates.missing:
        return Verdict("UNDECIDED", "", certificates.missing, "")
    differences, cosine = certificates.finite_differences, certificates.metasmoothness
    if differences is None or (cosine is None and certificates.is_per_example):
        return Verdict("UNDECIDED", "", "the certificates were not computed.", "Compute them (run without --fast).")
    step_size, ratio = differences.steps[0], differences.ratios[0]
    if certificates.is_per_example:
        reason = (
            f"a change of every weight by {step_size:.0%} moves L_v by {ratio:.3f} of what the gradient predicts, and "
            f"without a fifth of the examples the gradient keeps a cosine of {cosine:.3f}."
        )
    else:
        reason = f"a change of every entry by {step_size:g} moves L_v by {ratio:.3f} of what the gradient predicts."
        cosine = 0.7  # no such check applies
    remedy = "Lower the learning rate, lengthen the warm-up, raise eps_root, or use a window."
    is_kinked = has_kinks(differences)
    if is_kinked:
        smallest = max(zip(differences.steps, differences.ratios, strict=True), key=lambda pair: abs(pair[1] - 1))
        reason += (
            f" The ratio does not tend to 1 as the change falls ({smallest[1]:.3g} at {smallest[0]:g}): L_v jumps, as "
            "it does where a network has kinks (ReLU, max, abs, clipping)."
        )
        remedy = "Take a smooth activation (GELU, SiLU, tanh) in place of ReLU."
    elif _has_another_slope(differences):
        reason += (
            f" The ratio tends to {differences.ratios[-1]:.3g} as the change falls: L_v is smooth, and the number is "
            "not its derivative, as with a window shorter than training, a small gamma, or a truncated solve."
        )
        remedy = "Lengthen the window, raise gamma, or take unroll without a window."
    if not 0.9 <= ratio <= 1.1 or not (cosine is not None and cosine >= 0.5):
        return Verdict("DO NOT BELIEVE", "", reason, remedy)
    if is_kinked:
        return Verdict("UNDECIDED", "", reason, remedy)
    if 0.95 <= ratio <= 1.05 and cosine >= 0.9:
        return Verdict("BELIEVE", "changes up to half of the data", reason, "")
    if 0.95 <= ratio <= 1.05 and cosine >= 0.7:
        return Verdict("BELIEVE", "small changes", reason, "")
    return Verdict("UNDECIDED", "", reason, remedy)
