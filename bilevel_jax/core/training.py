"""The differentiable training step and the training loops that repeat it."""

import re
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from bilevel_jax.core import checkpointing, tree
from bilevel_jax.core.problem import no_prior
from bilevel_jax.core.types import (
    PADDING,
    Adjoint,
    Batch,
    CheckpointPlan,
    Frozen,
    Hyper,
    HyperSlice,
    Linearization,
    ModelState,
    Params,
    Problem,
    PyTree,
    Scalar,
    StepMetrics,
    StoredStep,
    Stream,
    TrainState,
    TrainStep,
    Trajectory,
)

_ASKS_FOR_MORE = "required keyword-only argument|must be provided|to have a batch dimension"
"""What optax says where an update lacks the loss's value, its function, or the gradients of single examples."""


@dataclass(frozen=True)
class Devices:
    """Those that share the examples of one run, along an axis of pmap or shard_map; one device without an axis."""

    axis_name: str | None = None

    def count(self) -> int:
        """Known when a program is traced."""
        return jax.lax.axis_size(self.axis_name) if self.axis_name else 1

    def sum(self, parts: PyTree) -> PyTree:
        """The sum over devices, the same on each."""
        return jax.lax.psum(parts, self.axis_name) if self.axis_name else parts

    def mean(self, parts: PyTree) -> PyTree:
        """The mean over devices, the same on each."""
        return jax.lax.pmean(parts, self.axis_name) if self.axis_name else parts

    def all(self, condition: Array) -> Array:
        """Whether a condition holds on every device, the same on each."""
        if not self.axis_name:
            return condition
        return self.sum(self.make_local(jnp.where(condition, 0, 1))) == 0

    def max(self, part: Array) -> Array:
        """The largest of the devices' values, the same on each; of keys, which have no order, of their numbers."""
        if not self.axis_name:
            return part
        if jnp.issubdtype(part.dtype, jax.dtypes.prng_key):
            numbers = jax.lax.pmax(jax.random.key_data(part), self.axis_name)
            return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(part))
        return jax.lax.pmax(part, self.axis_name)

    def make_local(self, whole: PyTree) -> PyTree:
        """What all devices hold in common, typed as each device's own: jax.shard_map knows the difference, and would
        sum derivatives by it over the devices itself."""
        if not self.axis_name or not self._is_of_mesh():
            return whole

        def cast(leaf):
            try:
                return jax.lax.pcast(leaf, self.axis_name, to="varying")
            except ValueError:  # it is each device's own already
                return leaf

        return jax.tree.map(cast, whole)

    def know_copies(self) -> bool:
        """Whether JAX tells what is each device's own from what all hold in common, and so transposes a sum over
        devices once, not once for each device: under jax.shard_map, but with check_vma=False; never under pmap."""
        common = jnp.zeros(())
        return not self.axis_name or str(jax.typeof(self.make_local(common))) != str(jax.typeof(common))

    def _is_of_mesh(self) -> bool:
        """False under vmap, whose axes are of no mesh."""
        names = (self.axis_name,) if isinstance(self.axis_name, str) else self.axis_name or ()
        return set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes)

    def share(self, problem: Problem) -> Problem:
        """A device's share of a problem: the shares of all of them add up to the whole."""
        count = self.count()
        if count == 1:
            return problem
        prior, inner, outer = problem.prior, problem.inner, problem.outer
        problem = problem._replace(prior=lambda params, frozen: prior(params, frozen) / count)
        if problem.per_example:  # its losses are divided by the examples of all devices already
            return problem

        def inner_share(params: Params, hyper: Hyper, frozen: Frozen, batch: Batch) -> Any:
            if not problem.has_state:
                return inner(params, hyper, frozen, batch) / count
            loss, model_state = inner(params, hyper, frozen, batch)
            return loss / count, model_state

        return problem._replace(
            inner=inner_share, outer=lambda params, frozen, batch: outer(params, frozen, batch) / count
        )


ONE_DEVICE = Devices()


ProductPrecision = Literal["highest", "high", "default"]
"""Of the matrix products in a step back, as JAX names precisions."""


