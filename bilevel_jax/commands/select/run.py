"""The `select` command, which learns a weight for every training example."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from bilevel_jax.commands.select import report
from bilevel_jax.commands.select.arms import build_arms
from bilevel_jax.commands.select.contradictions import apply_contradictions
from bilevel_jax.core import certify
from bilevel_jax.core.types import Params
from bilevel_jax.runs.budget import usage, work
from bilevel_jax.runs.config.load import SelectConfig, config_hash
from bilevel_jax.runs.config.schema import SINGLE_LOOP_METHODS
from bilevel_jax.runs.engine import artifacts, raters
from bilevel_jax.runs.engine.certificates import certificates_to_json, compute_certificates, point_of_step
from bilevel_jax.runs.engine.outer_loop import LearnedWeights, data_order_seed, run_outer_loop
from bilevel_jax.runs.engine.recommendation import NOT_COMPARED, recommend, recommend_nothing
from bilevel_jax.runs.engine.reliability import average_reliability_near
from bilevel_jax.runs.engine.retrain import FIRST_RETRAIN_SEED, Retrainer, retrain_variants
from bilevel_jax.runs.engine.selection import (
    check_strata,
    describe_shortfall,
    describe_strata,
    describe_ties,
    divide_by_difficulty,
    list_further_strata,
    select_examples,
)
from bilevel_jax.runs.engine.single_loop import SingleLoopResult, run_single_loop_with_baselines
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.evaluation.measures import Evaluation
from bilevel_jax.runs.evaluation.run_models import RunModel, compare_run_models, prepare_run_evaluation
from bilevel_jax.runs.infra import checkpoint, distributed, run_dir, seals
from bilevel_jax.runs.infra.placement import place_table
from bilevel_jax.runs.infra.session import Session, open_run_dir, start_session
from bilevel_jax.runs.scoring.difficulty import Difficulty, measure_difficulty_once
from bilevel_jax.runs.scoring.likelihoods import check_embeddings
from bilevel_jax.runs.tasks import splits
from bilevel_jax.runs.tasks.builtin import resolve_builtin
from bilevel_jax.runs.tasks.evaluation import (
    accuracy_name,
    count_examples,
    count_judging_examples,
    judges_by_examples,
    list_target_facts,
    read_labels,
    rows_by_target,
)
from bilevel_jax.runs.tasks.text import TextTask, prepare_text_task

NO_CERTIFICATE_VERDICT = certify.Verdict(
    "UNDECIDED",
    "",
    "the method has no hypergradient, so nothing of it can be certified.",
    "Judge it by the comparison, beside outer.method: unrolled.",
)


def select(config: SelectConfig) -> dict[str, Any]:
    """Run the command in `config.output.dir` and return what result.json holds.

    Raises ValueError for input that cannot be used, FileExistsError for a folder that holds a run, FloatingPointError
    for a training run that diverges, and `Interrupted` when asked to stop.
    """
    with open_run_dir(config) as folder:
        resolved = resolve_builtin(config, folder)
        dataset = splits.load_splits(resolved.data)
        if len(dataset.train) < 2:
            raise ValueError(f"{len(dataset.train)} training example; weights compare rows, so give at least 2.")
        check_embeddings(config.scores, dataset.train, dataset.held_out["validation"])
        seeds = [data_order_seed(config.data, config.outer, step) for step in range(config.outer.steps + 1)]
        task = prepare_text_task(
            resolved,
            dataset,
            folder,
            num_steps=config.train.max_steps,
            seeds=seeds,
            proximal_strength=config.outer.proximal,
            target=config.target,
        )
        check_strata(config.selection, len(task.trainable_indices()))
        evaluation = prepare_run_evaluation(config, resolved.evaluate.prompts, task)
        with start_session(config, folder) as session:
            return _run_selection(task, config, evaluation, session, folder)


def _run_selection(
    task: TextTask, config: SelectConfig, evaluation: Evaluation | None, session: Session, folder: Path
) -> dict[str, Any]:
    for note in task.notes:
        session.print_line(note)
    session.set_phase("starting", total=sum(stage.work for stage in work.select_run_stages(task, config)))
    expected = usage.predict_usage(task, config, session)
    contradictions = None
    if config.contradictions.draws:
        task, contradictions = apply_contradictions(task, config, session)
    trainer = Trainer(task, config.outer, session)
    learned, single_loop_result = _learn_weights(task, config, trainer, session)
    certificates_by_weights: dict[str, certify.Certificates] = {}
    verdicts = {"uniform weights": NO_CERTIFICATE_VERDICT}
    if single_loop_result is None:
        certificates_by_weights = _certify(task, config, trainer, session, learned)
        verdicts = {name: certify.judge_certificates(value) for name, value in certificates_by_weights.items()}
    verdict = _verdict_of_run(verdicts)

    sources = [example.source for example in task.examples]
    measured = measure_difficulty_once(task, lambda: task.init_params(config.train.seed), session)
    strata = divide_by_difficulty(measured, config.selection)
    selected = select_examples(
        learned.weights, task.trainable_indices(), config.selection, sources=sources, seed=config.data.seed,
        strata=strata,
    )  # fmt: skip
    ties = describe_ties(learned.weights, task.trainable_indices(), selected, config.selection, sources, strata)
    divided = describe_strata(strata, selected, config.selection)
    shortfall = describe_shortfall(config.selection, len(selected))
    selection_notes = [note for note in (ties, divided, shortfall) if note]
    for note in selection_notes:
        session.print_line(note)
    difficulty = session.run_once(
        "difficulty",
        lambda: measured.correlate(learned.weights).to_json("the weights", list_further_strata(config.selection)),
    )
    comparison = _compare_by_retraining(task, config, trainer, session, learned, np.unique(selected))
    session.set_phase("writing")
    distributed.run_on_first_process(lambda: checkpoint.keep_last_checkpoints(folder))
    params = _write_artifacts(task, config, trainer, learned, single_loop_result, selected, measured, session)
    evaluated = _evaluate_models(task, config, trainer, learned, params, evaluation, session) if evaluation else None
    rater = _write_rater(task, config, learned, folder)
    result = _build_result(task, config, session, learned, single_loop_result)
    result |= comparison
    result |= {
        "certificates": {name: certificates_to_json(value) for name, value in certificates_by_weights.items()},
        "verdicts": {name: value._asdict() for name, value in verdicts.items()},
        "verdict": {**verdict._asdict(), "sentence": _describe_verdicts(verdicts, difficulty["sentence"])},
        "difficulty": difficulty,
        "contradictions": contradictions,
        "judges": count_judging_examples(task),
        "rater": rater["coefficients"] if rater else None,
        "rater_intervals": rater["intervals"] if rater else None,
        "selected": len(selected),
        "evaluate": evaluated,
        "notes": [*task.notes, *selection_notes],
        "estimate": expected,
    }
    result["measured"] = usage.measure_usage(
        task,
        session,
        training_steps=session.work_done,
        seconds=sum(result["seconds"].values()),
        timed_steps=sum(result["work"].values()),
    )
    run_dir.write_result(folder, result)
    distributed.run_on_first_process(
        lambda: report.write_select_report(folder, task.examples, task.held_out_examples["validation"])
    )
    return result


def _learn_weights(
    task: TextTask, config: SelectConfig, trainer: Trainer, session: Session
) -> tuple[LearnedWeights, SingleLoopResult | None]:
    """The weights, and of a single-loop method its own model."""
    if config.outer.method in SINGLE_LOOP_METHODS:
        return run_single_loop_with_baselines(
            task,
            trainer,
            session,
            single_loop=config.single_loop,
            optimizer=config.optimizer,
            data=config.data,
            train=config.train,
        )
    learned = run_outer_loop(
        task,
        trainer,
        session,
        data=config.data,
        train_seed=config.train.seed,
        scores=config.scores,
        rater=config.rater,
        leave_out=True,
    )
    return learned, None


def _certify(
    task: TextTask, config: SelectConfig, trainer: Trainer, session: Session, learned: LearnedWeights
) -> dict[str, certify.Certificates]:
    """Certificates of the gradient at uniform weights and, where restarts are cold, at the learned weights."""
    steps = {"uniform weights": 0}
    if config.outer.restart == "cold" and learned.best_step > 0:
        steps["learned weights"] = learned.best_step
    out = {}
    for name, step in steps.items():
        point = point_of_step(
            task, learned, step, name, data=config.data, outer=config.outer, train_seed=config.train.seed
        )
        certificates = compute_certificates(task, trainer, session, config.certify, point)
        out[name] = certificates._replace(reliability=average_reliability_near(learned.records, step))
    return out


def _verdict_of_run(verdicts: dict[str, certify.Verdict]) -> certify.Verdict:
    """The verdict of the run: that of where the steps began.

    At the learned weights the slope nears 0, and a ratio with it tells less, so their verdict stands beside this one.
    """
    verdict = verdicts["uniform weights"]
    if "learned weights" not in verdicts:
        return verdict
    if not verdict.scope:
        return verdict._replace(reason=f"at uniform weights {verdict.reason}")
    return verdict._replace(scope=f"{verdict.scope} at uniform weights")


def _describe_verdicts(verdicts: dict[str, certify.Verdict], difficulty: str) -> str:
    """Lines for people: the verdict of the run, for this validation set and for others; that at the learned weights;
    and that these order the examples by length or loss, where they do."""
    lines = str(_verdict_of_run(verdicts)).splitlines()
    if learned := verdicts.get("learned weights"):
        lines.append(f"At the learned weights {' '.join(str(learned).splitlines())}")
    return "\n".join([*lines, *filter(None, [difficulty])])


def _compare_by_retraining(
    task: TextTask,
    config: SelectConfig,
    trainer: Trainer,
    session: Session,
    learned: LearnedWeights,
    selected_indices: Int[np.ndarray, "selected"],
) -> dict[str, Any]:
    """What result.json holds of the retrains: the lines of the table, and why an arm is not among them."""
    if not config.retrain.enabled:
        return {"compare": [], "absent_arms": [], "recommendation": recommend_nothing(NOT_COMPARED).to_json()}
    retrainer = Retrainer(task, trainer, session, "compare", train_seed=config.train.seed, data_seed=config.data.seed)
    arms = build_arms(config, task, retrainer, learned, selected_indices)
    for reason in arms.absent:
        session.print_line(f"not compared: {reason}.")
    lines, dev_losses = retrain_variants(task, retrainer, arms.variants, config.retrain.seeds)
    groups = [len(rows) for rows in rows_by_target(task, "dev")] if "dev" in task.held_out_streams else []
    reads_examples = judges_by_examples(task)
    if not reads_examples:  # whatever the part, the loss is that of the parameters
        dev_losses = {line["name"]: np.array([[run["validation"]] for run in line["runs"]]) for line in lines}
        groups = []
    recommendation = recommend(dev_losses, task.outer_objective.unit, groups, reads_examples=reads_examples)
    session.print_line(recommendation.sentence)
    return {"compare": lines, "absent_arms": arms.absent, "recommendation": recommendation.to_json()}


def _write_artifacts(
    task: TextTask,
    config: SelectConfig,
    trainer: Trainer,
    learned: LearnedWeights,
    single_loop_result: SingleLoopResult | None,
    selected: Int[np.ndarray, "selected"],
    measured: Difficulty,
    session: Session,
) -> Params | None:
    """Write weights.parquet, selected.jsonl, and the models; return the parameters of the model that is written, None
    where an earlier process has written it."""
    folder = session.folder
    table = artifacts.weights_table(
        task,
        learned,
        np.unique(selected),
        measured,
        estimand=artifacts.describe_estimand(config.outer, config.train.max_steps),
        param_dtype=config.model.param_dtype,
        product_precision=config.outer.product_precision,
        config_hash=config_hash(config),
    )
    run_dir.write_parquet(folder / "weights.parquet", table)
    run_dir.write_atomic(
        folder / "selected.jsonl", artifacts.format_selected_jsonl(task.examples, learned.weights, selected)
    )
    base_path, params = config.model.name_or_path, None
    if not distributed.broadcast_from_first(seals.is_noted_folder(folder / "model")):
        params = _train_final_model(task, config, trainer, _trained_weights(task, config, learned))
        artifacts.write_model(folder / "model", task, params, base_path=base_path)
    else:
        session.advance(task.num_steps)  # of the process that wrote it
    if single_loop_result is not None:
        artifacts.write_model(folder / "model-own", task, single_loop_result.params, base_path=base_path)
    return params


def _write_rater(task: TextTask, config: SelectConfig, learned: LearnedWeights, folder: Path) -> dict[str, Any] | None:
    """rater/, where the weights are a rater's; its coefficients with their intervals."""
    if learned.rater is None:
        return None
    return raters.write_rater(
        folder,
        learned.rater.features,
        learned.rater.variable,
        config.rater,
        data=config.data,
        model=resolve_builtin(config, folder).model,
        task=task,
        records=learned.records,
        best_step=learned.best_step,
        without_folds=learned.rater.without_folds,
    )


