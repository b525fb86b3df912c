"""The outer loop: train, estimate, step the weights, train again; the best weights by V_select."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bilevel_jax.core import tree, weighting
from bilevel_jax.core.types import Checks, Hyper, Params, Run, Weighting
from bilevel_jax.core.unrolled import check_differentiable, outer_value
from bilevel_jax.runs import checkpoint, scoring
from bilevel_jax.runs import mesh as placing
from bilevel_jax.runs.classification import ArrayTask
from bilevel_jax.runs.config import SelectConfig
from bilevel_jax.runs.optimizers import SHAPES
from bilevel_jax.runs.processes import fetch
from bilevel_jax.runs.rows import PARTS
from bilevel_jax.runs.sections import OuterSection
from bilevel_jax.runs.session import Session
from bilevel_jax.runs.statistics import auc
from bilevel_jax.runs.task import Task, per_row
from bilevel_jax.runs.training import Trainer

Records = list[dict[str, Any]]
Progress = Callable[[Records], float]
"""Records of the steps so far -> how far the loop is: 0 at the start, at most 1 while another step may be made."""


class Tables(NamedTuple):
    """What the outer loop carries from step to step and a checkpoint keeps."""

    hyper: Hyper
    best: Hyper
    best_entries: Float[Array, "rows"]
    first_entries: Float[Array, "rows"]
    alignment: Float[Array, "rows"]
    """Entries of alignment at the end of the first (uniform) training: a baseline."""
    losses: Float[Array, "rows"]
    """Each row's loss at the end of the first (uniform) training: a baseline."""
    start: Params
    """Where the next training starts; moves with restart: warm."""


class Learned(NamedTuple):
    """The weights, where they come from, and how the loop went."""

    weights: Float[np.ndarray, "rows"]
    entries: Float[np.ndarray, "rows"]
    first_entries: Float[np.ndarray, "rows"]
    alignment: Float[np.ndarray, "rows"]
    losses: Float[np.ndarray, "rows"]
    records: Records
    best: int
    """The outer step whose weights these are."""
    ended: str
    """Why the loop ended, in words."""


def order_seed(config: SelectConfig, step: int) -> int:
    """The seed of an outer step's data order: a new one at each restart, or the weights over-fit one order."""
    return config.data.seed + (step if config.outer.reshuffle else 0)


def make_weighting(task: Task | ArrayTask, config: SelectConfig) -> Weighting:
    """The configured map from the outer variable to the weight table."""
    name, size = config.outer.weighting, placing.table_size(task.rows)
    if name == "per_source":
        source, count = source_numbers(task)
        return weighting.padded(weighting.per_source(jnp.asarray(source), count), size - task.rows)
    if name == "by_features":
        return weighting.padded(weighting.by_features(jnp.asarray(task.features())), size - task.rows)
    return {"softmax": weighting.softmax, "sigmoid": weighting.sigmoid}[name](task.rows, size)


def source_numbers(task: Task | ArrayTask) -> tuple[Int[np.ndarray, "rows"], int]:
    """(the number of each row's source, how many there are)."""
    names, numbers = np.unique([example.source for example in task.examples], return_inverse=True)
    if len(names) < 2:
        raise ValueError(
            f"outer.weighting = per_source needs two sources, and every row comes from {str(names[0])!r}. Set "
            "data.source_field to the key that tells sources apart, or choose another weighting."
        )
    return numbers, len(names)


