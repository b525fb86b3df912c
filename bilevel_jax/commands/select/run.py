"""The `select` command, which learns a weight for every training example."""

from pathlib import Path
from typing import Any

import numpy as np

from bilevel_jax.commands.select import report
from bilevel_jax.core import certify
from bilevel_jax.core.types import Checks
from bilevel_jax.runs.budget import usage, work
from bilevel_jax.runs.config.load import SelectConfig, config_hash
from bilevel_jax.runs.config.schema import SINGLE_LOOP_METHODS
from bilevel_jax.runs.engine import artifacts
from bilevel_jax.runs.engine.certificates import compute_certificates
from bilevel_jax.runs.engine.outer_loop import LearnedWeights, data_order_seed, good_label_mask, run_outer_loop
from bilevel_jax.runs.engine.retrain import FIRST_RETRAIN_SEED, build_variants, retrain_all_variants
from bilevel_jax.runs.engine.selection import select_examples
from bilevel_jax.runs.engine.single_loop import SingleLoopResult, run_single_loop_with_baselines
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.infra import distributed, run_dir
from bilevel_jax.runs.infra.placement import place_table
from bilevel_jax.runs.infra.session import Session, open_run_dir, start_session
from bilevel_jax.runs.stats import auc
from bilevel_jax.runs.tasks import splits
from bilevel_jax.runs.tasks.builtin import resolve_builtin
from bilevel_jax.runs.tasks.text import TextTask, prepare_text_task

NO_CERTIFICATE_VERDICT = certify.Verdict(
    "UNDECIDED",
    "",
    "the method has no hypergradient, so nothing of it can be certified.",
    "Judge it by the comparison, beside outer.method: unrolled.",
)


def select(config: SelectConfig) -> dict[str, Any]:
    """Run the command in `config.output.folder` and return what result.json holds.

    Raises ValueError for input that cannot be used, FileExistsError for a folder that holds a run, FloatingPointError
    for a training that diverges, and `session.Interrupted` when asked to stop.
    """
    with open_run_dir(config) as folder:
        resolved = resolve_builtin(config, folder)
        dataset = splits.load_splits(resolved.data)
        if len(dataset.train) < 2:
            raise ValueError(f"{len(dataset.train)} training example; weights compare rows, so give at least 2.")
        seeds = [data_order_seed(config, step) for step in range(config.outer.steps + 1)]
        task = prepare_text_task(
            resolved,
            dataset,
            folder,
            num_steps=config.train.max_steps,
            seeds=seeds,
            proximal_strength=config.outer.proximal,
        )
        with start_session(config, folder) as session:
            return _run_selection(task, config, session, folder)


