"""A generator that is trained by policy gradients on the rewards of its responses."""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from bilevel_jax.commands.refine.rewards import Rewards
from bilevel_jax.commands.refine.rollouts import Rollouts, RoundTask
from bilevel_jax.commands.refine.text_statistics import describe_degeneration
from bilevel_jax.core.problem import weighted
from bilevel_jax.core.training import init_train_state, train_step
from bilevel_jax.core.types import Batch, Frozen, Params, TrainState, TrainStep
from bilevel_jax.lm import models
from bilevel_jax.lm.data.examples import format_count
from bilevel_jax.lm.data.render import get_chat_template
from bilevel_jax.lm.data.tokens import load_tokenizer
from bilevel_jax.lm.losses.policy import policy_losses, policy_terms
from bilevel_jax.lm.losses.sft import assemble_params, reduce_losses, sum_per_sequence
from bilevel_jax.runs.config.load import RefineConfig
from bilevel_jax.runs.config.schema import OptimizerSection, ReinforceSection
from bilevel_jax.runs.engine.artifacts import write_model
from bilevel_jax.runs.engine.trainer import HVP_WORK, REPLAY_WORK
from bilevel_jax.runs.infra import sharding
from bilevel_jax.runs.infra.placement import replicate_unplaced
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.tasks.evaluation import evaluate_per_example
from bilevel_jax.runs.tasks.optimizers import build_optimizer
from bilevel_jax.runs.tasks.text import TextTask, load_params

POLICY_WORK, KL_WORK = 1.0, 1 / 3
"""Work of a policy step in training steps, and what the model at its start adds."""
OVERFITTING_FACTOR = 1.05
"""A dev loss this much above its least is told where validation loss fell on."""
MIN_SPREAD = 1e-6
"""Rewards of a group that differ by less, as a share of the root mean square of all, are taken for equal."""


class PolicyPrograms(NamedTuple):
    """The compiled functions of a generator."""

    optimizer: optax.GradientTransformation
    step: TrainStep
    measure: Callable[[Params, Frozen, Batch], Float[Array, "examples 2"]]
    """Mean over the tokens of a response of the divergence from the start, nats, and of the share that is clipped."""


class Generator(NamedTuple):
    """A model that answers questions and is trained by what its answers are worth."""

    decoder: models.Decoder
    base_params: Params | None
    """The frozen base under LoRA."""
    start: Params
    """Its trained parameters before the first round, which the divergence is measured from."""
    programs: PolicyPrograms

    def init_state(self, task: TextTask) -> TrainState:
        """The state before the first round."""
        return replicate_unplaced(task.mesh, init_train_state(self.programs.optimizer, self.start))

    @property
    def frozen(self) -> Frozen:
        """The constants of its losses."""
        return {"base": self.base_params, "start": self.start}


def prepare_generator(config: RefineConfig, task: TextTask) -> Generator:
    """The generator of a run, at its start: the model itself, or that of reinforce.model.

    Raises ValueError for one that reads other tokens than the model, or prompts of another form.
    """
    section = config.reinforce
    if not section.model:
        decoder, base, start = task.decoder, task.base_params, task.init_params(config.train.seed)
    else:
        decoder, base, start = _load_other_model(config, task)
    return Generator(decoder, base, start, _build_programs(section, decoder))


def _load_other_model(config: RefineConfig, task: TextTask) -> tuple[models.Decoder, Params | None, Params]:
    path = config.reinforce.model
    tokenizer, architecture = load_tokenizer(path), models.read_config(path)
    check_same_tokens(tokenizer, task.tokenizer, path)
    if architecture.max_length < task.layout.length:
        raise ValueError(
            f"reinforce.model = {path} reads {architecture.max_length} tokens, and a question with its response has up "
            f"to {task.layout.length}. Lower generate.max_new_tokens, or choose a model with a longer context."
        )
    rules = sharding.parse_sharding_rules(config.mesh.sharding_rules, task.mesh)
    model = config.model.__class__(**(vars(config.model) | {"name_or_path": path}))
    base, init_params = load_params(model, config.lora, architecture, task.mesh, rules)
    decoder = models.make_decoder(
        architecture, remat=config.model.remat, gather_params=sharding.parameter_gatherer(task.mesh, rules)
    )
    return decoder, base, init_params(config.train.seed)


