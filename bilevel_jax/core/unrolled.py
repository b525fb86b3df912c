"""Unrolled differentiation through a training trajectory, in resumable pieces."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool

from bilevel_jax.core import checkpointing, tree
from bilevel_jax.core.solve.remedies import remedy_for_not_finite, remedy_for_sign
from bilevel_jax.core.training import backward_step, compute_update, optimizer_vjp, store_step
from bilevel_jax.core.types import (
    Adjoint,
    BackwardState,
    Batch,
    Checks,
    Estimate,
    Estimator,
    Fetch,
    Frozen,
    Hyper,
    HyperSlice,
    ModelState,
    Params,
    Problem,
    PyTree,
    Scalar,
    Stream,
    TrainState,
    TrainStep,
    Trajectory,
)

STEPS_PER_ADVANCE = 32
"""Steps back between two occasions to save: a copy of the outer variable is made for each."""


class BackwardPass(NamedTuple):
    """The backward pass in pieces, for drivers that save between them."""

    init: Callable[[Trajectory, Hyper, Frozen, Any], BackwardState]
    """(trajectory, hyper, frozen, validation stream): the adjoint is grad L_v, and 0 for the optimizer's state. Of
    `backward_pass_of_each`, a sequence of streams."""
    advance: Callable[[Trajectory, Hyper, Frozen, Stream, BackwardState], BackwardState]
    """(trajectory, hyper, frozen, train stream, state): at most `STEPS_PER_ADVANCE` steps further back."""
    is_done: Callable[[Trajectory, BackwardState], bool]
    finish: Callable[[Trajectory, BackwardState], Estimate]


def unrolled_estimator(problem: Problem, step: TrainStep, *, window: int | None = None) -> Estimator:
    """The metagradient d L_v(theta_T(w)) / dw by reverse-mode differentiation through the last `window` training steps.

        lambda_T = grad L_v(theta_T);  for t = T-1 .. 0:  lambda_t = (d step_t / d theta)^T lambda_{t+1},
        grad += (d step_t / d w)^T lambda_{t+1}

    Exact for the run that happened: its steps, its optimizer, its batches. With a window it is an approximation (it
    stops early). Time: one Hessian product per step, and one more training step for each that is replayed. Memory:
    what the trajectory's `plan` says; it changes no bit (`plan.linearize`: nothing but rounding).

    Wrong when training is chaotic at this learning rate: the derivative is right and predicts nothing. Read
    `checks.growth`, and ask `certify`. `checks.replayed` is False where replayed steps missed the state that training
    reached (another device, another program, or a GPU's additions in no fixed order, which
    XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true orders): then another run was differentiated. With
    `plan.linearize` replayed steps are another program than trained ones: their states had the same bits in every case
    tried on CPUs; where a compiler orders sums otherwise there, `replayed` is False for a difference that is rounding.

    Args:
        problem: as `weighted` or `shared` gives it.
        step: of `train_step`, as the trajectory was trained with it.
        window: steps to go back; default all.

    Returns:
        The estimator: (trajectory, hyper, frozen, train stream, validation stream) -> `Estimate`. It raises a
        ValueError where the trajectory stored nothing for a backward pass.

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> optimizer = optax.sgd(0.5)
        >>> step = bj.train_step(problem, optimizer)
        >>> stream = bj.shuffled_stream(jnp.array([1.0, 3.0]), 2, steps=30, seed=0)
        >>> trajectory = bj.train(step, bj.init_train_state(optimizer, jnp.array(0.0)), jnp.ones(2), (), stream)
        >>> validation = bj.full_batch_stream(jnp.array([4.0]))
        >>> estimate = bj.unrolled_estimator(problem, step)(trajectory, jnp.ones(2), (), stream, validation)
        >>> [round(float(grad), 3) for grad in estimate.grad]  # trained to the minimum: as `implicit_estimator`
        [1.0, -1.0]
    """
    backward = backward_pass(problem, step, window=window)

    def estimate(trajectory: Trajectory, hyper: Hyper, frozen: Frozen, train: Stream, validation: Stream) -> Estimate:
        backward_state = backward.init(trajectory, hyper, frozen, validation)
        while not backward.is_done(trajectory, backward_state):
            backward_state = backward.advance(trajectory, hyper, frozen, train, backward_state)
        return backward.finish(trajectory, backward_state)

    return estimate


def each(
    problem: Problem, step: TrainStep, *, on_step: Callable[[int], None] | None = None
) -> Callable[[Trajectory, Hyper, Frozen, Stream, Sequence[Stream]], Estimate]:
    """The metagradients of several outer losses by one backward pass: d L_q(theta_T(w)) / dw for each q.

    The adjoints go back side by side, so the replayed steps and the primal passes of the Hessian products are paid for
    once. Equal to `unrolled_estimator` for each stream. Memory: that of one backward pass and, for each loss more, an
    adjoint and the tangents of one step. Exact and wrong where `unrolled_estimator` is.

    Args:
        problem: as `weighted` or `shared` gives it.
        step: of `train_step`, as the trajectory was trained with it.
        on_step: called after each step back with the step's number.

    Returns:
        (trajectory, hyper, frozen, train stream, validation streams) -> `Estimate`, every leaf of which leads with
        [losses].

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: 0.5 * (theta - batch["data"]) ** 2)
        >>> optimizer = optax.sgd(0.5)
        >>> step = bj.train_step(problem, optimizer)
        >>> stream = bj.shuffled_stream(jnp.array([1.0, 3.0]), 2, steps=30, seed=0)
        >>> trajectory = bj.train(step, bj.init_train_state(optimizer, jnp.array(0.0)), jnp.ones(2), (), stream)
        >>> validations = [bj.full_batch_stream(jnp.array([value])) for value in (4.0, 0.0)]
        >>> bj.each(problem, step)(trajectory, jnp.ones(2), (), stream, validations).grad.round(3).tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    backward = backward_pass_of_each(problem, step, on_step=on_step)

    def estimate(
        trajectory: Trajectory, hyper: Hyper, frozen: Frozen, train: Stream, validations: Sequence[Stream]
    ) -> Estimate:
        backward_state = backward.init(trajectory, hyper, frozen, validations)
        while not backward.is_done(trajectory, backward_state):
            backward_state = backward.advance(trajectory, hyper, frozen, train, backward_state)
        return backward.finish(trajectory, backward_state)

    return estimate


