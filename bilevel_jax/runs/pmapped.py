"""The data-parallel step written with jax.pmap, for programs that are."""

from collections.abc import Sequence
from functools import partial

import jax
import optax

from bilevel_jax.core.transition import steps
from bilevel_jax.core.types import Adjoint, Batch, Fixed, Inner, Linear, Params, Problem, Slice, Transition


def pmapped(
    problem: Problem, optimizer: optax.GradientTransformation, devices: Sequence[jax.Device] | None = None
) -> Transition:
    """`transition` under jax.pmap: in its place everywhere, and equal to it but for rounding.

        each device: its micro-batches' share of the gradient, of the Hessian product;  psum over the devices;  update

    The micro-batches of a step are dealt to the devices (default: this process's); entries come back in their order.
    The sums need no mean over devices, as `rows` counts the whole step. jax keeps pmap in maintenance, built on
    shard_map: for new programs place arrays on a mesh and use `transition`, which also splits parameters.

    Raises ValueError for a step whose micro-batches are no multiple of the devices.
    """
    devices = list(devices or jax.local_devices())
    count, axis = len(devices), "devices"
    shared = problem._replace(prior=lambda params, fixed: problem.prior(params, fixed) / count)
    forward, backward, linearize, pull = steps(shared, optimizer, total=partial(jax.lax.psum, axis_name=axis))
    ahead = jax.pmap(forward, axis, in_axes=(None, 0, None, 0), out_axes=None, devices=devices)
    back = jax.pmap(backward, axis, in_axes=(None, None, 0, None, 0, None), out_axes=(None, 0), devices=devices)

    ahead_linear = jax.pmap(linearize, axis, in_axes=(None, 0, None, 0), out_axes=(None, None, 0), devices=devices)
    back_linear = jax.pmap(pull, axis, in_axes=(None, None, 0, 0, None, 0, None), out_axes=(None, 0), devices=devices)

    def dealt(tree: Batch) -> Batch:
        """[micro, ...] -> [devices, micro / devices, ...]."""
        micro = len(jax.tree.leaves(tree)[0])
        if micro % count:
            raise ValueError(f"{micro} micro-batches cannot be dealt to {count} devices; make it a multiple of them.")
        return jax.tree.map(lambda leaf: leaf.reshape(count, micro // count, *leaf.shape[1:]), tree)

    def collected(tree: Slice) -> Slice:
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)

    def backward_dealt(state: Inner, grad: Params, weights: Slice, fixed: Fixed, batch: Batch, adjoint: Adjoint):
        adjoint, entries = back(state, grad, dealt(weights), fixed, dealt(batch), adjoint)
        return adjoint, collected(entries)

    def pull_dealt(
        state: Inner, grad: Params, linear: Linear, weights: Slice, fixed: Fixed, batch: Batch, adjoint: Adjoint
    ):
        adjoint, entries = back_linear(state, grad, linear, dealt(weights), fixed, dealt(batch), adjoint)
        return adjoint, collected(entries)

    return Transition(
        lambda state, weights, fixed, batch: ahead(state, dealt(weights), fixed, dealt(batch)),
        backward_dealt,
        jax.jit(problem.take),
        jax.jit(problem.add, donate_argnums=0),
        lambda state, weights, fixed, batch: ahead_linear(state, dealt(weights), fixed, dealt(batch)),
        pull_dealt,
    )
