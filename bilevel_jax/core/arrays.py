"""The friendly face: a plain loss and arrays to a hypergradient, in three lines."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from bilevel_jax.core.curvature import hessian
from bilevel_jax.core.implicit import implicit
from bilevel_jax.core.linsolve import cg
from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.transition import begin, finished, train, transition
from bilevel_jax.core.types import PADDING, Batch, Estimate, Params, PyTree, Solver, Stream
from bilevel_jax.core.unrolled import check_differentiable, unrolled


def hypergradient(
    losses: Callable[[Params, PyTree], Float[Array, "rows"]],
    params: Params,
    training: PyTree,
    validation: PyTree,
    *,
    weights: Float[Array, "rows"] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 100,
    batch: int | None = None,
    seed: int = 0,
    prior: float | None = None,
    solver: Solver | None = None,
) -> Estimate:
    """d L_v / d weights of a model with per-example losses, exact for one of two estimands.

    With `optimizer`: trains from `params` for `steps` steps on batches of `batch` rows (default: all rows at once) and
    differentiates through that run (`unrolled`): exact for L_v(theta_T(w)).

    With `prior`: takes `params` as the minimiser of mean_i w_i losses_i + (prior / 2) |params|^2 and differentiates
    implicitly (`implicit`; `solver` defaults to conjugate gradients to 1e-6): exact for L_v(theta*(w)) as far as
    `params` is stationary, which `checks.gap` tells in nats.

    Args:
        losses: (params, data) -> one loss for each row of data, nats.
        params: where training starts, or the trained model.
        training: a pytree of arrays that lead with [rows].
        validation: likewise; L_v is the mean of its losses.
        weights: one for each training row; default 1.

    Returns:
        `Estimate`: `grad` float[rows] in nats per unit of weight, below 0 where more weight lowers L_v.

    Raises:
        ValueError: if both or neither of `optimizer` and `prior` are given, or the optimiser has no derivative.

    >>> estimate = hypergradient(losses, params, (x, y), (xv, yv), optimizer=optax.adamw(1e-2, eps_root=1e-12))
    """
    if (optimizer is None) == (prior is None):
        raise ValueError("give either optimizer (unrolled, through a training run) or prior (implicit).")
    rows = jax.tree.leaves(training)[0].shape[0]
    weights = jnp.ones(rows) if weights is None else jnp.asarray(weights)
    if weights.shape != (rows,):
        raise ValueError(f"weights {weights.shape} for {rows} training rows; give one weight for each row.")
    problem = weighted(
        lambda params, fixed, batch: losses(params, batch["data"]),
        prior=None if prior is None else proximal(prior, optax.tree.zeros_like),
    )
    held_out = rows_stream(validation)
    if optimizer is None:
        # The prior's centre is `fixed` with every entry set to 0, so any tree of the right shape will do.
        estimator = implicit(problem, hessian(problem), solver or cg())
        return estimator(finished(params), weights, params, rows_stream(training), held_out)
    stream = shuffled_stream(training, batch or rows, steps, seed)
    step = transition(problem, optimizer)
    run = train(step, begin(optimizer, params), weights, params, stream)
    check_differentiable(step, optimizer, run, weights, params, stream)
    return unrolled(problem, step)(run, weights, params, stream, held_out)


def rows_stream(data: PyTree) -> Stream:
    """All rows as one batch, made once: a stream whose sum is the mean over the rows."""
    rows = jax.tree.leaves(data)[0].shape[0]
    batch = _batch(data, np.arange(rows), rows)
    return Stream(lambda step: batch, 1)


def shuffled_stream(data: PyTree, batch: int, steps: int, seed: int) -> Stream:
    """Batches of `batch` rows, each epoch in a new order; the last batch of an epoch is padded."""
    rows = jax.tree.leaves(data)[0].shape[0]
    per_epoch = -(-rows // batch)

    def one(step: int) -> Batch:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(rows)
        return _batch(data, order[place * batch : (place + 1) * batch], min(batch, rows))

    return Stream(one, steps)


def _batch(data: PyTree, chosen: np.ndarray, size: int) -> Batch:
    index = np.pad(chosen, (0, size - len(chosen)), constant_values=PADDING)
    place = np.pad(chosen, (0, size - len(chosen)))
    return {
        "data": jax.tree.map(lambda leaf: jnp.asarray(leaf)[place][None], data),
        "index": jnp.asarray(index, jnp.int32)[None],
        "rows": jnp.full((1,), len(chosen), jnp.result_type(float)),
    }