def check_same_tokens(tokenizer: Any, of_model: Any, path: str) -> None:
    """Raise ValueError unless two tokenizers give the same numbers to the same text, and the same form to a prompt."""
    own, model = tokenizer.get_vocab(), of_model.get_vocab()
    if own != model:
        other = next((token for token in sorted({*own, *model}) if own.get(token) != model.get(token)), "")
        raise ValueError(
            f"reinforce.model = {path} has another tokenizer than the model: the token {other!r} is "
            f"{own.get(other, 'missing')} there and {model.get(other, 'missing')} here. The model is trained on the "
            "generator's tokens: choose a generator of the same family, or leave reinforce.model out."
        )
    if get_chat_template(tokenizer) != get_chat_template(of_model):
        raise ValueError(
            f"reinforce.model = {path} has another chat template than the model, so it would be asked in a form that "
            "it does not know. Choose a generator with the same template."
        )


@lru_cache(maxsize=4)
def _build_programs(section: ReinforceSection, decoder: models.Decoder) -> PolicyPrograms:
    losses = policy_losses(
        decoder,
        max_ratio_change=section.max_ratio_change,
        kl_coefficient=section.kl_coefficient,
        reduction=section.reduction,
    )
    compute_terms = policy_terms(decoder, max_ratio_change=section.max_ratio_change, with_kl=True)

    def start_params(frozen: Frozen) -> Params:
        return assemble_params(frozen["start"], frozen["base"])

    def response_losses(params: Params, frozen: Frozen, batch: Batch) -> Float[Array, "examples"]:
        return losses(assemble_params(params, frozen["base"]), start_params(frozen), batch)

    def measure(params: Params, frozen: Frozen, batch: Batch) -> Float[Array, "examples 2"]:
        terms = compute_terms(assemble_params(params, frozen["base"]), start_params(frozen), batch)
        means = [
            reduce_losses(sum_per_sequence(values, batch), batch, "example_mean")
            for values in (terms.kl, terms.is_clipped)
        ]
        return jnp.stack(means, axis=-1)

    settings = OptimizerSection(
        learning_rate=section.learning_rate,
        schedule="constant",
        warmup_steps=0,
        b2=0.99,
        max_grad_norm=section.max_grad_norm,
    )
    optimizer = build_optimizer(settings, 1)
    return PolicyPrograms(optimizer, train_step(weighted(response_losses), optimizer), measure)


def compute_advantages(
    rewards: Float[np.ndarray, "questions draws"], mode: str
) -> tuple[Float[np.ndarray, "questions draws"], int]:
    """How much better each response was than the others to its question, and the number of questions that tell nothing.

        group  A = (r - mean of the group) / (standard deviation of the group)
        batch  A = (r - mean of the group) / (root mean square of that over all groups)

    Under `group` each question counts the same, however little its responses differ; under `batch` those count for more
    whose responses differ more. Rewards of a group that are equal give advantages of 0.
    """
    scale = float(np.sqrt(np.mean(rewards**2)))
    centred = rewards - rewards.mean(1, keepdims=True)
    spread = centred.std(1, keepdims=True)
    is_equal = spread[:, 0] <= MIN_SPREAD * scale
    divisor = spread if mode == "group" else np.full_like(spread, np.sqrt(np.mean(centred**2)))
    advantages = np.divide(centred, divisor, out=np.zeros_like(centred), where=~is_equal[:, None] & (divisor > 0))
    return advantages, int(is_equal.sum())


