"""Command-line flags of config keys, their short forms and their help"""

import contextlib
import dataclasses
import difflib
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import tyro

from bilevel_jax.runs.config.renamed_keys import FlagError, check_flags
from bilevel_jax.runs.config.rules import evaluates_own_models, flatten_config, is_evaluation
from bilevel_jax.runs.config.yaml_reader import decode_value, describe_type, field_types, suggest_nearest
from bilevel_jax.runs.terminal import show_control_characters, styled_output

COMMON_KEYS: dict[str, tuple[str, ...]] = {
    "model": ("name_or_path",),
    "lora": ("r",),
    "data": (
        "train", "validation", "test", "prompt_field", "response_field", "label_field", "max_length", "truncation",
    ),
    "arrays": ("train_examples", "validation_examples", "label_noise"),
    "objective": ("name",),
    "weights": ("score", "file", "missing"),
    "optimizer": ("learning_rate",),
    "train": ("num_epochs", "max_steps", "global_batch_size"),
    "outer": ("method", "weighting", "steps", "learning_rate"),
    "compare": ("methods", "baselines", "budget", "seeds"),
    "audit": ("estimators", "scores", "removed", "subsets", "extremes"),
    "tune": (
        "learning_rates", "warmup_shares", "eps_roots", "clip_norms", "batch_sizes", "budget", "max_loss_increase",
    ),
    "rater": ("features",),
    "score": ("rater", "model", "features"),
    "rank": ("strategies", "metrics", "pick_by", "train_examples", "records", "least_wins", "largest_wins"),
    "candidates": ("strategies", "model"),
    "refine": ("rounds", "questions", "share", "methods", "generator"),
    "evaluate": ("model", "baseline", "prompts", "metrics", "questions"),
    "judge": ("url", "model", "template"),
    "generate": ("num_generations", "temperature", "max_new_tokens"),
    "verifier": ("name", "answer_field"),
    "show": ("examples", "ids"),
    "watch": ("seconds", "once"),
    "selection": ("top_share",),
    "contradictions": ("draws",),
    "retrain": ("enabled",),
    "certify": ("enabled",),
    "export": ("dir", "format", "container", "push_to_hub", "push_model_to_hub", "private"),
    "output": ("dir", "resume"),
    "mesh": ("fsdp",),
    "estimate": ("devices", "memory_gib", "train_examples", "compile", "measure", "tflops", "dir"),
}  # fmt: skip
"""Keys that most runs set, by section; `--help` shows these and `--help-all` shows all."""

NOT_IN_EVALUATE = ("data.train", "data.validation", "data.label_field", "data.max_length")
"""Those that `evaluate` has no use for: it asks the prompts of data.test."""

NOT_IN_OWN_EVALUATION = (
    "evaluate.questions", "generate.num_generations", "generate.temperature", "generate.max_new_tokens",
    "verifier.answer_field", "judge.model", "judge.template",
)  # fmt: skip
"""Those of a command that evaluates the models of its own run beside its main work, in the help of all keys alone."""

NOT_IN_COMPARE = (
    *NOT_IN_OWN_EVALUATION, "evaluate.metrics", "judge.url", "verifier.name", "rater.features",
)  # fmt: skip
"""Those that few runs of `compare` set."""

NOT_IN_REFINE = (
    "objective.name", "evaluate.prompts", "evaluate.metrics", "evaluate.questions", "judge.url", "judge.model",
    "judge.template",
)  # fmt: skip
"""Those that few runs of `refine` set, or none may: it trains with sft, and generates and verifies in any case."""

NOT_IN_TUNE = (
    *NOT_IN_COMPARE, "data.label_field", "arrays.train_examples", "arrays.validation_examples", "arrays.label_noise",
    "outer.weighting", "outer.steps", "outer.learning_rate", "selection.top_share", "contradictions.draws",
    "retrain.enabled", "certify.enabled", "evaluate.prompts", "audit.estimators", "audit.scores", "audit.removed",
    "audit.subsets", "audit.extremes",
)  # fmt: skip
"""Those that tuned.yaml passes on and `tune` does not read, and those that few of its runs set."""

