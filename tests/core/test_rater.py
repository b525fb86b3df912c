"""The rater: its step is one in logits, and its derivative that of the validation loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax.core import weightings
from bilevel_jax.core.unrolled import unrolled_estimator
from tests.core.problems import ROWS, lora, normal, relative, through_scan, trained

RATE, FAR = 0.7, 100.0


def logit_step(features, entries, link="softmax", scale=0.0, rate=RATE, max_step=FAR):
    """The change of the logits, centred as softmax reads them, in one step from the start."""
    made = weightings.rater(features, link, scale)
    start = made.init()
    after = made.step(start, weightings.weighting_vjp(made, start, entries), rate, max_step)
    logits = features @ after.coefficients
    logits = logits + after.residual if scale else logits
    return logits - logits.mean() if link == "softmax" else logits


def rms(values):
    return float(jnp.sqrt(jnp.mean(values**2)))


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
@pytest.mark.parametrize("count", [1, 10, 100])
def test_one_rate_suits_any_number_and_scale_of_features(link, count):
    features, entries = normal(1, 300, count), normal(2, 300)
    for scales in (jnp.ones(count), 10.0 ** jnp.linspace(-6, 6, count)):
        assert abs(rms(logit_step(features * scales[None], entries, link)) - RATE) < 1e-9


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_the_step_is_blind_to_an_invertible_map_of_the_features(link):
    features, entries = normal(3, 200, 8), normal(4, 200)
    once = logit_step(features, entries, link)
    for seed in range(5, 9):
        assert relative(logit_step(features @ normal(seed, 8, 8), entries, link), once) < 1e-8


def test_the_step_is_that_of_per_example_logits_projected_on_the_features():
    features, entries = normal(9, 50, 5), normal(10, 50)
    per_example = weightings.weighting_vjp(weightings.softmax(50), jnp.zeros(50), entries)
    projected = features @ jnp.linalg.lstsq(features - features.mean(0, keepdims=True), per_example)[0]
    projected = projected - projected.mean()
    assert relative(logit_step(features, entries), -RATE * projected / rms(projected)) < 1e-12


def test_constant_and_collinear_features_change_nothing():
    features, entries = normal(11, 80, 3), normal(12, 80)
    once = logit_step(features, entries)
    mixed = jnp.stack([features[:, 0] + features[:, 1], 1e-5 * features[:, 2], jnp.full(80, 7.3), jnp.zeros(80)], 1)
    assert relative(logit_step(jnp.concatenate([features, mixed], 1), entries), once) < 1e-8
    made = weightings.rater(jnp.full((80, 1), 0.1))
    still = made.step(made.init(), weightings.weighting_vjp(made, made.init(), entries), RATE, FAR)
    assert float(still.coefficients[0]) == 0.0


def test_no_logit_moves_by_more_than_the_cap():
    features, entries = normal(13, 60, 2).at[0, 0].set(40.0), normal(14, 60)
    free, capped = logit_step(features, entries), logit_step(features, entries, max_step=1.5)
    assert jnp.abs(free).max() > 1.5
    assert abs(float(jnp.abs(capped).max()) - 1.5) < 1e-9 and relative(capped, free * rms(capped) / rms(free)) < 1e-9


def test_sources_step_as_their_share_of_the_examples():
    """Two sources: whatever their sizes, both move, against each other, and the logits by the rate."""
    sources = jnp.array([0] * 9 + [1])
    step = logit_step(jax.nn.one_hot(sources, 2), jnp.where(sources == 0, 1.0, -1.0))
    np.testing.assert_allclose(step, jnp.where(sources == 0, -RATE / 3, 3 * RATE), rtol=1e-9)


def test_the_residual_follows_its_prior():
    """From r, without a slope of the loss, a step is towards 0; with one, s^2 times that of per-example logits."""
    features, entries, scale = normal(15, 40, 3), normal(16, 40), 0.3
    made = weightings.rater(features, "softmax", scale)
    at = made.init()._replace(residual=normal(17, 40))
    no_slope = jax.tree.map(jnp.zeros_like, at)
    after = made.step(at, no_slope, 0.01, FAR)
    assert relative(at.residual - after.residual, 0.01 * at.residual / rms(at.residual)) < 1e-9
    per_example = weightings.weighting_vjp(weightings.softmax(40), jnp.zeros(40), entries)
    centred = features - features.mean(0, keepdims=True)
    wanted = centred @ jnp.linalg.lstsq(centred, per_example)[0] + scale**2 * per_example
    assert relative(logit_step(features, entries, "softmax", scale), -RATE * wanted / rms(wanted)) < 1e-9


def test_the_prior_is_half_the_mean_square_over_the_variance():
    """d E[r^2] / (2 s^2) beside a slope of the loss, by finite differences of their sum."""
    features, scale, slope = normal(18, 30, 2), 0.5, normal(19, 30) / 30
    made = weightings.rater(features, "sigmoid", scale)
    at = made.init()._replace(residual=normal(20, 30))
    after = made.step(at, made.init()._replace(residual=slope), 1e-3, FAR)

    def objective(residual):
        return slope @ residual + jnp.mean(residual**2) / (2 * scale**2)

    along = jax.vmap(lambda unit: (objective(at.residual + 1e-4 * unit) - objective(at.residual - 1e-4 * unit)) / 2e-4)
    expected = along(jnp.eye(30))
    step = at.residual - after.residual
    assert relative(step / rms(step), expected / rms(expected)) < 1e-8


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_empty_entries_have_no_weight_and_no_say(link):
    features, entries = normal(21, 10, 3), normal(22, 10)
    made, longer = weightings.rater(features, link, 0.4), weightings.rater(features, link, 0.4, table_size=16)
    grads = [weightings.weighting_vjp(w, w.init(), jnp.pad(entries, (0, len(w.weights(w.init())) - 10)))
             for w in (made, longer)]  # fmt: skip
    short, long = (w.step(w.init(), g, RATE, FAR) for w, g in zip((made, longer), grads, strict=True))
    assert relative(long.coefficients, short.coefficients) < 1e-12
    assert relative(long.residual[:10], short.residual) < 1e-12 and (long.residual[10:] == 0).all()
    assert (longer.weights(long)[10:] == 0).all() and relative(longer.weights(long)[:10], made.weights(short)) < 1e-12


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_the_derivative_is_that_of_the_validation_loss(link):
    """Finite differences of L_v after the whole training run, along each coefficient."""
    toy, optimizer = lora(), optax.adam(1e-2, eps_root=1e-8)
    made = weightings.rater(jnp.concatenate([normal(23, ROWS, 3), jnp.ones((ROWS, 1))], 1), link)
    at = made.init()._replace(coefficients=0.3 * normal(24, 4))
    weights = made.weights(at)
    step, run = trained(toy, optimizer, weights)
    estimate = unrolled_estimator(toy.problem, step)(run, weights, toy.fixed, toy.train, toy.validation)
    slope = weightings.weighting_vjp(made, at, estimate.grad).coefficients

    def loss(coefficients):
        return through_scan(toy, optimizer, made.weights(at._replace(coefficients=coefficients)))[0]

    for k in range(4):
        unit = 1e-5 * jnp.eye(4)[k]
        difference = (loss(at.coefficients + unit) - loss(at.coefficients - unit)) / 2e-5
        assert abs(float(difference - slope[k])) < 1e-6 * float(jnp.linalg.norm(slope))  # central, step 1e-5


def test_logits_are_fitted_by_least_squares():
    features, logits = normal(25, 30, 4), normal(26, 30)
    fitted = weightings.rater(features, "sigmoid").fit_logits(logits)
    assert relative(fitted.coefficients, jnp.linalg.lstsq(features, logits)[0]) < 1e-10


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((jnp.array([[0.0], [jnp.nan]]),), "feature 0 of example 1 is nan"),
        ((jnp.zeros(3),), r"features are \[3\]"),
        ((jnp.zeros((3, 1)), "relu"), "one of softmax, sigmoid"),
        ((jnp.zeros((3, 1)), "softmax", -1.0), "a standard deviation, 0 or more"),
    ],
)
def test_what_cannot_be_used_is_said(arguments, words):
    with pytest.raises(ValueError, match=words):
        weightings.rater(*arguments)
