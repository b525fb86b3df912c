"""Language-model task with its data, model, problem and batch streams."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Int

from bilevel_jax.core.problem import proximal, weighted
from bilevel_jax.core.training import train_step
from bilevel_jax.core.types import Frozen, Params, Problem, Stream, TrainStep
from bilevel_jax.lm import models
from bilevel_jax.lm.data import batches, tokens
from bilevel_jax.lm.data.batches import BatchShape
from bilevel_jax.lm.data.examples import Example
from bilevel_jax.lm.data.targets import TokenWeights
from bilevel_jax.lm.data.tokens import Corpus
from bilevel_jax.lm.data.vocabulary import check_special_tokens
from bilevel_jax.runs.config.schema import (
    DataSection,
    FineTuneSection,
    LoraSection,
    MeshSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    Remat,
    TargetSection,
    TrainSection,
)
from bilevel_jax.runs.infra import identity, sharding
from bilevel_jax.runs.infra.placement import align_layout, cache_stream, local_rows, make_mesh, place_stream
from bilevel_jax.runs.tasks import targets
from bilevel_jax.runs.tasks.objective import Objective, build_objective, check_examples
from bilevel_jax.runs.tasks.optimizers import build_optimizer
from bilevel_jax.runs.tasks.reference import attach_reference_margins
from bilevel_jax.runs.tasks.splits import PART_NAMES, DataSplits
from bilevel_jax.runs.tasks.targets import OuterObjective, ReportedTargets, TargetCorpus, TargetSpec


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
    """validation (steers the weights; N .. of `corpus`, where they are of the kind that is trained on), dev (stops
    early), test (headline numbers); target by target."""
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
    outer_objective: OuterObjective
    target_corpora: dict[str, list[TargetCorpus]]
    """The examples of each target in each part."""
    reported: ReportedTargets | None = None
    """What dev and test read beside `outer_objective`."""
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

    def validation_stream(self, seed: int) -> Stream:
        """Batches of validation examples in epochs of their own, for methods that step on L_v as they train; of several
        targets tuples, a batch of each."""
        if self.outer_objective.losses is self.objective.losses and len(self.validation_indices()):
            return self.training_stream(seed, self.validation_indices(), packed=False)
        drawn = targets.make_drawn_streams(
            self.target_corpora["validation"],
            self.outer_objective.targets,
            self.layout.unpacked,
            partial(local_rows, self.mesh),
            steps=self.num_steps,
            batch_size=self.batch_size,
            seed=seed,
        )
        streams = [place_stream(self.mesh, stream) for stream in drawn]
        return (
            streams[0]
            if len(streams) == 1
            else Stream(lambda step: tuple(stream.batch(step) for stream in streams), self.num_steps)
        )

    def reference_corpora(self) -> list[tuple[Corpus, int | None]]:
        """The pairs that dpo compares with a reference model, each once, and the place of their target; None of those
        that judge nothing."""
        is_joint = len(self.validation_indices()) > 0  # those of validation stand behind the training examples
        corpora: list[tuple[Corpus, int | None]] = [(self.corpus, None)]
        for part, of_targets in self.target_corpora.items():
            if part != "validation" or not is_joint:
                corpora += [(one.corpus, one.place) for one in of_targets if one.corpus is not None]
        for of_targets in self.reported.corpora.values() if self.reported else ():
            corpora += [(one.corpus, None) for one in of_targets if one.corpus is not None]
        return [(corpus, place) for corpus, place in corpora if corpus.reference_margins is not None]

    @property
    def target_sizes(self) -> dict[str, list[int]]:
        """The number of rows of each target in each part."""
        return {part: [one.num_rows for one in corpora] for part, corpora in self.target_corpora.items()}

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
        """The corpus indices of the validation examples; none where they are of another kind than is trained on."""
        return self.corpus.kept_indices[self.corpus.kept_indices >= self.num_examples]

    def without_validation(self, places: Int[np.ndarray, "dropped"]) -> "TextTask":
        """The task in which some validation examples, by their places in `held_out_examples`, judge no more; of one
        target. As those that are too long they keep their places."""
        (judges,) = self.target_corpora["validation"]
        assert judges.corpus is not None
        is_joint = len(self.validation_indices()) > 0
        corpus = self.corpus.without_examples(self.num_examples + places) if is_joint else self.corpus
        kept = [judges._replace(corpus=judges.corpus.without_examples(places))]
        stream = cache_stream(self.mesh, _make_held_out_stream(kept, self.outer_objective, self.mesh, self.layout))
        return self._replace(
            corpus=corpus,
            target_corpora=self.target_corpora | {"validation": kept},
            held_out_streams=self.held_out_streams | {"validation": stream},
        )


class TextPrograms(NamedTuple):
    """The compiled functions of a task, which do not depend on its data."""

    decoder: models.Decoder
    objective: Objective
    outer_objective: OuterObjective
    reported: OuterObjective | None
    """Of the targets that judge nothing."""
    problem: Problem
    optimizer: optax.GradientTransformation
    train_step: TrainStep
    has_proximal: bool


class TokenizedData(NamedTuple):
    """The examples of a run as tokens."""

    examples: list[Example]
    held_out_examples: dict[str, list[list[Example]]]
    """The parts that have examples; those of each target."""
    notes: list[str]
    tokenizer: Any
    source_files: dict[str, bytes]
    architecture: models.DecoderConfig
    corpora: dict[str, Corpus]
    """`train_corpus` (unless training examples are streamed) and, by `target_corpus_name`, those of each target."""
    targets: tuple[TargetSpec, ...]
    is_joint: bool
    """Whether the validation examples stand behind the training examples in `train_corpus`."""
    reported: tuple[TargetSpec, ...] = ()
    """Targets that judge nothing."""
    reported_examples: Mapping[str, list[list[Example]]] = {}
    """Those of each of them, in dev and test."""

    @property
    def train_corpus(self) -> str:
        """The name of the corpus of the training examples."""
        return JOINT_CORPUS if self.is_joint else TRAINING_CORPUS

    def part_corpora(self, part: str) -> list[TargetCorpus]:
        """What the targets read in a part."""
        return [self._target_corpus(part, place, spec) for place, spec in enumerate(self.targets)]

    def _target_corpus(self, part: str, place: int, spec: TargetSpec) -> TargetCorpus:
        corpus = self.corpora.get(target_corpus_name(part, spec))
        if corpus is None or not spec.source and self.is_joint:  # one target whose batches are those of training
            return TargetCorpus(place, corpus)
        of_parts = [self.corpora.get(target_corpus_name(part, spec)) for part in PART_NAMES]
        longest = max(batches.padded_max_length(one) for one in of_parts if one is not None)
        return TargetCorpus(place, corpus, longest)

    def reported_corpora(self) -> dict[str, list[TargetCorpus]]:
        """What the targets that judge nothing read in dev and test."""
        corpora: dict[str, list[TargetCorpus]] = {}
        for part in (part for part in self.parts if part != "validation"):
            for place, spec in enumerate(self.reported):
                own = self._target_corpus(part, place, spec)
                if own.corpus is not None or not spec.has_examples:
                    corpora.setdefault(part, []).append(own)
        return corpora

    def part_examples(self, part: str) -> list[Example]:
        """The rows of a part, target by target."""
        rows = [example for own in self.held_out_examples.get(part, ()) for example in own]
        return rows + [targets.parameters_example() for spec in self.targets if not spec.has_examples]

    @property
    def parts(self) -> list[str]:
        """Those that have rows: with targets that read the parameters alone, at least validation."""
        if not self.held_out_examples and not self.targets[0].has_examples:
            return ["validation", *self.reported_examples]
        return list(self.held_out_examples)


JOINT_CORPUS, TRAINING_CORPUS = "training and validation", "training"
"""The corpus of the training examples, with validation behind them and alone."""


def prepare_text_task(
    config: TextTaskConfig,
    splits: DataSplits,
    folder: Path,
    *,
    num_steps: int,
    seeds: Sequence[int],
    proximal_strength: float = 0.0,
    target: TargetSection = TargetSection(),  # noqa: B008 (frozen)
    optimizer: optax.GradientTransformation | None = None,
) -> TextTask:
    """Tokenize the examples, load the model, and compose the bilevel problem, in which `target` judges.

    `seeds` are those of all the data orders that the run will draw: with packing, the shape that all batches share must
    hold each of them. `proximal_strength` is delta in delta/2 |params - start|^2. A reference model's log-probabilities
    are written into `folder`, and read from there when the run is resumed. `optimizer` takes the place of that of the
    config.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding_rules = sharding.parse_sharding_rules(config.mesh.sharding_rules, mesh)
    tokenized_data = tokenize_splits(config, splits, target)
    identity.check_tokens(folder, describe_tokens(tokenized_data, streaming=config.data.streaming))
    base_params, init_params = load_params(config.model, config.lora, tokenized_data.architecture, mesh, sharding_rules)
    if names := corpora_with_reference(tokenized_data, config.objective):
        reference_params = base_params if base_params is not None else init_params(config.train.seed)
        decoder = models.make_decoder(
            tokenized_data.architecture, gather_params=sharding.parameter_gatherer(mesh, sharding_rules)
        )
        examples = group_by_corpus(tokenized_data, streaming=config.data.streaming)
        with_margins = attach_reference_margins(
            {name: tokenized_data.corpora[name] for name in names},
            examples,
            folder,
            decoder,
            reference_params,
            mesh,
            model=config.model,
            stored=config.objective.reference,
            batch_size=config.train.global_batch_size,
            num_micro_batches=config.train.gradient_accumulation_steps,
        )
        tokenized_data = tokenized_data._replace(corpora=tokenized_data.corpora | with_margins)
    if unsharded := sharding.find_unsharded(
        mesh, sharding_rules, init_params(config.train.seed) if base_params is None else base_params
    ):
        note = f"mesh.fsdp = {config.mesh.fsdp} does not divide {', '.join(unsharded)}: whole on every device."
        tokenized_data = tokenized_data._replace(notes=[*tokenized_data.notes, note])
    programs = build_programs(
        tokenized_data.architecture,
        config.objective,
        optimizer or build_optimizer(config.optimizer, num_steps),
        mesh,
        sharding_rules,
        remat=config.model.remat,
        compute_dtype=compute_dtype(config.train),
        lora=base_params is not None,
        proximal_strength=proximal_strength,
        specs=tokenized_data.targets,
        reported=tokenized_data.reported,
    )
    task = compose_text_task(
        config, tokenized_data, base_params, init_params, programs, mesh, num_steps=num_steps, seeds=seeds
    )
    check_target_functions(task, config.train.seed, tokenized_data.targets, tokenized_data.reported)
    return task


