"""The exact hypergradient of a real language model on real rows: full parameters and LoRA, padded, packed, spread."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from bilevel_jax.core import certify, curvature, solvers, tree
from bilevel_jax.core.checkpointing import store_all_plan
from bilevel_jax.core.implicit import implicit_estimator
from bilevel_jax.core.training import scan, train, train_step, trajectory_from_params
from bilevel_jax.core.types import PADDING, Adjoint, Estimate, Params, TrainStep, Trajectory
from bilevel_jax.core.unrolled import unrolled_estimator, validation_loss_fn
from bilevel_jax.lm.models import balance_adapters
from bilevel_jax.lm.models.lora import Adapter
from bilevel_jax.runs.infra.placement import make_mesh, replicate
from tests.core.problems import relative
from tests.core.test_training import equations
from tests.runs.problems_lm import Rows, Setting, adamw, reviews, setting, stacked, stories, summed, tokenized

STEPS, BATCH, MICRO = 6, 8, 2  # 13 rows: two steps an epoch, the second with three empty slots; three epochs


class Mode(NamedTuple):
    """What is trained."""

    lora_rank: int
    packing: bool
    learning_rate: float
    """Smooth in runs of 48 steps and more, as test_language_model_slow shows."""
    eps_root: float = 1e-12
    """With LoRA's B = 0 the first steps meet gradients near sqrt(1e-12), where Adam bends too much for a difference."""

    def __str__(self):
        return f"{f'lora {self.lora_rank}' if self.lora_rank else 'full'}{', packed' if self.packing else ''}"


MODES = [Mode(0, False, 3e-4), Mode(4, True, 3e-3, 1e-8)]
FULL, LORA = MODES


@cache
def rows(shared: Path) -> Rows:
    return tokenized(shared, stories(shared, 8) + reviews(shared, 5), stories(shared, 6, skip=20), max_length=24)


@cache
def problem(shared: Path, mode: Mode, *, micro: int = MICRO, prior: float = 0.0, x64: bool = True) -> Setting:
    data = rows(shared)
    data = data._replace(length=2 * data.length) if mode.packing else data  # two examples to a row
    optimizer = adamw(STEPS, learning_rate=mode.learning_rate, eps_root=mode.eps_root)
    return setting(
        shared, data, optimizer, steps=STEPS, batch=BATCH, micro=micro,
        lora_rank=mode.lora_rank, packing=mode.packing, prior=prior, dtype=jnp.float64 if x64 else jnp.float32,
    )  # fmt: skip


def weights(size: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).uniform(0.2, 2, size), jnp.result_type(float))


class Swept(NamedTuple):
    """A training run and its estimate."""

    setting: Setting
    step: TrainStep
    weights: jax.Array
    run: Trajectory
    estimate: Estimate

    def retrain(self, w) -> float:
        """L_v of the model trained with other weights."""
        one = self.setting
        run = train(self.step, one.start(), w, one.fixed, one.train)
        return float(validation_loss_fn(one.problem)(run.end.params, one.fixed, one.validation))

    def ratios(self, steps) -> np.ndarray:
        """Differences of retrained L_v along w sign(grad), over what the estimate predicts."""
        return np.asarray(
            certify.check_finite_differences(self.retrain, self.weights, self.estimate.grad, steps).ratios
        )


@cache
def swept(shared: Path, mode: Mode, *, micro: int = MICRO, x64: bool = True) -> Swept:
    one = problem(shared, mode, micro=micro, x64=x64)
    w = weights(one.rows)
    step, run = one.trained(w)
    return Swept(one, step, w, run, unrolled_estimator(one.problem, step)(run, w, one.fixed, one.train, one.validation))


