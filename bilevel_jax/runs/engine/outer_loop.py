"""Outer loop of hypergradient descent on per-example weights."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from bilevel_jax.core import tree, weightings
from bilevel_jax.core.types import Estimate, Hyper, Params, Stream, TrainState, Trajectory, Weighting
from bilevel_jax.core.unrolled import check_differentiable, validation_loss_fn
from bilevel_jax.core.weightings import (
    PartReliability,
    RaterVariable,
    SharedWeightVariable,
)
from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.config.schema import DataSection, OuterSection, RaterSection, ScoresSection
from bilevel_jax.runs.engine.folds import (
    Turn,
    leave_out_fold,
    take_turn,
    turn_training_stream,
    turn_validation_stream,
)
from bilevel_jax.runs.engine.raters import RaterFeatures, make_rater_features, make_rater_weighting
from bilevel_jax.runs.engine.reliability import (
    FLOOR_REASON,
    describe_product_error,
    fields_to_json,
    is_reliability_at_floor,
    measure_estimate_reliability,
    measures_reliability,
    reliability_to_record,
)
from bilevel_jax.runs.engine.trainer import Trainer, check_hypergradient_finite
from bilevel_jax.runs.infra import checkpoint, distributed, run_dir
from bilevel_jax.runs.infra.distributed import fetch_from_first, fetch_to_host
from bilevel_jax.runs.infra.placement import padded_table_size, place_table
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring.pooling import (
    PoolingState,
    StepPooling,
    describe_fallback,
    empty_pooling_state,
    pools_steps,
)
from bilevel_jax.runs.scoring.scores import warm_start_logits
from bilevel_jax.runs.tasks.evaluation import (
    evaluate_per_example,
    held_out_losses,
    read_labels,
)
from bilevel_jax.runs.tasks.optimizers import DECAY_SHAPES
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.sources import require_sources

OuterRecords = list[dict[str, Any]]
ProgressFunction = Callable[[OuterRecords], float]
"""Records of the steps so far -> how far the loop is: 0 at the start, at most 1 while another step may be made."""


class OuterState(NamedTuple):
    """What the outer loop carries from step to step and a checkpoint keeps."""

    hyper: Hyper
    best_hyper: Hyper
    best_hypergradient: Float[Array, "examples"]
    first_hypergradient: Float[Array, "examples"]
    alignment: Float[Array, "examples"]
    """Alignment at the end of the first (uniform) training: a baseline."""
    losses: Float[Array, "examples"]
    """The loss of each example at the end of the first (uniform) training: a baseline."""
    start_params: Params
    """Where the next training starts; moves with restart: warm."""
    pooling: PoolingState | tuple[()] = ()
    """() where steps are not pooled."""


class LearnedRater(NamedTuple):
    """A rater as the outer loop has learned it."""

    features: RaterFeatures
    variable: RaterVariable
    without_folds: Float[np.ndarray, "folds coefficients"] | None = None
    """With rater.folds, the coefficients of the loops that each lack a fold of the validation set."""


class LearnedWeights(NamedTuple):
    """The weights, where they come from, and how the loop went."""

    weights: Float[np.ndarray, "examples"]
    hypergradient: Float[np.ndarray, "examples"]
    first_hypergradient: Float[np.ndarray, "examples"]
    alignment: Float[np.ndarray, "examples"]
    losses: Float[np.ndarray, "examples"]
    records: OuterRecords
    best_step: int
    """The outer step whose weights these are."""
    stop_reason: str
    """Why the loop ended, in words."""
    validation_weight: float = 1.0
    """The weight of each validation example in a training on them, too; learned with outer.validation_folds."""
    validation_hypergradient: Float[np.ndarray, "validation"] = np.zeros(0)
    """With outer.validation_folds, d L_v / d weight of each validation example; 0 for those that judged."""
    first_validation_hypergradient: Float[np.ndarray, "validation"] = np.zeros(0)
    """The same at weight 1 for every example."""
    rater: LearnedRater | None = None
    """Where outer.weighting is rater."""

    def corpus_weights(self, task: Task) -> Float[np.ndarray, "corpus"]:
        """The weights of the training examples, then those of validation."""
        weights = np.full(task.corpus.num_examples, self.validation_weight)
        weights[: task.num_examples] = self.weights
        return weights


def data_order_seed(data: DataSection, outer: OuterSection, step: int) -> int:
    """The seed of an outer step's data order: a new one at each restart, or the weights over-fit one order."""
    return data.seed + (step if outer.reshuffle else 0)