def check_target_functions(
    task: TextTask, seed: int, specs: Sequence[TargetSpec], reported: Sequence[TargetSpec] = ()
) -> None:
    """Raise ValueError for a target that is a function of the user's and cannot judge, or cannot be read."""
    if all(spec.settings is not None for spec in (*specs, *reported)):
        return
    start = task.init_params(seed)
    targets.check_functions(
        task.outer_objective.targets, task.held_out_streams["validation"], start, task.frozen(start), specs
    )
    if task.reported is not None:
        targets.check_reported_functions(task.reported, start, task.frozen(start), reported)


def tokenize_splits(
    config: TextTaskConfig,
    splits: DataSplits,
    target: TargetSection = TargetSection(),  # noqa: B008 (frozen)
) -> TokenizedData:
    """The examples as tokens of the model's tokenizer; checked against the objective and the targets."""
    folder = config.model.name_or_path
    tokenizer, architecture = tokens.load_tokenizer(folder), models.read_config(folder)
    check_special_tokens(folder, tokenizer, architecture.vocab_size)
    specs = targets.list_targets(target, config.objective)
    return tokenize_parts(config, splits, tokenizer, architecture, models.read_source_files(folder), specs)


def tokenize_parts(
    config: TextSections,
    splits: DataSplits,
    tokenizer: Any,
    architecture: models.DecoderConfig,
    source_files: dict[str, bytes],
    specs: tuple[TargetSpec, ...],
) -> TokenizedData:
    """The examples as tokens of a tokenizer that is loaded; checked against the objective and the targets."""
    specs, reported = targets.split_reported(specs)
    reported_examples, judges, unread = targets.group_reported(reported, splits.held_out)
    held_out = targets.group_by_target(specs, judges)
    targets.check_reported_parts(specs, held_out, reported_examples)
    check_examples(config.objective, splits.train)
    targets.check_target_examples(specs, held_out, config.objective)
    targets.check_target_examples(reported, reported_examples, config.objective)
    text = TokenizedData(
        splits.train,
        held_out,
        [*splits.notes, *unread],
        tokenizer,
        source_files,
        architecture,
        {},
        specs,
        is_joint=targets.is_trainable(specs, config.objective),
        reported=reported,
        reported_examples=reported_examples,
    )
    for name, part_examples in group_by_corpus(text, streaming=config.data.streaming).items():
        token_weights = splits.token_weights if name == text.train_corpus else None
        text.corpora[name], report = tokenize_examples(
            config.data, part_examples, tokenizer, architecture, token_weights
        )
        text.notes.append(f"{name}: {report}.")
    if reported or not targets.is_training_loss(specs, config.objective):
        text.notes.append(targets.describe_targets(specs, reported))
    return text


