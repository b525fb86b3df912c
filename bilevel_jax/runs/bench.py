"""The verb `compare`: every method on one data set at one budget, several seeds, models trained again from cold."""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from bilevel_jax.core.unrolled import outer_value
from bilevel_jax.core.weighting import effective_size
from bilevel_jax.runs import bench_report, classification, files, rows
from bilevel_jax.runs import config as configs
from bilevel_jax.runs.classification import ArrayTask
from bilevel_jax.runs.compare import Arm, retrain
from bilevel_jax.runs.config import CompareConfig, SelectConfig
from bilevel_jax.runs.embedded import embedded
from bilevel_jax.runs.learn import baselines, good_rows
from bilevel_jax.runs.methods import METHODS, Outcome, once
from bilevel_jax.runs.rows import PARTS
from bilevel_jax.runs.rules import on_arrays
from bilevel_jax.runs.session import Session, run_folder, started
from bilevel_jax.runs.statistics import auc, mean_interval, top
from bilevel_jax.runs.task import Task, per_row
from bilevel_jax.runs.task import prepare as prepare_text
from bilevel_jax.runs.training import Trainer

APART = 1_000_000
"""Between the seeds of data and order of two repetitions: further than any outer step or retrain goes."""


def bench(config: CompareConfig) -> dict[str, Any]:
    """Run the verb in `config.output.folder` and return what result.json holds.

    Raises as `select.select` does, and ValueError where the budget is too small for a method to move a weight.
    """
    with run_folder(config) as folder:
        task_of = tasks(config, folder)
        _affordable(config, task_of(0))
        with started(config, folder) as work:
            return _work(config, task_of, work)


def settings(config: CompareConfig, seed: int) -> SelectConfig:
    """One repetition as the settings of `select`, which the parts of a run are written for."""
    return SelectConfig(
        model=config.model,
        lora=config.lora,
        data=replace(
            config.data,
            seed=config.data.seed + APART * seed,
            label_field="label" if on_arrays(config) else config.data.label_field,
            good_label="clean" if on_arrays(config) else config.data.good_label,
        ),
        objective=config.objective,
        optimizer=config.optimizer,
        train=replace(config.train, seed=config.train.seed + seed),
        outer=replace(config.outer, patience=0),
        single_loop=config.single_loop,
        output=config.output,
        mesh=config.mesh,
        distributed=config.distributed,
    )


def tasks(config: CompareConfig, folder: Path) -> Callable[[int], Task | ArrayTask]:
    """seed -> the task: arrays with rows and wrong labels of their own, or always the same text."""
    if on_arrays(config):
        source = classification.read(config.data.train[0])
        net = classification.network(settings(config, 0), config.arrays, source)
        return lambda seed: classification.prepare(settings(config, seed), config.arrays, source, net)
    ready = embedded(settings(config, 0), folder)
    text = prepare_text(
        ready, rows.load(ready.data), folder, steps=config.train.max_steps, seeds=[0], prior=config.outer.proximal
    )
    return lambda seed: text


def _affordable(config: CompareConfig, task: Task | ArrayTask) -> None:
    chosen = {name: METHODS[name] for name in config.compare.methods}
    needed = {name: one.least(task, one.settings(settings(config, 0))) for name, one in chosen.items()}
    if short := {name: math.ceil(least) for name, least in needed.items() if least > config.compare.budget}:
        listed = ", ".join(f"{name} {least:,}" for name, least in short.items())
        raise ValueError(
            f"compare.budget = {config.compare.budget:,} is too small to move a weight twice; needed: {listed}. Raise it, "
            "lower train.max_steps or outer.max_iterations, or leave these methods out of compare.methods."
        )


def planned_work(config: CompareConfig, task: Task | ArrayTask) -> float:
    """The whole run in training steps, for the ETA."""
    some, steps = config.compare, task.steps
    return some.seeds * (
        steps + once(task) + len(some.baselines) * steps + len(some.methods) * (some.budget + 2 * steps)
    )


def _work(config: CompareConfig, task_of: Callable[[int], Task | ArrayTask], work: Session) -> dict[str, Any]:
    cells: dict[str, list[dict[str, Any]]] = {}
    tables, notes = [], []
    for seed in range(config.compare.seeds):
        task = task_of(seed)
        if seed == 0:
            work.phase("starting", total=planned_work(config, task))
        for note in task.notes:
            work.say(f"seed {seed}  {note}")
        notes += [note for note in task.notes if note not in notes]
        made, table = repetition(config, task, seed, work)
        for name, cell in made.items():
            cells.setdefault(name, []).append(cell)
        tables.append(table)
    result = {
        "rows": [summary(name, cells) for name in cells],
        "labels": good_rows(task, settings(config, 0)) is not None,
        "unit": task.objective.unit,
        "right": task.objective.right,
        "budget": config.compare.budget,
        "steps": task.steps,
        "batch": task.batch,
        "restart": config.outer.restart,
        "seeds": config.compare.seeds,
        "top_share": config.compare.top_share,
        "counts": {"train": task.rows} | {part: len(task.trusted[part]) for part in task.held_out},
        "notes": notes,
        "seconds": work.cost("seed")[1],
        "config_hash": configs.config_hash(config),
    }
    result["sentence"] = bench_report.sentence(result)
    work.phase("writing")
    files.write_table(work.folder / "weights.parquet", pa.concat_tables(tables))
    files.write_json(work.folder / "result.json", result)
    files.write_atomic(work.folder / "table.md", bench_report.markdown(result))
    bench_report.write(work.folder)
    return result


