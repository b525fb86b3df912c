"""Rules on config values across keys and sections"""

import dataclasses
import math
import re
import typing
from collections.abc import Callable
from typing import Any

from bilevel_jax.lm.inference.parameters import SERVICE_PARAMETERS
from bilevel_jax.runs.config.bounds import violation
from bilevel_jax.runs.config.schema import (
    POOLED_METHODS,
    SINGLE_LOOP_METHODS,
    SOURCE_BASELINES,
    AuditSection,
    OuterSection,
    ScoresSection,
    ScoreWeightsSection,
    SelectionSection,
)


def reads_array_data(config: Any) -> bool:
    """Whether a run of `compare` reads arrays rather than text."""
    return hasattr(config, "arrays") and len(config.data.train) == 1 and config.data.train[0].endswith(".npz")


def reads_records(config: Any) -> bool:
    """Whether a run of `rank` judges metrics by a table of known scores, and needs neither model nor responses."""
    return hasattr(config, "rank") and config.rank.records != ""


def names_service(model: str) -> bool:
    """Whether the name of a model is that of a service: NAME@http://..."""
    return re.search(r".@https?://.", model) is not None


def split_service(model: str) -> tuple[str, str]:
    """(name, address) of a service; a name may hold an @ of its own."""
    at = max(model.rfind("@http://"), model.rfind("@https://"))
    return model[:at], model[at + 1 :]


def is_evaluation(config: Any) -> bool:
    """Whether a config is that of `evaluate`, and not of a command that evaluates the models of its own run."""
    return hasattr(config, "evaluate") and not evaluates_own_models(config)


def evaluates_own_models(config: Any) -> bool:
    """Whether a command can evaluate the models of its own run: its section evaluate names prompts, and no model."""
    return hasattr(config, "evaluate") and hasattr(config.evaluate, "prompts")


def _names_unused_evaluation(config: Any) -> bool:
    """Whether something is to be measured of answers, and no prompts are named that would be answered."""
    if not evaluates_own_models(config):
        return False
    is_verified = config.verifier.name and not hasattr(config, "refine")  # whose responses it verifies in any case
    section = config.evaluate
    default = type(section)()
    keys = [field.name for field in dataclasses.fields(section) if field.name != "prompts"]
    named = any(getattr(section, key) != getattr(default, key) for key in keys) or is_verified or config.judge.url
    return not section.prompts and bool(named)


def _compares_answers(config: Any) -> bool:
    """Whether the arms of `compare` are to answer prompts."""
    return hasattr(config, "compare") and len(config.evaluate.prompts) > 0


def is_audit(config: Any) -> bool:
    """Whether it is the config of a run of `audit`; that of `tune` may hold its section, too."""
    return hasattr(config, "audit") and not hasattr(config, "tune")


def choose_command_after_tune(config: Any) -> str:
    """The command that tuned.yaml, which `tune` writes of this config, is for."""
    if config.tune.command != "auto":
        return config.tune.command
    return "audit" if reads_array_data(config) or config.audit != AuditSection() else "select"


def leads_to_audit(config: Any) -> bool:
    """Whether it is the config of a run of `audit`, or one of `tune` that ends with such a config."""
    return is_audit(config) or hasattr(config, "tune") and choose_command_after_tune(config) == "audit"


def trains_generator(config: Any) -> bool:
    """Whether a run is one of `refine` that trains its generator."""
    return hasattr(config, "refine") and config.refine.generator == "reinforce"


def weighs_by_scores(config: Any) -> bool:
    """Whether a run is one of `refine` with a candidate whose weights are scores."""
    return hasattr(config, "refine") and "ica" in config.refine.methods


def _holds_whole_groups(config: Any) -> bool:
    """Whether the responses to a question, which are neighbours in a batch, share a micro-batch."""
    micro_batch = config.train.global_batch_size // max(config.train.gradient_accumulation_steps, 1)
    return micro_batch % max(config.generate.num_generations, 1) == 0


def _asks_judge(config: Any) -> bool:
    named = {*config.evaluate.metrics}
    return bool({"preference", "safety"} & named) or config.evaluate.refusal_by == "judge"


def _of_responses(rank: Any) -> tuple[Any, ...]:
    return rank.own_answers, rank.accuracies, rank.reward_field, rank.strategies, rank.train_examples


PARAMETERS_TARGET = "parameters"
"""In target.sources, the target that reads no examples."""


def names_function(value: str) -> bool:
    """Whether a value is path/to/file.py:function."""
    return ".py:" in value


def reads_parameters_alone(config: Any) -> bool:
    """Whether the only target is a function of the parameters, which needs no validation examples."""
    return hasattr(config, "target") and config.target.sources == (PARAMETERS_TARGET,)


def _target_losses(target: Any) -> tuple[str, ...]:
    """A loss for each target; empty where it is that of training."""
    return target.losses * len(target.sources) if len(target.losses) == 1 and target.sources else target.losses


def _judges_by_one_target(target: Any) -> bool:
    """Whether one set of validation examples judges; targets of coefficient 0 are only reported."""
    return len(target.sources) < 2 or sum(coefficient != 0 for coefficient in target.coefficients) == 1


def _fits_targets(target: Any, values: tuple[float, ...], readers: tuple[str, ...], *, default: float) -> bool:
    """Whether a setting of some losses is one for all targets, or one for each, `default` where the loss has none."""
    losses = _target_losses(target)
    if len(values) <= 1:
        return all(value == default for value in values) or not set(readers).isdisjoint(losses)
    return len(values) == len(losses) == len(target.sources) and all(
        value == default or loss in readers for value, loss in zip(values, losses, strict=True)
    )


