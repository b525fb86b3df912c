"""The verb `audit`: cheap scores of training rows, judged by exact entries and by one bank of retrains."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from bilevel_jax.core import certify, tree
from bilevel_jax.core.types import PADDING, Estimate, Inner, Run, Stream
from bilevel_jax.core.unrolled import check_differentiable, each
from bilevel_jax.runs import audit_report, bank, classification, files, judging, rows, scoring
from bilevel_jax.runs import config as configs
from bilevel_jax.runs import mesh as placing
from bilevel_jax.runs.certificates import certificates
from bilevel_jax.runs.classification import ArrayTask
from bilevel_jax.runs.config import AuditConfig, SelectConfig
from bilevel_jax.runs.embedded import embedded
from bilevel_jax.runs.judging import EXACT, Score
from bilevel_jax.runs.rules import on_arrays
from bilevel_jax.runs.sections import EstimatorName
from bilevel_jax.runs.session import Session, run_folder, started
from bilevel_jax.runs.task import Task
from bilevel_jax.runs.task import prepare as prepare_text
from bilevel_jax.runs.training import PRODUCT, REPLAY, Trainer, release


class Trained(NamedTuple):
    """The uniform training that entries and scores are of."""

    trainer: Trainer
    start: Inner
    stream: Stream
    run: Run
    queries: Int[np.ndarray, "queries"]
    """Rows of V_fit."""
    seconds: float


def audit(config: AuditConfig) -> dict[str, Any]:
    """Run the verb in `config.output.folder` and return what result.json holds.

    Raises as `select.select` does, and ValueError for scores that the task does not allow and queries it has not.
    """
    with run_folder(config) as folder:
        task = prepared(config, folder)
        names = cheap(config, task)
        asked = queries(config, task)
        with started(config, folder) as work:
            return _work(config, task, names, asked, work)


def settings(config: AuditConfig) -> SelectConfig:
    """The run as the settings of `select`, which its parts are written for."""
    data = config.data
    if on_arrays(config):
        data = replace(data, label_field="label", good_label="clean")
    return SelectConfig(
        model=config.model, data=data, objective=config.objective, optimizer=config.optimizer, train=config.train,
        outer=replace(config.outer, method=EXACT), certify=config.certify, output=config.output,
        mesh=config.mesh, distributed=config.distributed, lora=config.lora,
    )  # fmt: skip


def prepared(config: AuditConfig, folder: Path) -> Task | ArrayTask:
    """The task: arrays with wrong labels, or text."""
    base = settings(config)
    if on_arrays(config):
        source = classification.read(config.data.train[0])
        return classification.prepare(base, config.arrays, source, classification.network(base, config.arrays, source))
    ready = embedded(base, folder)
    seeds, prior = [config.data.seed], config.outer.proximal
    return prepare_text(ready, rows.load(ready.data), folder, steps=config.train.max_steps, seeds=seeds, prior=prior)


def cheap(config: AuditConfig, task: Task | ArrayTask) -> list[str]:
    """The cheap scores to judge; a ValueError for one that the task does not allow."""
    arrays = isinstance(task, ArrayTask)
    for name in config.audit.scores:
        scoring.check(name, arrays=arrays)
    return list(dict.fromkeys(config.audit.scores)) or list(scoring.ON_ARRAYS if arrays else scoring.SCORES)


def queries(config: AuditConfig, task: Task | ArrayTask) -> Int[np.ndarray, "queries"]:
    """The rows of V_fit whose own losses are foretold, drawn from data.seed."""
    held = task.held_out["fit"]
    index = np.concatenate([np.asarray(held.batch(step)["index"]).ravel() for step in range(held.steps)])
    present = np.sort(index[index != PADDING])
    if config.audit.queries > len(present):
        raise ValueError(
            f"audit.queries = {config.audit.queries}, but V_fit has {len(present)} rows. Lower it, or give more rows."
        )
    drawn = np.random.default_rng((config.data.seed, 3)).permutation(present)[: config.audit.queries]
    return np.sort(drawn)


def planned_work(config: AuditConfig, task: Task | ArrayTask, asked: int) -> float:
    """The whole run in training steps, for the ETA; solves and scores are counted when they are done."""
    steps, options = task.steps, config.audit
    sweeps = 2 * REPLAY + (1 + asked) * PRODUCT if EXACT in options.estimators else 0
    certified = 2 * len(config.certify.step_sizes) + 2 + REPLAY + PRODUCT if config.certify.enabled else 0
    return steps * (1 + sweeps + certified + len(options.removed) * options.subsets)


def _work(
    config: AuditConfig, task: Task | ArrayTask, names: list[str], asked: Int[np.ndarray, "queries"], work: Session
) -> dict[str, Any]:
    for note in task.notes:
        work.say(note)
    work.phase("training", total=planned_work(config, task, len(asked)))
    trained = train(config, task, asked, work)
    entries, exact = estimates(config, task, trained, work)
    release(trained.run)
    scores = entries + cheap_scores(config, task, trained, names, work)
    certified = certificate(config, task, trained, entries, exact, work)
    made = bank.retrained(
        task, work, start=trained.start, stream=trained.stream, queries=asked, fractions=config.audit.removed,
        count=config.audit.subsets, together=min(config.audit.vmap_size, config.audit.subsets), seed=config.data.seed,
    )  # fmt: skip
    work.phase("writing")
    result = judging.judged(settings(config), task, scores, made, certified)
    result |= {"seconds": work.cost("")[1], "notes": task.notes, "config_hash": configs.config_hash(config)}
    trusted = [getattr(one, "id", str(place)) for place, one in enumerate(task.trusted["fit"])]
    table = bank.table(made, [example.id for example in task.examples], [trusted[row] for row in asked])
    files.write_table(work.folder / "bank.parquet", table)
    files.write_table(work.folder / scoring.NAME, with_entries(task, entries, work.folder))
    files.write_json(work.folder / "result.json", result)
    audit_report.write(work.folder)
    return result


def train(config: AuditConfig, task: Task | ArrayTask, asked: Int[np.ndarray, "queries"], work: Session) -> Trained:
    """Train with weight 1 for every row."""
    began, ones = time.monotonic(), jnp.ones(task.rows)
    trainer = Trainer(task, settings(config).outer, work)
    start = trainer.begin(task.fresh(config.train.seed))
    stream = placing.kept(task.mesh, task.stream(config.data.seed))  # read again by every retrain
    run = trainer.run(ones, start, stream, swept=EXACT in config.audit.estimators, save_as=0)
    if EXACT in config.audit.estimators:
        check_differentiable(task.step, task.optimizer, run, ones, task.fixed(start.params), stream)
    return Trained(trainer, start, stream, run, asked, work.once("training", lambda: time.monotonic() - began))


# ---- what is judged


def estimates(
    config: AuditConfig, task: Task | ArrayTask, trained: Trained, work: Session
) -> tuple[list[Score], dict[str, Any]]:
    """The configured estimates of -dL/dw for L_v and for each query; and what was told of the exact one."""
    scores: list[Score] = []
    exact: dict[str, Any] = {}
    fit = task.held_out["fit"]
    apart = [bank.only(fit, row) for row in trained.queries]
    groups = [apart[first : first + config.audit.vmap_size] for first in range(0, len(apart), config.audit.vmap_size)]
    (work.folder / "parts").mkdir(exist_ok=True)
    for name in config.audit.estimators:
        work.phase(f"entries: {name}")
        estimate = estimator(name, config, task, trained, work)
        values, told = _kept(work, name, estimate, [fit])
        # each query's share of L_v, times the number of rows: its own loss
        size = float(np.ravel(fit.batch(0)["rows"])[0])
        lines = [size * _kept(work, f"{name} of queries {n}", estimate, some)[0] for n, some in enumerate(groups)]
        at = "through" if name == EXACT else "end"
        passes, seconds = task.steps + told["passes"], trained.seconds + told["seconds"]
        solved = told["checks"].get("residual")
        notes = (f"relative residual of the solve for L_v {solved:.2g}",) if solved is not None else ()
        each_query = np.concatenate(lines) if lines else None
        scores.append(Score(name, at, values[0], each_query, passes, seconds, notes))
        exact = told if name == EXACT else exact
        work.say(_line(scores[-1]))
    return scores, exact


def estimator(
    name: EstimatorName, config: AuditConfig, task: Task | ArrayTask, trained: Trained, work: Session
) -> Callable[[list[Stream]], Estimate]:
    """validation streams -> the estimate for each, its leaves lead with [streams]; of the checks, the last one's."""
    ones, fixed = jnp.ones(task.rows), task.fixed(trained.start.params)
    if name == EXACT:
        losses = 1

        def on_step(step: int) -> None:
            work.advance(REPLAY + losses * PRODUCT)
            work.check()

        sweep = each(task.problem, task.step, on_step=on_step)

        def swept(streams: list[Stream]) -> Estimate:
            nonlocal losses
            losses = len(streams)
            return sweep(trained.run, ones, fixed, trained.stream, streams)

        return swept
    trainer = Trainer(task, replace(config.outer, method=name), work)
    summed = placing.kept(task.mesh, task.summed(seed=0))  # read again for every query

    def solved(streams: list[Stream]) -> Estimate:
        found = []
        for stream in streams:
            found.append(trainer.direct(trained.run, ones, summed=summed, validation=stream))
            work.check()
        return found[-1]._replace(grad=jnp.stack([one.grad for one in found]))

    return solved


