"""Bilevel methods that `compare` runs, with their settings and cost."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bilevel_jax.commands.compare.proxies import MIN_PROXIES, MixingLaw, choose_mixture, draw_mixtures
from bilevel_jax.core.types import Params
from bilevel_jax.core.unrolled import validation_loss_fn
from bilevel_jax.core.weightings import effective_sample_size
from bilevel_jax.runs.budget.work import count_baseline_work, count_outer_step_work
from bilevel_jax.runs.config.schema import (
    CompareSection,
    DataSection,
    OptimizerSection,
    OuterEstimate,
    OuterMethod,
    OuterSection,
    RaterSection,
    ScoresSection,
    SingleLoopSection,
    TrainSection,
)
from bilevel_jax.runs.engine.outer_loop import OuterLoop, OuterRecords, data_order_seed
from bilevel_jax.runs.engine.raters import rater_work
from bilevel_jax.runs.engine.single_loop import run_single_loop, single_loop_step_work
from bilevel_jax.runs.engine.trainer import HVP_WORK, REPLAY_WORK, Trainer
from bilevel_jax.runs.infra import checkpoint
from bilevel_jax.runs.infra.distributed import share_from_first
from bilevel_jax.runs.infra.placement import place_table
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring.pooling import pooling_work, pools_steps
from bilevel_jax.runs.tasks.evaluation import count_examples, held_out_losses
from bilevel_jax.runs.tasks.protocol import Task
from bilevel_jax.runs.tasks.sources import require_sources


class MethodSections(NamedTuple):
    """The sections of a config that a method reads, those of one repetition."""

    data: DataSection
    optimizer: OptimizerSection
    train: TrainSection
    outer: OuterSection
    single_loop: SingleLoopSection
    rater: RaterSection
    compare: CompareSection = CompareSection()


class MethodResult(NamedTuple):
    """What a method gives for its budget."""

    weights: Float[np.ndarray, "examples"]
    history: list[dict[str, Any]]
    """On the way: passes so far, the AUC of the weights, their effective size, L_v of the model then, and where the
    method measured it the reliability of the hypergradient."""
    passes: float
    seconds: float
    stop_reason: str
    """Why it stopped before its budget was spent, or nothing."""
    params: Params | None = None
    """The model that a single-loop method trained itself, on V too."""
    validation_weight: float = 1.0
    """The weight of each validation example in a training on them, too."""
    failures: tuple[str, ...] = ()
    """Trainings that diverged and are left out, each with the reason."""


class MethodSpec(NamedTuple):
    """A method of the comparison."""

    estimand: str
    """What its gradient, or its model, is of."""
    exactness: str
    """Whether it is exact for that."""
    configure: Callable[[MethodSections], MethodSections]
    """The sections with this method set in them."""
    run: Callable[[Task, MethodSections, Session, float], MethodResult]
    """(task, sections from `configure`, session, budget in passes) -> its result."""
    min_budget: Callable[[Task, MethodSections], float]
    """(task, sections from `configure`) -> the least budget with which it moves a weight, in passes."""


def _run_outer_loop_within_budget(
    task: Task, sections: MethodSections, session: Session, budget: float
) -> MethodResult:
    """The outer loop with as many steps as the budget pays for; the rate falls with what is spent of it.

    What a step of `implicit` costs is known only afterwards (its solve stops at a tolerance), so another one is made
    while the most expensive so far still fits.
    """
    takes_last = _takes_last_step(task, sections.outer)

    def progress(records: OuterRecords) -> float:
        costs = [record["work"] for record in records]
        spent, next_cost = sum(costs), max(costs[1:], default=count_outer_step_work(task, sections.outer))
        if takes_last:  # the rate is 0 at the end of the budget, where nothing moves any more
            return spent / budget if spent + next_cost <= budget else math.inf
        return spent / (budget - next_cost)

    outer = sections.outer
    if not pools_steps(task, outer):
        outer = replace(outer, reliability_every=0)  # all of the budget goes to steps
    loop = OuterLoop(
        task,
        Trainer(task, outer, session),
        session,
        data=sections.data,
        train_seed=sections.train.seed,
        scores=ScoresSection(),
        rater=sections.rater,
        progress=progress,
    )
    while not (stop_reason := loop.stop_reason()):
        loop.take_step()
    learned = loop.learned_weights(stop_reason)
    within_budget = progress(learned.records) <= 1  # it ended for another reason, such as the effective sample size
    return MethodResult(
        loop.moved_weights() if takes_last and not within_budget else learned.weights,
        _cost_history(learned.records),
        sum(record["work"] for record in learned.records),
        _total_seconds(learned.records),
        stop_reason if within_budget else "",
        validation_weight=learned.validation_weight,
    )


def _takes_last_step(task: Task, outer: OuterSection) -> bool:
    """Whether the weights are those after the last step, with which nothing was trained yet, so that one outer step is
    enough: mixtures of sources, where no dev example could have chosen an earlier step.

    Not with folds, whose own weight is that of the last training.
    """
    return outer.weighting == "per_source" and "dev" not in task.held_out_streams and not outer.validation_folds


def _run_proxies(task: Task, sections: MethodSections, session: Session, budget: float) -> MethodResult:
    """compare.proxy_runs trainings on mixtures that are drawn, and the best mixture by a regression over them."""
    sources = require_sources(task, "proxy_fit")
    records = train_proxies(task, sections, session)
    finite = [record for record in records if record["judged"] is not None]
    mixtures, losses = (np.array([record[key] for record in finite]) for key in ("mixture", "judged"))
    mixture, law = choose_mixture(sources.natural, mixtures, losses, (sections.data.seed, 6))
    session.log.write(
        {
            "event": "mixing_law",
            "step": len(records),
            "law": law.form,
            "error": law.error,
            "constant_error": law.constant_error,
            "left_out": len(records) - len(finite),
        }
    )
    return MethodResult(
        sources.weights(mixture),
        _cost_history(_best_so_far(records)),
        sum(record["work"] for record in records),
        _total_seconds(records),
        _describe_end(len(records), task.num_steps, budget, law),
        failures=tuple(record["failure"] for record in records if record["judged"] is None),
    )


def _describe_end(count: int, num_steps: int, budget: float, law: MixingLaw) -> str:
    """What a reader of the mixture should know: that no law was found, and that budget was left."""
    if not law.predicts:
        return "no law predicts its proxy runs better than their mean does, so the mixture is the natural one"
    return f"its {count} proxy runs were made (compare.proxy_runs)" if budget >= (count + 1) * num_steps else ""


def train_proxies(task: Task, sections: MethodSections, session: Session) -> list[dict[str, Any]]:
    """A record of each proxy run: its mixture, its losses, and the one that is fitted: `judged`, the loss of validation
    and dev examples, as the other methods read both. It is None for one that diverged, with the `failure` in words.

    Each has a data order of its own, as the trainings of the outer loop, and is resumed at the run that was stopped.
    Raises FloatingPointError where too few are left for a fit.
    """
    sources, count = require_sources(task, "proxy_fit"), sections.compare.proxy_runs
    mixtures = draw_mixtures(sources.natural, count, (sections.data.seed, 5))
    trainer = Trainer(task, sections.outer, session)
    loss_fn, sizes = validation_loss_fn(task.problem), count_examples(task)
    folder, records = session.folder / "checkpoints" / "proxies", list[dict[str, Any]]()
    if restored := checkpoint.restore_checkpoint(folder, mixtures):
        records = restored.meta["records"]
        session.restore_work(sum(record["work"] for record in records))
    _check_enough_proxies(records, count)
    for run in range(len(records), count):
        session.set_phase(f"proxy run {run + 1} of {count}")
        work_before, began = session.work_done, time.monotonic()
        weights = place_table(task.mesh, sources.weights(mixtures[run]).astype(jnp.result_type(float)))
        losses, failure = share_from_first(_train_proxy(trainer, sections, weights, run, loss_fn))
        judged = {part: loss for part in ("validation", "dev") if (loss := losses.get(part)) is not None}
        shares = [max(1, sizes[part]) for part in judged]
        record = {
            "mixture": mixtures[run].tolist(),
            "loss": losses,
            "judged": None if failure else float(np.average(list(judged.values()), weights=shares)),
            "failure": failure and f"proxy run {run + 1} of {count}: {failure}",
            "ess": float(effective_sample_size(weights)),
            "work": session.work_done - work_before,
            "seconds": time.monotonic() - began,
        }
        if failure:
            session.print_line(f"{record['failure']}. It is left out of the fit.")
        records.append(record)
        session.log.write({"event": "proxy", "step": run, **record})
        checkpoint.save_checkpoint(folder, run, mixtures, {"records": records})
        session.mark_saved()
        _check_enough_proxies(records, count)
    return records


def _train_proxy(
    trainer: Trainer, sections: MethodSections, weights: jax.Array, run: int, loss_fn: Any
) -> tuple[dict[str, float | None], str]:
    """(the losses after one training, or none, and why it diverged)."""
    task = trainer.task
    start = trainer.init_state(task.init_params(sections.train.seed))
    stream = task.training_stream(data_order_seed(sections.data, sections.outer, run))
    try:
        params = trainer.run(weights, start, stream).end.params
    except FloatingPointError as error:
        return {}, str(error).partition(". Lower ")[0]  # the remedy is for all runs
    losses = held_out_losses(task, loss_fn, params, task.frozen(start.params))
    for part in ("validation", "dev"):
        if (loss := losses[part]) is not None and not math.isfinite(loss):
            return {}, f"its {part} loss is {loss}"
    return losses, ""


def _check_enough_proxies(records: list[dict[str, Any]], count: int) -> None:
    """Raise FloatingPointError as soon as too few of so many proxy runs can be left for a fit."""
    failures = [record["failure"] for record in records if record["judged"] is None]
    if count - len(failures) < MIN_PROXIES:
        raise FloatingPointError(
            f"proxy_fit needs {MIN_PROXIES} proxy runs with a finite loss, and {len(failures)} of {count} have "
            f"diverged ({failures[0]}). Lower optimizer.learning_rate, set optimizer.max_grad_norm, or leave it out of "
            "compare.methods, and start anew with --out."
        )


def _best_so_far(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The proxy runs, each with the losses of the best one until then; none where all have diverged."""

    def judged(record: dict[str, Any]) -> float:
        return math.inf if record["judged"] is None else record["judged"]

    best = [min(records[: end + 1], key=judged) for end in range(len(records))]
    return [record | {"loss": of["loss"], "ess": of["ess"]} for record, of in zip(records, best, strict=True)]


