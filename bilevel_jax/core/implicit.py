"""The solve at a trained model, and the entries of all rows by streaming one forward-mode product."""

import jax
import jax.numpy as jnp
import optax

from bilevel_jax.core import tree
from bilevel_jax.core.curvature import Product
from bilevel_jax.core.types import (
    PADDING,
    Batch,
    Checks,
    Estimate,
    Estimator,
    Fixed,
    Hyper,
    Params,
    Problem,
    Run,
    Scalar,
    Slice,
    Solve,
    Solver,
    Stream,
)
from bilevel_jax.core.unrolled import outer_gradient


def implicit(
    problem: Problem, product: Product, solver: Solver, *, batches: int | None = None, agreement: float = 0.95
) -> Estimator:
    """d L_v(theta*(w)) / dw at the minimiser theta* of G(theta, w) + r(theta), by the implicit function theorem.

        (curvature of G + r) v = grad L_v;   entry_i = -<grad l_i, v> / rows

    Three passes over streams, each of which is *summed*: the train stream must give every training row once, with
    `rows` = all of them, so that its sum is G. (1) grad L_v over all of V; (2) the solve, on a frozen set of
    `batches` of the train stream (default: all), doubled until the solutions on a half and on the whole have a cosine
    above `agreement`; (3) the entries of every row, which one forward-mode product gives.

    Exact where theta is stationary, the system is solved, and `product` is the Hessian of a problem whose prior makes
    it positive definite. With the Gauss-Newton product it is the response of the proximal Bregman problem at theta;
    with the `identity` solver it is alignment.

    Wrong, and told by `checks`: theta not stationary (`gap`, nats of L_v), system not solved (`residual`), not
    positive definite (`curvature` <= 0), too few batches (`sample` below `agreement`).
    """
    value_and_slope = outer_gradient(problem)
    take, add = jax.jit(problem.take), jax.jit(problem.add, donate_argnums=0)

    @jax.jit
    def contributions(gap, params, weights, fixed, batch, v):
        with jax.default_matmul_precision("highest"):
            slopes, parts = jax.lax.map(
                lambda micro: entries(problem, params, micro[0], fixed, micro[1], v), (weights, batch)
            )
        return gap + slopes.sum(), parts

    @jax.jit
    def prior_slope(params, fixed, v):
        return jax.jvp(lambda p: problem.prior(p, fixed), (params,), (v,))[1]

    def estimate(run: Run, hyper: Hyper, fixed: Fixed, train: Stream, validation: Stream) -> Estimate:
        params = run.end.params
        value, slope = value_and_slope(params, fixed, validation)

        def solve(count: int, guess: Params | None) -> Solve:
            sample = sampled(train, count)
            return solver(lambda v: product(params, hyper, fixed, sample, v), slope, guess)

        count = min(batches or train.steps, train.steps)
        solution, sample = solve(count, None), float("nan")
        while count < train.steps and not sample > agreement:
            count = min(2 * count, train.steps)
            before, solution = solution, solve(count, solution.x)
            sample = float(_cosine(before.x, solution.x))

        v = _negative(solution.x)
        grad, gap = jax.tree.map(jnp.zeros_like, hyper), prior_slope(params, fixed, v)
        for index in range(train.steps):
            batch = train.batch(index)
            gap, parts = contributions(gap, params, take(hyper, batch), fixed, batch, v)
            grad = add(grad, batch, parts)
        checks = Checks(
            residual=solution.residual,
            curvature=solution.curvature,
            gap=-float(gap),
            steps=solution.steps,
            sample=sample,
            batches=count,
        )
        return Estimate(grad, value, solution.x, checks)

    return estimate


_cosine = jax.jit(tree.cosine)
_negative = jax.jit(lambda v: optax.tree.scale(-1.0, v))
_real = jax.jit(lambda index: jnp.sum(index != PADDING))


def entries(
    problem: Problem, params: Params, weights: Slice, fixed: Fixed, batch: Batch, v: Params
) -> tuple[Scalar, Slice]:
    """<d inner / d params, v>, and its derivative by the weights: what each example contributes along `v`.

    A gradient of a forward-mode product: for losses linear in the weights this is one JVP of the per-example losses.
    Right at any params; it is the *direction* v that makes an estimate exact or not.
    """

    def slope(weights):
        return jax.jvp(lambda p: problem.inner(p, weights, fixed, batch), (params,), (v,))[1]

    return jax.value_and_grad(slope)(weights)


def sampled(stream: Stream, count: int) -> Stream:
    """The first `count` batches of a summed stream, scaled so that their sum estimates the whole stream's.

    The stream should come in random order. Scaling acts on `rows`: the rows of the sample take the place of all rows.
    """
    if count >= stream.steps:
        return stream
    real = float(sum(int(_real(stream.batch(index)["index"])) for index in range(count)))

    def batch(index: int) -> Batch:
        full = stream.batch(index)
        return {**full, "rows": jnp.full_like(full["rows"], real)}

    return Stream(batch, count)
