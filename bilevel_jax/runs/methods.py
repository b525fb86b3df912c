"""The methods that `compare` knows: one table, one signature, one budget in forward-backward passes."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from bilevel_jax.core.types import Params
from bilevel_jax.runs.classification import ArrayTask
from bilevel_jax.runs.config import SelectConfig
from bilevel_jax.runs.learn import Records, learn
from bilevel_jax.runs.sections import OuterMethod as MethodName
from bilevel_jax.runs.session import Session
from bilevel_jax.runs.single import run_single, work_of
from bilevel_jax.runs.task import Task
from bilevel_jax.runs.training import PRODUCT, REPLAY, Trainer


class Outcome(NamedTuple):
    """What a method gives for its budget."""

    weights: Float[np.ndarray, "rows"]
    trail: list[dict[str, Any]]
    """On the way: passes and seconds so far, the AUC of the weights, their effective size, L_v of the model then."""
    passes: float
    seconds: float
    ended: str
    """Why it stopped before its budget was spent, or nothing."""
    params: Params | None = None
    """The model that a single-loop method trained itself, on V too."""


class Method(NamedTuple):
    """A row of the table of methods."""

    of: str
    """What its gradient, or its model, is of."""
    exact: str
    """Whether it is exact for that."""
    settings: Callable[[SelectConfig], SelectConfig]
    """The config with this method in it."""
    run: Callable[[Task | ArrayTask, SelectConfig, Session, float], Outcome]
    """(task, config of `settings`, session, budget in passes) -> what it gives."""
    least: Callable[[Task | ArrayTask, SelectConfig], float]
    """(task, config of `settings`) -> the least budget with which it moves a weight, in passes."""


def outer_loop(task: Task | ArrayTask, config: SelectConfig, session: Session, budget: float) -> Outcome:
    """`learn.learn` with as many outer steps as the budget pays for; the rate falls with what is spent of it.

    What a step of `implicit` costs is known only afterwards (its solve stops at a tolerance), so another is made while
    the dearest so far still fits.
    """

    def progress(records: Records) -> float:
        costs = [record["work"] for record in records]
        return sum(costs) / (budget - max(costs[1:], default=step_cost(task, config)))

    learned = learn(task, config, Trainer(task, config.outer, session), session, progress)
    early = learned.ended if progress(learned.records) <= 1 else ""
    spent = sum(record["work"] for record in learned.records)
    return Outcome(learned.weights, _trail(learned.records), spent, _seconds(learned.records), early)


def step_cost(task: Task | ArrayTask, config: SelectConfig) -> float:
    """The most that one outer step costs, in passes: a training and an estimate."""
    outer, epoch = config.outer, math.ceil(len(task.trainable()) / task.batch)
    estimate = {
        "unrolled": (REPLAY + PRODUCT) * task.steps,
        "window": (REPLAY + PRODUCT) * min(outer.window, task.steps),
        "alignment": 2.0 * epoch,
        "implicit": 2.0 * epoch + PRODUCT * outer.max_iterations * epoch,
    }
    return task.steps + estimate[outer.method]


def once(task: Task | ArrayTask) -> float:
    """What the first outer step costs beside: the baselines at uniform weights."""
    return 2.0 * math.ceil(len(task.trainable()) / task.batch)


def single_loop(task: Task | ArrayTask, config: SelectConfig, session: Session, budget: float) -> Outcome:
    """`single.run_single` with as many steps as the budget pays for."""
    steps = int(budget / work_of(config))
    # its rate is set so that the weights move as far as in the outer loop of `unrolled` with this budget
    moves = max(1, int(budget / ((1 + REPLAY + PRODUCT) * task.steps)) - 1)
    config = replace(
        config, single_loop=replace(config.single_loop, steps=steps), outer=replace(config.outer, steps=moves)
    )
    alone = run_single(task, config, session)
    return Outcome(
        alone.weights, _trail(alone.records), steps * work_of(config), _seconds(alone.records), "", alone.params
    )


def _seconds(records: list[dict[str, Any]]) -> float:
    return sum(record["seconds"] for record in records)


def _trail(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    passes = np.cumsum([record["work"] for record in records]).tolist()
    kept = ("auc", "ess", "loss")
    return [
        {"passes": spent, **{key: record[key] for key in kept}} for spent, record in zip(passes, records, strict=True)
    ]


def _settings(method: MethodName) -> Callable[[SelectConfig], SelectConfig]:
    return lambda config: replace(
        config, outer=replace(config.outer, method=method), single_loop=replace(config.single_loop, second_model="copy")
    )


def _memory_saving(config: SelectConfig) -> SelectConfig:
    """Without a second model every weight only falls, so they must compete: softmax, as its authors have it."""
    outer = replace(config.outer, method="penalty")
    if outer.weighting == "sigmoid":
        outer = replace(outer, weighting="softmax")
    return replace(config, outer=outer, single_loop=replace(config.single_loop, second_model="none"))


def _iterated(name: MethodName, of: str, exact: str) -> Method:
    def least(task: Task | ArrayTask, config: SelectConfig) -> float:
        return 2 * step_cost(task, config) + once(task)

    return Method(of, exact, _settings(name), outer_loop, least)


def _alone(settings: Callable[[SelectConfig], SelectConfig], of: str, exact: str) -> Method:
    return Method(of, exact, settings, single_loop, lambda task, config: work_of(config))


OPTIMISTIC = "min over θ in argmin G(θ, w) of L_v: trains on V"
METHODS: dict[str, Method] = {
    "unrolled": _iterated("unrolled", "L_v(θ_T(w)), the training run", "yes"),
    "window": _iterated("window", "L_v(θ_T(w)), its last steps", "no: stops early"),
    "implicit": _iterated("implicit", "L_v(θ*(w)), the minimiser with the prior", "where θ is stationary"),
    "alignment": _iterated("alignment", "one step's effect on L_v at the end", "no: a baseline"),
    "penalty": _alone(_settings("penalty"), OPTIMISTIC, "as the penalty grows"),
    "penalty_alone": _alone(_memory_saving, f"{OPTIMISTIC}; without a second model", "no: prefers low losses"),
    "bmo": _alone(_settings("bmo"), "least L_v among weakly Pareto-optimal θ: trains on V", "as τ falls"),
    "mixing": _alone(_settings("mixing"), "min of ρ L_v + (1 − ρ) G: trains on V", "yes; it learns no weights"),
}
"""`penalty` with a copy is V-PBGD and, per source, ScaleBiO; without one, SEAL as its public code trains."""
