"""Rewards of the responses of a round: what each of them did for the target, by exact hypergradients."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bilevel_jax.commands.refine.artifacts import run_saved_job
from bilevel_jax.commands.refine.candidates import (
    ROUND_SEED_STRIDE,
    candidate_outer,
    product_error_to_record,
    summarize_reliability,
    why_no_reliability,
)
from bilevel_jax.commands.refine.rollouts import Rollouts, RoundTask
from bilevel_jax.core.training import train_step
from bilevel_jax.core.types import Estimate, Params, Problem, PyTree, TrainStep
from bilevel_jax.runs.budget.work import count_candidate_work
from bilevel_jax.runs.config.load import RefineConfig
from bilevel_jax.runs.config.schema import OuterSection, SingleLoopSection
from bilevel_jax.runs.engine.outer_loop import train_and_estimate
from bilevel_jax.runs.engine.reliability import (
    RoundSizes,
    choose_round_evidence,
    measure_estimate_reliability,
    reliability_to_record,
)
from bilevel_jax.runs.engine.trainer import Trainer, check_hypergradient_finite
from bilevel_jax.runs.infra.distributed import fetch_from_first
from bilevel_jax.runs.infra.placement import replicate
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.scoring.token_hypergradients import token_weighted


class Rewards(NamedTuple):
    """What the responses of a round are worth: minus the derivative of the target's loss by the weight of each."""

    responses: Float[np.ndarray, "responses"]
    """Above 0 where a larger weight of the response would lower the target's loss."""
    tokens: list[Float[np.ndarray, "tokens"]] | None
    """The same of each token of a response; None where they were not asked for. Their sum is the response's."""
    student: Params
    """The student that was trained on the round's rows at weight 1."""
    target_loss: float
    """Of that student, on validation."""
    reliability: dict[str, Any]
    """How far they speak for other validation examples, as differences between the responses to a question
    (`summarize_reliability`)."""
    cost: dict[str, float]
    """Work and seconds of training it and going back, also of a run that was stopped in between."""


def compute_rewards(
    config: RefineConfig, round_task: RoundTask, start_params: Params, session: Session, number: int
) -> Rewards:
    """Train a student on the rows of a round at weight 1, and go back through its training.

        r_j = - d L_v(theta_T(w)) / d w_j / m_j   at w = 1,   m_j the multiplicity of response j

    Stored when it is done; a stop in the middle goes on from there.

    Raises ValueError where the target does not change with any of the responses.
    """
    part = session.part_session(rewards_folder(session, number).name)
    task, end = round_task.task, part.folder / "checkpoints" / "end"
    by_token = config.reinforce.reward == "token"
    num_tokens = task.num_examples * (task.layout.length + 1)
    tables = (jnp.ones(task.num_examples), jnp.ones(num_tokens) if by_token else None)
    structure = (start_params, *replicate(task.mesh, tables))

    def differentiate() -> tuple[PyTree, dict[str, Any]]:
        student, estimate, by_place, reliability = _differentiate(config, round_task, start_params, part, number)
        return (student, estimate.grad, by_place), {
            "target_loss": float(estimate.validation_loss), "reliability": reliability,
        }  # fmt: skip

    (student, by_example, by_place), measured = run_saved_job(session, number, "rewards", end, structure, differentiate)
    responses, tokens = _collect_rewards(round_task, by_example, by_place, number)
    target_loss, reliability = measured.pop("target_loss"), measured.pop("reliability")
    return Rewards(responses, tokens, student, target_loss, reliability, measured)


def count_reward_work(outer: OuterSection, max_steps: int, sizes: RoundSizes, *, is_fitted: bool) -> float:
    """What rewards cost beside the training of their student, in training steps."""
    whole = count_candidate_work(
        "unrolled", _one_step(outer), SingleLoopSection(), max_steps, sizes, is_fitted=is_fitted
    )
    return whole - 2 * max_steps  # the student's training is that of `uniform`, and none follows


def _one_step(outer: OuterSection) -> OuterSection:
    """Rewards are the hypergradients of one outer step, at weight 1."""
    return replace(candidate_outer(outer, "unrolled"), steps=1)


def rewards_folder(session: Session, number: int) -> Path:
    """Where the rewards of a round are kept until the round is saved."""
    return session.folder / "parts" / f"round {number} rewards"


def check_responses(rollouts: Rollouts, number: int) -> None:
    """Raise ValueError where no response of a round has any text: there is nothing to learn from."""
    if not any(text.strip() for text in rollouts.texts):
        remedy = "Raise reinforce.kl_coefficient, or lower reinforce.learning_rate." if number else "Ask others."
        raise ValueError(
            f"all {len(rollouts.texts)} responses of round {number} are empty, so the generator has nothing to learn "
            f"from. {remedy}"
        )