def backward_pass(
    problem: Problem,
    step: TrainStep,
    *,
    window: int | None = None,
    on_step: Callable[[int], None] | None = None,
    on_replay: Callable[[int], None] | None = None,
) -> BackwardPass:
    """The pieces of `unrolled_estimator`. A `BackwardState` is plain arrays: save it after any piece, load it, go on.

    `on_step` is called after each step back with the step's number, `on_replay` after each step replayed.
    """
    end_loss_and_adjoint = _end_loss_and_adjoint_fn(problem)

    def start(
        trajectory: Trajectory, hyper: Hyper, frozen: Frozen, validation: Stream
    ) -> tuple[Scalar, Adjoint, Hyper]:
        return *end_loss_and_adjoint(trajectory.end, frozen, validation), jax.tree.map(jnp.zeros_like, hyper)

    return _build_backward_pass(step, start, window=window, on_step=on_step, on_replay=on_replay)


def backward_pass_of_each(
    problem: Problem,
    step: TrainStep,
    *,
    keep_bits: bool = False,
    step_of_last: TrainStep | None = None,
    window: int | None = None,
    on_step: Callable[[int], None] | None = None,
    on_replay: Callable[[int], None] | None = None,
) -> BackwardPass:
    """`backward_pass` of several outer losses side by side: the pieces of `each`.

    `init` takes a sequence of validation streams; the adjoint, `grad` and L_v of a state, and every leaf of the
    estimate but `checks` and `params`, lead with [losses], and of the checks `growth` does.

    With `keep_bits` the adjoints of a step of one micro-batch are not batched: one compiled program has the products of
    all of them, so that each is computed as alone (on CPUs mostly to the bit, else to rounding) and the compiler shares
    their primal passes. It grows with their number. Of several micro-batches they are batched even so, as the compiler
    would not share the passes of several loops.

    With `step_of_last` the last of the losses, of two or more, goes back by the `backward` of that step: where it is
    the first loss again, what two steps back make of one loss is compared in one pass. Steps that are stored linearized
    have one product for all.
    """
    end_loss_and_adjoint = _end_loss_and_adjoint_fn(problem)
    each = step_of_each(problem, step, keep_bits, step_of_last)

    def start(
        trajectory: Trajectory, hyper: Hyper, frozen: Frozen, validations: Sequence[Stream]
    ) -> tuple[Array, Adjoint, Hyper]:
        ends = [end_loss_and_adjoint(trajectory.end, frozen, validation) for validation in validations]
        losses, adjoint = tree.stack(*ends)
        return losses, adjoint, jax.tree.map(lambda leaf: jnp.zeros((len(ends), *leaf.shape), leaf.dtype), hyper)

    return _build_backward_pass(each, start, window=window, on_step=on_step, on_replay=on_replay)


