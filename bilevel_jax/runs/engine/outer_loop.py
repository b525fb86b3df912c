"""Outer loop of hypergradient descent on per-example weights."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bilevel_jax.core import tree, weightings
from bilevel_jax.core.types import Checks, Hyper, Params, Trajectory, Weighting
from bilevel_jax.core.unrolled import check_differentiable, validation_loss_fn
from bilevel_jax.runs.config.load import SelectConfig
from bilevel_jax.runs.config.schema import OuterSection
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra import checkpoint
from bilevel_jax.runs.infra.distributed import fetch_to_host
from bilevel_jax.runs.infra.placement import padded_table_size, place_table
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring import scores
from bilevel_jax.runs.stats import auc
from bilevel_jax.runs.tasks.optimizers import DECAY_SHAPES
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.splits import PART_NAMES
from bilevel_jax.runs.tasks.text import evaluate_per_example

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
    """Entries of alignment at the end of the first (uniform) training: a baseline."""
    losses: Float[Array, "examples"]
    """Each row's loss at the end of the first (uniform) training: a baseline."""
    start_params: Params
    """Where the next training starts; moves with restart: warm."""


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


def data_order_seed(config: SelectConfig, step: int) -> int:
    """The seed of an outer step's data order: a new one at each restart, or the weights over-fit one order."""
    return config.data.seed + (step if config.outer.reshuffle else 0)


def make_weighting(task: Task, config: SelectConfig) -> Weighting:
    """The configured map from the outer variable to the weight table."""
    name, size = config.outer.weighting, padded_table_size(task.num_examples)
    if name == "per_source":
        source, count = source_indices(task)
        return weightings.pad_weighting(weightings.per_source(jnp.asarray(source), count), size - task.num_examples)
    if name == "by_features":
        return weightings.pad_weighting(
            weightings.by_features(jnp.asarray(task.example_features())), size - task.num_examples
        )
    return {"softmax": weightings.softmax, "sigmoid": weightings.sigmoid}[name](task.num_examples, size)


def source_indices(task: Task) -> tuple[Int[np.ndarray, "examples"], int]:
    """(the number of each row's source, how many there are)."""
    names, indices = np.unique([example.source for example in task.examples], return_inverse=True)
    if len(names) < 2:
        raise ValueError(
            f"outer.weighting = per_source needs two sources, and every row comes from {str(names[0])!r}. Set "
            "data.source_field to the key that tells sources apart, or choose another weighting."
        )
    return indices, len(names)