def test_the_run_holds_every_trap(shared):
    """Empty slots, two micro-batches, repeated epochs, packing, examples cut short and examples of their own length."""
    for mode in MODES:
        batches = stacked(problem(shared, mode, x64=False).train)
        seen = batches["index"][batches["index"] != PADDING]
        assert batches["index"].shape == (STEPS, MICRO, BATCH // MICRO) and (batches["index"] == PADDING).sum() == 9
        assert (np.bincount(seen) == 3).all() and batches["segments"].max() == (2 if mode.packing else 1)
    assert {16, 24} <= set(rows(shared).train.lengths.tolist())


@pytest.mark.slow  # finite differences below, and a smaller model in tests/lm/test_objectives.py, are not
@pytest.mark.parametrize("mode", [FULL, LORA], ids=str)
def test_equals_reverse_mode_through_a_scan(mode, shared, x64):
    one, step, w, _, out = swept(shared, mode)
    held_out = [jax.tree.map(lambda leaf: leaf[0], one.validation.batch(i)) for i in range(one.validation.steps)]

    @jax.jit
    def oracle(w, fixed, start, batches, held_out):
        def value(w):
            end = scan(step, start, w, fixed, batches)
            return sum(one.problem.outer(end.params, fixed, micro) for micro in held_out)

        return jax.value_and_grad(value)(w)

    value, grad = oracle(w, one.fixed, one.start(), stacked(one.train), held_out)
    assert relative(out.grad, grad) < 1e-11  # float64; measured 2e-14
    assert relative(out.validation_loss, value) < 1e-13
    assert out.checks.replayed and (out.grad != 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [FULL, LORA], ids=str)
def test_equals_finite_differences(mode, shared, x64):
    """Central differences: the error falls as the square of the step, until the rounding of float64.

    The steps are small because the first Adam steps are close to signs: gradients near sqrt(eps_root) bend.
    """
    largest = 1e-4 if mode.eps_root < 1e-8 else 1e-3
    errors = np.abs(swept(shared, mode).ratios([largest / 10**power for power in range(4)]) - 1)
    assert errors.min() < 1e-6
    falls = (errors[:-1] / errors[1:])[errors[:-1] > 1e-6]  # above the noise
    assert len(falls) >= 2 and (falls > 80).all() and (falls < 120).all()


@pytest.mark.parametrize("mode", [FULL, LORA], ids=str)
@pytest.mark.slow
def test_float32_is_enough(mode, shared):
    """float32 against float64, and against differences of the float32 program itself."""
    single = swept(shared, mode, x64=False)
    with jax.enable_x64(True):
        double = swept(shared, mode)
        reference, bent = np.asarray(double.estimate.grad), double.ratios([0.1])
    assert single.estimate.grad.dtype == jnp.float32
    grad = np.asarray(single.estimate.grad, np.float64)
    assert relative(grad, reference) < 5e-3
    assert np.vdot(grad, reference) / np.linalg.norm(grad) / np.linalg.norm(reference) > 0.9999
    assert abs(single.ratios([0.1]) - bent) < 0.02  # at smaller steps L_v's rounding drowns the difference
    assert abs(bent - 1) < 0.05  # in six steps the first, close to a sign, counts for much: a curve, not an error


@pytest.mark.slow  # tests/lm/test_objectives.py has every layout of a step
def test_packing_and_micro_batches_change_nothing(shared, x64):
    results = []
    for packing, micro in ((False, 1), (False, 8), (True, 1)):
        one, step, w, _, out = swept(shared, FULL._replace(packing=packing), micro=micro)
        batch = one.train.batch(1)  # a step with empty slots
        assert len(batch["tokens"]) == micro and (batch["tokens"].shape[1] < BATCH // micro) == packing
        info = step.forward(one.start(), step.gather(w, batch), one.fixed, batch)[1]
        results.append((info.loss, info.grad, out.validation_loss, out.grad))
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            assert relative(ours, theirs) < 1e-12  # float64, other order of sums


@pytest.mark.slow  # tests/runs/test_select.py has the same for the command, with the embedded model
def test_eight_devices_equal_one(eight_devices, shared):
    """Examples spread over devices, parameters on each of them: L_v, gradient and entries of one device."""
    results = []
    for count in (1, len(eight_devices)):
        mesh = make_mesh(count)
        optimizer = adamw(4, learning_rate=FULL.learning_rate)
        one = setting(shared, rows(shared), optimizer, steps=4, batch=16, micro=2, mesh=mesh)
        w = replicate(mesh, weights(one.rows))
        step, run = one.trained(w, plan=store_all_plan(one.train.steps))
        out = unrolled_estimator(one.problem, step)(run, w, one.fixed, one.train, one.validation)
        assert len(out.grad.sharding.device_set) == count
        results.append(jax.device_get((out.validation_loss, run.gradient(0), out.grad)))
    # float32, other order of sums; where a gradient is near 0 Adam makes the more of it (measured 0, 2e-6, 9e-4).
    # In float64 the entries agree to 1e-10: test_language_model_slow.
    for one_device, eight, bound in zip(*results, (1e-6, 2e-5, 5e-3), strict=True):
        assert relative(eight, one_device) < bound


# ---- implicit Gauss-Newton


def with_prior(shared: Path, mode: Mode) -> tuple[Setting, Params]:
    """The problem with a prior, and the parameters after the short training."""
    return problem(shared, mode, prior=1.0), swept(shared, mode).run.end.params


@pytest.mark.slow
@pytest.mark.parametrize("mode", [FULL, LORA], ids=str)
def test_gauss_newton_is_symmetric_and_positive(mode, shared, x64):
    one, params = with_prior(shared, mode)
    product = curvature.gauss_newton(one.problem, one.loss)
    stream, w = summed(rows(shared), 2 * BATCH), weights(one.rows)
    keys = jax.random.split(jax.random.key(3), 4)
    flat, unravel = ravel_pytree(params)
    vectors = [unravel(jax.random.normal(key, flat.shape)) for key in keys]
    products = [product(params, w, one.fixed, stream, v) for v in vectors]
    table = np.array([[optax.tree.vdot(u, Av) for Av in products] for u in vectors])
    np.testing.assert_allclose(table, table.T, rtol=1e-11, atol=1e-11 * table.max())  # float64
    sizes = np.array([optax.tree.vdot(v, v) for v in vectors])
    assert (np.diag(table) > sizes).all()  # the prior's share, and something positive on top


@pytest.mark.slow
def test_implicit_does_not_depend_on_the_gauge(shared, x64):
    """(s A, B / s) is the same model: after `balance` it has the same entries, without it other ones."""
    one, params = with_prior(shared, LORA)
    product = curvature.gauss_newton(one.problem, one.loss)
    estimator = implicit_estimator(one.problem, product, solvers.cg(tolerance=1e-7, max_steps=1000))
    stream, w = summed(rows(shared), 2 * BATCH), weights(one.rows)
    other = {"lora": {name: Adapter(3 * x.a, x.b / 3, x.scale) for name, x in params["lora"].items()}}

    def estimate(params) -> Estimate:
        out = estimator(trajectory_from_params(params), w, one.fixed, stream, one.validation)
        assert out.checks.residual < 1e-6 and out.checks.curvature > 0
        return out

    canonical = jax.jit(balance_adapters)
    balanced = estimate(canonical(params))
    assert (
        relative(estimate(canonical(other)).grad, balanced.grad) < 1e-5
    )  # the solve's 1e-7 times its condition number
    assert relative(estimate(other).grad, balanced.grad) > 0.01

    @jax.jit
    def slope(params, v):
        """<v, grad of inner + prior>: what `gap` says."""
        micro = jax.tree.map(lambda leaf: leaf[0], stream.batch(0))

        def objective(params):
            return one.problem.inner(params, one.problem.gather(w, micro), one.fixed, micro) + one.problem.prior(
                params, one.fixed
            )

        return jax.jvp(objective, (params,), (v,))[1]

    np.testing.assert_allclose(balanced.checks.gap, slope(canonical(params), balanced.direction), rtol=1e-9)


# ---- what the compiled steps are made of


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_products_are_precise_and_nothing_has_the_size_of_the_table(mode, shared):
    one = problem(shared, mode, x64=False)
    many = 10_007  # rows of the table
    step, state, batch = train_step(one.problem, one.optimizer), one.start(), one.train.batch(0)
    part = one.problem.gather(weights(many), batch)
    adjoint = Adjoint(one.params, tree.inexact_leaves(state.opt_state))
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    for traced in (
        jax.make_jaxpr(step.forward)(state, part, one.fixed, batch),
        jax.make_jaxpr(step.backward)(state, one.params, part, one.fixed, batch, adjoint),
    ):
        products = [e for e in equations(traced.jaxpr) if e.primitive.name == "dot_general"]
        assert len(products) > 20 and {e.params["precision"] for e in products} == {highest}
        shapes = {v.aval.shape for e in equations(traced.jaxpr) for v in (*e.invars, *e.outvars)}
        assert not [shape for shape in shapes if many in shape]


def test_each_step_is_traced_once(shared):
    one, traces = problem(shared, LORA, x64=False), []
    inner = one.problem.inner

    def counted(params, weights, fixed, batch):
        traces.append(1)
        return inner(params, weights, fixed, batch)

    one = one._replace(problem=one.problem._replace(inner=counted))
    step, run = one.trained(weights(one.rows))
    estimator = unrolled_estimator(one.problem, step)
    estimator(run, weights(one.rows), one.fixed, one.train, one.validation)
    first = len(traces)
    estimator(run, 0.5 * weights(one.rows), one.fixed, one.train, one.validation)
    assert len(traces) == first <= 6  # forward and backward, each through a scan that jax may trace more than once
