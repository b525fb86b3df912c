"""What optax.tree and jax.tree lack."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from bilevel_jax.core.types import PyTree


def inexact(tree: PyTree) -> list[Array]:
    """The floating-point leaves, in leaf order: the differentiable part of an optimiser state."""
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]


def partition(tree: PyTree) -> tuple[list[Array], Callable[[list[Array]], PyTree]]:
    """The floating-point leaves, and the function that puts others of their kind back among the rest."""
    leaves, structure = jax.tree.flatten(tree)
    keep = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def join(floats: list[Array]) -> PyTree:
        source = iter(floats)
        return structure.unflatten([next(source) if kept else leaf for leaf, kept in zip(leaves, keep, strict=True)])

    return [leaf for leaf, kept in zip(leaves, keep, strict=True) if kept], join


def norm(tree: PyTree) -> Float[Array, ""]:
    """The Euclidean norm of all leaves together."""
    return optax.tree.norm(tree)


def cosine(one: PyTree, other: PyTree) -> Float[Array, ""]:
    """<one, other> / (|one| |other|); nan where one of them is zero."""
    return optax.tree.vdot(one, other) / (norm(one) * norm(other))


def equal(one: PyTree, other: PyTree) -> Bool[Array, ""]:
    """Whether all leaves are equal bit for bit (a nan equals a nan)."""
    same = jax.tree.map(lambda x, y: jnp.array_equal(x, y, equal_nan=jnp.issubdtype(x.dtype, jnp.inexact)), one, other)
    return jnp.stack(jax.tree.leaves(same)).all()


def finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether no floating-point leaf holds a nan or an infinity."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in inexact(tree)] or [jnp.array(True)]).all()
