"""What validation examples judge by: the training loss, another one, or a weighted sum of several."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import dtypes
from jaxtyping import Array, Float, Int

from bilevel_jax.core.problem import weighted
from bilevel_jax.core.types import PADDING, Batch, Frozen, Params, Problem, Stream
from bilevel_jax.core.unrolled import validation_loss_and_grad_fn, validation_loss_fn
from bilevel_jax.lm import models
from bilevel_jax.lm.data import batches
from bilevel_jax.lm.data.batches import BatchShape
from bilevel_jax.lm.data.examples import Example, format_count
from bilevel_jax.lm.data.tokens import Corpus
from bilevel_jax.lm.losses.sft import assemble_params
from bilevel_jax.runs.config import schema
from bilevel_jax.runs.config.rules import PARAMETERS_TARGET, names_function
from bilevel_jax.runs.tasks.objective import Objective, build_objective, check_kind
from bilevel_jax.runs.tasks.user_functions import load_user_function

TargetLoss = str | Callable[..., Any]
"""sft, dpo, simpo, path/to/file.py:function, or that function itself."""
ExampleValues = Callable[[Params, Frozen, Batch], Float[Array, "examples"]]
MARK = "target_"
"""Begins the name of the leaf of a batch that says by which target it is judged; its value is the scale of the losses.

The name and not a number tells, as the targets' batches differ in shape and each is a program of its own.
"""


class TargetSpec(NamedTuple):
    """One target as the config names it."""

    source: str
    """Of the validation examples that it reads; empty: all of them."""
    loss: TargetLoss
    coefficient: float
    settings: schema.ObjectiveSection | None
    """Of sft, dpo and simpo; None of a function."""
    digest: str = ""
    """Of the file of a function, so that another content is another target."""

    @property
    def has_examples(self) -> bool:
        """Whether it reads examples, rather than the parameters alone."""
        return self.source != PARAMETERS_TARGET

    @property
    def name(self) -> str:
        """For people."""
        return self.source or (self.loss if isinstance(self.loss, str) else function_name(self.loss))


class Target(NamedTuple):
    """One target: functions of (params, frozen, micro-batch)."""

    name: str
    coefficient: float
    losses: ExampleValues
    unit: str
    accuracy: ExampleValues | None
    """None of a function of the user's."""
    accuracy_name: str
    has_examples: bool = True
    """Whether it reads examples, rather than the parameters alone."""


class OuterObjective(NamedTuple):
    """What the mean over the validation examples is taken of."""

    targets: tuple[Target, ...]
    losses: ExampleValues
    """Of each validation example, scaled so that the mean over all of them is the weighted sum of the targets'."""
    unscaled_losses: ExampleValues
    """Of each validation example, in the unit of its own target."""
    accuracy: ExampleValues
    """Of each validation example, as its own target defines it; nan where that has none."""
    unit: str


class TargetCorpus(NamedTuple):
    """The validation examples of one target in one part."""

    place: int
    """Of the target among the others."""
    corpus: Corpus | None
    """None of a target without examples."""
    length: int = 0
    """Token places of a row, which hold its longest example in every part; 0: as many as in training."""

    @property
    def num_rows(self) -> int:
        """Rows in the part: the examples, or one that stands for the parameters."""
        return 1 if self.corpus is None else self.corpus.num_examples

    @property
    def num_kept(self) -> int:
        """Rows that are read."""
        return 1 if self.corpus is None else len(self.corpus.kept_indices)


class ReportedTargets(NamedTuple):
    """Targets of coefficient 0: read on dev and test beside the validation loss, where they judge nothing."""

    objective: OuterObjective
    streams: dict[str, Stream]
    """Of the parts in which some have examples."""
    corpora: dict[str, list[TargetCorpus]]


def split_reported(specs: Sequence[TargetSpec]) -> tuple[tuple[TargetSpec, ...], tuple[TargetSpec, ...]]:
    """The targets that judge, and those of coefficient 0, which are reported alone."""
    judging = tuple(spec for spec in specs if spec.coefficient)
    return judging, tuple(spec for spec in specs if not spec.coefficient)


