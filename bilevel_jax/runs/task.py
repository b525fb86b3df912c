"""From a config to everything that a run on a language model is made of: rows, tokens, model, problem, streams."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
from jax.sharding import Mesh
from jaxtyping import Float, Int

from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.transition import transition
from bilevel_jax.core.types import PADDING, Batch, Fixed, Params, Problem, Stream, Transition
from bilevel_jax.lm import batches, losses, tokens
from bilevel_jax.lm import models as lm
from bilevel_jax.lm.batches import Layout
from bilevel_jax.lm.data import Example
from bilevel_jax.lm.features import features
from bilevel_jax.lm.tokens import Corpus
from bilevel_jax.runs import files, partition, reference
from bilevel_jax.runs import mesh as placing
from bilevel_jax.runs.config import InspectConfig, SelectConfig, TrainConfig
from bilevel_jax.runs.objective import Objective, check_rows, objective
from bilevel_jax.runs.optimizers import optimizer
from bilevel_jax.runs.processes import fetch
from bilevel_jax.runs.rows import Rows
from bilevel_jax.runs.sections import LoraSection, ModelSection


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
    objective: Objective
    optimizer: optax.GradientTransformation
    step: Transition
    steps: int
    batch: int
    mesh: Mesh
    layout: Layout
    prior: bool
    groups: Int[np.ndarray, "groups size"] | None = None
    """Rows that stand side by side in every batch, for losses that compare them; None: rows are shuffled one by one."""

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
        order = self.order(seed, chosen)
        layout = self.layout if packed else self.layout.flat
        own = placing.own(self.mesh, layout.rows)
        return placing.placed(self.mesh, batches.train_stream(self.corpus, order, self.steps, layout, own=own))

    def order(self, seed: int, chosen: Int[np.ndarray, "chosen"] | None = None) -> batches.Order:
        """step -> the corpus rows of its batch in `stream`."""
        if chosen is None and self.groups is not None:
            return batches.grouped(self.groups, self.corpus.rows, self.batch, seed)
        return batches.subset(self.trainable() if chosen is None else chosen, self.corpus.rows, self.batch, seed)

    def summed(self, seed: int) -> Stream:
        """All N rows once, in a random order, as a stream that sums to their mean: what implicit estimators read."""
        chosen = self.trainable()
        order = batches.subset(chosen, self.corpus.rows, self.batch, seed)
        steps = batches.steps_per_epoch(len(chosen), self.batch)
        flat = self.layout.flat
        own = placing.own(self.mesh, flat.rows)
        stream = batches.train_stream(self.corpus, order, steps, flat, total=len(chosen), own=own)
        return placing.placed(self.mesh, stream)

    def features(self) -> Float[np.ndarray, "rows features"]:
        """Plain features of the rows with weights, for weights that extend to unseen rows."""
        return features(self.examples, self.corpus)

    def trainable(self) -> Int[np.ndarray, "kept"]:
        """The rows with weights that were not dropped as too long."""
        return self.corpus.kept[self.corpus.kept < self.rows]

    def fit_rows(self) -> Int[np.ndarray, "kept"]:
        """The corpus rows of V_fit."""
        return self.corpus.kept[self.corpus.kept >= self.rows]


class Text(NamedTuple):
    """The rows of a run as tokens."""

    examples: list[Example]
    trusted: dict[str, list[Example]]
    """The parts that have rows."""
    notes: list[str]
    tokenizer: Any
    architecture: lm.DecoderConfig
    corpora: dict[str, Corpus]
    """TOGETHER (unless training rows are streamed) and each part of the trusted rows."""


TOGETHER = "training and V_fit"
"""The corpus of the rows that get weights, with V_fit behind them."""


def prepare(
    config: SelectConfig | TrainConfig,
    rows: Rows,
    folder: Path,
    *,
    steps: int,
    seeds: Sequence[int],
    prior: float = 0.0,
) -> Task:
    """Tokenize the rows, load the model, and compose the bilevel problem.

    `seeds` are those of all the data orders that the run will draw: with packing, the shape that all batches share
    must hold each of them. `prior` is delta in delta/2 |params - start|^2. A reference model's log-probabilities are
    written into `folder`, and read from there when the run is resumed.
    """
    mesh = placing.make_mesh(config.mesh.data, config.mesh.fsdp)
    split = partition.table(config.mesh.sharding_rules, mesh)
    text = read(config, rows)
    base, fresh = _parameters(config.model, config.lora, text.architecture, mesh, split)
    if config.objective.name == "dpo":
        start = base if base is not None else fresh(config.train.seed)
        decoder = lm.decoder(text.architecture, gather=partition.gathering(mesh, split))
        text = text._replace(corpora=_referenced(config, folder, text, decoder, start, mesh))
    if left := partition.whole(mesh, split, fresh(config.train.seed) if base is None else base):
        words = f"mesh.fsdp = {config.mesh.fsdp} does not divide {', '.join(left)}: whole on every device."
        text = text._replace(notes=[*text.notes, words])
    return compose(config, text, base, fresh, mesh, split, steps=steps, seeds=seeds, prior=prior)


def read(config: SelectConfig | TrainConfig, rows: Rows) -> Text:
    """The rows as tokens of the model's tokenizer; checked against the objective."""
    examples, trusted = rows.train, {part: some for part, some in rows.trusted.items() if some}
    check_rows(config.objective, [*examples, *(row for some in trusted.values() for row in some)])
    tokenizer, architecture = (
        tokens.load_tokenizer(config.model.name_or_path),
        lm.read_config(config.model.name_or_path),
    )
    notes, corpora = list(rows.notes), {}
    for name, some in named(examples, trusted, streamed=config.data.streaming).items():
        corpora[name], report = tokenized(config, some, tokenizer, architecture)
        notes.append(f"{name}: {report}.")
    return Text(examples, trusted, notes, tokenizer, architecture, corpora)


