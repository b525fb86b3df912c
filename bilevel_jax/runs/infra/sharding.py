"""Sharding rules for parameters, matched by regular expressions."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bilevel_jax.core.types import Params
from bilevel_jax.runs.infra.placement import place_arrays

MeshAxes = tuple[str | None, ...]
"""For each axis of an array the axis of the mesh that splits it; None: not split."""
ShardingRules = Mapping[str, MeshAxes]
"""Pattern -> axes. The first pattern that matches the whole of an array's path counts; without one it is not split."""

DECODER_SHARDING_RULES: ShardingRules = {
    r"layers/\w+/kernel": (None, None, "fsdp"),  # [layers, in, out]
    r"embed|positions": (None, "fsdp"),  # [vocabulary or places, width]
    r"head": ("fsdp", None),  # [width, vocabulary]
}
"""The tree of lm.models.decoder, of every family. Norms, biases and adapters (lora/NAME/a, lora/NAME/b) are small."""


def parse_sharding_rules(rules: Sequence[str], mesh: Mesh) -> ShardingRules:
    """Custom rules, `PATTERN = AXIS AXIS ...`, before DECODER_SHARDING_RULES; an axis is data, fsdp or - (not split).

    Raises ValueError for a rule that says something else.
    """
    custom_rules: dict[str, MeshAxes] = {}
    for rule in rules:
        pattern, separator, axes = (part.strip() for part in rule.rpartition("="))
        names = axes.split()
        if not separator or not pattern or not set(names) <= {"-", *mesh.axis_names}:
            raise ValueError(
                f"mesh.sharding_rules: {rule!r} is no rule; wanted PATTERN = AXIS AXIS ..., each axis one of "
                f"{', '.join(mesh.axis_names)} and - (not split), as in 'layers/down_proj/kernel = - fsdp -'."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"mesh.sharding_rules: {pattern!r} is no regular expression: {error}.") from error
        custom_rules[pattern] = tuple(None if name == "-" else name for name in names)
    return custom_rules | {
        pattern: axes for pattern, axes in DECODER_SHARDING_RULES.items() if pattern not in custom_rules
    }


def make_shardings(mesh: Mesh, rules: ShardingRules, tree: Any) -> Any:
    """The tree with a sharding in place of each array.

    An array that its axes do not divide evenly stays whole on every device. Raises ValueError where a rule has more
    axes than the array.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, P(*_leaf_axes(mesh, rules, path, leaf.shape))), tree
    )


def shard_tree(mesh: Mesh, rules: ShardingRules, tree: Any) -> Any:
    """The tree on the mesh, each array split as the table says."""
    return place_arrays(tree, make_shardings(mesh, rules, tree))


def parameter_placer(mesh: Mesh, rules: ShardingRules) -> Callable[[Any, Any], jax.Array]:
    """(path, values) -> the array on the mesh: for loading, so that no device ever holds the whole model."""
    return lambda path, values: place_arrays(
        values, NamedSharding(mesh, P(*_leaf_axes(mesh, rules, path, values.shape)))
    )


def make_sharded_shapes(mesh: Mesh, rules: ShardingRules, tree: Any) -> Any:
    """The shapes and shardings of arrays that `shard_tree` would place: for compiling without them."""
    tree_shardings = make_shardings(mesh, rules, tree)
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, tree_shardings
    )


def parameter_gatherer(mesh: Mesh, rules: ShardingRules) -> Callable[[Params], Params]:
    """For `lm.models.decoder`: brings a part of the parameters, split as the table says, to every device that uses it.

    Its transpose splits the gradient again, so that whole parameters and whole gradients live for one layer only.
    """
    if mesh.shape["fsdp"] == 1:
        return lambda params: params

    def gather_params(params: Params) -> Params:
        def gather_leaf(path: Any, leaf: jax.Array) -> jax.Array:
            in_layer_stack = path[0].key in ("layers", "lora")  # one layer of a stack
            axes = _leaf_axes(mesh, rules, path, (1, *leaf.shape) if in_layer_stack else leaf.shape)[in_layer_stack:]
            # two, as the transpose of the second would leave the gradient whole, and the first splits it again
            leaf = jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, P(*axes)))
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, P()))

        return jax.tree_util.tree_map_with_path(gather_leaf, params)

    return gather_params


def find_unsharded(mesh: Mesh, rules: ShardingRules, tree: Any) -> list[str]:
    """The paths of the matrices that the table would split and their sizes do not let it."""
    unsharded_paths = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        rule_axes, leaf_axes = _matching_axes(rules, path), _leaf_axes(mesh, rules, path, leaf.shape)
        if any(axis and mesh.shape[axis] > 1 for axis in rule_axes) and not leaf_axes:
            unsharded_paths.append(_path_string(path))
    return unsharded_paths


def _leaf_axes(mesh: Mesh, rules: ShardingRules, path: Any, shape: tuple[int, ...]) -> MeshAxes:
    axes = _matching_axes(rules, path)
    if len(axes) > len(shape):
        raise ValueError(f"{_path_string(path)} has {len(shape)} axes {list(shape)}, and its rule {len(axes)}: {axes}.")
    axes = tuple(axis if axis and mesh.shape[axis] > 1 else None for axis in axes)
    divides_evenly = all(size % mesh.shape[axis] == 0 for size, axis in zip(shape, axes, strict=False) if axis)
    num_leading_axes = max((place + 1 for place, axis in enumerate(axes) if axis), default=0)
    # as short as jax writes it, or equal shardings would compile twice
    return axes[:num_leading_axes] if divides_evenly else ()


def _matching_axes(rules: ShardingRules, path: Any) -> MeshAxes:
    return next((axes for pattern, axes in rules.items() if re.fullmatch(pattern, _path_string(path))), ())


def _path_string(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
