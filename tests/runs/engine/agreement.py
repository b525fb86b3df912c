"""The same numbers by different ways of spreading the work: what each way is asked for, and a process of its own."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax.core import checkpointing, curvature, solvers, tree
from bilevel_jax.core.implicit import implicit_estimator
from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.training import init_train_state, train, train_step, trajectory_from_params
from bilevel_jax.core.types import Adjoint
from bilevel_jax.core.unrolled import unrolled_estimator, validation_loss_and_grad_fn
from bilevel_jax.lm import models
from bilevel_jax.lm.data import batches
from bilevel_jax.lm.data.tokens import Corpus
from bilevel_jax.runs.config.schema import DistributedSection, ObjectiveSection
from bilevel_jax.runs.infra import distributed, sharding
from bilevel_jax.runs.infra.distributed import fetch_to_host
from bilevel_jax.runs.infra.placement import (
    align_layout,
    cache_stream,
    local_rows,
    make_mesh,
    place_stream,
    replicate_unplaced,
)
from bilevel_jax.runs.infra.pmap_step import pmap_train_step
from bilevel_jax.runs.tasks.objective import build_objective

ROWS, STEPS, BATCH, LENGTH = 29, 2, 16, 8
RATE, DAMPING = 0.1, 60.0
SGD = optax.sgd(RATE)
damped = jax.jit(partial(jax.tree.map, lambda v, back: DAMPING * v + (v - back) / RATE))
SHAPE = models.DecoderConfig(
    family="llama",
    vocab_size=24,
    width=16,
    mlp_width=32,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    max_length=16,
    tied_embeddings=False,
    init_scale=0.4,
)


def corpus(rows: int, seed: int) -> Corpus:
    random = np.random.default_rng(seed)
    lengths = random.integers(3, LENGTH + 2, rows)
    ids = random.integers(1, SHAPE.vocab_size, lengths.sum()).astype(np.int32)
    supervised = random.random(len(ids)) < 0.7
    supervised[np.cumsum(lengths) - 1] = True  # each row has a target
    return Corpus(ids, supervised, np.concatenate([[0], np.cumsum(lengths)]))


def numbers(data: int, model: int = 1, *, pmap: bool = False, linear: bool = False) -> dict[str, np.ndarray]:
    """The sampled batches, the gradient, the entries and a CG solution, on a mesh or under pmap; float64."""
    mesh = make_mesh(data, model)
    split = sharding.parse_sharding_rules((), mesh)
    decoder = models.make_decoder(SHAPE, gather_params=sharding.parameter_gatherer(mesh, split))
    params = models.init_params(SHAPE, jax.random.key(0), dtype=jnp.float64)
    params = params if pmap else sharding.shard_tree(mesh, split, params)
    problem = weighted(build_objective(ObjectiveSection(), decoder, lora=False).losses)
    rows = corpus(ROWS, 1)
    micro = 8 if pmap else 1  # pmap deals micro-batches to its devices
    layout = align_layout(mesh, batches.BatchShape(micro, BATCH // micro, BATCH // micro, LENGTH))
    own = local_rows(mesh, layout.rows)
    stream = batches.make_train_stream(rows, batches.shuffled_order(ROWS, BATCH, 0), STEPS, layout, local_rows=own)
    validation = batches.make_evaluation_stream(corpus(16, 2), layout, local_rows=own)
    weights, fixed = jnp.asarray(np.random.default_rng(3).uniform(0.5, 2, ROWS)), {"base": None, "start": None}
    start = init_train_state(SGD, params)
    if not pmap:  # which takes what lies on the host, or on one device
        stream, validation = place_stream(mesh, stream), cache_stream(mesh, validation)
        weights, start = replicate_unplaced(mesh, (weights, start))

    step = (partial(pmap_train_step, devices=jax.devices()) if pmap else train_step)(problem, SGD)
    run = train(
        step, start, weights, fixed, stream, plan=checkpointing.square_root_plan(STEPS)._replace(linearize=linear)
    )
    estimate = unrolled_estimator(problem, step)(run, weights, fixed, stream, validation)

    batch = stream.batch(0)
    part = step.gather(weights, batch)
    grad = step.forward(start, part, fixed, batch)[1].grad

    def product(v):
        """(H + DAMPING) v, from the transpose v - RATE H v of a step."""
        back = step.backward(start, grad, part, fixed, batch, Adjoint(v, tree.inexact_leaves(start.opt_state)))[
            0
        ].params
        return damped(v, back)

    slope = validation_loss_and_grad_fn(problem)(params, fixed, validation)[1]
    solve = solvers.cg(tolerance=1e-12)(product, slope)
    assert solve.residual < 1e-11 and solve.min_curvature > 0 and estimate.checks.replayed
    flatten = lambda some: np.concatenate([fetch_to_host(leaf).ravel() for leaf in jax.tree.leaves(some)])  # noqa: E731
    return {
        "batches": flatten([stream.batch(index)[name] for index in range(STEPS) for name in ("tokens", "index")]),
        "gradient": flatten(grad),
        "entries": fetch_to_host(estimate.grad),
        "solution": flatten(solve.x),
    }


def implicit_numbers(data: int, fsdp: int, times: int = 1) -> dict[str, np.ndarray]:
    """Hypergradients by implicit differentiation and their solve, made `times` times with the same bits; float64."""
    mesh = make_mesh(data, fsdp)
    split = sharding.parse_sharding_rules((), mesh)
    decoder = models.make_decoder(SHAPE, gather_params=sharding.parameter_gatherer(mesh, split))
    params = sharding.shard_tree(mesh, split, models.init_params(SHAPE, jax.random.key(0), dtype=jnp.float64))
    losses = build_objective(ObjectiveSection(), decoder, lora=False).losses
    problem = weighted(losses, prior=proximal(200.0, lambda frozen: frozen["start"]))
    layout = align_layout(mesh, batches.BatchShape(1, BATCH, BATCH, LENGTH))
    own, order = local_rows(mesh, layout.rows), batches.shuffled_order(ROWS, BATCH, 0)
    stream = place_stream(mesh, batches.make_train_stream(corpus(ROWS, 1), order, STEPS, layout, local_rows=own))
    validation = cache_stream(mesh, batches.make_evaluation_stream(corpus(16, 2), layout, local_rows=own))
    weights = replicate_unplaced(mesh, jnp.asarray(np.random.default_rng(3).uniform(0.5, 2, ROWS)))
    estimator = implicit_estimator(problem, curvature.hessian(problem), solvers.cg(tolerance=1e-12))
    found = []
    for _ in range(times):
        frozen = {"base": None, "start": params}
        estimate = estimator(trajectory_from_params(params), weights, frozen, stream, validation)
        assert estimate.checks.residual < 1e-11 and estimate.checks.curvature > 0
        leaves = [estimate.grad, *jax.tree.leaves(estimate.direction)]
        found.append(np.concatenate([fetch_to_host(leaf).ravel() for leaf in leaves]))
    assert all(np.array_equal(one, found[0]) for one in found)
    return {"hypergradients": found[0][:ROWS], "solution": found[0][ROWS:]}


if __name__ == "__main__":  # coordinator, number, file, and for implicit differentiation the devices of a copy
    jax.config.update("jax_enable_x64", True)
    distributed.initialize_distributed(
        DistributedSection(coordinator_address=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    )
    found = implicit_numbers(0, int(sys.argv[4]), times=3) if len(sys.argv) > 4 else numbers(0)
    if jax.process_index() == 0:
        np.savez(sys.argv[3], **found)
