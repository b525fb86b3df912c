"""Single-loop methods, which move parameters and weights together."""

import jax
import jax.numpy as jnp

from bilevel_jax.core import tree
from bilevel_jax.core.solve.arrays import (
    Inputs,
    batches_of,
    check_counts,
    check_stream_steps,
    count_rows,
    validation_loss,
)
from bilevel_jax.core.solve.interface import Method, build_solver
from bilevel_jax.core.solve.solution import BilevelSolver, Solution, Status, first_status
from bilevel_jax.core.training import Devices
from bilevel_jax.core.types import Checks, Problem, Scalar, SingleLoop
from bilevel_jax.core.unrolled import validation_loss_fn


def jointly(
    problem: Problem,
    method: SingleLoop,
    *,
    steps: int,
    batch_size: int | None = None,
    valid_batch_size: int | None = None,
) -> BilevelSolver:
    """Parameters and weights, moved together by a single-loop method, such as those of `single_loop`.

    Each step takes a batch of training and one of validation examples. `run` takes the first parameters and the first
    outer variable (the logits of the weights; () for weights 1); its solution holds the last of both, and the
    `weights`. On arrays it is a pure function, which composes with jit, vmap, scan, pmap, and with shard_map where the
    method was built with an axis_name. On streams a Python loop does the same; step t takes validation batch t modulo
    their number.

    The estimand is the method's: it *trains on the validation set*. There is no hypergradient: `grad` is (), and
    `value` has no derivative. Wrong where the method is.

    Args:
        problem: the one that the method was built with.
        method: of `single_loop`.
        steps: of the method.
        batch_size: training examples of a step; default all. Their order is `batch_order`'s by the first of two keys
            that jax.random.split makes of `run`'s key.
        valid_batch_size: validation examples of a step; default all. Likewise, by the second key.

    Returns:
        The solver. Its `run` gives a `Solution`; the status is NOT_FINITE where training diverged.

    Raises:
        ValueError: if a number of steps or of examples is not positive.

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> method = bj.single_loop.penalty(
        ...     problem, optax.sgd(0.1), bj.weightings.online_softmax(3),
        ...     validation_share=optax.constant_schedule(0.5), weights_learning_rate=optax.constant_schedule(0.5),
        ... )
        >>> solver = bj.jointly(problem, method, steps=50)
        >>> solution = solver.run(jnp.zeros(()), (), jnp.array([1.0, 1.0, -1.0]), jnp.array([1.0]))
        >>> bool(solution.weights[2] < 0.5)  # the example that contradicts the validation set
        True
    """
    check_counts(steps=steps, batch_size=batch_size, valid_batch_size=valid_batch_size)
    if problem.has_state or not problem.per_example:
        raise ValueError(
            "single-loop methods weigh examples, of a model without a state: build the problem by weighted."
        )
    devices = Devices(method.axis_name)

    def init(inputs: Inputs):
        return method.init(inputs.params, inputs.hyper) if jax.tree.leaves(inputs.hyper) else method.init(inputs.params)

    def move(inputs: Inputs):
        """The state after the last step."""
        count = count_rows(inputs.valid)
        if valid_batch_size is not None and valid_batch_size > count:
            raise ValueError(
                f"valid_batch_size {valid_batch_size} is more than the {count} validation examples; give as many."
            )
        if valid_batch_size is not None and valid_batch_size < count and inputs.key is None:
            raise ValueError("batches of validation examples have an order: give key=jax.random.key(0).")
        keys = (None, None) if inputs.key is None else jax.random.split(inputs.key)
        train = batches_of(inputs.train, steps, batch_size, devices.count(), keys[0])
        valid = batches_of(inputs.valid, steps, valid_batch_size, devices.count(), keys[1])

        def advance(state, t):
            return method.step(state, inputs.frozen, train(t), valid(t))[0], None

        return jax.lax.scan(advance, init(inputs), jnp.arange(steps, dtype=jnp.int32))[0]

    def evaluate_params(inputs: Inputs, params) -> Scalar:
        with jax.default_matmul_precision("highest"):
            return devices.sum(validation_loss(devices.share(problem), inputs, devices, devices.make_local(params)))

    def finish(inputs: Inputs, state, value: Scalar) -> Solution:
        params, weights = state.train_state.params, method.weights(state)
        is_finite = devices.all(tree.all_finite((value, params, weights)))
        status = first_status((Status.NOT_FINITE, ~is_finite))
        checks = Checks(steps=jnp.asarray(steps))
        hyper = method.hyper(state)
        return Solution(params, value, (), (), {}, checks, status, (), weights, inputs.params, hyper)

    def solve(inputs: Inputs) -> Solution:
        state = move(inputs)
        return finish(inputs, state, evaluate_params(inputs, state.train_state.params))

    def evaluate(inputs: Inputs) -> Scalar:
        return evaluate_params(inputs, move(inputs).train_state.params)

    def solve_streams(inputs: Inputs) -> Solution:
        check_stream_steps(inputs.train, steps)
        state = init(inputs)
        for t in range(steps):
            batch, validation = inputs.train.batch(t), inputs.valid.batch(t % inputs.valid.steps)
            state, _ = method.step(state, inputs.frozen, batch, validation)
        return finish(inputs, state, validation_loss_fn(problem)(state.train_state.params, inputs.frozen, inputs.valid))

    return build_solver(
        problem,
        Method(solve, evaluate, solve_streams, lambda inputs: solve_streams(inputs).value),
        estimand=method.estimand,
        is_retrained=False,
        batch_size=batch_size,
        has_gradient=False,
    )
