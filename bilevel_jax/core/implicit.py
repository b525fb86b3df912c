"""Implicit differentiation at a trained model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax.core import tree
from bilevel_jax.core.curvature import CurvatureProduct
from bilevel_jax.core.types import (
    PADDING,
    Batch,
    Checks,
    Estimate,
    Estimator,
    Fetch,
    Frozen,
    Hyper,
    HyperSlice,
    LinearSolver,
    Params,
    Problem,
    Scalar,
    SolveResult,
    Stream,
    Trajectory,
)
from bilevel_jax.core.unrolled import validation_loss_and_grad_fn


def implicit_estimator(
    problem: Problem,
    curvature_product: CurvatureProduct,
    solver: LinearSolver,
    *,
    batches: int | None = None,
    min_cosine: float = 0.95,
    fetch: Fetch = np.asarray,
) -> Estimator:
    """The metagradient d L_v(theta*(w)) / dw at the minimiser theta* of G + r, by the implicit function theorem.

        (curvature of G + r) v = grad L_v;   hypergradient_i = -<grad l_i, v> / N

    Three passes over streams, each of which is *summed*: the train stream must give every training example once, with
    `num_examples` = all of them, so that its sum is G. (1) grad L_v over all of the validation set; (2) the solve, on a
    fixed set of `batches` of the train stream, doubled until the solutions on a half and on the whole have a cosine
    above `min_cosine`; (3) the hypergradient of every example, which one forward-mode product gives.

    Exact where theta is stationary, the system is solved, and the curvature is the Hessian of a problem whose prior
    makes it positive definite. With the Gauss-Newton product it is the response of the proximal Bregman problem at
    theta; with the `identity` solver it is alignment.

    Wrong, and reported by `checks`: theta not stationary (`gap`, nats of L_v), system not solved (`residual`), not
    positive definite (`curvature` <= 0), too few batches (`sample` below `min_cosine`).

    Args:
        problem: as `weighted` or `shared` gives it.
        curvature_product: `curvature.hessian` or `curvature.gauss_newton` of the problem.
        solver: of the linear system, such as `solvers.cg()`.
        batches: of the train stream for the first solve; default all.
        min_cosine: agreement of two solutions at which the number of batches is enough.
        fetch: reads the cosine; of several processes it must give all of them the same number (as in `solvers.cg`).

    Returns:
        The estimator: (trajectory, hyper, frozen, train stream, validation stream) -> `Estimate`; of the trajectory it
        reads the end alone (see `trajectory_from_params`).

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> estimator = bj.implicit_estimator(problem, bj.curvature.hessian(problem), bj.solvers.cg())
        >>> train, validation = (bj.full_batch_stream(jnp.array(data)) for data in ([1.0, 3.0], [4.0]))
        >>> run = bj.trajectory_from_params(jnp.array(2.0))  # the mean minimises the training loss
        >>> estimator(run, jnp.ones(2), (), train, validation).grad.tolist()
        [1.0, -1.0]
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

    def estimate(trajectory: Trajectory, hyper: Hyper, frozen: Frozen, train: Stream, validation: Stream) -> Estimate:
        params = trajectory.end.params
        validation_loss, validation_grad = loss_and_grad(params, frozen, validation)

        def solve(num_batches: int, guess: Params | None) -> SolveResult:
            sample = subsample_stream(train, num_batches)
            return solver(lambda v: curvature_product(params, hyper, frozen, sample, v), validation_grad, guess)

        num_batches = min(batches or train.steps, train.steps)
        solution, sample_cosine = solve(num_batches, None), float("nan")
        while num_batches < train.steps and not sample_cosine > min_cosine:
            num_batches = min(2 * num_batches, train.steps)
            before, solution = solution, solve(num_batches, solution.x)
            sample_cosine = float(fetch(_cosine(before.x, solution.x)))

        v = _negate(solution.x)
        grad, gap = jax.tree.map(jnp.zeros_like, hyper), prior_derivative(params, frozen, v)
        for index in range(train.steps):
            batch = train.batch(index)
            gap, hypergradients = add_batch_hypergradients(gap, params, gather(hyper, batch), frozen, batch, v)
            grad = scatter_add(grad, batch, hypergradients)
        checks = Checks(
            residual=solution.residual,
            curvature=solution.min_curvature,
            gap=-float(gap),
            steps=solution.steps,
            sample=sample_cosine,
            batches=num_batches,
        )
        return Estimate(grad, validation_loss, solution.x, checks, params)

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

    The stream should come in random order. Scaling acts on `num_examples`: the examples of the sample take the place
    of all.
    """
    if count >= stream.steps:
        return stream
    num_real = float(sum(int(_count_real_examples(stream.batch(index)["index"])) for index in range(count)))

    def batch(index: int) -> Batch:
        full_batch = stream.batch(index)
        return {**full_batch, "num_examples": jnp.full_like(full_batch["num_examples"], num_real)}

    return Stream(batch, count)
