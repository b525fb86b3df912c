"""The verb `train`: fine-tuning with one weight per training row; first-order, resumable, exported."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel_jax.core.transition import begin, descent
from bilevel_jax.core.types import Batch, Hyper, Inner, Params, Problem, Stream
from bilevel_jax.core.unrolled import outer_value
from bilevel_jax.lm import batches
from bilevel_jax.runs import checkpoint, files, measured, outputs, processes, rows, scoring, train_report, weights
from bilevel_jax.runs import config as configs
from bilevel_jax.runs import mesh as placing
from bilevel_jax.runs.config import TrainConfig
from bilevel_jax.runs.diagnosis import first_broken
from bilevel_jax.runs.embedded import embedded
from bilevel_jax.runs.objective import check_rows
from bilevel_jax.runs.optimizers import schedule
from bilevel_jax.runs.reweighting import Reweighting
from bilevel_jax.runs.session import Session, run_folder, started
from bilevel_jax.runs.streamed import Streamed
from bilevel_jax.runs.task import Task, per_row, prepare, tokenized
from bilevel_jax.runs.training import check_finite, row_name

READ = 10
"""Steps between two looks at the losses: each look waits for the device."""


class Feed(NamedTuple):
    """What training reads."""

    at: Callable[[int], tuple[Hyper, Batch]]
    """step -> (the weights as `problem` reads them, the batch), on the mesh."""
    problem: Problem
    renew: Callable[[int, Params], None] = lambda step, params: None
    """(step, parameters before it): called before each step, so that the weights may follow the model."""
    renewed: tuple[int, ...] = ()
    """The steps at which `renew` may take long."""


class Progress(NamedTuple):
    """What a checkpoint keeps."""

    state: Inner
    best: Params
    """The parameters of the least L_v on V_select so far; () where the last ones are kept."""


class Trained(NamedTuple):
    """The parameters to keep, and how training went."""

    params: Params
    after: dict[str, Any]
    """What the kept parameters do on the trusted rows."""
    records: list[dict[str, Any]]
    tokens: int
    seconds: float
    """Of training, without evaluation."""
    speed: float
    """Supervised tokens per second after the first steps, which compile; nan for a run as short as that."""
    resumed: int
    """The step that this process began with."""
    skipped: int
    """Steps that were left out because their gradient was not finite."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Run the verb in `config.output.folder` and return what result.json holds.

    Raises ValueError for input that cannot be used, FileExistsError for a folder that holds a run, FloatingPointError
    for a training that diverges, and `session.Interrupted` when asked to stop.
    """
    with run_folder(config) as folder:
        ready = embedded(config, folder)
        found = rows.load(ready.data)
        if config.weights.score:
            scoring.check(config.weights.score, holdout=bool(found.trusted["fit"]))
        given = weights.given(ready.weights, found.train) if found.train else weights.unknown(ready.weights)
        kept = [example for example, keep in zip(found.train, given.kept, strict=True) if keep]
        steps = planned_steps(config, len(kept))
        task = prepare(ready, found._replace(train=kept), folder, steps=steps, seeds=[config.data.seed])
        if config.train.load_best and "select" not in task.held_out:
            raise ValueError("train.load_best chooses by V_select, which has no rows: give data.validation or .select.")
        with started(config, folder) as work:
            measured.expected(task, config, work)
            table = given.weights[given.kept]
            moving = Reweighting(task, config, work) if config.weights.score else None
            given = given._replace(source=moving.source) if moving else given
            for note in [*task.notes, f"weights: {given.source}{'' if moving else _about(table)}."]:
                work.say(note)
            if moving:
                trained = _train(task, config, _scored(task, config, moving), work)
                table = moving.received().weights
            elif not config.data.streaming:
                trained = _train(task, config, _fixed(task, config, table), work)
            else:
                feed, streamed = _streamed(task, ready)
                trained = _train(task, config, feed, work)
                task = task._replace(examples=list(streamed.met.values()))
                table = np.array([streamed.weigh(example) for example in task.examples], float)
            return _write(task, config, given, table, moving, trained, work, folder)


def planned_steps(config: TrainConfig, rows: int) -> int:
    """Optimiser steps of the run: as many as are asked for, or as the epochs over so many rows have."""
    if config.train.max_steps:
        return config.train.max_steps
    return math.ceil(config.train.num_epochs * batches.steps_per_epoch(rows, config.train.global_batch_size))


def _fixed(task: Task, config: TrainConfig, table: np.ndarray) -> Feed:
    """One weight for each row, from the beginning to the end."""
    hyper = placing.table(task.mesh, table.astype(config.model.param_dtype))
    stream = task.stream(config.data.seed)
    return Feed(lambda step: (hyper, stream.batch(step)), task.problem)


def _scored(task: Task, config: TrainConfig, moving: Reweighting) -> Feed:
    """The weights that a score gives to the rows of each step."""
    stream = task.stream(config.data.seed)
    return Feed(lambda step: (moving.hyper(step), stream.batch(step)), moving.problem, moving.renew, moving.starts)


def _streamed(task: Task, config: TrainConfig) -> tuple[Feed, Streamed]:
    """Rows that are read as training goes, with their weights; and what reads them."""
    dtype = config.model.param_dtype
    streamed = Streamed(
        config.data,
        task.layout,
        weigh=weights.by_row(config.weights),
        tokenize=lambda examples: tokenized(config, examples, task.tokenizer, task.architecture),
        check=lambda examples: check_rows(config.objective, examples),
        trusted=[example for part in task.trusted.values() for example in part],
    )

    def at(step: int) -> tuple[Hyper, Batch]:
        hyper, batch = streamed.batch(step)
        placed = placing.placed(task.mesh, Stream(lambda _: batch, 1))
        return placing.everywhere(task.mesh, jnp.asarray(hyper, dtype)), placed.batch(0)

    return Feed(at, task.problem), streamed


def _train(task: Task, config: TrainConfig, feed: Feed, work: Session) -> Trained:
    folder, every = work.folder / "checkpoints" / "train", config.train.eval_steps
    best_kept = config.train.load_best
    optimizer = task.optimizer
    if config.train.max_nonfinite_steps:  # the step then leaves the parameters and the optimiser's state as they are
        optimizer = optax.apply_if_finite(optimizer, max_consecutive_errors=config.train.max_nonfinite_steps)
    step = descent(feed.problem, optimizer)
    rates = np.asarray(jax.vmap(schedule(config.optimizer, task.steps))(jnp.arange(task.steps)), float)
    read = _reader(task)
    # copied: a step takes the memory of the state that it is given, and the model's own must stay
    params = jax.tree.map(jnp.copy, task.fresh(config.train.seed))
    start = placing.settled(task.mesh, begin(optimizer, params))
    progress = Progress(start, jax.tree.map(jnp.copy, params) if best_kept else ())
    fixed = task.fixed(params)
    records: list[dict[str, Any]] = []
    tokens, seconds = 0, 0.0
    if found := checkpoint.restore(folder, progress):
        progress, records = found.tree, found.meta["records"]
        tokens, seconds = found.meta["tokens"], found.meta["seconds"]
    state, best = progress
    resumed = int(state.step)
    work.phase("training", total=float(task.steps))
    work.advance(resumed)

    def evaluate(reached: int) -> None:
        nonlocal best
        record = {"step": reached, **read(state.params, fixed, full=reached == 0)}
        if best_kept and _is_best(records, record):
            best = jax.tree.map(jnp.copy, state.params)
        records.append(record)
        work.log.write({"event": "evaluated", **record})
        work.say(_line(record, task.objective.unit))

    def explain(broken: int) -> str:
        saved = checkpoint.restore(folder, progress)
        began = saved.tree.state if saved else begin(optimizer, task.fresh(config.train.seed))
        return first_broken(
            feed.problem, optimizer, task.objective.losses, began, broken, fixed, feed.at,
            (lambda slot: f"row {slot + 1} of the batch") if config.data.streaming else lambda row: row_name(task, row),
        )  # fmt: skip

    def left_out() -> int:
        return int(state.opt.total_notfinite) if config.train.max_nonfinite_steps else 0

    if not records and task.held_out:
        evaluate(0)
    losses: dict[int, jax.Array] = {}
    counts: list[jax.Array] = []
    began, timed = time.monotonic(), _Speed()
    for index in range(resumed, task.steps):
        seconds += time.monotonic() - began
        feed.renew(index, state.params)
        began = time.monotonic()
        if index in feed.renewed:
            timed.pause()
        hyper, batch = feed.at(index)
        state, losses[index] = step(state, hyper, fixed, batch)
        counts.append(batch["targeted"])
        work.advance()
        reached, due = index + 1, work.due() or index + 1 in feed.renewed  # making scores may be stopped, too
        last = reached == task.steps
        if due or last or reached % READ == 0 or reached % every == 0:
            skipped = left_out()
            values = check_finite(
                task, losses, explain, state.params, forgiven=0 < skipped <= config.train.max_nonfinite_steps
            )
            if odd := [at for at, loss in values.items() if not math.isfinite(loss)]:
                work.say(f"left out, as the loss was not finite: step {', '.join(map(str, odd))} ({skipped} so far)")
            new = sum(int(count[0]) for count in counts)
            work.log.write(
                {
                    "event": "steps",
                    "step": reached,
                    "first": min(values),
                    "losses": list(values.values()),
                    "rates": [float(rates[at]) for at in values],
                }
            )
            tokens += new
            timed.add(new)
            losses.clear()
            counts.clear()
        if task.held_out and (last or reached % every == 0):
            seconds += time.monotonic() - began
            evaluate(reached)
            began = time.monotonic()
            timed.pause()
        if due or last:
            meta = {"records": records, "tokens": tokens, "seconds": seconds + time.monotonic() - began}
            checkpoint.save(folder, reached, Progress(state, best), meta)
            work.saved()
    seconds += time.monotonic() - began
    kept = best if best_kept else state.params
    return Trained(kept, read(kept, fixed, full=True), records, tokens, seconds, timed.rate(), resumed, left_out())


class _Speed:
    """Tokens per second, without the first count (compilation) and without what lies between `pause` and the next."""

    def __init__(self):
        self.tokens, self.seconds, self.last = 0, 0.0, None

    def add(self, tokens: int) -> None:
        now = time.monotonic()
        if self.last is not None:
            self.tokens, self.seconds = self.tokens + tokens, self.seconds + now - self.last
        self.last = now

    def pause(self) -> None:
        self.last = time.monotonic() if self.last is not None else None

    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else float("nan")


def _reader(task: Task):
    """(params, fixed, full) -> L_v of each part, and with `full` the accuracies."""
    value = outer_value(task.problem)

    def read(params: Params, fixed: Any, *, full: bool) -> dict[str, Any]:
        losses = {part: float(value(params, fixed, stream)) for part, stream in task.held_out.items()}
        accuracy = None
        if full:
            accuracy = {
                part: float(
                    np.nanmean(per_row(task.objective.accuracy, params, fixed, stream, len(task.trusted[part])))
                )
                for part, stream in task.held_out.items()
            }
        return {"loss": losses, "accuracy": accuracy}

    return read


def _write(
    task: Task,
    config: TrainConfig,
    given: weights.Given,
    table: np.ndarray,
    moving: Reweighting | None,
    trained: Trained,
    work: Session,
    folder: Path,
) -> dict[str, Any]:
    work.phase("writing")
    files.write_table(folder / "weights.parquet", outputs.given_table(task, config, table, given.source))
    outputs.write_model(
        folder / "model", task, trained.params, base_path=config.model.name_or_path, parts=config.output.model
    )
    records = trained.records
    best = min(records, key=lambda record: record["loss"]["select"]) if config.train.load_best else None
    ends = {"before": records[0], "after": trained.after} if records else {}
    result = {
        "steps": task.steps,
        "epochs": task.steps * task.batch / task.rows  # streamed: no step is cut short at the end of an epoch
        if config.data.streaming
        else task.steps / batches.steps_per_epoch(len(task.trainable()), task.batch),
        "batch": config.train.global_batch_size,
        "rows": {"train": task.rows, **{part: len(examples) for part, examples in task.trusted.items()}},
        "objective": config.objective.name,
        "unit": task.objective.unit,
        "right": task.objective.right,
        "parts": {
            part: {
                when: {"loss": record["loss"][part], "accuracy": record["accuracy"][part]}
                for when, record in ends.items()
            }
            for part in task.held_out
        },
        "best": {"step": best["step"], "part": "select"} if best else None,
        "kept": "best" if config.train.load_best else "last",
        "tokens": trained.tokens,
        "seconds": trained.seconds,
        "skipped": trained.skipped,
        "tokens_per_second": trained.speed if math.isfinite(trained.speed) else None,
        "weights": {
            "source": given.source,
            "ess": float(table.sum() ** 2 / (table**2).sum()),
            "mean": float(table.mean()),
            "zero": int((table == 0).sum()),
            "missing": given.missing,
        },
        "scoring": moving.told(trained.seconds) if moving else None,
        "records": records,
        "notes": task.notes + ([f"{trained.skipped} steps were left out: not finite."] if trained.skipped else []),
        "resumed": trained.resumed,
        "config_hash": configs.config_hash(config),
        "estimate": measured.expected(task, config, work),
        "measured": measured.taken(task, folder, passes=work.work, seconds=trained.seconds, timed=task.steps),
    }
    files.write_atomic(folder / "result.json", json.dumps(result, indent=1))
    processes.by_first(lambda: train_report.write(folder, task.examples))
    return result


def summary(result: dict[str, Any]) -> str:
    """One sentence: what the validation loss did."""
    parts = result["parts"]
    rows_words = f"{result['steps']:,} steps on {result['rows']['train']:,} rows"
    part = next((name for name in ("report", "select", "fit") if name in parts), None)
    if part is None:
        return f"{rows_words}; no validation rows were given, so nothing says whether the model became better."
    before, after = parts[part]["before"]["loss"], parts[part]["after"]["loss"]
    moved = "fell" if after < before else "ROSE"
    return f"{rows_words}; L_v on V_{part} {moved} from {before:.4f} to {after:.4f} {result['unit']}."


def _is_best(records: list[dict[str, Any]], record: dict[str, Any]) -> bool:
    return all(record["loss"]["select"] < other["loss"]["select"] for other in records)


def _about(table: np.ndarray) -> str:
    if not len(table):
        return ""
    zero, effective = int((table == 0).sum()), table.sum() ** 2 / (table**2).sum()
    return f"; mean {table.mean():.3g}, {zero:,} of {len(table):,} are 0, effective size {effective:.0f}"


def _line(record: dict[str, Any], unit: str) -> str:
    loss = " ".join(f"{part} {value:.4f}" for part, value in record["loss"].items())
    return f"step {record['step']:>6}   L_v ({unit}): {loss}"
