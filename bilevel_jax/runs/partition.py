"""Which device keeps which part of the parameters: a table of patterns, read at placing and, layer by layer, at use."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bilevel_jax.core.types import Params
from bilevel_jax.runs.mesh import put

Axes = tuple[str | None, ...]
"""For each axis of an array the axis of the mesh that splits it; None: not split."""
Table = Mapping[str, Axes]
"""Pattern -> axes. The first pattern that matches the whole of an array's path counts; without one it is not split."""

DECODER: Table = {
    r"layers/\w+/kernel": (None, None, "fsdp"),  # [layers, in, out]
    r"embed|positions": (None, "fsdp"),  # [vocabulary or places, width]
    r"head": ("fsdp", None),  # [width, vocabulary]
}
"""The tree of lm.models.decoder, of every family. Norms, biases and adapters (lora/NAME/a, lora/NAME/b) are small."""


def table(rules: Sequence[str], mesh: Mesh) -> Table:
    """DECODER with rules of one's own before it: `PATTERN = AXIS AXIS ...`, an axis being data, fsdp or - (not split).

    Raises ValueError for a rule that says something else.
    """
    own: dict[str, Axes] = {}
    for rule in rules:
        pattern, equals, axes = (part.strip() for part in rule.rpartition("="))
        names = axes.split()
        if not equals or not pattern or not set(names) <= {"-", *mesh.axis_names}:
            raise ValueError(
                f"mesh.sharding_rules: {rule!r} is no rule; wanted PATTERN = AXIS AXIS ..., each axis one of "
                f"{', '.join(mesh.axis_names)} and - (not split), as in 'layers/down_proj/kernel = - fsdp -'."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"mesh.sharding_rules: {pattern!r} is no regular expression: {error}.") from error
        own[pattern] = tuple(None if name == "-" else name for name in names)
    return own | {pattern: axes for pattern, axes in DECODER.items() if pattern not in own}


def shardings(mesh: Mesh, rules: Table, tree: Any) -> Any:
    """The tree with a sharding in place of each array.

    An array that its axes do not divide evenly stays whole on every device. Raises ValueError where a rule has more
    axes than the array.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, P(*_axes(mesh, rules, path, leaf.shape))), tree
    )


def partitioned(mesh: Mesh, rules: Table, tree: Any) -> Any:
    """The tree on the mesh, each array split as the table says."""
    return put(tree, shardings(mesh, rules, tree))


def placing(mesh: Mesh, rules: Table) -> Callable[[Any, Any], jax.Array]:
    """(path, values) -> the array on the mesh: for `lm.load`, so that no device ever holds the whole model."""
    return lambda path, values: put(values, NamedSharding(mesh, P(*_axes(mesh, rules, path, values.shape))))


def shapes(mesh: Mesh, rules: Table, tree: Any) -> Any:
    """The shapes of arrays that `partitioned` would place: for what is compiled without them."""
    where = shardings(mesh, rules, tree)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, where)


def gathering(mesh: Mesh, rules: Table) -> Callable[[Params], Params]:
    """For `lm.models.decoder`: brings a part of the parameters, split as the table says, to every device that uses it.

    Its transpose splits the gradient again, so that whole parameters and whole gradients live for one layer only.
    """
    if mesh.shape["fsdp"] == 1:
        return lambda params: params

    def gather(params: Params) -> Params:
        def together(path: Any, leaf: jax.Array) -> jax.Array:
            inside = path[0].key in ("layers", "lora")  # one layer of a stack
            axes = _axes(mesh, rules, path, (1, *leaf.shape) if inside else leaf.shape)[inside:]
            # two, as the transpose of the second would leave the gradient whole, and the first splits it again
            leaf = jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, P(*axes)))
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, P()))

        return jax.tree_util.tree_map_with_path(together, params)

    return gather


def whole(mesh: Mesh, rules: Table, tree: Any) -> list[str]:
    """The paths of the matrices that the table would split and their sizes do not let it."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        wanted, got = _wanted(rules, path), _axes(mesh, rules, path, leaf.shape)
        if any(axis and mesh.shape[axis] > 1 for axis in wanted) and not got:
            found.append(_words(path))
    return found


def _axes(mesh: Mesh, rules: Table, path: Any, shape: tuple[int, ...]) -> Axes:
    axes = _wanted(rules, path)
    if len(axes) > len(shape):
        raise ValueError(f"{_words(path)} has {len(shape)} axes {list(shape)}, and its rule {len(axes)}: {axes}.")
    axes = tuple(axis if axis and mesh.shape[axis] > 1 else None for axis in axes)
    even = all(size % mesh.shape[axis] == 0 for size, axis in zip(shape, axes, strict=False) if axis)
    last = max((place + 1 for place, axis in enumerate(axes) if axis), default=0)
    return axes[:last] if even else ()  # as short as jax writes it, or equal shardings would compile twice


def _wanted(rules: Table, path: Any) -> Axes:
    return next((axes for pattern, axes in rules.items() if re.fullmatch(pattern, _words(path))), ())


def _words(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
