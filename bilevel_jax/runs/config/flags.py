"""Command-line flags of config keys, their short forms and their help"""

import contextlib
import dataclasses
import textwrap
import typing
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from bilevel_jax.runs.config.renamed_keys import check_flags
from bilevel_jax.runs.config.rules import flatten_config

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
    "audit": ("estimators", "scores", "removed", "subsets"),
    "rank": ("strategies", "metrics", "pick_by", "train_examples"),
    "refine": ("rounds", "questions", "share", "methods"),
    "generate": ("num_generations", "temperature", "max_new_tokens"),
    "verifier": ("name", "answer_field"),
    "show": ("examples", "ids"),
    "selection": ("top_share",),
    "retrain": ("enabled",),
    "certify": ("enabled",),
    "export": ("dir", "format", "container"),
    "output": ("dir", "resume"),
    "mesh": ("fsdp",),
    "estimate": ("devices", "memory_gib", "train_examples", "compile", "measure", "tflops", "dir"),
}  # fmt: skip
"""Keys that most runs set, by section; `--help` shows these and `--help-all` shows all."""

SHORT_FLAGS = {
    "--model": "model.name_or_path",
    "--train": "data.train",
    "--validation": "data.validation",
    "--weights": "weights.file",
    "--resume": "output.resume",
}
FAST_KEYS = ("retrain.enabled", "certify.enabled")
"""Keys that --fast sets to false."""

EXIT_CODES = "Exit codes: 0 success, 1 an error (see stderr), 2 a wrong command line, 128 + N stopped by signal N."


def parse_flags(config: Any, arguments: Sequence[str], prog: str) -> Any:
    """Override keys of a config by command-line flags.

    Args:
        config: the config of a command.
        arguments: flags and their values; `--help` and `--help-all` print the flags and exit.
        prog: the command, as the help shows it.

    Returns:
        The config with the overrides.
    """
    check_flags(arguments, [key for key, _ in flatten_config(config)])
    flags = [flag for argument in arguments for flag in _expand_short_flag(config, argument)]
    return tyro.cli(type(config), prog=prog, args=flags, default=config, description=help_text(config))


def print_help(config: Any, prog: str, show_all: bool) -> None:
    """Print the flags of a command: those of COMMON_KEYS, or all."""
    shown = config if show_all else _with_common_keys(config)
    more = "" if show_all else "\n\nThese are the keys that most runs set; --help-all shows all of them."
    with contextlib.suppress(SystemExit):  # tyro exits after it has printed the help
        tyro.cli(type(shown), prog=prog, args=["--help"], default=shown, description=help_text(config) + more)


def help_text(config: Any) -> str:
    """What a command does, its short flags and its exit codes."""
    keys = dict(flatten_config(config))
    places = (
        "CONFIG is a YAML file of the sections below; every flag overrides one of its keys. Paths are relative to the "
        "current folder."
    )
    pairs = [f"{flag} = --{key}".replace("_", "-") for flag, key in short_flags(config).items()]
    if fast := [f"--{key.replace('.', '.no-')}" for key in FAST_KEYS if key in keys]:
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
    return flags | ({"--out": dirs[0]} if dirs else {})


def _expand_short_flag(config: Any, argument: str) -> tuple[str, ...]:
    name, equals, value = argument.partition("=")
    keys = dict(flatten_config(config))
    fast = tuple(f"--{key.replace('.', '.no-')}" for key in FAST_KEYS if key in keys)
    if name == "--fast" and fast:
        return fast
    if key := short_flags(config).get(name):
        return (f"--{key}{equals}{value}",)
    return (argument,)


def _with_common_keys(config: Any) -> Any:
    """The same values in classes whose other keys are hidden from the help."""
    sections = {}
    for name, section in vars(config).items():
        hidden = {key for key in vars(section) if key not in COMMON_KEYS.get(name, ())}
        sections[name] = _hide(type(section), hidden)(**vars(section))
    config_class = _hide(type(config), {name for name in sections if name not in COMMON_KEYS})
    return config_class(**sections)


def _hide(cls: Any, hidden: set[str]) -> Any:
    """A subclass whose hidden fields have no line in the help."""
    hints = typing.get_type_hints(cls, include_extras=True)
    annotations = {key: Annotated[hints[key], tyro.conf.Suppress] if key in hidden else hints[key] for key in hints}
    namespace = {"__annotations__": annotations, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return dataclasses.dataclass(frozen=True)(type(cls.__name__, (cls,), namespace))
