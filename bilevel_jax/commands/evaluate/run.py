"""The `evaluate` command, which says whether a model answers better than another."""

import time
from typing import Any

from bilevel_jax.commands.evaluate import harness, report
from bilevel_jax.runs.config.load import EvaluateConfig, config_hash
from bilevel_jax.runs.evaluation import answers
from bilevel_jax.runs.evaluation.measures import Evaluation, measure, prepare_evaluation
from bilevel_jax.runs.evaluation.models import ROLES, describe_templates, open_candidates
from bilevel_jax.runs.evaluation.summary import make_judge, summarize, write_tables
from bilevel_jax.runs.infra import distributed, run_dir
from bilevel_jax.runs.infra.session import Session, open_run_dir, start_session


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run the command in `config.output.dir` and return what result.json holds.

    Raises ValueError for prompts, models, references or a judge's template that do not fit, with the place; and
    RuntimeError where a service refuses or does not answer: what it answered before is stored, and --resume goes on.
    """
    with open_run_dir(config) as folder:
        evaluation = prepare_evaluation(config, config.data.test, lambda: open_candidates(config))
        with start_session(config, folder) as session:
            return _run_evaluation(config, evaluation, session)


def _run_evaluation(config: EvaluateConfig, evaluation: Evaluation, session: Session) -> dict[str, Any]:
    questions, candidates, metrics, verifier, _ = evaluation
    notes = [*evaluation.notes, *describe_templates(candidates, config.data.template)]
    for note in notes:
        session.print_line(note)
    models = []
    for place, candidate in enumerate(candidates):
        began = time.monotonic()
        models.append(answers.collect_answers(config, candidate, questions, place, session))
        answers.check_any_answer(models[-1])
        _store_seconds(session, candidate.role, began)
        notes += [*answers.describe_answers(models[-1]), *answers.describe_left_out(models[-1], questions)]
    judge_client = make_judge(config, metrics, session)
    began = time.monotonic()
    measures = measure(config, metrics, questions, models, verifier, judge_client)
    _store_seconds(session, "judging", began)
    session.set_phase("writing")
    result = summarize(config, metrics, questions, models, measures, judge_client)
    commands, harness_notes = (
        harness.write_harness_task(session.folder, questions, candidates, config.generate, config.verifier)
        if config.evaluate.harness
        else ([], [])
    )
    result |= {
        "harness": commands,
        "notes": [*notes, *harness_notes],
        "seconds": {
            part: session.run_once(f"seconds: {part}", lambda: 0.0) for part in (*ROLES[: len(models)], "judging")
        },
        "config_hash": config_hash(config),
    }
    for line in [*result["remarks"], *commands]:
        session.print_line(line)
    write_tables(session.folder, metrics, questions, models, measures)
    run_dir.write_result(session.folder, result)
    distributed.run_on_first_process(lambda: report.write_evaluate_report(session.folder))
    return result


def _store_seconds(session: Session, part: str, began: float) -> None:
    """How long a part took; of one that was there already, as an earlier process measured it."""
    session.run_once(f"seconds: {part}", lambda: time.monotonic() - began)
