"""Where arrays live: a named mesh of `data` x `fsdp` devices, the rows of a batch spread over all of them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bilevel_jax.core.types import Batch, Stream
from bilevel_jax.lm.batches import Layout

SPREAD = P(None, ("data", "fsdp"))
"""[micro, rows or examples, ...]: the second axis over all devices."""
LARGE, ROUND = 2**20, 2**12
"""Rows from which the weight table is split over the devices, and what its length is then a multiple of."""


def make_mesh(data: int, fsdp: int = 1) -> Mesh:
    """`data` times `fsdp` devices; data = 0 takes all that there are.

    The rows of a batch are spread over all of them. `fsdp` devices share one copy of the parameters, of which each
    keeps a part (`partition`), so that larger models fit; there are `data` copies.
    """
    devices = jax.devices()
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"{jax.process_count()} processes that do not know of each other: set distributed.coordinator_address."
        )
    wanted = f"mesh.data x mesh.fsdp = {data or 'all'} x {fsdp}"
    if len(devices) % fsdp and not data:
        raise ValueError(f"{wanted}, but {len(devices)} devices do not split into groups of {fsdp}.")
    count = data * fsdp or len(devices)
    if count > len(devices):
        raise ValueError(f"{wanted}, but there are {len(devices)} devices: {devices[0].device_kind}.")
    if jax.process_count() > 1 and count < len(devices):
        raise ValueError(
            f"{wanted}, but several processes use all of their {len(devices)} devices: set mesh.data to 0."
        )
    return jax.make_mesh(
        (count // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices[:count]
    )


def put(tree: Any, where: Any) -> Any:
    """Arrays on the mesh, as `where` says: one sharding, or a tree of them.

    Of several processes each gives the same values and keeps the part of its own devices; nothing is sent.
    """
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(where)):
        return jax.device_put(tree, where)
    if isinstance(where, NamedSharding):
        where = jax.tree.map(lambda leaf: where, tree)

    def part(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        here = np.asarray(leaf)
        return jax.make_array_from_callback(here.shape, sharding, lambda index: here[index])

    return jax.tree.map(part, tree, where)


def everywhere(mesh: Mesh, tree: Any) -> Any:
    """A copy on every device."""
    return put(tree, NamedSharding(mesh, P()))


def table_size(rows: int) -> int:
    """Entries of the weight table: `rows`, and from LARGE of them a few more, so that devices divide it evenly."""
    return rows if rows < LARGE else -(-rows // ROUND) * ROUND


def table(mesh: Mesh, values: Any) -> jax.Array:
    """The weight table, or what goes with it: a copy everywhere; from LARGE rows split by row, with 0 at its end."""
    size = table_size(len(values))
    if size > len(values):
        values = np.pad(np.asarray(values), (0, size - len(values)))
    split = size >= LARGE and size % mesh.size == 0
    return put(values, NamedSharding(mesh, P(mesh.axis_names) if split else P()))


def settled(mesh: Mesh, tree: Any) -> Any:
    """The tree with a copy on every device of each array that is not on the mesh yet: an optimiser's counters, say."""
    copied = NamedSharding(mesh, P())

    def settle(leaf: Any) -> Any:
        there = getattr(leaf, "sharding", copied)  # a number stays a number
        return leaf if isinstance(there, NamedSharding) and there.mesh == mesh else put(leaf, copied)

    return jax.tree.map(settle, tree)


def own(mesh: Mesh, rows: int) -> np.ndarray | None:
    """Which of the rows of a batch lie on this process's devices; None: all of them."""
    spread = NamedSharding(mesh, SPREAD)
    if spread.is_fully_addressable:
        return None
    mine = np.zeros((1, rows), bool)
    for part in spread.addressable_devices_indices_map(mine.shape).values():
        mine[part] = True
    return mine[0]


def placed(mesh: Mesh, stream: Stream) -> Stream:
    """The same stream with its batches on the mesh: the only place where data meet devices."""
    place = _placing(mesh)
    return Stream(lambda step: place(stream.batch(step)), stream.steps)


def kept(mesh: Mesh, stream: Stream) -> Stream:
    """As `placed`, with every batch made and moved once: for the small sets that are read again and again."""
    place = _placing(mesh)
    batches = [place(stream.batch(step)) for step in range(stream.steps)]
    return Stream(batches.__getitem__, stream.steps)


def fit_layout(mesh: Mesh, layout: Layout) -> Layout:
    """The layout with its rows rounded up to a multiple of the devices; its examples must already be one."""
    if layout.examples % mesh.size:
        raise ValueError(
            f"train.global_batch_size / train.gradient_accumulation_steps = {layout.examples} examples do not spread evenly over {mesh.size} devices. "
            f"Choose a multiple of {mesh.size}, or set mesh.data."
        )
    return layout._replace(rows=-(-layout.rows // mesh.size) * mesh.size)


def _placing(mesh: Mesh) -> Callable[[Batch], Batch]:
    spread, copied = NamedSharding(mesh, SPREAD), NamedSharding(mesh, P())

    def place(batch: Batch) -> Batch:
        return put(batch, {name: copied if np.ndim(leaf) == 1 else spread for name, leaf in batch.items()})

    return place
