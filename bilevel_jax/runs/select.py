"""The main job: learn a weight for every training row, certify it, compare it, and write what a person can trust."""

from pathlib import Path
from typing import Any

import numpy as np

from bilevel_jax.core import certify
from bilevel_jax.core.types import Checks
from bilevel_jax.runs import config as configs
from bilevel_jax.runs import files, measured, outputs, plan, processes, report, rows
from bilevel_jax.runs import mesh as placing
from bilevel_jax.runs.certificates import certificates
from bilevel_jax.runs.compare import FIRST_SEED, arms, compare
from bilevel_jax.runs.config import SelectConfig
from bilevel_jax.runs.embedded import embedded
from bilevel_jax.runs.keep import keep_rows
from bilevel_jax.runs.learn import Learned, good_rows, learn, order_seed
from bilevel_jax.runs.sections import SINGLE_LOOP_METHODS
from bilevel_jax.runs.session import Session, run_folder, started
from bilevel_jax.runs.single import Alone, learn_alone
from bilevel_jax.runs.statistics import auc
from bilevel_jax.runs.task import Task, prepare
from bilevel_jax.runs.training import Trainer

NOTHING_TO_CERTIFY = certify.Verdict(
    "UNDECIDED",
    "",
    "the method has no hypergradient, so nothing of it can be certified.",
    "Judge it by the comparison, beside outer.method: unrolled.",
)


def select(config: SelectConfig) -> dict[str, Any]:
    """Run the verb in `config.output.folder` and return what result.json holds.

    Raises ValueError for input that cannot be used, FileExistsError for a folder that holds a run, FloatingPointError
    for a training that diverges, and `session.Interrupted` when asked to stop.
    """
    with run_folder(config) as folder:
        ready = embedded(config, folder)
        found = rows.load(ready.data)
        if len(found.train) < 2:
            raise ValueError(f"{len(found.train)} training row; weights compare rows, so give at least 2.")
        seeds = [order_seed(config, step) for step in range(config.outer.steps + 1)]
        task = prepare(ready, found, folder, steps=config.train.max_steps, seeds=seeds, prior=config.outer.proximal)
        with started(config, folder) as work:
            return _work(task, config, work, folder)


def _work(task: Task, config: SelectConfig, work: Session, folder: Path) -> dict[str, Any]:
    for note in task.notes:
        work.say(note)
    work.phase("starting", total=sum(stage.work for stage in plan.selection(task, config)))
    expected = measured.expected(task, config, work)
    trainer = Trainer(task, config.outer, work)
    alone: Alone | None = None
    if config.outer.method in SINGLE_LOOP_METHODS:
        learned, alone = learn_alone(task, config, trainer, work)
        certified, verdicts = {}, {"uniform weights": NOTHING_TO_CERTIFY}
    else:
        learned = learn(task, config, trainer, work)
        certified = _certify(task, config, trainer, work, learned)
        verdicts = {name: certify.verdict(one) for name, one in certified.items()}

    sources = [example.source for example in task.examples]
    selected = keep_rows(learned.weights, task.trainable(), config.selection, sources=sources, seed=config.data.seed)
    subset = np.unique(selected)
    compared = compare(task, config, trainer, work, arms(task, config, learned, subset, work))
    work.phase("writing")
    files.write_table(folder / "weights.parquet", outputs.weights_table(task, config, learned, subset))
    files.write_atomic(folder / "selected.jsonl", outputs.selected_lines(task.examples, learned.weights, selected))
    if not processes.agreed((folder / "model").exists()):
        params = _final_params(task, config, trainer, learned)
        outputs.write_model(folder / "model", task, params, base_path=config.model.name_or_path)
    if alone is not None:
        outputs.write_model(folder / "model-own", task, alone.params, base_path=config.model.name_or_path)

    # The thresholds were calibrated at uniform weights. At the learned ones the slope nears 0, and a ratio with it
    # tells less; that certificate is in the report, but is not the verdict.
    verdict = verdicts["uniform weights"]
    good = good_rows(task, config)
    result: dict[str, Any] = {
        "verdict": {**verdict._asdict(), "sentence": str(verdict)},
        "estimand": outputs.estimand(config),
        "unit": task.objective.unit,
        "right": task.objective.right,
        "certificates": {name: _plain(one) for name, one in certified.items()},
        "verdicts": {name: one._asdict() for name, one in verdicts.items()},
        "records": learned.records,
        "best": learned.best,
        "ended": learned.ended,
        "auc": {
            "weights": auc(learned.weights, good),
            **({} if alone else {"first_entries": auc(-learned.first_entries, good)}),
            "alignment": auc(-learned.alignment, good),
            "low_loss": auc(-learned.losses, good),
        }
        if good is not None
        else None,
        "compare": compared,
        "notes": task.notes,
        "rows": {"train": task.rows, **{part: len(examples) for part, examples in task.trusted.items()}},
        "selected": len(selected),
        "work": {"outer": sum(record["work"] for record in learned.records)}
        | {name: work.cost(name)[0] for name in ("certify", "compare")},
        "seconds": {"outer": sum(record["seconds"] for record in learned.records)}
        | {name: work.cost(name)[1] for name in ("certify", "compare")},
        "config_hash": configs.config_hash(config),
        "estimate": expected,
    }
    result["measured"] = measured.taken(
        task, folder, passes=work.work, seconds=sum(result["seconds"].values()), timed=sum(result["work"].values())
    )  # fmt: skip
    files.write_json(folder / "result.json", result)
    processes.by_first(lambda: report.write(folder, task.examples))
    return result


def _certify(
    task: Task, config: SelectConfig, trainer: Trainer, work: Session, learned: Learned
) -> dict[str, certify.Certificates]:
    """Certificates of the gradient at uniform weights and, where restarts are cold, at the learned weights."""
    places = {"uniform weights": (0, np.ones(task.rows), learned.first_entries)}
    if config.outer.restart == "cold" and learned.best > 0:
        places["learned weights"] = (learned.best, learned.weights, learned.entries)
    out = {}
    for name, (step, weights, entries) in places.items():
        record = learned.records[step]
        checks = Checks(**{key: value for key, value in record["checks"].items() if value is not None})
        out[name] = certificates(
            task, config, trainer, work, name=name, weights=weights.astype(entries.dtype), entries=entries, step=step,
            value=record["loss"]["fit"], checks=checks,
        )  # fmt: skip
    return out


def _final_params(task: Task, config: SelectConfig, trainer: Trainer, learned: Learned) -> Any:
    """The model that is written: trained from cold with the learned weights, as the first seed of the comparison."""
    start = trainer.begin(task.fresh(config.train.seed + FIRST_SEED))
    stream = task.stream(config.data.seed + FIRST_SEED, packed=False)
    return trainer.run(placing.table(task.mesh, learned.weights), start, stream).end.params


def _plain(certified: certify.Certificates) -> dict[str, Any]:
    return {
        "exact": certified.exact._asdict() if certified.exact else None,
        "smooth": certified.smooth,
        "predictive": certified.predictive._asdict() if certified.predictive else None,
        "checks": certified.checks._asdict(),
    }