def _run_selection(task: TextTask, config: SelectConfig, session: Session, folder: Path) -> dict[str, Any]:
    for note in task.notes:
        session.print_line(note)
    session.set_phase("starting", total=sum(stage.work for stage in work.select_run_stages(task, config)))
    expected = usage.predict_usage(task, config, session)
    trainer = Trainer(task, config.outer, session)
    single_loop_result: SingleLoopResult | None = None
    if config.outer.method in SINGLE_LOOP_METHODS:
        learned, single_loop_result = run_single_loop_with_baselines(task, config, trainer, session)
        certificates_by_weights, verdicts = {}, {"uniform weights": NO_CERTIFICATE_VERDICT}
    else:
        learned = run_outer_loop(task, config, trainer, session)
        certificates_by_weights = _certify(task, config, trainer, session, learned)
        verdicts = {name: certify.judge_certificates(value) for name, value in certificates_by_weights.items()}

    sources = [example.source for example in task.examples]
    selected = select_examples(
        learned.weights, task.trainable_indices(), config.selection, sources=sources, seed=config.data.seed
    )
    subset = np.unique(selected)
    comparison = retrain_all_variants(
        task, config, trainer, session, build_variants(task, config, learned, subset, session)
    )
    session.set_phase("writing")
    run_dir.write_parquet(folder / "weights.parquet", artifacts.weights_table(task, config, learned, subset))
    run_dir.write_atomic(
        folder / "selected.jsonl", artifacts.format_selected_jsonl(task.examples, learned.weights, selected)
    )
    if not distributed.broadcast_from_first((folder / "model").exists()):
        params = _train_final_model(task, config, trainer, learned)
        artifacts.write_model(folder / "model", task, params, base_path=config.model.name_or_path)
    if single_loop_result is not None:
        artifacts.write_model(
            folder / "model-own", task, single_loop_result.params, base_path=config.model.name_or_path
        )

    # The thresholds were calibrated at uniform weights. At the learned ones the slope nears 0, and a ratio with it
    # tells less; that certificate is in the report, but is not the verdict.
    verdict = verdicts["uniform weights"]
    good = good_label_mask(task, config)
    result: dict[str, Any] = {
        "verdict": {**verdict._asdict(), "sentence": str(verdict)},
        "estimand": artifacts.describe_estimand(config),
        "unit": task.objective.loss_unit,
        "right": task.objective.accuracy_name,
        "certificates": {name: _certificates_to_dict(value) for name, value in certificates_by_weights.items()},
        "verdicts": {name: value._asdict() for name, value in verdicts.items()},
        "records": learned.records,
        "best": learned.best_step,
        "ended": learned.stop_reason,
        "auc": {
            "weights": auc(learned.weights, good),
            **({} if single_loop_result else {"first_hypergradient": auc(-learned.first_hypergradient, good)}),
            "alignment": auc(-learned.alignment, good),
            "low_loss": auc(-learned.losses, good),
        }
        if good is not None
        else None,
        "compare": comparison,
        "notes": task.notes,
        "rows": {
            "train": task.num_examples,
            **{part: len(examples) for part, examples in task.held_out_examples.items()},
        },
        "selected": len(selected),
        "work": {"outer": sum(record["work"] for record in learned.records)}
        | {name: session.job_cost(name)[0] for name in ("certify", "compare")},
        "seconds": {"outer": sum(record["seconds"] for record in learned.records)}
        | {name: session.job_cost(name)[1] for name in ("certify", "compare")},
        "config_hash": config_hash(config),
        "estimate": expected,
    }
    result["measured"] = usage.measure_usage(
        task, folder, training_steps=session.work_done, seconds=sum(result["seconds"].values()), timed_steps=sum(result["work"].values())
    )  # fmt: skip
    run_dir.write_json(folder / "result.json", result)
    distributed.run_on_first_process(lambda: report.write_select_report(folder, task.examples))
    return result


def _certify(
    task: TextTask, config: SelectConfig, trainer: Trainer, session: Session, learned: LearnedWeights
) -> dict[str, certify.Certificates]:
    """Certificates of the gradient at uniform weights and, where restarts are cold, at the learned weights."""
    points = {"uniform weights": (0, np.ones(task.num_examples), learned.first_hypergradient)}
    if config.outer.restart == "cold" and learned.best_step > 0:
        points["learned weights"] = (learned.best_step, learned.weights, learned.hypergradient)
    out = {}
    for name, (step, weights, hypergradients) in points.items():
        record = learned.records[step]
        checks = Checks(**{key: value for key, value in record["checks"].items() if value is not None})
        out[name] = compute_certificates(
            task, config, trainer, session, name=name, weights=weights.astype(hypergradients.dtype), hypergradient=hypergradients, step=step,
            validation_loss=record["loss"]["validation"], checks=checks,
        )  # fmt: skip
    return out


def _train_final_model(task: TextTask, config: SelectConfig, trainer: Trainer, learned: LearnedWeights) -> Any:
    """The model that is written: trained from cold with the learned weights, as the first seed of the comparison."""
    start = trainer.init_state(task.init_params(config.train.seed + FIRST_RETRAIN_SEED))
    stream = task.training_stream(config.data.seed + FIRST_RETRAIN_SEED, packed=False)
    return trainer.run(place_table(task.mesh, learned.weights), start, stream).end.params


def _certificates_to_dict(certified: certify.Certificates) -> dict[str, Any]:
    return {
        "exact": certified.finite_differences._asdict() if certified.finite_differences else None,
        "smooth": certified.metasmoothness,
        "predictive": certified.removal_prediction._asdict() if certified.removal_prediction else None,
        "checks": certified.checks._asdict(),
    }
