"""From per-example losses to a bilevel problem."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bilevel_jax.core.types import PADDING, Batch, Frozen, Hyper, HyperSlice, Params, Problem, Scalar

ExampleLosses = Callable[[Params, Frozen, Batch], Float[Array, "examples"]]


def weighted(
    losses: ExampleLosses,
    *,
    outer: ExampleLosses | None = None,
    prior: Callable[[Params, Frozen], Scalar] | None = None,
) -> Problem:
    """The problem whose outer variable is a weight for each training example.

        min_w L_v(params*(w)),  inner = sum_i w_i losses_i / rows,  L_v = mean of `outer` over the validation examples

    The denominator is the number of real examples in the *global* step, never the sum of the weights and never a
    micro-batch or a device: so the gradient and its entries are the same for any split of the step. Where batches have
    a `base`, each example counts with it beside its weight: inner = sum_i base_i w_i losses_i / rows.

    `outer` (default: `losses`) gives the losses of validation examples; `prior` (default: none) is added once per step.
    """
    outer = losses if outer is None else outer

    def inner(params: Params, weights: HyperSlice, frozen: Frozen, batch: Batch) -> Scalar:
        values = losses(params, frozen, batch)
        if values.shape != weights.shape:
            raise ValueError(f"losses {values.shape} and weights {weights.shape} differ; give one loss per example.")
        return jnp.sum(weights * get_multiplicity(batch) * values) / batch["num_examples"]

    def outer_loss(params: Params, frozen: Frozen, batch: Batch) -> Scalar:
        values = outer(params, frozen, batch)
        return jnp.sum(jnp.where(batch["index"] != PADDING, values, 0)) / batch["num_examples"]

    def gather(table: Hyper, batch: Batch) -> HyperSlice:
        return table.at[batch["index"]].get(mode="fill", fill_value=0)

    def scatter_add(table: Hyper, batch: Batch, hypergradients: HyperSlice) -> Hyper:
        return table.at[batch["index"]].add(hypergradients, mode="drop")

    return Problem(inner, prior or (lambda params, frozen: jnp.zeros(())), outer_loss, gather, scatter_add)


def get_multiplicity(batch: Batch) -> Float[Array, "*micro examples"] | float:
    """How much each example counts before any weight: the leaf `base` of the batch, 1 where there is none."""
    return batch.get("multiplicity", 1.0)


def divide_by_multiplicity(values: Float[Array, "*micro examples"], batch: Batch) -> Float[Array, "*micro examples"]:
    """values / base, and 0 for an example of base 0: from d inner / d weight back to what one whole example says."""
    if "multiplicity" not in batch:
        return values
    is_counted = batch["multiplicity"] > 0
    return jnp.where(is_counted, values / jnp.where(is_counted, batch["multiplicity"], 1), 0)


def shared(
    inner: Callable[[Params, HyperSlice, Frozen, Batch], Scalar],
    outer: Callable[[Params, Frozen, Batch], Scalar],
    prior: Callable[[Params, Frozen], Scalar] | None = None,
) -> Problem:
    """The problem whose outer variable is global: every batch touches all of it (a penalty's strength, say)."""

    def gather(hyper: Hyper, batch: Batch) -> HyperSlice:
        num_micro_batches = batch["num_examples"].shape[0]
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_micro_batches, *leaf.shape)), hyper)

    def scatter_add(hyper: Hyper, batch: Batch, hypergradients: HyperSlice) -> Hyper:
        return jax.tree.map(lambda leaf, entry: leaf + entry.sum(0), hyper, hypergradients)

    return Problem(inner, prior or (lambda params, frozen: jnp.zeros(())), outer, gather, scatter_add)


def proximal(strength: float, centre: Callable[[Frozen], Params]) -> Callable[[Params, Frozen], Scalar]:
    """The prior (delta / 2) |params - centre(fixed)|^2, part of the inner problem: it makes the minimiser unique.

    `implicit` is exact for the problem *with* this term. Added to the linear solve alone it would be damping, and the
    result exact for nothing. The centre is read from `fixed`, so that it is an argument of the compiled step.
    """

    def prior(params: Params, frozen: Frozen) -> Scalar:
        return 0.5 * strength * optax.tree.norm(optax.tree.sub(params, centre(frozen)), squared=True)

    return prior