def train_step(
    problem: Problem, optimizer: optax.GradientTransformation, *, product_precision: ProductPrecision = "highest"
) -> TrainStep:
    """One step of training under `optimizer` and its transpose, both compiled.

        forward:   g = d(inner + prior)/d params;  params', opt' = update(g, opt, params)
        backward:  (g~, o~, p~) = vjp(update)(adjoint);  (H g~, hypergradients) = jvp of grad(inner + prior) along g~;
                   adjoint = (p~ + H g~, o~)

    One forward-over-reverse product along g~ gives the Hessian product and the hypergradient of every weight that the
    step touched, without a per-example gradient. `linearize` and `vjp_step` are the same two with what the product
    needs of the primal pass handed over (jax.linearize) instead of computed again: equal but for rounding.

    Training, replayed steps and the update's derivative are traced at the highest matmul precision: JAX's default would
    multiply float32 as TF32 on a GPU and as bfloat16 on a TPU, and the rounded trajectory is that of another run, whose
    hypergradients are off by tens of per cent under Adam with a small eps_root. The Hessian product of `backward`
    survives more: `product_precision` is that of its matrix products, of the primal pass in it, too. Its rounding is
    carried back through the earlier steps, and grows as the adjoint does: measured with rounded operands, 2 % (one pass
    of bfloat16) and .2 % (TF32) at a learning rate of 1e-4, 9 to 36 % and 1 to 5 % at 1e-3. On a CPU all are one.

    Micro-batches are summed in a scan, so that a step's memory is that of one of them.

    Args:
        problem: as `weighted` or `shared` gives it.
        optimizer: with a derivative; see `check_differentiable`.
        product_precision: "highest" (float32: six passes of bfloat16 on a TPU, no tensor cores on a GPU), "high"
            (three passes on a TPU, TF32 on a GPU) or "default" (one pass on a TPU, TF32 on a GPU). `linearize` and
            `vjp_step` are at the highest in any case, as their products are fixed where training makes them.

    Returns:
        The compiled functions of a step.

    Raises:
        ValueError: for another product_precision.

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> step = bj.train_step(problem, optax.sgd(0.5))
        >>> batch = bj.full_batch_stream(jnp.array([1.0, 3.0])).batch(0)
        >>> start = bj.init_train_state(optax.sgd(0.5), jnp.array(0.0))
        >>> state, metrics = step.forward(start, step.gather(jnp.ones(2), batch), (), batch)
        >>> float(state.params), float(metrics.loss), float(metrics.grad_norm)
        (1.0, 2.5, 2.0)
    """
    functions = step_functions(problem, optimizer, product_precision=product_precision)
    forward, backward, linearize, vjp_step = map(jax.jit, functions)
    gather, scatter_add = jax.jit(problem.gather), jax.jit(problem.scatter_add, donate_argnums=0)
    return TrainStep(forward, backward, gather, scatter_add, linearize, vjp_step)


@lru_cache(maxsize=8)
def with_product_precision(
    step: TrainStep, problem: Problem, optimizer: optax.GradientTransformation, precision: ProductPrecision
) -> TrainStep:
    """A step of `train_step` whose `backward` has products of another precision, and whose other functions are the
    same ones, compiled already. A memo, so that the passes of several trainers compile it once."""
    if precision == "highest":
        return step
    return step._replace(backward=jax.jit(step_functions(problem, optimizer, product_precision=precision)[1]))


def check_product_precision(precision: str) -> None:
    """Raise ValueError for one that is none: JAX would say so after the training, and take others than ours."""
    if precision not in (names := get_args(ProductPrecision)):
        raise ValueError(
            f"product_precision is {precision!r}; choose {', '.join(map(repr, names[:-1]))} or {names[-1]!r}."
        )


