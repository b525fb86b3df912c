"""From a config to everything that a run on a language model is made of: rows, tokens, model, problem, streams."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float, Int

from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.transition import transition
from bilevel_jax.core.types import PADDING, Fixed, Loss, Params, Problem, Stream, Transition
from bilevel_jax.lm import batches, data, losses, tokens
from bilevel_jax.lm import models as lm
from bilevel_jax.lm.batches import Layout
from bilevel_jax.lm.data import Example
from bilevel_jax.lm.tokens import Corpus
from bilevel_jax.runs import mesh as placing
from bilevel_jax.runs.config import SelectConfig
from bilevel_jax.runs.embedded import embedded
from bilevel_jax.runs.optimizers import optimizer

PARTS = ("fit", "select", "report")


class Task(NamedTuple):
    """A run's ingredients; every array lies on the mesh."""

    examples: list[Example]
    """The rows that get weights: rows 0 .. N-1 of `corpus`."""
    trusted: dict[str, list[Example]]
    """V_fit (steers the weights; rows N .. of `corpus`), V_select (stops early), V_report (headline numbers)."""
    notes: list[str]
    """What loading found and a person should know: duplicates, leaks, truncation."""
    corpus: Corpus
    held_out: dict[str, Stream]
    architecture: lm.DecoderConfig
    decoder: lm.Decoder
    tokenizer: Any
    base: Params | None
    """The frozen base under LoRA; None where all parameters are trained."""
    fresh: Callable[[int], Params]
    """seed -> parameters at the start of training."""
    problem: Problem
    loss: Loss
    losses: Callable
    """(params, fixed, micro-batch) -> nats per token of each example."""
    accuracy: Callable
    """(params, fixed, micro-batch) -> the share of each example's targets that are the likeliest token."""
    optimizer: optax.GradientTransformation
    step: Transition
    steps: int
    batch: int
    mesh: Mesh
    layout: Layout
    prior: bool

    @property
    def rows(self) -> int:
        """N, the size of the weight table."""
        return len(self.examples)

    def fixed(self, start: Params) -> Fixed:
        """What the losses need beside the parameters; the start of training too where the prior is centred there."""
        return {"base": self.base, "start": start if self.prior else None}

    def stream(self, seed: int, chosen: Int[np.ndarray, "chosen"] | None = None, *, packed: bool = True) -> Stream:
        """A training run's batches: epochs over the chosen rows of the corpus (default: the N rows with weights).

        The packed shape holds the orders of the outer loop only; other rows or seeds want packed=False.
        """
        chosen = self.trainable() if chosen is None else chosen
        order = batches.subset(chosen, self.corpus.rows, self.batch, seed)
        layout = self.layout if packed else self.flat
        return placing.placed(self.mesh, batches.train_stream(self.corpus, order, self.steps, layout))

    def summed(self, seed: int) -> Stream:
        """All N rows once, in a random order, as a stream that sums to their mean: what implicit estimators read."""
        chosen = self.trainable()
        order = batches.subset(chosen, self.corpus.rows, self.batch, seed)
        steps = batches.steps_per_epoch(len(chosen), self.batch)
        stream = batches.train_stream(self.corpus, order, steps, self.flat, total=len(chosen))
        return placing.placed(self.mesh, stream)

    @property
    def flat(self) -> Layout:
        """The layout without packing: one row of tokens for each example."""
        return self.layout._replace(rows=self.layout.examples)

    def trainable(self) -> Int[np.ndarray, "kept"]:
        """The rows with weights that were not dropped as too long."""
        return self.corpus.kept[self.corpus.kept < self.rows]

    def fit_rows(self) -> Int[np.ndarray, "kept"]:
        """The corpus rows of V_fit."""
        return self.corpus.kept[self.corpus.kept >= self.rows]


