"""Candidate models of a `refine` round, by training method."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from bilevel_jax.commands.refine.rollouts import RoundTask
from bilevel_jax.commands.refine.scored import scores_to_weights
from bilevel_jax.core import certify, single_loop, weightings
from bilevel_jax.core.problem import weighted
from bilevel_jax.core.training import train_step
from bilevel_jax.core.types import Estimate, Hyper, Params, Problem, SingleLoop, TrainStep, Weighting
from bilevel_jax.core.weightings import PartReliability, SharedWeightVariable
from bilevel_jax.lm import models
from bilevel_jax.lm.losses.importance import RatioKind, importance_weighted_losses
from bilevel_jax.lm.losses.sft import assemble_params
from bilevel_jax.runs.config import schema
from bilevel_jax.runs.config.load import RefineConfig
from bilevel_jax.runs.config.schema import OuterSection, RefineMethod
from bilevel_jax.runs.engine.folds import count_judges, end_turn, take_turn, turn_training_stream
from bilevel_jax.runs.engine.outer_loop import outer_learning_rate, train_and_estimate
from bilevel_jax.runs.engine.reliability import (
    RoundSizes,
    choose_round_evidence,
    is_reliability_at_floor,
    measure_estimate_reliability,
    measures_reliability,
    reliability_to_record,
)
from bilevel_jax.runs.engine.single_loop import (
    FORWARD_WORK,
    build_single_loop,
    num_single_loop_steps,
    run_single_loop,
)
from bilevel_jax.runs.engine.trainer import Trainer, check_hypergradient_finite
from bilevel_jax.runs.infra import checkpoint, distributed
from bilevel_jax.runs.infra.placement import replicate
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring.pooling import PoolingState, StepPooling, empty_pooling_state, pools_steps
from bilevel_jax.runs.scoring.scores import example_losses, steps_per_epoch
from bilevel_jax.runs.tasks.evaluation import judges_by_examples
from bilevel_jax.runs.tasks.objective import Objective, build_objective
from bilevel_jax.runs.tasks.optimizers import build_optimizer
from bilevel_jax.runs.tasks.targets import (
    OuterObjective,
    TargetSpec,
    build_outer_objective,
    list_targets,
    split_reported,
)
from bilevel_jax.runs.tasks.text import TextTask

ROUND_SEED_STRIDE = 1000
"""Between the seeds of the data orders of two rounds: further than a candidate goes."""
JOINT_METHODS: tuple[RefineMethod, ...] = ("penalty", "bmo", "mixing")
"""The methods that train parameters and weights in one run, by validation."""
WEIGHT_LEARNING_METHODS: tuple[RefineMethod, ...] = ("unrolled", "penalty", "bmo", "ica")
"""The methods that weigh examples."""


class Candidate(NamedTuple):
    """A trained candidate."""

    params: Params
    weights: Float[np.ndarray, "examples"]
    """Multiplied by `RoundTask.multiplicity` in the loss; 1 where the method learns none."""
    reliability: dict[str, Any] | None = None
    """How far its hypergradients speak for other validation examples (`summarize_reliability`); None without any."""
    validation_weight: float | None = None
    """With outer.validation_folds, the weight of each validation example beside its own."""


CandidateTrainer = Callable[[RoundTask, Params, Session, int], Candidate]
"""(rows of the round, the model that wrote the responses, session, number of the round) -> the candidate.

