"""Candidate models of a `refine` round, by training method."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from bilevel_jax.commands.refine.rollouts import RoundTask
from bilevel_jax.core import single_loop, weightings
from bilevel_jax.core.problem import weighted
from bilevel_jax.core.training import train_step
from bilevel_jax.core.types import Hyper, Params, Problem, SingleLoop, TrainStep
from bilevel_jax.lm import models
from bilevel_jax.lm.losses.importance import RatioKind, importance_weighted_losses
from bilevel_jax.lm.losses.sft import assemble_params
from bilevel_jax.runs.config import schema
from bilevel_jax.runs.config.load import RefineConfig
from bilevel_jax.runs.config.schema import OuterSection, RefineMethod
from bilevel_jax.runs.engine.outer_loop import outer_learning_rate, train_and_estimate
from bilevel_jax.runs.engine.single_loop import (
    build_single_loop,
    num_single_loop_steps,
    run_single_loop,
)
from bilevel_jax.runs.engine.trainer import HVP_WORK, REPLAY_WORK, Trainer, check_hypergradient_finite
from bilevel_jax.runs.infra import checkpoint
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.tasks.objective import Objective, build_objective
from bilevel_jax.runs.tasks.optimizers import build_optimizer
from bilevel_jax.runs.tasks.text import TextTask

ROUND_SEED_STRIDE = 1000
"""Between the seeds of the data orders of two rounds: further than a candidate goes."""
JOINT_METHODS: tuple[RefineMethod, ...] = ("penalty", "bmo", "mixing")
"""The methods that train parameters and weights in one run, by validation."""
WEIGHT_LEARNING_METHODS: tuple[RefineMethod, ...] = ("unrolled", "penalty", "bmo")
"""The methods that weigh examples."""


class Candidate(NamedTuple):
    """A trained candidate."""

    params: Params
    weights: Float[np.ndarray, "examples"]
    """Multiplied by `RoundTask.multiplicity` in the loss; 1 where the method learns none."""


CandidateTrainer = Callable[[RoundTask, Params, Session, int], Candidate]
"""(rows of the round, the model that wrote the responses, session, number of the round) -> the candidate.