def _differentiate(
    config: RefineConfig, round_task: RoundTask, start_params: Params, session: Session, number: int
) -> tuple[Params, Estimate, jax.Array | None, dict[str, Any]]:
    """(the student, the hypergradient of each example, that of each place of a token or None, its reliability)."""
    streams = round_task.task.held_out_streams
    task = round_task.task._replace(held_out_streams={part: streams[part] for part in ("validation", "dev")})
    ones = replicate(task.mesh, jnp.ones(task.num_examples))
    weights: Any = ones
    by_token = config.reinforce.reward == "token"
    if by_token:
        problem, step = _token_programs(task.problem, task.optimizer, task.num_examples, task.layout.length + 1)
        task = task._replace(problem=problem, train_step=step)
        weights = (ones, replicate(task.mesh, jnp.ones(task.num_examples * (task.layout.length + 1))))
    outer, seed = _one_step(config.outer), config.data.seed + ROUND_SEED_STRIDE * number
    trainer = Trainer(task, outer, session)
    sizes = RoundSizes(trainer.num_held_out("validation"), trainer.num_held_out("dev"))
    evidence = choose_round_evidence(outer, 0, sizes, is_fitted=round_task.is_fitted)
    trajectory, estimate = train_and_estimate(
        trainer, weights, trainer.init_state(start_params), task.training_stream(seed), 0, is_first=number == 0,
        halves_seed=seed if evidence == "halves" else None, dev_seed=seed if evidence == "dev" else None,
        with_product_error=True,
    )  # fmt: skip
    check_hypergradient_finite(estimate, f"the rewards of round {number}")
    by_place = None
    if by_token:
        by_place = estimate.grad[1]
        estimate = _map_tables(lambda tables: tables[0], estimate)
    rows, draws = np.flatnonzero(round_task.response_numbers >= 0), config.generate.num_generations
    scales = _group_scales(estimate.grad[rows], draws, config.reinforce.advantages)
    compared = _map_tables(lambda table: table.at[rows].set(scales * _less_group_mean(table[rows], draws)), estimate)
    draw = measure_estimate_reliability(
        task, trainer, ones, compared,
        trained=rows, is_learned=round_task.is_fitted or evidence == "dev",
    )  # fmt: skip
    summary = summarize_reliability(
        [reliability_to_record(draw) | product_error_to_record(estimate)],
        is_used_up=False,
        is_concentrated=False,
        why_not=why_no_reliability(task, outer),
    )
    return trajectory.end.params, estimate, by_place, summary


def _map_tables(function: Callable[[Any], Any], estimate: Estimate) -> Estimate:
    """The estimate with another table of each outer loss; where none was measured there is none."""
    return estimate._replace(
        grad=function(estimate.grad),
        half_difference=function(estimate.half_difference) if jax.tree.leaves(estimate.half_difference) else (),
        independent=tuple(map(function, estimate.independent)),
    )


def _less_group_mean(parts: Float[Array, "responses"], num_generations: int) -> Float[Array, "responses"]:
    """Each response's part less the mean of the responses to its question.

    The responses to a question have one multiplicity, so they are compared as the rewards are.
    """
    groups = parts.reshape(-1, num_generations)
    return (groups - groups.mean(1, keepdims=True)).ravel()


def _group_scales(parts: Float[Array, "responses"], num_generations: int, mode: str) -> Float[Array, "responses"]:
    """What the differences within a question count: 1 (`batch`), or one over their spread (`group`), as in the
    advantages that the generator learns from."""
    spread = jnp.sqrt(jnp.mean(_less_group_mean(parts, num_generations).reshape(-1, num_generations) ** 2, 1))
    scale = jnp.where(spread > 0, 1 / jnp.where(spread > 0, spread, 1), 0) if mode == "group" else jnp.ones_like(spread)
    return jnp.repeat(scale, num_generations)


@lru_cache(maxsize=2)
def _token_programs(problem: Problem, optimizer: Any, num_examples: int, places: int) -> tuple[Problem, TrainStep]:
    """The problem with a factor for each place of each example, and its step; compiled once for all rounds."""
    by_token = token_weighted(problem, np.arange(num_examples) * places)
    return by_token, train_step(by_token, optimizer)


def _collect_rewards(
    round_task: RoundTask, by_example: Any, by_place: Any, number: int
) -> tuple[Float[np.ndarray, "responses"], list[Float[np.ndarray, "tokens"]] | None]:
    """The rewards of the responses, and of their tokens where they were asked for."""
    rows = np.flatnonzero(round_task.response_numbers >= 0)
    multiplicity = round_task.multiplicity[rows]
    responses = -np.asarray(fetch_from_first(by_example), float)[rows] / multiplicity
    if not np.any(responses):
        raise ValueError(
            f"every reward of round {number} is 0: nothing that the model was trained on moves the target. Choose a "
            "target that reads what training changes, or train more (train.max_steps, optimizer.learning_rate)."
        )
    if by_place is None:
        return responses, None
    corpus = round_task.task.corpus
    table = -np.asarray(fetch_from_first(by_place), float).reshape(round_task.task.num_examples, -1)
    tokens = []
    for row, share in zip(rows, multiplicity, strict=True):
        mask = corpus.target_mask[int(corpus.offsets[row]) : int(corpus.offsets[row + 1])]
        tokens.append(table[row, : len(mask)][mask] / share)
    return responses, tokens
