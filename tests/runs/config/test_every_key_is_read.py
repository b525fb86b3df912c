"""Every key of every config does something: the package reads it, and the config hash changes with it."""

import ast
import dataclasses
from collections import defaultdict
from pathlib import Path

import pytest

import bilevel_jax
from bilevel_jax.cli import COMMANDS
from bilevel_jax.lm.data.examples import DataOptions
from bilevel_jax.runs.config import load, schema
from bilevel_jax.runs.config.load import RESUME_EXEMPT_KEYS, config_hash
from bilevel_jax.runs.config.yaml_reader import field_types

PACKAGE = Path(bilevel_jax.__file__).parent
CONFIGS = [getattr(load, command.config) for command in COMMANDS.values()]
SECTION_OF_CLASS = {
    kind.__name__: section for config_class in CONFIGS for section, kind in field_types(config_class).items()
} | {"DataOptions": "data"}  # made from section data, field by field
LEAVES = sorted(
    {f"{s}.{key}" for config in CONFIGS for s, kind in field_types(config).items() for key in field_types(kind)}
)

READ_BY_CONFIG = {
    "estimate.command": "decides in runs/config/load.py which command's config is read",
    "refine.generator": "`trains_generator` of runs/config/rules.py reads it for everyone",
    "tune.command": "`choose_command_after_tune` of runs/config/rules.py reads it for everyone",
}
"""Keys that nothing outside of runs/config reads, with the reason."""
SAME_HASH = {
    "output.dir": "where the results are written",
    "output.resume": "whether a run continues",
    "output.progress": "what the terminal shows",
    "output.tensorboard": "the numbers of the log, once more in another form",
    "output.save_minutes": "when checkpoints are written",
    "generate.concurrency": "how many answers are waited for at once",
    "generate.timeout": "how long an answer is waited for",
    "judge.concurrency": "how many verdicts are waited for at once",
    "judge.timeout": "how long a verdict is waited for",
    "judge.retries": "how often a service that does not answer is asked again",
    "candidates.concurrency": "how many responses are waited for at once",
    "candidates.timeout": "how long a response is waited for",
    "mesh.data": "the same numbers on another number of devices",
    "mesh.fsdp": "the same numbers with sharded parameters",
    "mesh.sharding_rules": "the same numbers with other shards",
    "distributed.coordinator_address": "how processes find each other",
    "distributed.num_processes": "how processes find each other",
    "distributed.process_id": "how processes find each other",
    "distributed.initialization_timeout": "how long they look for each other",
}
"""Keys that may differ when a run is resumed, with the reason."""


def sections_of_names(tree):
    """The sections that a name or attribute of a module may hold, by annotation or by assignment from a config."""
    sections = defaultdict(set)

    def annotate(name, annotation):
        for node in ast.walk(annotation) if annotation is not None else ():
            kind = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
            if kind in SECTION_OF_CLASS:
                sections[name].add(SECTION_OF_CLASS[kind])

    def assign(target, value):
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for pair in zip(target.elts, value.elts, strict=True):
                assign(*pair)
        elif (name := last_name(target)) and isinstance(value, ast.Attribute):
            if value.attr in SECTION_OF_CLASS.values():
                sections[name].add(value.attr)
        elif (name := last_name(target)) and isinstance(value, ast.Call) and last_name(value.func) == "replace":
            assign(target, value.args[0])

    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            annotate(node.arg, node.annotation)
        elif isinstance(node, ast.AnnAssign):
            annotate(last_name(node.target), node.annotation)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                assign(target, node.value)
    return sections


def last_name(node):
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def keys_read(source):
    """`section.key` of every key that a module reads: config.section.key, or name.key where name is a section."""
    tree = ast.parse(source)
    sections = sections_of_names(tree)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            base = last_name(node.value)
            of_config = {base} if isinstance(node.value, ast.Attribute) else set()
            found |= {f"{section}.{node.attr}" for section in of_config | sections.get(base, set())}
    return found


@pytest.fixture(scope="module")
def read_keys():
    files = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "runs" / "config"]
    return set().union(*(keys_read(path.read_text(encoding="utf-8")) for path in files))


@pytest.mark.parametrize(
    "source, found",
    [
        ("def f(config): return config.outer.steps", True),
        ("def f(settings: schema.OuterSection): return settings.steps", True),
        ("def f(settings: OuterSection | None): return settings.steps", True),
        ("def f(config):\n  outer, x = config.outer, 1\n  return outer.steps", True),
        ("class A:\n  settings: OuterSection\n  def f(self): return self.settings.steps", True),
        ("def f(config): return replace(config.outer, steps=3)", False),
        ("def f(config): return config.train.steps", False),
        ("def f(run): return run.steps", False),
    ],
)
def test_the_reader_of_keys(source, found):
    assert ("outer.steps" in keys_read(source)) == found


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_key_is_read(leaf, read_keys):
    assert (leaf in read_keys) != (leaf in READ_BY_CONFIG), f"nothing in the package reads {leaf}"


def changed(value):
    """Another value of the type of a key."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return (*value, "more") if isinstance(value, tuple) else f"{value} more"


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda config_class: config_class.__name__)
def test_every_key_changes_the_hash(config_class):
    config = config_class()
    for section in field_types(config_class):
        for key, value in vars(getattr(config, section)).items():
            other = dataclasses.replace(getattr(config, section), **{key: changed(value)})
            same = config_hash(config) == config_hash(dataclasses.replace(config, **{section: other}))
            assert same == (f"{section}.{key}" in SAME_HASH), f"{section}.{key}"


def test_the_exceptions_are_those_of_the_package():
    assert set(SAME_HASH) == set(RESUME_EXEMPT_KEYS) and set(READ_BY_CONFIG) <= set(LEAVES)


def test_data_options_are_keys_of_section_data():
    assert {field.name for field in dataclasses.fields(DataOptions)} <= set(field_types(schema.DataSection))