Training starts from `task.init_params`, and is resumed in the middle after a stop."""


class CompiledFunctions(NamedTuple):
    """The functions that a run compiles."""

    objective: Objective
    optimizer: optax.GradientTransformation
    plain_problem: Problem
    """With the losses of the objective."""
    plain_step: TrainStep
    problem: Problem
    """With importance ratios in the losses of responses; L_v without."""
    step: TrainStep


_cached_decoder = lru_cache(maxsize=4)(models.make_decoder)


def attach_compiled_functions(config: RefineConfig, task: TextTask) -> TextTask:
    """The task with functions that another run of this process may have compiled already."""
    # parameters that are split over devices are gathered by a decoder of their own
    decoder = task.decoder if config.mesh.fsdp > 1 else _cached_decoder(task.architecture, remat=config.model.remat)
    functions = compiled_functions_for_config(config, task._replace(decoder=decoder))
    return task._replace(
        decoder=decoder,
        objective=functions.objective,
        optimizer=functions.optimizer,
        problem=functions.problem,
        train_step=functions.step,
    )


def compiled_functions_for_config(config: RefineConfig, task: TextTask) -> CompiledFunctions:
    """The functions for the sections of a config."""
    refined, draws = config.refine, config.generate.num_generations
    return build_compiled_functions(
        task.decoder,
        config.objective,
        task.base_params is not None,
        config.optimizer,
        config.train.max_steps,
        refined.ratio,
        draws if refined.ratio == "sequence" else 1,
        refined.max_ratio,
    )


@lru_cache(maxsize=4)
def build_compiled_functions(
    decoder: models.Decoder,
    losses: schema.ObjectiveSection,
    lora: bool,
    training: schema.OptimizerSection,
    steps: int,
    ratio: RatioKind,
    responses: int,
    max_ratio: float,
) -> CompiledFunctions:
    """The problems of a run and one step of each; the same ones for the same arguments."""
    chosen_objective, optimizer = build_objective(losses, decoder, lora=lora), build_optimizer(training, steps)
    plain = weighted(chosen_objective.losses)
    step = train_step(plain, optimizer)
    if ratio == "none":
        return CompiledFunctions(chosen_objective, optimizer, plain, step, plain, step)
    response_losses = importance_weighted_losses(
        decoder, ratio=ratio, responses_per_prompt=responses, max_ratio=max_ratio
    )
    problem = weighted(
        lambda params, fixed, batch: response_losses(assemble_params(params, fixed["base"]), batch),
        outer=chosen_objective.losses,
    )
    return CompiledFunctions(chosen_objective, optimizer, plain, step, problem, train_step(problem, optimizer))


def make_candidate_trainers(config: RefineConfig, offline_task: TextTask) -> dict[RefineMethod, CandidateTrainer]:
    """What trains each configured method; nothing is compiled again for another round.

    Only validation is read, by the methods that use it; dev and test stay unseen.
    """
    functions = compiled_functions_for_config(config, offline_task)

    def hide_held_out(task: TextTask, name: RefineMethod) -> TextTask:
        """The task of a method: BMO's weights are importance ratios already, so its losses are plain."""
        task = task._replace(held_out_streams={"validation": task.held_out_streams["validation"]})
        return (
            task._replace(problem=functions.plain_problem, train_step=functions.plain_step) if name == "bmo" else task
        )

    def make_trainer(name: RefineMethod, of: Callable[..., Candidate]) -> CandidateTrainer:
        return lambda rows, sampler, session, number: of(
            rows._replace(task=hide_held_out(rows.task, name)), sampler, session, number
        )

    train_functions: dict[RefineMethod, Callable[..., Candidate]] = {
        name: _SingleLoopTrainer(config, name) for name in JOINT_METHODS
    }
    train_functions |= {
        "unrolled": partial(train_unrolled_candidate, config),
        "uniform": partial(train_uniform_candidate, config),
    }
    return {name: make_trainer(name, train_functions[name]) for name in config.refine.methods}


def candidate_outer(outer: OuterSection, name: RefineMethod) -> OuterSection:
    """The section outer of a candidate; one with uniform weights is trained as that of `unrolled`."""
    return replace(outer, method="unrolled" if name == "uniform" else name)


class _SingleLoopTrainer:
    """penalty, bmo or mixing; compiled with the first round's task, as all have its shape."""

    def __init__(self, config: RefineConfig, name: RefineMethod):
        self.config, self.outer = config, candidate_outer(config.outer, name)
        self._method: SingleLoop | None = None

    def __call__(self, round_task: RoundTask, sampler_params: Params, session: Session, round_number: int) -> Candidate:
        config, steps = self.config, self.config.train.max_steps
        self._method = self._method or build_single_loop(
            round_task.task,
            num_single_loop_steps(config.single_loop, self.outer, steps),
            single_loop=config.single_loop,
            outer=self.outer,
            optimizer=config.optimizer,
        )
        result = run_single_loop(
            round_task.task,
            session,
            single_loop=config.single_loop,
            outer=self.outer,
            optimizer=config.optimizer,
            data=replace(config.data, label_field=""),
            train=config.train,
            seed=ROUND_SEED_STRIDE * round_number,
            compiled_method=self._method,
            reference_params=sampler_params,
        )
        return Candidate(result.params, result.weights)


def train_uniform_candidate(
    config: RefineConfig, round_task: RoundTask, sampler_params: Params, session: Session, round_number: int
) -> Candidate:
    """Plain training on all examples, without weights and without validation: self-training without a judge."""
    trainer = Trainer(round_task.task, candidate_outer(config.outer, "uniform"), session)
    weights = jnp.ones(round_task.task.num_examples)
    start = trainer.init_state(round_task.task.init_params(config.train.seed))
    stream = round_task.task.training_stream(config.data.seed + ROUND_SEED_STRIDE * round_number)
    return Candidate(trainer.run(weights, start, stream, outer_step=0).end.params, np.asarray(weights))