def _run_single_loop_within_budget(
    task: Task, sections: MethodSections, session: Session, budget: float
) -> MethodResult:
    """`run_single_loop` with as many steps as the budget pays for."""
    step_work = _single_loop_step_work(task, sections)
    steps = int(budget / step_work)
    # its rate is set so that the weights move as far as in the outer loop of `unrolled` with this budget
    moves = max(1, int(budget / ((1 + REPLAY_WORK + HVP_WORK) * task.num_steps)) - 1)
    result = run_single_loop(
        task,
        session,
        single_loop=replace(sections.single_loop, steps=steps),
        outer=replace(sections.outer, steps=moves),
        optimizer=sections.optimizer,
        data=sections.data,
        train=sections.train,
    )
    return MethodResult(
        result.weights,
        _cost_history(result.records),
        steps * step_work,
        _total_seconds(result.records),
        "",
        result.params,
    )


def _single_loop_step_work(task: Task, sections: MethodSections) -> float:
    return single_loop_step_work(sections.single_loop, sections.outer.method, len(task.outer_objective.targets))


def _total_seconds(records: list[dict[str, Any]]) -> float:
    return sum(record["seconds"] for record in records)


def _cost_history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    passes = np.cumsum([record["work"] for record in records]).tolist()
    keys = ("auc", "ess", "loss", "reliability")  # the last one in pooled and auto alone, which measure it
    return [
        {"passes": spent, **{key: record.get(key) for key in keys}}
        for spent, record in zip(passes, records, strict=True)
    ]