@lru_cache(maxsize=8)
def step_of_each(
    problem: Problem, step: TrainStep, keep_bits: bool, step_of_last: TrainStep | None = None
) -> TrainStep:
    """The step with `backward`, `vjp_step` and `scatter_add` of several adjoints, the last of them by `step_of_last`;
    a memo, so that the passes of several trainers compile it once."""

    def of_each(step_back: Callable[..., tuple[Adjoint, HyperSlice]], num_arguments: int) -> Callable[..., Any]:
        batched = jax.vmap(step_back, in_axes=(*[None] * num_arguments, 0))

        def one_by_one(*arguments: Any) -> tuple[Adjoint, HyperSlice]:
            if arguments[-2]["num_examples"].shape[0] > 1:  # the batch's micro-batches
                return batched(*arguments)
            count = jax.tree.leaves(arguments[-1])[0].shape[0]
            adjoints = [jax.tree.map(lambda leaf, place=place: leaf[place], arguments[-1]) for place in range(count)]
            results = [step_back(*arguments[:-1], adjoint) for adjoint in adjoints]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

        return one_by_one if keep_bits else batched

    def with_last(backward_of_each: Callable[..., Any], last_backward: Callable[..., Any]) -> Callable[..., Any]:
        def backward(*arguments: Any) -> tuple[Adjoint, HyperSlice]:
            *given, adjoints = arguments
            others = backward_of_each(*given, jax.tree.map(lambda leaf: leaf[:-1], adjoints))
            last = last_backward(*given, jax.tree.map(lambda leaf: leaf[-1], adjoints))
            return jax.tree.map(lambda leaves, leaf: jnp.concatenate([leaves, leaf[None]]), others, last)

        return backward

    backward = of_each(step.backward, 5)
    return step._replace(
        backward=jax.jit(with_last(backward, step_of_last.backward) if step_of_last else backward),
        vjp_step=jax.jit(of_each(step.vjp_step, 6)),
        scatter_add=jax.jit(jax.vmap(problem.scatter_add, in_axes=(0, None, 0)), donate_argnums=0),
    )


