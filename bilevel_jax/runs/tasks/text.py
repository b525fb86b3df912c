"""Language-model task with its data, model, problem and batch streams."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
from jax.sharding import Mesh
from jaxtyping import Float, Int

from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.training import train_step
from bilevel_jax.core.types import Batch, Frozen, Params, Problem, Stream, TrainStep
from bilevel_jax.lm import models
from bilevel_jax.lm.data import batches, tokens
from bilevel_jax.lm.data.batches import BatchShape
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.lm.data.targets import TokenWeights
from bilevel_jax.lm.data.tokens import Corpus
from bilevel_jax.lm.data.vocabulary import check_special_tokens
from bilevel_jax.lm.losses import sft
from bilevel_jax.runs.config.schema import (
    DataSection,
    FineTuneSection,
    LoraSection,
    MeshSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    Remat,
    TrainSection,
)
from bilevel_jax.runs.infra import identity, run_dir, sharding
from bilevel_jax.runs.infra.placement import align_layout, cache_stream, local_rows, make_mesh, place_stream
from bilevel_jax.runs.tasks import reference
from bilevel_jax.runs.tasks.evaluation import evaluate_per_example
from bilevel_jax.runs.tasks.objective import Objective, build_objective, check_examples
from bilevel_jax.runs.tasks.optimizers import build_optimizer
from bilevel_jax.runs.tasks.splits import DataSplits


class TextSections(Protocol):
    """The sections that a text task is composed from."""

    @property
    def model(self) -> ModelSection:
        """The model."""

    @property
    def lora(self) -> LoraSection:
        """Its LoRA factors."""

    @property
    def data(self) -> DataSection:
        """The files, and how their rows are read."""

    @property
    def objective(self) -> ObjectiveSection:
        """The loss of one example."""

    @property
    def train(self) -> TrainSection | FineTuneSection:
        """The size of a step and the seed of the start."""

    @property
    def mesh(self) -> MeshSection:
        """The devices."""


class TextTaskConfig(TextSections, Protocol):
    """The sections that a text task is prepared from; the configs of the commands that train on text have them."""

    @property
    def optimizer(self) -> OptimizerSection:
        """The optimizer of the parameters."""


class TextTask(NamedTuple):
    """A run's ingredients; every array lies on the mesh."""

    examples: list[Example]
    """The training examples, which get weights: 0 .. N-1 of `corpus`."""
    held_out_examples: dict[str, list[Example]]
    """validation (steers the weights; N .. of `corpus`), dev (stops early), test (headline numbers)."""
    notes: list[str]
    """What loading found and a person should know: duplicates, leaks, truncation."""
    corpus: Corpus
    held_out_streams: dict[str, Stream]
    architecture: models.DecoderConfig
    decoder: models.Decoder
    tokenizer: Any
    source_files: dict[str, bytes]
    """What a model trained from this one carries along; read at the start, as the tokenizer is."""
    base_params: Params | None
    """The frozen base under LoRA; None where all parameters are trained."""
    init_params: Callable[[int], Params]
    """seed -> parameters at the start of training."""
    problem: Problem
    objective: Objective
    optimizer: optax.GradientTransformation
    train_step: TrainStep
    num_steps: int
    batch_size: int
    mesh: Mesh
    layout: BatchShape
    has_proximal: bool
    groups: Int[np.ndarray, "groups size"] | None = None
    """Examples that share every batch, for losses that compare them; None: examples are shuffled one by one."""

    @property
    def num_examples(self) -> int:
        """N, the size of the weight table."""
        return len(self.examples)

    def frozen(self, start: Params) -> Frozen:
        """The constants of the losses: the base model and, with a proximal term, the start of training."""
        return {"base": self.base_params, "start": start if self.has_proximal else None}

    def training_stream(
        self, seed: int, indices: Int[np.ndarray, "chosen"] | None = None, *, packed: bool = True
    ) -> Stream:
        """A training run's batches: epochs over the chosen examples of the corpus (default: the N with weights).

        The packed shape holds the orders of the outer loop only; other rows or seeds want packed=False.
        """
        order = self.data_order(seed, indices)
        layout = self.layout if packed else self.layout.unpacked
        local_slots = local_rows(self.mesh, layout.rows)
        return place_stream(
            self.mesh, batches.make_train_stream(self.corpus, order, self.num_steps, layout, local_rows=local_slots)
        )

    def data_order(self, seed: int, indices: Int[np.ndarray, "chosen"] | None = None) -> batches.BatchOrder:
        """step -> the corpus indices of its batch in `training_stream`."""
        if indices is None and self.groups is not None:
            return batches.shuffled_group_order(self.groups, self.corpus.num_examples, self.batch_size, seed)
        return batches.shuffled_subset_order(
            self.trainable_indices() if indices is None else indices, self.corpus.num_examples, self.batch_size, seed
        )

    def full_pass_stream(self, seed: int, indices: Int[np.ndarray, "chosen"] | None = None) -> Stream:
        """Some examples of the corpus (default: the N with weights) once, in random order, as a stream that sums to
        their mean loss."""
        indices = self.trainable_indices() if indices is None else indices
        order = batches.shuffled_subset_order(indices, self.corpus.num_examples, self.batch_size, seed)
        steps = batches.steps_per_epoch(len(indices), self.batch_size)
        flat = self.layout.unpacked
        local_slots = local_rows(self.mesh, flat.rows)
        stream = batches.make_train_stream(
            self.corpus, order, steps, flat, total_examples=len(indices), local_rows=local_slots
        )
        return place_stream(self.mesh, stream)

    def trainable_indices(self) -> Int[np.ndarray, "kept"]:
        """The training examples that were not dropped as too long."""
        return self.corpus.kept_indices[self.corpus.kept_indices < self.num_examples]

    def validation_indices(self) -> Int[np.ndarray, "kept"]:
        """The corpus indices of the validation examples."""
        return self.corpus.kept_indices[self.corpus.kept_indices >= self.num_examples]