def baselines(task: Task | ArrayTask, trainer: Trainer, run: Run, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(alignment entries, losses) of every row at the end of a run: what the simple selections rank by."""
    direct = trainer.direct(run, weights, alignment=True)
    fixed = task.fixed(run.start.params)
    losses = per_row(task.objective.losses, run.end.params, fixed, task.summed(seed=0), task.rows)
    return direct.grad, placing.table(task.mesh, losses.astype(direct.grad.dtype))


def rate(outer: OuterSection, progress: float) -> float:
    """The rate of the weights at a point of the loop: outer.learning_rate, falling to 0 at 1 as outer.schedule says.

    A normalised step has the same length wherever it is made, and each is of another data order: at a constant rate
    the weights keep the noise of the last orders, at a falling one it averages out.
    """
    return outer.learning_rate * float(SHAPES[outer.schedule](progress))


def travel(outer: OuterSection) -> float:
    """The sum of the rates of outer.steps steps: how far a logit goes if every step is of the rms length."""
    return sum(rate(outer, step / outer.steps) for step in range(outer.steps))


def learn(
    task: Task | ArrayTask, config: SelectConfig, trainer: Trainer, session: Session, progress: Progress | None = None
) -> Learned:
    """Optimise the weights by hypergradients of L_v on V_fit, and return the best by L_v on V_select.

    Each step trains under the present weights, reads L_v, estimates, and steps the outer variable along the
    hypergradient divided by its rms, at the rate of its place in the loop. Without V_select the last weights count.
    Ends after outer.steps steps (with `progress`, where it passes 1 instead), after outer.patience steps without a
    better V_select, or where the effective sample size falls below its floor.
    """
    outer, folder = config.outer, session.folder / "checkpoints" / "outer"
    chosen = make_weighting(task, config)
    weights_of = jax.jit(chosen.weights)
    pull_back = jax.jit(lambda hyper, entries: weighting.pull_back(chosen, hyper, entries))
    descend = jax.jit(lambda rate, hyper, grad: weighting.normalised_descent(rate, outer.max_step)(hyper, grad))
    progress = progress or (lambda records: len(records) / outer.steps)
    value = outer_value(task.problem)
    good = good_rows(task, config)

    hyper, zero = (placing.table(task.mesh, one) for one in (chosen.init(), jnp.zeros(task.rows)))
    tables = Tables(hyper, hyper, zero, zero, zero, zero, task.fresh(config.train.seed))
    records: Records = []
    if found := checkpoint.restore(folder, tables):
        tables, records = found.tree, found.meta["records"]
        session.advance(sum(record["work"] for record in records))
    ended = _ended(records, config, task.rows, progress)

    while not ended:
        step, before, began = len(records), session.work, time.monotonic()
        weights = weights_of(tables.hyper)
        stream = task.stream(order_seed(config, step))
        session.phase(f"outer step {step} of {outer.steps}")
        start = trainer.begin(tables.start)
        run = trainer.run(weights, start, stream, swept=True, save_as=step)
        fixed = task.fixed(run.start.params)
        if step == 0 and outer.method in ("unrolled", "window"):
            check_differentiable(task.step, task.optimizer, run, weights, fixed, stream)
        estimate = trainer.estimate(run, weights, stream, save_as=step)
        if not bool(tree.finite(estimate.grad)):
            raise FloatingPointError(
                f"the hypergradient of outer step {step} is not finite ({estimate.checks}). Training itself was "
                "finite: raise optimizer.eps_root, lower optimizer.learning_rate, or use outer.method: window."
            )
        read = {
            part: float(value(run.end.params, fixed, task.held_out[part])) if part in task.held_out else None
            for part in PARTS
        }
        record = {
            "step": step,
            "loss": read,
            "ess": float(weighting.effective_size(weights)),
            "entropy": float(weighting.entropy(weights)),
            "largest": float(weights.max()),
            "auc": auc(fetch(weights)[: task.rows], good) if good is not None else None,
            "checks": _plain(estimate.checks),
            "rate": rate(outer, min(1.0, progress(records))),
        }
        tables = _advance(task, trainer, tables, records, record, run, estimate.grad, weights, config)
        # the first training is uniform in any case: what is certified and compared with begins there
        origin = tables.hyper if step else scoring.warm(task, config, tables.hyper, session)
        pulled = pull_back(tables.hyper, estimate.grad)
        tables = tables._replace(hyper=descend(record["rate"], origin, pulled))
        record |= {"work": session.work - before, "seconds": time.monotonic() - began}
        records.append(record)
        session.log.write({"event": "outer", **record})
        session.say(reading_line(f"outer step {step:>3}", record, task.objective.unit))
        checkpoint.save(folder, step, tables, {"records": records})
        session.saved()
        ended = _ended(records, config, task.rows, progress)
        del run, estimate  # or their snapshots would live beside those of the next training

    best = _best(records)
    return Learned(
        weights=fetch(weights_of(tables.best))[: task.rows],
        entries=fetch(tables.best_entries)[: task.rows],
        first_entries=fetch(tables.first_entries)[: task.rows],
        alignment=fetch(tables.alignment)[: task.rows],
        losses=fetch(tables.losses)[: task.rows],
        records=records,
        best=best,
        ended=ended,
    )


def good_rows(task: Task | ArrayTask, config: SelectConfig) -> np.ndarray | None:
    """Which rows carry the label data.good_label; None where the data have no such labels."""
    labels = [example.label for example in task.examples]
    if not config.data.label_field or all(label is None for label in labels):
        return None
    return np.array([label == config.data.good_label for label in labels])


def _advance(task, trainer, tables: Tables, records, record, run, grad, weights, config: SelectConfig) -> Tables:
    """The tables after an outer step, before its step on the outer variable."""
    if not records:
        alignment, losses = baselines(task, trainer, run, weights)
        tables = tables._replace(first_entries=grad, alignment=alignment, losses=losses)
    if _best([*records, record]) == len(records):
        tables = tables._replace(best=tables.hyper, best_entries=grad)
    if config.outer.restart == "warm":
        tables = tables._replace(start=run.end.params)
    return tables


def _best(records: Records) -> int:
    """The step with the least L_v on V_select; without V_select, the last."""
    values = [record["loss"]["select"] for record in records]
    return len(records) - 1 if values[0] is None else int(np.argmin(values))


def _ended(records: Records, config: SelectConfig, rows: int, progress: Progress) -> str:
    """Why the loop ends here, or nothing."""
    outer = config.outer
    if not records:
        return ""
    if records[-1]["ess"] < outer.ess_floor * rows:
        return (
            f"the effective sample size fell to {records[-1]['ess']:.0f} of {rows} rows, below outer.ess_floor "
            f"({outer.ess_floor:g} of the rows)"
        )
    since = len(records) - 1 - _best(records)
    if outer.patience and since >= outer.patience:
        return f"{since} outer steps in a row did not lower L_v on V_select (outer.patience)"
    return f"all {len(records) - 1} outer steps were made" if progress(records) > 1 else ""


def reading_line(where: str, record: dict[str, Any], unit: str) -> str:
    """One line for people: L_v on every part, effective size, AUC."""
    loss = " ".join(f"{part} {value:.4f}" for part, value in record["loss"].items() if value is not None)
    auc_words = "" if record["auc"] is None else f"  AUC {record['auc']:.3f}"
    return f"{where}   L_v ({unit}): {loss}   ESS {record['ess']:.0f}{auc_words}"


def _plain(checks: Checks) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and np.isnan(value) else value for key, value in checks._asdict().items()
    }
