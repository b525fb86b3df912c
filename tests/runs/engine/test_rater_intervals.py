"""Intervals of a rater's coefficients hold what they should as often as they say, on a problem that trains at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.core import weightings
from bilevel_jax.runs.stats import jackknife_half_width

NUM_EXAMPLES, NUM_INPUTS, NUM_REPEATS = 400, 4, 150
TRUE, NOISE = 0, [1, 2]
"""The features: a noisy sign of the examples with right answers, and noise."""


def draw_problem():
    """(the true function, inputs, answers of which half have the wrong sign, features)."""
    random = np.random.default_rng(0)
    truth, inputs = random.normal(size=NUM_INPUTS), random.normal(size=(NUM_EXAMPLES, NUM_INPUTS))
    right = np.where(random.random(NUM_EXAMPLES) < 0.5, 1.0, -1.0)
    answers = right * (inputs @ truth) + random.normal(size=NUM_EXAMPLES)
    noise = random.normal(size=(NUM_EXAMPLES, 2))
    # what this draw of noise has by chance in common with the use of an example is no noise of V: taken out
    use = np.stack([right, inputs @ truth * answers, (inputs @ truth) ** 2, np.ones(NUM_EXAMPLES)], 1)
    noise -= use @ np.linalg.lstsq(use, noise, rcond=None)[0]
    features = np.column_stack([right + 1.4 * random.normal(size=NUM_EXAMPLES), noise])
    return truth, inputs, answers, (features - features.mean(0)) / features.std(0)


def learn_coefficients(inputs, answers, features):
    """(validation inputs, validation answers, who judges) -> the coefficients after three outer steps."""
    weighting = weightings.rater(features)

    def train(weights):
        def step(params, _):
            grad = jax.grad(lambda p: jnp.mean(weights * (inputs @ p - answers) ** 2) / 2)(params)
            return params - 0.1 * grad, None

        return jax.lax.scan(step, jnp.zeros(NUM_INPUTS), None, length=20)[0]

    def learn(x, y, judges):
        def validation_loss(variable):
            return jnp.sum(judges * (x @ train(weighting.weights(variable)) - y) ** 2) / judges.sum()

        variable = weighting.init()
        for rate in (0.3, 0.2, 0.1):
            variable = weighting.step(variable, jax.grad(validation_loss)(variable), rate, 10.0)
        return variable.coefficients

    return jax.jit(jax.vmap(jax.vmap(learn, (None, None, 0)), (0, 0, None)))


@pytest.mark.parametrize("num_folds", [4, 8])
def test_intervals_hold_what_other_validation_sets_give_and_tell_noise_from_truth(x64, num_folds):
    truth, inputs, answers, features = draw_problem()
    random = np.random.default_rng(1)
    x = random.normal(size=(NUM_REPEATS, 32, NUM_INPUTS))
    y = x @ truth + random.normal(size=x.shape[:2])
    judges = np.ones((1 + num_folds, 32))
    for fold in range(num_folds):
        judges[1 + fold, fold::num_folds] = 0
    found = np.asarray(learn_coefficients(inputs, answers, features)(x, y, judges))
    half_widths = np.array([jackknife_half_width(without_folds) for without_folds in found[:, 1:]])
    whole = found[:, 0]
    holds_mean = (np.abs(whole - whole.mean(0)) <= half_widths).mean(0)
    holds_median = (np.abs(whole - np.median(whole, 0)) <= half_widths).mean(0)
    holds_zero = (np.abs(whole) <= half_widths).mean(0)
    print("FIGURES", num_folds, holds_mean, holds_median, holds_zero)
    # 95 % by name; the standard error of 150 draws is .02. What is true is near the sum of the rates, which it cannot
    # pass, so that its distribution is skewed: a few draws of V pull the mean off, which fewer intervals hold
    assert (holds_median > 0.9).all() and (holds_mean[NOISE] > 0.9).all()
    assert holds_zero[TRUE] < 0.08 and (holds_zero[NOISE] > 0.8).all()