def compute_token_advantages(
    rewards: list[Float[np.ndarray, "tokens"]], draws: int, mode: str
) -> tuple[list[Float[np.ndarray, "tokens"]], int]:
    """The advantage of every token by what comes from it on: R_t = sum of the rewards of tokens t, t + 1, ...

    R_t has the mean of R_t over the group taken off, of the responses that are as long, and is divided as
    `compute_advantages` does, by the spread over all tokens of the group.
    """
    counts = np.array([len(own) for own in rewards])
    returns = np.full((len(rewards), max(1, counts.max(initial=1))), np.nan)
    for row, own in enumerate(rewards):
        returns[row, : len(own)] = np.cumsum(own[::-1])[::-1]
    groups = returns.reshape(-1, draws, returns.shape[1])
    present = np.isfinite(groups)
    filled = np.where(present, groups, 0)
    means = filled.sum(1, keepdims=True) / np.maximum(present.sum(1, keepdims=True), 1)
    centred = np.where(present, groups - means, 0)
    numbers = np.maximum(present.sum((1, 2), keepdims=True), 1)
    spread = np.sqrt((centred**2).sum((1, 2), keepdims=True) / numbers)
    scale = float(np.sqrt((filled**2).sum() / max(present.sum(), 1)))
    is_equal = spread <= MIN_SPREAD * scale
    overall = np.sqrt((centred**2).sum() / max(present.sum(), 1))
    divisor = spread if mode == "group" else np.full_like(spread, overall)
    advantages = np.divide(centred, divisor, out=np.zeros_like(centred), where=~is_equal & (divisor > 0))
    flat = advantages.reshape(returns.shape)
    return [flat[row, :count] for row, count in enumerate(counts)], int(is_equal.sum())


class PolicyUpdate(NamedTuple):
    """A round's update of the generator."""

    state: TrainState
    record: dict[str, Any]


def update_generator(
    config: RefineConfig,
    generator: Generator,
    state: TrainState,
    round_task: RoundTask,
    rollouts: Rollouts,
    rewards: Rewards,
    session: Session,
    number: int,
) -> PolicyUpdate:
    """Take the policy steps of a round: reinforce.epochs passes over its responses, in random order.

    Nothing is saved in the middle: the same call gives the same state, and is short beside what made the rewards.
    """
    section, draws = config.reinforce, rollouts.num_generations
    if rewards.tokens is not None:
        advantages, num_equal = compute_token_advantages(rewards.tokens, draws, section.advantages)
    else:
        by_question, num_equal = compute_advantages(rewards.responses.reshape(-1, draws), section.advantages)
        advantages = [np.full(len(own), value) for own, value in zip(rollouts.tokens, by_question.ravel(), strict=True)]
    task = _make_policy_task(config, round_task, advantages)
    rows = np.flatnonzero(round_task.response_numbers >= 0)
    stream = task.training_stream(config.data.seed + number, rows, packed=False)
    weights, frozen, programs = jnp.ones(task.num_examples), generator.frozen, generator.programs
    everything = task.full_pass_stream(0, rows)
    measure = partial(_mean_terms, programs, frozen, everything, task.corpus.num_examples)
    kl, _ = measure(state.params)
    norms = []
    for place in range(stream.steps):
        batch = stream.batch(place)
        state, metrics = programs.step.forward(state, programs.step.gather(weights, batch), frozen, batch)
        norms.append(float(metrics.grad_norm))
        session.advance(policy_step_work(section))
        session.check_signals()
    if not np.isfinite(norms).all():
        raise FloatingPointError(
            f"the policy gradient of round {number} is not finite. Lower reinforce.learning_rate, or "
            "reinforce.max_ratio_change."
        )
    _, clipped = measure(state.params)
    record = {
        "steps": stream.steps,
        "equal_groups": num_equal,
        "kl": kl,
        "clipped": clipped,
        "grad_norm": float(np.mean(norms)),
    }
    return PolicyUpdate(state, record)


def policy_step_work(section: ReinforceSection) -> float:
    """The work of one policy step, in training steps."""
    return POLICY_WORK + (KL_WORK if section.kl_coefficient else 0)


def num_policy_steps(section: ReinforceSection, num_responses: int, batch_size: int) -> int:
    """The policy steps of a round."""
    return max(1, round(section.epochs * num_responses / batch_size))


def _make_policy_task(
    config: RefineConfig, round_task: RoundTask, advantages: list[Float[np.ndarray, "tokens"]]
) -> TextTask:
    """The round's task with advantages at the tokens of the responses, each response counting once."""
    task, corpus = round_task.task, round_task.task.corpus
    assert corpus.sampler_log_probs is not None  # of every round
    by_token = np.zeros(len(corpus.ids))
    for row in np.flatnonzero(round_task.response_numbers >= 0):
        part = slice(int(corpus.offsets[row]), int(corpus.offsets[row + 1]))
        places = int(corpus.offsets[row]) + np.flatnonzero(corpus.target_mask[part])
        by_token[places] = advantages[int(round_task.response_numbers[row])]
    steps = num_policy_steps(config.reinforce, len(advantages), task.batch_size)
    corpus = corpus.with_sampler_log_probs(corpus.sampler_log_probs, np.ones(corpus.num_examples))
    return task._replace(corpus=corpus.with_advantages(by_token), num_steps=steps, groups=None)


