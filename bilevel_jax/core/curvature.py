"""The product v -> A v of an inner problem's curvature, summed over a stream of batches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bilevel_jax.core.types import Batch, Fixed, Hyper, Loss, Params, Problem, Slice, Stream

Product = Callable[[Params, Hyper, Fixed, Stream, Params], Params]
"""(params, hyper, fixed, stream, v) -> (curvature of sum over the stream of inner, plus prior) v."""


def hessian(problem: Problem) -> Product:
    """The Hessian of inner + prior: exact, symmetric, and often indefinite for a fine-tuned language model."""

    def one(params: Params, weights: Slice, fixed: Fixed, batch: Batch, v: Params) -> Params:
        return jax.jvp(lambda p: jax.grad(problem.inner)(p, weights, fixed, batch), (params,), (v,))[1]

    return _streamed(problem, one)


def gauss_newton(problem: Problem, loss: Loss) -> Product:
    """The generalised Gauss-Newton matrix J^T L'' J of inner, with J the Jacobian of the outputs and L'' the Hessian of
    the weighted link, plus the prior's Hessian: positive semi-definite for weights >= 0 and a convex link.

    An approximation of the Hessian, equal to it where the outputs are linear in the parameters; the implicit gradient
    that it gives is the response of the proximal Bregman problem at params, not of the training loss.
    """

    def one(params: Params, weights: Slice, fixed: Fixed, batch: Batch, v: Params) -> Params:
        def outputs(p):
            return loss.outputs(p, fixed, batch)

        def link(values):
            return jnp.sum(weights * loss.link(values, fixed, batch)) / batch["rows"]

        values, tangent = jax.jvp(outputs, (params,), (v,))
        curved = jax.jvp(jax.grad(link), (values,), (tangent,))[1]
        return jax.vjp(outputs, params)[1](curved)[0]

    return _streamed(problem, one)


def _streamed(problem: Problem, one) -> Product:
    take = jax.jit(problem.take)

    @jax.jit
    def prior(params, fixed, v):
        with jax.default_matmul_precision("highest"):
            return jax.jvp(lambda p: jax.grad(problem.prior)(p, fixed), (params,), (v,))[1]

    @jax.jit
    def add(total, params, weights, fixed, batch, v):
        def add_micro(total, micro):
            return optax.tree.add(total, one(params, micro[0], fixed, micro[1], v)), None

        with jax.default_matmul_precision("highest"):
            return jax.lax.scan(add_micro, total, (weights, batch))[0]

    def product(params: Params, hyper: Hyper, fixed: Fixed, stream: Stream, v: Params) -> Params:
        total = prior(params, fixed, v)
        for index in range(stream.steps):
            batch = stream.batch(index)
            total = add(total, params, take(hyper, batch), fixed, batch, v)
        return total

    return product