def _build_backward_pass(
    step: TrainStep,
    start: Callable[..., tuple[Array, Adjoint, Hyper]],
    *,
    window: int | None,
    on_step: Callable[[int], None] | None,
    on_replay: Callable[[int], None] | None,
) -> BackwardPass:
    """`start` gives L_v, the adjoint at the end of training and a table of zeros."""

    def first_step(trajectory: Trajectory) -> int:
        return 0 if window is None else max(0, trajectory.steps - window)

    def init(trajectory: Trajectory, hyper: Hyper, frozen: Frozen, validation: Any) -> BackwardState:
        if trajectory.steps and not trajectory.plan.stored_steps:
            raise ValueError("this training run stored nothing for a backward pass; give `train` another `plan`.")
        validation_loss, adjoint, grad = start(trajectory, hyper, frozen, validation)
        norm_at_end = _max_norm(jnp.zeros_like(validation_loss), adjoint)
        return BackwardState(
            trajectory.steps, trajectory.end, adjoint, grad, validation_loss, norm_at_end, norm_at_end, jnp.array(True)
        )

    def replay(run: Trajectory, hyper: Hyper, frozen: Frozen, train: Stream, end: int) -> TrainState:
        """Store the last steps before `end`; the state that they lead to."""
        run.stored_steps.clear()  # the backward pass is done with them, and these steps need their memory
        before = {kept for kept in run.snapshots if kept < end}
        if first_step(run) == 0 or not before:
            before.add(0)
        replay_from, planned = checkpointing.plan_replay(before, end, run.plan)
        if planned:
            for used in [kept for kept in run.snapshots if kept >= end]:
                del run.snapshots[used]
        state = run.snapshots[replay_from] if replay_from else run.start
        for t in range(replay_from, end):
            if t in planned:
                run.snapshots[t] = state
            taped = t >= max(first_step(run), end - run.plan.stored_steps)
            state, _, visited = store_step(
                step, state, hyper, frozen, train.batch(t), linearize=taped and run.plan.linearize
            )
            if taped:
                run.stored_steps[t] = visited
            if on_replay:
                on_replay(t)
        return state

    def advance(
        trajectory: Trajectory, hyper: Hyper, frozen: Frozen, train: Stream, backward_state: BackwardState
    ) -> BackwardState:
        t, replay_matches = backward_state.step, backward_state.replay_matches
        if t - 1 not in trajectory.stored_steps:
            replay_matches = jnp.logical_and(
                replay_matches, _states_equal(replay(trajectory, hyper, frozen, train, t), backward_state.train_state)
            )
        adjoint, max_norm, grad = (
            backward_state.adjoint,
            backward_state.max_norm,
            jax.tree.map(jnp.copy, backward_state.grad),
        )
        stop = max(first_step(trajectory), t - STEPS_PER_ADVANCE)
        while t > stop and t - 1 in trajectory.stored_steps:
            t -= 1
            batch = train.batch(t)
            adjoint, hypergradients = backward_step(step, trajectory.stored_steps[t], hyper, frozen, batch, adjoint)
            grad, max_norm = step.scatter_add(grad, batch, hypergradients), _max_norm(max_norm, adjoint)
            if on_step:
                on_step(t)
        return BackwardState(
            t,
            trajectory.stored_steps[t].state,
            adjoint,
            grad,
            backward_state.validation_loss,
            backward_state.norm_at_end,
            max_norm,
            replay_matches,
        )

    def is_done(trajectory: Trajectory, backward_state: BackwardState) -> bool:
        return backward_state.step <= first_step(trajectory)

    def finish(trajectory: Trajectory, backward_state: BackwardState) -> Estimate:
        ratio = backward_state.max_norm / backward_state.norm_at_end
        growth, replay_matches = ratio if ratio.ndim else float(ratio), bool(backward_state.replay_matches)
        checks = Checks(growth=growth, replayed=replay_matches, steps=trajectory.steps - first_step(trajectory))
        params = trajectory.end.params
        return Estimate(
            backward_state.grad, backward_state.validation_loss, backward_state.adjoint.params, checks, params
        )

    return BackwardPass(init, advance, is_done, finish)


