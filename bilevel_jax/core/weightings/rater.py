"""Weights that are one learned function of the examples' features."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from bilevel_jax.core.types import Scalar, Weighting

Link = Literal["softmax", "sigmoid"]
LINKS: tuple[Link, ...] = ("softmax", "sigmoid")
SMALLEST_SHARE = 1e-6
"""Directions of the features whose second moment is below this share of the largest do not move."""


ROUNDING = 1e-9
"""Standard deviations below this share of a feature's largest value are rounding."""


class RaterVariable(NamedTuple):
    """The outer variable of a rater."""

    coefficients: Float[Array, "features"]
    residual: Float[Array, "table"] | tuple[()]
    """One number for each example, of mean 0 under its prior; () where the residual is off."""


class _RaterArrays(NamedTuple):
    """What the functions of a rater read beside its variable; arguments of jit, not constants in it."""

    features: Float[np.ndarray, "table features"]
    """Centred where a common shift of the logits changes nothing."""
    preconditioner: Float[np.ndarray, "features features"]
    """The pseudo-inverse of the features' second moments."""
    is_example: Float[np.ndarray, "table"]
    """0 for the empty entries at the end."""
    residual_scale: Float[np.ndarray, ""]


def rater(
    features: Float[Array | np.ndarray, "examples features"],
    link: Link = "softmax",
    residual_scale: float = 0.0,
    table_size: int = 0,
) -> Weighting:
    """Weights that are one function of the examples' features, so that they extend to examples never seen.

        z_i = beta . features_i + r_i,   r_i ~ Normal(0, s^2);   w = N softmax(z)  or  w = 2 sigmoid(z)

    Its step is normalised in logits, and preconditioned by the features' second moments M = E[f f^T] (of softmax, their
    covariance, as a common shift changes nothing). With g the gradient of L_v + E[r^2] / (2 s^2),

        d_beta = M^+ g_beta,   d_r = N s^2 g_r,   d_z = features d_beta + d_r
        (beta, r) <- (beta, r) - min(rate / rms(d_z), max_step / max|d_z|) (d_beta, d_r)

    so that the logits move by the rate whatever the number, the scale and the correlation of the features: of d_z is
    left what per-example logits would do, projected on the features, and s^2 times that for each example alone.
    Features that are constant or a combination of others need no care: M^+ is a pseudo-inverse, in which directions
    of less than 1e-6 of the largest moment (of features scaled to rms 1) do not move.

    Args:
        features: float[examples, features], arrays with values: made once, not traced. One-hot rows of sources give one
            weight for each source. With sigmoid a column of ones lets all weights rise or fall together.
        link: softmax, where weights compete and their mean is 1, or sigmoid, where they do not and lie between 0 and 2.
        residual_scale: s, the standard deviation of an example's own logit; 0: none has one.
        table_size: more than N where the table has entries of weight 0 at its end, so that devices divide it evenly.

    Returns:
        The weighting; its variable is a `RaterVariable`, zeros at first: weight 1 for every example.

    Raises:
        ValueError: for features that are not a table of finite numbers, an unknown link, and a negative residual_scale.

    Example:
        >>> weighting = bj.weightings.rater(jnp.array([[0.0], [1.0]]))
        >>> variable = weighting.init()._replace(coefficients=jnp.log(jnp.array([3.0])))
        >>> bool(jnp.allclose(weighting.weights(variable), jnp.array([0.5, 1.5])))
        True

    Wrong when:
        no function of the features tells good examples from bad ones; then the residual, or per-example logits, can.
    """
    table = np.asarray(features, float)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"features are {list(table.shape)}; float[examples, features] with at least one of each.")
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        raise ValueError(f"feature {column} of example {row} is {table[row, column]}: fill it, or leave the row out.")
    if link not in LINKS:
        raise ValueError(f"link = {link!r}: one of {', '.join(LINKS)}.")
    if not residual_scale >= 0:
        raise ValueError(f"residual_scale = {residual_scale}: a standard deviation, 0 or more; 0 is none.")
    num_examples, num_features = table.shape
    table_size = table_size or num_examples
    if link == "softmax":
        varies = table.std(0) > ROUNDING * np.abs(table).max(0)  # what centring leaves of a constant is rounding
        table = np.where(varies, table - table.mean(0), 0)
    arrays = _RaterArrays(
        np.pad(table, ((0, table_size - num_examples), (0, 0))),
        _invert_moments(table),
        (np.arange(table_size) < num_examples).astype(float),
        np.array(residual_scale),
    )

    def with_no_residual(coefficients: Float[Array, "features"]) -> RaterVariable:
        return RaterVariable(coefficients, jnp.zeros(table_size) if residual_scale > 0 else ())

    return Weighting(
        init=lambda: with_no_residual(jnp.zeros(num_features)),
        weights=Partial(_softmax_weights if link == "softmax" else _sigmoid_weights, arrays),
        step=Partial(_step, arrays),
        fit_logits=lambda logits: with_no_residual(
            jnp.asarray(arrays.preconditioner @ (table.T @ np.asarray(logits, float)[:num_examples]) / num_examples)
        ),
    )


