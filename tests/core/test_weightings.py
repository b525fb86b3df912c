"""Weightings, their step, and their sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.core import weightings
from tests.core.problems import normal, relative

SOURCE = jnp.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
WEIGHTINGS = {
    "softmax": weightings.softmax(10),
    "sigmoid": weightings.sigmoid(10),
    "sources": weightings.rater(jax.nn.one_hot(SOURCE, 3)),
    "rater": weightings.rater(normal(1, 10, 4)),
    "rater, sigmoid": weightings.rater(normal(1, 10, 4), "sigmoid"),
    "rater, residual": weightings.rater(normal(1, 10, 4), "softmax", 0.5),
}


def moved(start, seed=2):
    return jax.tree.map(lambda leaf: leaf + normal(seed, *leaf.shape), start)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_starts_at_one_and_pulls_back(name):
    made = WEIGHTINGS[name]
    start = made.init()
    np.testing.assert_allclose(made.weights(start), np.ones(10), rtol=1e-14)
    h, entries = moved(start), normal(3, 10)
    expected = jax.tree.map(lambda jacobian: jacobian.T @ entries, jax.jacobian(made.weights)(h))
    assert relative(weightings.weighting_vjp(made, h, entries), expected) < 1e-12
    assert made.weights(h).shape == (10,) and (made.weights(h) > 0).all()


@pytest.mark.parametrize("name", ["softmax", "sources", "rater", "rater, residual"])
def test_competing_weights_keep_their_mean(name):
    made = WEIGHTINGS[name]
    h = moved(made.init(), 4)
    np.testing.assert_allclose(made.weights(h).mean(), 1, rtol=1e-12)
    if name == "sources":
        assert all(len(set(np.asarray(made.weights(h))[np.asarray(SOURCE) == s])) == 1 for s in range(3))


def test_step_is_blind_to_scale_and_leaves_absent_rows():
    h, grad = normal(5, 6), jnp.array([1.0, -2.0, 0.0, 0.5, 0.0, 3.0])
    step = weightings.normalized_gradient_step(0.7, 10.0)
    after = step(h, grad)
    assert relative(step(h, 1e-6 * grad), after) < 1e-12
    assert (after[jnp.array([2, 4])] == h[jnp.array([2, 4])]).all()
    rms = jnp.sqrt((grad**2).sum() / 4)
    assert relative(h - after, 0.7 * grad / rms) < 1e-12
    assert jnp.abs(weightings.normalized_gradient_step(0.7, 0.1)(h, grad) - h).max() <= 0.1 + 1e-12
    assert (step(h, jnp.zeros(6)) == h).all()


def test_effective_size_and_entropy():
    assert weightings.effective_sample_size(jnp.ones(8)) == 8
    assert weightings.effective_sample_size(jnp.array([1.0, 1, 0, 0])) == 2
    assert abs(weightings.entropy(jnp.ones(8)) - jnp.log(8)) < 1e-12
    assert weightings.entropy(jnp.array([3.0, 0, 0])) == 0