def prepare(config: SelectConfig, folder: Path, seeds: Sequence[int]) -> Task:
    """Load, check and tokenize the data, load or make the model, and compose the bilevel problem.

    `seeds` are those of all the data orders that the run will draw: with packing, the shape that all batches share
    must hold each of them. The quickstart's own files are written into `folder`/input.
    """
    config = embedded(config, folder)
    examples, trusted, notes = _rows(config)
    mesh = placing.make_mesh(config.devices.data)
    tokenizer = tokens.load_tokenizer(config.model.path)
    architecture = lm.read_config(config.model.path)
    limit = min(config.data.max_length, architecture.max_length)

    def tokenized(rows: list[Example], name: str) -> Corpus:
        corpus, report = tokens.tokenize(
            rows,
            tokenizer,
            max_length=limit,
            truncate=config.data.truncate,
            template=config.data.template or tokens.TEMPLATE,
        )
        notes.append(f"{name}: {report}.")
        return corpus

    corpus = tokenized(examples + trusted["fit"], "training and V_fit")
    evaluated = {part: tokenized(rows, f"V_{part}") for part, rows in trusted.items() if rows}
    longest = max(batches.longest(one) for one in (corpus, *evaluated.values()))
    trainable = corpus.kept[corpus.kept < len(examples)]
    orders = [batches.subset(trainable, corpus.rows, config.train.batch, seed) for seed in seeds]
    layout = batches.layout(
        corpus, orders, config.train.steps, micro=config.train.micro, length=longest, packing=config.data.packing
    )
    layout = placing.fit_layout(mesh, layout)

    dtype = jnp.dtype(config.model.train_dtype)
    decoder = lm.decoder(architecture, remat=config.model.remat)
    base, fresh = _parameters(config, architecture, dtype)
    base = None if base is None else placing.everywhere(mesh, base)
    values, right, loss = language_losses(decoder, base is not None)
    problem = weighted(values, prior=_prior(config.outer.prior))
    optimiser = optimizer(config.optimizer, config.train.steps)
    return Task(
        examples=examples,
        trusted=trusted,
        notes=notes,
        corpus=corpus,
        held_out={
            part: placing.kept(mesh, batches.evaluation_stream(one, layout._replace(rows=layout.examples)))
            for part, one in evaluated.items()
        },
        architecture=architecture,
        decoder=decoder,
        tokenizer=tokenizer,
        base=base,
        fresh=lambda seed: placing.everywhere(mesh, fresh(seed)),
        problem=problem,
        loss=loss,
        losses=values,
        accuracy=right,
        optimizer=optimiser,
        step=transition(problem, optimiser),
        steps=config.train.steps,
        batch=layout.micro * layout.examples,
        mesh=mesh,
        layout=layout,
        prior=config.outer.prior > 0,
    )


def language_losses(decoder: lm.Decoder, lora: bool) -> tuple[Callable, Callable, Loss]:
    """Per-example losses and accuracies of supervised fine-tuning, and the losses split for Gauss-Newton."""
    per_example, right = losses.sft(decoder), losses.accuracy(decoder)
    split = losses.sft_loss(decoder, frozen_head=lora)
    loss = Loss(
        lambda params, fixed, batch: split.outputs(params, fixed["base"], batch),
        lambda outputs, fixed, batch: split.link(outputs, fixed["base"], batch),
    )
    return (
        lambda params, fixed, batch: per_example(losses.assemble(params, fixed["base"]), batch),
        lambda params, fixed, batch: right(losses.assemble(params, fixed["base"]), batch),
        loss,
    )


def _prior(delta: float) -> Callable | None:
    return proximal(delta, lambda fixed: fixed["start"]) if delta else None


def per_row(
    function: Callable[[Params, Fixed, Any], Float[jax.Array, "examples"]],
    params: Params,
    fixed: Fixed,
    stream: Stream,
    rows: int,
) -> Float[np.ndarray, "rows"]:
    """One number per row of a stream, by the row's index; nan for rows that the stream does not hold."""
    compiled = jax.jit(lambda params, fixed, batch: jax.lax.map(lambda micro: function(params, fixed, micro), batch))
    out = np.full(rows, np.nan)
    for step in range(stream.steps):
        batch = stream.batch(step)
        index = np.asarray(batch["index"])
        out[index[index != PADDING]] = np.asarray(compiled(params, fixed, batch))[index != PADDING]
    return out