def repetition(
    config: CompareConfig, task: Task | ArrayTask, seed: int, work: Session
) -> tuple[dict[str, dict[str, Any]], pa.Table]:
    """Every arm and every method under one seed: (name -> its cell of the table, the weights of every row)."""
    base = settings(config, seed)
    good = good_rows(task, base)
    trainer = Trainer(task, base.outer, work)
    read = outer_value(task.problem)
    first = _first(task, base, seed, trainer, work)

    def cold(name: str, arm: Arm) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            began = time.monotonic()
            found = retrain(task, base, trainer, work, read, arm, 0)
            return found | {"passes": task.steps, "seconds": time.monotonic() - began}

        work.phase(f"seed {seed}/{name}")
        return work.once(f"seed {seed}/{name}", make)

    made = {}
    for name, (arm, scores) in arms(config, task, seed, first, good).items():
        looked = first["passes"] if name in ("aligned", "low_loss") else 0
        kept = np.isin(np.arange(task.rows), arm.rows)
        cell = cold(name, arm) | {"ess": int(kept.sum())}
        if good is not None and scores is not None:
            cell |= {"auc": auc(scores, good), "f1": f1(kept, good)}
        made[name] = cell | {"meaning": arm.meaning, "passes": cell["passes"] + looked}
        work.say(f"seed {seed}  {_line(name, made[name])}")
    columns = {"alignment": first["alignment"], "loss": first["losses"]}
    for name in config.compare.methods:
        cell, weights = learned(config, task, base, name, seed, work, read)
        columns[f"weight {name}"] = weights
        if name != "mixing":
            table = np.ones(task.corpus.rows)
            table[: task.rows] = weights
            everything = task.trainable()
            alone = cold(f"{name}, alone", Arm(name, "", everything, table))
            joined = cold(f"{name}, with V_fit", Arm(name, "", np.concatenate([everything, task.fit_rows()]), table))
            cell |= {key: alone[key] for key in (*PARTS, "accuracy")}
            cell["with_v"] = {key: joined[key] for key in ("report", "accuracy")}
        if good is not None and name != "mixing":
            cell |= {"auc": auc(weights, good), "f1": f1(weights > 1, good)}
        made[name] = cell
        work.say(f"seed {seed}  {_line(name, cell)}")
    facts = {
        "seed": np.full(task.rows, seed),
        "id": [example.id for example in task.examples],
        "source": [example.source for example in task.examples],
        "label": [example.label for example in task.examples],
    }
    return made, pa.table(facts | columns)


def arms(
    config: CompareConfig, task: Task | ArrayTask, seed: int, first: dict[str, Any], good: np.ndarray | None
) -> dict[str, tuple[Arm, np.ndarray | None]]:
    """The rows of the table that learn no weights: name -> (what it trains on, the scores that chose it)."""
    everything, fit = task.trainable(), task.fit_rows()
    ones = np.ones(task.corpus.rows)
    count = max(1, round(config.compare.top_share * len(everything)))
    drawn = np.sort(np.random.default_rng((config.data.seed, seed, 2)).choice(everything, count, replace=False))
    share = f"{config.compare.top_share:.0%} of the rows"
    chosen: dict[str, tuple[str, np.ndarray, np.ndarray | None]] = {
        "uniform": ("every row, weight 1", everything, None),
        "validation": ("V_fit alone", fit, None),
        "train+validation": ("every row and V_fit", np.concatenate([everything, fit]), None),
        "random": (f"{share}, at random", drawn, np.isin(np.arange(task.rows), drawn).astype(float)),
        "aligned": (f"{share}, by alignment once", top(-first["alignment"], count, everything), -first["alignment"]),
        "low_loss": (f"{share}, of least loss", top(-first["losses"], count, everything), -first["losses"]),
    }
    if good is not None:
        clean = everything[good[everything]]
        chosen["oracle"] = ("the good rows", clean, good.astype(float))
        chosen["oracle+validation"] = ("the good rows and V_fit", np.concatenate([clean, fit]), good.astype(float))
    return {
        name: (Arm(name, chosen[name][0], chosen[name][1], ones), chosen[name][2])
        for name in config.compare.baselines
        if name in chosen
    }