class TextPrograms(NamedTuple):
    """The compiled functions of a task, which do not depend on its data."""

    decoder: models.Decoder
    objective: Objective
    problem: Problem
    optimizer: optax.GradientTransformation
    train_step: TrainStep
    has_proximal: bool


class TokenizedData(NamedTuple):
    """The examples of a run as tokens."""

    examples: list[Example]
    held_out_examples: dict[str, list[Example]]
    """The parts that have examples."""
    notes: list[str]
    tokenizer: Any
    source_files: dict[str, bytes]
    architecture: models.DecoderConfig
    corpora: dict[str, Corpus]
    """TOGETHER (unless training examples are streamed) and each part of the validation examples."""


JOINT_CORPUS = "training and validation"
"""The corpus of the training examples, with validation behind them."""


def prepare_text_task(
    config: TextTaskConfig,
    splits: DataSplits,
    folder: Path,
    *,
    num_steps: int,
    seeds: Sequence[int],
    proximal_strength: float = 0.0,
) -> TextTask:
    """Tokenize the examples, load the model, and compose the bilevel problem.

    `seeds` are those of all the data orders that the run will draw: with packing, the shape that all batches share must
    hold each of them. `proximal_strength` is delta in delta/2 |params - start|^2. A reference model's log-probabilities
    are written into `folder`, and read from there when the run is resumed.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding_rules = sharding.parse_sharding_rules(config.mesh.sharding_rules, mesh)
    tokenized_data = tokenize_splits(config, splits)
    identity.check_tokens(folder, describe_tokens(tokenized_data, streaming=config.data.streaming))
    base_params, init_params = _load_params(
        config.model, config.lora, tokenized_data.architecture, mesh, sharding_rules
    )
    if config.objective.name == "dpo":
        reference_params = base_params if base_params is not None else init_params(config.train.seed)
        decoder = models.make_decoder(
            tokenized_data.architecture, gather_params=sharding.parameter_gatherer(mesh, sharding_rules)
        )
        tokenized_data = tokenized_data._replace(
            corpora=_attach_reference_margins(config, folder, tokenized_data, decoder, reference_params, mesh)
        )
    if unsharded := sharding.find_unsharded(
        mesh, sharding_rules, init_params(config.train.seed) if base_params is None else base_params
    ):
        note = f"mesh.fsdp = {config.mesh.fsdp} does not divide {', '.join(unsharded)}: whole on every device."
        tokenized_data = tokenized_data._replace(notes=[*tokenized_data.notes, note])
    programs = build_programs(
        tokenized_data.architecture,
        config.objective,
        build_optimizer(config.optimizer, num_steps),
        mesh,
        sharding_rules,
        remat=config.model.remat,
        compute_dtype=compute_dtype(config.train),
        lora=base_params is not None,
        proximal_strength=proximal_strength,
    )
    return compose_text_task(
        config, tokenized_data, base_params, init_params, programs, mesh, num_steps=num_steps, seeds=seeds
    )


def tokenize_splits(config: TextTaskConfig, splits: DataSplits) -> TokenizedData:
    """The examples as tokens of the model's tokenizer; checked against the objective."""
    folder = config.model.name_or_path
    tokenizer, architecture = tokens.load_tokenizer(folder), models.read_config(folder)
    check_special_tokens(folder, tokenizer, architecture.vocab_size)
    return tokenize_parts(config, splits, tokenizer, architecture, models.read_source_files(folder))