def _train_final_model(
    task: TextTask, config: SelectConfig, trainer: Trainer, weights: Float[np.ndarray, "trained"]
) -> Params:
    """A model trained from cold with some weights, as the first seed of the comparison: the learned ones' is written.

    With outer.validation_folds, on validation, too.
    """
    start = trainer.init_state(task.init_params(config.train.seed + FIRST_RETRAIN_SEED))
    indices = task.trainable_indices()
    if config.outer.validation_folds:
        indices = np.concatenate([indices, task.validation_indices()])
    stream = task.training_stream(config.data.seed + FIRST_RETRAIN_SEED, indices, packed=False)
    return trainer.run(place_table(task.mesh, weights), start, stream).end.params


def _trained_weights(task: TextTask, config: SelectConfig, learned: LearnedWeights) -> Float[np.ndarray, "trained"]:
    """The learned weights of all that the written model is trained on."""
    weights = learned.corpus_weights(task) if config.outer.validation_folds else learned.weights
    return weights.astype(learned.weights.dtype)


def _evaluate_models(
    task: TextTask,
    config: SelectConfig,
    trainer: Trainer,
    learned: LearnedWeights,
    params: Params | None,
    evaluation: Evaluation,
    session: Session,
) -> dict[str, Any]:
    """The model of the learned weights beside one of uniform weights, trained alike, and the one before training."""
    weights, seed = _trained_weights(task, config, learned), config.train.seed + FIRST_RETRAIN_SEED

    def train_learned() -> Params:
        return _train_final_model(task, config, trainer, weights) if params is None else params

    def train_uniform() -> Params:
        return _train_final_model(task, config, trainer, np.ones_like(weights))

    models = [
        RunModel("learned", "the model with learned weights", train_learned),
        RunModel("uniform", "the model with uniform weights", train_uniform),
        RunModel("before", "the model before training", lambda: task.init_params(seed)),
    ]
    return compare_run_models(config, task, evaluation, models, session)