def make_weighting(task: Task, name: str, rater: RaterSection, rater_features: RaterFeatures | None) -> Weighting:
    """The map from the outer variable to the weight table, by its name in outer.weighting."""
    table_size = padded_table_size(task.num_examples)
    if name == "per_source":
        sources = require_sources(task, "outer.weighting = per_source")
        return weightings.rater(np.eye(len(sources.names))[sources.indices], table_size=table_size)
    if rater_features is not None:
        return make_rater_weighting(rater_features, rater)
    factory = {"softmax": weightings.softmax, "sigmoid": weightings.sigmoid}[name]
    return factory(task.num_examples, table_size)


def compute_baseline_scores(
    task: Task, trainer: Trainer, run: Trajectory, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(alignment, loss) of every example at the end of a run: what the simple selections rank by."""
    estimate = trainer.estimate_at_end(run, weights, alignment=True)
    fixed = task.frozen(run.start.params)
    losses = evaluate_per_example(
        task.objective.losses, run.end.params, fixed, task.full_pass_stream(seed=0), task.num_examples
    )
    return estimate.grad, place_table(task.mesh, losses.astype(estimate.grad.dtype))


def outer_learning_rate(outer: OuterSection, progress: float) -> float:
    """The rate of the weights at a point of the loop: outer.learning_rate, falling to 0 at 1 as outer.schedule says.

    A normalised step has the same length wherever it is made, and each is of another data order: at a constant rate
    the weights keep the noise of the last orders, at a falling one it averages out.
    """
    return outer.learning_rate * float(DECAY_SHAPES[outer.schedule](progress))


def total_outer_learning_rate(outer: OuterSection) -> float:
    """The sum of the rates of outer.steps steps: how far a logit goes if every step is of the rms length."""
    return sum(outer_learning_rate(outer, step / outer.steps) for step in range(outer.steps))


def run_outer_loop(
    task: Task,
    trainer: Trainer,
    session: Session,
    *,
    data: DataSection,
    train_seed: int,
    scores: ScoresSection,
    rater: RaterSection = RaterSection(),  # noqa: B008 (frozen)
    progress: ProgressFunction | None = None,
    leave_out: bool = False,
) -> LearnedWeights:
    """Optimise the weights by hypergradients of the validation loss, and return the best by dev loss.

    Each step trains with the present weights, reads the validation loss, estimates the hypergradient, and moves the
    outer variable along the hypergradient divided by its rms, at the learning rate of its place in the loop. Without
    dev the last weights are returned. Ends after outer.steps steps (with `progress`, where it passes 1 instead), after
    outer.patience steps without a better dev loss, or where the effective sample size falls below outer.ess_floor.

    With `leave_out` and rater.folds a rater's steps are made again without each fold of the validation set.
    """
    if leave_out and rater.folds:
        leave_out_fold(task, rater.folds, data.seed, 0)  # an error before any work where there are too few examples
    loop = OuterLoop(
        task, trainer, session, data=data, train_seed=train_seed, scores=scores, rater=rater, progress=progress
    )
    while not (stop_reason := loop.stop_reason()):
        loop.take_step()
    learned = loop.learned_weights(stop_reason)
    if not leave_out or learned.rater is None or not rater.folds or not learned.best_step:
        return learned
    without_folds = loop.learn_without_folds(rater.folds, learned.best_step)
    return learned._replace(rater=learned.rater._replace(without_folds=without_folds))


class OuterLoop:
    """The state of the outer loop, restored from its last checkpoint, and the functions that it compiles once."""

    def __init__(
        self,
        task: Task,
        trainer: Trainer,
        session: Session,
        *,
        data: DataSection,
        train_seed: int,
        scores: ScoresSection,
        rater: RaterSection = RaterSection(),  # noqa: B008 (frozen)
        progress: ProgressFunction | None = None,
    ):
        outer = trainer.outer
        self.task, self.trainer, self.session = task, trainer, session
        self.outer, self.data, self.train_seed, self.scores = outer, data, train_seed, scores
        self.folder = session.folder / "checkpoints" / "outer"
        self.progress: ProgressFunction = progress or (lambda records: len(records) / outer.steps)
        self._rater_features: RaterFeatures | None = None
        if outer.weighting == "rater":
            self._rater_features = make_rater_features(
                task, rater, session, scores_settings=scores, train_seed=train_seed
            )
        weighting = self._with_validation_weight(make_weighting(task, outer.weighting, rater, self._rater_features))
        self._fit_logits = weighting.fit_logits
        self._weights_of = compile_with_arrays(weighting.weights)
        self._weighting_vjp = compile_with_arrays(Partial(_pull_back, Partial(weighting.weights)))
        self._step = compile_with_arrays(weighting.step)
        self._validation_loss = validation_loss_fn(task.problem)
        self._labels = read_labels(task, data)
        place = partial(place_table, task.mesh)
        self._initial_hyper = hyper = jax.tree.map(place, weighting.init())
        losses, table = place(jnp.zeros(task.num_examples)), place(jnp.zeros(self._num_weights()))
        self.state = OuterState(hyper, hyper, table, table, table, losses, task.init_params(train_seed))
        if fallback := describe_fallback(task, outer):
            session.print_line(fallback)
        self._step_pooling: StepPooling | None = None
        if pools_steps(task, outer):
            self.state = self.state._replace(pooling=empty_pooling_state(task.mesh, task.num_examples, losses))
            halves = trainer.draw_halves("validation", data.seed)
            self._step_pooling = StepPooling(task, session, halves, estimate=outer.estimate, train_seed=train_seed)
        self.records: OuterRecords = []
        if restored := checkpoint.restore_checkpoint(self.folder, self.state):
            self.state, self.records = restored.tree, restored.meta["records"]
            session.restore_work(sum(record["work"] for record in self.records))
        elif self._rater_features is not None:
            session.advance(self._rater_features.work)

    def take_step(self) -> None:
        """Train, estimate, record, step the weights, save."""
        step, work_before, began = len(self.records), self.session.work_done, time.monotonic()
        weights = self._weights_of(self.state.hyper)
        turn = take_turn(self.task, self.outer.validation_folds, self.data.seed, step)
        stream = turn_training_stream(self.task, data_order_seed(self.data, self.outer, step), turn)
        self.session.set_phase(f"outer step {step} of {self.outer.steps}")
        start = self.trainer.init_state(self.state.start_params)
        seed = self.data.seed + step if measures_reliability(self.outer, step, self.outer.steps) else None
        reads_dev, halves_seed = self.trainer.has_halves("dev"), seed
        is_pooled = isinstance(self.state.pooling, PoolingState)
        if is_pooled:  # it compares the halves of different steps, so they must be the same
            halves_seed = None if seed is None else self.data.seed
        elif reads_dev and len(self.task.outer_objective.targets) == 1:
            halves_seed = None
        trajectory, estimate = train_and_estimate(
            self.trainer, weights, start, stream, step, is_first=step == 0,
            halves_seed=halves_seed, dev_seed=seed if reads_dev else None, turn=turn, with_product_error=step == 0,
        )  # fmt: skip
        if words := describe_product_error(self.outer, float(estimate.checks.product_error)):
            self.session.print_line(words)
        check_hypergradient_finite(estimate, f"outer step {step}", alternative=", or use outer.method: window")
        # the first process's: by it all choose the best step and end the loop
        record = distributed.share_from_first(self._make_record(step, weights, trajectory, estimate, turn))
        self._update_tables(record, trajectory, weights, estimate.grad)
        # the first training is uniform in any case: what is certified and compared with begins there
        origin = self.state.hyper if step else self._first_logits()
        hyper_grad = self._weighting_vjp(self.state.hyper, estimate.grad)
        if is_pooled:
            hyper_grad, record["pooling"] = self._pool(hyper_grad, estimate)
        self.state = self.state._replace(hyper=self._step(origin, hyper_grad, record["rate"], self.outer.max_step))
        features_work = self._rater_features.work if self._rater_features is not None and not step else 0.0
        record |= {"work": self.session.work_done - work_before + features_work, "seconds": time.monotonic() - began}
        self.records.append(record)
        self.session.log.write({"event": "outer", **record})
        self.session.write_histogram("weights", step, lambda: fetch_to_host(weights)[: self.task.num_examples])
        self.session.print_line(format_record(f"outer step {step:>3}", record, self.task.outer_objective.unit))
        checkpoint.save_checkpoint(self.folder, step, self.state, {"records": self.records})
        self.session.mark_saved()

    def stop_reason(self) -> str:
        """Why the loop ends here, or nothing."""
        if not self.records:
            return ""
        effective_size, num_examples = self.records[-1]["ess"], self.task.num_examples
        if effective_size < self.outer.ess_floor * num_examples:
            return (
                f"the effective sample size fell to {effective_size:.0f} of {num_examples} rows, below outer.ess_floor "
                f"({self.outer.ess_floor:g} of the rows)"
            )
        if is_reliability_at_floor(self.records, self.outer.reliability_floor):
            return f"{FLOOR_REASON} ({self.outer.reliability_floor:g}): the validation set is used up"
        steps_since_best = len(self.records) - 1 - _best_step(self.records)
        if self.outer.patience and steps_since_best >= self.outer.patience:
            return f"{format_count('outer step', steps_since_best)} in a row did not lower dev loss (outer.patience)"
        return self._describe_whole_loop() if self.progress(self.records) > 1 else ""

    def _describe_whole_loop(self) -> str:
        count = len(self.records) - 1
        return "the one outer step was made" if count == 1 else f"all {count} outer steps were made"

    def learned_weights(self, stop_reason: str) -> LearnedWeights:
        """The best weights so far, on the host: those of the first process, as they choose what is trained on next."""

        num_examples, num_weights = self.task.num_examples, self._num_weights()

        def fetch_table(table: jax.Array) -> Float[np.ndarray, "examples"]:
            return fetch_from_first(table)[:num_examples]

        def fetch_shared(table: jax.Array) -> Float[np.ndarray, "validation"]:
            return fetch_from_first(table)[num_examples:num_weights]

        weights = self._weights_of(self.state.best_hyper)
        shared = fetch_shared(weights)
        return LearnedWeights(
            weights=fetch_table(weights),
            hypergradient=fetch_table(self.state.best_hypergradient),
            first_hypergradient=fetch_table(self.state.first_hypergradient),
            validation_weight=float(shared[0]) if len(shared) else 1.0,
            validation_hypergradient=fetch_shared(self.state.best_hypergradient),
            first_validation_hypergradient=fetch_shared(self.state.first_hypergradient),
            alignment=fetch_table(self.state.alignment),
            losses=fetch_table(self.state.losses),
            records=self.records,
            best_step=_best_step(self.records),
            stop_reason=stop_reason,
            rater=None
            if self._rater_features is None
            else LearnedRater(self._rater_features, _rater_variable(self.state.best_hyper)),
        )

    def moved_weights(self) -> Float[np.ndarray, "examples"]:
        """The weights after the last step, on the host: nothing was trained with them yet."""
        return fetch_from_first(self._weights_of(self.state.hyper))[: self.task.num_examples]

    def learn_without_folds(self, num_folds: int, num_steps: int) -> Float[np.ndarray, "folds coefficients"]:
        """The coefficients of a rater after so many steps, each row without one fold of the validation set.

        The start, the data orders and the rates are those of the loop, so the rows differ by the folds alone.
        """
        rows = []
        for fold in range(num_folds):
            name = f"without fold {fold + 1} of {num_folds}"
            learn = partial(self._learn_without_fold, num_folds, fold, num_steps, name)
            rows.append(self.session.run_once(f"folds/{name}", learn))
            distributed.run_on_first_process(partial(run_dir.remove_folder, self.session.folder / "parts" / name))
        return np.array(rows)

    def _learn_without_fold(self, num_folds: int, fold: int, num_steps: int, name: str) -> list[float]:
        """Resumable: each step is saved, and its middle when due."""
        part, work_before = self.session.part_session(name), self.session.work_done
        turn = leave_out_fold(self.task, num_folds, self.data.seed, fold)
        state = (self._initial_hyper, self.task.init_params(self.train_seed))
        done, folder = 0, part.folder / "checkpoints" / "outer"
        if restored := checkpoint.restore_checkpoint(folder, state):
            state, done = restored.tree, restored.step + 1
            part.restore_work(restored.meta["work"])
        for step in range(done, num_steps):
            part.set_phase(f"outer step {step} of {num_steps}")
            hyper, start_params = state
            weights, start = self._weights_of(hyper), self.trainer.init_state(start_params)
            stream = turn_training_stream(self.task, data_order_seed(self.data, self.outer, step), None)
            with self.trainer.saving_in(part.folder / "checkpoints" / checkpoint.MID_STEP_FOLDER):
                trajectory, estimate = train_and_estimate(
                    self.trainer, weights, start, stream, step, is_first=False, turn=turn
                )
            check_hypergradient_finite(estimate, f"outer step {step} {name}")
            origin = hyper if step else self._first_logits()
            grad = self._weighting_vjp(hyper, estimate.grad)
            hyper = self._step(origin, grad, self.records[step]["rate"], self.outer.max_step)
            state = (hyper, trajectory.end.params if self.outer.restart == "warm" else start_params)
            part.log.write({"event": "outer", "step": step, "validation": float(estimate.validation_loss)})
            checkpoint.save_checkpoint(folder, step, state, {"work": part.work_done - work_before})
            part.mark_saved()
        return fetch_to_host(_rater_variable(state[0]).coefficients).astype(float).tolist()

    def _num_weights(self) -> int:
        """Examples that have a weight: those of training, and with folds those of validation."""
        return self.task.corpus.num_examples if self.outer.validation_folds else self.task.num_examples

    def _with_validation_weight(self, weighting: Weighting) -> Weighting:
        num_examples, num_weights = self.task.num_examples, self._num_weights()
        if num_weights == num_examples:
            return weighting
        size = padded_table_size(num_weights)
        return weightings.append_shared_weight(weighting, num_examples, num_weights - num_examples, size)

    def _first_logits(self) -> Hyper:
        if not self.outer.warm_start:
            return self._initial_hyper
        logits = warm_start_logits(
            self.task, self.outer.warm_start, self.session, scores=self.scores, train_seed=self.train_seed
        )
        hyper = self._fit_logits(jnp.asarray(logits))
        return jax.tree.map(partial(place_table, self.task.mesh), hyper)

    def _pool(self, hyper_grad: jax.Array, estimate: Estimate) -> tuple[jax.Array, dict[str, float]]:
        """The direction of a pooled step, and how reliable its parts are."""
        state, difference = self.state.pooling, None
        assert isinstance(state, PoolingState) and self._step_pooling is not None
        if isinstance(estimate.half_difference, jax.Array):
            difference = self._weighting_vjp(self.state.hyper, estimate.half_difference)
        last = PartReliability(**self.records[-1]["pooling"]) if self.records else None
        direction, reliability, state = self._step_pooling.take(state, hyper_grad, difference, self.state.losses, last)
        self.state = self.state._replace(pooling=state)
        return direction, reliability._asdict()

    def _make_record(
        self, step: int, weights: jax.Array, trajectory: Trajectory, estimate: Estimate, turn: Turn | None
    ) -> dict[str, Any]:
        task, params, labels = self.task, trajectory.end.params, self._labels
        judging = turn_validation_stream(task, turn)
        draw = measure_estimate_reliability(
            task, self.trainer, weights, estimate, turn, trained=task.trainable_indices(), is_learned=step > 0
        )
        validation_weight = {} if turn is None else {"validation_weight": float(tree.take(weights, task.num_examples))}
        loss = held_out_losses(
            task, self._validation_loss, params, task.frozen(trajectory.start.params), validation=judging
        )
        if not math.isfinite(loss["validation"] or 0.0):
            raise FloatingPointError(
                f"validation loss is {loss['validation']} at outer step {step}, although training was finite. Look at "
                "the validation examples and at what they judge by (section target)."
            )
        return {
            "step": step,
            "loss": loss,
            **describe_weights(weights, None if turn is None else task.num_examples),
            **validation_weight,
            "auc": labels.auc(fetch_to_host(weights)[: task.num_examples]) if labels is not None else None,
            "checks": fields_to_json(estimate.checks),
            **reliability_to_record(draw),
            "rate": outer_learning_rate(self.outer, min(1.0, self.progress(self.records))),
            "pooling": None,
            **self._record_coefficients(),
        }

    def _record_coefficients(self) -> dict[str, list[float]]:
        """The coefficients of a rater before the step."""
        if self._rater_features is None:
            return {}
        coefficients = _rater_variable(self.state.hyper).coefficients
        return {"coefficients": fetch_to_host(coefficients).astype(float).tolist()}

    def _update_tables(
        self, record: dict[str, Any], trajectory: Trajectory, weights: jax.Array, grad: jax.Array
    ) -> None:
        """Keep what an outer step found, before its step on the outer variable."""
        if not self.records:
            alignment, losses = compute_baseline_scores(self.task, self.trainer, trajectory, weights)
            self.state = self.state._replace(first_hypergradient=grad, alignment=alignment, losses=losses)
        if _best_step([*self.records, record]) == len(self.records):
            self.state = self.state._replace(best_hyper=self.state.hyper, best_hypergradient=grad)
        if self.outer.restart == "warm":
            self.state = self.state._replace(start_params=trajectory.end.params)


def compile_with_arrays(function: Callable) -> Callable:
    """The function compiled; the arrays of a `Partial` are arguments of the compiled one, not constants in it."""
    compiled, partial_function = jax.jit(lambda function, *given: function(*given)), Partial(function)
    return lambda *given: compiled(partial_function, *given)


def describe_weights(weights: jax.Array, count: int | None = None) -> dict[str, float]:
    """Effective sample size, entropy and the largest of the weights, or of the first `count` of them."""
    return {name: float(value) for name, value in _describe_weights(weights, count).items()}


@partial(jax.jit, static_argnums=1)
def _describe_weights(weights: jax.Array, count: int | None) -> dict[str, jax.Array]:
    """One program, as those of several processes may wait for each other where the table is split."""
    weights = weights[:count]
    return {
        "ess": weightings.effective_sample_size(weights),
        "entropy": weightings.entropy(weights),
        "largest": weights.max(),
    }


def _rater_variable(hyper: Hyper) -> RaterVariable:
    """The rater's part of the outer variable, which may have a shared weight of validation beside it."""
    return hyper.table if isinstance(hyper, SharedWeightVariable) else hyper


def _pull_back(weights: Callable[[Hyper], jax.Array], hyper: Hyper, hypergradient: jax.Array) -> Hyper:
    return jax.vjp(weights, hyper)[1](hypergradient)[0]


def train_and_estimate(
    trainer: Trainer,
    weights: jax.Array,
    start: TrainState,
    stream: Stream,
    step: int,
    *,
    is_first: bool,
    halves_seed: int | None = None,
    dev_seed: int | None = None,
    turn: Turn | None = None,
    with_product_error: bool = False,
) -> tuple[Trajectory, Estimate]:
    """Train from `start` with these weights, and estimate the hypergradient at its end; resumable as outer step `step`.

    The first step checks that the optimizer's update has a finite derivative. The seeds and `with_product_error` are
    those of
    `Trainer.estimate`; `turn` says which examples `stream` holds, and which judge.
    """
    task = trainer.task
    trajectory = trainer.run(weights, start, stream, for_backward=True, outer_step=step)
    if is_first and trainer.outer.method in ("unrolled", "window"):
        frozen = task.frozen(trajectory.start.params)
        check_differentiable(
            task.train_step, task.optimizer, trajectory, weights, frozen, stream, fetch=fetch_from_first
        )
    return trajectory, trainer.estimate(
        trajectory, weights, stream, outer_step=step, halves_seed=halves_seed, dev_seed=dev_seed, turn=turn,
        with_product_error=with_product_error,
    )  # fmt: skip


def _best_step(records: OuterRecords) -> int:
    """The step with the least dev loss; without dev, the last."""
    values = [record["loss"]["dev"] for record in records]
    return len(records) - 1 if values[0] is None else int(np.argmin(values))


def format_record(label: str, record: dict[str, Any], unit: str) -> str:
    """One line for people: L_v on every part, effective size, AUC."""
    loss = " ".join(f"{part} {value:.4f}" for part, value in record["loss"].items() if value is not None)
    auc_words = "" if record["auc"] is None else f"  AUC {record['auc']:.3f}"
    reliability = record.get("reliability")
    reliability_words = "" if reliability is None else f"  reliability {reliability:.2f}"
    return f"{label}   L_v ({unit}): {loss}   ESS {record['ess']:.0f}{auc_words}{reliability_words}"
