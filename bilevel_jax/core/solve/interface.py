"""The one form of all solvers: what `run` and `value` check, compile, and refuse."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.core.solve.arrays import Inputs, check_arguments, check_floating, signature
from bilevel_jax.core.solve.solution import BilevelSolver, Solution, Status, is_traced, raise_for_status
from bilevel_jax.core.training import ONE_DEVICE, Devices
from bilevel_jax.core.types import Checks, Problem, Scalar, Stream

NO_DERIVATIVE_OF_RUN = (
    "a solver's `run` returns derivatives and has none itself. Differentiate `solver.value` for jax.grad; a second "
    "derivative through a training run is not supported."
)
NO_DERIVATIVE_OF_VALUE = (
    "this method moves parameters and weights together, so its end has no hypergradient. For one, use unroll, implicit "
    "or penalty."
)


NO_DERIVATIVE_OVER_COPIES = (
    "JAX transposes a sum over the axis once for each device under pmap, vmap and shard_map(check_vma=False): "
    "derivatives of `value` would be wrong by that factor. Take `run(...).grad` there, or a typed shard_map."
)


class Method(NamedTuple):
    """A bilevel method, as `build_solver` makes a solver of it."""

    solve: Callable[[Inputs], Solution]
    """On arrays; a pure function."""
    evaluate: Callable[[Inputs], Scalar]
    """On arrays: L_v alone."""
    solve_streams: Callable[[Inputs], Solution]
    """The same on streams, with a Python loop."""
    evaluate_streams: Callable[[Inputs], Scalar]
    diagnose: Callable[[Inputs, Status], None] = lambda inputs, status: None
    """Raises a sentence that says more of a bad status of arrays, where there is one."""


def build_solver(
    problem: Problem,
    method: Method,
    *,
    estimand: str,
    is_retrained: bool = True,
    batch_size: int | None = None,
    has_gradient: bool = True,
    devices: Devices = ONE_DEVICE,
) -> BilevelSolver:
    """The solver of a method: arrays run as one compiled program, streams by a Python loop."""
    solve = _explain_missing_key(
        jax.jit(_refuse_derivatives(lambda inputs: _split_checks(method.solve(inputs)), NO_DERIVATIVE_OF_RUN))
    )
    evaluate = method.evaluate if has_gradient else _refuse_derivatives(method.evaluate, NO_DERIVATIVE_OF_VALUE)
    compiled_value = _explain_missing_key(jax.jit(evaluate))
    checked: set[tuple] = set()

    def compiled(inputs: Inputs) -> Solution:
        solution, checks = solve(inputs)
        return solution._replace(checks=jax.tree.map(np.asarray, Checks())._replace(**checks))

    def check(inputs: Inputs) -> bool:
        """Refuse what cannot be used; whether the data are streams."""
        shapes = signature(inputs)
        if shapes in checked:
            return False
        if isinstance(inputs.train, Stream) or isinstance(inputs.valid, Stream):
            _check_streams(problem, inputs)
            return True
        check_arguments(problem, inputs, batch_size=batch_size, hyper_is_optional=not has_gradient)
        checked.add(shapes)
        return False

    def run(
        params: Any, hyper: Any, train: Any, valid: Any, *, frozen: Any = (), model_state: Any = (), key: Any = None,
        throw: bool = True,
    ) -> Solution:  # fmt: skip
        inputs = Inputs(params, hyper, train, valid, frozen, model_state, key)
        is_stream = check(inputs)
        solution = method.solve_streams(inputs) if is_stream else compiled(inputs)
        if is_stream and not float(jnp.sum(inputs.valid.batch(0)["num_examples"])) > 0:
            solution = solution._replace(status=jnp.asarray(Status.EMPTY, jnp.int32))
        if throw and not is_traced(solution.status) and (status := int(solution.status)) != Status.OK:
            if not is_stream:
                method.diagnose(inputs, Status(status))
            raise_for_status(solution.status)
        return solution._replace(start=params, hyper=hyper if has_gradient else solution.hyper)

    @jax.custom_vjp
    def differentiable_value(params, hyper, others):
        return compiled_value(Inputs(params, hyper, *others))

    def value_forward(params, hyper, others):
        if not devices.know_copies():
            raise ValueError(NO_DERIVATIVE_OVER_COPIES)
        perturbed = [leaf.perturbed for leaf in jax.tree.leaves(others, is_leaf=_is_primal) if _is_primal(leaf)]
        if any(perturbed):
            raise ValueError(
                "`value` has derivatives by params and hyper alone. To differentiate by the data or by what is frozen, "
                "make it part of hyper: bj.problem(inner, outer)."
            )
        strip = partial(jax.tree.map, lambda leaf: leaf.value if _is_primal(leaf) else leaf, is_leaf=_is_primal)
        solution = compiled(Inputs(strip(params), strip(hyper), *strip(others)))
        return solution.value, (solution.grad_start, solution.grad, strip(others))

    def value_backward(residuals, cotangent):
        grad_start, grad, others = residuals
        scale = partial(jax.tree.map, lambda leaf: leaf * cotangent)
        return scale(grad_start), scale(grad), jax.tree.map(lambda leaf: None, others)

    differentiable_value.defvjp(value_forward, value_backward, symbolic_zeros=True)

    def value(
        params: Any, hyper: Any, train: Any, valid: Any, *, frozen: Any = (), model_state: Any = (), key: Any = None
    ) -> Scalar:
        inputs = Inputs(params, hyper, train, valid, frozen, model_state, key)
        if check(inputs):
            return method.evaluate_streams(inputs)
        if not has_gradient:
            return compiled_value(inputs)
        return differentiable_value(params, hyper, tuple(inputs[2:]))

    return BilevelSolver(run, value, estimand, is_retrained, problem.per_example)


def _split_checks(solution: Solution) -> tuple[Solution, dict[str, Any]]:
    """The checks that apply, apart: under `jax_debug_nans` a compiled program must not return nan for the others."""
    checks = {
        name: check
        for name, check in solution.checks._asdict().items()
        if not (isinstance(check, float) and np.isnan(check))
    }
    return solution._replace(checks=jax.tree.map(lambda _: 0, solution.checks)), checks


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed") and hasattr(leaf, "value")


def _check_streams(problem: Problem, inputs: Inputs) -> None:
    for name, stream in (("train", inputs.train), ("valid", inputs.valid)):
        if not isinstance(stream, Stream):
            raise ValueError(f"{name} is {type(stream).__name__}; give streams for both, or arrays for both.")
        if stream.steps < 1:
            raise ValueError(f"{name} has no batches; give a stream of at least one.")
    check_floating("params", inputs.params)
    check_floating("hyper", inputs.hyper)
    if any(is_traced(leaf) for leaf in jax.tree.leaves((inputs.params, inputs.hyper))):
        raise ValueError("streams are read by a Python loop, which does not run under jit, vmap or grad: give arrays.")
    if problem.per_example and jnp.ndim(inputs.hyper) != 1:
        raise ValueError(f"weights {jnp.shape(inputs.hyper)}; give one for each training example.")


def _explain_missing_key(function: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    """The function, with a clear error where a loss reads a key that its batch does not have."""

    def call(inputs: Inputs) -> Any:
        try:
            return function(inputs)
        except KeyError as error:
            if error.args != ("key",):
                raise
            raise ValueError(
                'a loss reads batch["key"], which is not there: training batches have it where run is given '
                "key=jax.random.key(0), and validation batches never, so that L_v has no noise."
            ) from error

    return call


def _refuse_derivatives(function: Callable[[Inputs], Any], reason: str) -> Callable[[Inputs], Any]:
    """The function, with a clear error where JAX would differentiate through it."""
    refusing = jax.custom_jvp(function)

    @refusing.defjvp
    def jvp(primals, tangents):
        raise ValueError(reason)

    return refusing