def list_targets(section: schema.TargetSection, objective: schema.ObjectiveSection) -> tuple[TargetSpec, ...]:
    """The targets of a config, those without examples last; one, the training loss, where section target is empty.

    Those of coefficient 0 are among them: see `split_reported`.
    """
    sources = section.sources or ("",)
    losses: Sequence[TargetLoss] = section.losses or (objective.name,)
    coefficients = section.coefficients or [1 / len(sources)] * len(sources)
    columns = (_for_each(values, len(sources)) for values in (losses, section.beta or [0], section.gamma_ratio or [-1]))
    specs = [
        TargetSpec(source, loss, coefficient, _find_settings(loss, beta, gamma_ratio, objective), _hash_file(loss))
        for source, coefficient, loss, beta, gamma_ratio in zip(sources, coefficients, *columns, strict=True)
    ]
    return tuple(sorted(specs, key=lambda spec: not spec.has_examples))


def _for_each(values: Sequence[Any], count: int) -> list[Any]:
    """One value for each target, where there may be one for all."""
    return list(values) * count if len(values) == 1 else list(values)


def _hash_file(loss: TargetLoss) -> str:
    if not isinstance(loss, str) or not names_function(loss):
        return ""
    path = Path(loss.rpartition(":")[0])
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _find_settings(
    loss: TargetLoss, beta: float, gamma_ratio: float, objective: schema.ObjectiveSection
) -> schema.ObjectiveSection | None:
    """Those of the objective where it is the same loss."""
    if not isinstance(loss, str) or names_function(loss):
        return None
    if loss == objective.name:
        gamma_ratio = objective.gamma_ratio if gamma_ratio < 0 else gamma_ratio
        return replace(objective, beta=beta or objective.beta, gamma_ratio=gamma_ratio)
    gamma_ratio = schema.ObjectiveSection.gamma_ratio if gamma_ratio < 0 else gamma_ratio
    beta = beta if loss != "sft" else 0.0
    return schema.ObjectiveSection(name=loss, beta=beta, gamma_ratio=gamma_ratio)  # type: ignore[arg-type]


def is_trainable(specs: Sequence[TargetSpec], objective: schema.ObjectiveSection) -> bool:
    """Whether training on the validation examples lowers what they judge by: they judge by the training loss."""
    reading = [spec for spec in specs if spec.has_examples]
    return bool(reading) and all(
        spec.settings is not None and spec.settings.name == objective.name and spec.coefficient > 0 for spec in reading
    )


def is_training_loss(specs: Sequence[TargetSpec], objective: schema.ObjectiveSection) -> bool:
    """Whether all validation examples judge by the training loss."""
    return len(specs) == 1 and not specs[0].source and specs[0].settings == objective


def describe_targets(specs: Sequence[TargetSpec], reported: Sequence[TargetSpec] = ()) -> str:
    """What the validation loss is, in words, and what is reported beside it."""
    beside = ", ".join(map(_describe_loss, reported))
    return f"validation loss: {_describe_sum(specs)}." + (f" Reported beside it: {beside}." if beside else "")


def _describe_sum(specs: Sequence[TargetSpec]) -> str:
    terms = []
    for spec in specs:
        factor = "" if len(specs) == 1 and spec.coefficient == 1 else f"{spec.coefficient:g} "
        terms.append(f"{factor}{_describe_loss(spec)}")
    return " + ".join(terms)


def _describe_loss(spec: TargetSpec) -> str:
    loss = spec.loss if isinstance(spec.loss, str) else function_name(spec.loss)
    of = "" if not spec.source else " of the parameters" if not spec.has_examples else f" of {spec.source}"
    return f"{loss}{of}"


# ---- the examples


def group_by_target(
    specs: Sequence[TargetSpec], held_out: Mapping[str, list[Example]]
) -> dict[str, list[list[Example]]]:
    """part -> the examples of each target that judges and has some; a part without any is left out.

    Raises ValueError for a source that no target names, and for a target without examples in a part.
    """
    unread = next((examples for examples in held_out.values() if examples), [])
    if unread and not any(spec.has_examples for spec in specs):
        raise ValueError(
            f"{unread[0].where}: the target {PARAMETERS_TARGET!r} reads no examples, and examples are given. Name "
            "their source in target.sources, too, or give none."
        )
    specs = [spec for spec in specs if spec.has_examples]
    grouped = {}
    for part, examples in held_out.items():
        if not examples or not specs:
            continue
        if len(specs) == 1 and not specs[0].source:
            grouped[part] = [examples]
            continue
        sources = {spec.source for spec in specs}
        if strange := next((example for example in examples if example.source not in sources), None):
            if strange.source == PARAMETERS_TARGET:
                raise ValueError(
                    f"{strange.where}: its source is {PARAMETERS_TARGET!r}, which is the name of the target without "
                    "examples. Give the examples another source."
                )
            raise ValueError(
                f"{strange.where}: its source is {strange.source!r}, which no target reads; target.sources names "
                f"{sorted(sources)}. Name it there, or set data.source_field to the key that tells the targets apart."
            )
        grouped[part] = [[example for example in examples if example.source == spec.source] for spec in specs]
        for spec, own in zip(specs, grouped[part], strict=True):
            if not own:
                raise ValueError(
                    f"the target {spec.source!r} has no example in {part}, and {part} has {len(examples):,} of others. "
                    f"Give it more (data.split divides by example), or files of its own in data.{part}."
                )
    return grouped