def _rows(config: SelectConfig) -> tuple[list[Example], dict[str, list[Example]], list[str]]:
    """Training rows, the three parts of the trusted rows, and notes about duplicates and leaks."""
    rows = config.data
    options = data.DataOptions(
        format=rows.format,
        prompt_field=rows.prompt_field,
        response_field=rows.response_field,
        text_field=rows.text_field,
        source_field=rows.source_field,
        label_field=rows.label_field,
        empty=rows.empty,
    )
    train = data.load(rows.train, options)
    notes = [f"training: {data.summary(train)}"]
    trusted = _parts(config, options)
    notes += [f"V_{part}: {data.summary(part_rows)}" for part, part_rows in trusted.items() if part_rows]
    for part, others in (("select", ("report",)), ("fit", ("select", "report"))):
        for other in others:
            if pairs := data.leaks(trusted[part], trusted[other]):
                raise ValueError(
                    f"{len(pairs)} trusted rows stand in both V_{part} and V_{other}, the first: {pairs[0][0].where} "
                    f"and {pairs[0][1].where}. V_{other} would not be independent: remove them from one."
                )
    leaked = data.leaks(train, [row for part in trusted.values() for row in part])
    if leaked and rows.leaks == "error":
        raise ValueError(
            f"{len({row.id for row, _ in leaked})} training rows also stand in the trusted rows, the first: "
            f"{leaked[0][0].where} equals {leaked[0][1].where}. Their weights would be rewarded for being copied. "
            "Remove them, or set data.leaks to drop."
        )
    if leaked:
        gone = {row.row for row, _ in leaked}
        train = [row for row in train if row.row not in gone]
        notes.append(f"{len(gone)} training rows were dropped because they also stand in the trusted rows.")
        if not train:
            raise ValueError("every training row also stands in the trusted rows; nothing is left to be judged.")
    if groups := data.duplicates(train):
        copies = sum(len(group) - 1 for group in groups)
        first = " and ".join(row.where for row in groups[0][:2])
        notes.append(f"{copies} training rows repeat another row, the first: {first}. Each copy has its own weight.")
    if len(train) < 2:
        raise ValueError(f"{len(train)} training row; weights compare rows, so give at least 2.")
    return train, trusted, notes


def _parts(config: SelectConfig, options: data.DataOptions) -> dict[str, list[Example]]:
    """V_fit, V_select and V_report: from files of their own where given, the rest by splitting `validation`."""
    rows = config.data
    own = {"select": rows.select, "report": rows.report}
    trusted = {part: data.load(paths, options) if paths else [] for part, paths in own.items()}
    shares = dict(zip(PARTS, rows.split, strict=True))
    wanted = [part for part in PARTS if shares[part] > 0 and not trusted.get(part)]
    total = sum(shares[part] for part in wanted)
    validation = data.load(rows.validation, options)
    pieces = (
        data.split(validation, [shares[part] / total for part in wanted], rows.seed)
        if len(wanted) > 1
        else (validation,)
    )
    return {part: [] for part in PARTS} | trusted | dict(zip(wanted, pieces, strict=True))


def _parameters(
    config: SelectConfig, architecture: lm.DecoderConfig, dtype: Any
) -> tuple[Params | None, Callable[[int], Params]]:
    """(frozen base or None, seed -> trained parameters at the start)."""
    model = config.model
    if model.scratch:
        return None, lambda seed: lm.init(architecture, jax.random.key(seed), dtype=dtype)
    if model.lora_rank == 0:
        _, loaded = lm.load(model.path, dtype=dtype)
        return None, lambda seed: loaded
    base_dtype = jnp.bfloat16 if model.base_dtype == "bfloat16" else dtype
    _, base = lm.load(model.path, dtype=base_dtype)

    def adapters(seed: int) -> Params:
        return lm.init_lora(
            architecture,
            jax.random.key(seed),
            rank=model.lora_rank,
            alpha=model.lora_alpha,
            targets=model.lora_targets,
            dtype=dtype,
        )

    return base, adapters
