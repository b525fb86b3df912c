"""Bilevel problems built from per-example losses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bilevel_jax.core.types import PADDING, Batch, Frozen, Hyper, HyperSlice, ModelState, Params, Problem, Scalar

ExampleLosses = Callable[..., Any]
"""(params, frozen, batch) -> float[examples]; of a model with a state, (params, state, frozen, batch) -> the same, or,
in training, the same and the new state."""


def weighted(
    losses: ExampleLosses,
    *,
    outer: ExampleLosses | None = None,
    prior: Callable[[Params, Frozen], Scalar] | None = None,
    has_state: bool = False,
) -> Problem:
    """The problem whose outer variable is a weight for each training example.

        min_w L_v(params*(w)),  inner = sum_i w_i losses_i / N,  L_v = mean of `outer` over the validation examples

    The denominator N is the number of real examples in the *global* step, never the sum of the weights and never a
    micro-batch or a device: so the gradient and the hypergradients are the same for any split of the step. Where
    batches have the leaf `multiplicity`, each example counts with it beside its weight: inner = sum_i m_i w_i losses_i
    / N.

    Args:
        losses: (params, frozen, batch) -> one loss for each example of a micro-batch, float[examples], nats.
        outer: the losses of validation examples; default `losses`.
        prior: (params, frozen) -> r(params), nats, added once per step; default none. See `proximal`.
        has_state: the model carries a state, such as the averages of batch normalisation: then losses is (params,
            state, frozen, batch) -> (losses, new state), and outer, which must be given, (params, state, frozen, batch)
            -> losses.

    Returns:
        The problem; its outer variable is the table of weights, float[examples].

    Raises:
        ValueError: if a model with a state has no outer losses; when it is traced, if the losses are not one for each
            example.

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> batch = {"data": jnp.array([1.0, 3.0]), "num_examples": 2.0, "index": jnp.array([0, 1])}
        >>> float(problem.inner(jnp.array(0.0), jnp.array([1.0, 2.0]), (), batch))  # (1 * 0.5 + 2 * 4.5) / 2
        4.75

        The derivative of the validation loss by each weight, through 30 steps of training:

        >>> solver = bj.unroll(problem, optax.sgd(0.5), steps=30)
        >>> train, valid = jnp.array([1.0, 3.0]), jnp.array([4.0])
        >>> solver.run(jnp.array(0.0), jnp.ones(2), train, valid).grad.round(3).tolist()
        [1.0, -1.0]
    """
    if has_state and outer is None:
        raise ValueError("a model with a state needs outer=: (params, state, frozen, batch) -> validation losses.")
    outer = losses if outer is None else outer

    def weigh(values: Float[Array, "examples"], weights: HyperSlice, batch: Batch) -> Scalar:
        if jnp.shape(values) != weights.shape:
            raise ValueError(
                f"losses {jnp.shape(values)} and weights {weights.shape} differ; give one loss per example."
            )
        return jnp.sum(weights * get_multiplicity(batch) * values) / batch["num_examples"]

    def inner(params: Params, weights: HyperSlice, frozen: Frozen, batch: Batch) -> Scalar:
        return weigh(losses(params, frozen, batch), weights, batch)

    def stateful_inner(params: Params, weights: HyperSlice, frozen: Frozen, batch: Batch) -> Any:
        values, model_state = loss_and_state(losses(params, batch["model_state"], frozen, batch), batch)
        return weigh(values, weights, batch), model_state

    def outer_loss(params: Params, frozen: Frozen, batch: Batch) -> Scalar:
        state = (batch["model_state"],) if has_state else ()
        values = outer(params, *state, frozen, batch)
        if jnp.shape(values) != batch["index"].shape:
            raise ValueError(
                f"validation losses {jnp.shape(values)} of {batch['index'].shape[0]} examples; give one loss per "
                "example."
            )
        values = jnp.where(batch["index"] != PADDING, values, 0)
        return jnp.sum(values * batch.get("halves", 1.0)) / batch["num_examples"]

    def gather(table: Hyper, batch: Batch) -> HyperSlice:
        return jnp.asarray(table).at[batch["index"]].get(mode="fill", fill_value=0)

    def scatter_add(table: Hyper, batch: Batch, hypergradients: HyperSlice) -> Hyper:
        return table.at[batch["index"]].add(hypergradients, mode="drop")

    inner_loss: Callable[..., Any] = stateful_inner if has_state else inner
    return Problem(inner_loss, prior or no_prior, outer_loss, gather, scatter_add, has_state=has_state)


def get_multiplicity(batch: Batch) -> Float[Array, "*micro examples"] | float:
    """How much each example counts before any weight: the leaf `multiplicity` of the batch, 1 where there is none."""
    return batch.get("multiplicity", 1.0)


def divide_by_multiplicity(values: Float[Array, "*micro examples"], batch: Batch) -> Float[Array, "*micro examples"]:
    """values / multiplicity, and 0 for an example of multiplicity 0: the derivative for one whole example."""
    if "multiplicity" not in batch:
        return values
    is_counted = batch["multiplicity"] > 0
    return jnp.where(is_counted, values / jnp.where(is_counted, batch["multiplicity"], 1), 0)


def problem(
    inner: Callable[..., Any],
    outer: Callable[..., Scalar],
    *,
    prior: Callable[[Params, Frozen], Scalar] | None = None,
    has_state: bool = False,
) -> Problem:
    """The problem whose outer variable is any pytree that every batch sees whole (the strength of a regulariser, say).

        min_hyper L_v(params*(hyper)),  params* from training on the sum of `inner` over micro-batches, plus the prior

    Args:
        inner: (params, hyper, frozen, batch) -> one micro-batch's share of the training loss, nats. With one
            micro-batch in a step, as the solvers on arrays have, that is the whole loss.
        outer: (params, frozen, batch) -> one micro-batch's share of L_v, nats.
        prior: (params, frozen) -> r(params), nats, added once per step; default none.
        has_state: the model carries a state: then inner is (params, hyper, state, frozen, batch) -> (loss, new state),
            and outer (params, state, frozen, batch) -> loss.

    Returns:
        The problem; its outer variable is any pytree of arrays, the same in every batch.

    Example:
        >>> def inner(theta, log_strength, frozen, batch):
        ...     return 0.5 * jnp.mean((theta - batch["data"]) ** 2) + 0.5 * jnp.exp(log_strength) * theta**2
        >>> def outer(theta, frozen, batch):
        ...     return 0.5 * jnp.mean((theta - batch["data"]) ** 2)
        >>> solver = bj.unroll(bj.problem(inner, outer), optax.sgd(0.3), steps=60)
        >>> solution = solver.run(jnp.array(0.0), jnp.array(0.0), jnp.array([2.0]), jnp.array([0.0]))
        >>> round(float(solution.grad), 3)  # more regularisation helps
        -0.5

        Five other outer variables, on one problem: a classifier, a training set with two wrong labels, a validation set
        without. Their derivatives are compared with jax.grad through the whole loop in the tests. Weights of examples
        are `weighted`'s; the start of training and the learning rate are on every `Solution` of `unroll`.

        >>> x = jnp.array([[1.0, 0.2], [0.5, 1.0], [-1.0, 0.3], [-0.4, -1.0]])
        >>> train, valid = (x, jnp.array([1.0, 0, 0, 1])), (x, jnp.array([1.0, 1, 0, 0]))
        >>> def losses(theta, data):
        ...     return optax.sigmoid_binary_cross_entropy(data[0] @ theta, data[1])
        >>> def outer(theta, frozen, batch):
        ...     return losses(theta, batch["data"]).mean()
        >>> def grad(inner, hyper):
        ...     solver = bj.unroll(bj.problem(inner, outer), optax.sgd(0.5), steps=40)
        ...     return solver.run(jnp.zeros(2), hyper, train, valid, key=jax.random.key(0)).grad

        The logarithm of a weight decay for each parameter:

        >>> def inner(theta, log_decay, frozen, batch):
        ...     return outer(theta, frozen, batch) + jnp.sum(jnp.exp(log_decay) * theta**2)
        >>> [round(float(g), 2) for g in grad(inner, jnp.full(2, -3.0))]  # less for the first, more for the second
        [0.09, -0.19]

        The share of label smoothing:

        >>> def inner(theta, share, frozen, batch):
        ...     x, y = batch["data"]
        ...     return losses(theta, (x, (1 - share) * y + share / 2)).mean()
        >>> round(float(grad(inner, jnp.array(0.1))), 2)
        -0.72

        The size of an augmentation, whose noise `batch["key"]` draws anew in each step:

        >>> def inner(theta, log_size, frozen, batch):
        ...     x, y = batch["data"]
        ...     noise = jnp.exp(log_size) * jax.random.normal(batch["key"], x.shape)
        ...     return losses(theta, (x + noise, y)).mean()
        >>> bool(grad(inner, jnp.array(-2.0)) < 0)  # more noise
        True

        A network that rates the training examples, those that it has never seen among them:

        >>> def inner(theta, network, frozen, batch):
        ...     x, y = batch["data"]
        ...     return jnp.mean(jax.nn.sigmoid(jnp.c_[x, y] @ network) * losses(theta, (x, y)))
        >>> [round(float(g), 2) for g in grad(inner, jnp.zeros(3))]
        [-0.05, -0.01, 0.01]

        Training data that are learned (dataset distillation); those given to `run` are not read:

        >>> def inner(theta, rows, frozen, batch):
        ...     return losses(theta, (rows, jnp.array([1.0, 0.0]))).mean()
        >>> grad(inner, x[:2]).shape
        (2, 2)
    """

    def gather(hyper: Hyper, batch: Batch) -> HyperSlice:
        num_micro_batches = batch["num_examples"].shape[0]
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_micro_batches, *jnp.shape(leaf))), hyper)

    def scatter_add(hyper: Hyper, batch: Batch, hypergradients: HyperSlice) -> Hyper:
        return jax.tree.map(lambda leaf, part: leaf + part.sum(0), hyper, hypergradients)

    def stateful_inner(params: Params, hyper: HyperSlice, frozen: Frozen, batch: Batch) -> Any:
        return loss_and_state(inner(params, hyper, batch["model_state"], frozen, batch), batch)

    def stateful_outer(params: Params, frozen: Frozen, batch: Batch) -> Scalar:
        return outer(params, batch["model_state"], frozen, batch)

    return Problem(
        stateful_inner if has_state else inner,
        prior or no_prior,
        stateful_outer if has_state else outer,
        gather,
        scatter_add,
        per_example=False,
        has_state=has_state,
    )


def loss_and_state(returned: Any, batch: Batch) -> tuple[Any, ModelState]:
    """What the training loss of a model with a state returned, where it is (loss, new state of the same kind)."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        kind = type(returned).__name__ if isinstance(returned, tuple | list | dict) else f"an array {returned.shape}"
        raise ValueError(f"the training loss returns {kind}; of a model with a state it returns (loss, new state).")
    old, new = batch["model_state"], returned[1]
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ValueError(
            f"the training loss takes a model state {jax.tree.structure(old)} and returns {jax.tree.structure(new)}; "
            "return the whole state that it takes."
        )
    for (path, before), after in zip(jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True):
        kinds = [f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for leaf in (before, after)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"the training loss makes of model_state{jax.tree_util.keystr(path)}, {kinds[0]}, a {kinds[1]}; return "
                f"it as it was, or give run model_state= of the second kind."
            )
    return returned