Training starts from `task.init_params`, and is resumed in the middle after a stop."""


class CompiledFunctions(NamedTuple):
    """The functions that a run compiles."""

    objective: Objective
    outer_objective: OuterObjective
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
        outer_objective=functions.outer_objective,
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
        split_reported(list_targets(config.target, config.objective))[0],
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
    specs: tuple[TargetSpec, ...],
    lora: bool,
    training: schema.OptimizerSection,
    steps: int,
    ratio: RatioKind,
    responses: int,
    max_ratio: float,
) -> CompiledFunctions:
    """The problems of a run and one step of each; the same ones for the same arguments."""
    chosen_objective, optimizer = build_objective(losses, decoder, lora=lora), build_optimizer(training, steps)
    outer = build_outer_objective(specs, losses, chosen_objective, decoder, lora=lora)
    plain = weighted(chosen_objective.losses, outer=outer.losses)
    step = train_step(plain, optimizer)
    if ratio == "none":
        return CompiledFunctions(chosen_objective, outer, optimizer, plain, step, plain, step)
    response_losses = importance_weighted_losses(
        decoder, ratio=ratio, responses_per_prompt=responses, max_ratio=max_ratio
    )
    problem = weighted(
        lambda params, fixed, batch: response_losses(assemble_params(params, fixed["base"]), batch),
        outer=outer.losses,
    )
    return CompiledFunctions(chosen_objective, outer, optimizer, plain, step, problem, train_step(problem, optimizer))


def make_candidate_trainers(config: RefineConfig, offline_task: TextTask) -> dict[RefineMethod, CandidateTrainer]:
    """What trains each configured method; nothing is compiled again for another round.

    Only validation steers, in the methods that use it. Dev is seen by `unrolled` alone, which measures by it how
    reliable its last hypergradient is; test stays unseen.
    """
    functions = compiled_functions_for_config(config, offline_task)

    def hide_held_out(task: TextTask, name: RefineMethod) -> TextTask:
        """The task of a method: BMO's weights are a closed form of the plain losses, so it trains on these."""
        seen = ("validation", "dev") if name == "unrolled" else ("validation",)
        task = task._replace(held_out_streams={part: task.held_out_streams[part] for part in seen})
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
        "ica": partial(train_scored_candidate, config),
    }
    return {name: make_trainer(name, train_functions[name]) for name in config.refine.methods}


def candidate_outer(outer: OuterSection, name: RefineMethod) -> OuterSection:
    """The section outer of a candidate; one whose weights do not move is trained as that of `unrolled`."""
    return replace(outer, method="unrolled" if name == "uniform" or name == "ica" else name)


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
    weights = np.ones(round_task.task.num_examples, jnp.result_type(float))
    return Candidate(train_once(config, round_task, weights, session, round_number), weights)


def train_scored_candidate(
    config: RefineConfig, round_task: RoundTask, sampler_params: Params, session: Session, round_number: int
) -> Candidate:
    """Plain training with the weights that the scores of the round give (`scores_to_weights`); these are made before
    it, and stay."""
    assert round_task.scores is not None  # the round has made them
    weights = scores_to_weights(config.weights, round_task, round_task.scores.values)
    return Candidate(train_once(config, round_task, weights, session, round_number), weights)


def train_once(
    config: RefineConfig,
    round_task: RoundTask,
    weights: Float[np.ndarray, "examples"],
    session: Session,
    round_number: int,
) -> Params:
    """The parameters after one training run with given weights."""
    trainer = Trainer(round_task.task, candidate_outer(config.outer, "uniform"), session)
    placed_weights = replicate(round_task.task.mesh, jnp.asarray(weights, jnp.result_type(float)))
    start = trainer.init_state(round_task.task.init_params(config.train.seed))
    stream = round_task.task.training_stream(config.data.seed + ROUND_SEED_STRIDE * round_number)
    return trainer.run(placed_weights, start, stream, outer_step=0).end.params


def train_unrolled_candidate(
    config: RefineConfig, round_task: RoundTask, sampler_params: Params, session: Session, round_number: int
) -> Candidate:
    """outer.steps times: train, estimate the exact hypergradient of every example, step its weight; then train.

        h <- h - rate e / rms(e),  e_i = (d L_v(theta_T(w)) / d w_i) / multiplicity_i, through the weighting

    A hypergradient over its multiplicity, so that G responses which each count 1/G go where one that counts 1 would.
    With outer.estimate pooled or auto, rows of like losses share their e_i (`StepPooling`), each counted by its
    multiplicity. With outer.validation_folds one fold of validation judges in each step and the others are trained on
    with a weight that they share, learned too; the last training is on all of them. Every training run starts from the
    same model, in a data order of its own; the last one is the candidate. With one step these are the hypergradients at
    equal weights: one backward pass judges every response.

    It takes the steps of `OuterLoop` (`train_and_estimate`) without what that loop reads to choose the best step: dev
    is kept for the test of the candidate, so the last weights count, and the model is trained once more with them.
    Every step is made, unless two halves of validation see nothing but noise (outer.reliability_floor), or the next
    one would leave the weights on few examples (outer.ess_floor), which is then not made. Dev tells how far the last
    hypergradient speaks for other examples, and nothing in the round depends on that (`choose_round_evidence`).
    """
    loop = _OuterSteps(config, round_task, session, round_number)
    while not loop.is_done():
        loop.take_step()
    return loop.train_candidate()