def tokenize_parts(
    config: TextSections,
    splits: DataSplits,
    tokenizer: Any,
    architecture: models.DecoderConfig,
    source_files: dict[str, bytes],
) -> TokenizedData:
    """The examples as tokens of a tokenizer that is loaded; checked against the objective."""
    examples, held_out = (
        splits.train,
        {part: part_examples for part, part_examples in splits.held_out.items() if part_examples},
    )
    check_examples(
        config.objective, [*examples, *(example for part_examples in held_out.values() for example in part_examples)]
    )
    notes, corpora = list(splits.notes), {}
    for name, part_examples in group_by_corpus(examples, held_out, streaming=config.data.streaming).items():
        token_weights = splits.token_weights if name == JOINT_CORPUS else None
        corpora[name], report = tokenize_examples(config.data, part_examples, tokenizer, architecture, token_weights)
        notes.append(f"{name}: {report}.")
    return TokenizedData(examples, held_out, notes, tokenizer, source_files, architecture, corpora)


def describe_tokens(tokenized_data: TokenizedData, *, streaming: bool) -> dict[str, dict[str, Any]]:
    """name -> sizes and hashes of each corpus, in the order of its rows: what a run that is resumed must read again."""
    examples = group_by_corpus(tokenized_data.examples, tokenized_data.held_out_examples, streaming=streaming)
    return {name: describe_corpus(corpus, examples[name]) for name, corpus in tokenized_data.corpora.items()}


def describe_corpus(corpus: Corpus, examples: Sequence[Example]) -> dict[str, Any]:
    """Sizes and hashes of a corpus and of its examples' ids, for `identity.check_tokens`."""
    return {
        "sequences": len(corpus.lengths),
        "tokens": len(corpus.ids),
        "targets": int(corpus.target_mask.sum()),
        "token ids": identity.hash_arrays(corpus.ids, corpus.offsets),
        "target mask": identity.hash_arrays(corpus.target_mask),
        **({} if corpus.token_weights is None else {"token weights": identity.hash_arrays(corpus.token_weights)}),
        "example ids and sources": identity.hash_text(
            text for example in examples for text in (example.id, example.source)
        ),
    }


def group_by_corpus(
    examples: list[Example], held_out: dict[str, list[Example]], *, streaming: bool = False
) -> dict[str, list[Example]]:
    """The examples of each corpus."""
    joint = {} if streaming else {JOINT_CORPUS: examples + held_out.get("validation", [])}
    return joint | dict(held_out.items())


def build_programs(
    architecture: models.DecoderConfig,
    objective: ObjectiveSection,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    sharding_rules: sharding.ShardingRules,
    *,
    remat: Remat,
    compute_dtype: Any = None,
    lora: bool,
    proximal_strength: float,
) -> TextPrograms:
    """The model's functions, its loss and its training step; with `lora` adapters are trained over `frozen["base"]`."""
    gather_params = sharding.parameter_gatherer(mesh, sharding_rules)
    decoder = models.make_decoder(architecture, remat=remat, compute_dtype=compute_dtype, gather_params=gather_params)
    run_objective = build_objective(objective, decoder, lora=lora)
    problem = weighted(run_objective.losses, prior=_proximal_term(proximal_strength))
    step = train_step(problem, optimizer)
    return TextPrograms(decoder, run_objective, problem, optimizer, step, proximal_strength > 0)


def compute_dtype(section: TrainSection | FineTuneSection) -> Any:
    """The dtype of the factors of matrix products; None: that of the parameters."""
    is_half = isinstance(section, FineTuneSection) and section.compute_dtype == "bfloat16"
    return jnp.bfloat16 if is_half else None


