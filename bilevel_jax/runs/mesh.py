"""Where arrays live: one named mesh, parameters on every device, the rows of a batch spread over `data`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bilevel_jax.core.types import Batch, Stream
from bilevel_jax.lm.batches import Layout

SPREAD = P(None, "data")
"""[micro, rows or examples, ...]: the second axis over the devices."""


def make_mesh(data: int) -> Mesh:
    """`data` devices in one row; 0 takes all that there are."""
    devices = jax.devices()
    count = data or len(devices)
    if count > len(devices):
        raise ValueError(f"devices.data = {count}, but there are {len(devices)} devices: {devices[0].device_kind}.")
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])


def everywhere(mesh: Mesh, tree: Any) -> Any:
    """A copy on every device."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def shapes(mesh: Mesh, tree: Any) -> Any:
    """The shapes of arrays that `everywhere` would place: for what is compiled without them."""
    copied = NamedSharding(mesh, P())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=copied), tree)


def placed(mesh: Mesh, stream: Stream) -> Stream:
    """The same stream with its batches on the mesh: the only place where data meet devices."""
    put = _put(mesh)
    return Stream(lambda step: put(stream.batch(step)), stream.steps)


def kept(mesh: Mesh, stream: Stream) -> Stream:
    """As `placed`, with every batch made and moved once: for the small sets that are read again and again."""
    put = _put(mesh)
    batches = [put(stream.batch(step)) for step in range(stream.steps)]
    return Stream(batches.__getitem__, stream.steps)


def fit_layout(mesh: Mesh, layout: Layout) -> Layout:
    """The layout with its rows rounded up to a multiple of the devices; its examples must already be one."""
    count = mesh.shape["data"]
    if layout.examples % count:
        raise ValueError(
            f"train.batch / train.micro = {layout.examples} examples do not spread evenly over {count} devices. "
            f"Choose a multiple of {count}, or set devices.data."
        )
    return layout._replace(rows=-(-layout.rows // count) * count)


def _put(mesh: Mesh) -> Callable[[Batch], Batch]:
    spread, copied = NamedSharding(mesh, SPREAD), NamedSharding(mesh, P())

    def put(batch: Batch) -> Batch:
        where = {name: copied if np.ndim(leaf) == 1 else spread for name, leaf in batch.items()}
        return jax.device_put(batch, where)

    return put
