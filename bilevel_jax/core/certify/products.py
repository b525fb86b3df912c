"""How far lower precision of matrix products changes a hypergradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.core import tree
from bilevel_jax.core.types import Hyper


def measure_product_error(grad: Hyper, highest: Hyper, *, is_per_example: bool) -> float:
    """The relative error of a hypergradient, where `highest` is the same with products of the highest precision.

        max over leaves of |h - h*| / |h*|;  of numbers for single examples also of h and h* less their means

    Weights that compete, and rewards of responses that are compared, see the entries less their mean alone, which a
    large common part would hide. inf where one of the two is not finite: what could not be measured is no small error.
    """
    return float(_largest_error(grad, highest, is_per_example))


@partial(jax.jit, static_argnums=2)
def _largest_error(grad: Hyper, highest: Hyper, is_per_example: bool) -> Float[Array, ""]:
    def error(own: Array, exact: Array) -> Float[Array, ""]:
        difference, norm = tree.norm(own - exact), tree.norm(exact)
        return jnp.where(difference == 0, 0.0, difference / norm)

    pairs = list(zip(jax.tree.leaves(grad), jax.tree.leaves(highest), strict=True))
    errors = [error(own, exact) for own, exact in pairs]
    if is_per_example:
        errors += [error(own - own.mean(), exact - exact.mean()) for own, exact in pairs]
    largest = jnp.stack(errors).max()
    return jnp.where(jnp.isfinite(largest), largest, jnp.inf)
