"""Resumable training runs and hypergradient estimates of a task."""

import contextlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.core import certify, checkpointing, curvature, solvers, tree
from bilevel_jax.core.certify.products import measure_product_error
from bilevel_jax.core.implicit import implicit_estimator
from bilevel_jax.core.streams import halve_stream
from bilevel_jax.core.training import init_train_state, train, with_product_precision
from bilevel_jax.core.types import (
    Adjoint,
    BackwardState,
    CheckpointPlan,
    Estimate,
    Estimator,
    Hyper,
    Params,
    StepMetrics,
    Stream,
    TrainState,
    Trajectory,
)
from bilevel_jax.core.unrolled import BackwardPass, backward_pass, backward_pass_of_each
from bilevel_jax.lm.models import balance_adapters
from bilevel_jax.runs.config.schema import OuterSection
from bilevel_jax.runs.engine import trajectory_store
from bilevel_jax.runs.engine.folds import (
    Turn,
    halved_validation_stream,
    turn_full_pass_stream,
    turn_validation_stream,
)
from bilevel_jax.runs.engine.nonfinite import find_first_nonfinite
from bilevel_jax.runs.infra import checkpoint
from bilevel_jax.runs.infra.distributed import fetch_from_first
from bilevel_jax.runs.infra.placement import replicate, replicate_unplaced
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.tasks.evaluation import held_out_indices
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.targets import split_by_target

REPLAY_WORK, HVP_WORK = 1.0, 3.0
"""Work of a backward step in training steps: a replayed step is one, a Hessian product with its primal about three.

Each step of a backward pass counts as replayed once, as it is with sqrt(T) snapshots: what methods are compared by must
not depend on the memory of the machine.
"""
EXTRA_LOSS_WORK = 2.0
"""What another outer loss adds to a backward step: the tangents of its Hessian product."""
TARGET_SEED_STRIDE = 1_000_003
"""Between the seeds of the halves of two targets, which are drawn apart."""
FINITE_CHECK_INTERVAL = 32
"""Training steps between two looks at whether their losses are finite."""


class MidStepCheckpoint(NamedTuple):
    """What is saved in the middle of an outer step; its `meta` has the steps of the snapshots."""

    state: TrainState
    snapshots: list[TrainState]
    backward_state: BackwardState


class RestoredMidStep(NamedTuple):
    """A `MidStepCheckpoint` that was restored."""

    checkpoint: MidStepCheckpoint
    snapshots: dict[int, TrainState]


