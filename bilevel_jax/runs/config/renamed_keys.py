"""Former names of config keys and sections, and their present names"""

from collections.abc import Collection, Sequence

RENAMED_SECTIONS = {
    "bench": "compare",
    "check": "verifier",
    "compare": "retrain",
    "devices": "mesh",
    "keep": "selection",
    "look": "show",
    "single": "single_loop",
}
RENAMED_KEYS = {
    "arrays.fit": "arrays.validation_examples",
    "arrays.hidden": "arrays.hidden_sizes",
    "arrays.noise": "arrays.label_noise",
    "arrays.report": "arrays.test_examples",
    "arrays.rows": "arrays.train_examples",
    "arrays.select": "arrays.dev_examples",
    "arrays.share": "arrays.noise_share",
    "audit.at": "audit.checkpoints",
    "audit.entries": "audit.estimators",
    "audit.together": "audit.vmap_size",
    "bench.arms": "compare.baselines",
    "bench.passes": "compare.budget",
    "compare.rows": "retrain.variants",
    "data.report": "data.test",
    "data.select": "data.dev",
    "data.supervise": "data.train_on",
    "data.truncate": "data.truncation",
    "devices.coordinator": "distributed.coordinator_address",
    "devices.model": "mesh.fsdp",
    "devices.parameters": "mesh.sharding_rules",
    "devices.process": "distributed.process_id",
    "devices.processes": "distributed.num_processes",
    "estimate.out": "estimate.dir",
    "estimate.rows": "estimate.train_examples",
    "estimate.trusted": "estimate.validation_examples",
    "estimate.verb": "estimate.command",
    "export.folder": "export.dir",
    "export.form": "export.format",
    "export.weight": "export.weight_key",
    "generate.draws": "generate.num_generations",
    "generate.key_variable": "generate.api_key_env",
    "generate.max_new": "generate.max_new_tokens",
    "generate.source": "generate.backend",
    "generate.tokens": "generate.max_batch_tokens",
    "look.rows": "show.examples",
    "look.tokens": "show.max_tokens",
    "model.lora_alpha": "lora.alpha",
    "model.lora_rank": "lora.r",
    "model.lora_targets": "lora.target_modules",
    "model.path": "model.name_or_path",
    "model.scratch": "model.from_scratch",
    "model.train_dtype": "model.param_dtype",
    "objective.normalise": "objective.reduction",
    "optimizer.clip": "optimizer.max_grad_norm",
    "optimizer.warmup": "optimizer.warmup_steps",
    "outer.prior": "outer.proximal",
    "outer.redraw": "outer.reshuffle",
    "outer.states": "outer.offload",
    "output.folder": "output.dir",
    "rank.answers": "rank.own_answers",
    "rank.block": "rank.block_size",
    "rank.blocks": "rank.num_blocks",
    "rank.decide": "rank.pick_by",
    "rank.example": "rank.example_template",
    "rank.final": "rank.final_answer",
    "rank.max_question": "rank.max_question_tokens",
    "rank.max_response": "rank.max_response_tokens",
    "rank.train_rows": "rank.train_examples",
    "refine.beside": "refine.keep_offline",
    "refine.checked": "refine.verifier_use",
    "refine.clip": "refine.max_ratio",
    "refine.corrected": "refine.bonferroni",
    "refine.start": "refine.start_from",
    "scores.alike": "scores.max_similarity",
    "scores.demonstration": "scores.demonstration_template",
    "single.read_every": "single_loop.eval_steps",
    "single.second": "single_loop.second_model",
    "single.shares": "single_loop.validation_shares",
    "train.batch": "train.global_batch_size",
    "train.compute": "train.compute_dtype",
    "train.epochs": "train.num_epochs",
    "train.evaluate_every": "train.eval_steps",
    "train.keep": "train.load_best",
    "train.micro": "train.gradient_accumulation_steps",
    "train.skip": "train.max_nonfinite_steps",
    "train.steps": "train.max_steps",
    "weights.scale": "weights.scaling",
}
"""Keys of a renamed section that are not listed keep their name in the section's new name."""

CHANGED_VALUES = {
    "bench.arms": "aligned is now top_alignment",
    "compare.rows": "perplexity is now low_loss, alignment is top_alignment",
    "data.supervise": "all is now all_turns, last is last_turn",
    "optimizer.warmup": "a fraction below 1 is now optimizer.warmup_ratio",
    "train.keep": "best is now true, last is false",
    "weights.scale": "rows is now examples",
}


class FlagError(ValueError):
    """The command line has a flag that is none, or one without a value that fits."""


class RenamedError(FlagError):
    """A command-line flag has a former name."""


def new_key(old_key: str) -> str | None:
    """The present name of a key `section.key`, or None where it was not renamed."""
    section, _, key = old_key.partition(".")
    if old_key in RENAMED_KEYS:
        return RENAMED_KEYS[old_key]
    return f"{RENAMED_SECTIONS[section]}.{key}" if section in RENAMED_SECTIONS else None


def describe_renaming(old_key: str) -> str:
    """`is now 'section.key'`, with how values changed, for a key that was renamed."""
    values = f" ({CHANGED_VALUES[old_key]})" if old_key in CHANGED_VALUES else ""
    return f"is now '{new_key(old_key)}'{values}"


def check_flags(flags: Sequence[str], valid_keys: Collection[str]) -> None:
    """Raise a RenamedError that lists each flag with a former name and its present one.

    Args:
        flags: command-line flags and their values.
        valid_keys: `section.key` of every key that the command has.
    """
    lines = []
    for flag in flags:
        section, dot, key = flag.partition("=")[0].removeprefix("--").replace("-", "_").partition(".")
        off, key = ("no-" if key.startswith("no_") else ""), f"{section}.{key.removeprefix('no_')}"
        if flag.startswith("--") and dot and key not in valid_keys and new_key(key):
            new_section, _, new_name = str(new_key(key)).partition(".")
            new_flag = f"--{new_section}.{off}{new_name}".replace("_", "-")
            values = f" ({CHANGED_VALUES[key]})" if key in CHANGED_VALUES else ""
            lines.append(f"{flag.partition('=')[0]} is now {new_flag}{values}")
    if lines:
        raise RenamedError("; ".join(lines) + ".")