def step_functions(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    devices: Devices = ONE_DEVICE,
    *,
    product_precision: ProductPrecision = "highest",
) -> tuple[Callable, Callable, Callable, Callable]:
    """`train_step`'s four functions of a step, to be compiled; `problem` is a device's share of the whole."""
    check_product_precision(product_precision)
    if problem.has_state:
        return stateful_step_functions(problem, optimizer, devices, product_precision)
    all_reduce, make_local = devices.sum, devices.make_local

    def hessian_product(
        params: Params, weights: HyperSlice, frozen: Frozen, batch: Batch, v: Params
    ) -> tuple[Params, HyperSlice]:
        def add_micro(total, micro):
            def both_grads(params):
                return jax.grad(problem.inner, argnums=(0, 1))(params, micro[0], frozen, micro[1])

            hvp, hypergradients = jax.jvp(both_grads, (params,), (v,))[1]
            return optax.tree.add(total, hvp), hypergradients

        params, frozen, weights, v = make_local((params, frozen, weights, v))
        with jax.default_matmul_precision(product_precision):
            prior = jax.jvp(lambda params: jax.grad(problem.prior)(params, frozen), (params,), (v,))[1]
            return jax.lax.scan(add_micro, prior, (weights, batch))

    def forward(state: TrainState, weights: HyperSlice, frozen: Frozen, batch: Batch) -> tuple[TrainState, StepMetrics]:
        with jax.default_matmul_precision("highest"):
            params, weights, frozen = make_local((state.params, weights, frozen))
            return apply_update(state, *all_reduce(inner_loss_and_grad(problem, params, weights, frozen, batch)))

    def apply_update(state: TrainState, loss: Scalar, grad: Params) -> tuple[TrainState, StepMetrics]:
        updates, opt = compute_update(optimizer, grad, state.opt_state, state.params)
        new_state = state._replace(
            params=optax.apply_updates(state.params, updates), opt_state=opt, step=state.step + 1
        )
        return new_state, StepMetrics(loss, grad, tree.norm(grad))

    def backward(
        state: TrainState, grad: Params, weights: HyperSlice, frozen: Frozen, batch: Batch, adjoint: Adjoint
    ) -> tuple[Adjoint, HyperSlice]:
        with jax.default_matmul_precision("highest"):
            grad_bar, params_bar, opt_bar = optimizer_vjp(optimizer, grad, state, adjoint)
            hvp, hypergradients = hessian_product(state.params, weights, frozen, batch, grad_bar)
            return Adjoint(optax.tree.add(params_bar, all_reduce(hvp)), opt_bar), hypergradients

    def linearize(
        state: TrainState, weights: HyperSlice, frozen: Frozen, batch: Batch
    ) -> tuple[TrainState, StepMetrics, Linearization]:
        local_params, weights, frozen = make_local((state.params, weights, frozen))

        def grads_and_loss(params: Params) -> tuple[tuple[Params, HyperSlice], Scalar]:
            def add_micro(total, micro):
                loss, (grad, weights_grad) = jax.value_and_grad(problem.inner, argnums=(0, 1))(
                    params, micro[0], frozen, micro[1]
                )
                return _add_to(total, (loss, grad)), weights_grad

            prior = prior_and_grad(problem, params, frozen)
            (loss, grad), weights_grads = jax.lax.scan(add_micro, prior, (weights, batch))
            return (grad, weights_grads), loss

        with jax.default_matmul_precision("highest"):
            (grad, _), linearization, loss = jax.linearize(grads_and_loss, local_params, has_aux=True)
            return *apply_update(state, *all_reduce((loss, grad))), _strip_inputs(
                linearization, state, weights, frozen, batch
            )

    def vjp_step(
        state: TrainState,
        grad: Params,
        linearization: Linearization,
        weights: HyperSlice,
        frozen: Frozen,
        batch: Batch,
        adjoint: Adjoint,
    ) -> tuple[Adjoint, HyperSlice]:
        with jax.default_matmul_precision("highest"):
            grad_bar, params_bar, opt_bar = optimizer_vjp(optimizer, grad, state, adjoint)
            inputs = jax.tree.leaves((state, weights, frozen, batch))
            hvp, hypergradients = linearization(inputs, make_local(grad_bar))
            return Adjoint(optax.tree.add(params_bar, all_reduce(hvp)), opt_bar), hypergradients

    return forward, backward, linearize, vjp_step


