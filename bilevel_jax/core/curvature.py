"""Hessian-vector and Gauss-Newton-vector products over a stream of batches."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel_jax.core.types import Batch, CompositeLoss, Frozen, Hyper, HyperSlice, Params, Problem, Stream

MicroBatchProduct = Callable[[Problem, Params, HyperSlice, Frozen, Batch, Params], Params]


class CurvatureProduct(NamedTuple):
    """A product with the curvature of inner + prior.

    Called with (params, hyper, frozen, stream, v): the product with the curvature of the sum over the stream.
    """

    over_stream: Callable[[Params, Hyper, Frozen, Stream, Params], Params]
    """(params, hyper, frozen, stream, v) -> the product, by a Python loop."""
    of_micro_batch: MicroBatchProduct
    """(problem, params, slice, frozen, micro-batch, v) -> the product without the prior's part; a pure function."""

    def __call__(self, params: Params, hyper: Hyper, frozen: Frozen, stream: Stream, v: Params) -> Params:
        """The product over a stream."""
        return self.over_stream(params, hyper, frozen, stream, v)


def hessian(problem: Problem) -> CurvatureProduct:
    """The Hessian of inner + prior: exact, symmetric, and often indefinite for a fine-tuned language model.

        v -> d^2 (sum over the stream of inner + prior) / d params^2  v

    Args:
        problem: with its training loss and prior.

    Returns:
        (params, hyper, frozen, stream, v) -> the product, shaped as params; for `implicit_estimator`.

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> product = bj.curvature.hessian(problem)
        >>> stream = bj.full_batch_stream(jnp.array([1.0, 3.0]))
        >>> float(product(jnp.array(0.0), jnp.array([1.0, 2.0]), (), stream, jnp.array(1.0)))  # the mean weight
        1.5
    """

    def micro_product(
        problem: Problem, params: Params, weights: HyperSlice, frozen: Frozen, batch: Batch, v: Params
    ) -> Params:
        return jax.jvp(lambda p: jax.grad(problem.inner)(p, weights, frozen, batch), (params,), (v,))[1]

    return over_streams_of(problem, micro_product)


def gauss_newton(problem: Problem, loss: CompositeLoss) -> CurvatureProduct:
    """The generalised Gauss-Newton matrix of inner plus the prior's Hessian: positive semi-definite.

        v -> J^T L'' J v + prior'' v,  J the Jacobian of the outputs, L'' the Hessian of the weighted link

    Positive semi-definite for weights >= 0 and a convex link. An approximation of the Hessian, equal to it where the
    outputs are linear in the parameters; the implicit gradient that it gives is the response of the proximal Bregman
    problem at params, not of the training loss.

    Args:
        problem: with its training loss and prior.
        loss: the same losses as link(outputs).

    Returns:
        (params, hyper, frozen, stream, v) -> the product, shaped as params; for `implicit_estimator`.

    Example:
        >>> from bilevel_jax.core.types import CompositeLoss
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> loss = CompositeLoss(
        ...     outputs=lambda theta, frozen, batch: theta * jnp.ones_like(batch["data"]),
        ...     link=lambda outputs, frozen, batch: 0.5 * (outputs - batch["data"]) ** 2,
        ... )
        >>> product = bj.curvature.gauss_newton(problem, loss)
        >>> stream = bj.full_batch_stream(jnp.array([1.0, 3.0]))
        >>> float(product(jnp.array(0.0), jnp.array([1.0, 2.0]), (), stream, jnp.array(1.0)))
        1.5
    """

    def micro_product(
        problem: Problem, params: Params, weights: HyperSlice, frozen: Frozen, batch: Batch, v: Params
    ) -> Params:
        def outputs(p):
            return loss.outputs(p, frozen, batch)

        def link(values):
            return jnp.sum(weights * loss.link(values, frozen, batch)) / batch["num_examples"]

        values, tangent = jax.jvp(outputs, (params,), (v,))
        link_curvature = jax.jvp(jax.grad(link), (values,), (tangent,))[1]
        return jax.vjp(outputs, params)[1](link_curvature)[0]

    return over_streams_of(problem, micro_product)


def over_streams_of(problem: Problem, micro_product: MicroBatchProduct) -> CurvatureProduct:
    """The product with the curvature of a problem, from the product of a micro-batch.

    Args:
        problem: with its training loss and prior.
        micro_product: (problem, params, slice, frozen, micro-batch, v) -> the product without the prior's part.

    Returns:
        The product.

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> identity = bj.curvature.over_streams_of(problem, lambda problem, params, weights, frozen, batch, v: v)
        >>> stream = bj.full_batch_stream(jnp.array([1.0]))
        >>> float(identity(jnp.array(0.0), jnp.ones(1), (), stream, jnp.array(2.0)))
        2.0
    """
    gather = jax.jit(problem.gather)

    @jax.jit
    def prior_product(params, frozen, v):
        with jax.default_matmul_precision("highest"):
            return jax.jvp(lambda p: jax.grad(problem.prior)(p, frozen), (params,), (v,))[1]

    @jax.jit
    def add_batch_product(total, params, weights, frozen, batch, v):
        def add_micro(total, micro):
            return optax.tree.add(total, micro_product(problem, params, micro[0], frozen, micro[1], v)), None

        with jax.default_matmul_precision("highest"):
            return jax.lax.scan(add_micro, total, (weights, batch))[0]

    def product(params: Params, hyper: Hyper, frozen: Frozen, stream: Stream, v: Params) -> Params:
        total = prior_product(params, frozen, v)
        for index in range(stream.steps):
            batch = stream.batch(index)
            total = add_batch_product(total, params, gather(hyper, batch), frozen, batch, v)
        return total

    return CurvatureProduct(product, micro_product)
