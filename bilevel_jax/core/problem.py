"""Bilevel problems built from per-example losses."""

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

        min_w L_v(params*(w)),  inner = sum_i w_i losses_i / N,  L_v = mean of `outer` over the validation examples

    The denominator N is the number of real examples in the *global* step, never the sum of the weights and never a
    micro-batch or a device: so the gradient and the hypergradients are the same for any split of the step. Where
    batches have the leaf `multiplicity`, each example counts with it beside its weight: inner = sum_i m_i w_i losses_i
    / N.

    Args:
        losses: (params, frozen, batch) -> one loss for each example of a micro-batch, float[examples], nats.
        outer: the losses of validation examples; default `losses`.
        prior: (params, frozen) -> r(params), nats, added once per step; default none. See `proximal`.

    Returns:
        The problem; its outer variable is the table of weights, float[examples].

    Raises:
        ValueError: when it is traced, if the losses are not one for each example.

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> batch = {"data": jnp.array([1.0, 3.0]), "num_examples": 2.0, "index": jnp.array([0, 1])}
        >>> float(problem.inner(jnp.array(0.0), jnp.array([1.0, 2.0]), (), batch))  # (1 * 0.5 + 2 * 4.5) / 2
        4.75
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
    """How much each example counts before any weight: the leaf `multiplicity` of the batch, 1 where there is none."""
    return batch.get("multiplicity", 1.0)


def divide_by_multiplicity(values: Float[Array, "*micro examples"], batch: Batch) -> Float[Array, "*micro examples"]:
    """values / multiplicity, and 0 for an example of multiplicity 0: the derivative for one whole example."""
    if "multiplicity" not in batch:
        return values
    is_counted = batch["multiplicity"] > 0
    return jnp.where(is_counted, values / jnp.where(is_counted, batch["multiplicity"], 1), 0)


def shared(
    inner: Callable[[Params, HyperSlice, Frozen, Batch], Scalar],
    outer: Callable[[Params, Frozen, Batch], Scalar],
    prior: Callable[[Params, Frozen], Scalar] | None = None,
) -> Problem:
    """The problem whose outer variable is global: every batch touches all of it (a regulariser's strength, say).

        min_hyper L_v(params*(hyper)),  params* from training on the sum of `inner` over micro-batches, plus the prior

    Args:
        inner: (params, hyper, frozen, batch) -> one micro-batch's share of the training loss, nats.
        outer: (params, frozen, batch) -> one micro-batch's share of L_v, nats.
        prior: (params, frozen) -> r(params), nats, added once per step; default none.

    Returns:
        The problem; its outer variable is any pytree of arrays, the same in every batch.

    Example:
        >>> def inner(theta, log_strength, frozen, batch):
        ...     return 0.5 * jnp.mean((theta - batch["data"]) ** 2) + 0.5 * jnp.exp(log_strength) * theta**2
        >>> def outer(theta, frozen, batch):
        ...     return 0.5 * jnp.mean((theta - batch["data"]) ** 2)
        >>> problem = bj.shared(inner, outer)
        >>> estimator = bj.implicit_estimator(problem, bj.curvature.hessian(problem), bj.solvers.cg())
        >>> train, validation = (bj.full_batch_stream(jnp.array([value])) for value in (2.0, 0.0))
        >>> run = bj.trajectory_from_params(jnp.array(1.0))  # minimises inner at strength exp(0) = 1
        >>> float(estimator(run, jnp.array(0.0), (), train, validation).grad)  # more regularisation helps
        -0.5
    """

    def gather(hyper: Hyper, batch: Batch) -> HyperSlice:
        num_micro_batches = batch["num_examples"].shape[0]
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_micro_batches, *leaf.shape)), hyper)

    def scatter_add(hyper: Hyper, batch: Batch, hypergradients: HyperSlice) -> Hyper:
        return jax.tree.map(lambda leaf, part: leaf + part.sum(0), hyper, hypergradients)

    return Problem(inner, prior or (lambda params, frozen: jnp.zeros(())), outer, gather, scatter_add)


def proximal(strength: float, centre: Callable[[Frozen], Params]) -> Callable[[Params, Frozen], Scalar]:
    """The prior (strength / 2) |params - centre(frozen)|^2 of the inner problem: it makes the minimiser unique.

    Implicit differentiation is exact for the problem *with* this term. Added to the linear solve alone it would be
    damping, and the result exact for nothing. The centre is read from `frozen`, so that it is an argument of the compiled step.

    Args:
        strength: delta, nats per squared unit of the parameters.
        centre: frozen -> parameters to stay close to, shaped as `params`.

    Returns:
        (params, frozen) -> the prior, nats: the argument `prior` of `weighted` and `shared`.

    Example:
        >>> prior = bj.proximal(0.5, lambda frozen: frozen)
        >>> float(prior(jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])))
        1.0
    """

    def prior(params: Params, frozen: Frozen) -> Scalar:
        return 0.5 * strength * optax.tree.norm(optax.tree.sub(params, centre(frozen)), squared=True)

    return prior