# (key, condition, end of the error message). Bounds of single keys stand next to the keys, in schema.py. A rule whose
# section a config lacks does not apply; one that reads further sections names them in REQUIRED_SECTIONS.
Rule = tuple[str, Callable[[Any], bool], str]
UNREAD_BY_REFINE = {
    "method": "refine.methods says how candidates are trained",
    "restart": "every training run of a round starts from the same model (refine.start_from)",
    "reshuffle": "every training run of a round has a data order of its own",
    "patience": "dev decides about whole rounds, and is not read between the steps of one",
    "warm_start": "every round starts from equal weights",
    "proximal": "refine trains without a term that holds the parameters",
    **dict.fromkeys(
        ("window", "curvature", "solver", "neumann_rate", "tolerance", "max_iterations", "curvature_batches"),
        "the weights of refine.methods = unrolled differentiate the whole training run",
    ),
}
"""Keys of section outer that a candidate of `refine` is not trained by, and why."""


def _goes_back_through_training(config: Any) -> bool:
    """Whether a run has hypergradients by unrolled differentiation."""
    if hasattr(config, "refine"):
        return "unrolled" in config.refine.methods or trains_generator(config)
    return config.outer.method in ("unrolled", "window")


def _leave_out_in_refine(key: str, reason: str) -> Rule:
    default = getattr(OuterSection(), key)
    return (
        f"outer.{key}",
        lambda c: not hasattr(c, "refine") or getattr(c.outer, key) == default,
        f"{reason}: leave it out",
    )


STEPS_OF_WEIGHTS = (
    "weighting", "steps", "learning_rate", "schedule", "max_step", "estimate", "reliability_every", "reliability_floor",
)  # fmt: skip
"""Keys of section outer that move weights or measure them, and that scores, or weights of 1, do not need."""


