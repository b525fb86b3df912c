"""The `audit` command, which judges data scores by leave-k-out retraining."""

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
from jaxtyping import Float, Int

from bilevel_jax.commands.audit import extremes, judge, report, retrains, tokens
from bilevel_jax.commands.audit.judge import DataScore
from bilevel_jax.commands.audit.retrains import LeaveOutRetrains
from bilevel_jax.core import certify, tree
from bilevel_jax.core.types import Checks, Estimate, Stream, TrainState, Trajectory
from bilevel_jax.core.unrolled import check_differentiable, each, validation_loss_fn
from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.budget.work import audit_vmap_size, count_audit_work
from bilevel_jax.runs.config.load import AuditConfig, config_hash
from bilevel_jax.runs.config.rules import reads_array_data
from bilevel_jax.runs.config.schema import EXACT_ESTIMATOR, DataSection, EstimatorName, OuterSection
from bilevel_jax.runs.engine.certificates import GradientPoint, compute_certificates
from bilevel_jax.runs.engine.trainer import (
    HVP_WORK,
    REPLAY_WORK,
    Trainer,
    check_hypergradient_finite,
    delete_stored_states,
)
from bilevel_jax.runs.infra import distributed, run_dir
from bilevel_jax.runs.infra.checkpoint import keep_last_checkpoints
from bilevel_jax.runs.infra.distributed import fetch_from_first, fetch_to_host
from bilevel_jax.runs.infra.placement import cache_stream
from bilevel_jax.runs.infra.session import Session, open_run_dir, start_session
from bilevel_jax.runs.scoring.difficulty import measure_difficulty
from bilevel_jax.runs.scoring.likelihoods import check_embeddings
from bilevel_jax.runs.scoring.scores import (
    ARRAY_SCORES,
    SCORES,
    SCORES_FILE,
    TRAINABLE_HOLDOUT_SCORES,
    check_score_name,
    load_or_compute_score,
)
from bilevel_jax.runs.tasks.arrays import label_array_data
from bilevel_jax.runs.tasks.evaluation import count_examples, held_out_indices, is_validation_trainable
from bilevel_jax.runs.tasks.prepare import build_task, load_data
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.splits import DataSplits
from bilevel_jax.runs.tasks.text import TextTask


class UniformTraining(NamedTuple):
    """The uniform training run that estimates and scores are of."""

    trainer: Trainer
    start: TrainState
    stream: Stream
    trajectory: Trajectory
    query_indices: Int[np.ndarray, "queries"]
    """Rows of validation."""
    seconds: float


def audit(config: AuditConfig) -> dict[str, Any]:
    """Run the command in `config.output.dir` and return what result.json holds.

    Raises as `select` does, and ValueError for scores that the task does not allow and queries it has not.
    """
    names = list_cheap_scores(config)
    with open_run_dir(config) as folder:
        task = prepare_audit_task(config, folder)
        if not config.audit.scores and not is_validation_trainable(task):
            names = [name for name in names if name not in TRAINABLE_HOLDOUT_SCORES]
        query_indices = draw_queries(config, task)
        with start_session(config, folder) as session:
            return _run_audit(config, task, names, query_indices, session)


def labelled_data(config: AuditConfig) -> DataSection:
    """The section data with the keys of the labels, which arrays always have."""
    return label_array_data(config.data) if reads_array_data(config) else config.data


def exact_outer(config: AuditConfig) -> OuterSection:
    """The section outer with the estimator that the others are ranked against."""
    return replace(config.outer, method=EXACT_ESTIMATOR)


def prepare_audit_task(config: AuditConfig, folder: Path) -> Task:
    """The task: arrays with wrong labels, or text."""
    resolved, dataset = load_data(config, folder)
    if isinstance(dataset, DataSplits):
        check_embeddings(config.scores, dataset.train, dataset.held_out["validation"])
    return build_task(resolved, dataset, folder, seeds=[config.data.seed])


