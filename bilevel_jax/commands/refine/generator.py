"""A generator that is trained by policy gradients on the rewards of its responses."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from bilevel_jax.commands.refine.advantages import compute_advantages, share_rewards_of_equal_responses
from bilevel_jax.commands.refine.rewards import Rewards
from bilevel_jax.commands.refine.rollouts import Rollouts, RoundTask
from bilevel_jax.core.problem import weighted
from bilevel_jax.core.training import init_train_state, train_step
from bilevel_jax.core.types import Batch, Frozen, Params, TrainState, TrainStep
from bilevel_jax.lm import models
from bilevel_jax.lm.data.batches import steps_per_epoch
from bilevel_jax.lm.data.render import get_chat_template
from bilevel_jax.lm.data.tokens import load_tokenizer
from bilevel_jax.lm.inference.prompts import find_end_tokens
from bilevel_jax.lm.losses.policy import policy_losses, policy_terms
from bilevel_jax.lm.losses.sft import assemble_params, reduce_losses, sum_per_sequence
from bilevel_jax.runs.config.load import RefineConfig
from bilevel_jax.runs.config.schema import OptimizerSection, ReinforceSection
from bilevel_jax.runs.engine.artifacts import write_model
from bilevel_jax.runs.engine.single_loop import FORWARD_WORK
from bilevel_jax.runs.infra import sharding
from bilevel_jax.runs.infra.placement import replicate, replicate_unplaced
from bilevel_jax.runs.infra.session import Session
from bilevel_jax.runs.tasks.evaluation import evaluate_per_example
from bilevel_jax.runs.tasks.optimizers import build_optimizer
from bilevel_jax.runs.tasks.text import TextTask, load_params

POLICY_WORK = 1.0
"""Work of a policy step in training steps, without what the model at its start adds."""
MAX_LOG_RATIO = 0.1
"""Nats by which the generator may read the tokens it has just drawn otherwise than it drew them; more is a fault."""


class PolicyPrograms(NamedTuple):
    """The compiled functions of a generator."""

    optimizer: optax.GradientTransformation
    step: TrainStep
    measure: Callable[[Params, Frozen, Batch], Float[Array, "examples 3"]]
    """Mean over the tokens of a response of the divergence from the start, nats, of the share that is clipped, and of
    |log rho|, nats."""


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
    ends = [
        find_end_tokens(of, eos) for of, eos in ((tokenizer, architecture.eos), (task.tokenizer, task.architecture.eos))
    ]
    if ends[0] != ends[1] or architecture.vocab_size != task.architecture.vocab_size:
        raise ValueError(
            f"reinforce.model = {path} has a vocabulary of {architecture.vocab_size:,} tokens and ends responses by "
            f"{ends[0]}; the model has {task.architecture.vocab_size:,} and {ends[1]}. The model is trained on what "
            "the generator writes: choose one with the same."
        )
    if architecture.max_length < task.layout.length:
        raise ValueError(
            f"reinforce.model = {path} reads {architecture.max_length} tokens, and a question with its response has up "
            f"to {task.layout.length}. Lower generate.max_new_tokens, or choose a model with a longer context."
        )
    rules = sharding.parse_sharding_rules(config.mesh.sharding_rules, task.mesh)
    model = replace(config.model, name_or_path=path)
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

    def measure(params: Params, frozen: Frozen, batch: Batch) -> Float[Array, "examples 3"]:
        terms = compute_terms(assemble_params(params, frozen["base"]), start_params(frozen), batch)
        means = [
            reduce_losses(sum_per_sequence(values, batch), batch, "example_mean")
            for values in (terms.kl, terms.is_clipped, jnp.abs(terms.log_ratio))
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
    by_token = rewards.tokens is not None
    of_tokens = rewards.tokens or [
        np.full(len(tokens), reward / len(tokens))
        for tokens, reward in zip(rollouts.tokens, rewards.responses, strict=True)
    ]
    of_tokens = share_rewards_of_equal_responses(of_tokens, rollouts.tokens, draws)
    advantages = compute_advantages(of_tokens, draws, section.advantages, by_token=by_token)
    task = _make_policy_task(config, round_task, advantages.tokens)
    rows = np.flatnonzero(round_task.response_numbers >= 0)
    stream = task.training_stream(config.data.seed + number, rows, packed=False)
    weights = replicate(task.mesh, jnp.ones(task.num_examples))
    frozen, programs = generator.frozen, generator.programs
    everything = task.full_pass_stream(0, rows)

    def measure(params: Params) -> Float[np.ndarray, "3"]:
        values = evaluate_per_example(programs.measure, params, frozen, everything, task.corpus.num_examples)[rows]
        session.advance(2 * FORWARD_WORK * everything.steps)
        if not np.isfinite(values).all():
            raise FloatingPointError(
                f"the generator gives a response of round {number} no finite probability. Lower "
                "reinforce.learning_rate."
            )
        return values.mean(0)

    before = measure(state.params)
    if before[2] > MAX_LOG_RATIO:
        raise ValueError(
            f"the generator of round {number} reads its own responses with log-probabilities that are {before[2]:.2f} "
            "nats per token off those that they were drawn by, so its ratios are meaningless. Set model.base_dtype to "
            "float32, or start anew in another folder."
        )
    norms = []
    for place in range(stream.steps):
        batch = stream.batch(place)
        state, metrics = programs.step.forward(state, programs.step.gather(weights, batch), frozen, batch)
        norms.append(float(metrics.grad_norm))
        session.advance(policy_step_work(section))
        session.check_signals()
    after = measure(state.params)
    record = {
        "steps": stream.steps,
        "equal_groups": advantages.num_equal,
        "kl": float(before[0]),
        "kl_after": float(after[0]),
        "clipped": float(after[1]),
        "grad_norm": float(np.mean(norms)),
    }
    return PolicyUpdate(state, record)


def policy_step_work(section: ReinforceSection) -> float:
    """The work of one policy step, in training steps."""
    return POLICY_WORK + (FORWARD_WORK if section.kl_coefficient else 0)


def num_policy_steps(section: ReinforceSection, num_responses: int, batch_size: int) -> int:
    """The policy steps of a round; in whole epochs each response is in as many."""
    return max(1, round(section.epochs * steps_per_epoch(num_responses, batch_size)))


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


def write_generator(folder: Path, generator: Generator, task: TextTask, config: RefineConfig, params: Params) -> None:
    """The trained generator as a model folder, or as an adapter of its base."""
    path = config.reinforce.model or config.model.name_or_path
    own = task._replace(
        architecture=generator.decoder.config, decoder=generator.decoder, base_params=generator.base_params
    )
    if config.reinforce.model:
        own = own._replace(source_files=models.read_source_files(path))
    write_model(folder, own, params, base_path=path)
