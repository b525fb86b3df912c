"""Reliability: halves, their expectation, the closed form of a linear problem, and words."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from bilevel_jax.core import certify
from bilevel_jax.core.types import Checks, Stream


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 11])
def test_halves_are_balanced_and_no_other_difference_has_their_mean_square(count):
    for seed in range(20):
        halves = certify.validation_halves(count, seed)
        assert abs(halves.sum()) < 1e-12
        assert np.isclose((halves**2).mean(), 1)
        assert abs((halves > 0).sum() - (halves < 0).sum()) == count % 2
    assert not np.array_equal(certify.validation_halves(8, 0), certify.validation_halves(8, 3))
    assert np.array_equal(certify.validation_halves(count, 7), certify.validation_halves(count, 7))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7])
def test_expected_energy_is_the_sampling_variance_exactly(count):
    """Over every order of the factors: E |d|^2 = S^2 / n, with S^2 the unbiased variance of one example's gradient."""
    values = np.random.default_rng(count).normal(2.0, 1.0, (count, 3))  # a mean that a biased form would count in
    factors = certify.validation_halves(count, 0)
    differences = [np.array(order) @ values / count for order in itertools.permutations(factors)]
    expected = values.var(0, ddof=1).sum() / count
    assert np.isclose(np.mean([difference @ difference for difference in differences]), expected, rtol=1e-12)


def test_linear_problem_has_the_noise_of_its_covariance():
    """Entries g_i = a_i . mean_j v_j: noise = tr(A C A^T) / n over the energy, centred over examples."""
    random = np.random.default_rng(0)
    num_examples, dim, num_validation, repetitions = 40, 12, 30, 400
    a = random.normal(size=(num_examples, dim))
    weights = random.uniform(0.5, 1.5, num_examples)
    spread = np.diag(random.uniform(0.5, 2.0, dim))  # the Cholesky factor of the covariance of one v_j
    mean = 0.4 * random.normal(size=dim)
    entries = weights[:, None] * a
    entries = entries - entries.mean(0)
    noise_energy = np.square(entries @ spread).sum() / num_validation
    signal_energy = np.square(entries @ mean).sum()
    noises, correlations = [], []
    for seed in range(repetitions):
        v = mean + random.normal(size=(num_validation, dim)) @ spread
        grad, half = a @ v.mean(0), a @ (certify.validation_halves(num_validation, seed) @ v) / num_validation
        reliability = certify.measure_reliability(weights, grad, half, num_validation)
        noises.append(reliability.noise * np.square(entries @ v.mean(0)).sum())  # the numerator alone has no bias
        correlations.append(np.corrcoef(entries @ v.mean(0), entries @ mean)[0, 1])
    assert abs(np.mean(noises) / noise_energy - 1) < 0.05  # its standard error is .02
    noise = noise_energy / (noise_energy + signal_energy)
    closed = certify.Reliability(math.sqrt(1 - noise), noise, num_validation)
    assert abs(np.mean(correlations) - closed.value) < 0.03
    needed = closed.validation_examples_for(0.95)
    far = noise_energy * num_validation / needed
    assert np.isclose(math.sqrt(signal_energy / (signal_energy + far)), 0.95)


def test_at_learned_weights_halves_say_too_much_and_an_independent_set_tells():
    """Entries fitted to the validation set: v_j = mean + noise, of which the weights have used up all but a little."""
    random = np.random.default_rng(1)
    num_examples, dim, count = 60, 20, 40
    a, mean = random.normal(size=(num_examples, dim)), 0.3 * random.normal(size=dim)
    weights, halves, against, truths = np.ones(num_examples), [], [], []
    for seed in range(200):
        own, other = (mean + random.normal(size=(count, dim)) for _ in range(2))
        fitted = 0.3 * mean - 0.9 * (own.mean(0) - mean)  # the step back from the noise that was followed
        own = fitted + 0.3 * (own - own.mean(0))  # fitted examples differ less
        factors = certify.validation_halves(count, seed) / count
        grad, dev = a @ own.mean(0), a @ other.mean(0)
        halves.append(certify.measure_reliability(weights, grad, a @ (factors @ own), count))
        against.append(certify.measure_reliability_against(weights, grad, dev, a @ (factors @ other), count))
        truths.append(np.corrcoef(grad, a @ mean)[0, 1])
    assert certify.average_reliability(halves).value > np.mean(truths) + 0.2
    average = certify.average_reliability(against)
    assert abs(average.value - np.mean(truths)) < 0.05  # its standard error is about .02
    assert average.num_draws == 200
    assert "against an independent set" in str(average)
    with pytest.raises(ValueError, match="two things"):
        certify.average_reliability([halves[0], against[0]])


