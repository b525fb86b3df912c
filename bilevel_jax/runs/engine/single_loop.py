"""Single-loop bilevel methods, penalty, BMO and direct mixing."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bilevel_jax.core import single_loop, weightings
from bilevel_jax.core.types import Params, SingleLoop
from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.core.weightings import OnlineWeights
from bilevel_jax.runs.config.load import SelectConfig
from bilevel_jax.runs.engine.outer_loop import (
    LearnedWeights,
    compute_baseline_scores,
    format_record,
    good_label_mask,
    source_indices,
    total_outer_learning_rate,
)
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra import checkpoint
from bilevel_jax.runs.infra.distributed import fetch_to_host
from bilevel_jax.runs.infra.placement import place_table, replicate_unplaced
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.stats import auc
from bilevel_jax.runs.tasks.optimizers import build_optimizer
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.splits import PART_NAMES

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


def num_single_loop_steps(config: SelectConfig) -> int:
    """Steps of the one run; by default as many as the outer loop's trainings have together."""
    return config.single_loop.steps or config.train.max_steps * config.outer.steps


def single_loop_step_work(config: SelectConfig) -> float:
    """The work of one step, in training steps."""
    single, method = config.single_loop, config.outer.method
    if method == "bmo":
        return (
            ONE_MODEL_WORK
            + {"none": 0.0, "snapshot": FORWARD_WORK, "copy": single.inner_steps + FORWARD_WORK}[single.reference]
        )
    return TWO_MODEL_WORK if method == "penalty" and single.second_model == "copy" else ONE_MODEL_WORK


def run_single_loop(
    task: Task,
    config: SelectConfig,
    session: Session,
    *,
    seed: int = 0,
    compiled_method: SingleLoop | None = None,
    reference_params: Params | None = None,
) -> SingleLoopResult:
    """Train parameters and weights together, as outer.method says, and return both.

    `made` is `method` of another task of the same shape, already compiled; `snapshot` the parameters that BMO compares
    with under single_loop.reference = snapshot (default: those that training starts from).
    Validation batches are drawn from validation alone, in epochs of their own. The records are of readings of L_v: on validation,
    which is trained on, and on dev and test, which are not. Raises FloatingPointError where L_v is not finite.
    """
    folder = session.folder / "checkpoints" / f"single-{seed}"
    steps, every = num_single_loop_steps(config), config.single_loop.eval_steps
    compiled_method = compiled_method or build_single_loop(task, config, steps)
    validation_loss = validation_loss_fn(task.problem)
    good_mask = good_label_mask(task, config)
    params = task.init_params(config.train.seed + seed)
    fixed = task.frozen(params)
    state = replicate_unplaced(task.mesh, compiled_method.init(params))
    if reference_params is not None and config.outer.method == "bmo" and config.single_loop.reference == "snapshot":
        state = single_loop.replace_reference(state, reference_params)
    train_stream = task.training_stream(config.data.seed + seed, packed=False)
    validation_stream = task.training_stream(config.data.seed + seed + 1, task.validation_indices(), packed=False)
    records: list[dict[str, Any]] = []
    if restored := checkpoint.restore_checkpoint(folder, state):
        state, records = restored.tree, restored.meta["records"]
        session.advance(single_loop_step_work(config) * int(state.train_state.step))

    def make_record(step: int, seconds: float) -> dict[str, Any]:
        weights = compiled_method.weights(state)
        loss = {
            part: float(validation_loss(state.train_state.params, fixed, task.held_out_streams[part]))
            if part in task.held_out_streams
            else None
            for part in PART_NAMES
        }
        if not math.isfinite(loss["validation"] or math.nan):
            raise FloatingPointError(
                f"validation loss is {loss['validation']} at step {step} of {steps}. Lower optimizer.learning_rate, or set "
                "optimizer.max_grad_norm. The last good checkpoint is kept: --resume goes on from it."
            )
        return {
            "step": step,
            "loss": loss,
            "ess": float(weightings.effective_sample_size(weights)),
            "entropy": float(weightings.entropy(weights)),
            "largest": float(weights.max()),
            "auc": auc(fetch_to_host(weights), good_mask) if good_mask is not None else None,
            "checks": {},
            "work": 0.0 if not records else single_loop_step_work(config) * (step - records[-1]["step"]),
            "seconds": seconds,
        }

    session.set_phase(f"{config.outer.method}: {steps} steps")
    began = time.monotonic()
    if not records:
        records.append(make_record(0, 0.0))
    for step in range(int(state.train_state.step), steps):
        state, _ = compiled_method.step(state, fixed, train_stream.batch(step), validation_stream.batch(step))
        session.advance(single_loop_step_work(config))
        steps_done, due = step + 1, session.should_save()
        if steps_done % every == 0 or steps_done == steps:
            records.append(make_record(steps_done, time.monotonic() - began))
            began = time.monotonic()
            session.log.write({"event": "single", **records[-1]})
            session.print_line(format_record(f"step {steps_done:>6}", records[-1], task.objective.loss_unit))
        if due or steps_done == steps:
            checkpoint.save_checkpoint(folder, steps_done, state, {"records": records})
            session.mark_saved()
    weights = compiled_method.weights(state)
    if config.outer.method == "bmo":  # its own table is of the losses when each row was last seen
        params, stream = state.train_state.params, task.full_pass_stream(seed=0)
        end = config.single_loop.temperatures[1]
        weights = single_loop.compute_weights(
            task.problem, params, state.reference, fixed, stream, task.num_examples, end
        )
    return SingleLoopResult(fetch_to_host(weights), state.train_state.params, records, compiled_method.estimand)