class _PooledSteps(NamedTuple):
    """What the pooled steps of a round carry beside the logits."""

    state: PoolingState
    losses: Float[Array, "examples"]
    """The loss of each row, nats, at the end of the round's first training."""


class _OuterSteps:
    """The outer steps of a round's unrolled candidate, which go on where a stopped run left them."""

    def __init__(self, config: RefineConfig, round_task: RoundTask, session: Session, round_number: int):
        self.round_task, self.task, self.session, self.round_number = round_task, round_task.task, session, round_number
        self.outer = candidate_outer(config.outer, "unrolled")
        self.seed = config.data.seed + ROUND_SEED_STRIDE * round_number
        self.trainer = Trainer(self.task, self.outer, session)
        self.start = self.trainer.init_state(self.task.init_params(config.train.seed))
        self.multiplicity = replicate(self.task.mesh, jnp.asarray(round_task.multiplicity, jnp.result_type(float)))
        self.hyper = replicate(self.task.mesh, jnp.zeros(self.task.num_examples))
        self.validation_weight: SharedWeightVariable | None = None
        if self.outer.validation_folds:
            self.validation_weighting = shared_weighting(self.task.corpus.num_examples - self.task.num_examples)
            self.validation_weight = replicate(self.task.mesh, self.validation_weighting.init())
        self.step_pooling: StepPooling | None = None
        self.pooled: _PooledSteps | None = None
        if pools_steps(self.task, self.outer):
            self.pooled = _PooledSteps(
                empty_pooling_state(self.task.mesh, self.task.num_examples, self.hyper), self.hyper
            )
            self.step_pooling = StepPooling(
                self.task, session, self.trainer.draw_halves("validation", self.seed), estimate=self.outer.estimate,
                train_seed=config.train.seed + ROUND_SEED_STRIDE * round_number, multiplicity=round_task.multiplicity,
            )  # fmt: skip
        self.records: list[dict[str, Any]] = []
        self.folder = session.folder / "checkpoints" / "outer"
        if restored := checkpoint.restore_checkpoint(self.folder, self._saved_arrays()):
            self._restore_arrays(restored.tree)
            self.records = restored.meta["records"]
            session.restore_work(sum(record["work"] for record in self.records))

    def is_done(self) -> bool:
        """Whether all steps were made, validation is used up, or the weights would stand on few examples."""
        is_done = len(self.records) == self.outer.steps or self._is_used_up() or self._is_concentrated()
        return bool(distributed.broadcast_from_first(is_done))

    def take_step(self) -> None:
        """Train, estimate, measure, step the weights, save."""
        step, work_before = len(self.records), self.session.work_done
        weights, seed = self._weights(), self.seed + step
        is_fitted = self.round_task.is_fitted or step > 0
        turn = take_turn(self.task, self.outer.validation_folds, self.seed, step)
        sizes = RoundSizes(count_judges(self.task, turn), self.trainer.num_held_out("dev"))
        evidence = choose_round_evidence(self.outer, step, sizes, is_fitted=is_fitted)
        halves_seed = seed if evidence == "halves" else None
        if self.pooled:  # it compares the halves of different steps, so they must be the same
            halves_seed = self.seed if measures_reliability(self.outer, step, self.outer.steps - 1) else None
        trajectory, estimate = train_and_estimate(
            self.trainer, weights, self.start, turn_training_stream(self.task, seed, turn), step,
            is_first=self.round_number == step == 0,
            halves_seed=halves_seed, dev_seed=seed if evidence == "dev" else None, turn=turn,
            with_product_error=step == 0,
        )  # fmt: skip
        check_hypergradient_finite(estimate, f"round {self.round_number}, outer step {step},")
        draw = measure_estimate_reliability(
            self.task, self.trainer, weights, estimate, turn,
            trained=self.round_task.trained, is_learned=is_fitted or evidence == "dev",
        )  # fmt: skip
        learning_rate = jnp.asarray(outer_learning_rate(self.outer, step / self.outer.steps))
        of_rows, of_validation = jnp.split(estimate.grad, [self.task.num_examples])
        slope = self._pull_back(of_rows)
        pooling: dict[str, Any] = {}
        if self.pooled:
            slope, pooling = self._pool(slope, estimate, trajectory.end.params)
        stepped = _step(self.outer.max_step, self.hyper, slope, learning_rate)
        stepped_weights = hyper_to_weights(self.outer.weighting, stepped, self.multiplicity)
        share = certify.effective_share(distributed.fetch_from_first(stepped_weights), self.multiplicity)
        validation_weight = self._known_validation_weight()
        if is_above_floor := share >= self.outer.ess_floor:
            self.hyper = stepped
            self._step_validation_weight(of_validation, learning_rate)
        record = {
            "step": step,
            "round": self.round_number,
            "validation": float(estimate.validation_loss),
            "share_after": share,
            "is_stepped": is_above_floor,
            **reliability_to_record(draw),
            **product_error_to_record(estimate),
            **pooling,
            **({} if validation_weight is None else {"validation_weight": validation_weight}),
            "work": self.session.work_done - work_before,
        }
        self.records.append(record)
        self.session.log.write({"event": "outer", **record})
        self.session.write_histogram("weights", step, lambda: distributed.fetch_to_host(weights)[: len(of_rows)])
        checkpoint.save_checkpoint(self.folder, step, self._saved_arrays(), {"records": self.records})
        self.session.mark_saved()

    def _pull_back(self, hypergradient: Array) -> Float[Array, "examples"]:
        return _pull_back_per_whole(self.outer.weighting, self.hyper, self.multiplicity, hypergradient)

    def _pool(self, slope: Array, estimate: Estimate, end: Params) -> tuple[Array, dict[str, Any]]:
        """The direction of a pooled step, and how reliable its parts are, as the record has it."""
        assert self.pooled is not None and self.step_pooling is not None
        if not self.records:
            losses = example_losses(self.task, end)
            self.session.advance(FORWARD_WORK * steps_per_epoch(self.task))
            placed_losses = replicate(self.task.mesh, jnp.asarray(losses, self.hyper.dtype))
            self.pooled = self.pooled._replace(losses=placed_losses)
        has_halves = isinstance(estimate.half_difference, jax.Array)
        difference = self._pull_back(estimate.half_difference) if has_halves else None
        last = PartReliability(**self.records[-1]["pooling"]) if self.records else None
        direction, reliability, state = self.step_pooling.take(
            self.pooled.state, slope, difference, self.pooled.losses, last
        )
        self.pooled = self.pooled._replace(state=state)
        return direction, {"pooling": reliability._asdict()}

    def _saved_arrays(self) -> Any:
        beside = self.pooled or self.validation_weight  # pooled steps compare halves of validation that judges alone
        return (self.hyper, beside) if beside else self.hyper

    def _restore_arrays(self, saved: Any) -> None:
        if self.pooled:
            self.hyper, self.pooled = saved
        elif self.validation_weight:
            self.hyper, self.validation_weight = saved
        else:
            self.hyper = saved

    def train_candidate(self) -> Candidate:
        """The model that is trained with the last weights, in an order of its own."""
        weights, place = self._weights(), self.outer.steps
        stream = turn_training_stream(self.task, self.seed + place, end_turn(self.task, self.outer.validation_folds))
        trajectory = self.trainer.run(weights, self.start, stream, outer_step=place)
        reliability = summarize_reliability(
            self.records,
            is_used_up=self._is_used_up(),
            is_concentrated=self._is_concentrated(),
            why_not=why_no_reliability(self.task, self.outer),
        )
        of_rows = distributed.fetch_to_host(weights)[: self.task.num_examples]
        return Candidate(trajectory.end.params, of_rows, reliability, self._known_validation_weight())

    def _weights(self) -> Float[Array, "trained"]:
        """Of all that may be trained on: the rows and, with folds, the validation examples behind them."""
        of_rows = hyper_to_weights(self.outer.weighting, self.hyper, self.multiplicity)
        if self.validation_weight is None:
            return of_rows
        return jnp.concatenate([of_rows, self.validation_weighting.weights(self.validation_weight)])

    def _known_validation_weight(self) -> float | None:
        """With folds, the weight that the validation examples share."""
        return None if self.validation_weight is None else float(jnp.exp(self.validation_weight.log_weight))

    def _step_validation_weight(self, hypergradient: Float[Array, "validation"], learning_rate: Array) -> None:
        """With folds, step the weight that the validation examples share."""
        if self.validation_weight is not None:
            variable, weighting = self.validation_weight, self.validation_weighting
            grad = weightings.weighting_vjp(weighting, variable, hypergradient)
            self.validation_weight = weighting.step(variable, grad, learning_rate, self.outer.max_step)

    def _is_used_up(self) -> bool:
        is_last = len(self.records) == self.outer.steps
        return not is_last and is_reliability_at_floor(self.records, self.outer.reliability_floor)

    def _is_concentrated(self) -> bool:
        return bool(self.records) and not self.records[-1].get("is_stepped", True)  # a run of an earlier version