def compute_baseline_scores(
    task: Task, trainer: Trainer, run: Trajectory, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(alignment entries, losses) of every row at the end of a run: what the simple selections rank by."""
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
    config: SelectConfig,
    trainer: Trainer,
    session: Session,
    progress: ProgressFunction | None = None,
) -> LearnedWeights:
    """Optimise the weights by hypergradients of validation loss, and return the best by dev loss.

    Each step trains under the present weights, reads L_v, estimates, and steps the outer variable along the
    hypergradient divided by its rms, at the rate of its place in the loop. Without dev the last weights count.
    Ends after outer.steps steps (with `progress`, where it passes 1 instead), after outer.patience steps without a
    better dev, or where the effective sample size falls below its floor.
    """
    outer, folder = config.outer, session.folder / "checkpoints" / "outer"
    weight_map = make_weighting(task, config)
    weights_of = jax.jit(weight_map.weights)
    weight_map_vjp = jax.jit(lambda hyper, entries: weightings.weighting_vjp(weight_map, hyper, entries))
    update_hyper = jax.jit(
        lambda rate, hyper, grad: weightings.normalized_gradient_step(rate, outer.max_step)(hyper, grad)
    )
    progress = progress or (lambda records: len(records) / outer.steps)
    validation_loss = validation_loss_fn(task.problem)
    good_mask = good_label_mask(task, config)

    hyper, zeros = (place_table(task.mesh, array) for array in (weight_map.init(), jnp.zeros(task.num_examples)))
    state = OuterState(hyper, hyper, zeros, zeros, zeros, zeros, task.init_params(config.train.seed))
    records: OuterRecords = []
    if restored := checkpoint.restore_checkpoint(folder, state):
        state, records = restored.tree, restored.meta["records"]
        session.advance(sum(record["work"] for record in records))
    stop_reason = _stop_reason(records, config, task.num_examples, progress)

    while not stop_reason:
        step, work_before, began = len(records), session.work_done, time.monotonic()
        weights = weights_of(state.hyper)
        stream = task.training_stream(data_order_seed(config, step))
        session.set_phase(f"outer step {step} of {outer.steps}")
        start = trainer.init_state(state.start_params)
        run = trainer.run(weights, start, stream, for_backward=True, outer_step=step)
        fixed = task.frozen(run.start.params)
        if step == 0 and outer.method in ("unrolled", "window"):
            check_differentiable(task.train_step, task.optimizer, run, weights, fixed, stream)
        estimate = trainer.estimate(run, weights, stream, outer_step=step)
        if not bool(tree.all_finite(estimate.grad)):
            raise FloatingPointError(
                f"the hypergradient of outer step {step} is not finite ({estimate.checks}). Training itself was "
                "finite: raise optimizer.eps_root, lower optimizer.learning_rate, or use outer.method: window."
            )
        losses = {
            part: float(validation_loss(run.end.params, fixed, task.held_out_streams[part]))
            if part in task.held_out_streams
            else None
            for part in PART_NAMES
        }
        record = {
            "step": step,
            "loss": losses,
            "ess": float(weightings.effective_sample_size(weights)),
            "entropy": float(weightings.entropy(weights)),
            "largest": float(weights.max()),
            "auc": auc(fetch_to_host(weights)[: task.num_examples], good_mask) if good_mask is not None else None,
            "checks": _checks_to_json(estimate.checks),
            "rate": outer_learning_rate(outer, min(1.0, progress(records))),
        }
        state = _update_outer_state(task, trainer, state, records, record, run, estimate.grad, weights, config)
        # the first training is uniform in any case: what is certified and compared with begins there
        origin = state.hyper if step else scores.warm_start_logits(task, config, state.hyper, session)
        hyper_grad = weight_map_vjp(state.hyper, estimate.grad)
        state = state._replace(hyper=update_hyper(record["rate"], origin, hyper_grad))
        record |= {"work": session.work_done - work_before, "seconds": time.monotonic() - began}
        records.append(record)
        session.log.write({"event": "outer", **record})
        session.print_line(format_record(f"outer step {step:>3}", record, task.objective.loss_unit))
        checkpoint.save_checkpoint(folder, step, state, {"records": records})
        session.mark_saved()
        stop_reason = _stop_reason(records, config, task.num_examples, progress)
        del run, estimate  # or their snapshots would live beside those of the next training

    best_step = _best_step(records)
    return LearnedWeights(
        weights=fetch_to_host(weights_of(state.best_hyper))[: task.num_examples],
        hypergradient=fetch_to_host(state.best_hypergradient)[: task.num_examples],
        first_hypergradient=fetch_to_host(state.first_hypergradient)[: task.num_examples],
        alignment=fetch_to_host(state.alignment)[: task.num_examples],
        losses=fetch_to_host(state.losses)[: task.num_examples],
        records=records,
        best_step=best_step,
        stop_reason=stop_reason,
    )


def good_label_mask(task: Task, config: SelectConfig) -> np.ndarray | None:
    """Which rows carry the label data.good_label; None where the data have no such labels."""
    labels = [example.label for example in task.examples]
    if not config.data.label_field or all(label is None for label in labels):
        return None
    return np.array([label == config.data.good_label for label in labels])


def _update_outer_state(
    task, trainer, state: OuterState, records, record, run, grad, weights, config: SelectConfig
) -> OuterState:
    """The tables after an outer step, before its step on the outer variable."""
    if not records:
        alignment, losses = compute_baseline_scores(task, trainer, run, weights)
        state = state._replace(first_hypergradient=grad, alignment=alignment, losses=losses)
    if _best_step([*records, record]) == len(records):
        state = state._replace(best_hyper=state.hyper, best_hypergradient=grad)
    if config.outer.restart == "warm":
        state = state._replace(start_params=run.end.params)
    return state


def _best_step(records: OuterRecords) -> int:
    """The step with the least dev loss; without dev, the last."""
    values = [record["loss"]["dev"] for record in records]
    return len(records) - 1 if values[0] is None else int(np.argmin(values))


def _stop_reason(records: OuterRecords, config: SelectConfig, num_examples: int, progress: ProgressFunction) -> str:
    """Why the loop ends here, or nothing."""
    outer = config.outer
    if not records:
        return ""
    if records[-1]["ess"] < outer.ess_floor * num_examples:
        return (
            f"the effective sample size fell to {records[-1]['ess']:.0f} of {num_examples} rows, below outer.ess_floor "
            f"({outer.ess_floor:g} of the rows)"
        )
    steps_since_best = len(records) - 1 - _best_step(records)
    if outer.patience and steps_since_best >= outer.patience:
        return f"{steps_since_best} outer steps in a row did not lower dev loss (outer.patience)"
    return f"all {len(records) - 1} outer steps were made" if progress(records) > 1 else ""


def format_record(label: str, record: dict[str, Any], unit: str) -> str:
    """One line for people: L_v on every part, effective size, AUC."""
    loss = " ".join(f"{part} {value:.4f}" for part, value in record["loss"].items() if value is not None)
    auc_words = "" if record["auc"] is None else f"  AUC {record['auc']:.3f}"
    return f"{label}   L_v ({unit}): {loss}   ESS {record['ess']:.0f}{auc_words}"


def _checks_to_json(checks: Checks) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and np.isnan(value) else value for key, value in checks._asdict().items()
    }
