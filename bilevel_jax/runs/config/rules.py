"""What must hold of a config: one table of rules, all that fail told together."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any


def reads_array_data(config: Any) -> bool:
    """Whether a run of `compare` reads arrays rather than text."""
    return hasattr(config, "arrays") and len(config.data.train) == 1 and config.data.train[0].endswith(".npz")


# (key, what must hold, what is said otherwise); a rule about a section that a config has not does not apply, and one
# that reads further sections names them in `NEEDS`. All that fail are reported together.
Rule = tuple[str, Callable[[Any], bool], str]
CONFIG_RULES: tuple[Rule, ...] = (
    (
        "model.name_or_path",
        lambda c: c.model.name_or_path != "" or reads_array_data(c),
        "name a checkpoint's folder, or builtin:cipher",
    ),
    ("lora.r", lambda c: c.lora.r >= 0, "must be 0 (train all parameters) or more"),
    ("lora.alpha", lambda c: c.lora.alpha > 0, "must be above 0"),
    (
        "model.base_dtype",
        lambda c: c.model.base_dtype == "float32" or c.lora.r > 0,
        "only a frozen base can be stored in bfloat16: set lora.r above 0",
    ),
    ("data.train", lambda c: len(c.data.train) > 0, "name the rows to be judged: files or a dataset"),
    (
        "data.validation",
        lambda c: len(c.data.validation) > 0 or reads_array_data(c),
        "name the validation examples: files or a dataset",
    ),
    (
        "data.split",
        lambda c: min(c.data.split) >= 0 and c.data.split[0] > 0 and abs(sum(c.data.split) - 1) < 1e-6,
        "three shares (fit, select, report), none negative, fit above 0, that sum to 1",
    ),
    ("data.max_length", lambda c: c.data.max_length >= 2, "must be 2 or more"),
    ("data.seed", lambda c: c.data.seed >= 0, "must be 0 or more"),
    ("train.max_nonfinite_steps", lambda c: c.train.max_nonfinite_steps >= 0, "must be 0 (stop at the first) or more"),
    ("optimizer.learning_rate", lambda c: c.optimizer.learning_rate > 0, "must be above 0"),
    (
        "optimizer.warmup_steps",
        lambda c: c.optimizer.warmup_ratio > 0 or 0 <= c.optimizer.warmup_steps < (c.train.max_steps or math.inf),
        "must be 0 or more and below train.max_steps; a share of them is optimizer.warmup_ratio",
    ),
    (
        "optimizer.warmup_ratio",
        lambda c: 0 <= c.optimizer.warmup_ratio < 1,
        "must be in [0, 1): a share of all steps, in place of optimizer.warmup_steps",
    ),
    ("optimizer.weight_decay", lambda c: c.optimizer.weight_decay >= 0, "must be 0 or more"),
    ("optimizer.momentum", lambda c: 0 <= c.optimizer.momentum < 1, "must be in [0, 1)"),
    ("optimizer.b1", lambda c: 0 <= c.optimizer.b1 < 1, "must be in [0, 1)"),
    ("optimizer.b2", lambda c: 0 <= c.optimizer.b2 < 1, "must be in [0, 1)"),
    ("optimizer.eps", lambda c: c.optimizer.eps >= 0, "must be 0 or more"),
    ("optimizer.eps_root", lambda c: c.optimizer.eps_root >= 0, "must be 0 or more"),
    ("optimizer.max_grad_norm", lambda c: c.optimizer.max_grad_norm >= 0, "must be 0 (no clipping) or more"),
    (
        "optimizer.name",
        lambda c: c.optimizer.name != "lion" or c.outer.method not in ("unrolled", "window"),
        "lion steps along a sign, whose derivative is 0: choose adamw, or set outer.method to implicit or alignment",
    ),
    (
        "train.max_steps",
        lambda c: c.train.max_steps >= 1 or (c.train.max_steps == 0 and getattr(c.train, "num_epochs", 0) > 0),
        "must be 1 or more",
    ),
    ("train.num_epochs", lambda c: c.train.num_epochs > 0, "must be above 0"),
    ("train.global_batch_size", lambda c: c.train.global_batch_size >= 1, "must be 1 or more"),
    (
        "train.gradient_accumulation_steps",
        lambda c: (
            c.train.gradient_accumulation_steps >= 1
            and c.train.global_batch_size % c.train.gradient_accumulation_steps == 0
        ),
        "must be 1 or more and divide train.global_batch_size",
    ),
    ("train.seed", lambda c: c.train.seed >= 0, "must be 0 or more"),
    ("outer.steps", lambda c: c.outer.steps >= 1, "must be 1 or more"),
    ("outer.learning_rate", lambda c: c.outer.learning_rate > 0, "must be above 0"),
    ("outer.max_step", lambda c: c.outer.max_step > 0, "must be above 0"),
    ("outer.ess_floor", lambda c: 0 <= c.outer.ess_floor < 1, "must be in [0, 1)"),
    ("outer.patience", lambda c: c.outer.patience >= 0, "must be 0 (never stop early) or more"),
    ("outer.window", lambda c: c.outer.window >= 1, "must be 1 or more"),
    ("outer.memory_gib", lambda c: c.outer.memory_gib >= 0, "must be 0 (half of what the model leaves) or more"),
    (
        "outer.proximal",
        lambda c: c.outer.proximal >= 0 and (c.outer.proximal > 0 or c.outer.method != "implicit"),
        "must be 0 or more; the implicit method needs it above 0 (try 0.1), or set outer.method to unrolled",
    ),
    ("outer.tolerance", lambda c: 0 < c.outer.tolerance < 1, "must be in (0, 1)"),
    ("outer.max_iterations", lambda c: c.outer.max_iterations >= 1, "must be 1 or more"),
    ("outer.curvature_batches", lambda c: c.outer.curvature_batches >= 1, "must be 1 or more"),
    (
        "outer.warm_start",
        lambda c: (
            c.outer.warm_start == ""
            or (c.outer.method not in ("penalty", "bmo", "mixing") and c.outer.weighting != "by_features")
        ),
        "is for methods that train, estimate and train again, under softmax, sigmoid or per_source; leave it empty",
    ),
    ("output.dir", lambda c: c.output.dir != "", "name the run's folder"),
    ("show.examples", lambda c: c.show.examples >= 0, "must be 0 (show none) or more"),
    ("show.max_tokens", lambda c: c.show.max_tokens >= 2, "must be 2 or more"),
    ("show.width", lambda c: c.show.width == 0 or c.show.width >= 40, "must be 0 (the terminal's) or 40 or more"),
    ("selection.top_share", lambda c: 0 < c.selection.top_share <= 1, "must be in (0, 1]"),
    ("selection.threshold", lambda c: c.selection.threshold >= 0, "must be 0 (off) or more"),
    ("selection.resample", lambda c: c.selection.resample >= 0, "must be 0 (off) or more"),
    ("selection.per_source", lambda c: c.selection.per_source >= 0, "must be 0 (off) or more"),
    (
        "selection",
        lambda c: (
            sum(value > 0 for value in (c.selection.threshold, c.selection.resample, c.selection.per_source)) <= 1
        ),
        "threshold, resample and per_source are three ways to select: give one and leave the others at 0",
    ),
    ("export.dir", lambda c: c.export.dir != "", "name the folder to write"),
    (
        "export.container",
        lambda c: c.export.container != "datasets" or c.export.format != "llama_factory",
        "LLaMA-Factory reads files of rows, not a folder of `datasets`: choose jsonl, json or parquet",
    ),
    ("retrain.seeds", lambda c: c.retrain.seeds >= 1, "must be 1 or more"),
    (
        "certify.step_sizes",
        lambda c: len(c.certify.step_sizes) > 0 and all(0 < size < 1 for size in c.certify.step_sizes),
        "name at least one, each in (0, 1)",
    ),
    ("certify.removed", lambda c: 0 < c.certify.removed < 1, "must be in (0, 1)"),
    ("certify.retrain_removed", lambda c: 0 < c.certify.retrain_removed < 1, "must be in (0, 1)"),
    (
        "certify.retrains",
        lambda c: c.certify.retrains == 0 or c.certify.retrains >= 8,
        "must be 0 (not measured), or 8 or more: fewer tell nothing about a correlation",
    ),
    ("mesh.data", lambda c: c.mesh.data >= 0, "must be 0 (all) or more"),
    ("mesh.fsdp", lambda c: c.mesh.fsdp >= 1, "must be 1 (every device has all parameters) or more"),
    (
        "distributed.coordinator_address",
        lambda c: (
            c.distributed.coordinator_address in ("", "auto")
            or c.distributed.coordinator_address.rpartition(":")[2].isdigit()
        ),
        "is host:port of the first process, auto, or nothing",
    ),
    ("distributed.num_processes", lambda c: c.distributed.num_processes >= 0, "must be 0 (found out) or more"),
    (
        "distributed.process_id",
        lambda c: c.distributed.process_id >= -1,
        "must be -1 (found out) or the number of a process",
    ),
    ("output.save_minutes", lambda c: c.output.save_minutes > 0, "must be above 0"),
    ("objective.beta", lambda c: c.objective.beta >= 0, "must be 0 (the usual one) or more"),
    ("objective.gamma_ratio", lambda c: c.objective.gamma_ratio >= 0, "must be 0 or more"),
    (
        "objective.label_smoothing",
        lambda c: (
            0 <= c.objective.label_smoothing < 0.5 and (c.objective.label_smoothing == 0 or c.objective.name == "dpo")
        ),
        "must be in [0, 0.5), and only dpo has it",
    ),
    (
        "objective.reduction",
        lambda c: c.objective.reduction == "example_mean" or c.objective.name == "sft",
        "is of sft alone: dpo sums over the tokens of a response, simpo means over them",
    ),
    (
        "objective.reference",
        lambda c: c.objective.reference == "" or c.objective.name == "dpo",
        "is of dpo alone: the other objectives have no reference model",
    ),
    (
        "model.from_scratch",
        lambda c: not (c.model.from_scratch and c.objective.name == "dpo"),
        "dpo compares with the model that it starts from, which must not be random: set model.from_scratch to false",
    ),
    (
        "data.streaming",
        lambda c: not c.data.streaming or not hasattr(c, "outer"),
        "is for command train alone: every row of select has a weight of its own, which asks for all rows at hand",
    ),
    (
        "data.packing",
        lambda c: not (c.data.packing and c.data.streaming),
        "packing needs to know all rows before the first step; set data.packing or data.streaming to false",
    ),
    ("data.shuffle_buffer", lambda c: c.data.shuffle_buffer >= 0, "must be 0 (keep the order) or more"),
    (
        "train.max_steps",
        lambda c: c.train.max_steps > 0 or not c.data.streaming,
        "streaming does not know how many rows an epoch has: say how many steps to make",
    ),
    (
        "objective.name",
        lambda c: not (c.data.streaming and c.objective.name == "dpo"),
        "dpo needs the reference model's log-probabilities of all rows before the first step; use simpo",
    ),
    (
        "weights.score",
        lambda c: not (c.weights.score and c.weights.file),
        "weights come from a file or from a score: give one of weights.file and weights.score",
    ),
    (
        "weights.score",
        lambda c: not (c.weights.score and c.data.streaming),
        "a score compares all rows, which streaming does not hold: set data.streaming to false, or score the rows by "
        "a run of their own and give its scores.parquet as weights.file",
    ),
    (
        "weights.transform",
        lambda c: not c.weights.score or c.weights.transform == "none",
        "is of weights.file; what becomes of a score is said by weights.scaling",
    ),
    ("weights.refresh", lambda c: c.weights.refresh >= 1, "must be 1 (at the start alone) or more"),
    ("weights.quantile", lambda c: 0 <= c.weights.quantile < 0.5, "must be in [0, 0.5)"),
    ("scores.k", lambda c: c.scores.k >= 1, "must be 1 or more"),
    ("scores.anchors", lambda c: c.scores.anchors >= 1, "must be 1 or more"),
    ("scores.max_similarity", lambda c: c.scores.max_similarity > 0, "must be above 0; above 1 nothing is alike"),
    ("scores.seed", lambda c: c.scores.seed >= 0, "must be 0 or more"),
    ("scores.holdout_steps", lambda c: c.scores.holdout_steps >= 0, "must be 0 (as many as the run) or more"),
    ("generate.num_generations", lambda c: c.generate.num_generations >= 1, "must be 1 or more"),
    ("generate.temperature", lambda c: c.generate.temperature >= 0, "must be 0 (greedy) or more"),
    ("generate.top_k", lambda c: c.generate.top_k >= 0, "must be 0 (all tokens) or more"),
    ("generate.top_p", lambda c: 0 < c.generate.top_p <= 1, "must be in (0, 1]"),
    ("generate.max_new_tokens", lambda c: c.generate.max_new_tokens >= 1, "must be 1 or more"),
    ("generate.seed", lambda c: c.generate.seed >= 0, "must be 0 or more"),
    ("generate.max_batch_tokens", lambda c: c.generate.max_batch_tokens >= 1, "must be 1 or more"),
    (
        "generate.url",
        lambda c: c.generate.backend == "embedded" or c.generate.url.startswith(("http://", "https://")),
        "is where a service is, as http://localhost:8000/v1; or set generate.backend to embedded",
    ),
    (
        "generate.model",
        lambda c: c.generate.backend == "embedded" or c.generate.model != "",
        "name the model at the service",
    ),
    ("generate.concurrency", lambda c: c.generate.concurrency >= 1, "must be 1 or more"),
    ("generate.timeout", lambda c: c.generate.timeout > 0, "must be above 0"),
    ("weights.constant", lambda c: c.weights.constant >= 0, "must be 0 or more"),
    ("train.eval_steps", lambda c: c.train.eval_steps >= 1, "must be 1 or more"),
    ("single_loop.steps", lambda c: c.single_loop.steps >= 0, "must be 0 (train.max_steps * outer.steps) or more"),
    (
        "single_loop.validation_shares",
        lambda c: (
            len(c.single_loop.validation_shares) > 0
            and all(0 < share <= 1 for share in c.single_loop.validation_shares)
        ),
        "name at least one share of L_v, each above 0 and at most 1 (V alone)",
    ),
    ("single_loop.temperatures", lambda c: min(c.single_loop.temperatures) > 0, "must be above 0"),
    ("single_loop.inner_steps", lambda c: c.single_loop.inner_steps >= 1, "must be 1 or more"),
    ("single_loop.proximal", lambda c: c.single_loop.proximal > 0, "must be above 0"),
    ("single_loop.eval_steps", lambda c: c.single_loop.eval_steps >= 1, "must be 1 or more"),
    (
        "outer.weighting",
        lambda c: c.outer.method != "penalty" or c.outer.weighting != "by_features",
        "the penalty method steps the weights of the rows at hand: choose softmax, sigmoid or per_source",
    ),
    (
        "arrays.hidden_sizes",
        lambda c: all(width >= 1 for width in c.arrays.hidden_sizes),
        "each width must be 1 or more; none at all is linear regression",
    ),
    ("arrays.train_examples", lambda c: c.arrays.train_examples >= 2, "must be 2 or more: weights compare rows"),
    ("arrays.validation_examples", lambda c: c.arrays.validation_examples >= 1, "must be 1 or more"),
    ("arrays.dev_examples", lambda c: c.arrays.dev_examples >= 0, "must be 0 (none) or more"),
    ("arrays.test_examples", lambda c: c.arrays.test_examples >= 0, "must be 0 (all test rows) or more"),
    ("arrays.noise_share", lambda c: 0 <= c.arrays.noise_share <= 1, "must be in [0, 1]"),
    ("compare.budget", lambda c: c.compare.budget >= 1, "must be 1 or more"),
    ("compare.seeds", lambda c: c.compare.seeds >= 1, "must be 1 or more; an interval needs 2"),
    ("compare.top_share", lambda c: 0 < c.compare.top_share <= 1, "must be in (0, 1]"),
    ("compare.methods", lambda c: len(set(c.compare.methods)) == len(c.compare.methods), "name each method once"),
    ("compare.baselines", lambda c: len(set(c.compare.baselines)) == len(c.compare.baselines), "name each arm once"),
    ("compare", lambda c: len(c.compare.methods) + len(c.compare.baselines) > 0, "name a method or an arm to compare"),
    (
        "compare.methods",
        lambda c: "implicit" not in c.compare.methods or c.outer.proximal > 0,
        "implicit needs outer.proximal above 0 (try 0.01), for all methods, as they share one inner problem",
    ),
    (
        "data.packing",
        lambda c: not (hasattr(c, "compare") and c.data.packing),
        "compare draws orders that packing cannot know beforehand; set it to false (the numbers are the same)",
    ),
    ("audit.queries", lambda c: c.audit.queries == 0 or c.audit.queries >= 2, "must be 0 (none), or 2 or more"),
    ("audit.vmap_size", lambda c: c.audit.vmap_size >= 1, "must be 1 or more"),
    (
        "audit.subsets",
        lambda c: c.audit.subsets >= 8,
        "must be 8 or more: fewer tell nothing about a correlation (40 give it to about .1)",
    ),
    (
        "audit.removed",
        lambda c: len(set(c.audit.removed)) == len(c.audit.removed) > 0 and all(0 < one < 1 for one in c.audit.removed),
        "name at least one share, each once and in (0, 1)",
    ),
    ("audit.checkpoints", lambda c: len(c.audit.checkpoints) > 0, "name at least one of start and end"),
    (
        "audit.estimators",
        lambda c: "implicit" not in c.audit.estimators or c.outer.proximal > 0,
        "implicit needs outer.proximal above 0 (try 0.01), for all entries, as they share one inner problem",
    ),
    (
        "verifier.name",
        lambda c: c.verifier.name in ("", "numeric", "exact") or ".py:" in c.verifier.name,
        "is numeric, exact, path/to/file.py:function, or nothing",
    ),
    ("rank.block_size", lambda c: c.rank.block_size >= 2, "must be 2 or more; a spread takes many"),
    ("rank.num_blocks", lambda c: c.rank.num_blocks >= 1, "must be 1 or more; a spread takes 2"),
    (
        "rank.k",
        lambda c: 1 <= c.rank.k <= c.rank.block_size - 2,
        "must be 1 or more, and at most rank.block_size - 2: answers to other questions are shown, none twice",
    ),
    ("rank.trim", lambda c: 0 <= c.rank.trim < 0.5, "must be in [0, 0.5)"),
    ("rank.beta", lambda c: 0 <= c.rank.beta <= 1 or c.rank.beta == -1, "must be in [0, 1], or -1 (by their spread)"),
    ("rank.max_question_tokens", lambda c: c.rank.max_question_tokens >= 0, "must be 0 (no limit) or more"),
    ("rank.max_response_tokens", lambda c: c.rank.max_response_tokens >= 0, "must be 0 (no limit) or more"),
    (
        "rank.pick_by",
        lambda c: c.rank.pick_by in (c.rank.metrics or (c.rank.pick_by,)),
        "is not among rank.metrics: add it, or let one of them pick",
    ),
    (
        "rank.metrics",
        lambda c: c.rank.reward_field != "" or "car" not in (*c.rank.metrics, c.rank.pick_by),
        "car divides rewards: name rank.reward_field",
    ),
    (
        "rank.train_examples",
        lambda c: c.rank.train_examples == 0 or len(c.data.validation) > 0,
        "must be 0 (off), or name in data.validation the rows to be tested on",
    ),
    ("rank.train_examples", lambda c: c.rank.train_examples >= 0, "must be 0 (off) or more"),
    ("rank.train_seeds", lambda c: c.rank.train_seeds >= 1, "must be 1 or more; an interval needs 2"),
    (
        "verifier.answer_field",
        lambda c: c.verifier.name == "" or c.verifier.answer_field != "",
        "name the key of the right result: the responses of a strategy may be wrong",
    ),
    ("refine.rounds", lambda c: c.refine.rounds >= 1, "must be 1 or more"),
    ("refine.share", lambda c: 0 < c.refine.share <= 1, "must be in (0, 1]"),
    (
        "refine.methods",
        lambda c: 0 < len(c.refine.methods) == len(set(c.refine.methods)),
        "name at least one, each once",
    ),
    (
        "refine.max_ratio",
        lambda c: c.refine.max_ratio >= 1,
        "must be 1 or more: below it not even the sampler keeps its gradient",
    ),
    ("refine.level", lambda c: 0 < c.refine.level <= 0.5, "must be in (0, 0.5]"),
    (
        "refine.ratio",
        lambda c: c.refine.ratio != "sequence" or "unrolled" not in c.refine.methods,
        "ratios of sequences have no potential, so unrolled would differentiate another training: choose token",
    ),
    (
        "refine.ratio",
        lambda c: (
            c.refine.ratio != "sequence"
            or c.train.global_batch_size // c.train.gradient_accumulation_steps % c.generate.num_generations == 0
        ),
        "compares the generate.num_generations responses to a question, which must fit: make train.global_batch_size / train.gradient_accumulation_steps a "
        "multiple of generate.num_generations, or choose token",
    ),
    (
        "refine.ratio",
        lambda c: c.refine.ratio == "none" or c.refine.questions == "none" or c.generate.temperature > 0,
        "greedy responses were not drawn, so they have no ratio: set generate.temperature above 0, or choose none",
    ),
    (
        "refine.questions",
        lambda c: c.refine.questions != "dynamic" or not {"unrolled", "penalty", "bmo"}.isdisjoint(c.refine.methods),
        "dynamic needs weights to choose by: name unrolled, penalty or bmo in refine.methods",
    ),
    (
        "refine.verifier_use",
        lambda c: c.refine.verifier_use == "report" or c.verifier.name != "",
        "filter needs a checker: name one in verifier.name",
    ),
    (
        "outer.weighting",
        lambda c: not hasattr(c, "refine") or c.outer.weighting in ("sigmoid", "softmax"),
        "every response has a weight of its own: choose sigmoid or softmax",
    ),
    (
        "objective.name",
        lambda c: not hasattr(c, "refine") or (c.objective.name == "sft" and c.objective.reduction == "example_mean"),
        "refine reads single responses, each by its mean over tokens: leave objective as it is",
    ),
    (
        "generate.backend",
        lambda c: not hasattr(c, "refine") or c.generate.backend == "embedded",
        "refine trains the model that writes: leave it at embedded",
    ),
    (
        "model.from_scratch",
        lambda c: not (hasattr(c, "refine") and c.model.from_scratch),
        "refine begins with a model that can answer: set model.from_scratch to false",
    ),
    (
        "data.packing",
        lambda c: not (hasattr(c, "refine") and c.data.packing),
        "responses have lengths that packing cannot know beforehand; set it to false (the numbers are the same)",
    ),
    ("outer.neumann_rate", lambda c: c.outer.neumann_rate > 0, "must be above 0"),
    ("estimate.devices", lambda c: c.estimate.devices >= 0, "must be 0 (those there are) or more"),
    ("estimate.memory_gib", lambda c: c.estimate.memory_gib >= 0, "must be 0 (this machine's) or more"),
    ("estimate.train_examples", lambda c: c.estimate.train_examples >= 0, "must be 0 (read the data) or more"),
    ("estimate.validation_examples", lambda c: c.estimate.validation_examples >= 1, "must be 1 or more"),
    ("estimate.tflops", lambda c: c.estimate.tflops >= 0, "must be 0 (time steps) or more"),
    ("estimate.mfu", lambda c: 0 < c.estimate.mfu <= 1, "must be in (0, 1]"),
)

REQUIRED_SECTIONS = {
    "data.validation": ("outer",),
    "optimizer.warmup_steps": ("train",),
    "optimizer.name": ("outer",),
    "data.split": ("train",),
    "data.packing": ("train",),
    "compare.methods": ("compare",),
    "audit.estimators": ("audit",),
    "verifier.answer_field": ("rank",),
}
"""Rules that speak of more than their own section, or hold for one command alone."""


def check_config(config: Any, config_source: str) -> None:
    """Every rule of RULES that applies, or one ValueError that lists those which do not hold."""
    values = dict(flatten_config(config))
    violations = [
        f"{key} = {values[key]!r}: {text}" if key in values else f"{key}: {text}"
        for key, holds, text in CONFIG_RULES
        if _rule_applies(key, config, values) and not holds(config)
    ]
    violations += [f"{key} = {value!r}: must be finite" for key, value in values.items() if not _is_finite(value)]
    if violations:
        raise ValueError("\n  ".join([f"{config_source}:", *violations]))


def flatten_config(config: Any) -> list[tuple[str, Any]]:
    """("section.key", value) of every key."""
    return [(f"{name}.{key}", value) for name, section in vars(config).items() for key, value in vars(section).items()]


def _rule_applies(key: str, config: Any, values: dict[str, Any]) -> bool:
    sections = {field.name for field in dataclasses.fields(config)}
    return (key in values or key in sections) and sections.issuperset(REQUIRED_SECTIONS.get(key, ()))


def _is_finite(value: Any) -> bool:
    items = value if isinstance(value, tuple) else (value,)
    return all(math.isfinite(item) for item in items if isinstance(item, float))
