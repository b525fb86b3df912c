"""Answers of a run's own models to prompts, compared at its end."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from bilevel_jax.core.types import Params
from bilevel_jax.lm.data.examples import Example, format_count
from bilevel_jax.lm.losses.sft import assemble_params
from bilevel_jax.runs.config.load import CompareConfig, RefineConfig, SelectConfig, TrainConfig
from bilevel_jax.runs.evaluation import answers
from bilevel_jax.runs.evaluation.answers import ModelAnswers
from bilevel_jax.runs.evaluation.measures import Evaluation, measure, prepare_evaluation
from bilevel_jax.runs.evaluation.models import ROLES, Candidate, LocalModel, describe_templates
from bilevel_jax.runs.evaluation.questions import Question
from bilevel_jax.runs.evaluation.summary import RUN_FOLDER, make_judge, summarize, write_tables
from bilevel_jax.runs.infra import distributed
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.tasks.text import TextTask

OwnModelsConfig = SelectConfig | TrainConfig | RefineConfig | CompareConfig


class RunModel(NamedTuple):
    """A model of a run."""

    key: str
    """Names its jobs, and the folder of the comparison with it."""
    name: str
    """What reports call it."""
    load_params: Callable[[], Params]
    """Its trained parameters; called at most once, and not where its answers are stored."""


def prepare_run_evaluation(config: OwnModelsConfig, files: Sequence[str], task: TextTask) -> Evaluation | None:
    """The prompts of evaluate.prompts, of which `files` are the files, and the metrics; None without prompts.

    Raises as `prepare_evaluation`.
    """
    if not files:
        return None
    stand_ins = [make_run_candidate(task, RunModel(role, "the model", dict)) for role in ROLES]
    found = prepare_evaluation(config, files, lambda: stand_ins)
    trained = _describe_trained_prompts(task, found.questions)
    templates = describe_templates(stand_ins[:1], config.data.template)
    return found._replace(notes=[*found.notes, *trained, *templates])


def compare_run_models(
    config: OwnModelsConfig, task: TextTask, evaluation: Evaluation, run_models: Sequence[RunModel], session: Session
) -> dict[str, Any]:
    """Have the models answer, and compare the first with each of the others.

    Args:
        config: that of the run, with sections evaluate, generate, verifier and judge.
        task: the run's, whose decoder, tokenizer and mesh answer.
        evaluation: what is asked.
        run_models: the first is compared with the second, which decides, then with the others.
        session: the run's; answers and verdicts that it has stored are not asked for again.

    Returns:
        For result.json: `sentence` and `level` of the first comparison, and all `comparisons` by the key of the other
        model, each as result.json of `evaluate`. Their tables are written to evaluate/KEY in the run's folder.

    Raises:
        RuntimeError: the judge refuses or does not answer; what came before is stored.
    """
    for note in evaluation.notes:
        session.print_line(f"evaluate: {note}")
    all_answers = [
        answers.collect_answers(config, make_run_candidate(task, model), evaluation.questions, place, session)
        for place, model in enumerate(run_models)
    ]
    comparisons = {}
    for model, other in zip(run_models[1:], all_answers[1:], strict=True):
        pair = [put_in_role(role, one) for role, one in zip(ROLES, (all_answers[0], other), strict=True)]
        judge_client = make_judge(config, evaluation.metrics, session)  # counts what this comparison takes
        measures = measure(config, evaluation.metrics, evaluation.questions, pair, evaluation.verifier, judge_client)
        summary = summarize(config, evaluation.metrics, evaluation.questions, pair, measures, judge_client)
        notes = [note for one in pair for note in describe_run_answers(one, evaluation.questions)]
        jobs = [f"answers of the {run_models[0].key}", f"answers of the {model.key}"]
        seconds = {role: session.job_cost(job)[1] for role, job in zip(ROLES, jobs, strict=True)}
        comparisons[model.key] = summary | {
            "sentence": summary["sentence"][0].upper() + summary["sentence"][1:],
            "notes": [*evaluation.notes, *notes],
            "seconds": seconds,
        }
        folder = session.folder / RUN_FOLDER / model.key
        distributed.run_on_first_process(partial(folder.mkdir, parents=True, exist_ok=True))
        write_tables(folder, evaluation.metrics, evaluation.questions, pair, measures)
    first = next(iter(comparisons.values()))
    for line in [summary["sentence"] for summary in comparisons.values()] + first["remarks"]:
        session.print_line(f"evaluate: {line}")
    return {"sentence": first["sentence"], "level": first["level"], "comparisons": comparisons}


def make_run_candidate(task: TextTask, model: RunModel) -> Candidate:
    """A model of a run, as one that answers prompts."""

    def load_params() -> Params:
        return assemble_params(model.load_params(), task.base_params)

    local = LocalModel(task.tokenizer, task.architecture, task.decoder, task.mesh, load_params)
    return Candidate(model.key, model.name, None, local)


def put_in_role(role: str, model_answers: ModelAnswers) -> ModelAnswers:
    """The same answers as those of the model, or of the baseline, in a comparison."""
    return model_answers._replace(candidate=replace(model_answers.candidate, role=role))


def describe_run_answers(model_answers: ModelAnswers, questions: Sequence[Question]) -> list[str]:
    """What a person should know of the answers of a model of a run, in sentences."""
    return [*answers.describe_answers(model_answers), *answers.describe_left_out(model_answers, questions)]


def _describe_trained_prompts(task: TextTask, questions: Sequence[Question]) -> list[str]:
    """How many prompts training or validation examples begin with: their answers tell nothing of other prompts."""
    described = []
    for part, examples in {"training": task.examples, "validation": task.held_out_examples["validation"]}.items():
        known = {_prompt_of(example) for example in examples}
        if count := sum(_prompt_of(question.example) in known for question in questions):
            stand = format_count("prompt", count, ("also stands", "also stand"))
            described.append(
                f"WARNING: {stand} among the {part} examples, which the run has seen; what is better there may not be "
                "better elsewhere"
            )
    return described


def _prompt_of(example: Example) -> tuple[Any, ...]:
    return tuple((turn.role, " ".join(turn.content.split())) for turn in example.turns[:-1])
