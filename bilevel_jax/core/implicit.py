"""The solve at a trained model, and the entries of all rows by streaming one forward-mode product."""

import jax
import jax.numpy as jnp
import optax

from bilevel_jax.core import tree
from bilevel_jax.core.curvature import CurvatureProduct
from bilevel_jax.core.types import (
    PADDING,
    Batch,
    Checks,
    Estimate,
    Estimator,
    Frozen,
    Hyper,
    HyperSlice,
    Params,
    Problem,
    Scalar,
    Solver,
    SolveResult,
    Stream,
    Trajectory,
)
from bilevel_jax.core.unrolled import validation_loss_and_grad_fn


def implicit(
    problem: Problem,
    curvature_product: CurvatureProduct,
    solver: Solver,
    *,
    batches: int | None = None,
    min_cosine: float = 0.95,
) -> Estimator:
    """d L_v(theta*(w)) / dw at the minimiser theta* of G(theta, w) + r(theta), by the implicit function theorem.

        (curvature of G + r) v = grad L_v;   entry_i = -<grad l_i, v> / rows

    Three passes over streams, each of which is *summed*: the train stream must give every training example once, with
    `rows` = all of them, so that its sum is G. (1) grad L_v over all of V; (2) the solve, on a frozen set of
    `batches` of the train stream (default: all), doubled until the solutions on a half and on the whole have a cosine
    above `agreement`; (3) the entries of every row, which one forward-mode product gives.

    Exact where theta is stationary, the system is solved, and `product` is the Hessian of a problem whose prior makes
    it positive definite. With the Gauss-Newton product it is the response of the proximal Bregman problem at theta;
    with the `identity` solver it is alignment.

    Wrong, and told by `checks`: theta not stationary (`gap`, nats of L_v), system not solved (`residual`), not
    positive definite (`curvature` <= 0), too few batches (`sample` below `agreement`).
    """
    loss_and_grad = validation_loss_and_grad_fn(problem)
    gather, scatter_add = jax.jit(problem.gather), jax.jit(problem.scatter_add, donate_argnums=0)

    @jax.jit
    def add_batch_hypergradients(gap, params, weights, frozen, batch, v):
        with jax.default_matmul_precision("highest"):
            derivatives, hypergradients = jax.lax.map(
                lambda micro: hypergradients_along(problem, params, micro[0], frozen, micro[1], v), (weights, batch)
            )
        return gap + derivatives.sum(), hypergradients

    @jax.jit
    def prior_derivative(params, frozen, v):
        return jax.jvp(lambda p: problem.prior(p, frozen), (params,), (v,))[1]

    def estimate(run: Trajectory, hyper: Hyper, fixed: Frozen, train: Stream, validation: Stream) -> Estimate:
        params = run.end.params
        value, slope = loss_and_grad(params, fixed, validation)

        def solve(num_batches: int, guess: Params | None) -> SolveResult:
            sample_cosine = subsample_stream(train, num_batches)
            return solver(lambda v: curvature_product(params, hyper, fixed, sample_cosine, v), slope, guess)

        num_batches = min(batches or train.steps, train.steps)
        solution, sample_cosine = solve(num_batches, None), float("nan")
        while num_batches < train.steps and not sample_cosine > min_cosine:
            num_batches = min(2 * num_batches, train.steps)
            before, solution = solution, solve(num_batches, solution.x)
            sample_cosine = float(_cosine(before.x, solution.x))

        v = _negate(solution.x)
        grad, gap = jax.tree.map(jnp.zeros_like, hyper), prior_derivative(params, fixed, v)
        for index in range(train.steps):
            batch = train.batch(index)
            gap, parts = add_batch_hypergradients(gap, params, gather(hyper, batch), fixed, batch, v)
            grad = scatter_add(grad, batch, parts)
        checks = Checks(
            residual=solution.residual,
            curvature=solution.min_curvature,
            gap=-float(gap),
            steps=solution.steps,
            sample=sample_cosine,
            batches=num_batches,
        )
        return Estimate(grad, value, solution.x, checks)

    return estimate


_cosine = jax.jit(tree.cosine)
_negate = jax.jit(lambda v: optax.tree.scale(-1.0, v))
_count_real_examples = jax.jit(lambda index: jnp.sum(index != PADDING))


def hypergradients_along(
    problem: Problem, params: Params, weights: HyperSlice, frozen: Frozen, batch: Batch, v: Params
) -> tuple[Scalar, HyperSlice]:
    """<d inner / d params, v>, and its derivative by the weights: what each example contributes along `v`.

    A gradient of a forward-mode product: for losses linear in the weights this is one JVP of the per-example losses.
    Right at any params; it is the *direction* v that makes an estimate exact or not.
    """

    def inner_derivative(weights):
        return jax.jvp(lambda p: problem.inner(p, weights, frozen, batch), (params,), (v,))[1]

    return jax.value_and_grad(inner_derivative)(weights)


def subsample_stream(stream: Stream, count: int) -> Stream:
    """The first `count` batches of a summed stream, scaled so that their sum estimates the whole stream's.

    The stream should come in random order. Scaling acts on `rows`: the rows of the sample take the place of all rows.
    """
    if count >= stream.steps:
        return stream
    num_real = float(sum(int(_count_real_examples(stream.batch(index)["index"])) for index in range(count)))

    def batch(index: int) -> Batch:
        full_batch = stream.batch(index)
        return {**full_batch, "num_examples": jnp.full_like(full_batch["num_examples"], num_real)}

    return Stream(batch, count)