def learned(
    config: CompareConfig, task: Task | ArrayTask, base: SelectConfig, name: str, seed: int, work: Session, read: Any
) -> tuple[dict[str, Any], np.ndarray]:
    """A method's cell before its retrains, and its weights: made now, or found where an earlier run left them."""
    method, key = METHODS[name], f"seed {seed}/{name}"
    path = work.folder / "parts" / f"{key.replace('/', ' ')}.npy"

    def make() -> dict[str, Any]:
        part = work.within(key.replace("/", " "))
        found = method.run(task, method.settings(base), part, float(config.compare.budget))
        with files.replacing(path) as place, open(place, "wb") as file:
            np.save(file, found.weights)
        return _cell(task, found, read)

    cell = work.once(key, make)
    shutil.rmtree(work.folder / "parts" / key.replace("/", " "), ignore_errors=True)
    return dict(cell), np.load(path)


def _cell(task: Task | ArrayTask, found: Outcome, read: Any) -> dict[str, Any]:
    sources = sorted({example.source for example in task.examples})
    of = np.array([example.source for example in task.examples])
    cell = {
        "passes": found.passes,
        "seconds": found.seconds,
        "trail": found.trail,
        "ended": found.ended,
        "ess": float(effective_size(jnp.asarray(found.weights))),
        "sources": {name: float(found.weights[of == name].mean()) for name in sources}
        if 2 <= len(sources) <= 6
        else {},
    }
    if found.params is not None:
        fixed, part = task.fixed(found.params), _last(task)
        right = per_row(task.objective.accuracy, found.params, fixed, task.held_out[part], len(task.trusted[part]))
        value = float(read(found.params, fixed, task.held_out[part]))
        cell["own"] = {"report": value, "accuracy": float(np.nanmean(right))}
    return cell


def _first(task: Task | ArrayTask, base: SelectConfig, seed: int, trainer: Trainer, work: Session) -> dict[str, Any]:
    """Alignment and losses of every row after a uniform training, and what they cost."""
    path, key = work.folder / "parts" / f"seed {seed}.npz", f"seed {seed}/uniform training"

    def make() -> float:
        before, ones = work.work, jnp.ones(task.rows)
        run = trainer.run(ones, trainer.begin(task.fresh(base.train.seed)), task.stream(base.data.seed))
        alignment, losses = baselines(task, trainer, run, ones)
        path.parent.mkdir(exist_ok=True)
        with files.replacing(path) as place, open(place, "wb") as file:
            np.savez(file, alignment=np.asarray(alignment), losses=np.asarray(losses)[: task.rows])
        return work.work - before

    work.phase(key)
    passes = work.once(key, make)
    with np.load(path) as found:
        return {name: found[name] for name in found} | {"passes": passes}


def f1(kept: np.ndarray, good: np.ndarray) -> float:
    """2 |kept and good| / (|kept| + |good|); a learned weight keeps where it is above 1, i.e. sigma(h) > .5."""
    return float(2 * (kept & good).sum() / max(1, kept.sum() + good.sum()))


def summary(name: str, cells: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A row of the table: means and 95 % intervals over the seeds; the distance to oracle + validation by seed."""
    found, method = cells[name], METHODS.get(name) if "trail" in cells[name][0] else None
    readings = {
        key: [cell[key] for cell in found]
        for key in (*PARTS, "accuracy", "auc", "f1", "ess", "passes", "seconds")
        if found[0].get(key) is not None
    }
    for of in ("with_v", "own"):
        for key in found[0].get(of) or ():
            readings[f"{of} {key}"] = [cell[of][key] for cell in found]
    if goal := cells.get("oracle+validation"):
        mine = readings.get("with_v report") or readings.get("report") or readings["own report"]
        readings["distance"] = [one - other["report"] for one, other in zip(mine, goal, strict=True)]
    for source in found[0].get("sources") or ():
        readings[f"weight of {source}"] = [cell["sources"][source] for cell in found]
    intervals = {key: mean_interval(values) for key, values in readings.items()}
    return {
        "name": name,
        "learns": method is not None,
        "of": method.of if method else found[0]["meaning"],
        "exact": method.exact if method else "",
        "mean": {key: mean for key, (mean, _) in intervals.items()},
        "interval": {key: half for key, (_, half) in intervals.items()},
        "runs": found,
    }


def _last(task: Task | ArrayTask) -> str:
    return "report" if "report" in task.held_out else "fit"


def _line(name: str, cell: dict[str, Any]) -> str:
    words = [f"{key} {cell[key]:.3f}" for key in ("report", "accuracy", "auc", "f1") if cell.get(key) is not None]
    return f"{name:<20}{'   '.join(words)}   {cell['passes']:,.0f} passes   {cell['seconds']:.0f} s"
