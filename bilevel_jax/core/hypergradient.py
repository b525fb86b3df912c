"""Hypergradients of a loss on plain arrays in one call."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from bilevel_jax.core.curvature import hessian
from bilevel_jax.core.implicit import implicit_estimator
from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.solvers import cg
from bilevel_jax.core.training import init_train_state, train, train_step, trajectory_from_params
from bilevel_jax.core.types import PADDING, Batch, Estimate, Params, PyTree, Solver, Stream
from bilevel_jax.core.unrolled import check_differentiable, unrolled_estimator


def hypergradient(
    losses: Callable[[Params, PyTree], Float[Array, "examples"]],
    params: Params,
    training: PyTree,
    validation: PyTree,
    *,
    weights: Float[Array, "examples"] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 100,
    batch_size: int | None = None,
    seed: int = 0,
    l2: float | None = None,
    solver: Solver | None = None,
) -> Estimate:
    """The metagradient d L_v / d weights of a model with per-example losses, exact for one of two estimands.

    With `optimizer`: trains from `params` for `steps` steps on batches of `batch_size` examples and differentiates
    through that run (`unrolled`): exact for L_v(theta_T(w)).

    With `l2`: takes `params` as the minimiser of mean_i w_i losses_i + (l2 / 2) |params|^2 and differentiates
    implicitly (`implicit`): exact for L_v(theta*(w)) as far as `params` is stationary, which `checks.gap` measures in
    nats.

    Args:
        losses: (params, data) -> one loss for each example of data, float[examples], nats.
        params: where training starts, or the trained model.
        training: a pytree of arrays that lead with [examples].
        validation: likewise; L_v is the mean of its losses.
        weights: float[examples], one for each training example; default 1.
        optimizer: of the training run to differentiate through; Adam and its kin need eps_root > 0.
        steps: optimizer steps of that run.
        batch_size: examples of a step; default all.
        seed: of the order of the examples.
        l2: the strength of the quadratic regulariser, for implicit differentiation.
        solver: of the linear system, for implicit differentiation; default conjugate gradients to 1e-6.

    Returns:
        The estimate: `grad` float[examples] in nats per unit of weight, below 0 where more weight lowers L_v.

    Raises:
        ValueError: if both or neither of `optimizer` and `l2` are given, the weights are not one for each example, or
            the optimizer has no derivative.

    Example:
        >>> def losses(theta, data):
        ...     return 0.5 * (theta - data) ** 2
        >>> training, validation = jnp.array([1.0, 1.0, -1.0]), jnp.array([1.0])
        >>> estimate = bj.hypergradient(
        ...     losses, jnp.array(0.0), training, validation, optimizer=optax.sgd(0.1), steps=20
        ... )
        >>> [bool(grad < 0) for grad in estimate.grad]  # less weight for the last
        [True, True, False]
    """
    if (optimizer is None) == (l2 is None):
        raise ValueError("give either optimizer (unrolled, through a training run) or l2 (implicit).")
    num_examples = jax.tree.leaves(training)[0].shape[0]
    weights = jnp.ones(num_examples) if weights is None else jnp.asarray(weights)
    if weights.shape != (num_examples,):
        raise ValueError(
            f"weights {weights.shape} for {num_examples} training examples; give one weight for each example."
        )
    problem = weighted(
        lambda params, frozen, batch: losses(params, batch["data"]),
        prior=None if l2 is None else proximal(l2, optax.tree.zeros_like),
    )
    validation_stream = full_batch_stream(validation)
    if optimizer is None:
        # The prior's centre is `frozen` with every entry set to 0, so any tree of the right shape will do.
        estimator = implicit_estimator(problem, hessian(problem), solver or cg())
        return estimator(
            trajectory_from_params(params), weights, params, full_batch_stream(training), validation_stream
        )
    stream = shuffled_stream(training, batch_size or num_examples, steps, seed)
    step = train_step(problem, optimizer)
    trajectory = train(step, init_train_state(optimizer, params), weights, params, stream)
    check_differentiable(step, optimizer, trajectory, weights, params, stream)
    return unrolled_estimator(problem, step)(trajectory, weights, params, stream, validation_stream)


def full_batch_stream(data: PyTree) -> Stream:
    """All examples as one batch: a stream whose sum is the mean over the examples, as `implicit` and validation need
    it.

    Args:
        data: a pytree of arrays that lead with [examples].

    Returns:
        A stream of one batch with the leaves `data` [1, examples, ...], `index` and `num_examples`.

    Example:
        >>> batch = bj.full_batch_stream(jnp.array([5.0, 7.0])).batch(0)
        >>> batch["index"].tolist(), batch["num_examples"].tolist()
        ([[0, 1]], [2.0])
    """
    num_examples = jax.tree.leaves(data)[0].shape[0]
    batch = _make_batch(data, np.arange(num_examples), num_examples)
    return Stream(lambda step: batch, 1)


def shuffled_stream(data: PyTree, batch_size: int, steps: int, seed: int) -> Stream:
    """Batches of `batch_size` examples, each epoch in a new order; the last batch of an epoch is padded.

    Args:
        data: a pytree of arrays that lead with [examples].
        batch_size: examples of a batch.
        steps: batches of the stream.
        seed: of the orders.

    Returns:
        The stream; batch t is a pure function of t, so that resuming needs no iterator state.

    Example:
        >>> stream = bj.shuffled_stream(jnp.arange(5.0), batch_size=2, steps=3, seed=0)
        >>> sorted(int(i) for t in range(3) for i in stream.batch(t)["index"][0])[:5]
        [0, 1, 2, 3, 4]
    """
    num_examples = jax.tree.leaves(data)[0].shape[0]
    batches_per_epoch = -(-num_examples // batch_size)

    def batch_at(step: int) -> Batch:
        epoch, batch_in_epoch = divmod(step, batches_per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(num_examples)
        return _make_batch(
            data, order[batch_in_epoch * batch_size : (batch_in_epoch + 1) * batch_size], min(batch_size, num_examples)
        )

    return Stream(batch_at, steps)


def _make_batch(data: PyTree, indices: np.ndarray, size: int) -> Batch:
    index = np.pad(indices, (0, size - len(indices)), constant_values=PADDING)
    padded_indices = np.pad(indices, (0, size - len(indices)))
    return {
        "data": jax.tree.map(lambda leaf: jnp.asarray(leaf)[padded_indices][None], data),
        "index": jnp.asarray(index, jnp.int32)[None],
        "num_examples": jnp.full((1,), len(indices), jnp.result_type(float)),
    }
