"""The `compare` command, which tests every method at one compute budget."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from bilevel_jax.commands.compare import report
from bilevel_jax.commands.compare.methods import METHODS, MethodResult, MethodSections
from bilevel_jax.commands.compare.report_mixtures import SHARE_OF
from bilevel_jax.core.types import Params
from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.core.weightings import effective_sample_size
from bilevel_jax.runs.budget.work import count_compare_work, sum_work
from bilevel_jax.runs.config.load import CompareConfig, config_hash
from bilevel_jax.runs.config.rules import reads_array_data
from bilevel_jax.runs.engine.arms import ArmInputs, build_simple_arm, make_variant, why_absent, with_source_baselines
from bilevel_jax.runs.engine.outer_loop import compute_baseline_scores
from bilevel_jax.runs.engine.retrain import Retrainer, RetrainVariant
from bilevel_jax.runs.engine.trainer import Trainer
from bilevel_jax.runs.evaluation.answers import ModelAnswers
from bilevel_jax.runs.evaluation.arms import collect_arm_answers, compare_arms
from bilevel_jax.runs.evaluation.measures import Evaluation
from bilevel_jax.runs.evaluation.run_models import prepare_run_evaluation
from bilevel_jax.runs.infra import distributed, run_dir
from bilevel_jax.runs.infra.distributed import fetch_to_host
from bilevel_jax.runs.infra.session import Session, open_run_dir, start_session
from bilevel_jax.runs.stats import mean_interval
from bilevel_jax.runs.tasks import splits
from bilevel_jax.runs.tasks.arrays import build_array_model, label_array_data, prepare_array_task, read_npz_dataset
from bilevel_jax.runs.tasks.builtin import resolve_builtin
from bilevel_jax.runs.tasks.evaluation import (
    accuracy,
    accuracy_name,
    count_examples,
    headline_part,
    is_validation_trainable,
    list_target_facts,
    read_labels,
)
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.sources import find_sources
from bilevel_jax.runs.tasks.splits import PART_NAMES
from bilevel_jax.runs.tasks.text import TextTask, prepare_text_task

RANKED_AFTER_UNIFORM = ("top_alignment", "low_loss", "low_loss_dev")
"""Baselines that a uniform training ranks."""
MAX_SOURCES = 20
"""Sources of a mixture that is shown."""
SEED_STRIDE = 1_000_000
"""Distance of the data seeds of two repetitions: further than any outer step or retrain goes."""


def compare(config: CompareConfig) -> dict[str, Any]:
    """Run the command in `config.output.dir` and return what result.json holds.

    Raises as `select` does, and ValueError where the budget is too small for a method to move a weight.
    """
    with open_run_dir(config) as folder:
        resolved = config if reads_array_data(config) else resolve_builtin(config, folder)
        build_task = make_task_builder(resolved, folder)
        first_task = build_task(0)
        _check_budget(config, first_task)
        evaluation = None
        if config.evaluate.prompts:
            assert isinstance(first_task, TextTask)
            _check_evaluated_arms(config, first_task)
            evaluation = prepare_run_evaluation(config, resolved.evaluate.prompts, first_task)
        with start_session(config, folder) as session:
            return _run_comparison(config, build_task, evaluation, session)


def sections_for_seed(config: CompareConfig, seed: int) -> MethodSections:
    """What the methods of one repetition read: every repetition has seeds of its own."""
    data = label_array_data(config.data) if reads_array_data(config) else config.data
    return MethodSections(
        data=replace(data, seed=data.seed + SEED_STRIDE * seed),
        optimizer=config.optimizer,
        train=replace(config.train, seed=config.train.seed + seed),
        outer=replace(config.outer, patience=0),
        single_loop=config.single_loop,
        rater=config.rater,
        compare=config.compare,
    )


def make_task_builder(config: CompareConfig, folder: Path) -> Callable[[int], Task]:
    """seed -> the task: arrays with examples and wrong labels of their own, or always the same text."""
    if reads_array_data(config):
        return _make_array_task_builder(config, folder)
    resolved = resolve_builtin(config, folder)
    text_task = prepare_text_task(
        resolved,
        splits.load_splits(resolved.data),
        folder,
        num_steps=config.train.max_steps,
        seeds=[0],
        proximal_strength=config.outer.proximal,
        target=config.target,
    )
    return lambda seed: text_task


def _make_array_task_builder(config: CompareConfig, folder: Path) -> Callable[[int], Task]:
    dataset = read_npz_dataset(config.data.train[0])
    model = build_array_model(
        dataset,
        config.arrays,
        model=config.model,
        optimizer=config.optimizer,
        max_steps=config.train.max_steps,
        proximal_strength=config.outer.proximal,
    )

    def build_task(seed: int) -> Task:
        return prepare_array_task(
            dataset,
            model,
            config.arrays,
            folder,
            train=config.train,
            mesh=config.mesh,
            data_seed=sections_for_seed(config, seed).data.seed,
        )

    return build_task


def _check_budget(config: CompareConfig, task: Task) -> None:
    sections = sections_for_seed(config, 0)
    needed = {
        name: METHODS[name].min_budget(task, METHODS[name].configure(sections)) for name in config.compare.methods
    }
    if short := {name: math.ceil(least) for name, least in needed.items() if least > config.compare.budget}:
        listed = ", ".join(f"{name} {least:,}" for name, least in short.items())
        raise ValueError(
            f"compare.budget = {config.compare.budget:,} is too small to move a weight; needed: {listed}. Raise "
            "it, lower train.max_steps, outer.max_iterations or compare.proxy_runs, or leave these methods out of "
            "compare.methods."
        )


def _check_evaluated_arms(config: CompareConfig, task: Task) -> None:
    """Raise ValueError where the baseline of the answers is no part of this comparison, or all of it."""
    labels, baseline = read_labels(task, sections_for_seed(config, 0).data), config.evaluate.baseline
    baselines = with_source_baselines(config.compare.baselines, task)
    absent = {name: reason for name in (*baselines, baseline) if (reason := why_absent(name, task, labels))}
    if baseline in absent:
        raise ValueError(f"evaluate.baseline = {baseline!r}: {absent[baseline]}. Or name another arm.")
    arms = {*baselines, *config.compare.methods} - {*absent}
    if baseline not in arms:
        raise ValueError(
            f"evaluate.baseline = {baseline!r} is none of the arms that are compared, as all examples come from one "
            "source: add it to compare.baselines, or name one of compare.baselines and compare.methods."
        )
    if arms == {baseline}:
        reasons = f" ({'; '.join(absent.values())})" if absent else ""
        raise ValueError(
            f"evaluate.baseline = {baseline!r} is the only arm that is possible here{reasons}: "
            "name another one in compare.baselines or compare.methods."
        )


def _run_comparison(
    config: CompareConfig, build_task: Callable[[int], Task], evaluation: Evaluation | None, session: Session
) -> dict[str, Any]:
    cells: dict[str, list[dict[str, Any]]] = {}
    arm_answers: dict[str, list[ModelAnswers]] = {}
    tables, notes = [], []
    for note in evaluation.notes if evaluation else []:
        session.print_line(f"evaluate: {note}")
    for seed in range(config.compare.seeds):
        task = build_task(seed)
        if seed == 0:
            labels = read_labels(task, sections_for_seed(config, seed).data)
            session.set_phase("starting", total=sum_work(count_compare_work(task, config, labels)))
        for note in task.notes:
            session.print_line(f"seed {seed}  {note}")
        notes += [note for note in task.notes if note not in notes]
        seed_cells, seed_answers, table = run_repetition(config, task, seed, evaluation, session)
        for name, cell in seed_cells.items():
            cells.setdefault(name, []).append(cell)
        for name, answers in seed_answers.items():
            arm_answers.setdefault(name, []).append(answers)
        tables.append(table)
    labels = read_labels(task, sections_for_seed(config, 0).data)
    result = {
        "rows": [summarize_method(name, cells) for name in cells],
        "labels": labels.to_counts() if labels is not None else None,
        "unit": task.outer_objective.unit,
        "right": accuracy_name(task),
        "targets": list_target_facts(task),
        "budget": config.compare.budget,
        "steps": task.num_steps,
        "batch": task.batch_size,
        "restart": config.outer.restart,
        "seeds": config.compare.seeds,
        "top_share": config.compare.top_share,
        "counts": {"train": task.num_examples, **count_examples(task)},
        "absent_baselines": [reason for name in config.compare.baselines if (reason := why_absent(name, task, labels))],
        "notes": notes,
        "evaluate": compare_arms(config, evaluation, arm_answers, session) if evaluation else None,
        "seconds": session.job_cost("seed")[1] + session.job_cost("answers of the")[1],
        "config_hash": config_hash(config),
    }
    result["sentence"] = report.summarize_comparison(result)
    session.set_phase("writing")
    run_dir.write_parquet(session.folder / "weights.parquet", pa.concat_tables(tables))
    run_dir.write_result(session.folder, result)
    run_dir.write_atomic(session.folder / "table.md", report.format_markdown(result))
    distributed.run_on_first_process(lambda: report.write_compare_report(session.folder))
    return result


def run_repetition(
    config: CompareConfig, task: Task, seed: int, evaluation: Evaluation | None, session: Session
) -> tuple[dict[str, dict[str, Any]], dict[str, ModelAnswers], pa.Table]:
    """Every baseline and every method under one seed: (name -> its cell of the table, name -> the answers of its model,
    none without prompts, the weights of every example)."""
    repetition = Repetition(config, task, seed, evaluation, session)
    cells: dict[str, dict[str, Any]] = {}
    for baseline in with_source_baselines(config.compare.baselines, task):
        if not why_absent(baseline, task, repetition.labels):
            cells[baseline] = repetition.run_baseline(baseline)
            session.print_line(f"seed {seed}  {_format_cell(baseline, cells[baseline])}")
    columns = {"alignment": repetition.uniform_stats["alignment"], "loss": repetition.uniform_stats["losses"]}
    for name in config.compare.methods:
        cells[name], columns[f"weight {name}"] = repetition.run_method(name)
        session.print_line(f"seed {seed}  {_format_cell(name, cells[name])}")
    facts = {
        "seed": np.full(task.num_examples, seed),
        "id": [example.id for example in task.examples],
        "source": [example.source for example in task.examples],
        "label": [example.label for example in task.examples],
    }
    return cells, repetition.answers, pa.table(facts | columns)


class Repetition:
    """One repetition of the comparison: its task, its seeds, and the uniform training that the baselines read."""

    def __init__(self, config: CompareConfig, task: Task, seed: int, evaluation: Evaluation | None, session: Session):
        self.config, self.task, self.seed, self.session = config, task, seed, session
        self.evaluation = evaluation
        self.answers: dict[str, ModelAnswers] = {}
        """Of the model of each arm, with prompts."""
        self.sections = sections_for_seed(config, seed)
        self.labels = read_labels(task, self.sections.data)
        self.trainer = Trainer(task, self.sections.outer, session)
        self.outer_loss = validation_loss_fn(task.problem)
        self.uniform_stats = _train_uniform(task, self.sections, seed, self.trainer, session)
        self.retrainer = Retrainer(
            task,
            self.trainer,
            session,
            f"seed {seed}",
            train_seed=self.sections.train.seed,
            data_seed=self.sections.data.seed,
            keeps_last=evaluation is not None,
        )
        self.arm_inputs = ArmInputs(
            losses=self.uniform_stats["losses"],
            alignment=self.uniform_stats["alignment"],
            subset_size=max(1, round(config.compare.top_share * len(task.trainable_indices()))),
            random_seed=(config.data.seed, seed, 2),
            labels=self.labels,
            good_label=self.sections.data.good_label,
        )

    def run_baseline(self, name: str) -> dict[str, Any]:
        """The cell of a selection that learns no weights."""
        arm = build_simple_arm(name, self.task, self.retrainer, self.arm_inputs)
        is_kept = np.isin(np.arange(self.task.num_examples), arm.variant.example_indices)
        kept_weights = arm.variant.weights[: self.task.num_examples] * is_kept
        cell = self._retrain_cold(name, arm.variant, arm.variant.key) | {"ess": _effective_size(kept_weights)}
        cell |= {
            "mixture": describe_mixture(self.task, self.sections, kept_weights),
            "max_weight": float(kept_weights.max()),
        }
        self._answer(name, lambda: self.retrainer.take_params(arm.variant, arm.variant.key, 0))
        if self.labels is not None and arm.scores is not None:
            cell |= {"auc": self.labels.auc(arm.scores), "f1": self.labels.f1(is_kept)}
        ranking_passes = self.uniform_stats["passes"] if name in RANKED_AFTER_UNIFORM else 0
        return cell | {"meaning": arm.variant.meaning, "passes": cell["passes"] + ranking_passes}

    def run_method(self, name: str) -> tuple[dict[str, Any], np.ndarray]:
        """The cell of a method, after cold retrains with its weights, and the weights; mixing learns none."""
        answers_itself = name == "mixing" and self.evaluation is not None
        cell, weights, load_own = learn_weights(
            self.task,
            self.sections,
            name,
            self.seed,
            self.config.compare.budget,
            self.session,
            self.outer_loss,
            keeps_own=answers_itself,
        )
        if answers_itself:
            self._answer(name, load_own)
        del load_own  # and with it a model that it may still hold
        folder = part_folder(self.session, name, self.seed)
        distributed.run_on_first_process(partial(run_dir.remove_folder, folder))
        if name == "mixing":
            return cell, weights
        task, trainable = self.task, self.task.trainable_indices()
        table = np.full(task.corpus.num_examples, cell["validation_weight"])
        table[: task.num_examples] = weights
        variant, key = make_variant(name, "", task, trainable, table), f"{name}, alone"
        alone = self._retrain_cold(key, variant)
        self._answer(name, lambda: self.retrainer.take_params(variant, key, 0))
        cell |= {key: alone[key] for key in (*PART_NAMES, "accuracy")}
        if "targets" in alone:
            cell["targets"] = alone["targets"]
        if is_validation_trainable(task):
            with_validation = np.concatenate([trainable, task.validation_indices()])
            both = self._retrain_cold(f"{name}, with validation", make_variant(name, "", task, with_validation, table))
            cell["with_v"] = {key: both[key] for key in ("test", "accuracy")}
        if self.labels is not None:  # a learned weight keeps where it is above 1, i.e. sigma(h) > .5
            cell |= {"auc": self.labels.auc(weights), "f1": self.labels.f1(weights > 1)}
        return cell, weights

    def _answer(self, name: str, load_params: Callable[[], Params]) -> None:
        """Have the model of an arm answer the prompts, where there are any; what it has answered before is read."""
        if self.evaluation is not None:
            assert isinstance(self.task, TextTask)
            self.answers[name] = collect_arm_answers(
                self.config, self.task, self.evaluation, name, self.seed, load_params, self.session
            )
        self.retrainer.drop_params()

    def _retrain_cold(self, name: str, variant: RetrainVariant, key: str = "") -> dict[str, Any]:
        """The readings of a retrain, with the passes and seconds of it and of what was tried to choose it."""
        losses = self.retrainer.retrain(variant, key or name, 0)
        del losses["dev_losses"]
        costs = [self.session.job_cost(f"seed {self.seed}/{name}{after}") for after in ("/", ", ")]
        passes, seconds = (sum(values) for values in zip(*costs, strict=True))
        return losses | {"passes": passes, "seconds": seconds}


def learn_weights(
    task: Task,
    sections: MethodSections,
    name: str,
    seed: int,
    budget: int,
    session: Session,
    outer_loss: Any,
    *,
    keeps_own: bool = False,
) -> tuple[dict[str, Any], np.ndarray, Callable[[], Params]]:
    """(a method's cell before its retrains, its weights, what gives the model that it has trained itself).

    Computed now, or read where an earlier run left them. The part's folder holds its last step until the caller removes
    it: with it, the model is there again at once. With `keeps_own` it stays in memory until it is asked for.
    """
    method, key = METHODS[name], f"seed {seed}/{name}"
    folder = part_folder(session, name, seed)
    path = folder.with_name(f"{folder.name}.npy")
    own_params: list[Params] = []

    def run() -> MethodResult:
        return method.run(task, method.configure(sections), session.part_session(folder.name), float(budget))

    def load_own() -> Params:
        params = own_params.pop() if own_params else run().params
        assert params is not None
        return params

    def make() -> dict[str, Any]:
        outcome = run()
        if keeps_own and outcome.params is not None:
            own_params.append(outcome.params)
        run_dir.write_arrays(path, outcome.weights)
        return _make_cell(task, sections, outcome, outer_loss)

    cell = session.run_once(key, make, path.exists())
    return dict(cell), run_dir.read_arrays(path), load_own


def part_folder(session: Session, name: str, seed: int) -> Path:
    """Where a method keeps its last step while it learns."""
    return session.folder / "parts" / f"seed {seed} {name}"


def _effective_size(weights: np.ndarray) -> float | int:
    """The effective sample size; of a subset of equal weights their number."""
    if set(np.unique(weights)) <= {0.0, 1.0}:
        return int(weights.sum())
    return float(effective_sample_size(jnp.asarray(weights)))


def describe_mixture(task: Task, sections: MethodSections, weights: np.ndarray) -> dict[str, float]:
    """The share of each source in these weights; nothing for one source, too many to show, or no weight at all.

    The sources of arrays are their given labels, which are shown where something weighs them.
    """
    sources, compared = find_sources(task), (*sections.compare.methods, *sections.compare.baselines)
    weighs_sources = sections.outer.weighting == "per_source" or not {"proxy_fit", "stratified"}.isdisjoint(compared)
    is_shown = (isinstance(task, TextTask) or weighs_sources) and 2 <= len(sources.names) <= MAX_SOURCES
    if not is_shown or not weights[sources.is_trained].any():
        return {}
    return dict(zip(sources.names, sources.mixture(weights).tolist(), strict=True))


def _make_cell(task: Task, sections: MethodSections, outcome: MethodResult, outer_loss: Any) -> dict[str, Any]:
    sources = sorted({example.source for example in task.examples})
    source_names = np.array([example.source for example in task.examples])
    cell = {
        "passes": outcome.passes,
        "seconds": outcome.seconds,
        "trail": outcome.history,
        "ended": outcome.stop_reason,
        "failures": list(outcome.failures),
        "validation_weight": outcome.validation_weight,
        "ess": float(effective_sample_size(jnp.asarray(outcome.weights))),
        "max_weight": float(outcome.weights.max()),
        "sources": {name: float(outcome.weights[source_names == name].mean()) for name in sources}
        if 2 <= len(sources) <= 6
        else {},
        "mixture": describe_mixture(task, sections, outcome.weights),
    }
    if outcome.params is not None:
        frozen, part = task.frozen(outcome.params), headline_part(task)
        right = accuracy(task, outcome.params, frozen, part)
        value = float(outer_loss(outcome.params, frozen, task.held_out_streams[part]))
        cell["own"] = {"test": value, "accuracy": right}
    return cell


def _train_uniform(
    task: Task, sections: MethodSections, seed: int, trainer: Trainer, session: Session
) -> dict[str, Any]:
    """Alignment and losses of every row after a uniform training, and what they cost."""
    path, key = session.folder / "parts" / f"seed {seed}.npz", f"seed {seed}/uniform training"

    def make() -> float:
        before, ones = session.work_done, jnp.ones(task.num_examples)
        run = trainer.run(
            ones,
            trainer.init_state(task.init_params(sections.train.seed)),
            task.training_stream(sections.data.seed),
        )
        alignment, losses = compute_baseline_scores(task, trainer, run, ones)
        arrays = {"alignment": fetch_to_host(alignment), "losses": fetch_to_host(losses)[: task.num_examples]}
        run_dir.write_arrays(path, arrays)
        return session.work_done - before

    session.set_phase(key)
    passes = session.run_once(key, make, path.exists())
    return run_dir.read_arrays(path) | {"passes": passes}


def summarize_method(name: str, cells: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A row of the table: means and 95 % intervals over the seeds; the distance to oracle + validation by seed."""
    runs, method = cells[name], METHODS.get(name) if "trail" in cells[name][0] else None
    readings = {
        key: [cell[key] for cell in runs]
        for key in (*PART_NAMES, "accuracy", "auc", "f1", "ess", "max_weight", "passes", "seconds")
        if runs[0].get(key) is not None
    }
    for of in ("with_v", "own"):
        for key in runs[0].get(of) or ():
            readings[f"{of} {key}"] = [cell[of][key] for cell in runs]
    if goal := cells.get("oracle+validation"):
        mine = readings.get("with_v test") or readings.get("test") or readings["own test"]
        readings["distance"] = [loss - other["test"] for loss, other in zip(mine, goal, strict=True)]
    for source in runs[0].get("sources") or ():
        readings[f"weight of {source}"] = [cell["sources"][source] for cell in runs]
    # arrays draw their labels, which are their sources, anew for each seed
    for source in sorted({source for cell in runs for source in cell.get("mixture") or ()}):
        readings[f"{SHARE_OF}{source}"] = [cell["mixture"].get(source, 0.0) for cell in runs]
    intervals = {key: mean_interval(values) for key, values in readings.items()}
    return {
        "name": name,
        "learns": method is not None,
        "of": method.estimand if method else runs[0]["meaning"],
        "exact": method.exactness if method else "",
        "mean": {key: mean for key, (mean, _) in intervals.items()},
        "interval": {key: half for key, (_, half) in intervals.items()},
        "runs": runs,
    }


def _format_cell(name: str, cell: dict[str, Any]) -> str:
    words = [f"{key} {cell[key]:.3f}" for key in ("test", "accuracy", "auc", "f1") if cell.get(key) is not None]
    return f"{name:<20}{'   '.join(words)}   {cell['passes']:,.0f} passes   {cell['seconds']:.0f} s"
