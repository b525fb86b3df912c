"""Pytree operations that optax.tree and jax.tree lack.

Those that are compiled are one program for all leaves: array by array, operations on arrays that are split over several
processes may wait for each other for ever.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from bilevel_jax.core.types import PyTree


def inexact_leaves(tree: PyTree) -> list[Array]:
    """The floating-point leaves, in leaf order: the differentiable part of an optimizer state."""
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]


def split_inexact_leaves(tree: PyTree) -> tuple[list[Array], Callable[[list[Array]], PyTree]]:
    """The floating-point leaves, and the function that puts others of their kind back among the rest."""
    leaves, structure = jax.tree.flatten(tree)
    inexact_mask = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def join(floats: list[Array]) -> PyTree:
        remaining = iter(floats)
        return structure.unflatten(
            [next(remaining) if kept else leaf for leaf, kept in zip(leaves, inexact_mask, strict=True)]
        )

    return [leaf for leaf, is_inexact in zip(leaves, inexact_mask, strict=True) if is_inexact], join


def norm(tree: PyTree) -> Float[Array, ""]:
    """The Euclidean norm of all leaves together."""
    return optax.tree.norm(tree)


def cosine(first: PyTree, second: PyTree) -> Float[Array, ""]:
    """<one, other> / (|one| |other|); nan where one of them is zero."""
    return optax.tree.vdot(first, second) / (norm(first) * norm(second))


def bitwise_equal(first: PyTree, second: PyTree) -> Bool[Array, ""]:
    """Whether all leaves are equal bit for bit (a nan equals a nan)."""
    same = jax.tree.map(
        lambda x, y: jnp.array_equal(x, y, equal_nan=jnp.issubdtype(x.dtype, jnp.inexact)), first, second
    )
    return jnp.stack(jax.tree.leaves(same)).all()


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether no floating-point leaf holds a nan or an infinity."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in inexact_leaves(tree)] or [jnp.array(True)]).all()


@partial(jax.jit, static_argnums=1)
def repeat(tree: PyTree, count: int) -> PyTree:
    """The tree with so many copies of each leaf, along a new first axis."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *jnp.shape(leaf))), tree)


@jax.jit
def stack(*trees: PyTree) -> PyTree:
    """One tree whose leaves hold those of all trees, along a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def take(tree: PyTree, place: int) -> PyTree:
    """The tree at one place of the first axis of each leaf."""
    return jax.tree.map(lambda leaf: leaf[place], tree)
