"""Unrolled differentiation through a whole training run."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax.core import checkpointing, tree
from bilevel_jax.core.problem import hold_state
from bilevel_jax.core.solve import scanned
from bilevel_jax.core.solve.arrays import (
    BatchAt,
    Inputs,
    batches_of,
    check_counts,
    check_stream_steps,
    validation_loss,
)
from bilevel_jax.core.solve.interface import Method, build_solver
from bilevel_jax.core.solve.solution import BilevelSolver, Solution, Status, first_status
from bilevel_jax.core.training import (
    Devices,
    ProductPrecision,
    check_product_precision,
    init_train_state,
    step_functions,
    train,
    train_step,
)
from bilevel_jax.core.types import (
    Adjoint,
    CheckpointPlan,
    Checks,
    Hyper,
    ModelState,
    Params,
    Problem,
    Scalar,
    Stream,
    TrainState,
    Trajectory,
)
from bilevel_jax.core.unrolled import backward_pass, check_differentiable, validation_loss_fn

ROUNDING_FACTOR = 8.0
"""Rounding errors of a step's term, in units of eps times its size."""


class _Run(NamedTuple):
    """A training run on arrays; `problem` is a device's share of the whole."""

    problem: Problem
    step_functions: tuple[Callable, Callable]
    start: TrainState
    batch_at: BatchAt


