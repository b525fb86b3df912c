"""How far a hypergradient speaks for examples beside its validation set."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Reliability(NamedTuple):
    """How much of the entries (weight times hypergradient) is sampling noise of the validation set."""

    value: float
    """About the correlation of the entries with those of an endless validation set; nan where it was not measured."""
    noise: float
    """The noise's share of the entries' energy; about 1 where nothing but noise is seen."""
    num_validation: int
    spread: float = math.nan
    """The standard deviation of the noise over draws of halves; nan with one draw."""
    num_draws: int = 1

    def validation_examples_for(self, target: float) -> float:
        """About how many validation examples would give the reliability `target`: the noise's energy falls as 1/n.

        Infinite where nothing but noise is seen, nan where it was not measured.
        """
        if math.isnan(self.noise):
            return math.nan
        if self.noise >= 1:
            return math.inf
        return self.num_validation * self.noise * target**2 / ((1 - self.noise) * (1 - target**2))

    def __str__(self) -> str:
        if math.isnan(self.value):
            reason = " (one validation example has no halves)" if self.num_validation == 1 else ""
            return f"not measured{reason}"
        spread = "" if math.isnan(self.spread) else f" ± {self.spread:.2f} over {self.num_draws} draws of halves"
        needed = self.validation_examples_for(0.9)
        count = "no number can be told" if math.isinf(needed) else f"about {max(1, round(needed)):,}"
        return (
            f"{self.value:.2f} with {self.num_validation:,} validation examples (noise {self.noise:.2f}{spread}); for "
            f".9: {count}"
        )


def validation_halves(num_validation: int, seed: int) -> Float[np.ndarray, "validation"]:
    """A random division of the validation examples into two halves: the factors c_i of their difference.

        d = (1/n) sum_i c_i grad_i,  sum_i c_i = 0,  mean_i c_i^2 = 1;  E |d|^2 = the sampling variance of mean_i grad_i

    Above 0 in the one half, below 0 in the other: +1 and -1 where the halves are equal, and then d = (g_A - g_B) / 2.
    Of an odd number n the halves have a = (n + 1) / 2 and b = (n - 1) / 2 examples in random order of the signs, and
    d = sqrt(a b) / n (g_A - g_B), so that the expectation over draws stays exactly that of the variance.

    Args:
        num_validation: examples of the validation set, n.
        seed: of the draw; another seed is an independent draw.

    Returns:
        float64[validation]; of one example, which has no halves, [0.0].

    Example:
        >>> halves = bj.certify.validation_halves(4, seed=0)
        >>> sorted(halves.tolist())
        [-1.0, -1.0, 1.0, 1.0]
        >>> odd = bj.certify.validation_halves(5, seed=0)
        >>> abs(round(float(odd.sum()), 9)), round(float((odd**2).mean()), 9)
        (0.0, 1.0)
    """
    if num_validation < 2:
        return np.zeros(num_validation)
    random = np.random.default_rng((seed, num_validation))
    sizes = np.array([(num_validation + 1) // 2, num_validation // 2])
    above, below = sizes if random.random() < 0.5 else sizes[::-1]
    factors = np.repeat([math.sqrt(below / above), -math.sqrt(above / below)], [above, below])
    return random.permutation(factors)


def measure_reliability(
    weights: Float[Array, "examples"],
    grad: Float[Array, "examples"],
    half_difference: Float[Array, "examples"],
    num_validation: int,
) -> Reliability:
    """How far the hypergradient speaks for examples that are not in the validation set, by one draw of halves.

        noise = |centred(w d)|^2 / |centred(w g)|^2;  reliability = sqrt(max(0, 1 - noise))

    with g the hypergradient, d the difference of two halves of the validation set, and `centred` without the mean over
    the training examples. Reliability estimates the correlation of the entries w_i g_i with those that a very large
    validation set of the same kind would give. One draw of halves has a standard deviation of .03 to .07 in the noise:
    see `average_reliability`.

    Wrong where the validation examples are not independent draws of what one cares for: duplicates, several turns of
    one conversation, another distribution. The number then says too much. It is also about the examples given: leave
    out those that are never trained on.

    Args:
        weights: float[examples].
        grad: the hypergradient at `weights`, float[examples], nats per unit of weight.
        half_difference: d, float[examples], in the same units; see `validation_halves`.
        num_validation: examples of the validation set.

    Returns:
        The reliability. Its numbers are nan with one validation example, or where all entries are equal.

    Example:
        >>> grad, half_difference = jnp.array([3.0, -1.0, -2.0]), jnp.array([0.0, 1.0, -1.0])
        >>> reliability = bj.certify.measure_reliability(jnp.ones(3), grad, half_difference, num_validation=8)
        >>> round(reliability.noise, 3), round(reliability.value, 3)
        (0.143, 0.926)
        >>> round(reliability.validation_examples_for(0.95))  # 8 * .143 / .857 * .9025 / .0975
        12
    """
    shapes = {jnp.shape(values) for values in (weights, grad, half_difference)}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise ValueError(
            f"weights {jnp.shape(weights)}, grad {jnp.shape(grad)} and half_difference {jnp.shape(half_difference)}; "
            "give one number of each for every training example."
        )
    if num_validation < 2:
        return Reliability(math.nan, math.nan, num_validation)
    energy, noise_energy = (
        float(np.square(entries - entries.mean()).sum())
        for entries in (
            np.asarray(weights, np.float64) * np.asarray(part, np.float64) for part in (grad, half_difference)
        )
    )
    return _from_noise(noise_energy / energy if energy > 0 else math.nan, num_validation)


def average_reliability(draws: Sequence[Reliability]) -> Reliability:
    """The reliability by several draws of halves: the noise is their mean.

        noise = mean_k noise_k;  reliability = sqrt(max(0, 1 - noise))

    Of one hypergradient with halves drawn anew, or of neighbouring outer steps, between which the noise moves slowly.
    Draws that are nan are left out.

    Wrong where the draws are of hypergradients that differ much: then it is the mean of different things.

    Args:
        draws: of `measure_reliability`, one or more, of one validation set.

    Returns:
        Their mean, with the standard deviation of the noise over them.

    Example:
        >>> draws = [bj.certify.Reliability(0.8, 0.36, 100), bj.certify.Reliability(0.6, 0.64, 100)]
        >>> average = bj.certify.average_reliability(draws)
        >>> round(average.noise, 3), round(average.value, 3), average.num_draws
        (0.5, 0.707, 2)
    """
    if not draws:
        raise ValueError("no draws to average; give at least one of `measure_reliability`.")
    if len(counts := {draw.num_validation for draw in draws}) > 1:
        raise ValueError(f"draws of validation sets of {sorted(counts)} examples; give those of one validation set.")
    noises = [draw.noise for draw in draws if not math.isnan(draw.noise)]
    if not noises:
        return draws[0]
    spread = float(np.std(noises, ddof=1)) if len(noises) > 1 else math.nan
    return _from_noise(float(np.mean(noises)), draws[0].num_validation)._replace(spread=spread, num_draws=len(noises))


def _from_noise(noise: float, num_validation: int) -> Reliability:
    value = math.nan if math.isnan(noise) else math.sqrt(max(0.0, 1 - noise))
    return Reliability(value, noise, num_validation)