CONFIG_RULES: tuple[Rule, ...] = (
    *(_leave_out_in_refine(key, reason) for key, reason in UNREAD_BY_REFINE.items()),
    (
        "model.name_or_path",
        lambda c: c.model.name_or_path != "" or reads_array_data(c) or reads_records(c),
        "name a checkpoint's folder, or builtin:cipher",
    ),
    (
        "data.train",
        lambda c: len(c.data.train) > 0 or reads_records(c) or is_evaluation(c),
        "name the training examples: files or a dataset",
    ),
    (
        "rank.records",
        lambda c: c.rank.records == "" or not c.data.train,
        "judges metrics by known scores, and data.train ranks strategies by responses: leave one of them empty",
    ),
    (
        "rank.records",
        lambda c: c.rank.records == "" or not any((c.model.name_or_path, *_of_responses(c.rank))),
        "is read without model and responses: leave out model.name_or_path, rank.own_answers, rank.accuracies, "
        "rank.reward_field, rank.strategies and rank.train_examples",
    ),
    (
        "model.base_dtype",
        lambda c: c.model.base_dtype == "float32" or c.lora.r > 0,
        "only a frozen base can be stored in bfloat16: set lora.r above 0",
    ),
    (
        "data.validation",
        lambda c: len(c.data.validation) > 0 or reads_array_data(c) or reads_parameters_alone(c),
        "name the validation examples: files or a dataset",
    ),
    (
        "data.split",
        lambda c: min(c.data.split) >= 0 and c.data.split[0] > 0 and abs(sum(c.data.split) - 1) < 1e-6,
        "three shares (validation, dev, test), none negative, the first above 0, that sum to 1",
    ),
    (
        "optimizer.warmup_steps",
        lambda c: (
            c.optimizer.warmup_ratio > 0
            or c.train.max_steps < 1  # no limit, or an error of its own
            or c.optimizer.warmup_steps < c.train.max_steps
        ),
        "must be below train.max_steps; a share of them is optimizer.warmup_ratio",
    ),
    (
        "optimizer.name",
        lambda c: c.optimizer.name != "lion" or c.outer.method not in ("unrolled", "window"),
        "lion steps along a sign, whose derivative is 0: choose adamw, or set outer.method to implicit or alignment",
    ),
    (
        "train.gradient_accumulation_steps",
        lambda c: (
            c.train.gradient_accumulation_steps >= 1
            and c.train.global_batch_size % c.train.gradient_accumulation_steps == 0
        ),
        "must be 1 or more and divide train.global_batch_size",
    ),
    (
        "outer.method",
        lambda c: not hasattr(c, "tune") or c.outer.method not in SINGLE_LOOP_METHODS,
        "has no hypergradient that tune could certify: choose unrolled",
    ),
    (
        "certify.enabled",
        lambda c: not hasattr(c, "tune") or c.certify.enabled,
        "tune judges each setting by its certificates: leave it true",
    ),
    (
        "certify.step_sizes",
        lambda c: not hasattr(c, "tune") or max(c.certify.step_sizes, default=0.0) >= 0.1,
        "has no step of .1, without which no setting is ever BELIEVEd: add one",
    ),
    (
        "certify.removed",
        lambda c: not hasattr(c, "tune") or c.certify.retrains > 0 or max(c.certify.removed, default=0.0) >= 0.1,
        "has no share of .1 or more, without which and certify.retrains no setting is ever BELIEVEd: add one",
    ),
    (
        "contradictions.draws",
        lambda c: not hasattr(c, "tune") or c.contradictions.draws == 0,
        "is of select, which may drop validation examples before it certifies: tune with --contradictions.draws 0, and "
        "find the contradictions at the setting that it proposes",
    ),
    (
        "tune",
        lambda c: any(isinstance(value, tuple) and value for value in vars(c.tune).values()),
        "all lists are empty, so there is nothing to try: give tune.learning_rates",
    ),
    (
        "tune.command",
        lambda c: c.tune.command != "select" or not reads_array_data(c),
        "select is for text: a task of arrays goes on with audit",
    ),
    (
        "outer.product_precision",
        lambda c: (
            c.outer.product_precision == "highest"
            or is_audit(c)
            or hasattr(c, "compare")
            or _goes_back_through_training(c)
        ),
        "is that of hypergradients that go back through training (unrolled, window), and this run has none: leave it "
        "at highest",
    ),
    (
        "outer.product_precision",
        lambda c: c.outer.product_precision == "highest" or not leads_to_audit(c),
        "audit judges estimates by exact hypergradients, whose products have the highest precision: leave it at "
        "highest",
    ),
    (
        "outer.product_precision",
        lambda c: c.outer.product_precision == "highest" or not hasattr(c, "compare"),
        "methods are compared by passes over the data, of which a lower precision saves none: leave it at highest",
    ),
    (
        "outer.product_precision",
        lambda c: c.outer.product_precision == "highest" or not c.outer.linearize,
        "a step that is stored linearized has the products of training, whose precision is the highest: set it to "
        "highest, or outer.linearize to false",
    ),
    (
        "outer.proximal",
        lambda c: c.outer.proximal >= 0 and (c.outer.proximal > 0 or c.outer.method != "implicit"),
        "must be 0 or more; the implicit method needs it above 0 (try 0.1), or set outer.method to unrolled",
    ),
    (
        "outer.warm_start",
        lambda c: c.outer.warm_start == "" or c.outer.method not in SINGLE_LOOP_METHODS,
        "is for methods that repeat training: leave it empty",
    ),
    (
        "scores.embedding_file",
        lambda c: bool(c.scores.embedding_file) == (c.scores.embedding == "file"),
        "scores.embedding = file reads it: give both, or neither",
    ),
    (
        "rater.columns",
        lambda c: bool(c.rater.columns) == bool(c.rater.file),
        "rater.columns are columns of rater.file: give both, or neither",
    ),
    (
        "rater.features",
        lambda c: "columns" not in c.rater.features or bool(c.rater.columns),
        "columns needs rater.file and rater.columns: give both",
    ),
    (
        "rater.embedding_file",
        lambda c: bool(c.rater.embedding_file) == bool({"embedding", "embedding_likeness"} & set(c.rater.features)),
        "embedding and embedding_likeness of rater.features read it: name one of them and the file, or neither",
    ),
    (
        "rater.features",
        lambda c: (
            c.outer.weighting != "rater"
            or not c.model.from_scratch
            or not {"loss", "margin", "reducible", "hidden", "hidden_likeness"} & set(c.rater.features)
        ),
        "loss, margin, reducible and hidden states are those of the model before training, which model.from_scratch "
        "draws at random: name others, as uniform_loss and validation_loss",
    ),
    (
        "rater.folds",
        lambda c: c.rater.folds != 1,
        "without the one part there would be no validation left: give 2 or more, or 0",
    ),
    (
        "rater.folds",
        lambda c: c.rater.folds == 0 or (c.outer.weighting == "rater" and not hasattr(c, "compare")),
        "gives the coefficients of a rater intervals, in select with outer.weighting = rater: leave it at 0",
    ),
    (
        "rater.folds",
        lambda c: c.rater.folds == 0 or c.outer.validation_folds == 0,
        "leaves parts of validation out, and with outer.validation_folds they train: set one of them to 0",
    ),
    (
        "outer.weighting",
        lambda c: c.outer.weighting != "rater" or c.objective.name == "sft",
        "a rater reads single responses: set objective.name to sft, or choose another weighting",
    ),
    (
        "outer.validation_folds",
        lambda c: c.outer.validation_folds != 1,
        "one fold would judge every step and none would train: give 2 or more, or 0",
    ),
    (
        "outer.validation_folds",
        lambda c: c.outer.validation_folds == 0 or c.outer.method not in SINGLE_LOOP_METHODS,
        "is for methods that repeat training; this one trains on validation anyway: leave it at 0",
    ),
    (
        "outer.validation_folds",
        lambda c: (
            c.outer.validation_folds == 0 or hasattr(c, "retrain") or hasattr(c, "compare") or hasattr(c, "refine")
        ),
        "is for the commands select, compare and refine: leave it at 0",
    ),
    (
        "outer.validation_folds",
        lambda c: not hasattr(c, "refine") or c.outer.validation_folds == 0 or "unrolled" in c.refine.methods,
        "its folds take turns in the steps of unrolled, which refine.methods does not name: leave it at 0",
    ),
    (
        "outer.validation_folds",
        lambda c: c.outer.validation_folds == 0 or not trains_generator(c),
        "with refine.generator = reinforce the responses to a question share every batch, in which validation has no "
        "place: leave it at 0",
    ),
    (
        "outer.estimate",
        lambda c: c.outer.estimate != "pooled" or c.outer.method not in SINGLE_LOOP_METHODS,
        "pooled is for methods that repeat training (unrolled, window, implicit, alignment): choose one of them, or "
        "set outer.estimate to per_example",
    ),
    (
        "outer.estimate",
        lambda c: c.outer.estimate != "pooled" or c.outer.weighting in ("softmax", "sigmoid"),
        "a step is pooled over logits of single examples: set outer.weighting to softmax or sigmoid, or outer.estimate "
        "to per_example",
    ),
    (
        "outer.estimate",
        lambda c: c.outer.estimate != "pooled" or (c.outer.reliability_every > 0 and not c.outer.validation_folds),
        "pooling compares two halves of the validation set: set outer.reliability_every above 0 and "
        "outer.validation_folds to 0, or outer.estimate to per_example",
    ),
    (
        "compare.methods",
        lambda c: (
            not set(POOLED_METHODS) & {*c.compare.methods}
            or (
                c.outer.weighting in ("softmax", "sigmoid")
                and c.outer.reliability_every > 0
                and not c.outer.validation_folds
            )
        ),
        "pooled and auto compare two halves of the validation set over logits of single examples: set outer.weighting "
        "to softmax or sigmoid, outer.reliability_every above 0 and outer.validation_folds to 0, or leave them out",
    ),
    (
        "selection",
        lambda c: (
            sum(value > 0 for value in (c.selection.threshold, c.selection.resample, c.selection.per_source)) <= 1
        ),
        "threshold, resample and per_source are three ways to select: give one and leave the others at 0",
    ),
    (
        "selection.strata",
        lambda c: (
            not c.selection.strata or not (c.selection.threshold or c.selection.resample or c.selection.per_source)
        ),
        "strata divide selection.top_share: leave threshold, resample and per_source at 0, or strata empty",
    ),
    (
        "selection.num_strata",
        lambda c: c.selection.strata or c.selection.num_strata == SelectionSection().num_strata,
        "it is the number of strata of selection.strata, and that is empty: set strata, or leave num_strata at "
        f"{SelectionSection().num_strata}",
    ),
    (
        "selection.strata",
        lambda c: not hasattr(c, "score") or not c.selection.strata,
        "score knows no loss before training and chooses in passes over chunks on disk: leave strata empty, which "
        "select and export read",
    ),
    (
        "selection.max_repeats",
        lambda c: not c.selection.max_repeats or c.selection.resample > 0,
        "it caps how often selection.resample takes one example, and that is 0: set it, or leave max_repeats at 0",
    ),
    (
        "export.container",
        lambda c: c.export.container != "datasets" or not c.export.format.startswith("llama_factory"),
        "LLaMA-Factory reads files, not a folder of `datasets`: choose jsonl, json or parquet",
    ),
    (
        "export.container",
        lambda c: c.export.container == "jsonl" or c.export.format != "openai",
        "fine-tuning services take JSON lines: choose jsonl",
    ),
    (
        "distributed.coordinator_address",
        lambda c: (
            c.distributed.coordinator_address in ("", "auto")
            or c.distributed.coordinator_address.rpartition(":")[2].isdigit()
        ),
        "must be host:port of the first process, auto, or empty",
    ),
    (
        "objective.label_smoothing",
        lambda c: (
            0 <= c.objective.label_smoothing < 0.5 and (c.objective.label_smoothing == 0 or c.objective.name == "dpo")
        ),
        "must be in [0, 0.5), and is for dpo only",
    ),
    (
        "objective.reduction",
        lambda c: c.objective.reduction == "example_mean" or c.objective.name == "sft",
        "is for sft only: dpo sums over the tokens of a response, simpo averages over them",
    ),
    (
        "objective.reference",
        lambda c: (
            c.objective.reference == ""
            or c.objective.name == "dpo"
            or (hasattr(c, "target") and "dpo" in c.target.losses)
        ),
        "is for dpo only, in objective.name or target.losses: the other losses have no reference model",
    ),
    (
        "target.losses",
        lambda c: all(loss in ("sft", "dpo", "simpo") or names_function(loss) for loss in c.target.losses),
        "each must be sft, dpo, simpo or path/to/file.py:function",
    ),
    (
        "target.losses",
        lambda c: len(c.target.losses) in (0, 1, len(c.target.sources)),
        "give one for each of target.sources, one for all of them, or none",
    ),
    (
        "target.sources",
        lambda c: (
            PARAMETERS_TARGET not in c.target.sources
            or names_function(
                (*_target_losses(c.target), *[""] * len(c.target.sources))[c.target.sources.index(PARAMETERS_TARGET)]
            )
        ),
        f"{PARAMETERS_TARGET} has no examples: give it a path/to/file.py:function of the parameters in target.losses, "
        "in its place",
    ),
    (
        "target.sources",
        lambda c: not c.target.sources or "" not in c.target.sources,
        "one of the names is empty: remove it",
    ),
    (
        "target.coefficients",
        lambda c: (
            not c.target.coefficients
            or (len(c.target.coefficients) == len(c.target.sources) and any(c.target.coefficients))
        ),
        "give one number for each of target.sources, at least one of them not 0, or none",
    ),
    (
        "target.coefficients",
        lambda c: not leads_to_audit(c) or 0 not in c.target.coefficients,
        "a target of coefficient 0 is reported beside the validation loss, and audit reports none by itself: leave it "
        "out",
    ),
    (
        "target.beta",
        lambda c: _fits_targets(c.target, c.target.beta, ("dpo", "simpo"), default=0),
        "give one for all targets, or one for each of target.sources, with 0 for those that are neither dpo nor simpo "
        "in target.losses",
    ),
    (
        "target.gamma_ratio",
        lambda c: _fits_targets(c.target, c.target.gamma_ratio, ("simpo",), default=-1),
        "give one for all targets, or one for each of target.sources, with -1 for those that are not simpo in "
        "target.losses",
    ),
    (
        "target",
        lambda c: not reads_array_data(c) or not (c.target.losses or c.target.sources),
        "is for text: on arrays the validation examples judge by the training loss, so leave the section out",
    ),
    (
        "target",
        lambda c: not (c.model.from_scratch and "dpo" in c.target.losses),
        "dpo compares with the model that training starts from, which must not be random: choose simpo, or set "
        "model.from_scratch to false",
    ),
    (
        "outer.validation_folds",
        lambda c: c.outer.validation_folds == 0 or not (c.target.losses or c.target.sources),
        "trains on validation examples by the training loss, and section target judges by another: set it to 0, or "
        "leave the section out",
    ),
    (
        "contradictions.draws",
        lambda c: c.contradictions.draws == 0 or c.outer.method not in SINGLE_LOOP_METHODS,
        "is measured by hypergradients, which outer.method has none of: find the contradictions with unrolled, and "
        "give its judges.jsonl to data.validation",
    ),
    (
        "contradictions.draws",
        lambda c: c.contradictions.draws == 0 or (_judges_by_one_target(c.target) and not reads_parameters_alone(c)),
        "divides one validation set, and section target has several or none: set it to 0, or name one target",
    ),
    (
        "contradictions.draws",
        lambda c: c.contradictions.draws > 0 or c.contradictions == type(c.contradictions)(),
        "is 0, so nothing reads the other keys of the section: set it to 4, or leave them out",
    ),
    (
        "rater.folds",
        lambda c: c.rater.folds == 0 or not (c.target.losses or c.target.sources),
        "leaves out parts of one validation set, and section target makes others of it: set it to 0, or leave the "
        "section out",
    ),
    (
        "model.from_scratch",
        lambda c: not (c.model.from_scratch and c.objective.name == "dpo"),
        "dpo compares with the model that it starts from, which must not be random: set model.from_scratch to false",
    ),
    (
        "output.model",
        lambda c: not hasattr(c, "weights") or c.output.model != "adapter" or c.lora.r > 0,
        "without adapters there is none to write: set lora.r above 0, or output.model to full",
    ),
    (
        "data.streaming",
        lambda c: not c.data.streaming or not hasattr(c, "outer"),
        "is for the command train only: learning a weight for every example needs all of them in memory",
    ),
    (
        "data.packing",
        lambda c: not (c.data.packing and c.data.streaming),
        "packing needs all examples before the first step: set data.packing or data.streaming to false",
    ),
    (
        "train.max_steps",
        lambda c: c.train.max_steps > 0 or not c.data.streaming,
        "must be 1 or more under data.streaming, where the number of examples in an epoch is unknown",
    ),
    (
        "objective.name",
        lambda c: not (c.data.streaming and c.objective.name == "dpo"),
        "dpo cannot stream: it needs the reference log-probabilities of all examples before the first step; use simpo",
    ),
    (
        "weights.score",
        lambda c: not (c.weights.score and c.weights.file),
        "weights come from a file or from a score: give one of weights.file and weights.score",
    ),
    (
        "weights.score",
        lambda c: not (c.weights.score and c.data.streaming),
        "a score compares all examples, which streaming does not hold in memory: set data.streaming to false, or "
        "compute the scores in another run and give its scores.parquet as weights.file",
    ),
    (
        "weights.tokens",
        lambda c: not (c.weights.tokens and hasattr(c, "export")),
        "no trainer reads weights of tokens: leave it empty, or weigh messages by their key 'weight'",
    ),
    (
        "weights.tokens",
        lambda c: not (c.weights.tokens and c.data.streaming),
        "are joined with the examples before the first step, and streaming reads those later: set data.streaming to "
        "false",
    ),
    (
        "weights.transform",
        lambda c: not c.weights.score or c.weights.transform == "none",
        "is for weights.file; a score is mapped to weights by weights.scaling",
    ),
    (
        "generate.url",
        lambda c: (
            c.generate.backend == "embedded" or c.generate.url.startswith(("http://", "https://")) or is_evaluation(c)
        ),
        "must be the address of the server, as http://localhost:8000/v1; or set generate.backend to embedded",
    ),
    (
        "generate.url",
        lambda c: not {*"@?#"} & {*c.generate.url},
        "must end at /v1, without a password, query or fragment: the key is read from the environment variable that "
        "generate.api_key_env names",
    ),
    (
        "generate.parameter_names",
        lambda c: all(
            name.partition("=")[0] in SERVICE_PARAMETERS and "=" in name for name in c.generate.parameter_names
        ),
        "must be pairs, as max_tokens=max_completion_tokens; seed= leaves one out; what is sent is "
        f"{', '.join(SERVICE_PARAMETERS)}",
    ),
    (
        "generate.model",
        lambda c: c.generate.backend == "embedded" or c.generate.model != "" or is_evaluation(c),
        "name the model on the server",
    ),
    (
        "outer.weighting",
        lambda c: c.outer.method not in SINGLE_LOOP_METHODS or c.outer.weighting != "rater",
        "single-loop methods update the weights of the examples in a batch: choose softmax, sigmoid or per_source",
    ),
    (
        "compare",
        lambda c: len(c.compare.methods) + len(c.compare.baselines) > 0,
        "name a method or a baseline to compare",
    ),
    (
        "compare.methods",
        lambda c: c.outer.weighting != "rater" or not {"penalty", "penalty_alone"} & set(c.compare.methods),
        "the penalty method updates the weights of the examples in a batch: leave it out, or set outer.weighting to "
        "softmax, sigmoid or per_source",
    ),
    (
        "compare.methods",
        lambda c: "implicit" not in c.compare.methods or c.outer.proximal > 0,
        "implicit needs outer.proximal above 0 (try 0.01), which all methods then train with",
    ),
    (
        "data.packing",
        lambda c: not (hasattr(c, "compare") and c.data.packing),
        "packing cannot know the orders that compare draws: set it to false (the losses are the same)",
    ),
    (
        "audit.estimators",
        lambda c: (
            not leads_to_audit(c)
            or "implicit" not in c.audit.estimators
            or c.outer.proximal > 0
            or hasattr(c, "tune")
            and c.audit.estimators == AuditSection().estimators  # tuned.yaml leaves it out
        ),
        "implicit needs outer.proximal above 0 (try 0.01), which all estimators then train with",
    ),
    (
        "verifier.name",
        lambda c: c.verifier.name in ("", "numeric", "exact", "choice") or names_function(c.verifier.name),
        "must be numeric, exact, choice, path/to/file.py:function, or empty",
    ),
    (
        "rank.k",
        lambda c: 1 <= c.rank.k <= c.rank.block_size - 2,
        "must be 1 or more, and at most rank.block_size - 2: distinct answers to other questions are shown",
    ),
    (
        "rank.pick_by",
        lambda c: c.rank.pick_by in (c.rank.metrics or (c.rank.pick_by,)) or reads_records(c),
        "must be among rank.metrics: add it there, or pick by one of them",
    ),
    (
        "rank.metrics",
        lambda c: c.rank.reward_field != "" or "car" not in (*c.rank.metrics, c.rank.pick_by) or reads_records(c),
        "car needs rewards: name rank.reward_field",
    ),
    (
        "candidates.strategies",
        lambda c: not c.candidates.strategies or not reads_records(c),
        "are compared by what a model makes of them, and rank.records judges metrics: leave one of them empty",
    ),
    (
        "candidates.strategies",
        lambda c: len(c.candidates.strategies) != 1,
        "names one strategy, and ranking takes at least 2",
    ),
    (
        "candidates.strategies",
        lambda c: not c.candidates.strategies or not (c.rank.strategies or c.rank.reward_field or c.rank.id_field),
        "write the responses that are ranked: leave out rank.strategies, rank.reward_field and rank.id_field, which "
        "are of responses that data.train holds",
    ),
    (
        "candidates.strategies",
        lambda c: len(c.candidates.strategies) > 0 or c.candidates == type(c.candidates)(),
        "the other keys of section candidates say how strategies write responses, and none is named: name strategies "
        "there, or leave the section out",
    ),
    (
        "candidates.model",
        lambda c: (
            "://" not in c.candidates.model or re.fullmatch(r".+@https?://[^@?#]+", c.candidates.model) is not None
        ),
        "a service is NAME@http://localhost:8000/v1: a name before the address, which ends at /v1 without a password, "
        "query or fragment; the key is read from the environment variable that candidates.api_key_env names",
    ),
    (
        "candidates.questions",
        lambda c: (
            c.candidates.questions == 0 or c.candidates.questions >= max(c.rank.block_size, c.rank.train_examples)
        ),
        "must be 0 (as many as blocks and trial trainings take), or at least rank.block_size and rank.train_examples",
    ),
    (
        "candidates.parameter_names",
        lambda c: all(
            name.partition("=")[0] in SERVICE_PARAMETERS and "=" in name for name in c.candidates.parameter_names
        ),
        "must be pairs, as max_tokens=max_completion_tokens; seed= leaves one out; what is sent is "
        f"{', '.join(SERVICE_PARAMETERS)}",
    ),
    (
        "rank.train_examples",
        lambda c: c.rank.train_examples == 0 or len(c.data.validation) > 0,
        "must be 0 (off), or name the examples to test on in data.validation",
    ),
    (
        "verifier.answer_field",
        lambda c: c.verifier.name == "" or c.verifier.answer_field != "",
        "name the key of the correct answer: the responses of a strategy may be wrong",
    ),
    (
        "refine.ratio",
        lambda c: c.refine.ratio != "sequence" or "unrolled" not in c.refine.methods,
        "the sequence ratio is no gradient of a loss, so unrolled would differentiate another training: choose token",
    ),
    (
        "refine.ratio",
        lambda c: c.refine.ratio != "sequence" or _holds_whole_groups(c),
        "sequence compares the responses to one question within a batch: make train.global_batch_size / "
        "train.gradient_accumulation_steps a multiple of generate.num_generations, or choose token",
    ),
    (
        "refine.ratio",
        lambda c: c.refine.ratio == "none" or c.refine.questions == "none" or c.generate.temperature > 0,
        "greedy responses are not sampled, so they have no ratio: set generate.temperature above 0, or choose none",
    ),
    (
        "refine.questions",
        lambda c: (
            c.refine.questions != "dynamic" or not {"unrolled", "penalty", "bmo", "ica"}.isdisjoint(c.refine.methods)
        ),
        "dynamic chooses by weights: name unrolled, penalty, bmo or ica in refine.methods",
    ),
    (
        "refine.generator",
        lambda c: not trains_generator(c) or c.refine.questions != "none",
        "reinforce learns from responses, and refine.questions = none asks for none: choose fixed, redrawn or all",
    ),
    (
        "refine.ratio",
        lambda c: not trains_generator(c) or c.refine.ratio == "none",
        "the student of refine.generator = reinforce imitates what the generator wrote: set it to none",
    ),
    (
        "refine.methods",
        lambda c: not trains_generator(c) or "bmo" not in c.refine.methods,
        "refine.generator = reinforce rewards by a student of plain losses, bmo weighs by likelihood: leave bmo out",
    ),
    (
        "refine.methods",
        lambda c: not (trains_generator(c) and weighs_by_scores(c)),
        "refine.generator = reinforce rewards by exact hypergradients, ica weighs by scores: leave one of them out",
    ),
    (
        "refine.methods",
        lambda c: not (reads_parameters_alone(c) and weighs_by_scores(c)),
        "ica shows validation examples to the model, and a target of the parameters alone has none: leave ica out",
    ),
    *(
        (
            name,
            lambda c, name=name, default=default: (
                not hasattr(c, "refine") or weighs_by_scores(c) or getattr(c, name) == default
            ),
            "it is for ica, which refine.methods does not name: leave the section out",
        )
        for name, default in (("scores", ScoresSection()), ("weights", ScoreWeightsSection()))
    ),
    *(
        (
            f"scores.{key}",
            lambda c, key=key: not hasattr(c, "refine") or getattr(c.scores, key) == getattr(ScoresSection(), key),
            f"it is for the score {name}, and refine scores by ica alone: leave it out",
        )
        for key, name in (("anchors", "oneshot"), ("holdout_steps", "reducible"))
    ),
    *(
        (
            f"outer.{key}",
            lambda c, key=key: (
                not weighs_by_scores(c)
                or not {*c.refine.methods} <= {"ica", "uniform"}
                or getattr(c.outer, key) == getattr(OuterSection(), key)
            ),
            "the weights of ica are scores, and no other method of refine.methods makes steps of weights: leave it out",
        )
        for key in STEPS_OF_WEIGHTS
    ),
    (
        "single_loop",
        lambda c: (
            not weighs_by_scores(c)
            or not {*c.refine.methods}.isdisjoint(SINGLE_LOOP_METHODS)
            or c.single_loop == type(c.single_loop)()
        ),
        f"it is for {', '.join(SINGLE_LOOP_METHODS)}, and refine.methods names none of them: leave the section out",
    ),
    (
        "scores.embedding",
        lambda c: not weighs_by_scores(c) or c.scores.embedding != "file" or c.refine.questions == "none",
        "responses are not in the file: choose tfidf or hidden, or set refine.questions to none",
    ),
    (
        "weights.quantile",
        lambda c: (
            not hasattr(c, "refine")
            or c.weights.scaling == "quantiles"
            or c.weights.quantile == ScoreWeightsSection().quantile
        ),
        "it is for weights.scaling = quantiles: set that, or leave it out",
    ),
    (
        "refine.verifier_use",
        lambda c: not trains_generator(c) or c.refine.verifier_use == "report",
        "a response that is filtered out has no reward: set it to report with refine.generator = reinforce",
    ),
    (
        "refine.start_from",
        lambda c: c.refine.start_from != "last" or trains_generator(c),
        "last goes on with the student of refine.generator = reinforce: choose accepted or first",
    ),
    (
        "generate.temperature",
        lambda c: not trains_generator(c) or (c.generate.temperature, c.generate.top_k, c.generate.top_p) == (1, 0, 1),
        "refine.generator = reinforce compares probabilities with those that responses were drawn by: leave "
        "temperature at 1, top_k at 0 and top_p at 1",
    ),
    (
        "generate.num_generations",
        lambda c: not trains_generator(c) or c.generate.num_generations > 1,
        "refine.generator = reinforce compares the responses to one question: ask for 2 at least",
    ),
    (
        "train.global_batch_size",
        lambda c: not trains_generator(c) or _holds_whole_groups(c),
        "refine.generator = reinforce compares the responses to one question within a batch: make it, over "
        "train.gradient_accumulation_steps, a multiple of generate.num_generations",
    ),
    (
        "refine.methods",
        lambda c: not trains_generator(c) or "uniform" in c.refine.methods,
        "the student whose training rewards the responses of refine.generator = reinforce is that of uniform: name it",
    ),
    (
        "refine.generator",
        lambda c: trains_generator(c) or c.reinforce == type(c.reinforce)(),
        "section reinforce says how the generator is trained, and fixed does not train it: set it to reinforce, or "
        "leave the section out",
    ),
    (
        "outer.ess_floor",
        lambda c: (
            not hasattr(c, "refine") or c.outer.ess_floor == OuterSection().ess_floor or "unrolled" in c.refine.methods
        ),
        "it stops the steps of unrolled, which refine.methods does not name: leave it out",
    ),
    (
        "outer.estimate",
        lambda c: not hasattr(c, "refine") or c.outer.estimate == "per_example" or "unrolled" in c.refine.methods,
        "it is how unrolled steps its weights, which refine.methods does not name: leave it out",
    ),
    (
        "refine.verifier_use",
        lambda c: c.refine.verifier_use == "report" or c.verifier.name != "",
        "filter needs a verifier: set verifier.name",
    ),
    (
        "outer.weighting",
        lambda c: not hasattr(c, "refine") or c.outer.weighting in ("sigmoid", "softmax"),
        "refine learns a weight for every response: choose sigmoid or softmax",
    ),
    (
        "objective.name",
        lambda c: not hasattr(c, "refine") or (c.objective.name == "sft" and c.objective.reduction == "example_mean"),
        "refine trains with sft and the mean over the tokens of an example: leave section objective at its defaults",
    ),
    (
        "generate.backend",
        lambda c: not hasattr(c, "refine") or c.generate.backend == "embedded",
        "refine generates with the model that it trains: leave it at embedded",
    ),
    (
        "model.from_scratch",
        lambda c: not (hasattr(c, "refine") and c.model.from_scratch),
        "refine starts from a model that can answer: set model.from_scratch to false",
    ),
    (
        "data.packing",
        lambda c: not (hasattr(c, "refine") and c.data.packing),
        "packing cannot know the lengths of responses in advance: set it to false (the losses are the same)",
    ),
    (
        "data.test",
        lambda c: not is_evaluation(c) or len(c.data.test) > 0,
        "name the prompts: files or a dataset",
    ),
    (
        "data.test",
        lambda c: not is_evaluation(c) or not (c.data.train or c.data.validation or c.data.dev),
        "evaluate asks the prompts of data.test alone: leave out data.train, data.validation and data.dev",
    ),
    (
        "evaluate.baseline",
        lambda c: c.evaluate.baseline != "" or "preference" not in c.evaluate.metrics,
        "preference compares two models: name the second one",
    ),
    (
        "evaluate.prompts",
        lambda c: not _names_unused_evaluation(c),
        "evaluate.metrics, verifier.name, judge.url and the other keys of evaluate say how answers are measured, and "
        "nothing is asked: name the prompts, or leave them out",
    ),
    (
        "evaluate.prompts",
        lambda c: not (evaluates_own_models(c) and c.evaluate.prompts and reads_array_data(c)),
        "is for text: a task of arrays has no language model that could answer, so leave it out",
    ),
    (
        "evaluate.baseline",
        lambda c: (
            not _compares_answers(c)
            or c.evaluate.baseline in (*c.compare.baselines, *c.compare.methods, *SOURCE_BASELINES)
        ),
        "is none of the arms that are compared: add it to compare.baselines, or name one of compare.baselines and "
        "compare.methods",
    ),
    (
        "evaluate.baseline",
        lambda c: (
            not _compares_answers(c)
            or {*c.compare.baselines, *c.compare.methods} != {c.evaluate.baseline}
            or c.evaluate.baseline in SOURCE_BASELINES  # text of several sources has both
        ),
        "is the only arm, and there is none to compare with it: name more in compare.baselines or compare.methods",
    ),
    (
        "generate.backend",
        lambda c: not evaluates_own_models(c) or hasattr(c, "refine") or c.generate.backend == "embedded",
        "the models of the run answer in this process: leave it at embedded",
    ),
    (
        "evaluate.metrics",
        lambda c: c.verifier.name != "" or "accuracy" not in c.evaluate.metrics,
        "accuracy needs a verifier: set verifier.name",
    ),
    (
        "evaluate.metrics",
        lambda c: (
            "perplexity" not in c.evaluate.metrics
            or not is_evaluation(c)
            or not all(names_service(name) for name in (c.evaluate.model, c.evaluate.baseline or c.evaluate.model))
        ),
        "perplexity reads a model in this process, and a service gives answers alone: leave it out",
    ),
    (
        "generate.backend",
        lambda c: (
            not is_evaluation(c) or (c.generate.backend, c.generate.url, c.generate.model) == ("embedded", "", "")
        ),
        "evaluate takes a service as NAME@URL in evaluate.model or evaluate.baseline: leave out generate.backend, "
        "generate.url and generate.model",
    ),
    (
        "generate.num_generations",
        lambda c: (
            not hasattr(c, "evaluate")
            or hasattr(c, "refine")
            or c.generate.num_generations == 1
            or c.generate.temperature > 0
        ),
        "greedy answers to one prompt are all the same: set generate.temperature above 0",
    ),
    (
        "judge.url",
        lambda c: c.judge.url != "" or not _asks_judge(c),
        "preference, safety and evaluate.refusal_by judge need a judge: set judge.url and judge.model",
    ),
    (
        "judge.url",
        lambda c: (
            c.judge.url == "" or (c.judge.url.startswith(("http://", "https://")) and not {*"@?#"} & {*c.judge.url})
        ),
        "must be the address of the server up to /v1, as http://localhost:8000/v1, without a password or query: the "
        "key is read from the environment variable that judge.api_key_env names",
    ),
    (
        "judge.model",
        lambda c: c.judge.url == "" or c.judge.model != "",
        "name the judge on the server",
    ),
    (
        "judge.marks",
        lambda c: len({mark.strip().lower() for mark in c.judge.marks} - {""}) == len(c.judge.marks) == 3,
        "must be three different texts: the first answer is better, the second, neither",
    ),
    (
        "judge.parameter_names",
        lambda c: all(name.partition("=")[0] in SERVICE_PARAMETERS and "=" in name for name in c.judge.parameter_names),
        "must be pairs, as max_tokens=max_completion_tokens; seed= leaves one out; what is sent is "
        f"{', '.join(SERVICE_PARAMETERS)}",
    ),
)