def list_cheap_scores(config: AuditConfig) -> list[str]:
    """The cheap scores to judge; a ValueError for one that is none, or that arrays do not have."""
    arrays = reads_array_data(config)
    for name in config.audit.scores:
        check_score_name(name, arrays=arrays)
    return list(dict.fromkeys(config.audit.scores)) or list(ARRAY_SCORES if arrays else SCORES)


def draw_queries(config: AuditConfig, task: Task) -> Int[np.ndarray, "queries"]:
    """The validation examples whose own losses are predicted, drawn from data.seed."""
    present = held_out_indices(task.held_out_streams["validation"])[: count_examples(task)["validation"]]
    if config.audit.queries > len(present):
        raise ValueError(
            f"audit.queries = {config.audit.queries}, but validation has {format_count('row', len(present))}. Lower "
            "it, or give more rows."
        )
    drawn = np.random.default_rng((config.data.seed, 3)).permutation(present)[: config.audit.queries]
    return np.sort(drawn)


def _run_audit(
    config: AuditConfig,
    task: Task,
    names: list[str],
    query_indices: Int[np.ndarray, "queries"],
    session: Session,
) -> dict[str, Any]:
    for note in task.notes:
        session.print_line(note)
    total = count_audit_work(task, config.audit, config.certify, len(query_indices), names)
    session.set_phase("training", total=total)
    uniform_training = train_uniform(config, task, query_indices, session)
    estimate_scores, exact_record = compute_estimates(config, task, uniform_training, session)
    delete_stored_states(uniform_training.trajectory)
    token_values = tokens.compute_tokens(
        task, config.audit, exact_outer(config), uniform_training.start, uniform_training.stream, session
    )
    scores = estimate_scores + compute_cheap_scores(config, task, uniform_training, names, session)
    certificates = certify_exact(config, task, uniform_training, estimate_scores, exact_record, session)
    retrain_losses = retrains.retrain_without_subsets(
        task,
        session,
        start=uniform_training.start,
        stream=uniform_training.stream,
        queries=query_indices,
        fractions=config.audit.removed,
        num_subsets=config.audit.subsets,
        vmap_size=audit_vmap_size(config.audit),
        seed=config.data.seed,
    )
    extreme_retrains = None
    if config.audit.extremes:
        extreme_retrains = extremes.retrain_without_extremes(
            task,
            session,
            extremes.plan_removals(
                scores, task.trainable_indices(), task.num_examples, config.audit.extremes, config.data.seed
            ),
            start=uniform_training.start,
            stream=uniform_training.stream,
            queries=query_indices,
            vmap_size=audit_vmap_size(config.audit),
        )
    verdict = None
    if certificates is not None:
        exact = next(score.values for score in estimate_scores if score.name == EXACT_ESTIMATOR)
        verdict = certify.judge_certificates(
            add_retrains(certificates, task, uniform_training, retrain_losses, exact, exact_record["value"])
        )
        session.print_line(f"the exact hypergradients: {verdict}")
    session.set_phase("writing")
    distributed.run_on_first_process(lambda: keep_last_checkpoints(session.folder))
    result = judge.judge_scores(
        task,
        scores,
        retrain_losses,
        verdict,
        correlate_with_difficulty(task, uniform_training, scores, session),
        data=labelled_data(config),
        train_seed=config.train.seed,
    )
    result |= {"seconds": session.job_cost("")[1], "notes": task.notes, "config_hash": config_hash(config)}
    validation_ids = [
        getattr(example, "id", str(index)) for index, example in enumerate(task.held_out_examples["validation"])
    ]
    ids = [example.id for example in task.examples], [validation_ids[row] for row in query_indices]
    run_dir.write_parquet(session.folder / "bank.parquet", retrains.build_retrain_table(retrain_losses, *ids))
    result["extremes"] = None
    if extreme_retrains is not None:
        table = extremes.build_extremes_table(extreme_retrains, *ids)
        run_dir.write_parquet(session.folder / "extremes.parquet", table)
        result["extremes"] = extremes.summarize_extremes(
            extreme_retrains, len(task.trainable_indices()), result["unit"]
        )
    result["tokens"] = []
    if token_values is not None and isinstance(task, TextTask):
        exact = next(score.values for score in estimate_scores if score.name == EXACT_ESTIMATOR)
        run_dir.write_parquet(session.folder / "tokens.parquet", tokens.build_tokens_table(task, token_values))
        result["tokens"] = tokens.describe_extremes(task, token_values, exact, config.audit.token_examples)
    run_dir.write_parquet(session.folder / SCORES_FILE, add_estimate_columns(task, estimate_scores, session.folder))
    run_dir.write_result(session.folder, result)
    distributed.run_on_first_process(lambda: report.write_audit_report(session.folder))
    return result


