"""How a candidate of `refine` is weighted and trained: what each method makes of the rows of a round."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from bilevel_jax.core import penalty, tree, weighting
from bilevel_jax.core.problem import weighted
from bilevel_jax.core.transition import transition
from bilevel_jax.core.types import Hyper, Params, Problem, Single, Transition
from bilevel_jax.core.unrolled import check_differentiable
from bilevel_jax.lm import models as lm
from bilevel_jax.lm.importance import Ratio, self_sampled
from bilevel_jax.lm.losses import assemble
from bilevel_jax.runs import checkpoint, sections
from bilevel_jax.runs.config import RefineConfig, SelectConfig
from bilevel_jax.runs.learn import rate
from bilevel_jax.runs.objective import Objective, objective
from bilevel_jax.runs.optimizers import optimizer
from bilevel_jax.runs.refine_rows import Made
from bilevel_jax.runs.sections import RefineMethod
from bilevel_jax.runs.session import Session
from bilevel_jax.runs.single import method, run_single, steps_of, work_of
from bilevel_jax.runs.task import Task
from bilevel_jax.runs.training import PRODUCT, REPLAY, Trainer

ROUND = 1000
"""Between the seeds of the data orders of two rounds: further than a candidate goes."""
TOGETHER: tuple[RefineMethod, ...] = ("penalty", "bmo", "mixing")
"""The methods that train parameters and weights in one run, by V_fit."""
LEARNS: tuple[RefineMethod, ...] = ("unrolled", "penalty", "bmo")
"""The methods that weigh rows."""


class Candidate(NamedTuple):
    """A trained candidate."""

    params: Params
    weights: Float[np.ndarray, "rows"]
    """Beside `Made.base`; 1 where the method learns none."""


Train = Callable[[Made, Params, Session, int], Candidate]
"""(rows of the round, the model that wrote the responses, session, number of the round) -> the candidate.

Training starts from `task.fresh`. It goes on in the middle after a stop."""


class Programs(NamedTuple):
    """The functions that a run compiles."""

    objective: Objective
    optimizer: optax.GradientTransformation
    plain: Problem
    """With the losses of the objective."""
    plain_step: Transition
    problem: Problem
    """With importance ratios in the losses of responses; L_v without."""
    step: Transition


_decoder = lru_cache(maxsize=4)(lm.decoder)


def with_programs(config: RefineConfig, task: Task) -> Task:
    """The task with functions that another run of this process may have compiled already: those of `programs`."""
    # parameters that are split over devices are gathered by a decoder of their own
    decoder = task.decoder if config.mesh.fsdp > 1 else _decoder(task.architecture, remat=config.model.remat)
    made = programs_of(config, task._replace(decoder=decoder))
    return task._replace(
        decoder=decoder, objective=made.objective, optimizer=made.optimizer, problem=made.problem, step=made.step
    )


def programs_of(config: RefineConfig, task: Task) -> Programs:
    """`programs` as the config has it."""
    refined, draws = config.refine, config.generate.num_generations
    return programs(
        task.decoder, config.objective, task.base is not None, config.optimizer, config.train.max_steps, refined.ratio,
        draws if refined.ratio == "sequence" else 1, refined.max_ratio,
    )  # fmt: skip


@lru_cache(maxsize=4)
def programs(
    decoder: lm.Decoder,
    losses: sections.ObjectiveSection,
    lora: bool,
    training: sections.OptimizerSection,
    steps: int,
    ratio: Ratio,
    responses: int,
    clip: float,
) -> Programs:
    """The problems of a run and one step of each; the same ones for the same arguments."""
    chosen, optimiser = objective(losses, decoder, lora=lora), optimizer(training, steps)
    plain = weighted(chosen.losses)
    step = transition(plain, optimiser)
    if ratio == "none":
        return Programs(chosen, optimiser, plain, step, plain, step)
    own = self_sampled(decoder, ratio=ratio, responses=responses, clip=clip)
    problem = weighted(lambda params, fixed, batch: own(assemble(params, fixed["base"]), batch), outer=chosen.losses)
    return Programs(chosen, optimiser, plain, step, problem, transition(problem, optimiser))


def candidates(config: RefineConfig, first: Task) -> dict[RefineMethod, Train]:
    """What trains each configured method; nothing is compiled again for another round.

    Only V_fit is read, by the methods that use it; V_select and V_report stay unseen.
    """
    made_of = programs_of(config, first)

    def unseen(task: Task, name: RefineMethod) -> Task:
        """The task of a method: BMO's weights are importance ratios already, so its losses are plain."""
        task = task._replace(held_out={"fit": task.held_out["fit"]})
        return task._replace(problem=made_of.plain, step=made_of.plain_step) if name == "bmo" else task

    def made(name: RefineMethod, of: Callable[..., Candidate]) -> Train:
        return lambda rows, sampler, session, number: of(
            rows._replace(task=unseen(rows.task, name)), sampler, session, number
        )

    known: dict[RefineMethod, Callable[..., Candidate]] = {
        name: _SingleLoop(settings(config, name)) for name in TOGETHER
    }
    known |= {"unrolled": partial(exact, settings(config, "unrolled")), "uniform": partial(uniform, config)}
    return {name: made(name, known[name]) for name in config.refine.methods}


