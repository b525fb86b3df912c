"""Pooled steps of the weights: least error where examples share the truth, per-example ones where nothing is noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.core import weightings
from bilevel_jax.core.weightings import PartReliability, Parts, PoolingFeatures
from tests.core.problems import normal, relative

EXAMPLES = 400


def features_of(scores):
    columns = jnp.asarray(weightings.rank_curves(np.asarray(scores)))
    return PoolingFeatures(jnp.stack([columns, columns]), columns)


def two_steps(features, signal, noise, seed):
    """The parts of two steps whose four halves see the same signal, each with noise of its own."""
    halves = signal[None] + noise * normal(seed, 4, EXAMPLES)
    return tuple(weightings.split_contributions(features, given) for given in (halves[:2], halves[2:]))


def curve(scores):
    """A smooth function of the rank, of variance about 1, that four pieces follow closely."""
    rank = jnp.argsort(jnp.argsort(scores)) / EXAMPLES
    return jnp.tanh(4 * (rank - 0.4))


def energies(features, signal):
    """(dimensions, energy of the signal) of each part."""
    parts = weightings.split_contributions(features, jnp.stack([signal, signal]))
    columns = features.whole.shape[1]
    return {
        "shared": (columns, float(jnp.sum(parts.shared[0] ** 2))),
        "own": (EXAMPLES - columns, float(jnp.sum(parts.own[0] ** 2))),
    }


@pytest.mark.parametrize("noise", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("own", [0.0, 0.7])
def test_the_squared_error_is_the_least_that_multiples_of_the_parts_have(noise, own):
    scores = normal(1, EXAMPLES)
    signal = curve(scores) + own * normal(2, EXAMPLES)
    signal, features = signal - signal.mean(), features_of(scores)
    per_example, errors = PartReliability(1.0, 1.0), []
    for seed in range(40):
        parts, earlier = two_steps(features, signal, noise, 10 + seed)
        directions = (
            weightings.pool_contributions(parts, weightings.measure_part_reliability(parts, earlier)),
            weightings.pool_contributions(parts, per_example),
        )
        errors.append([float(jnp.sum((direction - signal) ** 2)) for direction in directions])
    pooled_error, per_example_error = np.mean(errors, axis=0)
    least = excess = 0.0
    for dimensions, energy in energies(features, signal).values():
        noise_energy = noise**2 / 2 * dimensions
        least += noise_energy * energy / (energy + noise_energy)  # with the true reliability
        excess += noise_energy * 2 / dimensions  # its variance is at most 2 / dimensions
    assert pooled_error < least + excess
    assert pooled_error < per_example_error


def test_the_reliability_is_the_share_of_signal_in_the_energy():
    scores = normal(3, EXAMPLES)
    features, noise = features_of(scores), 1.5
    signal = curve(scores) + normal(4, EXAMPLES)
    measured = [
        weightings.measure_part_reliability(*two_steps(features, signal, noise, 100 + seed)) for seed in range(60)
    ]
    for part, (dimensions, energy) in energies(features, signal).items():
        expected = energy / (energy + noise**2 / 2 * dimensions)
        found = np.array([float(getattr(one, part)) for one in measured])
        assert abs(found.mean() - expected) < 3 * found.std() / np.sqrt(len(found)) + 0.01  # the ratio's bias


def test_without_noise_it_is_the_per_example_gradient():
    features, signal = features_of(normal(5, EXAMPLES)), normal(6, EXAMPLES)
    parts = weightings.split_contributions(features, jnp.stack([signal, signal]))
    reliability = weightings.measure_part_reliability(parts, parts)
    assert relative(jnp.stack([reliability.shared, reliability.own]), jnp.ones(2)) < 1e-12
    assert relative(weightings.pool_contributions(parts, reliability), signal) < 1e-12


def test_halves_that_contradict_each_other_give_no_step():
    features, signal = features_of(normal(7, EXAMPLES)), normal(8, EXAMPLES)
    parts = weightings.split_contributions(features, jnp.stack([signal, -signal]))
    reliability = weightings.measure_part_reliability(parts, parts)
    assert reliability == PartReliability(0.0, 0.0)
    assert not weightings.pool_contributions(parts, reliability).any()


def test_what_two_trainings_do_not_share_is_not_reliable_though_halves_agree():
    features = features_of(normal(9, EXAMPLES))
    now, before = (
        weightings.split_contributions(features, jnp.stack([entry, entry])) for entry in normal(10, 2, EXAMPLES)
    )
    assert weightings.measure_part_reliability(now, now).own > 1 - 1e-12
    assert weightings.measure_part_reliability(now, before).own < 0.15  # 3 / sqrt(EXAMPLES)


def test_permuting_the_examples_permutes_the_direction_and_padding_stays_0():
    scores, halves = np.asarray(normal(11, EXAMPLES)), normal(12, 4, EXAMPLES)
    order = np.random.default_rng(0).permutation(EXAMPLES)

    def direction(scores, halves, padding=0):
        columns = jnp.pad(jnp.asarray(weightings.rank_curves(scores)), ((0, padding), (0, 0)))
        features = PoolingFeatures(jnp.stack([columns, columns]), columns)
        halves = jnp.pad(halves, ((0, 0), (0, padding)))
        parts, earlier = (weightings.split_contributions(features, given) for given in (halves[:2], halves[2:]))
        return weightings.pool_contributions(parts, weightings.measure_part_reliability(parts, earlier))

    plain = direction(scores, halves)
    assert relative(direction(scores[order], halves[:, order]), plain[order]) < 1e-12
    padded = direction(scores, halves, padding=5)
    assert relative(padded[:EXAMPLES], plain) < 1e-12
    assert not padded[EXAMPLES:].any()


def test_curves_depend_on_ranks_alone_and_examples_without_a_loss_have_none():
    scores = np.array([0.3, np.nan, 0.1, 0.1, 2.5, 0.7])
    columns = weightings.rank_curves(scores)
    np.testing.assert_allclose(weightings.rank_curves(np.exp(scores)), columns)
    assert not columns[1].any()
    np.testing.assert_array_equal(columns[2], columns[3])
    np.testing.assert_allclose(columns.sum(0), 0, atol=1e-15)
    assert not weightings.rank_curves(np.full(4, 7.0)).any()
    assert weightings.rank_curves(np.array([np.nan, 1.0])).shape == (2, 4)


def test_collinear_and_constant_columns_change_nothing():
    columns, halves = features_of(normal(13, EXAMPLES)).whole, normal(14, 2, EXAMPLES)
    more = jnp.concatenate([columns, 3 * columns[:, :2], jnp.zeros((EXAMPLES, 2))], 1)
    once, twice = (
        weightings.split_contributions(PoolingFeatures(jnp.stack([given, given]), given), halves)
        for given in (columns, more)
    )
    assert isinstance(once, Parts)
    for left, right in zip(once, twice, strict=True):
        assert relative(right, left) < 1e-9


def test_composes_with_jit():
    features, halves = features_of(normal(15, EXAMPLES)), normal(16, 2, EXAMPLES)

    def direction(features, halves):
        parts = weightings.split_contributions(features, halves)
        return weightings.pool_contributions(parts, weightings.measure_part_reliability(parts, parts))

    assert relative(jax.jit(direction)(features, halves), direction(features, halves)) < 1e-9


def test_parts_of_an_example_have_the_curves_of_the_whole_one():
    """Also among equal scores; what counts nothing has none, and equal multiplicities of any size change no bit."""
    random = np.random.default_rng(0)
    scores, parts = np.round(random.normal(size=30), 1), np.repeat(np.arange(30), random.integers(1, 5, 30))
    parts = np.concatenate([parts, [30]])
    scores = np.append(scores, 0.35)  # of which one at least stays whole
    whole = weightings.rank_curves(scores)
    split = weightings.rank_curves(scores[parts], multiplicity=1 / np.bincount(parts)[parts])
    np.testing.assert_allclose(split, whole[parts], atol=1e-12)
    np.testing.assert_array_equal(weightings.rank_curves(scores, multiplicity=np.ones(31)), whole)
    np.testing.assert_allclose(weightings.rank_curves(scores, multiplicity=np.full(31, 0.3)), whole, atol=1e-12)
    more = weightings.rank_curves([*scores, 9.0, -9.0], multiplicity=[*np.ones(31), 0.0, 0.0])
    np.testing.assert_allclose(more, [*whole, np.zeros(4), np.zeros(4)], atol=1e-12)
    assert not weightings.rank_curves(scores, multiplicity=np.eye(31)[3]).any()