def _build_result(
    task: TextTask,
    config: SelectConfig,
    session: Session,
    learned: LearnedWeights,
    single_loop_result: SingleLoopResult | None,
) -> dict[str, Any]:
    """What result.json holds of the loop, the data and the work; the certificates and the comparison come to it."""
    labels = read_labels(task, config.data)
    areas = None
    if labels is not None:
        areas = {"weights": labels.auc(learned.weights)}
        if single_loop_result is None:
            areas["first_hypergradient"] = labels.auc(-learned.first_hypergradient)
        areas |= {"alignment": labels.auc(-learned.alignment), "low_loss": labels.auc(-learned.losses)}
    jobs = ["certify", "compare"]
    jobs += ["folds"] * (config.rater.folds > 0) + ["contradictions"] * (config.contradictions.draws > 0)
    costs = {name: session.job_cost(name) for name in jobs}
    part_sizes = count_examples(task)
    return {
        "estimand": artifacts.describe_estimand(config.outer, config.train.max_steps),
        "unit": task.outer_objective.unit,
        "right": accuracy_name(task),
        "targets": list_target_facts(task),
        "records": learned.records,
        "best": learned.best_step,
        "validation_weight": learned.validation_weight if config.outer.validation_folds else None,
        "ended": learned.stop_reason,
        "auc": areas,
        "labels": labels.to_counts() if labels is not None else None,
        "rows": {"train": task.num_examples, **part_sizes},
        "work": {"outer": sum(record["work"] for record in learned.records)}
        | {name: steps for name, (steps, _) in costs.items()},
        "seconds": {"outer": sum(record["seconds"] for record in learned.records)}
        | {name: seconds for name, (_, seconds) in costs.items()},
        "config_hash": config_hash(config),
    }