def describe_tokens(tokenized_data: TokenizedData, *, streaming: bool) -> dict[str, dict[str, Any]]:
    """name -> sizes and hashes of each corpus, in the order of its rows: what a run that is resumed must read again."""
    examples = group_by_corpus(tokenized_data, streaming=streaming)
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


def group_by_corpus(text: TokenizedData, *, streaming: bool = False) -> dict[str, list[Example]]:
    """The examples of each corpus."""
    validation = [example for own in text.held_out_examples.get("validation", ()) for example in own]
    groups = {} if streaming else {text.train_corpus: text.examples + (validation if text.is_joint else [])}
    for specs, parts in ((text.targets, text.held_out_examples), (text.reported, text.reported_examples)):
        for part, examples_by_target in parts.items():
            for spec, examples in zip(specs, examples_by_target, strict=False):
                if examples:
                    groups[target_corpus_name(part, spec)] = examples
    return groups


def target_corpus_name(part: str, spec: TargetSpec) -> str:
    """The name of the corpus of a target's examples in a part."""
    return f"{part}: {spec.source}" if spec.source else part


def corpora_with_reference(text: TokenizedData, objective: ObjectiveSection) -> list[str]:
    """The names of the corpora whose pairs dpo compares with a reference model."""
    names = [text.train_corpus] if objective.name == "dpo" and text.train_corpus in text.corpora else []
    parts = [*text.held_out_examples, *(part for part in text.reported_examples if part not in text.held_out_examples)]
    read_by_dpo = [spec for spec in (*text.targets, *text.reported) if spec.loss == "dpo"]
    corpora = [target_corpus_name(part, spec) for part in parts for spec in read_by_dpo]
    return names + [name for name in corpora if name in text.corpora]


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
    specs: Sequence[TargetSpec],
    reported: Sequence[TargetSpec] = (),
) -> TextPrograms:
    """The model's functions, its loss and its training step; with `lora` adapters are trained over `frozen["base"]`.

    `specs` are the targets that validation examples judge by, `reported` those that judge nothing.
    """
    gather_params = sharding.parameter_gatherer(mesh, sharding_rules)
    decoder = models.make_decoder(architecture, remat=remat, compute_dtype=compute_dtype, gather_params=gather_params)
    run_objective = build_objective(objective, decoder, lora=lora)
    outer = targets.build_outer_objective(specs, objective, run_objective, decoder, lora=lora)
    beside = targets.build_outer_objective(reported, objective, run_objective, decoder, lora=lora) if reported else None
    problem = weighted(run_objective.losses, outer=outer.losses, prior=_proximal_term(proximal_strength))
    step = train_step(problem, optimizer)
    return TextPrograms(decoder, run_objective, outer, beside, problem, optimizer, step, proximal_strength > 0)


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
    corpus, layout = _fit_layout(config, tokenized_data, num_steps=num_steps, seeds=seeds)
    layout = align_layout(mesh, layout)
    target_corpora = {part: tokenized_data.part_corpora(part) for part in tokenized_data.parts}

    def make_streams(objective: OuterObjective, parts: Mapping[str, list[TargetCorpus]]) -> dict[str, Stream]:
        return {
            part: cache_stream(mesh, _make_held_out_stream(corpora, objective, mesh, layout))
            for part, corpora in parts.items()
        }

    reported, beside = None, tokenized_data.reported_corpora()
    if programs.reported is not None:
        reported = ReportedTargets(programs.reported, make_streams(programs.reported, beside), beside)
    return TextTask(
        examples=tokenized_data.examples,
        held_out_examples={part: tokenized_data.part_examples(part) for part in target_corpora},
        notes=tokenized_data.notes,
        corpus=corpus,
        held_out_streams=make_streams(programs.outer_objective, target_corpora),
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
        outer_objective=programs.outer_objective,
        target_corpora=target_corpora,
        reported=reported,
    )


def _make_held_out_stream(
    corpora: Sequence[TargetCorpus], objective: OuterObjective, mesh: Mesh, layout: BatchShape
) -> Stream:
    """The examples of a part once, as a stream that sums to the loss of the part."""
    return targets.make_target_stream(
        corpora, objective.targets, shape=layout.unpacked, local_rows=partial(local_rows, mesh)
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
    corpus = corpora[tokenized_data.train_corpus]
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
    *,
    allow_empty: bool = False,
) -> tuple[Corpus, tokens.TokenizationReport]:
    """The tokens of some examples, as every command makes them; `allow_empty` is that of `tokens.tokenize`."""
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
        allow_empty=allow_empty,
    )


def max_example_length(data: DataSection, architecture: models.DecoderConfig) -> int:
    """Tokens that an example may have."""
    return min(data.max_length, architecture.max_length)


def _proximal_term(strength: float) -> Callable | None:
    return proximal(strength, lambda frozen: frozen["start"]) if strength else None


def load_params(
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
