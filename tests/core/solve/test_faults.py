"""What the solvers refuse in one sentence, and the status of what they cannot solve."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel_jax.core import certify, single_loop, weightings
from bilevel_jax.core.problem import problem as global_problem
from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.solve.hypergradient import hypergradient
from bilevel_jax.core.solve.implicit import implicit
from bilevel_jax.core.solve.jointly import jointly
from bilevel_jax.core.solve.penalty import penalty
from bilevel_jax.core.solve.solution import Status, raise_for_status
from bilevel_jax.core.solve.unroll import unroll
from bilevel_jax.core.solvers import cg, dense, identity, neumann
from bilevel_jax.core.streams import full_batch_stream, shuffled_stream
from bilevel_jax.core.types import Stream

N = 12
X, Y = np.linspace(-1, 1, 3 * N).reshape(N, 3), np.linspace(0, 1, N)
SGD = optax.sgd(0.1)


def losses(params, frozen, batch):
    return 0.5 * (batch["data"][0] @ params - batch["data"][1]) ** 2


def plain_losses(params, data):
    return losses(params, (), {"data": data})


PLAIN, RIDGE = weighted(losses), weighted(losses, prior=proximal(0.5))
STATEFUL = weighted(lambda p, s, f, b: (losses(p, f, b), s + 1), outer=lambda p, s, f, b: losses(p, f, b), has_state=True)  # fmt: skip  # noqa: E501


def run(solver=None, **changes):
    """A run with some of its arguments changed."""
    arguments = {"params": jnp.zeros(3), "hyper": jnp.ones(N), "train": (X, Y), "valid": (X[:4], Y[:4])} | changes
    return (unroll(PLAIN, SGD, steps=3) if solver is None else solver).run(**arguments)


def face(**changes):
    settings = {"optimizer": SGD, "steps": 3} | changes
    return hypergradient(plain_losses, jnp.zeros(3), (X, Y), (X, Y), **settings)


def shuffled(steps=3):
    return shuffled_stream((X, Y), 4, steps, seed=0)


def online(kind):
    return getattr(weightings, kind)(N)


def constant(value):
    return optax.constant_schedule(value)


def single(**changes):
    settings = {"validation_share": constant(0.5), "weights_learning_rate": constant(0.1)} | changes
    return single_loop.penalty(PLAIN, SGD, settings.pop("weights", online("online_sigmoid")), **settings)


SHARED = unroll(PLAIN, SGD, steps=3, axis_name="i")
SHARES = jnp.ones((4, 3)), (X.reshape(4, 3, 3), Y.reshape(4, 3)), (X[:4].reshape(4, 1, 3), Y[:4].reshape(4, 1))


def explicitly_split(array):
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    return jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows")))


def check_several():
    solver = unroll(PLAIN, SGD, steps=3)
    solutions = jax.vmap(lambda w: run(solver, hyper=w))(jnp.ones((2, N)))
    return certify.check(solver, solutions, (X, Y), (X[:4], Y[:4]))


MISUSES = {
    # settings
    "no steps": (lambda: unroll(PLAIN, SGD, steps=0), "steps = 0; give a whole number of at least 1"),
    "half a step": (lambda: unroll(PLAIN, SGD, steps=5.0), "steps = 5.0"),
    "steps that are true": (lambda: unroll(PLAIN, SGD, steps=True), "steps = True"),
    "batch of none": (lambda: unroll(PLAIN, SGD, steps=3, batch_size=0), "batch_size = 0"),
    "window of none": (lambda: unroll(PLAIN, SGD, steps=3, window=0), "window = 0"),
    "memory in words": (lambda: unroll(PLAIN, SGD, steps=3, memory="little"), "memory = 'little'; give a number"),
    "memory of one state": (lambda: unroll(PLAIN, SGD, steps=100, memory=1), "1 states are too few for 100 steps"),
    "steps without an optimizer": (lambda: implicit(RIDGE, steps=3), "both optimizer and steps"),
    "an optimizer without steps": (lambda: implicit(RIDGE, optimizer=SGD), "both optimizer and steps"),
    "a residual of 0": (lambda: implicit(RIDGE, max_residual=0), "max_residual = 0; give a number above 0"),
    "a negative penalty": (lambda: penalty(RIDGE, SGD, gamma=-1.0, steps=3), "gamma = -1.0"),
    "a penalty that is no number": (lambda: penalty(RIDGE, SGD, gamma=float("nan"), steps=3), "gamma = nan"),
    "a negative prior": (lambda: proximal(-1.0), "strength -1.0 of the prior; give a number of at least 0"),
    "a state without outer losses": (lambda: weighted(losses, has_state=True), "needs outer="),
    "competing weights shared out": (
        lambda: single(weights=online("online_softmax"), axis_name="i"), "weights that compete",
    ),
    "a single loop of a global variable": (
        lambda: jointly(global_problem(losses, losses), single(), steps=3), "single-loop methods weigh examples",
    ),
    # data
    "an order without a key": (lambda: run(unroll(PLAIN, SGD, steps=3, batch_size=5)), "give key=jax.random.key"),
    "a batch larger than the data": (
        lambda: run(unroll(PLAIN, SGD, steps=3, batch_size=99)), "batch_size 99 is more than the 12",
    ),
    "a validation batch larger than its data": (
        lambda: run(jointly(PLAIN, single(), steps=3, valid_batch_size=9), hyper=()), "9 is more than the 4 validation",
    ),
    "no examples": (lambda: run(train=(X[:0], Y[:0]), hyper=np.ones(0)), "train has no examples"),
    "no validation examples": (lambda: run(valid=(X[:0], Y[:0])), "valid has no examples"),
    "columns of two lengths": (lambda: run(train=(X, Y[:5])), "train: the arrays have different numbers of examples"),
    "validation columns of two lengths": (lambda: run(valid=(X, Y[:5])), "valid: the arrays have different numbers"),
    "a column of strings": (lambda: run(train=(X, np.array(["a"] * N))), r"train\[1\] is <U1"),
    "a list": (lambda: run(train=(X, [1.0, 2.0])), "arrays of numbers"),
    "a number for a column": (lambda: run(train=(X, np.float64(1))), r"train\[1\] is one number"),
    "nothing": (lambda: run(train=()), "train holds no arrays"),
    "a weight too few": (lambda: run(hyper=np.ones(N - 1)), r"weights \(11,\) for 12 training examples"),
    "two tables of weights": (lambda: run(hyper=(np.ones(N), np.ones(N))), "weights in 2 arrays for 12"),
    "integer weights": (lambda: run(hyper=np.ones(N, int)), "hyper is int64"),
    "boolean weights": (lambda: run(hyper=np.ones(N, bool)), "hyper is bool"),
    "integer parameters": (lambda: run(params=np.ones(3, int)), "params is int64"),
    "parameters in words": (lambda: run(params={"w": "large"}), r"params\['w'\] is str"),
    "no parameters": (lambda: run(params={}), "params holds no arrays"),
    "a seed for a key": (lambda: run(key=0), "key is int; give one key"),
    "many keys": (lambda: run(key=jax.random.split(jax.random.key(0), 3)), "give one key"),
    "a state that is missing": (lambda: run(unroll(STATEFUL, SGD, steps=3)), "give its first value as model_state="),
    "a state that is not asked for": (lambda: run(model_state=jnp.zeros(())), "model_state is given, but the problem"),
    "one loss for all examples": (
        lambda: run(unroll(weighted(lambda p, f, b: losses(p, f, b).mean()), SGD, steps=3)), "give one loss per",
    ),
    "one validation loss for all": (
        lambda: run(unroll(weighted(losses, outer=lambda p, f, b: losses(p, f, b).mean()), SGD, steps=3)),
        "validation losses .* of 4 examples",
    ),
    "too many parameters for a dense solve": (
        lambda: run(implicit(RIDGE, solver=dense(max_params=2))), "3 parameters are too many for the dense solver",
    ),
    "frozen words": (lambda: run(frozen={"name": "a"}), r"frozen\['name'\] is str; give arrays"),
    "a frozen function": (lambda: run(frozen=(losses,)), r"frozen\[0\] is function"),
    "an explicit mesh": (lambda: run(hyper=explicitly_split(jnp.ones(N))), "hyper is split over an explicit axis"),
    "derivatives over copies": (
        lambda: jax.vmap(jax.grad(SHARED.value, 1), (None, 0, 0, 0), axis_name="i")(jnp.zeros(3), *SHARES),
        r"`value` would be wrong by that factor. Take `run\(...\).grad`",
    ),
    "several solutions to check": (lambda: check_several(), "the solution holds 2 solutions; give one"),
    # streams
    "a stream and arrays": (lambda: run(train=shuffled()), "valid is tuple; give streams for both"),
    "a stream too short": (
        lambda: run(train=shuffled(2), valid=full_batch_stream((X, Y))), "train stream has 2 batches for 3 steps",
    ),
    "an empty stream": (lambda: run(train=shuffled(), valid=Stream(lambda t: {}, 0)), "valid has no batches"),
    "a stream under jit": (
        lambda: jax.jit(lambda w: run(hyper=w, train=shuffled(), valid=full_batch_stream((X, Y))).grad)(jnp.ones(N)),
        "does not run under jit",
    ),
    # one call
    "both estimands": (lambda: face(l2=1.0), "either optimizer .* or l2"),
    "neither": (lambda: face(optimizer=None, steps=None), "either optimizer .* or l2"),
    "steps of implicit differentiation": (lambda: face(optimizer=None, l2=1.0), "steps is of unrolled differentiation"),
    "a linear solver of unrolling": (lambda: face(solver=cg()), "solver is of implicit differentiation"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_one_sentence(name):
    call, words = MISUSES[name]
    with pytest.raises(ValueError, match=words) as raised:
        call()
    assert len(str(raised.value)) < 400 and "\n" not in str(raised.value)


def solved(solver, **changes):
    return run(solver, throw=False, **changes)


RIDGE_PARAMS = np.linalg.solve(X.T @ X / N + 0.5 * np.eye(3), X.T @ Y / N)
NAN_WEIGHT = np.where(np.arange(N) == 3, np.nan, 1.0)
SIGN = optax.chain(optax.scale_by_sign(), optax.sgd(0.1))
FAULTS = {
    "a NaN weight": (Status.NOT_FINITE, lambda: solved(None, hyper=NAN_WEIGHT)),
    "a NaN weight, implicit": (Status.NOT_FINITE, lambda: solved(implicit(RIDGE), hyper=NAN_WEIGHT)),
    "an infinite example": (Status.NOT_FINITE, lambda: solved(None, train=(X, np.where(Y > 0.9, np.inf, Y)))),
    "divergence": (Status.NOT_FINITE, lambda: solved(unroll(PLAIN, optax.sgd(1e9), steps=60))),
    "divergence of the penalty": (
        Status.NOT_FINITE, lambda: solved(penalty(RIDGE, optax.sgd(1e9), gamma=10.0, steps=60)),
    ),
    "divergence of a single loop": (
        Status.NOT_FINITE,
        lambda: solved(jointly(PLAIN, single_loop.mixing(PLAIN, optax.sgd(1e9), 0.5, N), steps=60), hyper=()),
    ),
    "a sign method": (Status.NOT_DIFFERENTIABLE, lambda: solved(unroll(PLAIN, SIGN, steps=3))),
    "lion": (Status.NOT_DIFFERENTIABLE, lambda: solved(unroll(PLAIN, optax.lion(0.1), steps=3))),
    "a rate of 0": (Status.NOT_DIFFERENTIABLE, lambda: solved(unroll(PLAIN, optax.sgd(0.0), steps=3))),
    "negative weights": (Status.NOT_POSITIVE_DEFINITE, lambda: solved(implicit(RIDGE), hyper=np.full(N, -9.0))),
    "negative weights, dense": (
        Status.NOT_POSITIVE_DEFINITE, lambda: solved(implicit(RIDGE, solver=dense()), hyper=np.full(N, -9.0)),
    ),
    "no weight and no prior": (Status.NOT_POSITIVE_DEFINITE, lambda: solved(implicit(PLAIN), hyper=np.zeros(N))),
    "too few products": (
        Status.NOT_SOLVED, lambda: solved(implicit(RIDGE, solver=cg(max_steps=1)), params=RIDGE_PARAMS),
    ),
    "too few terms": (
        Status.NOT_SOLVED,
        lambda: solved(implicit(RIDGE, solver=neumann(step_size=0.1, terms=3)), params=RIDGE_PARAMS),
    ),
    "too few steps of the penalty": (Status.NOT_SOLVED, lambda: solved(penalty(RIDGE, SGD, gamma=10.0, steps=2))),
    "not the minimizer": (Status.NOT_STATIONARY, lambda: solved(implicit(RIDGE), params=RIDGE_PARAMS + 0.3)),
    "no validation example in a stream": (
        Status.EMPTY,
        lambda: solved(None, train=shuffled(), valid=Stream(lambda t: empty_batch(), 1)),
    ),
}  # fmt: skip


def empty_batch():
    batch = full_batch_stream((X, Y)).batch(0)
    return {**batch, "index": jnp.full_like(batch["index"], 2**31 - 1), "num_examples": jnp.zeros(1)}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_has_its_status(name):
    status, call = FAULTS[name]
    solution = call()
    assert Status(int(solution.status)) == status
    with pytest.raises(FloatingPointError, match=f"^{status.name}: .*throw=False"):
        raise_for_status(solution.status)


def test_alignment_has_no_residual_to_judge():
    solution = run(implicit(RIDGE, solver=identity()), params=RIDGE_PARAMS)
    assert np.isnan(float(solution.checks.residual)) and int(solution.status) == Status.OK


def test_the_statuses_of_several_solutions():
    many = jax.vmap(lambda w: run(implicit(RIDGE), params=RIDGE_PARAMS, hyper=w).status)(
        jnp.stack([jnp.ones(N), jnp.full(N, -9.0), jnp.asarray(NAN_WEIGHT)])
    )
    assert many.tolist() == [Status.OK, Status.NOT_POSITIVE_DEFINITE, Status.NOT_FINITE]
    with pytest.raises(FloatingPointError, match=r"^NOT_FINITE \(1 of 3 solutions\)"):
        raise_for_status(many)


SOLVERS = {
    "unroll": lambda: unroll(PLAIN, optax.adam(0.05, eps_root=1e-12), steps=6),
    "window": lambda: unroll(PLAIN, optax.adam(0.05, eps_root=1e-12), steps=6, window=2),
    "implicit": lambda: implicit(RIDGE, optimizer=SGD, steps=200, solver=cg(tolerance=1e-12)),
    "penalty": lambda: penalty(RIDGE, optax.sgd(0.5), gamma=10.0, steps=80),
    "jointly": lambda: jointly(PLAIN, single(), steps=6),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_parameters_may_be_narrower_than_losses(name, dtype):
    solution = run(SOLVERS[name](), params=jnp.zeros(3, dtype), throw=False)
    assert solution.params.dtype == dtype and np.isfinite(solution.value)


@pytest.mark.parametrize("name", SOLVERS)
def test_arrays_and_streams_give_the_same(name):
    """One compiled scan, and the Python loop over the same batches."""
    train, valid = full_batch_stream((X, Y)), full_batch_stream((X[:4], Y[:4]))
    train = train if name in ("implicit", "penalty") else Stream(train.batch, 6)
    solver, hyper = SOLVERS[name](), jnp.linspace(0.5, 1.5, N)
    arrays = run(solver, hyper=hyper)
    streams = run(solver, hyper=hyper, train=train, valid=valid)
    for field in ("params", "value", "grad", "grad_start", "weights"):
        one, other = getattr(arrays, field), getattr(streams, field)
        assert jax.tree.structure(one) == jax.tree.structure(other)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), one, other)
    if name != "jointly":
        given = {"params": jnp.zeros(3), "hyper": hyper, "train": train, "valid": valid}
        np.testing.assert_allclose(solver.value(**given), arrays.value, rtol=1e-12)


def test_certificates_of_streams():
    solver, train = SOLVERS["unroll"](), Stream(full_batch_stream((X, Y)).batch, 6)
    valid = full_batch_stream((X[:4], Y[:4]))
    solution = run(solver, train=train, valid=valid)
    certificates = certify.check(solver, solution, train, valid, num_retrains=0)
    assert abs(certificates.finite_differences.ratios[2] - 1) < 1e-2


@pytest.mark.parametrize(
    "solver",
    [
        unroll(RIDGE, SGD, steps=3),
        implicit(RIDGE, solver=neumann(step_size=0.5, terms=60), optimizer=SGD, steps=200),
        penalty(RIDGE, SGD, gamma=100.0, steps=200),
    ],
    ids=["unroll", "implicit", "penalty"],
)
def test_nan_checks_of_jax_find_none_in_a_good_solution(solver):
    with jax.debug_nans(True):
        assert not run(solver).status
        gradient = jax.grad(solver.value, 1)(jnp.zeros(3), jnp.ones(N), (X, Y), (X[:4], Y[:4]))
        with pytest.raises(FloatingPointError):
            run(solver, hyper=NAN_WEIGHT)
    assert np.isfinite(gradient).all()


def test_settings_without_a_hash_build_a_solver_each_time():
    def grad(l2):
        return hypergradient(plain_losses, jnp.asarray(RIDGE_PARAMS), (X, Y), (X[:4], Y[:4]), l2=l2).grad

    expected = grad(0.5)
    assert np.array_equal(grad(jnp.array(0.5)), expected)
    assert np.allclose(jax.jit(grad)(0.5), expected, rtol=1e-10)