def cheap_scores(
    config: AuditConfig, task: Task | ArrayTask, trained: Trained, names: list[str], work: Session
) -> list[Score]:
    """The cheap scores by the models before and after training; what needs no model, once."""
    scores: list[Score] = []
    dearest: dict[str, float] = {}
    for at in config.audit.checkpoints:
        params = {"start": trained.start.params, "end": trained.run.end.params}[at]
        for name in names:
            if name == "random" and scores and at != config.audit.checkpoints[0]:
                continue  # it reads no model
            if name == "alignment" and at == "end" and name in config.audit.estimators:
                continue  # it is there, with entries of every query
            work.phase(f"scoring: {name} at the {at}")
            title, column, model = (f"{name}, {at}", f"{name}_{at}", at) if name != "random" else (name, name, "")
            found = scoring.once(column, name, task, params, config.scores, work)
            steps, waited = (task.steps, trained.seconds) if model == "end" else (0, 0.0)
            # what a run makes once for both models (the holdout model of `reducible`) is a cost of either
            dearest[name] = max(found.passes, dearest.get(name, 0.0))
            cost = (dearest[name] + steps, found.seconds + waited)
            # a row without a score is neither good nor bad
            values = np.where(np.isnan(found.values), np.nanmean(found.values), found.values)
            scores.append(Score(title, model, values, None, *cost, found.notes))
            work.say(_line(scores[-1]))
    return scores


