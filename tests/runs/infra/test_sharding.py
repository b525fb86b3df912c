"""Parameters split over devices: by which rules, how much of them a device keeps, and what is brought together when."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.core import tree, weightings
from bilevel_jax.core.problem import weighted
from bilevel_jax.core.training import init_train_state, train_step
from bilevel_jax.core.types import Adjoint
from bilevel_jax.lm import models
from bilevel_jax.lm.data import batches
from bilevel_jax.runs.config.schema import ObjectiveSection, OptimizerSection
from bilevel_jax.runs.infra import sharding
from bilevel_jax.runs.infra.placement import (
    BATCH_SPEC,
    MIN_SHARDED_TABLE_SIZE,
    SHARDED_TABLE_MULTIPLE,
    align_layout,
    make_mesh,
    padded_table_size,
    place_stream,
    place_table,
    replicate_unplaced,
)
from bilevel_jax.runs.tasks.objective import build_objective
from bilevel_jax.runs.tasks.optimizers import build_optimizer
from tests.runs.engine.agreement import SHAPE, corpus

MANY = 10_000_003


@pytest.fixture
def mesh(eight_devices):
    return make_mesh(2, 4)


def kept(some) -> tuple[int, int]:
    """(bytes on the first device, bytes in all) of some arrays."""
    leaves = jax.tree.leaves(some)
    here = [shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards if shard.device.id == 0]
    return sum(here), sum(leaf.nbytes for leaf in leaves)


def collectives(compiled, kind: str) -> list[int]:
    """The number of entries of each array that a collective of this kind makes."""
    found = re.findall(rf"= (\(?[^=]*?\)?) {kind}(?:-start)?\(", compiled.as_text())
    shapes = [dims for each in found for dims in re.findall(r"\w+\[([\d,]*)\]", each)]
    return [int(np.prod([int(one) for one in dims.split(",") if one])) for dims in shapes]


@pytest.mark.slow
def test_a_device_keeps_its_part_through_a_step_and_its_transpose(mesh):
    """Of parameters, moments, gradient and adjoint; and no more than one layer is brought together at a time."""
    split = sharding.parse_sharding_rules((), mesh)
    decoder = models.make_decoder(SHAPE, gather_params=sharding.parameter_gatherer(mesh, split))
    params = sharding.shard_tree(mesh, split, models.init_params(SHAPE, jax.random.key(0)))
    assert sharding.find_unsharded(mesh, split, params) == []
    problem = weighted(build_objective(ObjectiveSection(), decoder, lora=False).losses)
    adamw = build_optimizer(OptimizerSection(learning_rate=1e-3, warmup_steps=0), 2)
    step, state = train_step(problem, adamw), replicate_unplaced(mesh, init_train_state(adamw, params))
    layout = align_layout(mesh, batches.BatchShape(1, 16, 16, 8))
    batch = place_stream(
        mesh, batches.make_train_stream(corpus(20, 1), batches.shuffled_order(20, 16, 0), 1, layout)
    ).batch(0)
    fixed, part = {"base": None, "start": None}, step.gather(place_table(mesh, jnp.ones(20)), batch)
    after, info = step.forward(state, part, fixed, batch)
    adjoint = Adjoint(info.grad, tree.inexact_leaves(jax.tree.map(jnp.zeros_like, state.opt_state)))
    back, _ = step.backward(state, info.grad, part, fixed, batch, adjoint)
    for some in (state, after, info.grad, back):
        here, all_of_it = kept(some)
        assert here < 0.3 * all_of_it  # a quarter, and the norms
    step.forward(after, part, fixed, batch)
    assert step.forward._cache_size() == 1  # what comes out lies as what went in
    largest = max(leaf.size for leaf in jax.tree.leaves(params["layers"])) // SHAPE.layers
    for program, arguments in (
        (step.forward, (state, part, fixed, batch)),
        (step.backward, (state, info.grad, part, fixed, batch, adjoint)),
    ):
        gathered = collectives(program.lower(*arguments).compile(), "all-gather")
        assert gathered and max(gathered) <= max(largest, params["embed"].size)


def test_no_program_brings_a_table_of_ten_million_rows_together(mesh, eight_devices):
    """Reading and adding a batch's entries, the weights, their transpose, the step on them; shapes alone."""
    size = padded_table_size(MANY)
    assert MANY <= size < MANY + SHARDED_TABLE_MULTIPLE and size % 8 == 0
    rows = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    table = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=rows)
    assert place_table(mesh, np.ones(MIN_SHARDED_TABLE_SIZE, np.float32)).sharding == rows
    problem, chosen = weighted(lambda params, fixed, batch: batch["num_examples"]), weightings.softmax(MANY, size)
    spread = jax.NamedSharding(mesh, BATCH_SPEC)
    batch = {"index": jax.ShapeDtypeStruct((2, 64), jnp.int32, sharding=spread)}
    entries = jax.ShapeDtypeStruct((2, 64), jnp.float32, sharding=spread)
    descend = weightings.normalized_gradient_step(0.1, 2.0)
    programs = [
        (problem.gather, (table, batch), {}),
        (problem.scatter_add, (table, batch, entries), {"donate_argnums": 0}),
        (chosen.weights, (table,), {}),
        (lambda hyper, grad: weightings.weighting_vjp(chosen, hyper, grad), (table, table), {}),
        (descend, (table, table), {}),
        (weightings.effective_sample_size, (table,), {}),
    ]
    for function, arguments, options in programs:
        compiled = jax.jit(function, **options).lower(*arguments).compile()
        moved = [n for kind in ("all-gather", "all-reduce", "all-to-all") for n in collectives(compiled, kind)]
        assert max(moved, default=0) <= 2 * 64, function
        out = jax.tree.leaves(compiled.output_shardings)[0]
        assert function in (problem.gather, weightings.effective_sample_size) or out.is_equivalent_to(rows, 1)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_the_end_of_a_longer_table_has_no_weight(name):
    make = {"softmax": weightings.softmax, "sigmoid": weightings.sigmoid}[name]
    hyper = jax.random.normal(jax.random.key(0), (11,))
    longer = jnp.pad(hyper, (0, 5), constant_values=3.0)
    weights = make(11, 16).weights(longer)
    np.testing.assert_allclose(weights[:11], make(11).weights(hyper), rtol=1e-6)
    assert (weights[11:] == 0).all() and make(11, 16).init().shape == (16,)
    pulled = weightings.weighting_vjp(make(11, 16), longer, jnp.arange(16.0))
    np.testing.assert_allclose(
        pulled[:11], weightings.weighting_vjp(make(11), hyper, jnp.arange(11.0)), rtol=1e-4, atol=1e-5
    )
    assert (pulled[11:] == 0).all()