def stateful_step_functions(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    devices: Devices,
    product_precision: ProductPrecision,
) -> tuple[Callable, Callable, Callable, Callable]:
    """`step_functions` of a model with a state, which goes from micro-batch to micro-batch and is then averaged over
    devices.

        backward:  (theta~, s~, w~) = vjp of (theta, s, w) -> (d(inner + prior)/d theta, new s) of (g~, adjoint of s)

    Reverse mode over reverse mode through a step's micro-batches, as the new state has derivatives, too.
    """

    all_reduce, make_local = devices.sum, devices.make_local

    def grad_and_state(params, model_state, weights, frozen, batch):
        def add_micro(carry, micro):
            total, state = carry
            (loss, state), grad = jax.value_and_grad(problem.inner, has_aux=True)(
                params, micro[0], frozen, {**micro[1], "model_state": state}
            )
            return (_add_to(total, (loss, grad)), state), None

        prior = prior_and_grad(problem, params, frozen)
        ((loss, grad), model_state), _ = jax.lax.scan(add_micro, (prior, model_state), (weights, batch))
        return loss, grad, model_state

    def average(model_state: ModelState) -> ModelState:
        if devices.axis_name is None:
            return model_state
        join = tree.split_inexact_leaves(jax.tree.map(devices.max, model_state))[1]  # counters are the same on each
        return join([leaf / devices.count() for leaf in all_reduce(tree.inexact_leaves(model_state))])

    def forward(state: TrainState, weights: HyperSlice, frozen: Frozen, batch: Batch) -> tuple[TrainState, StepMetrics]:
        with jax.default_matmul_precision("highest"):
            local_params, local_state, weights, frozen = make_local((state.params, state.model_state, weights, frozen))
            loss, grad, model_state = grad_and_state(local_params, local_state, weights, frozen, batch)
            loss, grad = all_reduce((loss, grad))
            updates, opt = compute_update(optimizer, grad, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            new_state = TrainState(params, opt, state.step + 1, average(model_state))
            return new_state, StepMetrics(loss, grad, tree.norm(grad))

    def backward(
        state: TrainState, grad: Params, weights: HyperSlice, frozen: Frozen, batch: Batch, adjoint: Adjoint
    ) -> tuple[Adjoint, HyperSlice]:
        with jax.default_matmul_precision("highest"):
            grad_bar, params_bar, opt_bar = optimizer_vjp(optimizer, grad, state, adjoint)
            params, weights, frozen, model_state = make_local((state.params, weights, frozen, state.model_state))
            floats, join = tree.split_inexact_leaves(model_state)

            def step_grad_and_state(params, floats, weights):
                _, grad, new_state = grad_and_state(params, join(floats), weights, frozen, batch)
                return grad, tree.inexact_leaves(new_state)

            state_bar = [leaf / devices.count() for leaf in adjoint.model_state]
            with jax.default_matmul_precision(product_precision):
                pull = jax.vjp(step_grad_and_state, params, floats, weights)[1]
                params_part, floats_bar, hypergradients = pull((make_local(grad_bar), make_local(state_bar)))
            params_part, floats_bar = all_reduce((params_part, floats_bar))
            return Adjoint(optax.tree.add(params_bar, params_part), opt_bar, tuple(floats_bar)), hypergradients

    def linearize(*arguments: PyTree) -> tuple[TrainState, StepMetrics, Linearization]:
        raise ValueError("linearize: the steps of a model with a state are not linearized; use a plan without it.")

    def vjp_step(*arguments: PyTree) -> tuple[Adjoint, HyperSlice]:
        raise ValueError("linearize: the steps of a model with a state are not linearized; use a plan without it.")

    return forward, backward, linearize, vjp_step


def _strip_inputs(linearized: Callable, *inputs: PyTree) -> Linearization:
    """The linearisation without the arrays that were given to the step: a compiled function would copy them, a frozen
    base model among them, for every stored step.
    """
    leaves, structure = jax.tree.flatten(linearized)
    place_of_input = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves(inputs))}
    input_places = [place_of_input.get(id(leaf)) for leaf in leaves]

    def apply(own: list[jax.Array], inputs: list[jax.Array], v: Params) -> tuple[Params, HyperSlice]:
        remaining = iter(own)
        all_leaves = [next(remaining) if place is None else inputs[place] for place in input_places]
        return structure.unflatten(all_leaves)(v)

    own_leaves = [leaf for leaf, place in zip(leaves, input_places, strict=True) if place is None]
    return jax.tree_util.Partial(apply, own_leaves)


