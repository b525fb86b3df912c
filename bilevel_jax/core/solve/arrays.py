"""Arrays of examples as batches, a device's share of a problem, and the checks of what a solver is given."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from bilevel_jax.core.training import Devices
from bilevel_jax.core.types import Batch, Frozen, Hyper, ModelState, Params, Problem, PyTree, Scalar, Stream

BatchAt = Callable[[Array], Batch]
"""The batch of a step, as a traceable function of the step's number."""


class Inputs(NamedTuple):
    """What a solver is called with."""

    params: Params
    hyper: Hyper
    train: PyTree
    valid: PyTree
    frozen: Frozen
    model_state: ModelState
    key: Any


def count_rows(data: PyTree) -> int:
    """The number of examples."""
    return jax.tree.leaves(data)[0].shape[0]


def full_batch(data: PyTree, num_devices: int, step: Array | int = -1) -> Batch:
    """All examples as one micro-batch."""
    count = count_rows(data)
    return make_batch(data, jnp.arange(count, dtype=jnp.int32), count * num_devices, jnp.asarray(step, jnp.int32))


def make_batch(rows: PyTree, index: Array, num_examples: int, step: Array) -> Batch:
    """One micro-batch of given rows."""
    return {
        "data": jax.tree.map(lambda leaf: leaf[None], rows),
        "index": index[None],
        "num_examples": jnp.full((1,), num_examples, jnp.result_type(float)),
        "step": jnp.reshape(step, (1,)),
    }


def first_micro_batch(batch: Batch) -> Batch:
    """The batch without its leading axis."""
    return jax.tree.map(lambda leaf: leaf[0], batch)


def training_batch(inputs: Inputs, devices: Devices) -> Batch:
    """All training examples of a device as one micro-batch, with the key that `run` was given."""
    batch = full_batch(inputs.train, devices.count())
    return batch if inputs.key is None else {**batch, "key": inputs.key[None]}


def validation_loss(problem: Problem, inputs: Inputs, devices: Devices, params: Params) -> Scalar:
    """A device's share of L_v, nats; `problem` is its share, `params` its own."""
    validation = first_micro_batch(full_batch(inputs.valid, devices.count()))
    return problem.outer(params, devices.make_local(inputs.frozen), validation)


def batches_of(data: PyTree, steps: int, batch_size: int | None, num_devices: int, key: Any) -> BatchAt:
    """The batch of each step; of all examples where `batch_size` is None."""
    count = count_rows(data)
    size = min(batch_size or count, count)
    order = None if size == count else batch_order(count, size, steps, key)

    def batch_at(step: Array) -> Batch:
        if order is None:
            batch = full_batch(data, num_devices, step)
        else:
            rows = jax.tree.map(lambda leaf: leaf[order[step]], data)
            batch = make_batch(rows, order[step], size * num_devices, step)
        return batch if key is None else {**batch, "key": jax.random.fold_in(key, step)[None]}

    return batch_at


@partial(jax.jit, static_argnums=(0, 1, 2))
def batch_order(num_examples: int, batch_size: int, steps: int, key: Array) -> Int[Array, "steps batch"]:
    """The examples of each step of a solver on arrays: epoch after epoch, each in a new order.

    Without replacement within an epoch. A batch may reach across the end of an epoch, so that none is padded.

    Args:
        num_examples: of the training set.
        batch_size: examples of a step, at most `num_examples`.
        steps: of the run.
        key: the one that `run` is given.

    Returns:
        int32[steps, batch_size].

    Example:
        >>> order = bj.batch_order(4, batch_size=2, steps=2, key=jax.random.key(0))
        >>> sorted(order.reshape(-1).tolist())
        [0, 1, 2, 3]
    """
    epochs = -(-steps * batch_size // num_examples)
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(epochs))
    order = jax.vmap(lambda key: jax.random.permutation(key, num_examples))(keys)
    return order.reshape(-1)[: steps * batch_size].reshape(steps, batch_size).astype(jnp.int32)


def signature(*trees: PyTree) -> tuple:
    """Shapes, types and layouts: what decides whether arguments were checked before."""
    leaves, structure = jax.tree.flatten(trees)
    return structure, tuple(
        jax.typeof(leaf)
        if isinstance(leaf, jax.Array)
        else (type(leaf), getattr(leaf, "shape", None), getattr(leaf, "dtype", None))
        for leaf in leaves
    )


