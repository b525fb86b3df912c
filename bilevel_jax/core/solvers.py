"""A x = b for symmetric A given by its products: cg, neumann, identity, dense; each tells its residual.

Their vector algebra is compiled, as one program where it can be: array by array it would be one for each array of the
parameters, and where these are split over devices, as many meetings of all of them.
"""

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bilevel_jax.core import tree
from bilevel_jax.core.types import Matvec, Params, Solver, SolveResult


def cg(*, tolerance: float = 1e-6, max_steps: int = 200) -> Solver:
    """Conjugate gradients, stopped when |A x - b| <= tolerance |b|, or by the first direction with p.Ap <= 0.

    Exact to the tolerance where A is positive definite. `curvature` is the least p.Ap / p.p met; at or below 0 the
    iteration stopped at the last iterate before it, and the system has no minimiser: trust nothing, raise the prior.
    The residual is recomputed from x at the end, not taken from the recurrence.
    """

    @jax.jit
    def advance(x, r, p, Ap, rr, pAp):
        alpha = rr / pAp
        x, r = optax.tree.add_scale(x, alpha, p), optax.tree.add_scale(r, -alpha, Ap)
        new_rr = optax.tree.vdot(r, r)
        return x, r, optax.tree.add_scale(r, new_rr / rr, p), new_rr

    dots = jax.jit(lambda p, Ap: (optax.tree.vdot(p, Ap), optax.tree.vdot(p, p)))

    def solve(matvec: Matvec, b: Params, guess: Params | None = None) -> SolveResult:
        b_norm = float(_norm(b))
        x = _zeros(b) if guess is None else guess
        r = b if guess is None else _subtract(b, matvec(x))
        p, rr = r, _squared_norm(r)
        curvature, steps = float("nan"), 0
        while steps < max_steps and float(rr) ** 0.5 > tolerance * b_norm:
            Ap = matvec(p)
            pAp, pp = dots(p, Ap)
            steps += 1
            curvature = float(jnp.fmin(pAp / pp, curvature))
            if not float(pAp) > 0:  # also true of a nan
                break
            x, r, p, rr = advance(x, r, p, Ap, rr, pAp)
        return SolveResult(x, _residual(matvec, x, b), curvature, steps)

    return solve


def neumann(*, step_size: float, terms: int) -> Solver:
    """x = rate * sum_{k < terms} (I - rate A)^k b: `terms` gradient steps; converges for rate < 2 / max eig(A)."""

    update = jax.jit(lambda x, Ax, b: jax.tree.map(lambda x, y, z: x + step_size * (z - y), x, Ax, b))

    def solve(matvec: Matvec, b: Params, guess: Params | None = None) -> SolveResult:
        x = _zeros(b) if guess is None else guess
        for _ in range(terms):
            x = update(x, matvec(x), b)
        return SolveResult(x, _residual(matvec, x, b), float("nan"), terms)

    return solve


def identity(*, scale: float = 1.0) -> Solver:
    """x = scale * b: no curvature. The entries are then alignments, <grad l_i, grad L_v>, not hypergradients."""

    def solve(matvec: Matvec, b: Params, guess: Params | None = None) -> SolveResult:
        return SolveResult(_scale(scale, b), float("nan"), float("nan"), 0)

    return solve


def dense(*, max_params: int = 4096) -> Solver:
    """Forms A column by column and solves directly; for checking, and for up to `limit` parameters.

    Works for indefinite A too (`curvature` is then the least eigenvalue, below 0).
    """

    def solve(matvec: Matvec, b: Params, guess: Params | None = None) -> SolveResult:
        flat, unravel = ravel_pytree(b)
        if flat.size > max_params:
            raise ValueError(f"{flat.size} parameters are too many for the dense solver (limit {max_params}); use cg.")
        columns = [ravel_pytree(matvec(unravel(row)))[0] for row in jnp.eye(flat.size, dtype=flat.dtype)]
        A = jnp.stack(columns, axis=1)
        x = unravel(jnp.linalg.solve(A, flat))
        min_eigenvalue = float(jnp.linalg.eigvalsh((A + A.T) / 2)[0])
        return SolveResult(x, _residual(matvec, x, b), min_eigenvalue, flat.size)

    return solve


def _residual(matvec: Matvec, x: Params, b: Params) -> float:
    return float(_relative_residual(matvec(x), b))


_norm = jax.jit(tree.norm)
_squared_norm = jax.jit(lambda v: optax.tree.vdot(v, v))
_zeros = jax.jit(optax.tree.zeros_like)
_subtract = jax.jit(optax.tree.sub)
_scale = jax.jit(optax.tree.scale)
_relative_residual = jax.jit(lambda Ax, b: tree.norm(optax.tree.sub(Ax, b)) / tree.norm(b))