def prior_and_grad(problem: Problem, params: Params, frozen: Frozen) -> tuple[Scalar, Params]:
    """r(params) and its gradient: what the micro-batches of a step add to, in float32 at least."""
    value, grad = jax.value_and_grad(problem.prior)(params, frozen)
    return value.astype(jnp.promote_types(value.dtype, float)), grad


def _add_to(total: PyTree, part: PyTree) -> PyTree:
    """The sum, in the types of the total: a loss may be wider than the parameters."""
    return jax.tree.map(lambda whole, more: whole + more.astype(whole.dtype), total, part)


def inner_loss_and_grad(
    problem: Problem, params: Params, weights: HyperSlice, frozen: Frozen, batch: Batch
) -> tuple[Scalar, Params]:
    """inner + prior and its gradient, over all micro-batches of a step; one of them in memory at a time."""

    def add_micro(total, micro):
        value = jax.value_and_grad(problem.inner)(params, micro[0], frozen, micro[1])
        return _add_to(total, value), None

    prior = prior_and_grad(problem, params, frozen)
    return jax.lax.scan(add_micro, prior, (weights, batch))[0]


def loss_grad_and_example_losses(
    problem: Problem, params: Params, weights: HyperSlice, frozen: Frozen, batch: Batch
) -> tuple[Scalar, Params, HyperSlice]:
    """inner + prior, its gradient, and d inner / d weights (l_i / N), over all micro-batches in one pass."""

    def add_micro(total, micro):
        value, (grad, example_losses) = jax.value_and_grad(problem.inner, argnums=(0, 1))(
            params, micro[0], frozen, micro[1]
        )
        return _add_to(total, (value, grad)), example_losses

    prior = prior_and_grad(problem, params, frozen)
    (value, grad), example_losses = jax.lax.scan(add_micro, prior, (weights, batch))
    return value, grad, example_losses


def mix_gradients(outer: Params, inner: Params, outer_share: Scalar | float) -> Params:
    """share * outer + (1 - share) * inner, in the type of the parameters."""
    return jax.tree.map(lambda a, b: (outer_share * a + (1 - outer_share) * b).astype(b.dtype), outer, inner)


def compute_update(
    optimizer: optax.GradientTransformation, grad: Params, opt_state: PyTree, params: Params
) -> tuple[Params, PyTree]:
    """The optimizer's update and its new state. `optax.lookahead` takes the gradient of its fast parameters alone."""
    try:
        return optimizer.update(grad.fast if isinstance(grad, optax.LookaheadParams) else grad, opt_state, params)
    except (TypeError, ValueError) as error:
        if not re.search(_ASKS_FOR_MORE, str(error)):
            raise
        raise ValueError(
            "the optimizer asks for more than a gradient, its state and the parameters, which is what a training step "
            f"gives ({error}). Line searches, polyak_sgd, momo, reduce_on_plateau, sophia and dpsgd do: use lbfgs with "
            "linesearch=None, sgd, or adamw with eps_root=1e-12."
        ) from error


def apply_gradients(optimizer: optax.GradientTransformation, state: TrainState, grad: Params) -> TrainState:
    """The state of training after one step along a gradient."""
    updates, opt = compute_update(optimizer, grad, state.opt_state, state.params)
    return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt, step=state.step + 1)


def validation_batch_loss_and_grad(
    problem: Problem, params: Params, frozen: Frozen, validation: Batch | tuple[Batch, ...]
) -> tuple[Scalar, Params]:
    """L_v of one validation batch, the mean over its own examples, and its gradient; one micro-batch in memory at a
    time. Of a tuple of batches, one for each term of L_v, the sum."""
    if isinstance(validation, tuple):
        terms = [validation_batch_loss_and_grad(problem, params, frozen, batch) for batch in validation]
        return jax.tree.map(lambda *leaves: sum(leaves), *terms)
    outer_problem = problem._replace(
        inner=lambda params, weights, frozen, batch: problem.outer(params, frozen, batch),
        prior=no_prior,
    )
    num_real = jnp.sum(validation["index"] != PADDING)
    batch = {**validation, "num_examples": jnp.full_like(validation["num_examples"], num_real)}
    return inner_loss_and_grad(outer_problem, params, None, frozen, batch)