def named(
    examples: list[Example], trusted: dict[str, list[Example]], *, streamed: bool = False
) -> dict[str, list[Example]]:
    """The rows of each corpus of a `Text`."""
    together = {} if streamed else {TOGETHER: examples + trusted.get("fit", [])}
    return together | {f"V_{part}": some for part, some in trusted.items()}


def compose(
    config: SelectConfig | TrainConfig,
    text: Text,
    base: Params | None,
    fresh: Callable[[int], Params],
    mesh: Mesh,
    split: partition.Table,
    *,
    steps: int,
    seeds: Sequence[int],
    prior: float,
) -> Task:
    """The task of a text and of parameters that lie on the mesh, split so: arrays, or, to estimate a run, shapes."""
    corpora, longest = text.corpora, max((batches.longest(one) for one in text.corpora.values()), default=0)
    compute = jnp.bfloat16 if isinstance(config, TrainConfig) and config.train.compute_dtype == "bfloat16" else None
    gather = partition.gathering(mesh, split)
    decoder = lm.decoder(text.architecture, remat=config.model.remat, compute=compute, gather=gather)
    if config.data.streaming:
        sequences = 1 if config.objective.name == "sft" else 2
        corpus = Corpus(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, np.int64), sequences)
        each, places = (
            config.train.global_batch_size // config.train.gradient_accumulation_steps,
            limit(config, text.architecture) - 1,
        )
        layout = batches.Layout(config.train.gradient_accumulation_steps, each, each * sequences, places, sequences)
    else:
        corpus = corpora[TOGETHER]
        trainable = corpus.kept[corpus.kept < len(text.examples)]
        orders = [batches.subset(trainable, corpus.rows, config.train.global_batch_size, seed) for seed in seeds]
        layout = batches.layout(
            corpus,
            orders,
            steps,
            micro=config.train.gradient_accumulation_steps,
            length=longest,
            packing=config.data.packing,
        )
    layout = placing.fit_layout(mesh, layout)
    own = placing.own(mesh, layout.flat.rows)
    chosen = objective(config.objective, decoder, lora=base is not None)
    problem = weighted(chosen.losses, prior=_prior(prior))
    optimiser = optimizer(config.optimizer, steps)
    return Task(
        examples=text.examples,
        trusted=text.trusted,
        notes=text.notes,
        corpus=corpus,
        held_out={
            part: placing.kept(mesh, batches.evaluation_stream(corpora[f"V_{part}"], layout.flat, own=own))
            for part in text.trusted
        },
        architecture=text.architecture,
        decoder=decoder,
        tokenizer=text.tokenizer,
        base=base,
        fresh=fresh,
        problem=problem,
        objective=chosen,
        optimizer=optimiser,
        step=transition(problem, optimiser),
        steps=steps,
        batch=layout.micro * layout.examples,
        mesh=mesh,
        layout=layout,
        prior=prior > 0,
    )


def abstract(
    model: ModelSection, lora: LoraSection, architecture: lm.DecoderConfig, mesh: Mesh, split: partition.Table
) -> tuple[Params | None, Callable[[int], Params]]:
    """(frozen base or None, seed -> trained parameters) as shapes on the mesh: nothing is loaded, nothing allocated."""
    dtype = jnp.dtype(model.param_dtype)

    def whole(of: Any) -> Params:
        return jax.eval_shape(lambda: lm.init(architecture, jax.random.key(0), dtype=of))

    if model.from_scratch or lora.r == 0:
        start = partition.shapes(mesh, split, whole(dtype))
        return None, lambda seed: start
    base = partition.shapes(mesh, split, whole(_base_dtype(model, lora)))
    factors = partition.shapes(mesh, split, jax.eval_shape(lambda: _adapters(model, lora, architecture, 0)))
    return base, lambda seed: factors


