"""Pytree operations that optax.tree and jax.tree lack."""

from collections.abc import Callable

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