def forward_only_step(
    problem: Problem, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Hyper, Frozen, Batch], tuple[TrainState, Scalar]]:
    """The same step for training alone: (state, hyper, frozen, batch) -> (state', loss), compiled.

    Nothing of it is differentiated, so the products have JAX's default precision, the gradient is not kept, and the
    state that is given is donated: its memory becomes that of the state returned.
    """

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, hyper: Hyper, frozen: Frozen, batch: Batch) -> tuple[TrainState, Scalar]:
        loss, grad = inner_loss_and_grad(problem, state.params, problem.gather(hyper, batch), frozen, batch)
        updates, opt = compute_update(optimizer, grad, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt, state.step + 1), loss

    return step


def optimizer_vjp(
    optimizer: optax.GradientTransformation, grad: Params, state: TrainState, adjoint: Adjoint
) -> tuple[Params, Params, list[jax.Array]]:
    """The adjoint, pulled back through one optimizer update: (of the gradient, of the parameters, of the state)."""
    floats, join = tree.split_inexact_leaves(state.opt_state)

    def update(grad, params, floats):
        updates, opt = compute_update(optimizer, grad, join(floats), params)
        return optax.apply_updates(params, updates), tree.inexact_leaves(opt)

    return jax.vjp(update, grad, state.params, floats)[1]((adjoint.params, adjoint.opt_state))


def init_train_state(
    optimizer: optax.GradientTransformation, params: Params, model_state: ModelState = ()
) -> TrainState:
    """The state of training before the first step.

    Args:
        optimizer: gives the optimizer's state.
        params: where training starts.
        model_state: what the model carries beside them, such as averages of batch normalisation; default nothing.

    Returns:
        The state; it holds `params` themselves, not a copy.

    Example:
        >>> int(bj.init_train_state(optax.adam(1e-3), jnp.zeros(2)).step)
        0
    """
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), model_state)


def trajectory_from_params(params: Params) -> Trajectory:
    """A trajectory that ended at `params`, however they were found.

    For estimators that read a trajectory's end only: `implicit_estimator` and `penalty_estimator`.

    Args:
        params: the trained model.

    Returns:
        A trajectory without steps.

    Example:
        >>> bj.trajectory_from_params(jnp.zeros(2)).steps
        0
    """
    state = init_train_state(optax.identity(), params)
    return Trajectory(state, state, 0, checkpointing.NO_CHECKPOINTS, {}, {})