def _set_method(method: OuterMethod) -> Callable[[MethodSections], MethodSections]:
    return lambda sections: sections._replace(
        outer=replace(sections.outer, method=method), single_loop=replace(sections.single_loop, second_model="copy")
    )


def _without_second_model(sections: MethodSections) -> MethodSections:
    """Without a second model every weight only falls, so they must compete: softmax, as its authors have it."""
    outer = replace(sections.outer, method="penalty")
    if outer.weighting == "sigmoid":
        outer = replace(outer, weighting="softmax")
    return sections._replace(outer=outer, single_loop=replace(sections.single_loop, second_model="none"))


def _set_estimate(estimate: OuterEstimate) -> Callable[[MethodSections], MethodSections]:
    return lambda sections: sections._replace(outer=replace(sections.outer, method="unrolled", estimate=estimate))


def _outer_loop_method(
    estimand: str, exactness: str, configure: Callable[[MethodSections], MethodSections]
) -> MethodSpec:
    def min_budget(task: Task, sections: MethodSections) -> float:
        once = count_baseline_work(task) + pooling_work(task, sections.outer)
        once += rater_work(task, sections.outer, sections.rater, ScoresSection())
        steps = 1 if _takes_last_step(task, sections.outer) else 2
        return steps * count_outer_step_work(task, sections.outer) + once

    return MethodSpec(estimand, exactness, configure, _run_outer_loop_within_budget, min_budget)


