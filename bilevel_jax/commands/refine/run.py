"""The `refine` command, which retrains the model on its own responses."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bilevel_jax.commands.refine import artifacts, candidates, report
from bilevel_jax.commands.refine.candidates import (
    ESTIMANDS,
    WEIGHT_LEARNING_METHODS,
    Candidate,
    CandidateTrainer,
    candidate_outer,
)
from bilevel_jax.commands.refine.generator import Generator, prepare_generator, write_generator
from bilevel_jax.commands.refine.reinforce import (
    ReinforcedRound,
    check_round_fits,
    count_reinforce_work,
    describe_generator,
    reinforce_round,
)
from bilevel_jax.commands.refine.rewards import rewards_folder
from bilevel_jax.commands.refine.rollouts import (
    Rollouts,
    RoundTask,
    average_question_weights,
    build_round_task,
    choose_questions,
    collect_rollouts,
    count_round_rows,
    mean_verifier_score,
)
from bilevel_jax.commands.refine.scored import (
    check_scores,
    count_scoring_work,
    describe_scores,
    rescore_responses,
    score_rows,
    scores_folder,
)
from bilevel_jax.core import certify
from bilevel_jax.core.training import trajectory_from_params
from bilevel_jax.core.types import Params, PyTree, TrainState
from bilevel_jax.lm.inference.generate import GenerateFn
from bilevel_jax.lm.losses.sft import assemble_params
from bilevel_jax.runs.budget.work import count_candidate_work
from bilevel_jax.runs.config.load import RefineConfig, config_hash
from bilevel_jax.runs.config.rules import reads_parameters_alone, trains_generator, weighs_by_scores
from bilevel_jax.runs.config.schema import RefineMethod
from bilevel_jax.runs.engine.artifacts import write_model
from bilevel_jax.runs.engine.folds import take_turn
from bilevel_jax.runs.engine.reliability import RoundSizes
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.evaluation.measures import Evaluation
from bilevel_jax.runs.evaluation.run_models import RunModel, compare_run_models, prepare_run_evaluation
from bilevel_jax.runs.infra import checkpoint, distributed, run_dir
from bilevel_jax.runs.infra.placement import replicate
from bilevel_jax.runs.infra.session import Session, open_run_dir, start_session
from bilevel_jax.runs.scoring import verifiers
from bilevel_jax.runs.scoring.generation import make_generator_factory, make_task_prompts
from bilevel_jax.runs.scoring.likelihoods import count_ica_work, fingerprint_params
from bilevel_jax.runs.scoring.online import fill_missing_scores
from bilevel_jax.runs.scoring.pooling import describe_fallback, pools_steps
from bilevel_jax.runs.scoring.verifiers import Verifier
from bilevel_jax.runs.stats import bootstrap_paired_gain
from bilevel_jax.runs.tasks import splits
from bilevel_jax.runs.tasks.builtin import resolve_builtin
from bilevel_jax.runs.tasks.evaluation import (
    count_examples,
    evaluate_per_example,
    has_target_readings,
    held_out_indices,
    read_targets,
    rows_by_target,
)
from bilevel_jax.runs.tasks.text import TextTask, prepare_text_task


class RefineState(NamedTuple):
    """What a round leaves to the next."""

    params: Params
    """Of the present model: the last that was accepted."""
    weights: Float[Array, "questions"]
    """The last weight of each question; at the start 1, or of dynamic `estimate_initial_weights`, of any scale."""
    generator: TrainState | None = None
    """Of the generator that is trained; None where the present model answers."""
    student: Params | None = None
    """Of the last round's student, where the next one goes on from it."""


class RefineContext(NamedTuple):
    """What all rounds share."""

    config: RefineConfig
    task: TextTask
    """Of the offline examples."""
    trainers: dict[RefineMethod, CandidateTrainer]
    make_generator: Callable[[Params], GenerateFn]
    """parameters -> the generator of the model with them."""
    verifier: Verifier | None
    session: Session
    evaluation: Evaluation | None
    """What the first and the last model are asked, with evaluate.prompts."""
    generator: Generator | None = None
    """What answers and is trained, with refine.generator = reinforce."""