def _mean_terms(
    programs: PolicyPrograms, frozen: Frozen, stream: Any, num_examples: int, params: Params
) -> tuple[float, float]:
    """Mean divergence from the start, nats per token, and share of clipped tokens, over the responses."""
    values = evaluate_per_example(programs.measure, params, frozen, stream, num_examples)
    kl, clipped = np.nanmean(values, axis=0)
    return float(kl), float(clipped)


def is_reinforced(config: RefineConfig) -> bool:
    """Whether the run trains a generator."""
    return config.refine.generator == "reinforce"


def check_round_fits(config: RefineConfig, num_questions: int) -> None:
    """Raise ValueError where the student sees fewer examples than a round has: the rest would have rewards of 0."""
    asked = _num_asked(config, num_questions)
    num_rows = num_questions + asked * config.generate.num_generations - (0 if config.refine.keep_offline else asked)
    seen = config.train.max_steps * config.train.global_batch_size
    if seen < num_rows:
        raise ValueError(
            f"train.max_steps * train.global_batch_size = {seen:,} is less than the {num_rows:,} examples of a round: "
            "the student would not see some responses, and they would have no reward. Set train.max_steps to at least "
            f"{math.ceil(num_rows / config.train.global_batch_size)}, or ask fewer questions (refine.share, "
            "generate.num_generations)."
        )


def _num_asked(config: RefineConfig, num_questions: int) -> int:
    return num_questions if config.refine.questions == "all" else max(1, round(config.refine.share * num_questions))


def count_reinforce_work(config: RefineConfig, num_questions: int) -> float:
    """What rewards and policy steps of one round cost, in training steps; 0 where no generator is trained."""
    if not is_reinforced(config):
        return 0.0
    asked = _num_asked(config, num_questions)
    section, num_responses = config.reinforce, asked * config.generate.num_generations
    steps = num_policy_steps(section, num_responses, config.train.global_batch_size)
    return config.train.max_steps * (1 + REPLAY_WORK + HVP_WORK) + steps * policy_step_work(section)


def describe_generator(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What result.json holds of all rounds: remarks on degenerate text, in sentences."""
    rounds = [record["generator"] for record in records]
    equal = sum(record["equal_groups"] for record in rounds)
    remarks = describe_degeneration(rounds[0], rounds[-1]) + describe_overfitting(rounds)
    if equal:
        remarks.append(
            f"{format_count('group', equal)} of responses to one question had equal rewards, and taught nothing."
        )
    return {"remarks": remarks}


def describe_overfitting(rounds: list[dict[str, Any]]) -> list[str]:
    """A sentence where dev loss of the students rose again while validation, which rewards, fell on; none is good."""
    best = int(np.argmin([record["dev_loss"] for record in rounds]))
    at_best, last = rounds[best], rounds[-1]
    if last["target_loss"] >= at_best["target_loss"] or last["dev_loss"] < OVERFITTING_FACTOR * at_best["dev_loss"]:
        return []
    return [
        f"Since round {best} the generator follows the validation examples themselves: validation loss of "
        f"the student went on from {at_best['target_loss']:.4f} to {last['target_loss']:.4f}, its dev loss rose from "
        f"{at_best['dev_loss']:.4f} to {last['dev_loss']:.4f}. Take fewer rounds, a larger "
        "reinforce.kl_coefficient, or more validation examples."
    ]


def write_generator(folder: Path, generator: Generator, task: TextTask, config: RefineConfig, params: Params) -> None:
    """The trained generator as a model folder, or as an adapter of its base."""
    path = config.reinforce.model or config.model.name_or_path
    own = task._replace(
        architecture=generator.decoder.config, decoder=generator.decoder, base_params=generator.base_params
    )
    if config.reinforce.model:
        own = own._replace(source_files=models.read_source_files(path))
    write_model(folder, own, params, base_path=path)