def run_single_loop_with_baselines(
    task: Task, config: SelectConfig, trainer: Trainer, session: Session
) -> tuple[LearnedWeights, SingleLoopResult]:
    """As `learn.learn`: the weights, with the baselines of a uniform training; a single-loop method has no entries."""
    uniform_weights = place_table(task.mesh, jnp.ones(task.num_examples))
    session.set_phase("uniform training, for the baselines")
    run = trainer.run(
        uniform_weights, trainer.init_state(task.init_params(config.train.seed)), task.training_stream(config.data.seed)
    )
    alignment, losses = compute_baseline_scores(task, trainer, run, uniform_weights)
    result = run_single_loop(task, config, session)
    missing = np.full(task.num_examples, np.nan, alignment.dtype)
    learned = LearnedWeights(
        weights=result.weights,
        hypergradient=missing,
        first_hypergradient=missing,
        alignment=fetch_to_host(alignment)[: task.num_examples],
        losses=fetch_to_host(losses)[: task.num_examples],
        records=result.records,
        best_step=len(result.records) - 1,
        stop_reason=f"all {num_single_loop_steps(config)} steps were made",
    )
    return learned, result


def build_single_loop(task: Task, config: SelectConfig, steps: int) -> SingleLoop:
    """The configured method as (init, step, weights)."""
    single, outer = config.single_loop, config.outer
    share_steps = max(1, -(-steps // len(single.validation_shares)))
    tx = build_optimizer(config.optimizer, steps)
    if outer.method == "mixing":
        return single_loop.mixing(task.problem, tx, single.validation_shares[0], task.num_examples)
    share = single_loop.epoch_schedule(single.validation_shares, share_steps)
    if outer.method == "bmo":
        start, end = single.temperatures
        tau = single_loop.geometric_schedule(start, end, steps)
        copy = single_loop.TrainedReference(
            build_optimizer(config.optimizer, steps), single.inner_steps, single.proximal
        )
        reference = copy if single.reference == "copy" else single.reference
        return single_loop.bmo(
            task.problem, tx, task.num_examples, validation_share=share, temperature=tau, reference=reference
        )
    # a row's logit moves in the steps that meet the row, a source's in every step
    steps_per_epoch = 1.0 if outer.weighting == "per_source" else len(task.trainable_indices()) / task.batch_size
    return single_loop.penalty(
        task.problem,
        tx,
        make_online_weights(task, config),
        validation_share=share,
        weights_learning_rate=delayed_linear_decay(total_outer_learning_rate(outer) * steps_per_epoch, steps),
        second_model=single.second_model,
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


def make_online_weights(task: Task, config: SelectConfig) -> OnlineWeights:
    """The weights as a single-loop method steps them: on the rows of a batch alone."""
    if config.outer.weighting == "per_source":
        source, count = source_indices(task)
        return weightings.online_per_source(jnp.asarray(source), count)
    factories = {"softmax": weightings.online_softmax, "sigmoid": weightings.online_sigmoid}
    return factories[config.outer.weighting](task.num_examples)