def refine(config: RefineConfig) -> dict[str, Any]:
    """Run the command in `config.output.dir` and return what result.json holds.

    Raises as `select` does, and ValueError without validation or dev, and for questions that are too long.
    """
    with open_run_dir(config) as folder:
        refine_config = resolve_builtin(config, folder)
        task = prepare_refine_task(refine_config, folder)
        verifier = (
            verifiers.make_verifier(refine_config.verifier, list_verified_examples(refine_config, task))
            if refine_config.verifier.name
            else None
        )
        evaluation = prepare_run_evaluation(refine_config, refine_config.evaluate.prompts, task)
        with start_session(config, folder) as session:
            trainers = candidates.make_candidate_trainers(refine_config, task)
            generator = prepare_generator(refine_config, task) if trains_generator(refine_config) else None
            decoder, base = (generator or task).decoder, (generator or task).base_params
            generator_factory = make_generator_factory(
                refine_config.generate, decoder, task.tokenizer, task.mesh, session
            )
            context = RefineContext(
                refine_config,
                task,
                trainers,
                lambda params: generator_factory(assemble_params(params, base)),
                verifier,
                session,
                evaluation,
                generator,
            )
            return _run_rounds(context, config)


def prepare_refine_task(config: RefineConfig, folder: Path) -> TextTask:
    """The task of the offline examples, in a shape that holds every response.

    Raises ValueError where a part of the validation examples is missing, or a question leaves no room for a response.
    """
    dataset = splits.load_splits(config.data)
    task = prepare_text_task(
        config,
        dataset,
        folder,
        num_steps=config.train.max_steps,
        seeds=[config.data.seed],
        target=config.target,
    )
    if reads_parameters_alone(config):
        task = judge_every_part(task)
    if missing := [part for part in ("validation", "dev") if part not in task.held_out_streams]:
        raise ValueError(
            f"no rows for {' and '.join(f'{part}' for part in missing)}: candidates are trained by validation and "
            "judged on dev. Give data.validation with shares for both in data.split, or data.dev."
        )
    pools_steps(task, config.outer)  # an error before any work where outer.estimate wants what cannot be
    take_turn(task, config.outer.validation_folds, config.data.seed, 0)  # and where there are more folds than examples
    question_examples = [task.examples[row] for row in task.trainable_indices()] + list_test_questions(task)
    questions = make_task_prompts(task, config.data, question_examples)
    longest = max((len(prompt.tokens) for prompt in questions), default=0) + config.generate.max_new_tokens
    if longest > task.architecture.max_length:
        raise ValueError(
            f"the longest question has {longest - config.generate.max_new_tokens} tokens; with "
            f"generate.max_new_tokens = {config.generate.max_new_tokens} that is more than the model's "
            f"{task.architecture.max_length}. Lower generate.max_new_tokens, or shorten the question."
        )
    if trains_generator(config):
        check_round_fits(config, len(task.trainable_indices()))
    if weighs_by_scores(config):
        trained = [len(prompt.tokens) for prompt in questions[: len(task.trainable_indices())]]
        responded = max(trained) + config.generate.max_new_tokens if config.refine.questions != "none" else 0
        check_scores(config, task, max(responded, int(task.corpus.lengths[task.trainable_indices()].max())))
    places = -(-(longest - 1) // 8) * 8 if config.refine.questions != "none" else 0
    task = candidates.attach_compiled_functions(config, task)
    return task._replace(layout=task.layout._replace(length=max(places, task.layout.length)))


def judge_every_part(task: TextTask) -> TextTask:
    """The task of a target that reads the parameters alone: dev and test are what validation is, as it has no examples
    and so no sampling error."""
    streams, examples = task.held_out_streams, task.held_out_examples
    parts = ("validation", "dev", "test")
    return task._replace(
        held_out_streams=dict.fromkeys(parts, streams["validation"]),
        held_out_examples=dict.fromkeys(parts, examples["validation"]),
        target_corpora=dict.fromkeys(parts, task.target_corpora["validation"]),
    )


def list_verified_examples(config: RefineConfig, task: TextTask) -> list[Any]:
    """The examples whose responses a verifier will see."""
    offline = [] if config.refine.questions == "none" else [task.examples[row] for row in task.trainable_indices()]
    return offline + list_test_questions(task)


def list_test_questions(task: TextTask) -> list[Any]:
    """The test examples that ask something: a target that reads the parameters alone has none."""
    return [example for example in task.held_out_examples.get("test", []) if example.turns]


def _run_rounds(context: RefineContext, config: RefineConfig) -> dict[str, Any]:
    task, session, refine_config = context.task, context.session, context.config
    for note in task.notes:
        session.print_line(note)
    if fallback := describe_fallback(task, refine_config.outer):
        session.print_line(fallback)
    session.set_phase("starting", total=count_rounds_work(refine_config, task))
    folder = session.folder / "checkpoints" / "rounds"
    start = task.init_params(refine_config.train.seed)
    state, records = _init_state(context, start), []
    if restored := checkpoint.restore_checkpoint(folder, state):
        state, records = restored.tree, restored.meta["records"]
        session.restore_work(sum(record["work"] for record in records) + session.job_cost(INITIAL_SCORES_JOB)[0])
    elif refine_config.refine.questions == "dynamic":
        state = state._replace(weights=estimate_initial_weights(context, start))
    for number in range(len(records)):
        _remove_candidates(context, number)  # a kill may have come before it
    for number in range(len(records), refine_config.refine.rounds):
        state, record = run_round(context, state, number, is_fitted=follows_validation(refine_config, records))
        records.append(record)
        session.log.write(
            {"event": "round", "step": number, **{key: record[key] for key in LOGGED_KEYS if key in record}}
        )
        session.print_line(_format_round(record))
        checkpoint.save_checkpoint(folder, number, state, {"records": records})
        _remove_candidates(context, number)
        session.mark_saved()
    session.set_phase("reading test")
    ends = {"first": start, "last": state.params}
    final_evaluation = session.run_once("test", lambda: evaluate_final(context, ends))
    session.set_phase("writing")
    distributed.run_on_first_process(lambda: checkpoint.keep_last_checkpoints(session.folder))
    write_model(session.folder / "model", task, state.params, base_path=refine_config.model.name_or_path)
    if context.generator and state.generator:
        write_generator(session.folder / "generator", context.generator, task, refine_config, state.generator.params)
    artifacts.write_round_tables(session, records, config_hash(config))
    evaluated = evaluate_ends(context, start, state.params) if context.evaluation else None
    learns_weights = not {*WEIGHT_LEARNING_METHODS}.isdisjoint(refine_config.refine.methods)
    moved_by = "reward" if context.generator and not learns_weights else "weight"
    result = {
        "records": records,
        "accepted": sum(record["accepted"] for record in records),
        "test": final_evaluation,
        "evaluate": evaluated,
        "unit": task.outer_objective.unit,
        "estimands": {name: ESTIMANDS[name] for name in refine_config.refine.methods},
        "looks": count_dev_tests(refine_config),
        "rows": {
            "train": task.num_examples,
            **count_examples(task),
        },
        "checker": refine_config.verifier.name,
        "examples": artifacts.pick_extreme_responses(session, task, records),
        "moved": artifacts.average_weights_by_kind(session, records, moved_by),
        "moved_by": moved_by,
        "generator": describe_generator(refine_config, records) if context.generator else None,
        "notes": task.notes,
        "seconds": session.job_cost("")[1],
        "config_hash": config_hash(config),
    }
    result["sentence"] = report.summarize_refinement(result)
    run_dir.write_result(session.folder, result)
    distributed.run_on_first_process(lambda: report.write_refine_report(session.folder))
    return result


# ---- a round


def follows_validation(config: RefineConfig, records: list[dict[str, Any]]) -> bool:
    """Whether validation had a say before the next round: it chose the questions, trained the present model, or the
    generator."""
    is_trained_by_it = any(record["accepted"] and record["best"] != "uniform" for record in records)
    return config.refine.questions == "dynamic" or is_trained_by_it or (trains_generator(config) and bool(records))


def count_rounds_work(config: RefineConfig, task: TextTask) -> float:
    """The most that the candidates of all rounds cost, in training steps."""
    num_judges, num_dev = (len(held_out_indices(task.held_out_streams[part])) for part in ("validation", "dev"))
    if config.outer.validation_folds:
        num_judges = math.ceil(num_judges / config.outer.validation_folds)
    sizes = RoundSizes(num_judges, num_dev)
    num_rows = count_round_rows(config, len(task.trainable_indices()))
    pooled_epoch = math.ceil(num_rows / task.batch_size) if pools_steps(task, config.outer) else None

    def count_round(*, is_fitted: bool) -> float:
        candidate_work = sum(
            count_candidate_work(
                name,
                candidates.candidate_outer(config.outer, name),
                config.single_loop,
                config.train.max_steps,
                sizes,
                is_fitted=is_fitted,
                num_targets=len(task.outer_objective.targets),
                pooled_epoch=pooled_epoch,
            )
            for name in config.refine.methods
        )
        return candidate_work + count_reinforce_work(config, len(task.trainable_indices()), sizes, is_fitted=is_fitted)

    later = (config.refine.rounds - 1) * count_round(is_fitted=True)
    work = count_round(is_fitted=follows_validation(config, [])) + later
    if weighs_by_scores(config):
        work += config.refine.rounds * count_scoring_work(config, task)
    if starts_by_scores(config):
        work += count_ica_work(config.scores, task, len(task.trainable_indices()))
    return work


def run_round(
    context: RefineContext, state: RefineState, number: int, *, is_fitted: bool
) -> tuple[RefineState, dict[str, Any]]:
    """Choose questions, answer them with the present model, train every candidate, test the best one.

    `is_fitted` is that of `RoundTask`.
    """
    config, offline_task, session = context.config, context.task, context.session
    began, before = time.monotonic(), session.work_done
    sampler_params, base_params = state.params, offline_task.base_params
    if context.generator and state.generator:
        sampler_params, base_params = state.generator.params, context.generator.base_params
    model_fingerprint = fingerprint_params(assemble_params(sampler_params, base_params))
    question_rows = choose_questions(
        config, offline_task.trainable_indices(), distributed.fetch_from_first(state.weights), number
    )
    session.set_phase(f"round {number}: responses")
    round_rollouts = collect_rollouts(
        config,
        offline_task,
        question_rows,
        number,
        artifacts.responses_path(session, number),
        context.make_generator(sampler_params),
        model_fingerprint,
        context.verifier,
    )
    writing_seconds = time.monotonic() - began
    round_task = build_round_task(config, offline_task, round_rollouts, number)
    start_params = {"accepted": state.params, "last": state.student}.get(config.refine.start_from)
    if start_params is None:
        start_params = offline_task.init_params(config.train.seed)
    round_task = round_task._replace(
        task=round_task.task._replace(init_params=lambda seed: start_params), is_fitted=is_fitted
    )

    if weighs_by_scores(config):
        session.set_phase(f"round {number}: scores")
        round_task = round_task._replace(scores=score_rows(config, round_task.task, start_params, session, number))
    reinforced = None
    if context.generator and state.generator:
        reinforced = reinforce_round(
            config, context.generator, state.generator, round_task, round_rollouts, start_params, session, number
        )
    present = compute_dev_losses(offline_task, state.params)
    trained = train_candidates(context, round_task, sampler_params, number, reinforced)
    best, *others = sorted(trained.models, key=lambda name: trained.dev_losses[name].mean())
    gain, bound = bootstrap_paired_gain(
        present,
        trained.dev_losses[best],
        significance_level(config),
        (config.data.seed, 13, number),
        [len(rows) for rows in rows_by_target(offline_task, "dev")],
    )
    accepted = bound > 0
    judge = next((name for name in (best, *others) if name in WEIGHT_LEARNING_METHODS), None)
    weights = trained.models[judge].weights if judge else np.ones(len(round_task.multiplicity))
    run_dir.write_parquet(
        artifacts.weights_path(session, number),
        artifacts.build_round_weights_table(
            offline_task,
            round_task,
            weights,
            judge,
            number,
            reinforced.rewards.responses if reinforced else None,
        ),
    )
    score_record = describe_scores(config, round_task, session, number) if round_task.scores else None
    if score_record and accepted and config.refine.start_from == "accepted":
        score_record["responses"] = rescore_responses(config, round_task, trained.models[best].params, session, number)
    record = {
        "step": number,
        "model": model_fingerprint,
        "questions": len(question_rows),
        **_summarize_rollouts(round_rollouts),
        "present": float(present.mean()),
        "candidates": trained.records,
        **(
            {"generator": reinforced.record | {"dev_loss": float(trained.dev_losses["uniform"].mean())}}
            if reinforced
            else {}
        ),
        **({"scores": score_record} if score_record else {}),
        "best": best,
        "gain": gain._asdict(),
        "bound": bound,
        "accepted": bool(accepted),
        "judge": judge,
        "ess": certify.effective_share(weights, round_task.multiplicity) * float((round_task.multiplicity > 0).sum()),
        "seconds_writing": writing_seconds,
        "work": session.work_done - before,
        "seconds": time.monotonic() - began,
    }
    state = state._replace(params=trained.models[best].params if accepted else state.params)
    if reinforced:
        student = None if state.student is None else reinforced.student.params
        state = state._replace(generator=reinforced.state, student=student)
    if judge is None:
        return state, record
    question_weights = average_question_weights(round_task, weights, offline_task.num_examples)
    placed_weights = replicate(offline_task.mesh, jnp.asarray(question_weights, state.weights.dtype))
    return state._replace(weights=placed_weights), record


def _init_state(context: RefineContext, start: Params) -> RefineState:
    """What the first round begins with."""
    return RefineState(
        start,
        replicate(context.task.mesh, jnp.ones(context.task.num_examples)),
        context.generator.init_state(context.task) if context.generator else None,
        start if context.config.refine.start_from == "last" else None,
    )


def _summarize_rollouts(rollouts: Rollouts) -> dict[str, Any]:
    return {
        "responses": len(rollouts.texts),
        "ended": float(np.mean(rollouts.ended)) if rollouts.ended else None,
        "tokens": int(sum(len(response_tokens) for response_tokens in rollouts.tokens)),
        "right": mean_verifier_score(rollouts.verifier_scores),
    }


class TrainedCandidates(NamedTuple):
    """The candidates of a round by method."""

    models: dict[str, Candidate]
    dev_losses: dict[str, Float[np.ndarray, "dev"]]
    records: list[dict[str, Any]]
    """Name, mean dev loss, work and seconds of each; with hypergradients their reliability."""


def train_candidates(
    context: RefineContext,
    round_task: RoundTask,
    sampler_params: Params,
    number: int,
    reinforced: ReinforcedRound | None = None,
) -> TrainedCandidates:
    """Train the candidate of every method in refine.methods but that which gave the rewards, and evaluate it on dev.

    The cost of the scores is that of the candidate which is weighted by them.
    """
    trained = TrainedCandidates({}, {}, [])
    for name in context.config.refine.methods:
        context.session.set_phase(f"round {number}: {name}")
        if reinforced and name == "uniform":
            candidate, measured = reinforced.student, reinforced.rewards.cost
        else:
            candidate, measured = train_candidate(context, round_task, sampler_params, number, name)
        if round_task.scores and name == "ica":
            facts = round_task.scores.facts
            measured |= {key: measured[key] + facts[key] for key in ("work", "seconds")}
        dev_losses = compute_dev_losses(context.task, candidate.params)
        trained.models[name], trained.dev_losses[name] = candidate, dev_losses
        trained.records.append({"name": name, "dev": float(dev_losses.mean()), **measured})
    return trained


def estimate_initial_weights(context: RefineContext, params: Params) -> Float[Array, "questions"]:
    """What takes the place of weights before any were learned: -d L_v / d w_i of one step at the given model, its sign.

    <grad l_i, grad L_v> / rows: below 0 where training on the offline row raises validation loss, to first order. Where
    no method but ica weighs examples, their scores.
    """
    if starts_by_scores(context.config):
        context.session.set_phase("scores of the offline examples")
        scores = score_rows(context.config, context.task, params, context.session, 0, "offline scores")
        filled = jnp.asarray(fill_missing_scores(scores.values), jnp.result_type(float))
        return replicate(context.task.mesh, filled)
    functions = candidates.compiled_functions_for_config(context.config, context.task)
    task = context.task._replace(problem=functions.plain_problem, train_step=functions.plain_step)
    context.session.set_phase("alignment of the offline examples")
    trainer = Trainer(task, candidate_outer(context.config.outer, "unrolled"), context.session)
    weights = replicate(task.mesh, jnp.ones(task.num_examples))
    return -trainer.estimate_at_end(trajectory_from_params(params), weights, alignment=True).grad


INITIAL_SCORES_JOB = "round 0/offline scores"
"""The job of `score_rows` that `estimate_initial_weights` makes."""


def starts_by_scores(config: RefineConfig) -> bool:
    """Whether the first questions are those of the least scores."""
    weighing = {*WEIGHT_LEARNING_METHODS} & {*config.refine.methods}
    return config.refine.questions == "dynamic" and weighing == {"ica"}


def train_candidate(
    context: RefineContext, round_task: RoundTask, sampler_params: Params, number: int, name: RefineMethod
) -> tuple[Candidate, dict[str, Any]]:
    """A candidate, trained now or read where a stopped run left it, and what its round's record says of it beside its
    name and dev loss."""
    session = context.session
    candidate_session = session.part_session(_candidate_folder(session, number, name).name)
    end = candidate_session.folder / "checkpoints" / "end"
    ones = replicate(round_task.task.mesh, jnp.ones(round_task.task.num_examples))
    structure = (round_task.task.init_params(0), ones)

    def train() -> tuple[PyTree, dict[str, Any]]:
        candidate = context.trainers[name](round_task, sampler_params, candidate_session, number)
        arrays = (candidate.params, jnp.asarray(candidate.weights, ones.dtype))
        facts = {"reliability": candidate.reliability, "validation_weight": candidate.validation_weight}
        return arrays, {name: value for name, value in facts.items() if value is not None}

    (params, weights), record = artifacts.run_saved_job(session, number, name, end, structure, train)
    return Candidate(params, distributed.fetch_from_first(weights)), record


def count_dev_tests(config: RefineConfig) -> int:
    """How often dev is asked whether a candidate is better: once for each candidate of each round."""
    return config.refine.rounds * len(config.refine.methods)


def significance_level(config: RefineConfig) -> float:
    """The level of one test. Corrected, that of the run over the looks (Bonferroni): all of them together keep it.

    The best of several candidates is tested, which is as if each had been; later rounds look again.
    """
    return config.refine.level / (count_dev_tests(config) if config.refine.bonferroni else 1)


def compute_dev_losses(task: TextTask, params: Params) -> Float[np.ndarray, "dev"]:
    """The loss of each row of dev, nats."""
    return compute_part_losses(task, params, "dev")


def compute_part_losses(task: TextTask, params: Params, part: str) -> Float[np.ndarray, "part"]:
    """The loss of each example of a part that is not too long, nats, the same numbers in every process;
    FloatingPointError where one is not finite."""
    stream, count = task.held_out_streams[part], len(task.held_out_examples[part])
    values = evaluate_per_example(task.outer_objective.losses, params, task.frozen(params), stream, count)
    values = distributed.fetch_from_first(values[held_out_indices(stream)])
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"the loss of a row of {part} is not finite. Lower optimizer.learning_rate, or set optimizer.max_grad_norm."
        )
    return values