def train_uniform(
    config: AuditConfig, task: Task, query_indices: Int[np.ndarray, "queries"], session: Session
) -> UniformTraining:
    """Train with weight 1 for every row."""
    began, ones = time.monotonic(), jnp.ones(task.num_examples)
    trainer = Trainer(task, exact_outer(config), session)
    start = trainer.init_state(task.init_params(config.train.seed))
    stream = cache_stream(task.mesh, task.training_stream(config.data.seed))  # read again by every retrain
    trajectory = trainer.run(ones, start, stream, for_backward=EXACT_ESTIMATOR in config.audit.estimators, outer_step=0)
    if EXACT_ESTIMATOR in config.audit.estimators:
        check_differentiable(
            task.train_step, task.optimizer, trajectory, ones, task.frozen(start.params), stream, fetch=fetch_from_first
        )
    return UniformTraining(
        trainer,
        start,
        stream,
        trajectory,
        query_indices,
        session.run_once("training", lambda: time.monotonic() - began),
    )


# ---- what is judged


def compute_estimates(
    config: AuditConfig, task: Task, uniform_training: UniformTraining, session: Session
) -> tuple[list[DataScore], dict[str, Any]]:
    """The configured estimates of -dL/dw for L_v and for each query; and the record of the exact one."""
    scores: list[DataScore] = []
    exact_record: dict[str, Any] = {}
    fit, trainer = task.held_out_streams["validation"], uniform_training.trainer
    has_halves = trainer.has_halves("validation")
    query_streams = [retrains.single_example_stream(fit, row) for row in uniform_training.query_indices]
    groups = [
        query_streams[start : start + config.audit.vmap_size]
        for start in range(0, len(query_streams), config.audit.vmap_size)
    ]
    for name in config.audit.estimators:
        session.set_phase(f"hypergradients: {name}")
        estimate = make_estimator(name, config, task, uniform_training, session)
        halves = (
            [trainer.halved_stream("validation", config.data.seed)] if name == EXACT_ESTIMATOR and has_halves else []
        )
        values, record = _estimate_once(session, name, estimate, [fit, *halves])
        # each query's share of L_v, times the number of rows: its own loss
        size = float(np.ravel(fit.batch(0)["num_examples"])[0])
        query_values = [
            size * _estimate_once(session, f"{name} of queries {n}", estimate, streams)[0]
            for n, streams in enumerate(groups)
        ]
        checkpoint = "through" if name == EXACT_ESTIMATOR else "end"
        passes = task.num_steps + record["passes"] - len(halves) * HVP_WORK * task.num_steps
        seconds = uniform_training.seconds + record["seconds"]
        solved = record["checks"].get("residual")
        notes = (f"relative residual of the solve for L_v {solved:.2g}",) if solved is not None else ()
        each_query = np.concatenate(query_values) if query_values else None
        scores.append(DataScore(name, checkpoint, values[0], each_query, passes, seconds, notes))
        if name == EXACT_ESTIMATOR:
            kept = task.trainable_indices()
            exact_record = record | {
                "reliability": certify.measure_reliability(
                    jnp.ones(len(kept)),
                    jnp.asarray(values[0][kept]),
                    jnp.asarray(values[1][kept]),
                    trainer.num_held_out("validation"),
                )
                if has_halves
                else None
            }
        session.print_line(_format_score(scores[-1]))
    return scores, exact_record