class Trainer:
    """Trains a task and estimates its hypergradient; compiled once, used for every outer step."""

    def __init__(self, task: Task, outer: OuterSection, session: Session):
        self.task, self.outer, self.session = task, outer, session
        self.folder: Path = session.folder / "checkpoints" / checkpoint.MID_STEP_FOLDER
        window = outer.window if outer.method == "window" else None
        self._backward_pass: BackwardPass | None = None
        self._backward_pass_of_each: BackwardPass | None = None
        self._backward_pass_with_highest: BackwardPass | None = None
        """Of several outer losses, the last of them with products of the highest precision."""
        self._told_steps: set[int] = set()
        """Outer steps of whose middle it was told that it is of another layout."""
        self._step_back_work = backward_step_work(1)
        """Of all outer losses that go back side by side, in training steps."""
        if outer.method in ("unrolled", "window"):
            on_replay = lambda step: self._pause()  # noqa: E731
            step = with_product_precision(task.train_step, task.problem, task.optimizer, outer.product_precision)
            self._backward_pass = backward_pass(
                task.problem,
                step,
                window=window,
                on_step=lambda step: session.advance(self._step_back_work),
                on_replay=on_replay,
            )
            make_pass_of_each = partial(
                backward_pass_of_each,
                task.problem,
                step,
                keep_bits=True,  # what is measured beside the hypergradient changes it by rounding at most
                window=window,
                on_step=lambda step: session.advance(self._step_back_work),
                on_replay=on_replay,
            )
            self._backward_pass_of_each = make_pass_of_each()
            if measures_product_error(outer):
                self._backward_pass_with_highest = make_pass_of_each(step_of_last=task.train_step)
        self._pause: Callable[[], None] = lambda: None
        """Saves the backward pass in its middle, if it is time to."""

    @contextlib.contextmanager
    def saving_in(self, folder: Path) -> Iterator[None]:
        """Inside, what is saved in the middle of outer steps lies in another folder; what is compiled stays."""
        own_folder, self.folder = self.folder, folder
        try:
            yield
        finally:
            self.folder = own_folder

    def init_state(self, params: Params) -> TrainState:
        """The state before the first step."""
        return replicate_unplaced(self.task.mesh, init_train_state(self.task.optimizer, params))

    def run(
        self,
        weights: jax.Array,
        start: TrainState,
        stream: Stream,
        *,
        for_backward: bool = False,
        outer_step: int | None = None,
        on_params: Callable[[int, Params], None] | None = None,
    ) -> Trajectory:
        """Train once; with `for_backward`, store the states that `estimate` reads on its way back.

        With `outer_step` it is saved when due, and resumed from where it was saved. `on_params` is called with the
        number of finished steps and the parameters after each of them.
        """
        task, session = self.task, self.session
        restored = None if outer_step is None else self._load_mid_step(outer_step, start, weights)
        plan = self._plan_checkpoints(weights, start, stream) if for_backward else checkpointing.NO_CHECKPOINTS
        snapshots: MutableMapping[int, TrainState] = {}
        if for_backward:
            states_folder = self.folder / "states"
            snapshots = trajectory_store.make_state_store(self.outer, states_folder, start, resume=restored is not None)
        resume_state = None if restored is None else restored.checkpoint.state
        if restored is not None:
            steps_done = int(restored.checkpoint.state.step)
            snapshots.update(restored.snapshots)
            for later in [step for step in snapshots if step > steps_done]:
                del snapshots[later]  # of the minutes that were lost
            session.restore_work(steps_done)
        monitor = _RunMonitor(self, weights, start, stream, snapshots, outer_step, resume_state, on_params)
        run = train(
            task.train_step,
            start,
            weights,
            task.frozen(start.params),
            stream,
            plan=plan,
            first_backward_step=self._first_backward_step,
            snapshots=snapshots,
            resume=resume_state,
            on_step=monitor.on_step,
        )
        monitor.check(run.end.params)
        return run

    def _plan_checkpoints(self, weights: jax.Array, start: TrainState, stream: Stream) -> CheckpointPlan:
        train_step = self.task.train_step

        def linearization_size() -> float:
            batch = stream.batch(0)
            frozen = self.task.frozen(start.params)
            return trajectory_store.linearization_bytes(
                train_step, start, train_step.gather(weights, batch), frozen, batch
            )

        return trajectory_store.plan_checkpoints(
            self.outer, self.task.num_steps, start, self.task.base_params, linearization_size=linearization_size
        )

    def validation_loss(
        self, weights: jax.Array, start: TrainState, stream: Stream, validation: Stream, loss_fn: Any
    ) -> float:
        """Train, store nothing, and return the validation loss; certificates call it often."""
        session, task = self.session, self.task

        def on_step(state: TrainState, info: StepMetrics) -> None:
            session.advance()
            session.check_signals()

        run = train(
            task.train_step,
            start,
            weights,
            task.frozen(start.params),
            stream,
            plan=checkpointing.NO_CHECKPOINTS,
            on_step=on_step,
        )
        return float(fetch_from_first(loss_fn(run.end.params, task.frozen(start.params), validation)))

    def estimate(
        self,
        run: Trajectory,
        weights: jax.Array,
        stream: Stream,
        *,
        outer_step: int | None = None,
        halves_seed: int | None = None,
        dev_seed: int | None = None,
        turn: Turn | None = None,
        with_product_error: bool = False,
    ) -> Estimate:
        """The hypergradient of validation loss by the configured method; `turn` says which examples train and judge.

        With `halves_seed`, `half_difference` is that of the two halves of the judges that `draw_halves` draws;
        with `dev_seed`, `independent` holds the hypergradient of dev loss and the difference of two halves of dev. With
        `with_product_error`, and outer.product_precision below the highest, `checks.product_error` says what that
        changes: validation goes back once more at the highest. All go back beside the hypergradient, which they change
        by rounding at most.
        """
        validation = turn_validation_stream(self.task, turn)
        extra = self._extra_streams(halves_seed, dev_seed, turn)
        if self._backward_pass is None or self._backward_pass_of_each is None:
            estimate_at_end = partial(
                self.estimate_at_end, run, weights, train_stream=turn_full_pass_stream(self.task, turn)
            )
            grads = {name: estimate_at_end(validation=outer_stream).grad for name, outer_stream in extra.items()}
            return _add_grads(estimate_at_end(validation=validation), grads)
        streams, with_highest = [validation, *extra.values()], self._backward_pass_with_highest
        if with_product_error and with_highest is not None:
            estimates = self._go_back(run, weights, stream, [*streams, validation], with_highest, outer_step)
            return self._add_product_error(_split_losses(estimates, list(extra)), estimates)
        if extra:
            estimates = self._go_back(run, weights, stream, streams, self._backward_pass_of_each, outer_step)
            return _split_losses(estimates, list(extra))
        return self._go_back(run, weights, stream, validation, self._backward_pass, outer_step)

    def estimate_each(
        self,
        run: Trajectory,
        weights: jax.Array,
        stream: Stream,
        validations: Sequence[Stream],
        *,
        outer_step: int | None = None,
    ) -> list[Estimate]:
        """The hypergradients of several outer losses, such as those of parts of validation, side by side."""
        if self._backward_pass_of_each is None:
            return [self.estimate_at_end(run, weights, validation=validation) for validation in validations]
        estimates = self._go_back(run, weights, stream, validations, self._backward_pass_of_each, outer_step)
        return [_pick_loss(estimates, place) for place in range(len(validations))]

    def _go_back(
        self,
        run: Trajectory,
        weights: jax.Array,
        stream: Stream,
        validation: Stream | Sequence[Stream],
        passes: BackwardPass,
        outer_step: int | None,
    ) -> Estimate:
        """The whole backward pass of one outer loss, or of several side by side, whose estimates lead with [losses]."""
        fixed = self.task.frozen(run.start.params)
        num_losses = 1 if isinstance(validation, Stream) else len(validation)
        self._step_back_work = backward_step_work(num_losses)
        if passes is self._backward_pass_with_highest:  # whose last loss has primal passes of its own
            self._step_back_work = backward_step_work(num_losses - 1) + HVP_WORK
        restored = None if outer_step is None else self._load_mid_step(outer_step, run.start, weights)
        if restored is not None and restored.checkpoint.backward_state.step >= 0:
            backward_state = restored.checkpoint.backward_state
            self.session.restore_work(self._step_back_work * (run.steps - backward_state.step))
        else:
            backward_state = passes.init(run, weights, fixed, validation)

        def pause() -> None:
            if self.session.should_save():
                if outer_step is not None:
                    self._save_mid_step(outer_step, run.start, run.end, run.snapshots, backward_state, num_losses)
                self.session.mark_saved()

        self._pause = pause
        while not passes.is_done(run, backward_state):
            backward_state = passes.advance(run, weights, fixed, stream, backward_state)
            pause()
        self._pause = lambda: None  # the other holds this run's states
        delete_stored_states(run)
        return passes.finish(run, backward_state)

    @staticmethod
    def _add_product_error(estimate: Estimate, estimates: Estimate) -> Estimate:
        """With what lower precision of the products changes; the last of the estimates has the highest."""
        highest = tree.take(estimates.grad, -1)
        error = measure_product_error(estimate.grad, highest, is_per_example=True)
        return estimate._replace(checks=estimate.checks._replace(product_error=error))

    def draw_halves(self, part: str, seed: int) -> Float[np.ndarray, "examples"]:
        """The factors of the examples of validation or dev in the difference of two halves, in the order of
        `held_out_examples`: `certify.validation_halves` of each target, and 0 for those that are too long."""
        halves = np.zeros(len(self.task.held_out_examples[part]))
        for place, kept in enumerate(self._kept_of_targets(part)):
            halves[kept] = certify.validation_halves(len(kept), seed + TARGET_SEED_STRIDE * place)
        return halves

    def halved_stream(self, part: str, seed: int) -> Stream:
        """A stream that sums to the difference of the two halves of validation or dev that `draw_halves` draws."""
        halves = replicate(self.task.mesh, self.draw_halves(part, seed).astype(jnp.result_type(float)))
        return halve_stream(self.task.held_out_streams[part], halves)

    def has_halves(self, part: str) -> bool:
        """Whether a part has the two examples that two halves need, of each target that reads examples."""
        sizes = [
            len(kept)
            for target, kept in zip(self.task.outer_objective.targets, self._kept_of_targets(part), strict=False)
            if target.has_examples
        ]
        return bool(sizes) and min(sizes) > 1

    def _kept_of_targets(self, part: str) -> list[Int[np.ndarray, "kept"]]:
        """The examples of each target that the stream of a part holds."""
        if part not in self._held_out_indices:
            return []
        return split_by_target(self._held_out_indices[part], self.task.target_sizes[part])

    def num_held_out(self, part: str) -> int:
        """The number of examples of a part that its stream holds."""
        return len(self._held_out_indices.get(part, ()))

    @cached_property
    def _held_out_indices(self) -> dict[str, Int[np.ndarray, "kept"]]:
        """The examples of each part that its stream holds."""
        return {part: held_out_indices(stream) for part, stream in self.task.held_out_streams.items()}

    def _extra_streams(self, halves_seed: int | None, dev_seed: int | None, turn: Turn | None) -> dict[str, Stream]:
        """The outer losses that go back beside that of validation, by the name of what they give."""
        streams: dict[str, Stream] = {}
        if halves_seed is not None and turn is not None and len(turn.judges) > 1:
            streams["half_difference"] = halved_validation_stream(self.task, halves_seed, turn)
        elif halves_seed is not None and turn is None and self.has_halves("validation"):
            streams["half_difference"] = self.halved_stream("validation", halves_seed)
        if dev_seed is not None and self.has_halves("dev"):
            streams["dev"] = self.task.held_out_streams["dev"]
            streams["dev_half_difference"] = self.halved_stream("dev", dev_seed)
        return streams

    def estimate_at_end(
        self,
        run: Trajectory,
        weights: jax.Array,
        *,
        alignment: bool = False,
        train_stream: Stream | None = None,
        validation: Stream | None = None,
    ) -> Estimate:
        """Estimates that read the end of training only: implicit, or alignment, <grad l_i, grad L_v>.

        `train_stream` and `validation` replace all training examples, read anew in each pass, and the validation set.
        """
        task, outer = self.task, self.outer
        fixed = task.frozen(run.start.params)
        train_stream = train_stream or task.full_pass_stream(seed=0)
        validation = validation or task.held_out_streams["validation"]
        if alignment or outer.method == "alignment":
            estimator = self._alignment
        else:
            # A LoRA product has many factorings; a prior on the factors singles out the balanced one.
            params = balance_adapters(run.end.params) if task.base_params is not None else run.end.params
            run = run._replace(end=run.end._replace(params=params))
            estimator = self._implicit
        self.session.advance(2 * train_stream.steps)
        estimate = estimator(run, weights, fixed, train_stream, validation)
        if not alignment and outer.method == "implicit":  # where the batches were doubled: the last solve alone
            self.session.advance(HVP_WORK * int(estimate.checks.steps * estimate.checks.batches))
        if task.base_params is None or alignment:
            return estimate
        # The prior's centre is not balanced along, so its slope, and with it the gap, would depend on the factoring.
        return estimate._replace(checks=estimate.checks._replace(gap=float("nan")))

    @cached_property
    def _alignment(self) -> Estimator:
        return implicit_estimator(self.task.problem, self._curvature_product(), solvers.identity())

    @cached_property
    def _implicit(self) -> Estimator:
        solver, batches = SOLVERS[self.outer.solver](self.outer), self.outer.curvature_batches
        return implicit_estimator(
            self.task.problem, self._curvature_product(), solver, batches=batches, fetch=fetch_from_first
        )

    def _curvature_product(self) -> curvature.CurvatureProduct:
        if self.outer.curvature == "hessian":
            return curvature.hessian(self.task.problem)
        return curvature.gauss_newton(self.task.problem, self.task.objective.composite_loss)

    # ---- saving in the middle

    @property
    def _first_backward_step(self) -> int:
        """The step at which backward passes end."""
        return self.task.num_steps - trajectory_store.num_backward_steps(self.outer, self.task.num_steps)

    def _empty_backward_state(self, start: TrainState, weights: jax.Array, num_losses: int = 1) -> BackwardState:
        zero = jnp.zeros((), jax.tree.leaves(start.params)[0].dtype)
        carried = (Adjoint(start.params, tree.inexact_leaves(start.opt_state)), weights, zero, zero, zero)
        if num_losses > 1:
            carried = tree.repeat(carried, num_losses)
        return replicate_unplaced(self.task.mesh, BackwardState(-1, start, *carried, jnp.array(True)))

    def save_training(
        self,
        outer_step: int,
        state: TrainState,
        snapshots: MutableMapping[int, TrainState],
        start: TrainState,
        weights: jax.Array,
    ) -> None:
        """Save a training run in its middle."""
        self._save_mid_step(outer_step, start, state, snapshots, self._empty_backward_state(start, weights))

    def _save_mid_step(
        self,
        outer_step: int,
        start: TrainState,
        state: TrainState,
        snapshots: MutableMapping[int, TrainState],
        backward_state: BackwardState,
        num_losses: int = 1,
    ) -> None:
        """What is on disk already is not written again."""
        steps = [] if isinstance(snapshots, trajectory_store.DiskStore) else sorted(snapshots)
        if isinstance(snapshots, trajectory_store.DiskStore):
            snapshots.wait_until_written()
        midway = MidStepCheckpoint(state, [snapshots[step] for step in steps], backward_state)
        meta = {"kept": steps, "losses": num_losses, "layout": self._describe_layout(start)}
        checkpoint.save_checkpoint(self.folder, outer_step, midway, meta, max_to_keep=1)

    def _describe_layout(self, start: TrainState) -> dict[str, Any]:
        """What the bits of a training depend on beside its numbers: the mesh, how its state is split, the processes."""
        mesh = self.task.mesh
        return {
            "mesh": f"{mesh.shape['data']} x {mesh.shape['fsdp']}",
            "processes": jax.process_count(),
            "parts": [list(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(start)],
        }

    def _load_mid_step(self, outer_step: int, start: TrainState, weights: jax.Array) -> "RestoredMidStep | None":
        meta = checkpoint.read_checkpoint_meta(self.folder, outer_step)
        if meta is None:
            return None
        layout = self._describe_layout(start)
        saved = meta.get("layout", layout)
        if saved != layout:  # replayed steps would not have the bits of those that were trained there
            if outer_step not in self._told_steps:
                self._told_steps.add(outer_step)
                self.session.print_line(
                    f"outer step {outer_step} was stopped in its middle on {_name_layout(saved)}; on "
                    f"{_name_layout(layout)} it is made again from its start"
                )
            return None
        empty = self._empty_backward_state(start, weights, meta["losses"])
        like = MidStepCheckpoint(start, [start] * len(meta["kept"]), empty)
        restored = checkpoint.restore_checkpoint(self.folder, like, outer_step)
        return restored and RestoredMidStep(
            restored.tree, dict(zip(meta["kept"], restored.tree.snapshots, strict=True))
        )


class _RunMonitor:
    """What happens after each step of a training run: progress, the check for finite losses, saves."""

    def __init__(
        self,
        trainer: Trainer,
        weights: jax.Array,
        start: TrainState,
        stream: Stream,
        snapshots: MutableMapping[int, TrainState],
        outer_step: int | None,
        resume_state: TrainState | None,
        on_params: Callable[[int, Params], None] | None,
    ):
        self.trainer, self.weights, self.start, self.stream = trainer, weights, start, stream
        self.snapshots, self.outer_step, self.on_params = snapshots, outer_step, on_params
        self.steps_done = 0 if resume_state is None else int(resume_state.step)
        self._unread_losses: dict[int, jax.Array] = {}

    def on_step(self, state: TrainState, metrics: StepMetrics) -> None:
        """Count, check and save where it is time to."""
        session = self.trainer.session
        self._unread_losses[self.steps_done] = metrics.loss
        self.steps_done += 1
        session.advance()
        if self.on_params is not None:
            self.on_params(self.steps_done, state.params)
        due = session.should_save()
        if due or self.steps_done % FINITE_CHECK_INTERVAL == 0:  # not at each step: reading a loss waits for the device
            self.check(state.params)
            self._unread_losses.clear()
        if due:
            if self.outer_step is not None:
                self.trainer.save_training(self.outer_step, state, self.snapshots, self.start, self.weights)
            session.mark_saved()

    def check(self, params: Params) -> None:
        """A FloatingPointError where a loss since the last check, or a parameter, is not finite."""
        check_finite(self.trainer.task, self._unread_losses, self._explain, params)

    def _explain(self, step: int) -> str:
        task = self.trainer.task
        earlier = [place for place in self.snapshots if place <= step]
        origin = self.snapshots[max(earlier)] if earlier else self.start
        return find_first_nonfinite(
            task.problem,
            task.optimizer,
            task.objective.losses,
            origin,
            step,
            task.frozen(self.start.params),
            lambda at: (self.weights, self.stream.batch(at)),
            lambda index: describe_example(task, index),
        )


def measures_product_error(outer: OuterSection) -> bool:
    """Whether something is to be told of the products in the steps back: with the highest precision nothing is."""
    return outer.product_precision != "highest" and outer.method in ("unrolled", "window")


def backward_step_work(num_losses: int) -> float:
    """Work of a step back through so many outer losses side by side, in training steps."""
    return REPLAY_WORK + HVP_WORK + EXTRA_LOSS_WORK * (num_losses - 1)


def _pick_loss(estimates: Estimate, place: int) -> Estimate:
    """The estimate of one of several outer losses."""
    grad, validation_loss, direction = tree.take(
        (estimates.grad, estimates.validation_loss, estimates.direction), place
    )
    checks = estimates.checks._replace(growth=float(jnp.asarray(estimates.checks.growth)[place]))
    return Estimate(grad, validation_loss, direction, checks, estimates.params)


def _split_losses(estimates: Estimate, extra_names: list[str]) -> Estimate:
    """The estimate of the first of several outer losses, with the hypergradients of the others."""
    grads = {name: _pick_loss(estimates, place).grad for place, name in enumerate(extra_names, start=1)}
    return _add_grads(_pick_loss(estimates, 0), grads)


def _add_grads(estimate: Estimate, grads: dict[str, Hyper]) -> Estimate:
    independent = (grads["dev"], grads["dev_half_difference"]) if "dev" in grads else ()
    return estimate._replace(half_difference=grads.get("half_difference", ()), independent=independent)


def _name_layout(layout: dict[str, Any]) -> str:
    """In words, as `Trainer._describe_layout` describes it."""
    count = layout["processes"]
    return f"{layout['mesh']} devices of {count} process{'es' * (count > 1)}"


def delete_stored_states(run: Trajectory) -> None:
    """Remove the states that a run stored on disk for a backward pass."""
    if isinstance(run.snapshots, trajectory_store.DiskStore):
        run.snapshots.clear()


def check_finite(
    task: Task,
    losses: dict[int, jax.Array],
    explain: Callable[[int], str],
    params: Params,
    *,
    allow_nonfinite: bool = False,
) -> dict[int, float]:
    """The losses by step, as numbers, where they (unless `allow_nonfinite`) and the parameters after them are finite.

    Otherwise a FloatingPointError that says where it began: `explain` takes the steps up to that one again. Of several
    processes all call this, and go by the numbers of the first.
    """
    if not losses:  # in all processes
        return {}
    values = dict(
        zip(losses, fetch_from_first(np.array([float(loss) for loss in losses.values()])).tolist(), strict=True)
    )
    step = next((step for step, value in values.items() if not np.isfinite(value) and not allow_nonfinite), None)
    if step is None and fetch_from_first(_all_finite(params)):
        return values
    what = f"the training loss is {values[step]}" if step is not None else "the parameters are not finite"
    last = max(values) if step is None else step
    raise FloatingPointError(
        f"{what} at step {last} of {task.num_steps}: {explain(last)}. Lower optimizer.learning_rate, set "
        "optimizer.max_grad_norm, or look at these rows, and start anew with --out."
    )


_all_finite = jax.jit(tree.all_finite)


def check_hypergradient_finite(estimate: Estimate, name: str, *, alternative: str = "") -> None:
    """A FloatingPointError where an estimate is not finite; `name` says whose it is, `alternative` what else helps."""
    if not bool(_all_finite(estimate.grad)):
        raise FloatingPointError(
            f"the hypergradient of {name} is not finite ({estimate.checks}). Training itself was finite: raise "
            f"optimizer.eps_root, or lower optimizer.learning_rate{alternative}."
        )


def describe_example(task: Task, index: int) -> str:
    """A row of the corpus for an error: its id and, where it is known, the file and line that it stands in."""
    fit = index - task.num_examples
    example = task.examples[index] if fit < 0 else task.held_out_examples["validation"][fit]
    where = getattr(example, "where", "")
    identity = getattr(example, "id", str(index))
    return f"{identity} ({where})" if where else identity


SOLVERS = {
    "cg": lambda outer: solvers.cg(tolerance=outer.tolerance, max_steps=outer.max_iterations, fetch=fetch_from_first),
    "neumann": lambda outer: solvers.neumann(step_size=outer.neumann_rate, terms=outer.max_iterations),
    "dense": lambda outer: solvers.dense(),
    "identity": lambda outer: solvers.identity(),
}