def group_reported(
    reported: Sequence[TargetSpec], held_out: Mapping[str, list[Example]]
) -> tuple[dict[str, list[list[Example]]], dict[str, list[Example]], list[str]]:
    """(dev and test: the examples of each target that is reported alone; the other examples; notes).

    Raises ValueError for one that has examples in neither.
    """
    sources = {spec.source for spec in reported}
    others = {part: [one for one in examples if one.source not in sources] for part, examples in held_out.items()}
    grouped = {}
    for part in ("dev", "test"):
        own = [[one for one in held_out.get(part, ()) if one.source == spec.source] for spec in reported]
        if any(own):
            grouped[part] = own
    notes = []
    for place, spec in enumerate(reported):
        is_read = any(own[place] for own in grouped.values()) if spec.has_examples else held_out.get("test")
        if not (is_read or (not spec.has_examples and held_out.get("dev"))):
            raise ValueError(
                f"the target {spec.source!r} has coefficient 0, so it is read on dev and test alone, and has no "
                "example there. Name its file in data.dev or data.test, or give it another coefficient."
            )
        if unread := sum(one.source == spec.source for one in held_out.get("validation", ())):
            notes.append(
                f"{format_count('validation example', unread, ('is', 'are'))} of {spec.source} not read, as its "
                "target has coefficient 0."
            )
    return grouped, others, notes


def check_reported_parts(
    specs: Sequence[TargetSpec],
    grouped: Mapping[str, list[list[Example]]],
    reported: Mapping[str, list[list[Example]]],
) -> None:
    """Raise ValueError for a part that has examples of targets of coefficient 0 alone, where others judge by
    examples."""
    if alone := [part for part in reported if part not in grouped and any(spec.has_examples for spec in specs)]:
        raise ValueError(
            f"{alone[0]} has examples of targets of coefficient 0 alone. They are read beside the validation loss: "
            f"give {alone[0]} examples of the targets that judge, too."
        )


def check_target_examples(
    specs: Sequence[TargetSpec], grouped: Mapping[str, list[list[Example]]], objective: schema.ObjectiveSection
) -> None:
    """Raise ValueError where the examples of a target are not what its loss reads: pairs, or single responses."""
    for examples_by_target in grouped.values():
        for spec, examples in zip(specs, examples_by_target, strict=False):
            if spec.settings is not None:
                key = "objective.name" if is_training_loss(specs, objective) else "target.losses"
                check_kind(examples, spec.settings.name, key=key)
                continue
            mixed = next((one for one in examples if bool(one.rejected) != bool(examples[0].rejected)), None)
            if mixed is not None:
                raise ValueError(
                    f"{mixed.where} and {examples[0].where}: a preference pair and a single response, and a target "
                    "reads the one or the other. Tell them apart by target.sources."
                )


def parameters_example() -> Example:
    """The row that stands for a target without examples, wherever rows are counted."""
    return Example(PARAMETERS_TARGET, 0, (), PARAMETERS_TARGET, None, PARAMETERS_TARGET, 0)


# ---- the losses


