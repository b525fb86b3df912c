"""One training run and one estimate of a task: resumable in the middle, watched for numbers that are not finite."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.core import curvature, linsolve, tree
from bilevel_jax.core.implicit import implicit
from bilevel_jax.core.transition import begin, snapshot_interval, train
from bilevel_jax.core.types import Adjoint, Estimate, Estimator, Info, Inner, Params, Run, Stream, Sweep
from bilevel_jax.core.unrolled import Sweeper, sweeper
from bilevel_jax.lm.models import balance
from bilevel_jax.runs import checkpoint, processes
from bilevel_jax.runs import mesh as placing
from bilevel_jax.runs.classification import ArrayTask
from bilevel_jax.runs.diagnosis import first_broken
from bilevel_jax.runs.sections import Outer
from bilevel_jax.runs.session import Session
from bilevel_jax.runs.task import Task

REPLAY, PRODUCT = 1.0, 3.0
"""Work of a sweep step in training steps: a replayed step is one, a Hessian product with its primal about three."""


class Midway(NamedTuple):
    """What is saved in the middle of an outer step; always of one structure, so that loading needs no questions."""

    state: Inner
    snapshots: list[Inner]
    sweep: Sweep


class Trainer:
    """Trains a task and estimates its hypergradient; compiled once, used for every outer step."""

    def __init__(self, task: Task | ArrayTask, outer: Outer, session: Session):
        self.task, self.outer, self.session = task, outer, session
        self.every = snapshot_interval(task.steps)
        self.folder: Path = session.folder / "checkpoints" / "inner"
        split = dict(task.mesh.shape).get("model", 1) > 1
        if outer.method == "implicit" and split and processes.several() and jax.default_backend() == "cpu":
            raise ValueError(
                "outer.method = implicit with devices.model above 1 can hang in several processes on CPUs: the many "
                "small programs of its solve wait for each other. Set devices.model to 1, or outer.method to unrolled."
            )
        window = outer.window if outer.method == "window" else None
        self._sweeps: Sweeper | None = None
        if outer.method in ("unrolled", "window"):
            swept = lambda step: session.advance(REPLAY + PRODUCT)  # noqa: E731
            self._sweeps = sweeper(task.problem, task.step, window=window, on_step=swept)

    def begin(self, params: Params) -> Inner:
        """The state before the first step."""
        return placing.settled(self.task.mesh, begin(self.task.optimizer, params))

    def run(self, weights: jax.Array, start: Inner, stream: Stream, *, save_as: int | None = None) -> Run:
        """Train once. With `save_as` (the outer step) it is saved when due, and goes on from where it was saved."""
        task, session = self.task, self.session
        snapshots: dict[int, Inner] = {}
        saved = None if save_as is None else self._load(save_as, start, weights)
        if saved is not None:
            count = -(-int(saved.state.step) // self.every)
            snapshots = {index * self.every: snapshot for index, snapshot in enumerate(saved.snapshots[:count])}
            session.advance(int(saved.state.step))
        losses: dict[int, jax.Array] = {}
        reached = 0 if saved is None else int(saved.state.step)

        def explain(step: int) -> str:
            began = max(snapshots, default=0)
            return first_broken(
                task.problem, task.optimizer, task.objective.losses, snapshots.get(began, start), step,
                task.fixed(start.params), lambda at: (weights, stream.batch(at)), lambda row: row_name(task, row),
            )  # fmt: skip

        def on_step(state: Inner, info: Info) -> None:
            nonlocal reached
            losses[reached] = info.loss
            reached += 1
            session.advance()
            due = session.due()
            if due or reached % self.every == 0:  # not at every step: reading a loss waits for the device
                check_finite(task, losses, explain, state.params)
                losses.clear()
            if due:
                if save_as is not None:
                    self._save(save_as, Midway(state, self._listed(snapshots, start), self._no_sweep(start, weights)))
                session.saved()

        store = (snapshots.__setitem__, snapshots.__getitem__)
        run = train(
            task.step, start, weights, task.fixed(start.params), stream,
            every=self.every, store=store, resume=None if saved is None else saved.state, on_step=on_step,
        )  # fmt: skip
        check_finite(task, losses, explain, run.end.params)
        return run

    def value(self, weights: jax.Array, start: Inner, stream: Stream, validation: Stream, value: Any) -> float:
        """Train, keep nothing, and return L_v: what certificates ask for again and again."""
        session, task = self.session, self.task

        def on_step(state: Inner, info: Info) -> None:
            session.advance()
            session.check()

        discard = (lambda index, state: None, lambda index: start)
        run = train(task.step, start, weights, task.fixed(start.params), stream, store=discard, on_step=on_step)
        return float(value(run.end.params, task.fixed(start.params), validation))

    def estimate(self, run: Run, weights: jax.Array, stream: Stream, *, save_as: int | None = None) -> Estimate:
        """The hypergradient of L_v on V_fit by the configured method."""
        task, fixed = self.task, self.task.fixed(run.start.params)
        validation = task.held_out["fit"]
        if self._sweeps is None:
            return self.direct(run, weights)
        saved = None if save_as is None else self._load(save_as, run.start, weights)
        sweep = saved.sweep if saved is not None and saved.sweep.segment >= -1 else None
        if sweep is None:
            sweep = self._sweeps.begin(run, weights, fixed, validation)
        else:
            self.session.advance((REPLAY + PRODUCT) * (run.steps - (sweep.segment + 1) * self.every))
        while not self._sweeps.done(run, sweep):
            sweep = self._sweeps.advance(run, weights, fixed, stream, sweep)
            if self.session.due():
                if save_as is not None:
                    snapshots = {index * self.every: run.snapshot(index * self.every) for index in range(self.slots)}
                    self._save(save_as, Midway(run.end, self._listed(snapshots, run.start), sweep))
                self.session.saved()
        return self._sweeps.finish(run, sweep)

    def direct(
        self,
        run: Run,
        weights: jax.Array,
        *,
        alignment: bool = False,
        summed: Stream | None = None,
        validation: Stream | None = None,
    ) -> Estimate:
        """Estimates that read the end of training only: implicit, or alignment, <grad l_i, grad L_v>.

        `summed` (default: all rows, read anew in each pass) and `validation` (default: V_fit) take their places.
        """
        task, outer = self.task, self.outer
        fixed = task.fixed(run.start.params)
        summed = summed or task.summed(seed=0)
        validation = validation or task.held_out["fit"]
        if alignment or outer.method == "alignment":
            estimator = self._alignment
        else:
            # A LoRA product has many factorings; a prior on the factors singles out the balanced one.
            params = balance(run.end.params) if task.base is not None else run.end.params
            run = run._replace(end=run.end._replace(params=params))
            estimator = self._implicit
        self.session.advance(2 * summed.steps)
        estimate = estimator(run, weights, fixed, summed, validation)
        if not alignment and outer.method == "implicit":  # where the batches were doubled: the last solve alone
            self.session.advance(PRODUCT * estimate.checks.steps * estimate.checks.batches)
        if task.base is None or alignment:
            return estimate
        # The prior's centre is not balanced along, so its slope, and with it the gap, would depend on the factoring.
        return estimate._replace(checks=estimate.checks._replace(gap=float("nan")))

    @cached_property
    def _alignment(self) -> Estimator:
        return implicit(self.task.problem, self._product(), linsolve.identity())

    @cached_property
    def _implicit(self) -> Estimator:
        solver, batches = SOLVERS[self.outer.solver](self.outer), self.outer.curvature_batches
        return implicit(self.task.problem, self._product(), solver, batches=batches)

    def _product(self) -> curvature.Product:
        if self.outer.curvature == "hessian":
            return curvature.hessian(self.task.problem)
        return curvature.gauss_newton(self.task.problem, self.task.objective.loss)

    # ---- saving in the middle

    @property
    def slots(self) -> int:
        """Snapshots that a run keeps."""
        return -(-self.task.steps // self.every)

    def _listed(self, snapshots: dict[int, Inner], start: Inner) -> list[Inner]:
        return [snapshots.get(index * self.every, start) for index in range(self.slots)]

    def _no_sweep(self, start: Inner, weights: jax.Array) -> Sweep:
        zero = jnp.zeros((), jax.tree.leaves(start.params)[0].dtype)
        adjoint = Adjoint(start.params, tree.inexact(start.opt))
        return placing.settled(self.task.mesh, Sweep(-2, adjoint, weights, zero, zero, zero, jnp.array(True)))

    def _save(self, outer_step: int, midway: Midway) -> None:
        checkpoint.save(self.folder, outer_step, midway, {}, keep=1)

    def _load(self, outer_step: int, start: Inner, weights: jax.Array) -> Midway | None:
        like = Midway(start, [start] * self.slots, self._no_sweep(start, weights))
        if outer_step not in checkpoint.steps(self.folder):
            return None
        found = checkpoint.restore(self.folder, like)
        return found.tree if found and found.step == outer_step else None


def check_finite(
    task: Task | ArrayTask,
    losses: dict[int, jax.Array],
    explain: Callable[[int], str],
    params: Params,
    *,
    forgiven: bool = False,
) -> dict[int, float]:
    """The losses by step, as numbers, where they (unless `forgiven`) and the parameters after them are finite.

    Otherwise a FloatingPointError that says where it began: `explain` takes the steps up to that one again.
    """
    values = {step: float(loss) for step, loss in losses.items()}
    step = next((step for step, value in values.items() if not np.isfinite(value) and not forgiven), None)
    if step is None and (not values or bool(_finite(params))):
        return values
    what = f"the training loss is {values[step]}" if step is not None else "the parameters are not finite"
    last = max(values) if step is None else step
    raise FloatingPointError(
        f"{what} at step {last} of {task.steps}: {explain(last)}. Lower optimizer.learning_rate, set optimizer.clip, "
        "or look at these rows. The last good checkpoint is kept: --resume goes on from it."
    )


_finite = jax.jit(tree.finite)


def row_name(task: Task | ArrayTask, row: int) -> str:
    """A row of the corpus for an error: its id and, where it is known, the file and line that it stands in."""
    fit = row - task.rows
    example = task.examples[row] if fit < 0 else task.trusted["fit"][fit]
    where = getattr(example, "where", "")
    identity = getattr(example, "id", str(row))
    return f"{identity} ({where})" if where else identity


SOLVERS = {
    "cg": lambda outer: linsolve.cg(tolerance=outer.tolerance, max_steps=outer.max_iterations),
    "neumann": lambda outer: linsolve.neumann(rate=outer.neumann_rate, terms=outer.max_iterations),
    "dense": lambda outer: linsolve.dense(),
    "identity": lambda outer: linsolve.identity(),
}