def train_unrolled_candidate(
    config: RefineConfig, round_task: RoundTask, sampler_params: Params, session: Session, round_number: int
) -> Candidate:
    """outer.steps times: train, estimate the exact hypergradient of every example, step its weight; then train.

        h <- h - rate e / rms(e),  e_i = (d L_v(theta_T(w)) / d w_i) / multiplicity_i, through the weighting

    A hypergradient over its multiplicity, so that G responses which each count 1/G go where one that counts 1 would.
    Every training run starts from the same model, in a data order of its own; the last one is the candidate. With one
    step these are the hypergradients at equal weights: one backward pass judges every response.

    It takes the steps of `OuterLoop` (`train_and_estimate`) without what that loop reads to choose the best step: dev
    is kept for the test of the candidate, so every step is made, the last weights count, and the model is trained once
    more with them.
    """
    task, outer = round_task.task, candidate_outer(config.outer, "unrolled")
    seed = config.data.seed + ROUND_SEED_STRIDE * round_number
    trainer = Trainer(task, outer, session)
    start = trainer.init_state(task.init_params(config.train.seed))
    multiplicity = jnp.asarray(round_task.multiplicity, jnp.result_type(float))
    hyper, done = jnp.zeros(task.num_examples), 0
    folder = session.folder / "checkpoints" / "outer"
    if restored := checkpoint.restore_checkpoint(folder, hyper):
        hyper, done = restored.tree, restored.step + 1
        session.advance(done * task.num_steps * (1 + REPLAY_WORK + HVP_WORK))
    for step in range(done, outer.steps):
        weights, stream = hyper_to_weights(outer.weighting, hyper, multiplicity), task.training_stream(seed + step)
        is_first = round_number == step == 0
        _, estimate = train_and_estimate(trainer, weights, start, stream, step, is_first=is_first)
        check_hypergradient_finite(estimate, f"round {round_number}, outer step {step},")
        learning_rate = jnp.asarray(outer_learning_rate(outer, step / outer.steps))
        hyper = _update_hyper(outer.weighting, outer.max_step, hyper, multiplicity, estimate.grad, learning_rate)
        session.log.write(
            {"event": "outer", "step": step, "round": round_number, "validation": float(estimate.validation_loss)}
        )
        checkpoint.save_checkpoint(folder, step, hyper, {})
        session.mark_saved()
    weights = hyper_to_weights(outer.weighting, hyper, multiplicity)
    trajectory = trainer.run(weights, start, task.training_stream(seed + outer.steps), outer_step=outer.steps)
    return Candidate(trajectory.end.params, np.asarray(weights))


@partial(jax.jit, static_argnums=0)
def hyper_to_weights(
    name: str, hyper: Float[Array, "examples"], multiplicity: Float[Array, "examples"]
) -> Float[Array, "examples"]:
    """sigmoid: 2 sigma(h); softmax: exp(h_i) over its mean, in which each example counts as `multiplicity` says."""
    if name == "sigmoid":
        return 2 * jax.nn.sigmoid(hyper)
    peak = jax.lax.stop_gradient(hyper.max())
    risen = jnp.exp(hyper - peak)
    return risen * multiplicity.sum() / jnp.sum(multiplicity * risen)


@partial(jax.jit, static_argnums=(0, 1))
def _update_hyper(
    name: str, cap: float, hyper: Hyper, multiplicity: Array, hypergradient: Array, learning_rate: Array
) -> Hyper:
    hyper_gradient = jax.vjp(lambda h: hyper_to_weights(name, h, multiplicity), hyper)[1](hypergradient)[0]
    slope = jnp.where(multiplicity > 0, hyper_gradient / jnp.where(multiplicity > 0, multiplicity, 1), 0)
    return weightings.normalized_gradient_step(learning_rate, cap)(hyper, slope)


ESTIMANDS = {
    "unrolled": "L_v(θ_T(w)), the training run itself: exact",
    "penalty": single_loop.OPTIMISTIC_ESTIMAND,
    "bmo": "multi-objective: least L_v among weakly Pareto-optimal θ; it trains on V",
    "mixing": single_loop.MIXING_ESTIMAND,
    "uniform": "the mean training loss; V is not used",
}
