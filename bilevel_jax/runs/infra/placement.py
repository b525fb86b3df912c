"""The device mesh and where arrays live on it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bilevel_jax.core.types import Batch, Stream
from bilevel_jax.lm.data.batches import BatchShape

BATCH_SPEC = P(None, ("data", "fsdp"))
"""[micro, rows or examples, ...]: the second axis over all devices."""
MIN_SHARDED_TABLE_SIZE, SHARDED_TABLE_MULTIPLE = 2**20, 2**12
"""Length from which a per-example table is split over the devices, and the multiple that it is then padded to."""
KEPT_BATCHES = 2**24
"""Bytes of batches that `keep_batches` keeps."""


def make_mesh(data_size: int, fsdp: int = 1) -> Mesh:
    """A mesh of `data_size` times `fsdp` devices; data_size = 0 takes all devices.

    The rows of a batch are spread over all of them. `fsdp` devices share one copy of the parameters, of which each
    keeps a part (`sharding`), so that larger models fit; there are `data_size` copies.
    """
    devices = jax.devices()
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"{jax.process_count()} processes that do not know of each other: set distributed.coordinator_address."
        )
    requested = f"mesh.data x mesh.fsdp = {data_size or 'all'} x {fsdp}"
    if len(devices) % fsdp and not data_size:
        raise ValueError(f"{requested}, but {len(devices)} devices do not split into groups of {fsdp}.")
    count = data_size * fsdp or len(devices)
    if count > len(devices):
        raise ValueError(f"{requested}, but there are {len(devices)} devices: {devices[0].device_kind}. Lower them.")
    if jax.process_count() > 1 and count < len(devices):
        raise ValueError(
            f"{requested}, but several processes use all of their {len(devices)} devices: set mesh.data to 0."
        )
    return jax.make_mesh(
        (count // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices[:count]
    )


def place_arrays(tree: Any, shardings: Any) -> Any:
    """Arrays on the mesh, as `shardings` says: one sharding, or a tree of them.

    Of several processes each gives the same values and keeps the part of its own devices; nothing is sent.
    """
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings)):
        return jax.device_put(tree, shardings)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda leaf: shardings, tree)

    def place_leaf(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        host_array = np.asarray(leaf)
        return jax.make_array_from_callback(host_array.shape, sharding, lambda index: host_array[index])

    return jax.tree.map(place_leaf, tree, shardings)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A copy on every device."""
    return place_arrays(tree, NamedSharding(mesh, P()))


def padded_table_size(num_examples: int) -> int:
    """Size of the weight table: one entry per example, from MIN_SHARDED_TABLE_SIZE padded so that devices divide it."""
    return (
        num_examples
        if num_examples < MIN_SHARDED_TABLE_SIZE
        else -(-num_examples // SHARDED_TABLE_MULTIPLE) * SHARDED_TABLE_MULTIPLE
    )


def place_table(mesh: Mesh, values: Any) -> jax.Array:
    """A per-example table on the mesh: replicated; from MIN_SHARDED_TABLE_SIZE on split by row and padded with 0.

    A single number is replicated.
    """
    if not np.ndim(values):
        return replicate(mesh, values)
    size = padded_table_size(len(values))
    if size > len(values):
        values = np.pad(np.asarray(values), (0, size - len(values)))
    is_sharded = size >= MIN_SHARDED_TABLE_SIZE and size % mesh.size == 0
    return place_arrays(values, NamedSharding(mesh, P(mesh.axis_names) if is_sharded else P()))


def replicate_unplaced(mesh: Mesh, tree: Any) -> Any:
    """The tree with a copy on every device of each array that is not on the mesh yet: an optimizer's counters, say."""
    replicated = NamedSharding(mesh, P())

    def place_leaf(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", replicated)  # a number stays a number
        return leaf if isinstance(sharding, NamedSharding) and sharding.mesh == mesh else place_arrays(leaf, replicated)

    return jax.tree.map(place_leaf, tree)


def local_rows(mesh: Mesh, num_rows: int) -> np.ndarray | None:
    """Which of the rows of a batch lie on this process's devices; None: all of them."""
    batch_sharding = NamedSharding(mesh, BATCH_SPEC)
    if batch_sharding.is_fully_addressable:
        return None
    is_local = np.zeros((1, num_rows), bool)
    for index in batch_sharding.addressable_devices_indices_map(is_local.shape).values():
        is_local[index] = True
    return is_local[0]


def place_stream(mesh: Mesh, stream: Stream) -> Stream:
    """The same stream with its batches on the mesh: the only place where data meet devices."""
    place_batch = _batch_placer(mesh)
    return Stream(lambda step: place_batch(stream.batch(step)), stream.steps)


def cache_stream(mesh: Mesh, stream: Stream) -> Stream:
    """As `place_stream`, with every batch made and moved once: for small sets that are read repeatedly."""
    place_batch = _batch_placer(mesh)
    batches = [place_batch(stream.batch(step)) for step in range(stream.steps)]
    return Stream(batches.__getitem__, stream.steps)


def keep_batches(stream: Stream, limit: int = KEPT_BATCHES) -> Stream:
    """The same stream, which keeps batches that it has made, the first `limit` bytes of them (a copy on several devices
    counts once): for one that is read forth and back, and would make and move each batch anew."""
    kept: dict[int, Batch] = {}
    room = limit

    def batch(step: int) -> Batch:
        nonlocal room
        if step in kept:
            return kept[step]
        made = stream.batch(step)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(made))
        if size <= room:
            kept[step], room = made, room - size
        return made

    return Stream(batch, stream.steps)


def align_layout(mesh: Mesh, layout: BatchShape) -> BatchShape:
    """The layout with its rows rounded up to a multiple of the devices; its examples must already be one."""
    if layout.examples % mesh.size:
        raise ValueError(
            f"train.global_batch_size / train.gradient_accumulation_steps = {layout.examples} examples do not spread "
            f"evenly over {mesh.size} devices. Choose a multiple of {mesh.size}, or set mesh.data."
        )
    return layout._replace(rows=-(-layout.rows // mesh.size) * mesh.size)


def _batch_placer(mesh: Mesh) -> Callable[[Batch], Batch]:
    batch_sharding, replicated = NamedSharding(mesh, BATCH_SPEC), NamedSharding(mesh, P())

    def place_batch(batch: Batch) -> Batch:
        return place_arrays(
            batch, {name: replicated if np.ndim(leaf) == 1 else batch_sharding for name, leaf in batch.items()}
        )

    return place_batch
