"""Data-parallel training step written with jax.pmap."""

from collections.abc import Sequence

import jax
import optax

from bilevel_jax.core.training import Devices, step_functions
from bilevel_jax.core.types import (
    Adjoint,
    Batch,
    Frozen,
    HyperSlice,
    Linearization,
    Params,
    Problem,
    TrainState,
    TrainStep,
)


def pmap_train_step(
    problem: Problem, optimizer: optax.GradientTransformation, devices: Sequence[jax.Device] | None = None
) -> TrainStep:
    """`core.training.train_step` under jax.pmap: a replacement for it, equal up to rounding.

        each device: its micro-batches' share of the gradient, of the Hessian product;  psum over the devices;  update

    The micro-batches of a step are dealt to the devices (default: this process's); hypergradients come back in their
    order. The sums need no mean over devices, as `rows` counts the whole step. jax keeps pmap in maintenance, built on
    shard_map: for new programs place arrays on a mesh and use `train_step`, which also splits parameters.

    Raises ValueError for a step whose micro-batches are no multiple of the devices.
    """
    devices = list(devices or jax.local_devices())
    count, axis = len(devices), "devices"
    per_device_problem = problem._replace(prior=lambda params, frozen: problem.prior(params, frozen) / count)
    forward_step, backward_step, linearize, vjp_step = step_functions(per_device_problem, optimizer, Devices(axis))
    pmap_forward = jax.pmap(forward_step, axis, in_axes=(None, 0, None, 0), out_axes=None, devices=devices)
    pmap_backward = jax.pmap(
        backward_step, axis, in_axes=(None, None, 0, None, 0, None), out_axes=(None, 0), devices=devices
    )

    pmap_linearize = jax.pmap(linearize, axis, in_axes=(None, 0, None, 0), out_axes=(None, None, 0), devices=devices)
    pmap_vjp = jax.pmap(vjp_step, axis, in_axes=(None, None, 0, 0, None, 0, None), out_axes=(None, 0), devices=devices)

    def split_over_devices(tree: Batch) -> Batch:
        """[micro, ...] -> [devices, micro / devices, ...]."""
        num_micro_batches = len(jax.tree.leaves(tree)[0])
        if num_micro_batches % count:
            raise ValueError(
                f"{num_micro_batches} micro-batches cannot be dealt to {count} devices; make it a multiple of them."
            )
        return jax.tree.map(lambda leaf: leaf.reshape(count, num_micro_batches // count, *leaf.shape[1:]), tree)

    def merge_devices(tree: HyperSlice) -> HyperSlice:
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)

    def backward_over_devices(
        state: TrainState, grad: Params, weights: HyperSlice, frozen: Frozen, batch: Batch, adjoint: Adjoint
    ):
        adjoint, hypergradient = pmap_backward(
            state, grad, split_over_devices(weights), frozen, split_over_devices(batch), adjoint
        )
        return adjoint, merge_devices(hypergradient)

    def vjp_over_devices(
        state: TrainState,
        grad: Params,
        linearization: Linearization,
        weights: HyperSlice,
        frozen: Frozen,
        batch: Batch,
        adjoint: Adjoint,
    ):
        adjoint, hypergradient = pmap_vjp(
            state, grad, linearization, split_over_devices(weights), frozen, split_over_devices(batch), adjoint
        )
        return adjoint, merge_devices(hypergradient)

    return TrainStep(
        lambda state, weights, frozen, batch: pmap_forward(
            state, split_over_devices(weights), frozen, split_over_devices(batch)
        ),
        backward_over_devices,
        jax.jit(problem.gather),
        jax.jit(problem.scatter_add, donate_argnums=0),
        lambda state, weights, frozen, batch: pmap_linearize(
            state, split_over_devices(weights), frozen, split_over_devices(batch)
        ),
        vjp_over_devices,
    )