def settings(config: RefineConfig, name: RefineMethod) -> SelectConfig:
    """A candidate's training as the settings of `select`, which the parts of a run are written for."""
    outer = replace(config.outer, method="unrolled" if name == "uniform" else name)
    return SelectConfig(
        model=config.model, data=replace(config.data, label_field=""), objective=config.objective,
        optimizer=config.optimizer, train=config.train, outer=outer, single_loop=config.single_loop, output=config.output,
        mesh=config.mesh, distributed=config.distributed, lora=config.lora,
    )  # fmt: skip


def work(config: RefineConfig, name: RefineMethod) -> float:
    """What a candidate costs, in training steps."""
    one, steps = settings(config, name), config.train.max_steps
    if name in TOGETHER:
        return steps_of(one) * work_of(one)
    return steps if name == "uniform" else steps * (1 + config.outer.steps * (1 + REPLAY + PRODUCT))


class _SingleLoop:
    """penalty, bmo or mixing; compiled with the first round's task, as all have its shape."""

    def __init__(self, config: SelectConfig):
        self.config = config
        self._made: Single | None = None

    def __call__(self, rows: Made, sampler: Params, session: Session, number: int) -> Candidate:
        self._made = self._made or method(rows.task, self.config, steps_of(self.config))
        alone = run_single(rows.task, self.config, session, seed=ROUND * number, made=self._made, snapshot=sampler)
        return Candidate(alone.params, alone.weights)


def uniform(config: RefineConfig, rows: Made, sampler: Params, session: Session, number: int) -> Candidate:
    """Plain training on all rows, without weights and without V: what self-training is without a judge."""
    trainer = Trainer(rows.task, settings(config, "uniform").outer, session)
    weights = jnp.ones(rows.task.rows)
    start, stream = (
        trainer.begin(rows.task.fresh(config.train.seed)),
        rows.task.stream(config.data.seed + ROUND * number),
    )
    return Candidate(trainer.run(weights, start, stream, save_as=0).end.params, np.asarray(weights))


def exact(config: SelectConfig, rows: Made, sampler: Params, session: Session, number: int) -> Candidate:
    """outer.steps times: train, sweep back for the exact entry of every row, step its weight; then train with these.

        h <- h - rate e / rms(e),  e_i = (d L_v(theta_T(w)) / d w_i) / base_i, through the weighting

    An entry over its base, so that G responses which each count 1/G go where one row that counts 1 would. Every
    training starts from the same model, in a data order of its own; the last one is the candidate. With one step these
    are the entries at equal weights: one sweep judges every response.
    """
    task, outer, seed = rows.task, config.outer, config.data.seed + ROUND * number
    trainer = Trainer(task, outer, session)
    start = trainer.begin(task.fresh(config.train.seed))
    base = jnp.asarray(rows.base, jnp.result_type(float))
    hyper, done = jnp.zeros(task.rows), 0
    folder = session.folder / "checkpoints" / "outer"
    if found := checkpoint.restore(folder, hyper):
        hyper, done = found.tree, found.step + 1
        session.advance(done * task.steps * (1 + REPLAY + PRODUCT))
    for at in range(done, outer.steps):
        weights, stream = weights_of(outer.weighting, hyper, base), task.stream(seed + at)
        run = trainer.run(weights, start, stream, swept=True, save_as=at)
        if number == at == 0:
            fixed = task.fixed(start.params)
            check_differentiable(task.step, task.optimizer, run, weights, fixed, stream)
        estimate = trainer.estimate(run, weights, stream, save_as=at)
        if not bool(tree.finite(estimate.grad)):
            raise FloatingPointError(
                f"the hypergradient of round {number}, outer step {at}, is not finite ({estimate.checks}). Raise "
                "optimizer.eps_root, or lower optimizer.learning_rate."
            )
        speed = jnp.asarray(rate(outer, at / outer.steps))
        hyper = _step(outer.weighting, outer.max_step, hyper, base, estimate.grad, speed)
        session.log.write({"event": "outer", "step": at, "round": number, "fit": float(estimate.value)})
        checkpoint.save(folder, at, hyper, {})
        session.saved()
    weights = weights_of(outer.weighting, hyper, base)
    run = trainer.run(weights, start, task.stream(seed + outer.steps), save_as=outer.steps)
    return Candidate(run.end.params, np.asarray(weights))


@partial(jax.jit, static_argnums=0)
def weights_of(name: str, hyper: Float[Array, "rows"], base: Float[Array, "rows"]) -> Float[Array, "rows"]:
    """sigmoid: 2 sigma(h); softmax: exp(h_i) over its mean, in which each row counts as `base` says."""
    if name == "sigmoid":
        return 2 * jax.nn.sigmoid(hyper)
    peak = jax.lax.stop_gradient(hyper.max())
    risen = jnp.exp(hyper - peak)
    return risen * base.sum() / jnp.sum(base * risen)


@partial(jax.jit, static_argnums=(0, 1))
def _step(name: str, cap: float, hyper: Hyper, base: Array, entries: Array, speed: Array) -> Hyper:
    pulled = jax.vjp(lambda h: weights_of(name, h, base), hyper)[1](entries)[0]
    slope = jnp.where(base > 0, pulled / jnp.where(base > 0, base, 1), 0)
    return weighting.normalised_descent(speed, cap)(hyper, slope)


ESTIMANDS = {
    "unrolled": "L_v(θ_T(w)), the training run itself: exact",
    "penalty": penalty.OPTIMISTIC,
    "bmo": "multi-objective: least L_v among weakly Pareto-optimal θ; it trains on V",
    "mixing": penalty.MIXED,
    "uniform": "the mean training loss; V is not used",
}