NOT_IN_SCORE = ("data.validation", "data.test", "data.max_length")
"""Those that `score` has no use for: its rater was learned from validation and says how long an example may be."""

SHORT_FLAGS = {
    "--model": "model.name_or_path",
    "--train": "data.train",
    "--rater": "score.rater",
    "--validation": "data.validation",
    "--weights": "weights.file",
    "--resume": "output.resume",
    "--push-to-hub": "export.push_to_hub",
    "--private": "export.private",
}
FAST_KEYS = ("retrain.enabled", "certify.enabled")
"""Keys that --fast sets to false."""

EXIT_CODES = "Exit codes: 0 success, 1 an error (see stderr), 2 a wrong command line, 128 + N stopped by signal N."


class Flag(NamedTuple):
    """A flag of the command line with the words behind it."""

    name: str
    """As it was typed, without its value."""
    values: tuple[str, ...]
    has_equals: bool
    """Whether the first value is behind an equals sign."""

    @property
    def words(self) -> tuple[str, ...]:
        """As they stood on the command line."""
        if self.has_equals:
            return (f"{self.name}={self.values[0]}", *self.values[1:])
        return (self.name, *self.values)


def split_flags(arguments: Sequence[str]) -> list[Flag]:
    """The flags of a command line, each with its values. A word that begins with a hyphen is a flag unless a number.

    Raises:
        FlagError: for a word that stands behind no flag.
    """
    flags: list[Flag] = []
    for argument in arguments:
        if argument.startswith("-") and not re.fullmatch(r"-(\.?\d.*|inf(inity)?|)", argument):
            name, equals, value = argument.partition("=")
            flags.append(Flag(name, (value,) if equals else (), bool(equals)))
        elif not flags:
            raise FlagError(f"{argument!r} stands behind no flag. Write COMMAND CONFIG --section.key VALUE.")
        else:
            flags[-1] = flags[-1]._replace(values=(*flags[-1].values, argument))
    return flags


def parse_flags(
    config: Any, arguments: Sequence[str], prog: str, other_keys: Mapping[str, Sequence[str]] | None = None
) -> Any:
    """Override keys of a config by command-line flags.

    A flag `--section.key` has the value of its key behind it or behind an equals sign; several for a list; none for a
    key that is true or false, where `--section.no-key` is false. Of a flag that stands twice the last counts, but a
    list must stand once. Hyphens and underscores are the same.

    Args:
        config: the config of a command.
        arguments: flags and their values.
        prog: the command, as its help shows it.
        other_keys: keys that this command lacks, and the commands that have them.

    Returns:
        The config with the overrides.

    Raises:
        FlagError: that lists every flag that is unknown, lacks a value or has one of another type.
    """
    arguments = [flag for argument in arguments for flag in _expand_short_flag(config, argument)]
    check_flags(arguments, [key for key, _ in flatten_config(config)])
    key_types = {
        f"{section}.{key}": kind
        for section, section_type in field_types(type(config)).items()
        for key, kind in field_types(section_type).items()
    }
    sections: dict[str, dict[str, Any]] = {}
    seen, errors = set[str](), []
    for flag in split_flags(arguments):
        try:
            key, value = _read_flag(flag, key_types)
            if key in seen and typing.get_origin(key_types[key]) is tuple:
                raise ValueError(f"{flag.name} stands twice; give all of its values behind one of them.")
        except KeyError:
            errors.append(_describe_unknown(flag, key_types, prog, other_keys or {}, short_flags(config)))
        except ValueError as error:
            errors.append(str(error))
        else:
            seen.add(key)
            sections.setdefault(key.partition(".")[0], {})[key.partition(".")[2]] = value
    if errors:
        raise FlagError("\n".join(errors))
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


