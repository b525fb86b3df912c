"""Linear solvers for symmetric systems given by matrix-vector products.

Their vector algebra is compiled, as one program where it can be: array by array it would be one for each array of the
parameters, and where these are split over devices, as many meetings of all of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bilevel_jax.core import tree
from bilevel_jax.core.types import Fetch, LinearSolver, Matvec, Params, Scalar, SolveResult


def cg(*, tolerance: float = 1e-6, max_steps: int = 200, fetch: Fetch = np.asarray) -> LinearSolver:
    """Conjugate gradients, stopped when |A x - b| <= tolerance |b|, or by the first direction with p.Ap <= 0.

    Exact to the tolerance where A is positive definite. `min_curvature` is the least p.Ap / p.p met; at or below 0 the
    iteration stopped at the last iterate before it, and the system has no minimiser: trust nothing, raise the prior.
    The residual is recomputed from x at the end, not taken from the recurrence.

    Args:
        tolerance: of the relative residual.
        max_steps: products at most.
        fetch: reads the numbers by which the iteration goes on or stops. Of several processes it must give all of them
            the same: copies of a number may differ in the last bit, and those that stop wait for the others for ever.

    Returns:
        The solver: (matvec, b, guess or None) -> `SolveResult`.

    Example:
        >>> A = jnp.array([[2.0, 1.0], [1.0, 3.0]])
        >>> result = bj.solvers.cg()(lambda v: A @ v, jnp.array([1.0, 2.0]), None)
        >>> [round(float(x), 4) for x in result.x], result.steps
        ([0.2, 0.6], 2)
    """

    @jax.jit
    def advance(x, r, p, Ap, rr, pAp):
        alpha = rr / pAp
        x, r = optax.tree.add_scale(x, alpha, p), optax.tree.add_scale(r, -alpha, Ap)
        new_rr = optax.tree.vdot(r, r)
        return x, r, optax.tree.add_scale(r, new_rr / rr, p), new_rr

    dots = jax.jit(lambda p, Ap: (optax.tree.vdot(p, Ap), optax.tree.vdot(p, p)))

    def solve(matvec: Matvec, b: Params, guess: Params | None = None) -> SolveResult:
        b_norm = float(fetch(_norm(b)))
        x = _zeros(b) if guess is None else guess
        r = b if guess is None else _subtract(b, matvec(x))
        p, rr = r, _squared_norm(r)
        curvature, steps = float("nan"), 0
        while steps < max_steps and float(fetch(rr)) ** 0.5 > tolerance * b_norm:
            Ap = matvec(p)
            pAp, pp = dots(p, Ap)
            steps += 1
            curvature = float(jnp.fmin(pAp / pp, curvature))
            if not float(fetch(pAp)) > 0:  # also true of a nan
                break
            x, r, p, rr = advance(x, r, p, Ap, rr, pAp)
        return SolveResult(x, _residual(matvec, x, b), curvature, steps)

    def solve_traced(matvec: Matvec, b: Params, guess: Params | None = None) -> SolveResult:
        limit = tolerance * tree.norm(b)
        x = optax.tree.zeros_like(b) if guess is None else guess
        r = b if guess is None else optax.tree.sub(b, matvec(x))
        rr = optax.tree.vdot(r, r)

        def unsolved(carry):
            _, _, _, rr, _, steps, is_stopped = carry
            return (steps < max_steps) & (jnp.sqrt(rr) > limit) & ~is_stopped

        def iterate(carry):
            x, r, p, rr, curvature, steps, _ = carry
            Ap = matvec(p)
            pAp, pp = optax.tree.vdot(p, Ap), optax.tree.vdot(p, p)
            is_positive = pAp > 0  # False of a nan, too
            alpha = jnp.where(is_positive, rr / pAp, 0)  # no step along a direction of negative curvature
            x, r = optax.tree.add_scale(x, alpha, p), optax.tree.add_scale(r, -alpha, Ap)
            new_rr = jnp.where(is_positive, optax.tree.vdot(r, r), rr)
            p = optax.tree.add_scale(r, jnp.where(is_positive, new_rr / rr, 0), p)
            return x, r, p, new_rr, jnp.fmin(pAp / pp, curvature), steps + 1, ~is_positive

        start = (x, r, r, rr, jnp.full_like(rr, jnp.nan), jnp.zeros((), jnp.int32), jnp.array(False))
        x, _, _, _, curvature, steps, _ = jax.lax.while_loop(unsolved, iterate, start)
        return SolveResult(x, _residual_norm(matvec(x), b), curvature, steps)

    return LinearSolver(solve, solve_traced)


def neumann(*, step_size: float, terms: int) -> LinearSolver:
    """The truncated Neumann series, which is `terms` gradient steps on the system.

        x = step_size * sum_{k < terms} (I - step_size A)^k b

    Converges for step_size < 2 / max eig(A), slowly where A is badly conditioned: read the residual.

    Args:
        step_size: rate of the gradient steps.
        terms: of the series, one product each.

    Returns:
        (matvec, b, guess or None) -> `SolveResult`, without `min_curvature`.

    Example:
        >>> result = bj.solvers.neumann(step_size=0.5, terms=20)(lambda v: 2 * v, jnp.array([1.0]), None)
        >>> float(result.x[0])
        0.5
    """

    update = jax.jit(lambda x, Ax, b: jax.tree.map(lambda x, y, z: x + step_size * (z - y), x, Ax, b))

    def solve(matvec: Matvec, b: Params, guess: Params | None = None) -> SolveResult:
        x = _zeros(b) if guess is None else guess
        for _ in range(terms):
            x = update(x, matvec(x), b)
        return SolveResult(x, _residual(matvec, x, b), float("nan"), terms)

    def solve_traced(matvec: Matvec, b: Params, guess: Params | None = None) -> SolveResult:
        def iterate(_, x):
            return jax.tree.map(lambda x, y, z: x + step_size * (z - y), x, matvec(x), b)

        x = jax.lax.fori_loop(0, terms, iterate, optax.tree.zeros_like(b) if guess is None else guess)
        return SolveResult(x, _residual_norm(matvec(x), b), float("nan"), terms)

    return LinearSolver(solve, solve_traced)


def identity(*, scale: float = 1.0) -> LinearSolver:
    """No curvature: x = scale * b. The results are then alignments, <grad l_i, grad L_v>, not hypergradients.

    Args:
        scale: factor of b.

    Returns:
        (matvec, b, guess or None) -> `SolveResult`, without residual and `min_curvature`.

    Example:
        >>> float(bj.solvers.identity(scale=2.0)(lambda v: v, jnp.array([3.0]), None).x[0])
        6.0
    """

    def solve(matvec: Matvec, b: Params, guess: Params | None = None) -> SolveResult:
        return SolveResult(_scale(scale, b), float("nan"), float("nan"), 0)

    return LinearSolver(solve, solve)


def dense(*, max_params: int = 4096) -> LinearSolver:
    """The matrix, column by column, and a direct solve; for checking, and for few parameters.

    Works for indefinite A too (`min_curvature` is then the least eigenvalue, below 0).

    Args:
        max_params: more parameters are refused; the matrix has the square of their number of entries.

    Returns:
        (matvec, b, guess or None) -> `SolveResult`; the solve raises a ValueError beyond `max_params`.

    Example:
        >>> A = jnp.array([[2.0, 0.0], [0.0, -1.0]])
        >>> result = bj.solvers.dense()(lambda v: A @ v, jnp.array([1.0, 2.0]), None)
        >>> result.x.tolist(), result.min_curvature
        ([0.5, -2.0], -1.0)
    """

    def check_size(size: int) -> None:
        if size > max_params:
            raise ValueError(f"{size} parameters are too many for the dense solver (limit {max_params}); use cg.")

    def solve(matvec: Matvec, b: Params, guess: Params | None = None) -> SolveResult:
        flat, unravel = ravel_pytree(b)
        check_size(flat.size)
        columns = [ravel_pytree(matvec(unravel(row)))[0] for row in jnp.eye(flat.size, dtype=flat.dtype)]
        A = jnp.stack(columns, axis=1)
        x = unravel(jnp.linalg.solve(A, flat))
        min_eigenvalue = float(jnp.linalg.eigvalsh((A + A.T) / 2)[0])
        return SolveResult(x, _residual(matvec, x, b), min_eigenvalue, flat.size)

    def solve_traced(matvec: Matvec, b: Params, guess: Params | None = None) -> SolveResult:
        flat, unravel = ravel_pytree(b)
        check_size(flat.size)
        columns = jax.lax.map(lambda row: ravel_pytree(matvec(unravel(row)))[0], jnp.eye(flat.size, dtype=flat.dtype))
        x = unravel(jnp.linalg.solve(columns.T, flat))
        min_eigenvalue = jnp.linalg.eigvalsh((columns + columns.T) / 2)[0]
        return SolveResult(x, _residual_norm(matvec(x), b), min_eigenvalue, flat.size)

    return LinearSolver(solve, solve_traced)


def _residual(matvec: Matvec, x: Params, b: Params) -> float:
    return float(_relative_residual(matvec(x), b))


_norm = jax.jit(tree.norm)
_squared_norm = jax.jit(lambda v: optax.tree.vdot(v, v))
_zeros = jax.jit(optax.tree.zeros_like)
_subtract = jax.jit(optax.tree.sub)
_scale = jax.jit(optax.tree.scale)


def _residual_norm(Ax: Params, b: Params) -> Scalar:
    """|A x - b| / |b|, and 0 where b and the residual are 0."""
    norm, b_norm = tree.norm(optax.tree.sub(Ax, b)), tree.norm(b)
    return jnp.where(norm == 0, 0, norm / b_norm)


_relative_residual = jax.jit(lambda Ax, b: tree.norm(optax.tree.sub(Ax, b)) / tree.norm(b))