def summarize_reliability(
    records: list[dict[str, Any]], *, is_used_up: bool, is_concentrated: bool, why_not: str
) -> dict[str, Any]:
    """What result.json holds of the reliability of a candidate's hypergradients: the draws of its first and of its last
    step, None where nothing was measured; how many hypergradients there were; whether validation was used up before all
    steps were made, whether the step of the last one would have left the weights on few examples, and why nothing could
    be measured, in words. Of pooled steps how reliable their parts were in the first and in the last, too, and where
    outer.product_precision is lower what that changes in the first."""
    pooled = [record["pooling"] for record in records if "pooling" in record]
    return {
        "first": records[0]["reliability_draw"],
        "last": records[-1]["reliability_draw"],
        "steps": len(records),
        "is_used_up": is_used_up,
        "is_concentrated": is_concentrated,
        "why_not": why_not,
        **({"pooling": {"first": pooled[0], "last": pooled[-1]}} if pooled else {}),
        **{key: records[0][key] for key in ("product_error",) if key in records[0]},
    }


def product_error_to_record(estimate: Estimate) -> dict[str, float]:
    """What a record holds of what lower precision of the products in the steps back changes, where it was measured."""
    error = float(estimate.checks.product_error)
    return {} if np.isnan(error) else {"product_error": error}