REQUIRED_SECTIONS = {
    "data.validation": ("outer",),
    "target": ("model", "data"),
    "optimizer.warmup_steps": ("train",),
    "model.from_scratch": ("objective",),
    "optimizer.name": ("outer",),
    "data.split": ("train",),
    "data.packing": ("train",),
    "compare.methods": ("compare",),
    "audit.estimators": ("audit",),
    "tune.command": ("data",),
    "verifier.answer_field": ("rank",),
    "evaluate.metrics": ("evaluate", "verifier"),
    "judge.url": ("evaluate",),
}
"""Sections that a rule reads in addition to its own, or that mark the command which it is for."""


MAX_VALUE = 400
"""Characters of a value in an error."""


def check_config(config: Any, config_source: str) -> None:
    """Check the bounds of every key and every rule of CONFIG_RULES that applies.

    Raises:
        ValueError: with one line for each violation, in the order of the keys.
    """
    values = dict(flatten_config(config))
    violations = [
        (key, text) for name, section in vars(config).items() for key, text in _bound_violations(name, section)
    ]
    violations += [
        (key, text) for key, holds, text in CONFIG_RULES if _rule_applies(key, config, values) and not holds(config)
    ]
    violations += [
        (key, "one of the names is empty: remove it")
        for key, value in values.items()
        if key.startswith("data.") and isinstance(value, tuple) and "" in value
    ]
    violations += [
        (key, "holds a null character or no valid text: write it in UTF-8")
        for key, value in values.items()
        if not _is_text(value)
    ]
    violations += [(key, "must be finite") for key, value in values.items() if not _is_finite(value)]
    order = {key: place for place, key in enumerate(values)}
    violations.sort(key=lambda key_and_text: order.get(key_and_text[0], len(order)))
    if violations:
        addresses = ("generate.url", "judge.url", "evaluate.model", "evaluate.baseline", "candidates.model")
        shown = values | {key: _hide_secrets(values[key]) for key in addresses if key in values}
        lines = [
            f"{key} = {_shorten(repr(shown[key]))}: {text}" if key in values else f"{key}: {text}"
            for key, text in violations
        ]
        raise ValueError((" " if len(lines) == 1 else "\n  ").join([f"{config_source}:", *lines]) + ".")


