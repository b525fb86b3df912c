"""Rewards of the responses of a round: what each of them did for the target, by exact hypergradients."""

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bilevel_jax.commands.refine.artifacts import run_saved_job
from bilevel_jax.commands.refine.candidates import ROUND_SEED_STRIDE, candidate_outer
from bilevel_jax.commands.refine.rollouts import Rollouts, RoundTask
from bilevel_jax.core.training import train_step
from bilevel_jax.core.types import Params, Problem, PyTree, TrainStep
from bilevel_jax.runs.config.load import RefineConfig
from bilevel_jax.runs.engine.outer_loop import train_and_estimate
from bilevel_jax.runs.engine.trainer import Trainer, check_hypergradient_finite
from bilevel_jax.runs.infra.distributed import fetch_to_host
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
    structure = (start_params, jnp.ones(task.num_examples), jnp.ones(num_tokens) if by_token else None)

    def differentiate() -> tuple[PyTree, dict[str, Any]]:
        student, by_example, by_place, loss = _differentiate(config, round_task, start_params, part, number)
        return (student, by_example, by_place), {"target_loss": loss}

    (student, by_example, by_place), measured = run_saved_job(session, number, "rewards", end, structure, differentiate)
    responses, tokens = _collect_rewards(round_task, by_example, by_place, number)
    return Rewards(responses, tokens, student, measured.pop("target_loss"), measured)


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
) -> tuple[Params, jax.Array, jax.Array | None, float]:
    """(the student, the hypergradient of each example, of each place of a token or None, the student's loss)."""
    task = round_task.task._replace(held_out_streams={"validation": round_task.task.held_out_streams["validation"]})
    weights: Any = jnp.ones(task.num_examples)
    by_token = config.reinforce.reward == "token"
    if by_token:
        problem, step = _token_programs(task.problem, task.optimizer, task.num_examples, task.layout.length + 1)
        task = task._replace(problem=problem, train_step=step)
        weights = (weights, jnp.ones(task.num_examples * (task.layout.length + 1)))
    trainer = Trainer(task, candidate_outer(config.outer, "unrolled"), session)
    stream = task.training_stream(config.data.seed + ROUND_SEED_STRIDE * number)
    trajectory, estimate = train_and_estimate(
        trainer, weights, trainer.init_state(start_params), stream, 0, is_first=number == 0
    )
    check_hypergradient_finite(estimate, f"the rewards of round {number}")
    by_example, by_place = estimate.grad if by_token else (estimate.grad, None)
    return trajectory.end.params, by_example, by_place, float(estimate.validation_loss)


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
    responses = -np.asarray(fetch_to_host(by_example), float)[rows] / multiplicity
    if not np.any(responses):
        raise ValueError(
            f"every reward of round {number} is 0: nothing that the model was trained on moves the target. Choose a "
            "target that reads what training changes, or train more (train.max_steps, optimizer.learning_rate)."
        )
    if by_place is None:
        return responses, None
    corpus = round_task.task.corpus
    table = -np.asarray(fetch_to_host(by_place), float).reshape(round_task.task.num_examples, -1)
    tokens = []
    for row, share in zip(rows, multiplicity, strict=True):
        mask = corpus.target_mask[int(corpus.offsets[row]) : int(corpus.offsets[row + 1])]
        tokens.append(table[row, : len(mask)][mask] / share)
    return responses, tokens
