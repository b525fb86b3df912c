"""Train-then-test: a short training on responses of each strategy, and what it does for rows of the user's own."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from bilevel_jax.core.unrolled import outer_value
from bilevel_jax.lm import data
from bilevel_jax.lm.losses import assemble
from bilevel_jax.lm.prompts import prompts
from bilevel_jax.lm.tokens import TEMPLATE
from bilevel_jax.runs import rows
from bilevel_jax.runs.candidates import Candidates, drawn
from bilevel_jax.runs.checkers import checker
from bilevel_jax.runs.config import RankConfig, SelectConfig
from bilevel_jax.runs.generation import generators
from bilevel_jax.runs.sections import OuterSection
from bilevel_jax.runs.session import Session
from bilevel_jax.runs.statistics import mean_interval
from bilevel_jax.runs.task import Task, prepare
from bilevel_jax.runs.training import Trainer


def tested(config: RankConfig, found: Candidates, work: Session) -> dict[str, Any]:
    """L_v on data.validation after training on rank.train_examples responses of each strategy, for each seed; and before.

    One task for all: the same questions, start, data order and number of steps, so that strategies differ in their
    responses alone. With a checker, the accuracy of greedy responses to the questions of data.validation as well.
    Questions that stand in data.validation are not trained on. Raises ValueError for too few questions, and as
    `task.prepare` does.
    """
    task, settings = _task(config, found, work)
    trainer, count = Trainer(task, settings.outer, work), config.rank.train_examples
    table = {
        name: task.trainable()[np.isin(task.trainable(), np.arange(at * count, (at + 1) * count))]
        for at, name in enumerate(found.strategies)
    }
    work.phase("training", total=work.work + len(table) * config.rank.train_seeds * task.steps)
    started = time.monotonic()
    run = partial(_trial, config, task, trainer, work)
    begin = work.once("trials/before", partial(run, None, 0))
    lines = []
    for name, chosen in table.items():
        work.phase(f"training on {name}")
        seeds = range(config.rank.train_seeds)
        runs = [work.once(f"trials/{name}/{seed}", partial(run, chosen, seed)) for seed in seeds]
        means = {key: mean_interval([one[key] for one in runs]) for key in runs[0]}
        lines.append({"name": name, "rows": len(chosen), "runs": runs, "mean": means})
        work.say(f"{name:<28}L_v {means['loss'][0]:.4f} ± {means['loss'][1]:.4f} after {task.steps} steps")
    return {
        "before": begin,
        "strategies": lines,
        "decided_by": "accuracy" if "accuracy" in begin else "loss",
        "unit": task.objective.unit,
        "steps": task.steps,
        "batch": task.batch,
        "validation": len(task.trusted["fit"]),
        "seconds": time.monotonic() - started,
    }


def _task(config: RankConfig, found: Candidates, work: Session) -> tuple[Task, SelectConfig]:
    validation = data.load(config.data.validation, rows.reading(config.data))
    held = {turn.content.strip() for example in validation for turn in example.turns if turn.role == "user"}
    free = [one for one in found.questions if one.text.strip() not in held]
    if len(free) < config.rank.train_examples:
        raise ValueError(
            f"rank.train_examples = {config.rank.train_examples}, but only {len(free)} of {len(found.questions)} questions do "
            "not stand in data.validation. Lower it, or give more questions."
        )
    chosen = drawn(free, config.rank.train_examples, 1, config.data.seed)[0]
    examples = [
        one.answered(one.responses[at])._replace(source=name)
        for at, name in enumerate(found.strategies)
        for one in chosen
    ]
    examples = [example._replace(row=row) for row, example in enumerate(examples)]
    settings = SelectConfig(
        model=config.model, data=replace(config.data, packing=False), optimizer=config.optimizer, train=config.train,
        outer=OuterSection(method="alignment"), output=config.output, mesh=config.mesh, lora=config.lora,
    )  # fmt: skip
    trusted = {"fit": validation, "select": [], "report": []}
    loaded = rows.Rows(examples, trusted, [])
    return prepare(settings, loaded, work.folder, steps=config.train.max_steps, seeds=[config.data.seed]), settings


def _trial(
    config: RankConfig, task: Task, trainer: Trainer, work: Session, chosen: np.ndarray | None, seed: int
) -> dict[str, float]:
    """One training on the chosen rows (None: no training), and what it did."""
    start = trainer.begin(task.fresh(config.train.seed + seed))
    params = start.params
    if chosen is not None:
        stream = task.stream(config.data.seed + seed, chosen, packed=False)
        params = trainer.run(jnp.ones(task.corpus.rows), start, stream).end.params
    found = {"loss": float(outer_value(task.problem)(params, task.fixed(start.params), task.held_out["fit"]))}
    if config.verifier.name:
        validation = task.trusted["fit"]
        judge = checker(config.verifier, validation)
        greedy = replace(config.generate, temperature=0.0)
        write = generators(greedy, task.decoder, task.tokenizer, task.mesh, work)(assemble(params, task.base))
        asked = prompts(validation, task.tokenizer, template=config.data.template or TEMPLATE)
        said = [some[0].text for some in write(asked, [0])]
        found["accuracy"] = float(np.mean([judge(one, text) for one, text in zip(validation, said, strict=True)]))
    return found