def _single_loop_method(
    configure: Callable[[MethodSections], MethodSections], estimand: str, exactness: str
) -> MethodSpec:
    return MethodSpec(
        estimand,
        exactness,
        configure,
        _run_single_loop_within_budget,
        _single_loop_step_work,
    )


def _proxy_work(task: Task, sections: MethodSections) -> float:
    require_sources(task, "proxy_fit")
    return float(sections.compare.proxy_runs * task.num_steps)


OPTIMISTIC_ESTIMAND = "min over θ in argmin G(θ, w) of L_v: trains on V"
METHODS: dict[str, MethodSpec] = {
    "unrolled": _outer_loop_method("L_v(θ_T(w)), the training run", "yes", _set_method("unrolled")),
    "pooled": _outer_loop_method("L_v(θ_T(w)), as a function of two losses", "its projection", _set_estimate("pooled")),
    "auto": _outer_loop_method(
        "L_v(θ_T(w)), each part as far as it is reliable", "shrunken parts of it", _set_estimate("auto")
    ),
    "window": _outer_loop_method("L_v(θ_T(w)), its last steps", "no: stops early", _set_method("window")),
    "implicit": _outer_loop_method(
        "L_v(θ*(w)), the minimiser with the prior", "where θ is stationary", _set_method("implicit")
    ),
    "alignment": _outer_loop_method("one step's effect on L_v at the end", "no: a baseline", _set_method("alignment")),
    "penalty": _single_loop_method(_set_method("penalty"), OPTIMISTIC_ESTIMAND, "as the penalty grows"),
    "penalty_alone": _single_loop_method(
        _without_second_model, f"{OPTIMISTIC_ESTIMAND}; without a second model", "no: prefers low losses"
    ),
    "bmo": _single_loop_method(
        _set_method("bmo"), "least L_v among weakly Pareto-optimal θ: trains on V", "as τ falls"
    ),
    "mixing": _single_loop_method(
        _set_method("mixing"), "min of ρ L_v + (1 − ρ) G: trains on V", "yes; it learns no weights"
    ),
    "proxy_fit": MethodSpec(
        "a regression of L_v over trainings on drawn mixtures of sources",
        "no: as far as the fit",
        lambda sections: sections,
        _run_proxies,
        _proxy_work,
    ),
}
"""`penalty` with a copy is V-PBGD and, per source, ScaleBiO; without one, SEAL as its public code trains."""
