"""The embedded tasks: data and small language models that the package makes itself, as ordinary files."""

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from bilevel_jax.core.problem import weighted
from bilevel_jax.core.transition import begin, train, transition
from bilevel_jax.lm import batches, cipher, data, losses, sums, tokens
from bilevel_jax.lm import models as lm
from bilevel_jax.runs import processes
from bilevel_jax.runs.config import InspectConfig, SelectConfig, TrainConfig
from bilevel_jax.runs.optimizers import optimizer
from bilevel_jax.runs.sections import OptimizerSection
from bilevel_jax.runs.session import progress_bar

Config = TypeVar("Config", SelectConfig, TrainConfig, InspectConfig)
PREFIX = "builtin:"
"""`builtin:NAME`, in data.train also `builtin:NAME?option=value&option=value`."""


class Task(NamedTuple):
    """One embedded task, and how its model is taught what it knows before the run."""

    write: Callable[..., Path]
    """(folder, seed=..., options) -> the folder with train, validation, select, report .jsonl and untrained/."""
    options: dict[str, Callable[[str], Any]]
    """What data.train may set, and how its value is read."""
    lessons: str
    """The rows that teach the model."""
    steps: int
    batch: int
    optimizer: OptimizerSection


TASKS = {
    "cipher": Task(cipher.write, {}, "copies", 300, 32, OptimizerSection(learning_rate=4e-3, warmup_steps=20, b2=0.99)),
    "sums": Task(
        sums.write,
        {"corrupted": float, "noise": float, "rows": int, "validation": int, "select": int},
        "lessons",
        3000,
        64,
        OptimizerSection(learning_rate=4e-3, warmup_steps=20, b2=0.99),
    ),
}


def embedded(config: Config, folder: Path) -> Config:
    """The config with `builtin:NAME` replaced by the files that it is made into, once, in `folder`/input.

    Raises ValueError for a task or an option that there is not, for two tasks in one config, and for options
    elsewhere than in data.train.
    """
    name, options = named(config)
    if not name:
        return config
    task = TASKS[name]
    made = folder / "input"

    def make() -> None:
        task.write(made, seed=config.data.seed, **options)
        if _is_builtin(config.model.name_or_path) and not (made / "model").exists():
            pretrain(made, task, progress=not isinstance(config, InspectConfig) and config.output.progress)

    processes.by_first(make)

    def files(part: str, paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(made / f"{part}.jsonl") if _is_builtin(path) else path for path in paths)

    model, rows = config.model, config.data
    return replace(
        config,
        model=replace(
            model, name_or_path=str(made / "model") if _is_builtin(model.name_or_path) else model.name_or_path
        ),
        data=replace(
            rows,
            train=files("train", rows.train),
            validation=files("validation", rows.validation),
            dev=files("select", rows.dev),
            test=files("report", rows.test),
        ),
    )


def untrained(config: Config, folder: Path) -> Config:
    """As `embedded`, with the model's config and tokenizer alone, for which nothing is trained."""
    name, options = named(config)
    if name and _is_builtin(config.model.name_or_path):
        made = TASKS[name].write(folder / "input", seed=config.data.seed, **options)
        config = replace(config, model=replace(config.model, name_or_path=str(made / "untrained")))
    return embedded(config, folder)


def named(config: SelectConfig | TrainConfig | InspectConfig) -> tuple[str, dict[str, Any]]:
    """(the embedded task that a config names, or nothing; what it sets of the task's options)."""
    rows = config.data
    others = [config.model.name_or_path, *rows.validation, *rows.dev, *rows.test]
    given = [path for path in (*rows.train, *others) if _is_builtin(path)]
    names = {path.removeprefix(PREFIX).partition("?")[0] for path in given}
    if unknown := sorted(names - set(TASKS)):
        raise ValueError(f"{PREFIX}{unknown[0]} is no embedded task; they are {[PREFIX + name for name in TASKS]}.")
    if len(names) > 1:
        raise ValueError(f"{sorted(given)} are two embedded tasks; a run has room for one.")
    if extra := [path for path in others if _is_builtin(path) and "?" in path]:
        raise ValueError(f"{extra[0]}: options of an embedded task are set in data.train alone. Write them there.")
    name = next(iter(names), "")
    return name, _options(name, [path for path in rows.train if _is_builtin(path)])


def pretrain(made: Path, task: Task, *, progress: bool = True) -> None:
    """Teach the untrained model the task's lessons, and save it as `made`/model."""
    tokenizer = tokens.load_tokenizer(made / "untrained")
    architecture = lm.read_config(made / "untrained")
    lessons = data.load([str(made / f"{task.lessons}.jsonl")])
    corpus, _ = tokens.tokenize(lessons, tokenizer, max_length=architecture.max_length)
    order = batches.order(corpus.rows, task.batch, seed=0)
    layout = batches.Layout(1, task.batch, task.batch, batches.longest(corpus))
    per_example = losses.sft(lm.decoder(architecture))
    adamw = optimizer(task.optimizer, task.steps)
    step = transition(weighted(lambda params, fixed, batch: per_example(params, batch)), adamw)
    start = begin(adamw, lm.init(architecture, jax.random.key(0)))
    stream = batches.train_stream(corpus, order, task.steps, layout)
    with progress_bar(progress) as bar:
        shown = bar.add_task("teaching the embedded model", total=task.steps)
        run = train(step, start, jnp.ones(corpus.rows), None, stream, on_step=lambda state, info: bar.advance(shown))
    lm.save(made / "model", architecture, run.end.params, tokenizer=tokenizer)


def _is_builtin(path: str) -> bool:
    return path.startswith(PREFIX)


def _options(name: str, paths: list[str]) -> dict[str, Any]:
    written = {path.partition("?")[2] for path in paths}
    if len(written) > 1:
        raise ValueError(f"data.train names {PREFIX}{name} with two sets of options, {sorted(paths)}; give one.")
    options: dict[str, Any] = {}
    for pair in filter(None, "".join(written).split("&")):
        key, _, value = pair.partition("=")
        known = TASKS[name].options
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"{paths[0]}: {PREFIX}{name} has no option {key!r}; it has {list(known)}.{hint}")
        try:
            options[key] = known[key](value)
        except ValueError:
            raise ValueError(f"{paths[0]}: {key}={value!r} is no {known[key].__name__}.") from None
    return options
