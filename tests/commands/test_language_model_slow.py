"""The hypergradient of a real language model: longer runs, the other layouts, and a solve by another road."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel_jax.core import certify, curvature, solvers
from bilevel_jax.core.checkpointing import single_replay_plan, store_all_plan
from bilevel_jax.core.implicit import implicit_estimator
from bilevel_jax.core.training import train
from bilevel_jax.core.types import CheckpointPlan
from bilevel_jax.core.unrolled import check_differentiable, unrolled_estimator, validation_loss_fn
from bilevel_jax.lm.models import balance_adapters
from bilevel_jax.runs.infra.placement import make_mesh, replicate
from tests.core.problems import relative
from tests.runs.problems_lm import Rows, Setting, adamw, reviews, setting, stories, summed, tokenized

pytestmark = pytest.mark.slow

RATES = {0: 3e-4, 1: 1e-3, 4: 1e-3}  # LoRA rank (0: all parameters) -> a smooth learning rate
RANKS = (0, 4)


def rows(shared, count: int = 13) -> Rows:
    texts = stories(shared, count - count // 2) + reviews(shared, count // 2)
    return tokenized(shared, texts, reviews(shared, 16, skip=1000), max_length=24)


def problem(data: Rows, shared, rank: int, **options) -> Setting:
    options = {"steps": 6, "batch": 8, "micro": 2, **options}
    longer = data._replace(length=2 * data.length) if options.get("packing") else data
    optimizer = options.pop("optimizer", adamw(options["steps"], learning_rate=RATES[rank]))
    return setting(shared, longer, optimizer, lora_rank=rank, **options)


def swept(one: Setting, **options):
    w = jnp.ones(one.rows)
    step, run = one.trained(w, **options)
    return step, run, unrolled_estimator(one.problem, step)(run, w, one.fixed, one.train, one.validation)


@pytest.mark.parametrize("rank, eps_root, warmup", [(0, 1e-12, 10), (0, 1e-8, 2), (4, 1e-12, 2)])
def test_float32_differences_agree_on_a_smooth_run(rank, eps_root, warmup, shared):
    """Adam's first step is a sign, and bends where a gradient is below sqrt(eps_root): with all parameters, a warm-up
    of 2 steps and eps_root = 1e-12 the ratio is .90. A longer warm-up or a larger eps_root makes little of that step.
    """
    optimizer = adamw(48, learning_rate=RATES[rank], eps_root=eps_root, warmup_steps=warmup)
    one = problem(rows(shared, 128), shared, rank, steps=48, batch=16, optimizer=optimizer)
    step, _, out = swept(one)
    value = validation_loss_fn(one.problem)

    def retrain(w):
        return float(value(train(step, one.start(), w, one.fixed, one.train).end.params, one.fixed, one.validation))

    ratios = certify.check_finite_differences(retrain, jnp.ones(one.rows), out.grad, (0.1, 0.03)).ratios
    assert np.abs(np.asarray(ratios) - 1).max() < 0.02  # measured .990 to 1.004
    assert out.checks.replayed


@pytest.mark.parametrize("rank", RANKS)
def test_every_layout_is_one_problem(rank, shared, x64):
    """Packed or not, in 1, 2, 4 or 8 micro-batches: L_v and entries of the whole run."""
    data, outs = rows(shared), []
    for packing, micro in ((False, 1), (False, 2), (False, 4), (False, 8), (True, 1), (True, 2)):
        outs.append(swept(problem(data, shared, rank, packing=packing, micro=micro, dtype=jnp.float64))[2])
    for out in outs[1:]:
        assert relative(out.value, outs[0].value) < 1e-13
        assert relative(out.grad, outs[0].grad) < 1e-10  # float64, other order of sums; measured 3e-11


@pytest.mark.parametrize("rank, packing", [(0, False), (4, True)])
def test_eight_devices_equal_one_in_float64(rank, packing, eight_devices, shared, x64):
    results = []
    for count in (1, len(eight_devices)):
        mesh = make_mesh(count)
        one = problem(rows(shared, 37), shared, rank, steps=4, batch=32, packing=packing, dtype=jnp.float64, mesh=mesh)
        assert one.train.batch(0)["tokens"].shape[1] == (8 if packing else 16)
        w = replicate(mesh, jnp.ones(one.rows))
        step, run = one.trained(w)
        out = unrolled_estimator(one.problem, step)(run, w, one.fixed, one.train, one.validation)
        assert out.checks.replayed and len(out.grad.sharding.device_set) == count
        results.append(jax.device_get(out.grad))
    assert relative(*results) < 1e-10  # float64, other order of sums


@pytest.mark.parametrize("rank", RANKS)
def test_kept_states_and_snapshots_change_no_bit(rank, shared):
    one = problem(rows(shared), shared, rank, packing=True)
    reference = swept(one, plan=store_all_plan(one.train.steps))[2]
    for keep in (single_replay_plan(one.train.steps, 2), single_replay_plan(one.train.steps, 4), CheckpointPlan(1, 2)):
        out = swept(one, plan=keep)[2]
        assert out.checks == reference.checks
        np.testing.assert_array_equal(out.grad, reference.grad)


def test_the_default_optimizer_is_differentiable_and_eps_root_0_is_refused(shared):
    """LoRA's A has a gradient of exactly 0 at the first step, as B = 0."""
    for eps_root in (1e-12, 0.0):
        optimizer = adamw(6, learning_rate=RATES[4], eps_root=eps_root)
        one = problem(rows(shared), shared, 4, optimizer=optimizer)
        w = jnp.ones(one.rows)
        step, run = one.trained(w)
        if eps_root:
            check_differentiable(step, optimizer, run, w, one.fixed, one.train)
        else:
            with pytest.raises(ValueError, match="eps_root > 0"):
                check_differentiable(step, optimizer, run, w, one.fixed, one.train)


def test_conjugate_gradients_solve_what_dense_solves(shared, x64):
    """Rank 1, so that the Gauss-Newton matrix of all adapters can be formed."""
    data = rows(shared)
    one = problem(data, shared, 1, prior=1.0, dtype=jnp.float64)
    w = jnp.ones(one.rows)
    run = one.trained(w)[1]
    run = run._replace(end=run.end._replace(params=balance_adapters(run.end.params)))
    product, stream = curvature.gauss_newton(one.problem, one.loss), summed(data, 16)
    dense, cg = (
        implicit_estimator(one.problem, product, solver)(run, w, one.fixed, stream, one.validation)
        for solver in (solvers.dense(), solvers.cg(tolerance=1e-10, max_steps=1000))
    )
    assert dense.checks.curvature > 0.99  # the prior's 1 and a positive semi-definite rest
    assert relative(cg.grad, dense.grad) < 1e-8  # the solve's 1e-10 times its condition number
    np.testing.assert_allclose(cg.checks.gap, dense.checks.gap, rtol=1e-8)
