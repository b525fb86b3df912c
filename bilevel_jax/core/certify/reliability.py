"""How far a hypergradient speaks for examples beside its validation set."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Reliability(NamedTuple):
    """How far the entries, weight times hypergradient, speak for examples that are not in the validation set."""

    value: float
    """About the correlation of the entries with those of an endless validation set; nan where it cannot be told."""
    noise: float
    """By halves: the share of the validation set's sampling noise in the entries' energy; about 1 where nothing but
    noise is seen. nan where an independent set was the evidence."""
    num_validation: int
    spread: float = math.nan
    """Standard deviation over draws of halves, of the noise or of the value; nan with one draw."""
    num_draws: int = 1
    is_fitted: bool = False
    """By halves of the validation examples that the weights were learned from, which do not tell what others say."""
    agreement: float = math.nan
    """By an independent set: <entries, its entries> / |entries|^2."""
    signal: float = math.nan
    """By an independent set: |what its two halves agree on|^2 / |entries|^2."""

    def validation_examples_for(self, target: float) -> float:
        """About how many validation examples would give the reliability `target`: the noise's energy falls as 1/n.

        Infinite where nothing but noise is seen; nan where no noise was measured, or that of fitted examples.
        """
        if math.isnan(self.noise) or self.is_fitted:
            return math.nan
        if self.noise >= 1:
            return math.inf
        return self.num_validation * self.noise * target**2 / ((1 - self.noise) * (1 - target**2))

    def __str__(self) -> str:
        draws = "1 draw" if self.num_draws == 1 else f"{self.num_draws} draws"
        spread = "" if math.isnan(self.spread) else f" ± {self.spread:.2f}"
        if not math.isnan(self.agreement):
            if math.isnan(self.value):
                return f"unknown: the halves of the independent set do not agree ({draws})"
            return f"{self.value:.2f}{spread} against an independent set ({draws} of its halves)"
        if math.isnan(self.value):
            reason = " (one validation example has no halves)" if self.num_validation == 1 else ""
            return f"not measured{reason}"
        measured = (
            f"{self.value:.2f} with {self.num_validation:,} validation examples (noise {self.noise:.2f}{spread}, "
        )
        measured += f"{draws} of halves)"
        if self.is_fitted:
            return f"not known: {measured}, but the weights were learned from them, so only an independent set tells"
        needed = self.validation_examples_for(NEEDED_FOR)
        if math.isinf(needed):
            return f"{measured}; nothing but noise is seen, so no number of examples can be told"
        return f"{measured}; for {NEEDED_FOR:g} about {max(1, round(needed)):,} would be needed"


NEEDED_FOR = 0.9
"""The reliability for which sentences say the number of validation examples."""


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

    Wrong at weights that were learned from the same validation examples, whose gradients are then fitted: .94 was
    measured where the correlation was -.74, and 0 where it was .28. Take `measure_reliability_against` an independent
    set there. Also wrong where the validation examples are not independent
    draws of what one cares for (duplicates, turns of one conversation, another distribution): it then says too much.
    It is about the examples given: leave out those that are never trained on.

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
    _check_shapes(weights=weights, grad=grad, half_difference=half_difference)
    if num_validation < 2:
        return Reliability(math.nan, math.nan, num_validation)
    entries, differences = _entries(weights, grad), _entries(weights, half_difference)
    return _from_noise(_ratio(differences @ differences, entries @ entries), num_validation)


def measure_reliability_against(
    weights: Float[Array, "examples"],
    grad: Float[Array, "examples"],
    independent_grad: Float[Array, "examples"],
    independent_half_difference: Float[Array, "examples"],
    num_validation: int,
) -> Reliability:
    """How far the hypergradient speaks for other examples, judged by a second validation set that it has not seen.

        reliability = <c(g), c(h)> / (|c(g)| sqrt(|c(h)|^2 - |c(d)|^2)),  c(x) = centred(w x)

    with g the hypergradient, h that of the mean loss of the independent set, and d the difference of two halves of that
    set: |c(h)|^2 - |c(d)|^2 has the expectation of the energy without the set's own noise. So this is the correlation
    with an endless set, also at weights that were learned from the validation set. Clipped to [-1, 1].

    Wrong where the weights were chosen by the independent set, and noisy where that is small: off by .03 to .06 with
    500 examples, by .1 to .3 with 16 to 500 (softmax regression).

    Args:
        weights: float[examples].
        grad: the hypergradient at `weights`, float[examples], nats per unit of weight.
        independent_grad: h, float[examples], in the same units.
        independent_half_difference: d of the independent set, float[examples]; see `validation_halves`.
        num_validation: examples of the validation set of `grad`.

    Returns:
        The reliability; its value is nan where the halves of the independent set do not agree on anything.

    Example:
        >>> grad, other = jnp.array([3.0, -1.0, -2.0]), jnp.array([2.0, -2.0, 0.0])
        >>> half_difference = jnp.array([0.5, 0.0, -0.5])
        >>> reliability = bj.certify.measure_reliability_against(jnp.ones(3), grad, other, half_difference, 8)
        >>> round(reliability.value, 3)  # 8 / sqrt(14 * 7.5)
        0.781
    """
    _check_shapes(
        weights=weights,
        grad=grad,
        independent_grad=independent_grad,
        independent_half_difference=independent_half_difference,
    )
    own, other = _entries(weights, grad), _entries(weights, independent_grad)
    differences, energy = _entries(weights, independent_half_difference), float(own @ own)
    return _from_agreement(
        _ratio(own @ other, energy), _ratio(other @ other - differences @ differences, energy), num_validation
    )


def average_reliability(draws: Sequence[Reliability]) -> Reliability:
    """The reliability by several draws of halves: the noise is their mean.

        by halves: noise = mean_k noise_k;  against an independent set: the means of `agreement` and of `signal`

    Of one hypergradient with halves drawn anew. Draws of the noise that are nan are left out.

    Wrong where the draws are of different hypergradients: from one outer step to the next reliability moves by more
    than the error of a draw.

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
    if len({math.isnan(draw.agreement) for draw in draws}) > 1:
        raise ValueError("draws by halves and against an independent set measure two things; average each alone.")
    num_validation, is_fitted = draws[0].num_validation, any(draw.is_fitted for draw in draws)
    if not math.isnan(draws[0].agreement):
        agreement, signal = (float(np.mean([getattr(draw, key) for draw in draws])) for key in ("agreement", "signal"))
        average, each = _from_agreement(agreement, signal, num_validation), [draw.value for draw in draws]
    else:
        noises = [draw.noise for draw in draws if not math.isnan(draw.noise)]
        if not noises:
            return draws[0]
        average, each = _from_noise(float(np.mean(noises)), num_validation), noises
    told = [value for value in each if not math.isnan(value)]
    spread = float(np.std(told, ddof=1)) if len(told) > 1 else math.nan
    return average._replace(spread=spread, num_draws=len(each), is_fitted=is_fitted)


def _entries(weights: Float[Array, "examples"], grad: Float[Array, "examples"]) -> Float[np.ndarray, "examples"]:
    """weight x hypergradient in float64, without its mean over the examples."""
    products = np.asarray(weights, np.float64) * np.asarray(grad, np.float64)
    return products - products.mean()


def _check_shapes(**arrays: Array) -> None:
    shapes = {name: jnp.shape(values) for name, values in arrays.items()}
    if len(set(shapes.values())) > 1 or len(shapes["weights"]) != 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{listed}; give one number of each for every training example.")


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else math.nan


def _from_noise(noise: float, num_validation: int) -> Reliability:
    value = math.nan if math.isnan(noise) else math.sqrt(max(0.0, 1 - noise))
    return Reliability(value, noise, num_validation)


def _from_agreement(agreement: float, signal: float, num_validation: int) -> Reliability:
    value = max(-1.0, min(1.0, agreement / math.sqrt(signal))) if signal > 0 else math.nan
    return Reliability(value, math.nan, num_validation, agreement=agreement, signal=signal)