def check_arguments(problem: Problem, inputs: Inputs, *, batch_size: int | None, hyper_is_optional: bool) -> None:
    """Refuse what a solver cannot use, each fault in one sentence."""
    for name, data in (("train", inputs.train), ("valid", inputs.valid)):
        check_columns(name, data)
    for name, values in (("params", inputs.params), ("hyper", inputs.hyper)):
        check_floating(name, values)
    check_layout(inputs)
    for name, values in (("frozen", inputs.frozen), ("model_state", inputs.model_state)):
        check_arrays(name, values)
    if not jax.tree.leaves(inputs.params):
        raise ValueError("params holds no arrays; give a pytree of floating-point arrays.")
    count = count_rows(inputs.train)
    if not (hyper_is_optional and not jax.tree.leaves(inputs.hyper)):
        if problem.per_example and (
            len(jax.tree.leaves(inputs.hyper)) != 1 or jnp.shape(jax.tree.leaves(inputs.hyper)[0]) != (count,)
        ):
            shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs.hyper)]
            shape = shapes[0] if len(shapes) == 1 else f"in {len(shapes)} arrays"
            raise ValueError(f"weights {shape} for {count} training examples; give one for each.")
        if not jax.tree.leaves(inputs.hyper):
            raise ValueError("hyper holds no arrays; give the outer variable, such as one weight for each example.")
    if problem.has_state and not jax.tree.leaves(inputs.model_state):
        raise ValueError("the problem has a model state (has_state=True): give its first value as model_state=.")
    if not problem.has_state and jax.tree.leaves(inputs.model_state):
        raise ValueError("model_state is given, but the problem has none; build it with has_state=True.")
    if batch_size is not None and batch_size > count:
        raise ValueError(f"batch_size {batch_size} is more than the {count} training examples; give at most {count}.")
    if batch_size is not None and batch_size < count and inputs.key is None:
        raise ValueError(f"batches of {batch_size} of {count} examples have an order: give key=jax.random.key(0).")
    if inputs.key is not None and not _is_key(inputs.key):
        raise ValueError(f"key is {_describe(inputs.key)}; give one key, as jax.random.key(0) makes it.")


def check_columns(name: str, data: PyTree) -> None:
    """Refuse what is no table of numbers with one length."""
    leaves = jax.tree_util.tree_leaves_with_path(data)
    if not leaves:
        raise ValueError(f"{name} holds no arrays; give a pytree of arrays that lead with [examples].")
    lengths = {}
    for path, leaf in leaves:
        place = name + jax.tree_util.keystr(path)
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
            raise ValueError(f"{place} is {_describe(leaf)}; examples are arrays of numbers.")
        if jnp.ndim(leaf) < 1:
            raise ValueError(f"{place} is one number; arrays of examples lead with [examples].")
        lengths[place] = jnp.shape(leaf)[0]
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{name}: the arrays have different numbers of examples, {lengths}.")
    if not next(iter(lengths.values())):
        raise ValueError(f"{name} has no examples; give at least one.")


def check_floating(name: str, values: PyTree) -> None:
    """Refuse leaves that have no derivative."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(values):
        place = name + jax.tree_util.keystr(path)
        dtype = getattr(leaf, "dtype", None) or (jnp.result_type(leaf) if isinstance(leaf, int | float) else None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{place} is {_describe(leaf)}; derivatives need floating-point arrays. What is not trained goes into "
                "frozen."
            )


def check_arrays(name: str, values: PyTree) -> None:
    """Refuse leaves that a compiled program cannot be given."""
    kinds = (jnp.number, jnp.bool_, jax.dtypes.extended)  # the last: keys
    for path, leaf in jax.tree_util.tree_leaves_with_path(values):
        dtype = (
            jnp.result_type(leaf) if isinstance(leaf, bool | int | float | complex) else getattr(leaf, "dtype", None)
        )
        if dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in kinds):
            place = name + jax.tree_util.keystr(path)
            raise ValueError(f"{place} is {_describe(leaf)}; give arrays, and let the losses close over all else.")


def check_layout(inputs: Inputs) -> None:
    """Refuse arrays that are split over an axis of explicit sharding, where indexing by examples has no rule."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(inputs._asdict()):
        if not isinstance(leaf, jax.Array) or not (sharding := jax.typeof(leaf).sharding).mesh.axis_names:
            continue
        kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
        names = jax.tree.leaves(tuple(sharding.spec))
        if any(kinds.get(axis) == jax.sharding.AxisType.Explicit for axis in names):
            place = path[0].key + jax.tree_util.keystr(path[1:])
            raise ValueError(
                f"{place} is split over an explicit axis of a mesh, {sharding.spec}; make the mesh with "
                "axis_types=(jax.sharding.AxisType.Auto,) for each axis."
            )


def check_stream_steps(train: Stream, steps: int) -> None:
    """Refuse a training stream that does not have one batch for each step."""
    if train.steps != steps:
        raise ValueError(f"the train stream has {train.steps} batches for {steps} steps; give as many.")


def check_counts(**counts: int | None) -> None:
    """Refuse settings that are no whole number of at least 1; None is a default."""
    for name, number in counts.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ValueError(f"{name} = {number!r}; give a whole number of at least 1.")


def _is_key(key: Any) -> bool:
    dtype = getattr(key, "dtype", None)
    if dtype is None:
        return False
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key.ndim == 0
    return dtype == np.uint32 and key.ndim == 1


def _describe(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    return type(leaf).__name__ if dtype is None else f"{dtype}{list(leaf.shape) if leaf.shape else ''}"