def _end_loss_and_adjoint_fn(problem: Problem) -> Callable[[TrainState, Frozen, Stream], tuple[Scalar, Adjoint]]:
    """(state at the end of training, frozen, validation stream) -> (L_v, its derivative by that state)."""
    if not problem.has_state:
        loss_and_grad = validation_loss_and_grad_fn(problem)

        def stateless(end: TrainState, frozen: Frozen, validation: Stream) -> tuple[Scalar, Adjoint]:
            value, params_grad = loss_and_grad(end.params, frozen, validation)
            return value, Adjoint(params_grad, _zero_opt_adjoint(end))

        return stateless

    def outer(evaluated: tuple[Params, list[Array]], given: tuple[Frozen, ModelState], batch: Batch) -> Scalar:
        model_state = tree.split_inexact_leaves(given[1])[1](evaluated[1])
        return problem.outer(evaluated[0], given[0], {**batch, "model_state": model_state})

    state_loss_and_grad = validation_loss_and_grad_fn(problem._replace(outer=outer))

    def stateful(end: TrainState, frozen: Frozen, validation: Stream) -> tuple[Scalar, Adjoint]:
        evaluated = (end.params, tree.inexact_leaves(end.model_state))
        value, (params_grad, state_grad) = state_loss_and_grad(evaluated, (frozen, end.model_state), validation)
        return value, Adjoint(params_grad, _zero_opt_adjoint(end), tuple(state_grad))

    return stateful


def _zero_opt_adjoint(end: TrainState) -> list[Array]:
    return [jnp.zeros_like(leaf) for leaf in tree.inexact_leaves(end.opt_state)]


_states_equal = jax.jit(tree.bitwise_equal)


@jax.jit
def _max_norm(peak: Array, adjoint: Adjoint) -> Array:
    """The larger one of a norm and that of an adjoint; of several side by side, each with its own."""
    norm = lambda adjoint: tree.norm((adjoint.params, adjoint.model_state))  # noqa: E731
    return jnp.maximum(peak, jax.vmap(norm)(adjoint) if peak.ndim else norm(adjoint))


@lru_cache(maxsize=8)
def validation_loss_and_grad_fn(problem: Problem) -> Callable[[Params, Frozen, Stream], tuple[Scalar, Params]]:
    """(params, frozen, validation stream) -> L_v and its gradient, over *all* of the stream.

    A pure function of the problem. The memo spares compiling the same two functions again, and changes nothing else.
    """

    @jax.jit
    def add(total, params, frozen, batch):
        def add_micro(total, micro):
            return optax.tree.add(total, jax.value_and_grad(problem.outer)(params, frozen, micro)), None

        with jax.default_matmul_precision("highest"):
            return jax.lax.scan(add_micro, total, batch)[0]

    @jax.jit  # or each call would trace the model to learn the dtypes
    def zero(params, frozen, batch):
        micro = jax.tree.map(lambda leaf: leaf[0], batch)
        shapes = jax.eval_shape(jax.value_and_grad(problem.outer), params, frozen, micro)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def loss_and_grad(params: Params, frozen: Frozen, stream: Stream) -> tuple[Scalar, Params]:
        total = zero(params, frozen, stream.batch(0))
        for index in range(stream.steps):
            total = add(total, params, frozen, stream.batch(index))
        return total

    return loss_and_grad


@lru_cache(maxsize=8)
def validation_loss_fn(problem: Problem) -> Callable[[Params, Frozen, Stream], Scalar]:
    """(params, frozen, validation stream) -> L_v in nats, over all of the stream; a memo as
    `validation_loss_and_grad_fn`."""

    @jax.jit
    def batch_loss(params, frozen, batch):
        with jax.default_matmul_precision("highest"):
            return jax.lax.map(lambda micro: problem.outer(params, frozen, micro), batch).sum()

    def validation_loss(params: Params, frozen: Frozen, stream: Stream) -> Scalar:
        return sum((batch_loss(params, frozen, stream.batch(i)) for i in range(stream.steps)), start=jnp.zeros(()))

    return validation_loss