# ---- the end


def evaluate_final(context: RefineContext, ends: dict[str, Params]) -> dict[str, Any] | None:
    """test loss before and after all rounds, and, with a verifier, how many answers are right: read once."""
    if "test" not in context.task.held_out_streams:
        return None
    before, after = (compute_part_losses(context.task, params, "test") for params in ends.values())
    groups = [len(rows) for rows in rows_by_target(context.task, "test")]
    gain, _ = bootstrap_paired_gain(before, after, 0.025, (context.config.data.seed, 17), groups)
    is_verified = context.verifier and list_test_questions(context.task)
    accuracy = [verify_greedy_answers(context, params) for params in ends.values()] if is_verified else None
    right = None
    if accuracy:
        difference, _ = bootstrap_paired_gain(accuracy[1], accuracy[0], 0.025, (context.config.data.seed, 19))
        right = {"first": float(accuracy[0].mean()), "last": float(accuracy[1].mean()), "gain": difference._asdict()}
    task = context.task
    readings = {name: read_targets(task, params, task.frozen(params), "test") for name, params in ends.items()}
    return {
        "first": float(before.mean()),
        "last": float(after.mean()),
        "gain": gain._asdict(),
        "right": right,
        "targets": readings if has_target_readings(task) else None,
    }


def evaluate_ends(context: RefineContext, first: Params, last: Params) -> dict[str, Any]:
    """What result.json holds of the answers of the last accepted model beside those of the first."""
    assert context.evaluation is not None
    models = [
        RunModel("last", "the last accepted model", lambda: last),
        RunModel("first", "the first model", lambda: first),
    ]
    return compare_run_models(context.config, context.task, context.evaluation, models, context.session)