def build_outer_objective(
    specs: Sequence[TargetSpec],
    objective: schema.ObjectiveSection,
    training: Objective,
    decoder: models.Decoder,
    *,
    lora: bool,
) -> OuterObjective:
    """The targets as functions; `training` is the objective of the training examples, which a target may share."""
    targets = tuple(_build_target(spec, objective, training, decoder, lora) for spec in specs)
    if len(targets) == 1 and targets[0].coefficient == 1 and specs[0].has_examples:
        return _single_target(targets[0])

    def losses(params: Params, frozen: Frozen, batch: Batch) -> Float[Array, "examples"]:
        target, scale = find_target(targets, batch)
        return scale * target.losses(params, frozen, batch)

    def unscaled_losses(params: Params, frozen: Frozen, batch: Batch) -> Float[Array, "examples"]:
        return find_target(targets, batch)[0].losses(params, frozen, batch)

    def accuracy(params: Params, frozen: Frozen, batch: Batch) -> Float[Array, "examples"]:
        return _accuracy_of(find_target(targets, batch)[0], params, frozen, batch)

    kinds = {(spec.settings, target.unit) for spec, target in zip(specs, targets, strict=True)}
    is_mean = min(spec.coefficient for spec in specs) > 0 and abs(sum(spec.coefficient for spec in specs) - 1) < 1e-9
    unit = targets[0].unit if len(kinds) == 1 and is_mean else "units of the sum of targets"
    return OuterObjective(targets, losses, unscaled_losses, accuracy, unit)


def training_target(training: Objective) -> OuterObjective:
    """All validation examples judge by the training loss."""
    return _single_target(
        Target("", 1.0, training.losses, training.loss_unit, training.accuracy, training.accuracy_name)
    )


def _single_target(target: Target) -> OuterObjective:
    accuracy = target.accuracy or partial(_accuracy_of, target)
    return OuterObjective((target,), target.losses, target.losses, accuracy, target.unit)


def _accuracy_of(target: Target, params: Params, frozen: Frozen, batch: Batch) -> Float[Array, "examples"]:
    if target.accuracy is None:
        return jnp.full(batch["index"].shape, jnp.nan)
    return target.accuracy(params, frozen, batch)


def find_target(targets: Sequence[Target], batch: Batch) -> tuple[Target, float | Array]:
    """The target that judges by a batch, and the scale of its losses there."""
    place = find_place(batch)
    return targets[place], batch.get(f"{MARK}{place}", 1.0)


def find_place(batch: Batch) -> int:
    """The place among the others of the target that judges by a batch."""
    return next((int(key.removeprefix(MARK)) for key in batch if key.startswith(MARK)), 0)


def _build_target(
    spec: TargetSpec,
    objective: schema.ObjectiveSection,
    training: Objective,
    decoder: models.Decoder,
    lora: bool,
) -> Target:
    if spec.settings is not None:
        own = training if spec.settings == objective else build_objective(spec.settings, decoder, lora=lora)
        return Target(spec.name, spec.coefficient, own.losses, own.loss_unit, own.accuracy, own.accuracy_name)
    function, name = (
        (load_user_function(spec.loss, key="target.losses"), spec.loss)
        if isinstance(spec.loss, str)
        else (spec.loss, function_name(spec.loss))
    )
    losses = _losses_of_examples(function, name, decoder) if spec.has_examples else _loss_of_parameters(function, name)
    return Target(spec.name, spec.coefficient, losses, f"units of {name}", None, "", spec.has_examples)


def function_name(function: Any) -> str:
    """What a function is called."""
    return getattr(function, "__name__", type(function).__name__)


def _losses_of_examples(function: Callable[..., Any], name: str, decoder: models.Decoder) -> Callable[..., Any]:
    """The losses of a user's function of the decoder, which gives (params, batch) -> one loss for each example."""
    try:
        losses_of_batch = function(decoder)
    except Exception as error:
        raise ValueError(
            f"{name} failed with {_first_line(error)}. It is called with the model's decoder, and returns a "
            "function (params, batch) -> one loss for each example, as bilevel_jax.lm.losses.sft_losses does."
        ) from error
    if not callable(losses_of_batch):
        raise ValueError(
            f"{name} returned a {type(losses_of_batch).__name__} for the model's decoder; wanted a function (params, "
            "batch) -> one loss for each example, as bilevel_jax.lm.losses.sft_losses returns."
        )

    def losses(params: Params, frozen: Frozen, batch: Batch) -> Float[Array, "examples"]:
        given = {key: leaf for key, leaf in batch.items() if not key.startswith(MARK)}
        whole = assemble_params(params, frozen["base"])
        values = _call(name, losses_of_batch, (whole, given), "(params, batch)")
        if jnp.shape(values) != batch["index"].shape:
            raise ValueError(
                f"{name} gives losses of shape {jnp.shape(values)} for {batch['index'].shape[0]} examples; wanted one "
                "for each (a preference pair is one example of two sequences, chosen and rejected)."
            )
        return jnp.where(batch["index"] != PADDING, values, 0)

    return losses