def check_differentiable(
    step: TrainStep,
    optimizer: optax.GradientTransformation,
    trajectory: Trajectory,
    hyper: Hyper,
    frozen: Frozen,
    train: Stream,
    fetch: Fetch = np.asarray,
) -> None:
    """Refuse an optimizer whose update has no usable derivative, with the remedy, before the backward pass.

    From the first step and from one near the middle, repeats the gradient met there until the update depends on a
    gradient (an accumulating optimizer acts at its k-th step, a warm-up from 0 after its first), and pulls a vector
    back through the update of that step. Again with half of the gradient's entries set to exactly 0 (what rows of an
    embedding get before their first use).

    Args:
        step: of `train_step`.
        optimizer: the one of the step.
        trajectory: of `train`.
        hyper: the outer variable, as trained with.
        frozen: as trained with.
        train: the stream, as trained with.
        fetch: reads what the derivative is found to be; of several processes it must give all of them the same (as in
            `solvers.cg`).

    Returns:
        Nothing.

    Raises:
        ValueError: if a derivative is not finite (Adam with eps_root = 0 at a zero entry), if no parameter depends on
            the size of a gradient (lion and other sign methods: no weight would change anything), or if no gradient
            reaches the parameters within the run (accumulation over more steps, a learning rate of 0).

    Example:
        >>> problem = bj.weighted(lambda theta, frozen, batch: (theta - batch["data"]) ** 2)
        >>> stream = bj.full_batch_stream(jnp.array([1.0, 3.0]))
        >>> optimizer = optax.lion(0.1)
        >>> step = bj.train_step(problem, optimizer)
        >>> trajectory = bj.train(step, bj.init_train_state(optimizer, jnp.array(0.0)), jnp.ones(2), (), stream)
        >>> bj.check_differentiable(step, optimizer, trajectory, jnp.ones(2), (), stream)
        Traceback (most recent call last):
        ValueError: the optimizer's update does not depend on the gradient's size ...
    """
    if not trajectory.steps:
        return
    # compiled: one by one, their operations take longer, and those on arrays that are split over several processes may
    # wait for each other
    find_acting_step, pull_back, zero_half, find_finite = (
        jax.jit(partial(_find_acting_step, optimizer)),
        jax.jit(partial(_pull_back_update, optimizer)),
        jax.jit(_zero_half),
        jax.jit(lambda vector: jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), vector)),
    )
    any_acts = False
    start_grad = None
    for state in (trajectory.start, _state_near_middle(trajectory)):
        index = int(state.step)
        batch = train.batch(index)
        grad = step.forward(state, step.gather(hyper, batch), frozen, batch)[1].grad
        start_grad = grad if start_grad is None else start_grad
        for description, probe_grad in (
            ("a gradient of this run", grad),
            ("a gradient with zero entries", zero_half(grad)),
        ):
            acting, is_acting = find_acting_step(state, probe_grad, trajectory.steps)
            acts = bool(fetch(is_acting))
            any_acts |= acts and probe_grad is grad  # entries set to 0 lie within any clip
            if not acts:
                continue
            grad_bar, params_bar, opt_bar = pull_back(probe_grad, acting)
            is_grad_finite, *others_finite = jax.device_get(find_finite((grad_bar, params_bar, opt_bar)))
            if all(map(bool, jax.tree.leaves((is_grad_finite, others_finite)))):
                continue
            is_finite = list(map(bool, others_finite[1]))
            raise ValueError(
                f"the optimizer's update has a derivative that is not finite at {description} (step "
                f"{int(acting.step)}){remedy_for_not_finite(is_grad_finite, acting.opt_state, is_finite)}"
            )
    if any_acts:
        return
    ends = [
        find_acting_step(trajectory.start, signed_grad, trajectory.steps)[0].params
        for signed_grad in (start_grad, jax.tree.map(jnp.negative, start_grad))
    ]
    if jax.jit(tree.bitwise_equal)(*ends):
        raise ValueError(
            f"no gradient reaches the parameters in the {trajectory.steps} steps of this run, so no weight would "
            "change anything: the optimizer accumulates over more steps, its learning rate is 0, or it freezes all "
            "parameters. Train for more steps, or use another optimizer."
        )
    raise ValueError(
        "the optimizer's update does not depend on the gradient's size (its derivative is 0), so no weight would "
        f"change anything: {remedy_for_sign(trajectory.end.opt_state)}"
    )