def _read_flag(flag: Flag, key_types: Mapping[str, Any]) -> tuple[str, Any]:
    """The key of a flag and its value; a KeyError for a key that is none, a ValueError for what is no value of it."""
    key = flag.name.removeprefix("--").replace("-", "_")
    if not flag.name.startswith("--"):
        raise KeyError(key)
    section, _, name = key.partition(".")
    off = f"{section}.{name.removeprefix('no_')}"
    if key not in key_types and name.startswith("no_") and key_types.get(off) is bool:
        if flag.values:
            raise ValueError(f"{flag.name} takes no value, and {' '.join(flag.values)!r} stands behind it.")
        return off, False
    kind = key_types[key]
    if kind is bool and not flag.has_equals:
        if flag.values:
            negative = f"--{section}.no-{name}".replace("_", "-")
            raise ValueError(
                f"{flag.name} takes no value, and {' '.join(flag.values)!r} stands behind it. Its opposite is "
                f"{negative}."
            )
        return key, True
    words: Any = list(flag.values)
    if typing.get_origin(kind) is not tuple:
        if not words:
            raise ValueError(f"{flag.name} has no value; {describe_type(kind)} is wanted behind it.")
        if len(words) > 1:
            raise ValueError(
                f"{flag.name} takes one value, and {len(words)} stand behind it: {' '.join(words)!r}. Quote a value "
                "with spaces."
            )
        words = {"true": True, "false": False}.get(words[0].lower(), words[0]) if kind is bool else words[0]
    try:
        return key, decode_value(kind, words)
    except ValueError as error:
        shown = " ".join(flag.values)
        raise ValueError(f"{flag.name} is {shown!r}; wanted {error}.") from None


def _describe_unknown(
    flag: Flag,
    key_types: Mapping[str, Any],
    prog: str,
    other_keys: Mapping[str, Sequence[str]],
    short: Mapping[str, str],
) -> str:
    """An unknown flag with the nearest, or the commands that have it."""
    command = " ".join(prog.split()[:2])
    key = flag.name.lstrip("-").replace("-", "_")
    if commands := other_keys.get(key):
        return f"{flag.name} is a flag of {' and '.join(commands)}, not of {command}."
    section, dot, name = key.rpartition(".")
    same_name = [known for known in key_types if known.partition(".")[2] == name]
    names = [known.partition(".")[2] for known in key_types if known.startswith(f"{section}.")]
    if same_name and not difflib.get_close_matches(name, names, 1, cutoff=0.85):
        hint = f"did you mean '--{same_name[0]}'? "
    elif names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean '--{section}.{near[0]}'? " if near else f"the keys of {section}: {', '.join(names)}; "
    else:
        hint = suggest_nearest(f"--{key}", [*(short if not dot else ()), *(f"--{known}" for known in key_types)])
    return f"{flag.name}: no such flag; {hint.replace('_', '-')}`{command} --help-all` lists all."


def print_help(config: Any, prog: str, show_all: bool) -> None:
    """Print the flags of a command: those of COMMON_KEYS, or all."""
    shown = _show_values(config) if show_all else _with_common_keys(_show_values(config))
    more = "" if show_all else "\n\nThese are the keys that most runs set; --help-all shows all of them."
    with contextlib.suppress(SystemExit), styled_output():  # tyro exits after it has printed the help
        tyro.cli(
            type(shown),
            prog=show_control_characters(prog),
            args=["--help"],
            default=shown,
            description=help_text(config) + more,
        )