def _loss_of_parameters(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The loss of a user's function of all parameters, LoRA merged, as that of the one row that stands for them."""

    def losses(params: Params, frozen: Frozen, batch: Batch) -> Float[Array, "examples"]:
        whole = params if frozen["base"] is None else models.merge_adapters(frozen["base"], params)
        value = _call(name, function, (whole,), "(params)")
        if jnp.shape(value) != ():
            raise ValueError(
                f"{name} gives an array of shape {jnp.shape(value)} for the parameters; wanted one number."
            )
        return jnp.where(batch["index"] != PADDING, value, 0)

    return losses


def _call(name: str, function: Callable[..., Any], arguments: tuple[Any, ...], called_with: str) -> Any:
    try:
        values = function(*arguments)
    except Exception as error:
        raise ValueError(
            f"the target {name} failed with {_first_line(error)}. It is called with {called_with} under jit."
        ) from error
    if not hasattr(values, "dtype") or not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(f"the target {name} gives a {type(values).__name__}; wanted jax numbers of a float type.")
    return values


def _first_line(error: Exception) -> str:
    """An error in one line; those of jax have many."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200].rstrip('. ')}"


# ---- the streams


def make_target_stream(
    parts: Sequence[TargetCorpus], targets: Sequence[Target], shape: BatchShape, local_rows: Callable[[int], Any]
) -> Stream:
    """Every row of every target once, as a stream whose sum is the weighted sum of the targets' means.

    The `index` of a row counts through the targets. `shape` is that of single sequences; `local_rows` gives the rows of
    so many that this process builds.
    """
    if len(parts) == 1 and parts[0].corpus is not None and targets[0].coefficient == 1:
        own_shape = _own_shape(parts[0], parts[0].corpus, shape)
        return batches.make_evaluation_stream(parts[0].corpus, own_shape, local_rows=local_rows(own_shape.rows))
    total = sum(part.num_kept for part in parts)
    pieces, first = [], 0
    for part in parts:
        if part.corpus is None:
            stream = Stream(lambda step: _parameters_batch(shape), 1)
        else:
            own_shape = _own_shape(part, part.corpus, shape)
            stream = batches.make_evaluation_stream(part.corpus, own_shape, local_rows=local_rows(own_shape.rows))
        scale = targets[part.place].coefficient * total / part.num_kept
        pieces.append((stream, part.place, scale, first))
        first += part.num_rows
    owners = [(*piece, step) for piece in pieces for step in range(piece[0].steps)]

    def batch_at(step: int) -> Batch:
        stream, place, scale, first, own_step = owners[step]
        return _mark(stream.batch(own_step), place, scale, first=first, total=total)

    return Stream(batch_at, len(owners))


def make_drawn_streams(
    parts: Sequence[TargetCorpus],
    targets: Sequence[Target],
    shape: BatchShape,
    local_rows: Callable[[int], Any],
    *,
    steps: int,
    batch_size: int,
    seed: int,
) -> list[Stream]:
    """Of each target batches of its validation examples in epochs, for methods that step on L_v as they train.

    Scaled so that the means over the batches of a step, one of each target, sum to an estimate of L_v.
    """
    streams = []
    for part in parts:
        stream = Stream(lambda step: _parameters_batch(shape), steps)
        if part.corpus is not None:
            kept, own_shape = part.corpus.kept_indices, _own_shape(part, part.corpus, shape)
            order = batches.shuffled_subset_order(kept, part.corpus.num_examples, batch_size, seed)
            rows = local_rows(own_shape.rows)
            stream = batches.make_train_stream(part.corpus, order, steps, own_shape, local_rows=rows)
        streams.append(_mark_stream(stream, part.place, targets[part.place].coefficient))
    return streams


def _mark_stream(stream: Stream, place: int, scale: float) -> Stream:
    return Stream(lambda step: _mark(stream.batch(step), place, scale), stream.steps)


def _own_shape(part: TargetCorpus, corpus: Corpus, shape: BatchShape) -> BatchShape:
    """The unpacked shape for the sequences of a target: two for each example of pairs, as long as its own are."""
    rows = shape.rows // shape.sequences_per_example * corpus.sequences_per_example
    length = part.length or shape.length
    return shape._replace(rows=rows, sequences_per_example=corpus.sequences_per_example, length=length)


def _mark(batch: Batch, place: int, scale: float, *, first: int = 0, total: int = 0) -> Batch:
    """The batch of one target among others: its rows counted from `first`, its examples among `total` in all."""
    num_examples, targeted = batch["num_examples"], batch["targeted"]
    real = dtypes.canonicalize_dtype(float)
    if total:  # a mean over tokens multiplies by the one and divides by the other: their ratio stays
        targeted = (targeted * (total / num_examples.astype(np.float64))).astype(real)
        num_examples = np.full_like(num_examples, total)
    return batch | {
        "index": np.where(batch["index"] != PADDING, batch["index"] + first, PADDING).astype(np.int32),
        "num_examples": num_examples,
        "targeted": targeted,
        f"{MARK}{place}": np.full(len(num_examples), scale, real),
    }


def _parameters_batch(shape: BatchShape) -> Batch:
    """One row, without tokens."""
    index = np.full((shape.num_micro_batches, shape.examples), PADDING, np.int32)
    index[0, 0] = 0
    ones = np.ones(shape.num_micro_batches, np.float32)
    return {"index": index, "num_examples": ones, "targeted": ones}


# ---- what is read of them


def check_functions(
    targets: Sequence[Target], validation: Stream, params: Params, frozen: Frozen, specs: Sequence[TargetSpec]
) -> None:
    """Raise ValueError for a function of the user's whose loss is not finite, or does not depend on the parameters.

    Read a little beside `params`, where a distance from them has a slope, too.
    """
    near = _perturb(params)
    for place, (target, spec) in enumerate(zip(targets, specs, strict=True)):
        if spec.settings is not None:
            continue
        loss, slope = _loss_and_slope(target, select_target(validation, place), near, frozen)
        if not np.isfinite([loss, slope]).all():
            raise ValueError(
                f"the target {spec.name} is {loss:g} with a gradient of norm {slope:g} at the start of training; "
                "wanted finite numbers. Look for a division by 0 and a logarithm or root at 0, also in the empty rows "
                "that fill a batch, whose gradient counts although their losses do not."
            )
        if slope == 0:
            raise ValueError(
                f"the target {spec.name} does not depend on the parameters: its gradient over all validation examples "
                "is 0, so no weight can change it. Look for stop_gradient, argmax, rounding and numbers that do not "
                "come from the parameters, and under LoRA for parameters that it leaves as they are."
            )


def check_reported_functions(
    reported: ReportedTargets, params: Params, frozen: Frozen, specs: Sequence[TargetSpec]
) -> None:
    """Raise ValueError for a function of the user's that is reported alone and whose loss is not finite."""
    for part, stream in reported.streams.items():
        for target, spec, place in zip(reported.objective.targets, specs, range(len(specs)), strict=True):
            own = select_target(stream, place)
            if spec.settings is not None or not own.steps:
                continue
            loss = float(validation_loss_fn(_summed(target))(params, frozen, own))
            if not np.isfinite(loss):
                raise ValueError(
                    f"the target {spec.name} is {loss:g} on {part} at the start of training; wanted a finite number. "
                    "Look for a division by 0 and a logarithm at 0."
                )


def _summed(target: Target) -> Problem:
    """The problem whose outer loss is the sum of a target's: its mean divides by the number of examples."""
    return weighted(lambda *given: target.losses(*given) * given[-1]["num_examples"])


def select_target(stream: Stream, place: int) -> Stream:
    """The batches of one target of a stream."""
    steps = [step for step in range(stream.steps) if find_place(stream.batch(step)) == place]
    return Stream(lambda step: stream.batch(steps[step]), len(steps))


def _loss_and_slope(target: Target, own: Stream, params: Params, frozen: Frozen) -> tuple[float, float]:
    """The sum of the losses of a target over its batches, and the norm of its gradient."""
    loss, grad = validation_loss_and_grad_fn(_summed(target))(params, frozen, own)
    return float(loss), float(_norm(grad))


_norm = jax.jit(optax.tree.norm)  # one program: array by array, those of several processes may wait for each other


@jax.jit
def _perturb(params: Params) -> Params:
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return structure.unflatten(
        leaf + 1e-3 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)
    )


def split_by_target(kept: Int[np.ndarray, "kept"], sizes: Sequence[int]) -> list[Int[np.ndarray, "own"]]:
    """The rows of each target among those of a part that are read, ascending; `sizes` are those of the targets."""
    return np.split(kept, np.searchsorted(kept, np.cumsum(sizes)[:-1]))