def unroll(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    batch_size: int | None = None,
    memory: int | str = "sqrt",
    window: int | None = None,
    axis_name: str | None = None,
    product_precision: ProductPrecision = "highest",
) -> BilevelSolver:
    """d L_v(theta_T(hyper)) / d hyper through a whole training run.

        theta_{t+1} = update(theta_t, hyper, batch_t);  value = L_v(theta_T)

    On arrays, `run` is a pure function: it composes with jit, vmap (over starts, outer variables, keys), scan, map,
    pmap and shard_map, and takes arrays that are sharded on a mesh; each shape compiles once. The backward pass is the
    transpose of each step, written out, in nested `lax.scan`s: `memory` decides how many states are kept at once, and
    nothing of the result but rounding. On a `Stream` a Python loop does the same; for runs that are stored on disk and
    resumed, use its pieces, `train` and `unrolled_estimator`.

    Exact for the run that happened: its steps, its optimizer, its batches, the path of the model's state; with
    `window`, for the derivative through the last steps alone. Wrong where training is chaotic (`checks.growth`), or
    where the terms of the gradient cancel (`checks.resolution`, status UNRESOLVED): under Adam a weight that scales a
    coordinate's whole gradient changes nothing but through eps.

    Args:
        problem: as `weighted` or `problem` gives it. Its losses see batches with the leaves `data` (rows of the arrays
            given to `run`), `index`, `num_examples`, `step` (int32, of this training step; -1 in validation) and, where
            `run` is given a key, `key` (of this training step; absent in validation).
        optimizer: with a derivative. Adam and its kin need eps_root > 0.
        steps: optimizer steps.
        batch_size: examples of a step; default all. The order of smaller ones is `batch_order`'s.
        memory: states of training kept at once: a number, "sqrt" (2 sqrt(steps), every step computed twice) or "all".
        window: steps to go back; default all. `grad_start`, and jax.grad of `value` by params, are then by the
            parameters where the window begins.
        axis_name: of a pmap or shard_map in which each device holds its share of the examples and of their weights:
            gradients, Hessian products and L_v are summed over it, a model's state is averaged, and each device returns
            the hypergradients of its examples. Shares are of equal size. `batch_size` is then that of a device. `value`
            has derivatives under shard_map alone; under pmap take those of `run`.
        product_precision: "highest", "high" or "default", of the matrix products in the steps back: on an accelerator
            the lower ones are faster, and off by an error that grows with the learning rate (`train_step`);
            `certify.check` measures it. Training has the highest in any case.

    Returns:
        The solver. Its `run` gives a `Solution`; it raises a FloatingPointError for one whose status is not OK, unless
        throw=False or inside a transformation, where the status is in the result.

    Raises:
        ValueError: if a number of steps, of examples or of states is not positive, or for another product_precision.

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> solver = bj.unroll(problem, optax.sgd(0.5), steps=30)
        >>> solution = solver.run(jnp.array(0.0), jnp.ones(2), jnp.array([1.0, 3.0]), jnp.array([4.0]))
        >>> [round(float(grad), 3) for grad in solution.grad]
        [1.0, -1.0]

        The derivative by the start of training, of a training that is too short to forget it:

        >>> train, valid = jnp.array([1.0, 3.0]), jnp.array([4.0])
        >>> short = bj.unroll(problem, optax.sgd(0.5), steps=2)
        >>> float(short.run(jnp.array(0.0), jnp.ones(2), train, valid).grad_start)  # (1.5 - 4) / 2^2
        -0.625

        By the learning rate, and by whatever else `optax.inject_hyperparams` holds:

        >>> momentum = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9)
        >>> solution = bj.unroll(problem, momentum, steps=3).run(jnp.array(0.0), jnp.ones(2), train, valid)
        >>> {name: round(float(grad), 2) for name, grad in sorted(solution.grad_optimizer.items())}
        {'learning_rate': -27.82, 'momentum': -2.14}
    """
    check_counts(steps=steps, batch_size=batch_size, window=window)
    check_product_precision(product_precision)
    window = steps if window is None else min(window, steps)
    lengths = _plan_segments(window, memory)
    devices = Devices(axis_name)

    def prepare(inputs: Inputs) -> _Run:
        local = devices.share(problem)
        return _Run(
            local,
            step_functions(local, optimizer, devices, product_precision=product_precision)[:2],
            init_train_state(optimizer, inputs.params, inputs.model_state),
            batches_of(inputs.train, steps, batch_size, devices.count(), inputs.key),
        )

    def end_loss(run: _Run, inputs: Inputs, params: Params, model_state: ModelState) -> Scalar:
        return validation_loss(hold_state(run.problem, model_state), inputs, devices, params)

    def solve(inputs: Inputs) -> Solution:
        run = prepare(inputs)

        def end_loss_and_adjoint(end: TrainState) -> tuple[Scalar, Adjoint]:
            floats, join = tree.split_inexact_leaves(devices.make_local(end.model_state))
            value, grads = jax.value_and_grad(lambda p, s: end_loss(run, inputs, p, join(s)), (0, 1))(
                devices.make_local(end.params), floats
            )
            value, (params_grad, state_grad) = devices.sum((value, grads))
            zeros = [jnp.zeros_like(leaf) for leaf in tree.inexact_leaves(end.opt_state)]
            return value, Adjoint(params_grad, zeros, tuple(state_grad))

        result = scanned.scan_forward_and_back(
            run.step_functions, run.problem, run.start, inputs.hyper, inputs.frozen, run.batch_at, end_loss_and_adjoint,
            optimizer=optimizer, steps=steps, window=window, lengths=lengths,
        )  # fmt: skip
        grad, magnitude = (result.grad, result.magnitude) if problem.per_example else devices.sum(result[2:4])
        grad_start, grad_optimizer = scanned.start_and_hyperparameter_gradients(
            optimizer, run.start, result.start_adjoint
        )
        squares = [_square_sum(grad), _square_sum(magnitude)]
        grad_squared, magnitude_squared = devices.sum(squares) if problem.per_example else squares
        resolution = _resolution(grad_squared, magnitude_squared, _eps(grad), window)
        is_finite = devices.all(tree.all_finite((result.value, grad, result.end.params)))
        status = first_status(
            (Status.NOT_FINITE, ~is_finite),
            (Status.NOT_DIFFERENTIABLE, ~result.has_derivative),
            (Status.UNRESOLVED, resolution <= 1),
        )
        checks = Checks(
            growth=result.growth, replayed=result.replay_matches, steps=jnp.asarray(window), resolution=resolution
        )
        return Solution(
            result.end.params, result.value, grad, grad_start, grad_optimizer, checks, status, result.end.model_state
        )

    def evaluate(inputs: Inputs) -> Scalar:
        run = prepare(inputs)
        with jax.default_matmul_precision("highest"):
            end = scanned.scan_forward(
                run.step_functions[0], run.problem, run.start, inputs.hyper, inputs.frozen, run.batch_at, steps
            )
            params, model_state = devices.make_local((end.params, end.model_state))
            return devices.sum(end_loss(run, inputs, params, model_state))

    step = train_step(problem, optimizer, product_precision=product_precision)  # compiled when a stream is first given
    plan = _checkpoint_plan(window, memory)

    def train_on_stream(inputs: Inputs, plan: CheckpointPlan | None) -> Trajectory:
        check_stream_steps(inputs.train, steps)
        start = init_train_state(optimizer, inputs.params, inputs.model_state)
        return train(
            step, start, inputs.hyper, inputs.frozen, inputs.train, plan=plan, first_backward_step=steps - window
        )

    def solve_streams(inputs: Inputs) -> Solution:
        trajectory = train_on_stream(inputs, plan)
        given = (inputs.hyper, inputs.frozen, inputs.train)
        if tree.all_finite(trajectory.end.params):
            check_differentiable(step, optimizer, trajectory, *given)
        passes = backward_pass(problem, step, window=window)
        state = passes.init(trajectory, inputs.hyper, inputs.frozen, inputs.valid)
        while not passes.is_done(trajectory, state):
            state = passes.advance(trajectory, *given, state)
        estimate = passes.finish(trajectory, state)
        grad_start, grad_optimizer = scanned.start_and_hyperparameter_gradients(
            optimizer, trajectory.start, state.adjoint
        )
        is_finite = tree.all_finite((state.validation_loss, state.grad, trajectory.end.params))
        end = trajectory.end
        return Solution(
            end.params, state.validation_loss, state.grad, grad_start, grad_optimizer, estimate.checks,
            first_status((Status.NOT_FINITE, ~is_finite)), end.model_state,
        )  # fmt: skip

    def evaluate_streams(inputs: Inputs) -> Scalar:
        end = train_on_stream(inputs, checkpointing.NO_CHECKPOINTS).end
        if not problem.has_state:
            return validation_loss_fn(problem)(end.params, inputs.frozen, inputs.valid)
        return stateful_loss((end.params, end.model_state), inputs.frozen, inputs.valid)

    def outer_at_state(point: tuple[Params, ModelState], frozen, batch) -> Scalar:
        return problem.outer(point[0], frozen, {**batch, "model_state": point[1]})

    stateful_loss = validation_loss_fn(problem._replace(outer=outer_at_state))

    def diagnose(inputs: Inputs, status: Status) -> None:
        if status not in (Status.NOT_FINITE, Status.NOT_DIFFERENTIABLE) or axis_name:
            return
        batch_at = jax.jit(batches_of(inputs.train, steps, batch_size, 1, inputs.key))
        stream = Stream(lambda index: batch_at(jnp.asarray(index, jnp.int32)), steps)
        on_stream = inputs._replace(train=stream)
        trajectory = train_on_stream(on_stream, plan)
        if bool(tree.all_finite((trajectory.end.params, evaluate(inputs)))):
            check_differentiable(step, optimizer, trajectory, inputs.hyper, inputs.frozen, stream)

    estimand = "L_v after the training run" if window == steps else f"L_v through the last {window} training steps"
    at_highest = None
    if product_precision != "highest":
        at_highest = unroll(
            problem, optimizer, steps=steps, batch_size=batch_size, memory=memory, window=window, axis_name=axis_name
        )
    return build_solver(
        problem,
        Method(solve, evaluate, solve_streams, evaluate_streams, diagnose),
        estimand=estimand,
        batch_size=batch_size,
        devices=devices,
    )._replace(at_highest=at_highest)