def test_own_rules_come_first_and_wrong_ones_are_told(mesh):
    rules = sharding.parse_sharding_rules(["layers/down_proj/kernel = - fsdp -", "head = -"], mesh)
    params = jax.eval_shape(lambda: models.init_params(SHAPE, jax.random.key(0)))
    where = jax.tree.map(lambda at: at.spec, sharding.make_shardings(mesh, rules, params))
    assert where["layers"]["down_proj"]["kernel"] == jax.P(None, "fsdp") and where["head"] == jax.P()
    assert where["layers"]["up_proj"]["kernel"] == jax.P(None, None, "fsdp") and where["norm"]["scale"] == jax.P()
    for rule in ("head", "head = rows", "( = model", "= model"):
        with pytest.raises(ValueError, match="mesh.sharding_rules: .*(is no rule|no regular expression)"):
            sharding.parse_sharding_rules([rule], mesh)
    with pytest.raises(ValueError, match=r"norm/scale has 1 axes \[16\], and its rule 2"):
        sharding.make_shardings(mesh, sharding.parse_sharding_rules(["norm/scale = - fsdp"], mesh), params)


def test_what_does_not_divide_stays_whole_and_is_named(eight_devices):
    mesh = make_mesh(1, 3)
    split = sharding.parse_sharding_rules((), mesh)
    params = jax.eval_shape(lambda: models.init_params(SHAPE, jax.random.key(0)))
    assert "embed" in sharding.find_unsharded(mesh, split, params)
    assert sharding.make_shardings(mesh, split, params)["embed"].spec == jax.P()


@pytest.mark.parametrize("data, model, words", [(0, 3, "groups of 3"), (8, 2, "there are 8 devices")])
def test_a_mesh_that_does_not_fit_is_refused(data, model, words, eight_devices):
    with pytest.raises(ValueError, match=words):
        make_mesh(data, model)
