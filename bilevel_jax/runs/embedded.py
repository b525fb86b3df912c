"""The embedded task: data and a small language model that the package makes itself, as ordinary files."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp

from bilevel_jax.core.problem import weighted
from bilevel_jax.core.transition import begin, train, transition
from bilevel_jax.lm import batches, cipher, data, losses, tokens
from bilevel_jax.lm import models as lm
from bilevel_jax.runs.config import InspectConfig, RankConfig, SelectConfig, TrainConfig
from bilevel_jax.runs.optimizers import optimizer
from bilevel_jax.runs.sections import Optimizer

Config = TypeVar("Config", SelectConfig, TrainConfig, InspectConfig, RankConfig)
NAME = "builtin:cipher"
STEPS, BATCH = 300, 32


def embedded(config: Config, folder: Path) -> Config:
    """The config with `builtin:cipher` replaced by the files that it is made into, once, in `folder`/input."""
    if NAME not in (config.model.path, *config.data.train):
        return config
    made = cipher.write(folder / "input", seed=config.data.seed)
    if config.model.path == NAME and not (made / "model").exists():
        pretrain(made)

    def files(name: str, paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(made / f"{name}.jsonl") if path == NAME else path for path in paths)

    rows = config.data
    return replace(
        config,
        model=replace(config.model, path=str(made / "model") if config.model.path == NAME else config.model.path),
        data=replace(
            rows,
            train=files("train", rows.train),
            validation=files("validation", rows.validation),
            select=files("select", rows.select),
            report=files("report", rows.report),
        ),
    )


def pretrain(made: Path) -> None:
    """Teach the untrained model to copy its prompt, the form of every answer, and save it as `made`/model."""
    tokenizer = tokens.load_tokenizer(made / "untrained")
    architecture = lm.read_config(made / "untrained")
    corpus, _ = tokens.tokenize(data.load([str(made / "copies.jsonl")]), tokenizer, max_length=architecture.max_length)
    order = batches.order(corpus.rows, BATCH, seed=0)
    layout = batches.Layout(1, BATCH, BATCH, batches.longest(corpus))
    per_example = losses.sft(lm.decoder(architecture))
    adamw = optimizer(Optimizer(learning_rate=4e-3, warmup=20, b2=0.99), STEPS)
    step = transition(weighted(lambda params, fixed, batch: per_example(params, batch)), adamw)
    start = begin(adamw, lm.init(architecture, jax.random.key(0)))
    run = train(step, start, jnp.ones(corpus.rows), None, batches.train_stream(corpus, order, STEPS, layout))
    lm.save(made / "model", architecture, run.end.params, tokenizer=tokenizer)
