"""The product v -> A v of an inner problem's curvature, summed over a stream of batches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bilevel_jax.core.types import Batch, CompositeLoss, Frozen, Hyper, HyperSlice, Params, Problem, Stream

CurvatureProduct = Callable[[Params, Hyper, Frozen, Stream, Params], Params]
"""(params, hyper, fixed, stream, v) -> (curvature of sum over the stream of inner, plus prior) v."""


def hessian(problem: Problem) -> CurvatureProduct:
    """The Hessian of inner + prior: exact, symmetric, and often indefinite for a fine-tuned language model."""

    def micro_product(params: Params, weights: HyperSlice, frozen: Frozen, batch: Batch, v: Params) -> Params:
        return jax.jvp(lambda p: jax.grad(problem.inner)(p, weights, frozen, batch), (params,), (v,))[1]

    return _sum_over_stream(problem, micro_product)


def gauss_newton(problem: Problem, loss: CompositeLoss) -> CurvatureProduct:
    """The generalised Gauss-Newton matrix J^T L'' J of inner, with J the Jacobian of the outputs and L'' the Hessian of
    the weighted link, plus the prior's Hessian: positive semi-definite for weights >= 0 and a convex link.

    An approximation of the Hessian, equal to it where the outputs are linear in the parameters; the implicit gradient
    that it gives is the response of the proximal Bregman problem at params, not of the training loss.
    """

    def micro_product(params: Params, weights: HyperSlice, frozen: Frozen, batch: Batch, v: Params) -> Params:
        def outputs(p):
            return loss.outputs(p, frozen, batch)

        def link(values):
            return jnp.sum(weights * loss.link(values, frozen, batch)) / batch["num_examples"]

        values, tangent = jax.jvp(outputs, (params,), (v,))
        link_curvature = jax.jvp(jax.grad(link), (values,), (tangent,))[1]
        return jax.vjp(outputs, params)[1](link_curvature)[0]

    return _sum_over_stream(problem, micro_product)


def _sum_over_stream(problem: Problem, micro_product) -> CurvatureProduct:
    gather = jax.jit(problem.gather)

    @jax.jit
    def prior_product(params, frozen, v):
        with jax.default_matmul_precision("highest"):
            return jax.jvp(lambda p: jax.grad(problem.prior)(p, frozen), (params,), (v,))[1]

    @jax.jit
    def add_batch_product(total, params, weights, frozen, batch, v):
        def add_micro(total, micro):
            return optax.tree.add(total, micro_product(params, micro[0], frozen, micro[1], v)), None

        with jax.default_matmul_precision("highest"):
            return jax.lax.scan(add_micro, total, (weights, batch))[0]

    def product(params: Params, hyper: Hyper, frozen: Frozen, stream: Stream, v: Params) -> Params:
        total = prior_product(params, frozen, v)
        for index in range(stream.steps):
            batch = stream.batch(index)
            total = add_batch_product(total, params, gather(hyper, batch), frozen, batch, v)
        return total

    return product
