"""From per-example losses to a bilevel problem."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bilevel_jax.core.types import PADDING, Batch, Fixed, Hyper, Params, Problem, Scalar, Slice

Losses = Callable[[Params, Fixed, Batch], Float[Array, "examples"]]


def weighted(
    losses: Losses, *, outer: Losses | None = None, prior: Callable[[Params, Fixed], Scalar] | None = None
) -> Problem:
    """The problem whose outer variable is a weight for each training example.

        min_w L_v(params*(w)),  inner = sum_i w_i losses_i / rows,  L_v = mean of `outer` over the validation rows

    The denominator is the number of real examples in the *global* step, never the sum of the weights and never a
    micro-batch or a device: so the gradient and its entries are the same for any split of the step. Where batches have
    a `base`, each example counts with it beside its weight: inner = sum_i base_i w_i losses_i / rows.

    `outer` (default: `losses`) gives the losses of validation rows; `prior` (default: none) is added once per step.
    """
    outer = losses if outer is None else outer

    def inner(params: Params, weights: Slice, fixed: Fixed, batch: Batch) -> Scalar:
        values = losses(params, fixed, batch)
        if values.shape != weights.shape:
            raise ValueError(f"losses {values.shape} and weights {weights.shape} differ; give one loss per example.")
        return jnp.sum(weights * base(batch) * values) / batch["rows"]

    def share(params: Params, fixed: Fixed, batch: Batch) -> Scalar:
        values = outer(params, fixed, batch)
        return jnp.sum(jnp.where(batch["index"] != PADDING, values, 0)) / batch["rows"]

    def take(table: Hyper, batch: Batch) -> Slice:
        return table.at[batch["index"]].get(mode="fill", fill_value=0)

    def add(table: Hyper, batch: Batch, entries: Slice) -> Hyper:
        return table.at[batch["index"]].add(entries, mode="drop")

    return Problem(inner, prior or (lambda params, fixed: jnp.zeros(())), share, take, add)


def base(batch: Batch) -> Float[Array, "*micro examples"] | float:
    """How much each example counts before any weight: the leaf `base` of the batch, 1 where there is none."""
    return batch.get("base", 1.0)


def per_unit(values: Float[Array, "*micro examples"], batch: Batch) -> Float[Array, "*micro examples"]:
    """values / base, and 0 for an example of base 0: from d inner / d weight back to what one whole example says."""
    if "base" not in batch:
        return values
    counts = batch["base"] > 0
    return jnp.where(counts, values / jnp.where(counts, batch["base"], 1), 0)


def shared(
    inner: Callable[[Params, Slice, Fixed, Batch], Scalar],
    outer: Callable[[Params, Fixed, Batch], Scalar],
    prior: Callable[[Params, Fixed], Scalar] | None = None,
) -> Problem:
    """The problem whose outer variable is global: every batch touches all of it (a penalty's strength, say)."""

    def take(hyper: Hyper, batch: Batch) -> Slice:
        micro = batch["rows"].shape[0]
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (micro, *leaf.shape)), hyper)

    def add(hyper: Hyper, batch: Batch, entries: Slice) -> Hyper:
        return jax.tree.map(lambda leaf, entry: leaf + entry.sum(0), hyper, entries)

    return Problem(inner, prior or (lambda params, fixed: jnp.zeros(())), outer, take, add)


def proximal(delta: float, centre: Callable[[Fixed], Params]) -> Callable[[Params, Fixed], Scalar]:
    """The prior (delta / 2) |params - centre(fixed)|^2, part of the inner problem: it makes the minimiser unique.

    `implicit` is exact for the problem *with* this term. Added to the linear solve alone it would be damping, and the
    result exact for nothing. The centre is read from `fixed`, so that it is an argument of the compiled step.
    """

    def prior(params: Params, fixed: Fixed) -> Scalar:
        return 0.5 * delta * optax.tree.norm(optax.tree.sub(params, centre(fixed)), squared=True)

    return prior