def compose_text_task(
    config: TextSections,
    tokenized_data: TokenizedData,
    base_params: Params | None,
    init_params: Callable[[int], Params],
    programs: TextPrograms,
    mesh: Mesh,
    *,
    num_steps: int,
    seeds: Sequence[int],
) -> TextTask:
    """The task of a text and of parameters that lie on the mesh: arrays, or, to estimate a run, shapes."""
    corpora = tokenized_data.corpora
    corpus, layout = _fit_layout(config, tokenized_data, num_steps=num_steps, seeds=seeds)
    layout = align_layout(mesh, layout)
    local_slots = local_rows(mesh, layout.unpacked.rows)
    return TextTask(
        examples=tokenized_data.examples,
        held_out_examples=tokenized_data.held_out_examples,
        notes=tokenized_data.notes,
        corpus=corpus,
        held_out_streams={
            part: cache_stream(
                mesh, batches.make_evaluation_stream(corpora[part], layout.unpacked, local_rows=local_slots)
            )
            for part in tokenized_data.held_out_examples
        },
        architecture=tokenized_data.architecture,
        decoder=programs.decoder,
        tokenizer=tokenized_data.tokenizer,
        source_files=tokenized_data.source_files,
        base_params=base_params,
        init_params=init_params,
        problem=programs.problem,
        objective=programs.objective,
        optimizer=programs.optimizer,
        train_step=programs.train_step,
        num_steps=num_steps,
        batch_size=layout.num_micro_batches * layout.examples,
        mesh=mesh,
        layout=layout,
        has_proximal=programs.has_proximal,
    )


def _fit_layout(
    config: TextSections, tokenized_data: TokenizedData, *, num_steps: int, seeds: Sequence[int]
) -> tuple[Corpus, BatchShape]:
    """The corpus of the examples that get weights, and the shape that all batches of the run share."""
    num_micro_batches = config.train.gradient_accumulation_steps
    if config.data.streaming:
        sequences = 1 if config.objective.name == "sft" else 2
        empty_corpus = Corpus(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, np.int64), sequences)
        micro_batch_size = config.train.global_batch_size // num_micro_batches
        num_positions = max_example_length(config.data, tokenized_data.architecture) - 1
        rows = micro_batch_size * sequences
        return empty_corpus, batches.BatchShape(num_micro_batches, micro_batch_size, rows, num_positions, sequences)
    corpora = tokenized_data.corpora
    corpus = corpora[JOINT_CORPUS]
    trainable = corpus.kept_indices[corpus.kept_indices < len(tokenized_data.examples)]
    if not len(trainable):
        first = tokenized_data.examples[0]
        raise ValueError(
            f"{first.where}: of {len(tokenized_data.examples):,} training examples none is left: all are longer than "
            f"{max_example_length(config.data, tokenized_data.architecture)} tokens (data.truncation = "
            f"{config.data.truncation}). Set data.truncation to left or right, or give shorter ones."
        )
    orders = [
        batches.shuffled_subset_order(trainable, corpus.num_examples, config.train.global_batch_size, seed)
        for seed in seeds
    ]
    layout = batches.fit_batch_shape(
        corpus,
        orders,
        num_steps,
        num_micro_batches=num_micro_batches,
        length=max((batches.padded_max_length(part_corpus) for part_corpus in corpora.values()), default=0),
        packing=config.data.packing,
    )
    return corpus, layout


def make_abstract_params(
    model: ModelSection,
    lora: LoraSection,
    architecture: models.DecoderConfig,
    mesh: Mesh,
    sharding_rules: sharding.ShardingRules,
) -> tuple[Params | None, Callable[[int], Params]]:
    """(frozen base or None, seed -> trained parameters) as shapes on the mesh: nothing is loaded, nothing allocated."""
    dtype = jnp.dtype(model.param_dtype)

    def model_shapes(dtype: Any) -> Params:
        return jax.eval_shape(lambda: models.init_params(architecture, jax.random.key(0), dtype=dtype))

    if model.from_scratch or lora.r == 0:
        start = sharding.make_sharded_shapes(mesh, sharding_rules, model_shapes(dtype))
        return None, lambda seed: start
    base_params = sharding.make_sharded_shapes(mesh, sharding_rules, model_shapes(_base_dtype(model, lora)))
    adapters = sharding.make_sharded_shapes(
        mesh, sharding_rules, jax.eval_shape(lambda: _init_adapters(model, lora, architecture, 0))
    )
    return base_params, lambda seed: adapters


def tokenize_examples(
    data: DataSection,
    examples: Sequence[Example],
    tokenizer: Any,
    architecture: models.DecoderConfig,
    token_weights: Mapping[str, TokenWeights] | None = None,
) -> tuple[Corpus, tokens.TokenizationReport]:
    """The tokens of some examples, as every command makes them."""
    return tokens.tokenize(
        examples,
        tokenizer,
        max_length=max_example_length(data, architecture),
        truncation=data.truncation,
        template=data.template or tokens.DEFAULT_TEMPLATE,
        train_on=data.train_on,
        vocab_size=architecture.vocab_size,
        is_model_limit=data.max_length >= architecture.max_length,
        token_weights=token_weights,
    )


def max_example_length(data: DataSection, architecture: models.DecoderConfig) -> int:
    """Tokens that an example may have."""
    return min(data.max_length, architecture.max_length)


