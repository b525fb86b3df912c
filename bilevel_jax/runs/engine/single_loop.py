"""Single-loop bilevel methods, penalty, BMO and direct mixing."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bilevel_jax.core import weightings
from bilevel_jax.core.single_loop import (
    TrainedReference,
    bmo,
    compute_weights,
    epoch_schedule,
    geometric_schedule,
    mixing,
    penalty,
    replace_reference,
)
from bilevel_jax.core.types import Frozen, Params, SingleLoop
from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.core.weightings import OnlineWeights
from bilevel_jax.runs.config.schema import (
    DataSection,
    OptimizerSection,
    OuterSection,
    SingleLoopSection,
    TrainSection,
)
from bilevel_jax.runs.engine.outer_loop import (
    LearnedWeights,
    compute_baseline_scores,
    describe_weights,
    format_record,
    total_outer_learning_rate,
)
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra import checkpoint
from bilevel_jax.runs.infra.distributed import fetch_from_first, fetch_to_host, share_from_first
from bilevel_jax.runs.infra.placement import place_table, replicate_unplaced
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.infra.step_loop import run_steps
from bilevel_jax.runs.tasks.evaluation import held_out_losses, read_labels
from bilevel_jax.runs.tasks.optimizers import build_optimizer
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.sources import require_sources

TWO_MODEL_WORK, ONE_MODEL_WORK, FORWARD_WORK = 3.0, 2.0, 1 / 3
"""Work of a step in training steps: the training batch and the validation batch, and with a second model once more; of
a forward pass alone."""


class SingleLoopResult(NamedTuple):
    """What one run of a single-loop method gives."""

    weights: Float[np.ndarray, "examples"]
    params: Params
    """The model that the method trained itself, on V too."""
    records: list[dict[str, Any]]
    estimand: str


def num_single_loop_steps(single_loop: SingleLoopSection, outer: OuterSection, max_steps: int) -> int:
    """Steps of the one run; by default those of all training runs of the outer loop, of `max_steps` each."""
    return single_loop.steps or max_steps * outer.steps


def single_loop_step_work(single_loop: SingleLoopSection, method: str, num_targets: int) -> float:
    """The work of one step of penalty, bmo or mixing, in training steps; a batch of each target is one more."""
    further = float(num_targets - 1)
    if method == "bmo":
        reference_work = {"none": 0.0, "snapshot": FORWARD_WORK, "copy": single_loop.inner_steps + FORWARD_WORK}
        return further + ONE_MODEL_WORK + reference_work[single_loop.reference]
    return further + (TWO_MODEL_WORK if method == "penalty" and single_loop.second_model == "copy" else ONE_MODEL_WORK)


def count_single_loop_work(
    single_loop: SingleLoopSection, outer: OuterSection, max_steps: int, num_targets: int
) -> float:
    """The work of the one run, in training steps."""
    steps = num_single_loop_steps(single_loop, outer, max_steps)
    return steps * single_loop_step_work(single_loop, outer.method, num_targets)


def run_single_loop(
    task: Task,
    session: Session,
    *,
    single_loop: SingleLoopSection,
    outer: OuterSection,
    optimizer: OptimizerSection,
    data: DataSection,
    train: TrainSection,
    seed: int = 0,
    compiled_method: SingleLoop | None = None,
    reference_params: Params | None = None,
) -> SingleLoopResult:
    """Train parameters and weights together, as outer.method says, and return both.

    `compiled_method` is `build_single_loop` of another task of the same shape, already compiled; `reference_params` are
    those that BMO compares with under single_loop.reference = snapshot (default: those that training starts from).
    Validation batches are drawn from validation alone, in epochs of their own. The records are of readings of L_v: on
    validation, which is trained on, and on dev and test, which are not. Raises FloatingPointError where L_v is not
    finite.
    """
    steps = num_single_loop_steps(single_loop, outer, train.max_steps)
    method = compiled_method or build_single_loop(
        task, steps, single_loop=single_loop, outer=outer, optimizer=optimizer
    )
    params = task.init_params(train.seed + seed)
    frozen = task.frozen(params)
    state = replicate_unplaced(task.mesh, method.init(params))
    if reference_params is not None and outer.method == "bmo" and single_loop.reference == "snapshot":
        state = replace_reference(state, reference_params)
    train_stream = task.training_stream(data.seed + seed, packed=False)
    validation_stream = task.validation_stream(data.seed + seed + 1)
    work = single_loop_step_work(single_loop, outer.method, len(task.outer_objective.targets))
    recorder = SingleLoopRecorder(
        task, session, method, frozen, num_steps=steps, eval_steps=single_loop.eval_steps, step_work=work, data=data
    )
    folder = session.folder / "checkpoints" / f"single-{seed}"
    if restored := checkpoint.restore_checkpoint(folder, state):
        state, recorder.records = restored.tree, restored.meta["records"]
        session.restore_work(work * int(state.train_state.step))

    def take_step(step: int, state: Any) -> Any:
        return method.step(state, frozen, train_stream.batch(step), validation_stream.batch(step))[0]

    def save(steps_done: int, state: Any) -> None:
        checkpoint.save_checkpoint(folder, steps_done, state, {"records": recorder.records})

    session.set_phase(f"{outer.method}: {steps} steps")
    recorder.begin(state)
    remaining = range(int(state.train_state.step), steps)
    state = run_steps(session, take_step, state, remaining, work=work, on_step=recorder.on_step, save=save)
    weights = method.weights(state)
    if outer.method == "bmo":  # its own table is of the losses when each example was last seen
        weights = compute_weights(
            task.problem,
            state.train_state.params,
            state.reference,
            frozen,
            task.full_pass_stream(seed=0),
            task.num_examples,
            single_loop.temperatures[1],
            single_loop.min_effective_share,
        )
    return SingleLoopResult(fetch_from_first(weights), state.train_state.params, recorder.records, method.estimand)


class SingleLoopRecorder:
    """Reads L_v and the weights every single_loop.eval_steps steps; the records go into log, checkpoint and result."""

    def __init__(
        self,
        task: Task,
        session: Session,
        method: SingleLoop,
        frozen: Frozen,
        *,
        num_steps: int,
        eval_steps: int,
        step_work: float,
        data: DataSection,
    ):
        self.task, self.session, self.method, self.frozen = task, session, method, frozen
        self.num_steps, self.eval_steps, self.step_work = num_steps, eval_steps, step_work
        self.records: list[dict[str, Any]] = []
        self._validation_loss = validation_loss_fn(task.problem)
        self._labels = read_labels(task, data)
        self._last_time = time.monotonic()

    def begin(self, state: Any) -> None:
        """Record the state before the first step, unless a run before this one did."""
        self._last_time = time.monotonic()
        if not self.records:
            self.records.append(self._make_record(0, state, 0.0))

    def on_step(self, steps_done: int, state: Any, save_due: bool) -> bool:
        """Record where it is time to; whether to save now."""
        is_last = steps_done == self.num_steps
        if steps_done % self.eval_steps == 0 or is_last:
            record = self._make_record(steps_done, state, time.monotonic() - self._last_time)
            self.records.append(record)
            self._last_time = time.monotonic()
            self.session.log.write({"event": "single", **record})
            self.session.print_line(format_record(f"step {steps_done:>6}", record, self.task.outer_objective.unit))
        return save_due or is_last

    def _make_record(self, step: int, state: Any, seconds: float) -> dict[str, Any]:
        weights = self.method.weights(state)
        loss = held_out_losses(self.task, self._validation_loss, state.train_state.params, self.frozen)
        if not math.isfinite(loss["validation"] or math.nan):
            raise FloatingPointError(
                f"validation loss is {loss['validation']} at step {step} of {self.num_steps}. Lower "
                "optimizer.learning_rate, or set optimizer.max_grad_norm, and start anew with --out."
            )
        self.session.write_histogram("weights", step, lambda: fetch_to_host(weights))
        record = {
            "step": step,
            "loss": loss,
            **describe_weights(weights),
            "auc": self._labels.auc(fetch_to_host(weights)) if self._labels is not None else None,
            "checks": {},
            "work": self.step_work * (step - self.records[-1]["step"]) if self.records else 0.0,
            "seconds": seconds,
        }
        return share_from_first(record)


def run_single_loop_with_baselines(
    task: Task,
    trainer: Trainer,
    session: Session,
    *,
    single_loop: SingleLoopSection,
    optimizer: OptimizerSection,
    data: DataSection,
    train: TrainSection,
) -> tuple[LearnedWeights, SingleLoopResult]:
    """As `run_outer_loop`, with the baselines of a uniform training; a single-loop method has no hypergradients."""
    uniform_weights = place_table(task.mesh, jnp.ones(task.num_examples))
    session.set_phase("uniform training, for the baselines")
    start = trainer.init_state(task.init_params(train.seed))
    trajectory = trainer.run(uniform_weights, start, task.training_stream(data.seed))
    alignment, losses = compute_baseline_scores(task, trainer, trajectory, uniform_weights)
    result = run_single_loop(
        task, session, single_loop=single_loop, outer=trainer.outer, optimizer=optimizer, data=data, train=train
    )
    missing = np.full(task.num_examples, np.nan, alignment.dtype)
    num_steps = num_single_loop_steps(single_loop, trainer.outer, train.max_steps)
    learned = LearnedWeights(
        weights=result.weights,
        hypergradient=missing,
        first_hypergradient=missing,
        alignment=fetch_from_first(alignment)[: task.num_examples],
        losses=fetch_from_first(losses)[: task.num_examples],
        records=result.records,
        best_step=len(result.records) - 1,
        stop_reason=f"all {num_steps} steps were made",
    )
    return learned, result


def build_single_loop(
    task: Task, steps: int, *, single_loop: SingleLoopSection, outer: OuterSection, optimizer: OptimizerSection
) -> SingleLoop:
    """The method that outer.method names, for a run of so many steps, as (init, step, weights)."""
    tx = build_optimizer(optimizer, steps)
    if outer.method == "mixing":
        return mixing(task.problem, tx, single_loop.validation_shares[0], task.num_examples)
    share_steps = max(1, -(-steps // len(single_loop.validation_shares)))
    share = epoch_schedule(single_loop.validation_shares, share_steps)
    if outer.method == "bmo":
        start, end = single_loop.temperatures
        trained_reference = TrainedReference(
            build_optimizer(optimizer, steps), single_loop.inner_steps, single_loop.proximal
        )
        return bmo(
            task.problem,
            tx,
            task.num_examples,
            validation_share=share,
            temperature=geometric_schedule(start, end, steps),
            reference=trained_reference if single_loop.reference == "copy" else single_loop.reference,
            min_effective_share=single_loop.min_effective_share,
        )
    # the logit of an example moves in the steps that meet the example, that of a source in every step
    steps_per_epoch = 1.0 if outer.weighting == "per_source" else len(task.trainable_indices()) / task.batch_size
    return penalty(
        task.problem,
        tx,
        make_online_weights(task, outer.weighting),
        validation_share=share,
        weights_learning_rate=delayed_linear_decay(total_outer_learning_rate(outer) * steps_per_epoch, steps),
        second_model=single_loop.second_model,
        normalize_step=True,
        max_step=outer.max_step,
    )


def delayed_linear_decay(total: float, steps: int) -> Callable[[Any], Any]:
    """step -> rate of the weights: 0 for the first tenth of the run, then falling evenly to 0; they sum to `total`.

    A normalised step moves every logit that it meets by about its rate. So that a logit moves in all about as far as in
    the outer loop, `total` is (sum of the rates there) x (steps here that it takes to move every logit once). Not at
    once, as a model that knows nothing yet drives the weights onto any row; and falling, as normalised steps do not
    come to rest by themselves.
    """
    delay_steps = steps // 10
    decay_steps = steps - delay_steps
    peak = 2 * total / (decay_steps + 1)  # the rates are left, left - 1, ... 1 times peak / left

    def rate(step):
        return jnp.where(step < delay_steps, 0.0, peak * (steps - step) / decay_steps)

    return rate


def make_online_weights(task: Task, name: str) -> OnlineWeights:
    """The weights as a single-loop method steps them, on the examples of a batch alone; `name` is outer.weighting."""
    if name == "per_source":
        sources = require_sources(task, "outer.weighting = per_source")
        return weightings.online_per_source(jnp.asarray(sources.indices), len(sources.names))
    factories = {"softmax": weightings.online_softmax, "sigmoid": weightings.online_sigmoid}
    return factories[name](task.num_examples)