def make_estimator(
    name: EstimatorName,
    config: AuditConfig,
    task: Task,
    uniform_training: UniformTraining,
    session: Session,
) -> Callable[[list[Stream]], Estimate]:
    """validation streams -> the estimate for each, its leaves lead with [streams]; of the checks, the last one's."""
    ones, frozen = jnp.ones(task.num_examples), task.frozen(uniform_training.start.params)
    if name == EXACT_ESTIMATOR:
        losses = 1

        def on_step(step: int) -> None:
            session.advance(REPLAY_WORK + losses * HVP_WORK)
            session.check_signals()

        sweep = each(task.problem, task.train_step, on_step=on_step)

        def sweep_streams(streams: list[Stream]) -> Estimate:
            nonlocal losses
            losses = len(streams)
            return sweep(uniform_training.trajectory, ones, frozen, uniform_training.stream, streams)

        return sweep_streams
    trainer = Trainer(task, replace(config.outer, method=name), session)
    summed = cache_stream(task.mesh, task.full_pass_stream(seed=0))  # read again for every query

    def solve_streams(streams: list[Stream]) -> Estimate:
        results = []
        for stream in streams:
            results.append(
                trainer.estimate_at_end(uniform_training.trajectory, ones, train_stream=summed, validation=stream)
            )
            session.check_signals()
        return results[-1]._replace(grad=tree.stack(*[one.grad for one in results]))

    return solve_streams


def compute_cheap_scores(
    config: AuditConfig, task: Task, uniform_training: UniformTraining, names: list[str], session: Session
) -> list[DataScore]:
    """The cheap scores by the models before and after training; what needs no model, once."""
    scores: list[DataScore] = []
    highest_cost: dict[str, float] = {}
    for checkpoint in config.audit.checkpoints:
        params = {"start": uniform_training.start.params, "end": uniform_training.trajectory.end.params}[checkpoint]
        for name in names:
            if name == "random" and scores and checkpoint != config.audit.checkpoints[0]:
                continue  # it reads no model
            if name == "alignment" and checkpoint == "end" and name in config.audit.estimators:
                continue  # it is there, with hypergradients of every query
            session.set_phase(f"scoring: {name} at the {checkpoint}")
            title, column, model = (
                (f"{name}, {checkpoint}", f"{name}_{checkpoint}", checkpoint) if name != "random" else (name, name, "")
            )
            raw_scores = load_or_compute_score(column, name, task, params, config.scores, session)
            steps, train_seconds = (task.num_steps, uniform_training.seconds) if model == "end" else (0, 0.0)
            # what a run makes once for both models (the holdout model of `reducible`) is a cost of either
            highest_cost[name] = max(raw_scores.passes, highest_cost.get(name, 0.0))
            cost = (highest_cost[name] + steps, raw_scores.seconds + train_seconds)
            # a row without a score is neither good nor bad
            values = np.where(np.isnan(raw_scores.values), np.nanmean(raw_scores.values), raw_scores.values)
            scores.append(DataScore(title, model, values, None, *cost, raw_scores.notes))
            session.print_line(_format_score(scores[-1]))
    return scores


def certify_exact(
    config: AuditConfig,
    task: Task,
    uniform_training: UniformTraining,
    estimate_scores: list[DataScore],
    exact_record: dict[str, Any],
    session: Session,
) -> certify.Certificates | None:
    """What was checked of the exact hypergradients; None without them or without certificates."""
    if not exact_record or not config.certify.enabled:
        return None
    slopes = next(-score.values for score in estimate_scores if score.name == EXACT_ESTIMATOR)
    point = GradientPoint(
        "uniform weights",
        np.ones(task.num_examples),
        slopes,
        exact_record["value"],
        Checks(**exact_record["checks"]),
        start_seed=config.train.seed,
        order_seed=config.data.seed,
        data_seed=config.data.seed,
    )
    certificates = compute_certificates(task, uniform_training.trainer, session, config.certify, point)
    return certificates._replace(reliability=exact_record["reliability"])


