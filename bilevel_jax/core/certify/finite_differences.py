"""Finite differences of the validation loss after retraining, beside the gradient."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax.core.types import Fetch, Hyper

RetrainFn = Callable[[Hyper], float]
"""hyper -> L_v of the estimand itself, in nats: trained again (unrolled) or solved again (implicit)."""


class FiniteDifferences(NamedTuple):
    """Central differences of the estimand along w * sign(grad), over the slope that the estimate predicts."""

    steps: tuple[float, ...]
    ratios: tuple[float, ...]
    noise: tuple[float, ...] = ()
    """The part of each ratio that may be rounding; empty where it was not measured."""


STEP_SIZES = (0.1, 0.03, 0.01, 0.003)


SMALLEST_STEP = 1e-7
MAX_ROUNDING = 0.02
"""The part of a ratio that may be rounding; smaller steps are not taken, but for the largest of all."""


def check_finite_differences(
    retrain: RetrainFn,
    weights: Hyper,
    grad: Hyper,
    step_sizes: Sequence[float] = STEP_SIZES,
    *,
    is_relative: bool = True,
    value: float | None = None,
    fetch: Fetch = np.asarray,
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
            weights that differ in their last bits; steps at which it may be more than .02, but for the largest, are
            left out; and as long as the last ratio is not within 5 % of 1 and rounding
            allows, a step a tenth as large follows, down to 1e-7: a ratio that never comes near 1 is that of a kink.
        fetch: reads the slope; of several processes it, and `retrain`, must give all of them the same number (as in
            `solvers.cg`), since the ratios say which steps follow.

    Returns:
        The ratio for each step size that was taken; nan where `grad` is 0.

    Example:
        >>> def retrain(weights):
        ...     return float(jnp.sum(weights**2))
        >>> weights = jnp.array([1.0, 2.0])
        >>> check = bj.certify.check_finite_differences(retrain, weights, 2 * weights, step_sizes=(0.1,))
        >>> round(check.ratios[0], 3)
        1.0
    """
    direction = sign_direction(weights, grad, is_relative=is_relative)
    predicted_slope = float(fetch(optax.tree.vdot(grad, direction)))
    if predicted_slope == 0:
        return FiniteDifferences(tuple(step_sizes), (float("nan"),) * len(step_sizes))

    def ratio_at(step_size: float) -> float:
        up, down = (retrain(optax.tree.add_scale(weights, sign * step_size, direction)) for sign in (1.0, -1.0))
        return (up - down) / (2 * step_size * predicted_slope)

    if value is None:
        return FiniteDifferences(tuple(step_sizes), tuple(ratio_at(step_size) for step_size in step_sizes))
    eps = max(float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in jax.tree.leaves(weights))
    nearby = retrain(optax.tree.add_scale(weights, 4 * eps, direction))
    rounding = max(abs(nearby - value), 8 * eps * abs(value)) / abs(predicted_slope)
    largest = max(step_sizes)
    sizes = [size for size in step_sizes if size == largest or not rounding / size > MAX_ROUNDING]
    ratios = [ratio_at(size) for size in sizes]
    while abs(ratios[-1] - 1) > 0.05 and sizes[-1] / 10 >= SMALLEST_STEP and rounding / (sizes[-1] / 10) < MAX_ROUNDING:
        sizes.append(sizes[-1] / 10)
        ratios.append(ratio_at(sizes[-1]))
    return FiniteDifferences(tuple(sizes), tuple(ratios), tuple(rounding / size for size in sizes))


def sign_direction(weights: Hyper, grad: Hyper, *, is_relative: bool) -> Hyper:
    """The direction that the differences go along: w * sign(grad), or sign(grad)."""
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
    return gets_worse or grows or (is_off_at_the_end and not has_another_slope(differences))


def has_another_slope(differences: FiniteDifferences) -> bool:
    """Whether the ratios settle away from 1 as the step falls: L_v is smooth, and its slope another."""
    if not differences.noise or len(differences.ratios) < 3 or differences.steps[-1] > 1e-4:
        return False
    last, noise = differences.ratios[-3:], 3 * max(differences.noise[-3:])
    is_settled = max(last) - min(last) <= 0.01 * abs(last[-1]) + noise
    return is_settled and noise < 0.1 and abs(last[-1] - 1) > 0.1