def tokenized(
    config: SelectConfig | TrainConfig | InspectConfig,
    examples: Sequence[Example],
    tokenizer: Any,
    architecture: lm.DecoderConfig,
) -> tuple[Corpus, tokens.Report]:
    """The tokens of some rows, as every verb makes them."""
    return tokens.tokenize(
        examples,
        tokenizer,
        max_length=limit(config, architecture),
        truncate=config.data.truncation,
        template=config.data.template or tokens.TEMPLATE,
        supervise=config.data.train_on,
    )


def limit(config: SelectConfig | TrainConfig | InspectConfig, architecture: lm.DecoderConfig) -> int:
    """Tokens that an example may have."""
    return min(config.data.max_length, architecture.max_length)


def _referenced(
    config: SelectConfig | TrainConfig, folder: Path, text: Text, decoder: lm.Decoder, params: Params, mesh: Mesh
) -> dict[str, Corpus]:
    """The corpora with the reference model's margins: read where they were stored, made and stored otherwise."""
    corpora, examples = text.corpora, named(text.examples, text.trusted, streamed=config.data.streaming)
    made_by = reference.fingerprint(config.model.name_or_path, f"{config.model.param_dtype} {config.model.base_dtype}")
    stored = config.objective.reference or (folder / reference.NAME if (folder / reference.NAME).exists() else "")
    log_p = losses.log_likelihoods(decoder)

    def sides(params: Params, fixed: Fixed, batch: Batch) -> jax.Array:
        return log_p(params, batch).reshape(-1, 2)

    values: dict[str, np.ndarray] = {}
    tables = []
    for name, corpus in corpora.items():
        if name == "V_fit":  # its rows were read behind the training rows
            values[name] = values[TOGETHER][-corpus.rows :]
            continue
        if stored:
            values[name] = reference.read(stored, examples[name], corpus, made_by)
        else:
            flat = batches.Layout(
                1, config.train.global_batch_size, 2 * config.train.global_batch_size, batches.longest(corpus), 2
            )
            stream = placing.placed(mesh, batches.evaluation_stream(corpus, placing.fit_layout(mesh, flat)))
            values[name] = per_row(sides, params, None, stream, corpus.rows)
        tables.append(reference.table(examples[name], corpus, values[name], made_by))
    files.write_table(folder / reference.NAME, pa.concat_tables(tables))
    return {name: corpus.with_reference(reference.margins(values[name])) for name, corpus in corpora.items()}


def _prior(delta: float) -> Callable | None:
    return proximal(delta, lambda fixed: fixed["start"]) if delta else None


def per_row(
    function: Callable[[Params, Fixed, Batch], Float[jax.Array, "examples *rest"]],
    params: Params,
    fixed: Fixed,
    stream: Stream,
    rows: int,
) -> Float[np.ndarray, "rows *rest"]:
    """What `function` says of each row of a stream, by the row's index; nan for rows that the stream does not hold."""
    compiled = _by_micro(function)
    out: np.ndarray | None = None
    for step in range(stream.steps):
        batch = stream.batch(step)
        index, values = fetch(batch["index"]), fetch(compiled(params, fixed, batch))
        if out is None:
            out = np.full((rows, *values.shape[2:]), np.nan)
        out[index[index != PADDING]] = values[index != PADDING]
    assert out is not None  # a stream has at least one step
    return out


@lru_cache(maxsize=8)
def _by_micro(function: Callable) -> Callable:
    """`function` of each micro-batch, compiled; remembered, as a comparison reads the same again and again."""
    return jax.jit(lambda params, fixed, batch: jax.lax.map(lambda micro: function(params, fixed, micro), batch))


def _parameters(
    model: ModelSection, lora: LoraSection, architecture: lm.DecoderConfig, mesh: Mesh, split: partition.Table
) -> tuple[Params | None, Callable[[int], Params]]:
    """(frozen base or None, seed -> trained parameters at the start), on the mesh."""

    def fresh(seed: int) -> Params:
        if model.from_scratch:
            return lm.init(architecture, jax.random.key(seed), dtype=jnp.dtype(model.param_dtype))
        return _adapters(model, lora, architecture, seed)

    if model.from_scratch:
        return None, lambda seed: partition.partitioned(mesh, split, fresh(seed))
    place = partition.placing(mesh, split)
    _, loaded = lm.load(model.name_or_path, dtype=_base_dtype(model, lora), place=place)
    if lora.r == 0:
        return None, lambda seed: loaded
    return loaded, lambda seed: partition.partitioned(mesh, split, fresh(seed))


def _base_dtype(model: ModelSection, lora: LoraSection) -> Any:
    """What the checkpoint is cast to: the base's dtype, or, where it is trained itself, that of training."""
    return jnp.bfloat16 if lora.r and model.base_dtype == "bfloat16" else jnp.dtype(model.param_dtype)


def _adapters(model: ModelSection, lora: LoraSection, architecture: lm.DecoderConfig, seed: int) -> Params:
    return lm.init_lora(
        architecture,
        jax.random.key(seed),
        rank=lora.r,
        alpha=lora.alpha,
        targets=lora.target_modules,
        dtype=jnp.dtype(model.param_dtype),
    )