def why_no_reliability(task: TextTask, outer: OuterSection) -> str:
    """Why the reliability of no hypergradient can be known, in words; nothing where it can."""
    if not judges_by_examples(task):
        return "a target of the parameters alone has no other examples"
    return "" if outer.reliability_every else "outer.reliability_every is 0"


@lru_cache(maxsize=2)
def shared_weighting(num_shared: int) -> Weighting:
    """One weight, learned, for so many examples; that of the rows is beside it."""
    return weightings.append_shared_weight(weightings.sigmoid(0), 0, num_shared)


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


@partial(jax.jit, static_argnums=0)
def _pull_back_per_whole(name: str, hyper: Hyper, multiplicity: Array, hypergradient: Array) -> Hyper:
    """d L_v / d logit over multiplicity: what a whole row would contribute."""
    hyper_gradient = jax.vjp(lambda h: hyper_to_weights(name, h, multiplicity), hyper)[1](hypergradient)[0]
    return jnp.where(multiplicity > 0, hyper_gradient / jnp.where(multiplicity > 0, multiplicity, 1), 0)


@partial(jax.jit, static_argnums=0)
def _step(cap: float, hyper: Hyper, slope: Hyper, learning_rate: Array) -> Hyper:
    return weightings.normalized_gradient_step(learning_rate, cap)(hyper, slope)


ESTIMANDS = {
    "unrolled": "L_v(θ_T(w)), the training run itself: exact",
    "penalty": single_loop.OPTIMISTIC_ESTIMAND,
    "bmo": "multi-objective: least L_v among weakly Pareto-optimal θ; it trains on V",
    "mixing": single_loop.MIXING_ESTIMAND,
    "ica": "log p(y | demonstrations of V, x) - log p(y | x), read by forward passes of the model that is given",
    "uniform": "the mean training loss; V is not used",
}