def hold_state(problem: Problem, model_state: ModelState) -> Problem:
    """The problem with the model's state held where it is: of `inner` the loss alone remains."""
    if not problem.has_state:
        return problem

    def inner(params: Params, hyper: HyperSlice, frozen: Frozen, batch: Batch) -> Scalar:
        return problem.inner(params, hyper, frozen, {**batch, "model_state": model_state})[0]

    def outer(params: Params, frozen: Frozen, batch: Batch) -> Scalar:
        return problem.outer(params, frozen, {**batch, "model_state": model_state})

    return problem._replace(inner=inner, outer=outer, has_state=False)


def no_prior(params: Params, frozen: Frozen) -> Scalar:
    """0; under jax.shard_map each device's own where the parameters are."""
    return jnp.zeros_like(jax.tree.leaves(params)[0], float, shape=())


def proximal(strength: float, centre: Callable[[Frozen], Params] | None = None) -> Callable[[Params, Frozen], Scalar]:
    """The prior (strength / 2) |params - centre(frozen)|^2 of the inner problem: it makes the minimiser unique.

    Implicit differentiation is exact for the problem *with* this term. Added to the linear solve alone it would be
    damping, and the result exact for nothing. The centre is read from `frozen`, so that it is an argument of the
    compiled step. Where `frozen` holds a base model, too, let it be a dict of both, and read one entry of it.

    Args:
        strength: delta, nats per squared unit of the parameters, at least 0.
        centre: frozen -> parameters to stay close to, shaped as `params`; default 0.

    Returns:
        (params, frozen) -> the prior, nats: the argument `prior` of `weighted` and `problem`.

    Raises:
        ValueError: if the strength is negative.

    Example:
        >>> prior = bj.proximal(0.5, lambda frozen: frozen["start"])
        >>> float(prior(jnp.array([1.0, 2.0]), {"start": jnp.array([1.0, 0.0])}))
        1.0
        >>> float(bj.proximal(0.5)(jnp.array([2.0]), ()))
        1.0
    """
    if not isinstance(strength, jax.Array) and not strength >= 0:
        raise ValueError(f"strength {strength} of the prior; give a number of at least 0.")

    def prior(params: Params, frozen: Frozen) -> Scalar:
        difference = params if centre is None else optax.tree.sub(params, centre(frozen))
        return 0.5 * strength * optax.tree.norm(difference, squared=True)

    return prior
