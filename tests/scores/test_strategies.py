"""From scores of responses to one number per strategy: each against the formula written out, on numbers of any size."""

import numpy as np
import pytest

from bilevel_jax.scores.strategies import (
    MAX_PERPLEXITY,
    alignment_score,
    arithmetic_mean,
    car_score,
    geometric_mean,
    scale_strategies,
    trimmed_mean,
)

RANDOM = np.random.default_rng(0)
PPL = np.exp(RANDOM.normal(1.5, 1, (3, 20, 4)))  # blocks, questions, strategies; some above the cap
D = RANDOM.uniform(0, 1, (3, 20, 4))


def test_means_over_a_block():
    for block in range(3):
        for strategy in range(4):
            one = PPL[block, :, strategy].tolist()
            assert arithmetic_mean(PPL)[block, strategy] == pytest.approx(sum(one) / 20)
            assert geometric_mean(PPL)[block, strategy] == pytest.approx(np.prod(one) ** (1 / 20))
            assert trimmed_mean(0.1)(PPL)[block, strategy] == pytest.approx(sum(sorted(one)[2:-2]) / 16)
    np.testing.assert_allclose(trimmed_mean(0.0)(PPL), arithmetic_mean(PPL), rtol=1e-12)
    with pytest.raises(ValueError, match=r"a share in \[0, 0.5\) at either end; 0.5 was given"):
        trimmed_mean(0.5)


@pytest.mark.parametrize("beta", [0.5, 0.2, None])
def test_mix_is_its_formula(beta):
    for block in range(3):
        p = [sum(min(v, 10.0) for v in PPL[block, :, s]) / 20 for s in range(4)]
        d = [sum(D[block, :, s]) / 20 for s in range(4)]
        variation = [np.std(v) / np.mean(v) for v in (p, d)]
        weight = variation[0] / sum(variation) if beta is None else beta
        expected = [
            weight * (p[s] - min(p)) / (max(p) - min(p)) + (1 - weight) * (d[s] - min(d)) / (max(d) - min(d))
            for s in range(4)
        ]
        np.testing.assert_allclose(alignment_score(PPL, D, beta)[block], expected, rtol=1e-12)


def test_mix_where_nothing_varies():
    capped = np.full((5, 3), 2 * MAX_PERPLEXITY)
    np.testing.assert_array_equal(scale_strategies(np.ones((2, 3))), 0)
    np.testing.assert_allclose(alignment_score(capped, D[0, :5, :3], None), scale_strategies(D[0, :5, :3].mean(0)))
    np.testing.assert_array_equal(alignment_score(capped, np.ones((5, 3)), None), 0)


def test_car_is_its_formula():
    rewards = RANDOM.uniform(0, 1, (20, 4))
    expected = rewards.mean(0) / (1 + 3 * np.log(PPL[0]).mean(0))
    np.testing.assert_allclose(car_score(rewards, np.log(PPL[0])), expected)