def certificate(
    config: AuditConfig, task: Task | ArrayTask, trained: Trained, entries: list[Score], exact: dict[str, Any],
    work: Session,
) -> tuple[certify.Certificates, certify.Verdict] | None:  # fmt: skip
    """Whether the exact entries are to be believed; None where they, or the certificates, were not asked for."""
    if not exact or not config.certify.enabled:
        return None
    slopes = next(-one.values for one in entries if one.name == EXACT)
    found = certificates(
        task, settings(config), trained.trainer, work, name="uniform weights", weights=np.ones(task.rows),
        entries=slopes, step=0, value=exact["value"], checks=certify.Checks(**exact["checks"]),
    )  # fmt: skip
    told = certify.verdict(found)
    work.say(f"the exact entries: {told}")
    return found, told


def with_entries(task: Task | ArrayTask, scores: list[Score], folder: Path) -> pa.Table:
    """scores.parquet with the estimates as columns beside the cheap scores."""
    path, rows = folder / scoring.NAME, task.trainable()
    ids = pa.table({"id": [task.examples[row].id for row in rows]})
    table = pq.read_table(path) if path.exists() else ids
    known = dict(table.schema.metadata or {})
    for one in scores:
        if one.name in table.column_names:  # of a run that was stopped after it wrote them
            table = table.drop_columns([one.name])
        meaning = f"-dL_v/dweight by {one.name}, {task.objective.unit} per unit of weight; larger is better"
        known[one.name.encode()] = json.dumps({"meaning": meaning, "passes": one.passes}).encode()
        table = table.append_column(one.name, pa.array(one.values[rows].astype(float)))
    return table.replace_schema_metadata(known)


# ---- parts


def _kept(
    work: Session, name: str, estimate: Callable[[list[Stream]], Estimate], streams: list[Stream]
) -> tuple[Float[np.ndarray, "streams rows"], dict[str, Any]]:
    """(-dL/dw for each stream, what it cost and its checks): made now, or found where an earlier run left it."""
    path = work.folder / "parts" / f"{name}.npy"

    def make() -> dict[str, Any]:
        before, began = work.work, time.monotonic()
        found = estimate(streams)
        if not bool(tree.finite(found.grad)):
            raise FloatingPointError(
                f"the entries of {name} are not finite ({found.checks}). Training itself was finite: raise "
                "optimizer.eps_root, or lower optimizer.learning_rate."
            )
        with files.replacing(path) as place, open(place, "wb") as file:
            np.save(file, -np.asarray(found.grad))
        checks = {key: value for key, value in found.checks._asdict().items() if not math.isnan(value)}
        value = float(np.ravel(found.value)[0])
        return {"passes": work.work - before, "seconds": time.monotonic() - began, "value": value, "checks": checks}

    told = work.once(f"entries/{name}", make)
    return np.load(path), told


def _line(score: Score) -> str:
    return f"{score.name:<20}{score.passes:>9,.0f} passes   {score.seconds:,.0f} s"