def _state_near_middle(trajectory: Trajectory) -> TrainState:
    """The kept state nearest to the middle of a run."""
    middle = trajectory.steps // 2
    if middle in trajectory.stored_steps:
        return trajectory.stored_steps[middle].state
    nearest_step = min(trajectory.snapshots, key=lambda step: abs(step - middle), default=0)
    return trajectory.snapshots[nearest_step] if nearest_step else trajectory.start


def _find_acting_step(
    optimizer: optax.GradientTransformation, state: TrainState, grad: Params, steps: int
) -> tuple[TrainState, Bool[Array, ""]]:
    """(the state before the first update that depends on the size of `grad`, True), or (the state at the end, False).

    Every step has the same gradient. Its tangent is carried forward through the optimizer's state.
    """

    def goes_on(carry):
        state, _, acts = carry
        return jnp.logical_and(~acts, state.step < steps)

    def advance(carry):
        state, tangents, _ = carry
        new_state, new_tangents, acts = _advance_along(optimizer, state, grad, tangents)
        kept = jax.tree.map(partial(jnp.where, acts), state, new_state)
        return kept, new_tangents, acts

    tangents = [jnp.zeros_like(leaf) for leaf in tree.inexact_leaves(state.opt_state)]
    state, _, acts = jax.lax.while_loop(goes_on, advance, (state, tangents, jnp.array(False)))
    return state, acts


def _advance_along(
    optimizer: optax.GradientTransformation, state: TrainState, grad: Params, tangents: list[Array]
) -> tuple[TrainState, list[Array], Bool[Array, ""]]:
    """A step along `grad`; the derivative of the optimizer's new state along directions of all gradients so far; and
    whether that of the parameters is other than 0."""
    floats, join = tree.split_inexact_leaves(state.opt_state)

    def update(grad, floats):
        updates, opt_state = compute_update(optimizer, grad, join(floats), state.params)
        return (optax.apply_updates(state.params, updates), tree.inexact_leaves(opt_state)), opt_state

    (params, _), (params_tangent, new_tangents), opt_state = jax.jvp(
        update, (grad, floats), (_direction(grad, state.step), tangents), has_aux=True
    )
    acts = jnp.stack([(leaf != 0).any() for leaf in jax.tree.leaves(params_tangent)]).any()  # nan, too
    new_state = state._replace(params=params, opt_state=opt_state, step=state.step + 1)
    return new_state, new_tangents, acts


def _pull_back_update(
    optimizer: optax.GradientTransformation, grad: Params, state: TrainState
) -> tuple[Params, Params, list[Array]]:
    """A vector, pulled back through the update of one step: (of the gradient, of the parameters, of the state)."""
    opt_adjoint = [jnp.zeros_like(leaf) for leaf in tree.inexact_leaves(state.opt_state)]
    return optimizer_vjp(optimizer, grad, state, Adjoint(_direction(grad, 0), opt_adjoint))


def _direction(like: PyTree, number: Scalar | int) -> PyTree:
    """Numbers between -1 and 1 without a pattern that an update could cancel: other ones for each leaf and each
    `number`. A hash of an entry's place, as jax.random's generator takes longer to compile for every leaf."""
    leaves, structure = jax.tree.flatten(like)

    def direction(place: int, leaf: Array) -> Array:
        h = jnp.zeros(leaf.shape, jnp.uint32)  # the entry's place; below, that of its leaf and the number
        for axis, size in enumerate(leaf.shape):
            h = h * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        h = h + jnp.uint32(0x9E3779B9) * (jnp.uint32(len(leaves)) * jnp.asarray(number, jnp.uint32) + jnp.uint32(place))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # the finalizer of MurmurHash3
            h = (h ^ (h >> shift)) * jnp.uint32(factor)
        return (h.astype(jnp.float32) / 2.0**31 - 1).astype(leaf.dtype)

    return structure.unflatten([direction(place, leaf) for place, leaf in enumerate(leaves)])


def _zero_half(grad: Params) -> Params:
    def halve(leaf):
        return leaf * jnp.asarray(np.arange(leaf.size) % 2, leaf.dtype).reshape(leaf.shape)

    return jax.tree.map(halve, grad)
