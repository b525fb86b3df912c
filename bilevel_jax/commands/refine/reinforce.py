"""A round of `refine` whose responses train the generator: rewards, policy steps, and what is said of them."""

import math
from typing import Any, NamedTuple

import numpy as np

from bilevel_jax.commands.refine.candidates import Candidate
from bilevel_jax.commands.refine.generator import Generator, num_policy_steps, policy_step_work, update_generator
from bilevel_jax.commands.refine.rewards import Rewards, check_responses, compute_rewards, count_reward_work
from bilevel_jax.commands.refine.rollouts import Rollouts, RoundTask, count_questions
from bilevel_jax.commands.refine.text_statistics import (
    describe_degeneration,
    describe_overfitting,
    measure_responses,
)
from bilevel_jax.core.types import Params, TrainState
from bilevel_jax.lm.data.batches import steps_per_epoch
from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.runs.config.load import RefineConfig
from bilevel_jax.runs.config.rules import trains_generator
from bilevel_jax.runs.engine.reliability import RoundSizes
from bilevel_jax.runs.engine.single_loop import FORWARD_WORK
from bilevel_jax.runs.infra.session import Session


class ReinforcedRound(NamedTuple):
    """What a round gives whose responses train the generator."""

    state: TrainState
    """Of the generator."""
    rewards: Rewards
    student: Candidate
    """The student whose training gave the rewards, which is the candidate `uniform`."""
    record: dict[str, Any]
    """What the record of the round says of it, but for the student's dev loss."""


def reinforce_round(
    config: RefineConfig,
    generator: Generator,
    state: TrainState,
    round_task: RoundTask,
    rollouts: Rollouts,
    start_params: Params,
    session: Session,
    number: int,
) -> ReinforcedRound:
    """Reward the responses of a round, and train the generator by that."""
    check_responses(rollouts, number)
    session.set_phase(f"round {number}: rewards")
    rewards = compute_rewards(config, round_task, start_params, session, number)
    session.set_phase(f"round {number}: generator")
    update = update_generator(config, generator, state, round_task, rollouts, rewards, session, number)
    reward_record = {
        "target_loss": rewards.target_loss,
        "reward": float(rewards.responses.mean()),
        "reward_spread": float(rewards.responses.std()),
        "reliability": rewards.reliability,
    }
    student = Candidate(rewards.student, np.ones(round_task.task.num_examples))
    record = reward_record | update.record | measure_responses(rollouts, rewards.responses)
    return ReinforcedRound(update.state, rewards, student, record)


def check_round_fits(config: RefineConfig, num_questions: int) -> None:
    """Raise ValueError where the student sees fewer examples than a round has: the rest would have rewards of 0."""
    asked, draws = count_questions(config, num_questions), config.generate.num_generations
    num_offline = num_questions - (0 if config.refine.keep_offline else asked)
    num_rows = (asked + math.ceil(num_offline / draws)) * draws  # offline examples stand in groups, too
    seen = config.train.max_steps * config.train.global_batch_size
    if seen < num_rows:
        raise ValueError(
            f"train.max_steps * train.global_batch_size = {seen:,} is less than the {num_rows:,} examples of a round: "
            "the student would not see some responses, and they would have no reward. Set train.max_steps to at least "
            f"{math.ceil(num_rows / config.train.global_batch_size)}, or ask fewer questions (refine.share, "
            "generate.num_generations)."
        )


def count_reinforce_work(config: RefineConfig, num_questions: int, sizes: RoundSizes, *, is_fitted: bool) -> float:
    """What one round costs beside its candidates, in training steps; 0 where no generator is trained."""
    if not trains_generator(config):
        return 0.0
    asked = count_questions(config, num_questions)
    section, num_responses = config.reinforce, asked * config.generate.num_generations
    epoch = steps_per_epoch(num_responses, config.train.global_batch_size)
    steps = num_policy_steps(section, num_responses, config.train.global_batch_size)
    rewards = count_reward_work(config.outer, config.train.max_steps, sizes, is_fitted=is_fitted)
    return rewards + steps * policy_step_work(section) + 2 * 2 * FORWARD_WORK * epoch


def describe_generator(config: RefineConfig, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What result.json holds of all rounds: whether each student starts anew, and remarks in sentences."""
    rounds, restarts = [record["generator"] for record in records], config.refine.start_from == "first"
    remarks = describe_degeneration(rounds[0], rounds[-1])
    if restarts:
        remarks += describe_overfitting(rounds)
    if equal := sum(record["equal_groups"] for record in rounds):
        remarks.append(
            f"{format_count('group', equal)} of responses to one question had equal rewards, and taught nothing: "
            "mostly equal responses."
        )
    return {"remarks": remarks, "restarts": restarts}
