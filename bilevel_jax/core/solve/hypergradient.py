"""Hypergradients of a loss on plain arrays in one call."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.solve.arrays import check_columns, count_rows
from bilevel_jax.core.solve.implicit import implicit
from bilevel_jax.core.solve.solution import BilevelSolver, Solution
from bilevel_jax.core.solve.unroll import unroll
from bilevel_jax.core.types import LinearSolver, Params, PyTree

DEFAULT_STEPS = 100


def hypergradient(
    losses: Callable[[Params, PyTree], Float[Array, "examples"]],
    params: Params,
    training: PyTree,
    validation: PyTree,
    *,
    weights: Float[Array, "examples"] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    l2: float | None = None,
    solver: LinearSolver | None = None,
) -> Solution:
    """The metagradient d L_v / d weights of a model with per-example losses, exact for one of two estimands.

    With `optimizer`: trains from `params` for `steps` steps on batches of `batch_size` examples and differentiates
    through that run (`unroll`): exact for L_v(theta_T(w)).

    With `l2`: takes `params` as the minimiser of mean_i w_i losses_i + (l2 / 2) |params|^2 and differentiates
    implicitly (`implicit`): exact for L_v(theta*(w)) as far as `params` is stationary, which `checks.gap` measures in
    nats.

    Composes with jit, vmap, scan and pmap, and compiles once for each shape as long as `losses`, `optimizer` and the
    other settings are the same objects.

    Args:
        losses: (params, data) -> one loss for each example of data, float[examples], nats.
        params: where training starts, or the trained model.
        training: a pytree of arrays that lead with [examples].
        validation: likewise; L_v is the mean of its losses.
        weights: float[examples], one for each training example; default 1.
        optimizer: of the training run to differentiate through; Adam and its kin need eps_root > 0.
        steps: optimizer steps of that run; default 100.
        batch_size: examples of a step; default all.
        seed: of the order of the examples, where batches are smaller.
        l2: the strength of the quadratic regulariser, for implicit differentiation.
        solver: of the linear system, for implicit differentiation; default conjugate gradients to 1e-6.

    Returns:
        The solution: `grad` float[examples] in nats per unit of weight, below 0 where more weight lowers L_v.

    Raises:
        ValueError: if both or neither of `optimizer` and `l2` are given, a setting of the other one is, the weights are
            not one for each example, or the optimizer has no derivative.
        FloatingPointError: outside of transformations, if the status of the solution is not OK.

    Example:
        >>> def losses(theta, data):
        ...     return 0.5 * (theta - data) ** 2
        >>> training, validation = jnp.array([1.0, 1.0, -1.0]), jnp.array([0.5])
        >>> solution = bj.hypergradient(
        ...     losses, jnp.array(0.0), training, validation, optimizer=optax.sgd(0.1), steps=20
        ... )
        >>> [bool(grad < 0) for grad in solution.grad]  # less weight for the last
        [True, True, False]
    """
    if (optimizer is None) == (l2 is None):
        raise ValueError("give either optimizer (unrolled, through a training run) or l2 (implicit).")
    others = {"steps": steps, "batch_size": batch_size} if optimizer is None else {"solver": solver}
    for name, setting in others.items():
        if setting is not None:
            raise ValueError(
                f"{name} is of {'unrolled' if optimizer is None else 'implicit'} differentiation; drop it."
            )
    check_columns("training", training)
    check_columns("validation", validation)
    count = count_rows(training)
    if weights is None:
        dtype = jnp.result_type(*jax.tree.leaves(params)) if jax.tree.leaves(params) else float
        weights = jnp.ones(count, dtype if jnp.issubdtype(dtype, jnp.floating) else float)
    if optimizer is None:
        return _build_once(_implicit_solver, losses, l2, solver).run(params, weights, training, validation)
    steps = DEFAULT_STEPS if steps is None else steps
    solver_of_run = _build_once(_unrolling_solver, losses, optimizer, steps, batch_size)
    key = None if batch_size is None or batch_size == count else jax.random.key(seed)
    return solver_of_run.run(params, weights, training, validation, key=key)


def _build_once(build: Any, *settings: Any) -> BilevelSolver:
    """The solver of these settings; a new one where they have no hash, as an array or a traced number."""
    try:
        hash(settings)
    except TypeError:
        return build.__wrapped__(*settings)
    return build(*settings)


@lru_cache(maxsize=16)
def _unrolling_solver(
    losses: Callable, optimizer: optax.GradientTransformation, steps: int, batch_size: int | None
) -> BilevelSolver:
    problem = weighted(lambda params, frozen, batch: losses(params, batch["data"]))
    return unroll(problem, optimizer, steps=steps, batch_size=batch_size)


@lru_cache(maxsize=16)
def _implicit_solver(losses: Callable, l2: float, solver: LinearSolver | None) -> BilevelSolver:
    problem = weighted(lambda params, frozen, batch: losses(params, batch["data"]), prior=proximal(l2))
    return implicit(problem, solver=solver)