def flatten_config(config: Any) -> list[tuple[str, Any]]:
    """("section.key", value) of every key."""
    return [(f"{name}.{key}", value) for name, section in vars(config).items() for key, value in vars(section).items()]


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE // 2]} ... {text[-MAX_VALUE // 2 :]}"


def _hide_secrets(url: str) -> str:
    """An address without its password and query."""
    return re.sub(r"[?#].*", "?...", re.sub(r"//[^/]*@", "//...@", url), flags=re.DOTALL)


def _bound_violations(name: str, section: Any) -> list[tuple[str, str]]:
    annotations = typing.get_type_hints(type(section), include_extras=True)
    texts = {key: violation(annotations[key], value) for key, value in vars(section).items()}
    return [(f"{name}.{key}", text) for key, text in texts.items() if text]


def _rule_applies(key: str, config: Any, values: dict[str, Any]) -> bool:
    sections = {field.name for field in dataclasses.fields(config)}
    return (key in values or key in sections) and sections.issuperset(REQUIRED_SECTIONS.get(key, ()))


def _is_text(value: Any) -> bool:
    """Whether it holds no null character and no half of a surrogate pair, which stands for bytes that are no UTF-8."""
    items = value if isinstance(value, tuple) else (value,)
    return not any("\0" in item or re.search("[\ud800-\udfff]", item) for item in items if isinstance(item, str))


def _is_finite(value: Any) -> bool:
    items = value if isinstance(value, tuple) else (value,)
    return all(math.isfinite(item) for item in items if isinstance(item, float))
