"""Compiled steps of a run with their workspace, FLOPs and seconds."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.interpreters import partial_eval
from jax.sharding import NamedSharding, PartitionSpec

from bilevel_jax.core import tree
from bilevel_jax.core.training import forward_only_step
from bilevel_jax.core.types import Adjoint, Batch, Params, TrainState, TrainStep
from bilevel_jax.core.unrolled import step_of_each
from bilevel_jax.lm.data import batches
from bilevel_jax.lm.data.tokens import Corpus
from bilevel_jax.runs.config.load import OuterLoopConfig, RunConfig
from bilevel_jax.runs.config.schema import SingleLoopSection
from bilevel_jax.runs.engine import single_loop
from bilevel_jax.runs.infra.placement import place_stream
from bilevel_jax.runs.tasks.targets import select_target
from bilevel_jax.runs.tasks.text import TextTask


class Program(NamedTuple):
    """A function that a run compiles, with the shapes that it gets. The shapes lie on the mesh."""

    function: Any
    """Made by jax.jit."""
    arguments: tuple[Any, ...]
    next_arguments: Callable[[Any, tuple[Any, ...]], tuple[Any, ...]] = lambda result, arguments: arguments
    """(result, arguments) -> the arguments of the next call; for a function that takes the memory of its own."""


class StepShapes(NamedTuple):
    """The shapes that a training of a task goes through; arrays are those of one batch alone."""

    params: Params
    state: TrainState
    adjoint: Adjoint
    weights: jax.ShapeDtypeStruct
    """The weight table."""
    hyper_slice: jax.ShapeDtypeStruct
    """The weights of the batch."""
    frozen: Any
    batch: Batch


def step_shapes(task: TextTask, batch: Batch) -> StepShapes:
    """The shapes of a task whose parameters are arrays or shapes of arrays."""
    params = jax.tree.map(lambda leaf: _shape_on(leaf, leaf.sharding), task.init_params(0))
    replicated = NamedSharding(task.mesh, PartitionSpec())
    # an optimizer's moments lie where their parameters do; what else it has, everywhere
    opt = optax.tree.map_params(
        task.optimizer,
        lambda leaf, like: _shape_on(leaf, like.sharding),
        jax.eval_shape(task.optimizer.init, params),
        params,
        transform_non_params=lambda leaf: _shape_on(leaf, replicated),
    )
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    state = TrainState(params, opt, count)
    dtype, index = jax.tree.leaves(params)[0].dtype, batch["index"]
    weights = jax.ShapeDtypeStruct((task.num_examples,), dtype, sharding=replicated)
    # as jax names the sharding of what it computes: a run then finds in its cache what an estimate has compiled
    spread = index.sharding if task.mesh.size > 1 else replicated
    hyper_slice = jax.ShapeDtypeStruct(index.shape, dtype, sharding=spread)
    return StepShapes(
        params, state, Adjoint(params, tree.inexact_leaves(opt)), weights, hyper_slice, task.frozen(params), batch
    )


def _shape_on(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def make_first_batch(task: TextTask, config: RunConfig) -> Batch:
    """A batch of the run, on the mesh; for rows that are streamed one of the same shape."""
    if not config.data.streaming:
        return task.training_stream(config.data.seed).batch(0)
    sequences = task.layout.sequences_per_example
    ids = np.zeros(2 * sequences, np.int32)
    corpus = Corpus(ids, ids == 0, np.arange(0, len(ids) + 1, 2), sequences)
    order = batches.shuffled_subset_order([0], 1, task.batch_size, 0)
    return place_stream(task.mesh, batches.make_train_stream(corpus, order, 1, task.layout)).batch(0)


def forward_program(task: TextTask, shapes: StepShapes) -> Program:
    """A training step whose gradient is kept for the backward pass."""
    return Program(task.train_step.forward, (shapes.state, shapes.hyper_slice, shapes.frozen, shapes.batch))


def backward_program(task: TextTask, shapes: StepShapes) -> Program:
    """A step back through a training step."""
    arguments = (shapes.state, shapes.params, shapes.hyper_slice, shapes.frozen, shapes.batch, shapes.adjoint)
    return Program(task.train_step.backward, arguments)


def backward_of_each_program(
    task: TextTask, shapes: StepShapes, num_losses: int, step_of_last: TrainStep | None = None
) -> Program:
    """A step back of several outer losses side by side, of which the last may have a step of its own."""
    adjoints = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (num_losses, *leaf.shape), leaf.dtype, sharding=_behind_losses(leaf.sharding)
        ),
        shapes.adjoint,
    )
    arguments = (shapes.state, shapes.params, shapes.hyper_slice, shapes.frozen, shapes.batch, adjoints)
    return Program(step_of_each(task.problem, task.train_step, True, step_of_last).backward, arguments)


def _behind_losses(sharding: NamedSharding) -> NamedSharding:
    """That of the same arrays, stacked."""
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def linearize_program(task: TextTask, shapes: StepShapes) -> Program:
    """`forward`, with what the step back needs of it."""
    return Program(task.train_step.linearize, (shapes.state, shapes.hyper_slice, shapes.frozen, shapes.batch))


def vjp_program(task: TextTask, shapes: StepShapes, compiled_linearize: "CompiledProgram") -> Program:
    """A backward step from a stored linearization, whose arrays lie where `compiled_linearize` leaves them."""
    linearization = jax.tree.map(
        _shape_on, compiled_linearize.executable.out_info[2], compiled_linearize.executable.output_shardings[2]
    )
    return Program(
        task.train_step.vjp_step,
        (shapes.state, shapes.params, linearization, shapes.hyper_slice, shapes.frozen, shapes.batch, shapes.adjoint),
    )


def update_program(task: TextTask, shapes: StepShapes) -> Program:
    """A training step of the command `train`, which takes the memory of the state that it is given."""
    arguments = (shapes.state, shapes.weights, shapes.frozen, shapes.batch)
    function = forward_only_step(task.problem, task.optimizer)
    return Program(function, arguments, lambda result, arguments_before: (result[0], *arguments_before[1:]))


def validation_gradient_program(task: TextTask, shapes: StepShapes, validation_batch: Batch) -> Program:
    """The gradient of one batch's share of L_v."""

    @jax.jit
    def outer_value_and_grad(params: Params, fixed: Any, batch: Batch) -> tuple[Any, Params]:
        def add(total, micro):
            value = jax.value_and_grad(task.problem.outer)(params, fixed, micro)
            return jax.tree.map(jnp.add, total, value), None

        zero = jnp.zeros((), jax.tree.leaves(params)[0].dtype), jax.tree.map(jnp.zeros_like, params)
        with jax.default_matmul_precision("highest"):
            return jax.lax.scan(add, zero, batch)[0]

    return Program(outer_value_and_grad, (shapes.params, shapes.frozen, validation_batch))