def help_text(config: Any) -> str:
    """What a command does, its short flags and its exit codes."""
    keys = dict(flatten_config(config))
    places = (
        "CONFIG is a YAML file of the sections below; every flag overrides one of its keys. Paths are relative to the "
        "current folder."
    )
    pairs = [f"{flag} = --{key}".replace("_", "-") for flag, key in short_flags(config).items()]
    if fast := _fast_flags(config):
        pairs.append(f"--fast = {' '.join(fast)}")
    paragraphs = [" ".join(paragraph.split()) for paragraph in (type(config).__doc__ or "").split("\n\n")]
    paragraphs += [places] if "data.train" in keys else []
    paragraphs += [f"Short flags: {', '.join(pairs)}.", EXIT_CODES]
    return "\n\n".join(textwrap.fill(paragraph, 80, break_on_hyphens=False) for paragraph in paragraphs)


def short_flags(config: Any) -> dict[str, str]:
    """The short flags of a command and the keys that they set; --out is the folder that the command writes."""
    keys = dict(flatten_config(config))
    flags = {flag: key for flag, key in SHORT_FLAGS.items() if key in keys}
    dirs = [key for key in ("output.dir", "export.dir", "estimate.dir") if key in keys]
    if "score.rater" in keys:
        flags = {flag: key for flag, key in flags.items() if key not in NOT_IN_SCORE}
        flags |= {"--data": "data.train", "--model": "score.model"}
    if is_evaluation(config):
        flags = {flag: key for flag, key in flags.items() if key not in NOT_IN_EVALUATE}
        flags |= {"--model": "evaluate.model", "--baseline": "evaluate.baseline", "--prompts": "data.test"}
    return flags | ({"--out": dirs[0]} if dirs else {})


def _expand_short_flag(config: Any, argument: str) -> tuple[str, ...]:
    name, equals, value = argument.partition("=")
    fast = _fast_flags(config)
    if name == "--fast" and fast:
        return fast
    if key := short_flags(config).get(name):
        return (f"--{key}{equals}{value}",)
    return (argument,)


def _fast_flags(config: Any) -> tuple[str, ...]:
    """What --fast stands for; nothing for `tune`, which judges by certificates."""
    keys = () if hasattr(config, "tune") else dict(flatten_config(config))
    return tuple(f"--{key.replace('.', '.no-')}" for key in FAST_KEYS if key in keys)


def _show_values(config: Any) -> Any:
    """The same config with texts that a terminal can show."""

    def show(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(show, value))
        return show_control_characters(value) if isinstance(value, str) else value

    return type(config)(
        **{
            name: dataclasses.replace(section, **{key: show(value) for key, value in vars(section).items()})
            for name, section in vars(config).items()
        }
    )


def _with_common_keys(config: Any) -> Any:
    """The same values in classes whose other keys are hidden from the help."""
    sections = {}
    unused = _uncommon_keys(config)
    for name, section in vars(config).items():
        hidden = {key for key in vars(section) if key not in COMMON_KEYS.get(name, ()) or f"{name}.{key}" in unused}
        sections[name] = _hide(type(section), hidden)(**vars(section))
    config_class = _hide(type(config), {name for name in sections if name not in COMMON_KEYS})
    return config_class(**sections)


def _uncommon_keys(config: Any) -> tuple[str, ...]:
    """Keys of COMMON_KEYS that few runs of this command set."""
    if hasattr(config, "score"):
        return NOT_IN_SCORE
    if is_evaluation(config):
        return NOT_IN_EVALUATE
    if hasattr(config, "refine"):
        return NOT_IN_REFINE
    if hasattr(config, "compare"):
        return NOT_IN_COMPARE
    if hasattr(config, "tune"):
        return NOT_IN_TUNE
    return NOT_IN_OWN_EVALUATION if evaluates_own_models(config) else ()


def _hide(cls: Any, hidden: set[str]) -> Any:
    """A subclass whose hidden fields have no line in the help."""
    hints = typing.get_type_hints(cls, include_extras=True)
    annotations = {key: Annotated[hints[key], tyro.conf.Suppress] if key in hidden else hints[key] for key in hints}
    namespace = {"__annotations__": annotations, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return dataclasses.dataclass(frozen=True)(type(cls.__name__, (cls,), namespace))