def train(
    step: TrainStep,
    start: TrainState,
    hyper: Hyper,
    frozen: Frozen,
    stream: Stream,
    *,
    plan: CheckpointPlan | None = None,
    first_backward_step: int = 0,
    snapshots: MutableMapping[int, TrainState] | None = None,
    resume: TrainState | None = None,
    on_step: Callable[[TrainState, StepMetrics], None] | None = None,
) -> Trajectory:
    """Train over a stream with a Python loop, the driver of long runs, and return what the estimators read.

    Stores what `plan` says for a backward pass to step `first_backward_step`.

    Args:
        step: of `train_step`.
        start: the state before the first step.
        hyper: the outer variable, such as the table of weights, float[examples].
        frozen: what training does not change, such as a base model.
        stream: of training batches; its `steps` are those of the run.
        plan: states to store; default `checkpointing.square_root_plan`.
        first_backward_step: no state before this step is needed again.
        snapshots: where states go that should live elsewhere than in a dict.
        resume: a later state of the same run, whose earlier snapshots are then in `snapshots` already.
        on_step: called after each step with the state reached and its metrics, both still on the device.

    Returns:
        The trajectory.

    Example:
        >>> problem, optimizer = bj.weighted(lambda theta, frozen, batch: (theta - batch["data"]) ** 2), optax.sgd(0.1)
        >>> stream = bj.shuffled_stream(jnp.array([1.0, 3.0]), batch_size=2, steps=50, seed=0)
        >>> start = bj.init_train_state(optimizer, jnp.array(0.0))
        >>> trajectory = bj.train(bj.train_step(problem, optimizer), start, jnp.ones(2), (), stream)
        >>> round(float(trajectory.end.params), 3), trajectory.steps
        (2.0, 50)
    """
    plan = checkpointing.square_root_plan(stream.steps - first_backward_step) if plan is None else plan
    snapshots = {} if snapshots is None else snapshots
    snapshot_offsets = checkpointing.place_snapshots(
        0, stream.steps - first_backward_step, plan.snapshots, plan.stored_steps
    )
    snapshot_steps = {first_backward_step + offset for offset in snapshot_offsets}  # the start is kept anyway
    stored_steps: dict[int, StoredStep] = {}
    state = start if resume is None else resume
    for index in range(int(state.step), stream.steps):
        if index in snapshot_steps and index:
            snapshots[index] = state
        is_stored = index >= max(first_backward_step, stream.steps - plan.stored_steps)
        state, metrics, stored_step = store_step(
            step, state, hyper, frozen, stream.batch(index), linearize=is_stored and plan.linearize
        )
        if is_stored:
            stored_steps[index] = stored_step
        if on_step:
            on_step(state, metrics)
    return Trajectory(start, state, stream.steps, plan, snapshots, stored_steps)


def store_step(
    step: TrainStep, state: TrainState, hyper: Hyper, frozen: Frozen, batch: Batch, *, linearize: bool
) -> tuple[TrainState, StepMetrics, StoredStep]:
    """One step of training, and what of it is stored for the backward pass."""
    hyper_slice = step.gather(hyper, batch)
    if linearize:
        new_state, metrics, linearization = step.linearize(state, hyper_slice, frozen, batch)
        return new_state, metrics, StoredStep(state, metrics.grad, linearization)
    new_state, metrics = step.forward(state, hyper_slice, frozen, batch)
    return new_state, metrics, StoredStep(state, metrics.grad)


def backward_step(
    step: TrainStep, stored_step: StoredStep, hyper: Hyper, frozen: Frozen, batch: Batch, adjoint: Adjoint
) -> tuple[Adjoint, HyperSlice]:
    """One step back: (the adjoint before it, the hypergradients of its slice)."""
    hyper_slice = step.gather(hyper, batch)
    if stored_step.linearization is not None:
        return step.vjp_step(
            stored_step.state, stored_step.grad, stored_step.linearization, hyper_slice, frozen, batch, adjoint
        )
    return step.backward(stored_step.state, stored_step.grad, hyper_slice, frozen, batch, adjoint)


@partial(jax.jit, static_argnames="step")
def scan(step: TrainStep, start: TrainState, hyper: Hyper, frozen: Frozen, batches: Batch) -> TrainState:
    """Train over stacked batches with `lax.scan`: the driver of small problems.

    The end of training is one differentiable function of `hyper`; `jax.grad` through it is the oracle of the tests. It
    keeps every step's intermediate values for a backward pass: for large models use `train` and `unrolled_estimator`.

    Args:
        step: of `train_step`; static.
        start: the state before the first step.
        hyper: the outer variable, such as the table of weights, float[examples].
        frozen: what training does not change.
        batches: batches whose leaves lead with [steps, micro, ...].

    Returns:
        The state at the end.

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> optimizer = optax.sgd(0.5)
        >>> step, batch = bj.train_step(problem, optimizer), bj.full_batch_stream(jnp.array([1.0, 3.0])).batch(0)
        >>> batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), batch)
        >>> start = bj.init_train_state(optimizer, jnp.array(0.0))
        >>> float(bj.scan(step, start, jnp.ones(2), (), batches).params)
        1.5
    """

    def body(state, batch):
        return step.forward(state, step.gather(hyper, batch), frozen, batch)[0], None

    return jax.lax.scan(body, start, batches)[0]