def _attach_reference_margins(
    config: TextTaskConfig,
    folder: Path,
    tokenized_data: TokenizedData,
    decoder: models.Decoder,
    params: Params,
    mesh: Mesh,
) -> dict[str, Corpus]:
    """The corpora with the reference model's margins: read where they were stored, made and stored otherwise."""
    corpora, examples = (
        tokenized_data.corpora,
        group_by_corpus(tokenized_data.examples, tokenized_data.held_out_examples, streaming=config.data.streaming),
    )
    model_fingerprint = reference.fingerprint_model_files(
        config.model.name_or_path, f"{config.model.param_dtype} {config.model.base_dtype}"
    )
    stored_path = config.objective.reference or (
        folder / reference.REFERENCE_FILE if (folder / reference.REFERENCE_FILE).exists() else ""
    )
    log_probs: dict[str, np.ndarray] = {}
    tables = []
    for name, corpus in corpora.items():
        if name == "validation":  # its rows were read behind the training examples
            log_probs[name] = log_probs[JOINT_CORPUS][-corpus.num_examples :]
            continue
        if stored_path:
            log_probs[name] = reference.read_reference_log_probs(stored_path, examples[name], corpus, model_fingerprint)
        else:
            log_probs[name] = compute_pair_log_probs(decoder, params, corpus, config.train.global_batch_size, mesh)
        tables.append(reference.build_reference_table(examples[name], corpus, log_probs[name], model_fingerprint))
    run_dir.write_parquet(folder / reference.REFERENCE_FILE, pa.concat_tables(tables))
    identity.check_tokens(
        folder,
        {f"reference of {name}": {"log-probabilities": identity.hash_arrays(log_probs[name])} for name in log_probs},
    )
    return {
        name: corpus.with_reference_margins(reference.reference_margins(log_probs[name]))
        for name, corpus in corpora.items()
    }


def compute_pair_log_probs(
    decoder: models.Decoder, params: Params, corpus: Corpus, batch_size: int, mesh: Mesh
) -> Float[np.ndarray, "rows 2"]:
    """log p of both responses of each pair under a model, nats, summed over their tokens; nan for a dropped pair."""
    log_likelihoods = sft.sequence_log_likelihoods(decoder)

    def pair_log_probs(params: Params, frozen: Frozen, batch: Batch) -> jax.Array:
        return log_likelihoods(params, batch).reshape(-1, 2)

    flat = batches.BatchShape(1, batch_size, 2 * batch_size, batches.padded_max_length(corpus), 2)
    stream = place_stream(mesh, batches.make_evaluation_stream(corpus, align_layout(mesh, flat)))
    return evaluate_per_example(pair_log_probs, params, None, stream, corpus.num_examples)


def _proximal_term(strength: float) -> Callable | None:
    return proximal(strength, lambda frozen: frozen["start"]) if strength else None


def _load_params(
    model: ModelSection,
    lora: LoraSection,
    architecture: models.DecoderConfig,
    mesh: Mesh,
    sharding_rules: sharding.ShardingRules,
) -> tuple[Params | None, Callable[[int], Params]]:
    """(frozen base or None, seed -> trained parameters at the start), on the mesh."""

    def init_params(seed: int) -> Params:
        if model.from_scratch:
            return models.init_params(architecture, jax.random.key(seed), dtype=jnp.dtype(model.param_dtype))
        return _init_adapters(model, lora, architecture, seed)

    if model.from_scratch:
        return None, lambda seed: sharding.shard_tree(mesh, sharding_rules, init_params(seed))
    place = sharding.parameter_placer(mesh, sharding_rules)
    _, loaded = models.load_model(model.name_or_path, dtype=_base_dtype(model, lora), place=place)
    if lora.r == 0:
        return None, lambda seed: loaded
    return loaded, lambda seed: sharding.shard_tree(mesh, sharding_rules, init_params(seed))


def _base_dtype(model: ModelSection, lora: LoraSection) -> Any:
    """What the checkpoint is cast to: the base's dtype, or, where it is trained itself, that of training."""
    return jnp.bfloat16 if lora.r and model.base_dtype == "bfloat16" else jnp.dtype(model.param_dtype)


def _init_adapters(model: ModelSection, lora: LoraSection, architecture: models.DecoderConfig, seed: int) -> Params:
    return models.init_lora(
        architecture,
        jax.random.key(seed),
        rank=lora.r,
        alpha=lora.alpha,
        target_modules=lora.target_modules,
        dtype=jnp.dtype(model.param_dtype),
    )