def test_what_cannot_be_told_is_said():
    one = certify.measure_reliability(np.ones(3), np.arange(3.0), np.zeros(3), 1)
    assert math.isnan(one.value)
    assert math.isnan(one.validation_examples_for(0.9))
    assert "one validation example has no halves" in str(one)
    no_signal = certify.measure_reliability_against(np.ones(2), np.arange(2.0), np.arange(2.0), np.array([9.0, 0]), 4)
    assert math.isnan(no_signal.value)
    assert "unknown: the halves" in str(no_signal)
    assert certify.validation_halves(1, 0).tolist() == [0.0]
    noise = certify.measure_reliability(np.ones(3), np.arange(3.0), np.array([2.0, 0, -2.0]), 8)
    assert noise.value == 0
    assert noise.noise > 1
    assert math.isinf(noise.validation_examples_for(0.9))
    assert "no number of examples can be told" in str(noise)
    fitted = noise._replace(value=0.5, noise=0.75, is_fitted=True)
    assert str(fitted).startswith("not known: 0.50")
    assert math.isnan(fitted.validation_examples_for(0.9))
    assert math.isnan(certify.measure_reliability(np.ones(3), np.ones(3), np.zeros(3), 8).value)
    assert math.isnan(certify.average_reliability([one, one]).value)
    with pytest.raises(ValueError, match=r"give one number of each"):
        certify.measure_reliability(np.ones(3), np.ones(2), np.ones(3), 8)
    with pytest.raises(ValueError, match="no draws to average"):
        certify.average_reliability([])
    with pytest.raises(ValueError, match=r"sets of \[8, 9\] examples"):
        certify.average_reliability([noise, noise._replace(num_validation=9)])


def test_a_certificate_says_its_reliability():
    reliability = certify.average_reliability(
        [certify.Reliability(0.8, 0.36, 100), certify.Reliability(0.6, 0.64, 100)]
    )
    certificates = certify.Certificates(None, None, None, Checks())
    line = next(
        line for line in str(certificates._replace(reliability=reliability)).splitlines() if "reliability" in line
    )
    assert "0.71 with 100 validation examples (noise 0.50 ± 0.20, 2 draws of halves)" in line
    assert "for 0.9 about 426" in line


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("count", [pytest.param(6, marks=pytest.mark.slow), 7])
def test_check_measures_it_by_solutions_on_halves(count):
    """Against the hypergradient of each validation example alone, on arrays and on streams, and against a dev set."""
    random = np.random.default_rng(count)
    x, y = jnp.asarray(random.normal(size=(30, 3))), jnp.asarray(random.normal(size=30))
    train, valid, dev = ((x[part], y[part]) for part in (slice(8), slice(8, 8 + count), slice(20, 30)))
    problem = bj.weighted(lambda p, frozen, batch: (batch["data"][0] @ p - batch["data"][1]) ** 2)
    solver, weights = bj.unroll(problem, optax.sgd(0.05), steps=6), jnp.ones(8)

    def grad(data):
        return np.asarray(solver.run(jnp.zeros(3), weights, train, data).grad)

    def each_example(data):
        return np.stack([grad(jax.tree.map(lambda leaf, at=at: leaf[at : at + 1], data)) for at in range(len(data[1]))])

    solution = solver.run(jnp.zeros(3), weights, train, valid)
    halves = certify.validation_halves(count, 4) / count
    expected = certify.measure_reliability(weights, grad(valid), halves @ each_example(valid), count)
    options = {"num_retrains": 0, "draws": 1, "step_sizes": (0.1,), "seed": 4}
    found = certify.check(solver, solution, train, valid, **options).reliability
    assert np.isclose(found.noise, expected.noise, rtol=1e-9)
    assert not found.is_fitted
    dev_halves = certify.validation_halves(10, 4) / 10
    against = certify.measure_reliability_against(
        weights, grad(valid), grad(dev), dev_halves @ each_example(dev), count
    )
    found = certify.check(solver, solution, train, valid, dev=dev, **options).reliability
    assert np.isclose(found.agreement, against.agreement, rtol=1e-9)
    assert np.isclose(found.signal, against.signal, rtol=1e-9)
    streams = Stream(lambda step: bj.full_batch_stream(train).batch(0), 6), bj.full_batch_stream(valid)
    on_streams = solver.run(jnp.zeros(3), weights, *streams)
    found = certify.check(solver, on_streams, *streams, **options).reliability
    assert np.isclose(found.noise, expected.noise, rtol=1e-9)
    learned = solver.run(jnp.zeros(3), weights.at[0].set(0.5), train, valid)
    assert certify.check(solver, learned, train, valid, **options).reliability.is_fitted