def verify_greedy_answers(context: RefineContext, params: Params) -> Float[np.ndarray, "test"]:
    """What the verifier says of the greedy answer to each question of test."""
    config, task = context.config, context.task
    greedy = replace(config.generate, temperature=0.0, top_k=0, top_p=1.0, num_generations=1)
    test_examples = list_test_questions(task)
    test_prompts = make_task_prompts(task, config.data, test_examples)
    generate = make_generator_factory(greedy, task.decoder, task.tokenizer, task.mesh, context.session)(
        assemble_params(params, task.base_params)
    )
    verifier, answers = context.verifier, [draws[0].text for draws in generate(test_prompts, [0])]
    assert verifier is not None
    scores = lambda: np.array([verifier(*pair) for pair in zip(test_examples, answers, strict=True)])  # noqa: E731
    return distributed.compute_on_first_process(scores, np.zeros(len(answers)))


LOGGED_KEYS = (
    "model",
    "questions",
    "responses",
    "right",
    "present",
    "candidates",
    "generator",
    "scores",
    "best",
    "gain",
    "bound",
    "accepted",
    "ess",
    "seconds",
)


def _remove_candidates(context: RefineContext, number: int) -> None:
    """Remove what the candidates of a round have saved, once the round itself is."""
    session = context.session

    def remove() -> None:
        for name in context.config.refine.methods:
            run_dir.remove_folder(_candidate_folder(session, number, name))
        run_dir.remove_folder(rewards_folder(session, number))
        run_dir.remove_folder(scores_folder(session, number))

    distributed.run_on_first_process(remove)


def _candidate_folder(session: Session, number: int, name: str) -> Path:
    return session.folder / "parts" / f"round {number} {name}"


def _format_round(record: dict[str, Any]) -> str:
    """One line for people."""
    gain = record["gain"]
    losses_text = "  ".join(f"{candidate['name']} {candidate['dev']:.4f}" for candidate in record["candidates"])
    right = "" if record["right"] is None else f"   {record['right']:.0%} of the responses right"
    reliability = "".join(f"   {words}" for words in map(report.format_reliability, record["candidates"]) if words)
    return (
        f"round {record['step']}   dev loss: present {record['present']:.4f}  {losses_text}   gain "
        f"{gain['value']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]   "
        f"{'ACCEPTED' if record['accepted'] else 'kept'}{right}{reliability}{report.format_generator(record)}"
        f"{report.format_drift(record)}"
    )