def correlate_with_difficulty(
    task: Task, uniform_training: UniformTraining, scores: list[DataScore], session: Session
) -> dict[str, dict[str, Any]]:
    """By score: rank correlations with length and with loss before training, and a sentence where one is large."""

    def correlate() -> dict[str, dict[str, Any]]:
        difficulty = measure_difficulty(task, uniform_training.start.params)
        return {
            score.name: difficulty.correlate(score.values).to_json(f"the scores of {score.name}") for score in scores
        }

    return session.run_once("difficulty", correlate)


def add_retrains(
    certificates: certify.Certificates,
    task: Task,
    uniform_training: UniformTraining,
    retrain_losses: LeaveOutRetrains,
    exact: Float[np.ndarray, "examples"],
    validation_loss: float,
) -> certify.Certificates:
    """The certificates with what the retrains say of L_v and, where there are such, of examples outside validation."""
    own = retrains.predict_removals(retrain_losses, exact, "validation", validation_loss)
    part = retrains.independent_part(retrain_losses.losses)
    if part is None:
        return certificates._replace(removal_prediction=own)
    params = uniform_training.trajectory.end.params
    loss = float(
        validation_loss_fn(task.problem)(
            params, task.frozen(uniform_training.start.params), task.held_out_streams[part]
        )
    )
    return certificates._replace(
        removal_prediction=own,
        others_prediction=retrains.predict_removals(retrain_losses, exact, part, loss),
        others_part=part,
    )


def add_estimate_columns(task: Task, scores: list[DataScore], folder: Path) -> pa.Table:
    """scores.parquet with the estimates as columns next to the cheap scores."""
    path, rows = folder / SCORES_FILE, task.trainable_indices()
    ids = pa.table({"id": [task.examples[row].id for row in rows]})
    table = run_dir.read_parquet(path) if distributed.is_there(path) else ids
    metadata = dict(table.schema.metadata or {})
    for score in scores:
        if score.name in table.column_names:  # of a run that was stopped after it wrote them
            table = table.drop_columns([score.name])
        meaning = f"-dL_v/dweight by {score.name}, {task.outer_objective.unit} per unit of weight; larger is better"
        metadata[score.name.encode()] = json.dumps({"meaning": meaning, "passes": score.passes}).encode()
        table = table.append_column(score.name, pa.array(score.values[rows].astype(float)))
    return table.replace_schema_metadata(metadata)


# ---- parts


def _estimate_once(
    session: Session, name: str, estimate: Callable[[list[Stream]], Estimate], streams: list[Stream]
) -> tuple[Float[np.ndarray, "streams rows"], dict[str, Any]]:
    """(-dL/dw for each stream, what it cost and its checks): computed now, or read where an earlier run left it."""
    path = session.folder / "parts" / f"{name}.npy"

    def make() -> dict[str, Any]:
        before, began = session.work_done, time.monotonic()
        result = estimate(streams)
        check_hypergradient_finite(result, name)
        run_dir.write_arrays(path, -fetch_to_host(result.grad))
        first_checks = {key: np.ravel(value)[0].item() for key, value in result.checks._asdict().items()}
        checks = {key: value for key, value in first_checks.items() if not math.isnan(value)}
        value = float(np.ravel(result.validation_loss)[0])
        return {
            "passes": session.work_done - before,
            "seconds": time.monotonic() - began,
            "value": value,
            "checks": checks,
        }

    record = session.run_once(f"entries/{name}", make, path.exists())
    return run_dir.read_arrays(path), record


def _format_score(score: DataScore) -> str:
    return f"{score.name:<20}{score.passes:>9,.0f} passes   {score.seconds:,.0f} s"