def validation_gradient_programs(task: TextTask, shapes: StepShapes) -> list[Program]:
    """`validation_gradient_program` of a batch of each target: each has a loss and a shape of its own."""
    validation = task.held_out_streams["validation"]
    return [
        validation_gradient_program(task, shapes, select_target(validation, place).batch(0))
        for place in range(len(task.outer_objective.targets))
    ]


def single_loop_program(
    task: TextTask,
    config: OuterLoopConfig,
    single_loop_config: SingleLoopSection,
    shapes: StepShapes,
) -> Program:
    """A step of a method whose weights move with the parameters; it takes the memory of the state that it is given.

    Its state is taken to lie whole on every device.
    """
    replicated = NamedSharding(task.mesh, PartitionSpec())
    steps = single_loop.num_single_loop_steps(single_loop_config, config.outer, config.train.max_steps)
    method = single_loop.build_single_loop(
        task, steps, single_loop=single_loop_config, outer=config.outer, optimizer=config.optimizer
    )
    state = jax.tree.map(lambda leaf: _shape_on(leaf, replicated), jax.eval_shape(method.init, shapes.params))
    batch = task.training_stream(config.data.seed, packed=False).batch(0)
    return Program(
        method.step,
        (state, shapes.frozen, batch, task.validation_stream(config.data.seed).batch(0)),
        lambda result, arguments_before: (result[0], *arguments_before[1:]),
    )


class CompiledProgram(NamedTuple):
    """A program, compiled."""

    executable: Any
    workspace_bytes: int
    """Bytes on one device beside arguments and results, while it runs."""
    flops: float
    """Of one call, over all devices."""
    compile_seconds: float
    """That tracing and compiling took."""


def compile_program(program: Program) -> CompiledProgram:
    """Compile for the mesh that the shapes lie on; nothing is allocated.

    `workspace_bytes` is what XLA's buffer assignment says for one device. It is exact for this compiler alone: another
    (GPU, TPU) fuses other operations and lays arrays out otherwise. What a library takes for itself while it runs is
    not in it.
    """
    began = time.monotonic()
    traced = program.function.trace(*program.arguments)
    executable = traced.lower().compile()
    workspace_bytes = executable.memory_analysis().temp_size_in_bytes
    return CompiledProgram(executable, workspace_bytes, count_flops(traced.jaxpr.jaxpr), time.monotonic() - began)


def count_flops(jaxpr: Any) -> float:
    """Operations of the matrix products of a traced program: 2 m n k each, times the turns of the loops around it.

    What no result depends on is left out, as the compiler leaves it out. XLA's own cost_analysis counts the body of a
    loop once, and the layers, the micro-batches and the chunks of the loss are loops here.
    """
    live_jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _matmul_flops(live_jaxpr)


def _matmul_flops(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)
            continue
        parts = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda sub_jaxpr: hasattr(sub_jaxpr, "jaxpr"))
        inner = [getattr(part, "jaxpr", part) for part in parts]
        iterations = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += iterations * sum(_matmul_flops(sub_jaxpr) for sub_jaxpr in inner if hasattr(sub_jaxpr, "eqns"))
    return total


def time_program(program: Program, executable: Any, *, calls: int = 5, max_seconds: float = 60.0) -> float:
    """Median seconds of a call on random arrays of the program's shapes, after one that is not counted.

    A step takes as long whatever the parameters are, so no model is loaded. Stops after `max_seconds`.
    """
    arguments = tuple(_random_arrays(argument, number) for number, argument in enumerate(program.arguments))
    seconds: list[float] = []
    began = time.monotonic()
    while len(seconds) < calls + 1 and (len(seconds) < 2 or time.monotonic() - began < max_seconds):
        start = time.monotonic()
        result = jax.block_until_ready(executable(*arguments))
        seconds.append(time.monotonic() - start)
        arguments = program.next_arguments(result, arguments)
    return statistics.median(seconds[1:])


def _random_arrays(shapes: Any, seed: int) -> Any:
    """Arrays of these shapes, on the devices that they name: normal numbers, small ones; whole numbers are 0."""
    leaves, treedef = jax.tree.flatten(shapes)

    def draw(number: int, leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return leaf
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)

        def normal(key):  # squared gradients of an optimizer must not be negative
            return (0.02 * jnp.abs(jax.random.normal(key, leaf.shape, jnp.float32))).astype(leaf.dtype)

        return jax.jit(normal, out_shardings=leaf.sharding)(jax.random.fold_in(jax.random.key(seed), number))

    return jax.tree.unflatten(treedef, [draw(number, leaf) for number, leaf in enumerate(leaves)])