def _plan_segments(steps: int, memory: int | str) -> tuple[int, ...]:
    if memory == "all":
        return ()
    if memory == "sqrt":
        return scanned.segment_lengths(steps, max(4, 2 * int(np.ceil(np.sqrt(steps)))))
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return scanned.segment_lengths(steps, memory)
    raise ValueError(f'memory = {memory!r}; give a number of states, "sqrt" or "all".')


def _checkpoint_plan(steps: int, memory: int | str) -> CheckpointPlan:
    """The plan of the Python loop that keeps no more states at once."""
    if memory == "all":
        return checkpointing.store_all_plan(steps)
    if memory == "sqrt":
        return checkpointing.square_root_plan(steps)
    return checkpointing.plan_within_budget(steps, state_bytes=1, step_bytes=1, budget_bytes=int(memory))


def _square_sum(values: Hyper) -> Scalar:
    return optax.tree.norm(values, squared=True)


def _eps(values: Hyper) -> float:
    return max(float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in jax.tree.leaves(values))


def _resolution(grad_squared: Scalar, magnitude_squared: Scalar, eps: float, steps: int) -> Scalar:
    """|grad| over the rounding error of its sum: eps sqrt(steps) |sum of the terms' sizes|, times a safe factor."""
    noise = ROUNDING_FACTOR * eps * steps**0.5 * jnp.sqrt(magnitude_squared)
    return jnp.where(noise > 0, jnp.sqrt(grad_squared) / jnp.where(noise > 0, noise, 1), jnp.inf)
