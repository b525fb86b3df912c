"""Streams of batches from arrays of examples."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bilevel_jax.core.types import PADDING, Batch, PyTree, Stream


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


def halve_stream(stream: Stream, halves: Float[Array, "validation"]) -> Stream:
    """A validation stream whose sum is the difference of two halves, (mean over A - mean over B) / 2 where they are
    equal.

    Args:
        stream: that sums to the mean over validation examples.
        halves: float[validation], of `certify.validation_halves`; the place of an example in it is its `index`.

    Returns:
        The same batches with the leaf `halves`, which the outer loss of `weighted` multiplies by.

    Example:
        >>> stream = bj.full_batch_stream(jnp.array([5.0, 7.0]))
        >>> problem = bj.weighted(lambda theta, frozen, batch: batch["data"])
        >>> batch = bj.halve_stream(stream, jnp.array([1.0, -1.0])).batch(0)
        >>> float(problem.outer((), (), jax.tree.map(lambda leaf: leaf[0], batch)))  # (5 - 7) / 2
        -1.0
    """

    def batch(step: int) -> Batch:
        given = stream.batch(step)
        return {**given, "halves": _gather_halves(halves, given["index"])}

    return Stream(batch, stream.steps)


@jax.jit
def _gather_halves(halves: Float[Array, "validation"], index: Int[Array, "micro examples"]) -> Array:
    return jnp.asarray(halves).at[index].get(mode="fill", fill_value=0)


def _make_batch(data: PyTree, indices: np.ndarray, size: int) -> Batch:
    index = np.pad(indices, (0, size - len(indices)), constant_values=PADDING)
    padded_indices = np.pad(indices, (0, size - len(indices)))
    return {
        "data": jax.tree.map(lambda leaf: jnp.asarray(leaf)[padded_indices][None], data),
        "index": jnp.asarray(index, jnp.int32)[None],
        "num_examples": jnp.full((1,), len(indices), jnp.result_type(float)),
    }