def _logits(arrays: _RaterArrays, variable: RaterVariable) -> Float[Array, "table"]:
    logits = jnp.asarray(arrays.features, variable.coefficients.dtype) @ variable.coefficients
    return logits if isinstance(variable.residual, tuple) else logits + variable.residual


def _softmax_weights(arrays: _RaterArrays, variable: RaterVariable) -> Float[Array, "table"]:
    is_example = jnp.asarray(arrays.is_example, variable.coefficients.dtype)
    logits = jnp.where(is_example > 0, _logits(arrays, variable), -jnp.inf)
    return is_example.sum() * jax.nn.softmax(logits)


def _sigmoid_weights(arrays: _RaterArrays, variable: RaterVariable) -> Float[Array, "table"]:
    return 2 * jax.nn.sigmoid(_logits(arrays, variable)) * jnp.asarray(arrays.is_example, variable.coefficients.dtype)


def _step(
    arrays: _RaterArrays, variable: RaterVariable, grad: RaterVariable, learning_rate: Scalar | float, max_step: float
) -> RaterVariable:
    dtype = variable.coefficients.dtype
    num_examples = jnp.asarray(arrays.is_example.sum(), dtype)
    scale = jnp.asarray(arrays.residual_scale, dtype)
    direction = RaterVariable(
        jnp.asarray(arrays.preconditioner, dtype) @ grad.coefficients,
        jax.tree.map(lambda g, r: num_examples * scale**2 * g + r, grad.residual, variable.residual),
    )
    change = _logits(arrays, direction) * jnp.asarray(arrays.is_example, dtype)
    rms, largest = jnp.sqrt(jnp.sum(change**2) / num_examples), jnp.abs(change).max()
    moves = rms > 0
    size = jnp.minimum(learning_rate / jnp.where(moves, rms, 1), max_step / jnp.where(moves, largest, 1))
    return jax.tree.map(lambda value, along: value - jnp.where(moves, size, 0) * along, variable, direction)


def _invert_moments(features: Float[np.ndarray, "examples features"]) -> Float[np.ndarray, "features features"]:
    """The pseudo-inverse of E[f f^T], without directions of less than SMALLEST_SHARE of the largest moment."""
    rms = np.sqrt(np.mean(features**2, axis=0))
    inverse_rms = np.where(rms > 0, 1 / np.where(rms > 0, rms, 1), 0)
    scaled = features * inverse_rms
    moments, directions = np.linalg.eigh(scaled.T @ scaled / len(features))
    moves = moments > SMALLEST_SHARE * max(moments[-1], np.finfo(float).tiny)
    inverse = (directions * np.where(moves, 1 / np.where(moves, moments, 1), 0)) @ directions.T
    return inverse * np.outer(inverse_rms, inverse_rms)
