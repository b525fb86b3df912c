"""Configs from Python: dataclasses, dicts and keywords give what a YAML file gives, and follow the same rules."""

import contextlib
import dataclasses
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from bilevel_jax.runs.config import schema
from bilevel_jax.runs.config.load import (
    COMMANDS,
    AuditConfig,
    CompareConfig,
    EstimateConfig,
    ExportConfig,
    InspectConfig,
    RankConfig,
    RefineConfig,
    SelectConfig,
    TrainConfig,
    find_config,
    load_config,
    load_config_to_estimate,
)
from bilevel_jax.runs.config.python_values import make_config, make_config_to_estimate
from bilevel_jax.runs.config.rules import flatten_config
from bilevel_jax.runs.config.yaml_reader import field_types, read_yaml

SHIPPED = {
    "select.yaml": SelectConfig, "quickstart.yaml": SelectConfig, "train.yaml": TrainConfig,
    "train_ica.yaml": TrainConfig, "compare_mnist.yaml": CompareConfig, "compare_sources.yaml": CompareConfig,
    "audit_stories.yaml": AuditConfig, "rank.yaml": RankConfig, "refine_exact.yaml": RefineConfig,
}  # fmt: skip
GIVEN = {
    "model": {"name_or_path": "m"},
    "data": {"train": ["t.jsonl"], "validation": ["v.jsonl"]},
    "train": {"max_steps": 7, "global_batch_size": 4},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_way_gives_the_config_of_the_file(name):
    config_class, path = SHIPPED[name], find_config(name)
    content = read_yaml(path)[1]
    expected = load_config(config_class, path)
    dotted = {f"{section}.{key}": value for section, values in content.items() for key, value in values.items()}
    for config, sections in (
        (name, {}),
        (Path(path), {}),
        (content, {}),
        (MappingProxyType(content), {}),
        (expected, {}),
        (None, content),
        (None, dotted),
        (dotted, {}),
        (None, dict(vars(expected))),
        (dataclasses.asdict(expected), {}),
    ):
        assert make_config(config_class, config, sections) == expected


def test_keywords_override_the_config_and_leave_the_rest():
    for config in (GIVEN, make_config(SelectConfig, GIVEN, {})):
        made = make_config(SelectConfig, config, {"train": {"max_steps": 9}, "data.train": "u.jsonl"})
        assert made.train == schema.TrainSection(max_steps=9, global_batch_size=4)
        assert made.data.train == ("u.jsonl",) and made.data.validation == ("v.jsonl",)
    assert made.optimizer.learning_rate == 1e-3 and made.outer == schema.OuterSection()


def test_paths_and_numbers_of_numpy_are_those_of_python():
    made = make_config(
        SelectConfig,
        GIVEN,
        {
            "model": {"name_or_path": Path("a") / "b"},
            "data": {"train": (Path("t.jsonl"), np.str_("u.jsonl")), "split": np.array([0.5, 0.25, 0.25])},
            "train": {"max_steps": np.int32(30), "seed": 2.0},
            "optimizer": {"learning_rate": np.float32(0.5), "b2": "0.9"},
            "retrain": {"enabled": np.bool_(False)},
        },
    )
    values = dict(flatten_config(made))
    expected = {
        "model.name_or_path": "a/b", "data.train": ("t.jsonl", "u.jsonl"), "data.split": (0.5, 0.25, 0.25),
        "train.max_steps": 30, "train.seed": 2, "optimizer.learning_rate": 0.5, "optimizer.b2": 0.9,
        "retrain.enabled": False,
    }  # fmt: skip
    assert {key: values[key] for key in expected} == expected
    assert all(type(values[key]) is type(value) for key, value in expected.items())


def test_inspect_and_export_take_the_config_of_any_command():
    select = make_config(SelectConfig, GIVEN, {})
    assert make_config(InspectConfig, select, {"show.examples": 3}).data == select.data
    assert make_config(InspectConfig, GIVEN, {}).model == select.model
    assert make_config(ExportConfig, dataclasses.asdict(select), {}).selection == select.selection


def test_estimate_finds_out_which_command_a_config_is_for():
    path = find_config("quickstart.yaml")
    config, options = make_config_to_estimate(path, {"estimate": {"devices": 2}, "train": {"max_steps": 50}})
    flags = ["--estimate.devices", "2", "--train.max-steps", "50"]
    assert (config, options) == load_config_to_estimate(path, flags)
    given = {**GIVEN, "weights": {"constant": 0.5}}
    assert isinstance(make_config_to_estimate(given, {"estimate.compile": False})[0], TrainConfig)
    assert isinstance(make_config_to_estimate(None, {**GIVEN, "estimate.command": "select"})[0], SelectConfig)
    select = make_config(SelectConfig, GIVEN, {})
    assert make_config_to_estimate(select, {"train.max_steps": 8})[0].train.max_steps == 8
    for config, sections, said in (
        (None, {}, "estimate: give the config of a run"),
        (GIVEN, {}, "the config may be a config of select or train or compare or audit: choose one by --estimate.com"),
        (GIVEN, {"estimate": {"device": 2}}, "estimate: unknown key 'estimate.device'; did you mean 'devices'?"),
        (GIVEN, {"estimate.devices": -1}, "the arguments of estimate: estimate.devices = -1: must be 0 "),
        ({"rank": {}}, {}, "the config is a config of none of select, train, compare, audit, tune, which can"),
        (EstimateConfig(), {}, "a EstimateConfig was given"),
    ):
        with pytest.raises(ValueError) as caught:
            make_config_to_estimate(config, sections)
        assert said in str(caught.value)


class Odd:
    """A value that nobody thought of, with a repr of two lines."""

    def __repr__(self):
        return "odd\n  thing"

    def __eq__(self, other):
        raise RuntimeError("compared")

    __hash__ = None


MISUSES = [
    # what is given, overrides, what is said
    (3, {}, "select: 3 (int) was given; wanted a SelectConfig, a dict of sections, or the name of a YAML file."),
    ([GIVEN], {}, "(list) was given; wanted a SelectConfig"),
    (b"configs/select.yaml", {}, "(bytes) was given; wanted a SelectConfig"),
    (Odd(), {}, "select: odd thing (Odd) was given; wanted"),
    (SelectConfig, {}, "the class SelectConfig was given; wanted a SelectConfig,"),
    (TrainConfig(), {}, "a TrainConfig was given; wanted a SelectConfig, a dict of sections,"),
    (schema.ModelSection(), {}, "(ModelSection) was given; wanted a SelectConfig"),
    ({}, {"modle": {}}, "select: unknown section 'modle'; did you mean 'model'? the sections: model, lora, data,"),
    ({3: {}}, {}, "select: unknown section '3'; the sections: model,"),
    ({None: {}}, {}, "select: unknown section 'None'; the sections: model,"),
    ({}, {"config_path": "x.yaml"}, "unknown section 'config_path'; the sections: model,"),
    ({}, {"learning_rate": 0.1}, "unknown section 'learning_rate'; did you mean 'optimizer.learning_rate'? the s"),
    ({}, {"out": "there"}, "select: out='there' (str) is the flag --out; in Python give output={'dir': ...}."),
    ({}, {"train": "rows.jsonl"}, "train='rows.jsonl' (str) is the flag --train; in Python give data={'train': ...}."),
    ({}, {"model": Path("m")}, "model='m' (str) is the flag --model; in Python give model={'name_or_path': ...}."),
    ({}, {"resume": True}, "select: resume=True (bool) is the flag --resume; in Python give output={'resume': ...}."),
    ({}, {"weights": {"file": "w"}}, "unknown section 'weights'; the sections: model,"),
    ({}, {"bench": {}}, "select: section 'bench' is now 'compare'."),
    ({}, {"keep": {"top_share": 0.3}}, "select: 'keep.top_share' is now 'selection.top_share'."),
    ({}, {"train": {"steps": 3}}, "select: 'train.steps' is now 'train.max_steps'."),
    ({}, {"train.steps": 3}, "select: 'train.steps' is now 'train.max_steps'."),
    ({}, {"train": {"max_step": 3}}, "select: unknown key 'train.max_step'; did you mean 'max_steps'?"),
    ({}, {"train.max_steps.more": 3}, "select: unknown key 'train.max_steps.more'; did you mean 'max_steps'?"),
    ({}, {"train": {("a", 1): 3}}, "unknown key 'train.('a', 1)'; the keys of train:"),
    ({}, {"output": {"learning_rate": 3}}, "did you mean 'optimizer.learning_rate'?"),
    ({"train": {"max_steps": 3}, "train.max_steps": 4}, {}, "'train.max_steps' stands twice, as a key of 'train' and"),
    ({}, {"outer": 3}, "select: outer is 3 (int); wanted its keys: method, weighting,"),
    ({}, {"outer": [("steps", 3)]}, "select: outer is [['steps', 3]] (list); wanted its keys:"),
    ({}, {"train": schema.FineTuneSection()}, "train is a FineTuneSection; wanted a TrainSection, or a dict of its k"),
    ({}, {"train": {"max_steps": "many"}}, "select: train.max_steps is 'many' (str); wanted a whole number."),
    ({}, {"train": {"max_steps": 1.5}}, "train.max_steps is 1.5 (float); wanted a whole number."),
    ({}, {"train": {"max_steps": True}}, "train.max_steps is True (bool); wanted a whole number."),
    ({}, {"train": {"max_steps": None}}, "train.max_steps is empty; wanted a whole number."),
    ({}, {"train": {"max_steps": 10**30}}, "(int); wanted a whole number below 2^63."),
    ({}, {"train": {"max_steps": [3]}}, "train.max_steps is [3] (list); wanted a whole number."),
    ({}, {"train": {"max_steps": Odd()}}, "train.max_steps is odd thing (Odd); wanted a whole number."),
    ({}, {"train": schema.TrainSection(max_steps="x")}, "train.max_steps is 'x' (str); wanted a whole number."),
    ({}, {"optimizer": {"learning_rate": 1j}}, "optimizer.learning_rate is 1j (complex); wanted a number."),
    ({}, {"optimizer": {"learning_rate": np.nan}}, "optimizer.learning_rate is nan (float); wanted a number."),
    ({}, {"optimizer": {"learning_rate": np.ones(2)}}, "optimizer.learning_rate is [1.0, 1.0] (list); wanted a num"),
    ({}, {"optimizer": {"name": "adamW"}}, "wanted one of sgd, momentum, adam, adamw, lion (did you mean 'adamw'?)."),
    ({}, {"optimizer": {"name": Odd()}}, "optimizer.name is odd thing (Odd); wanted one of sgd, momentum,"),
    ({}, {"outer": {"reshuffle": "yes"}}, "outer.reshuffle is 'yes' (str); wanted true or false."),
    ({}, {"outer": {"reshuffle": 1}}, "outer.reshuffle is 1 (int); wanted true or false."),
    ({}, {"data": {"split": (1, 2)}}, "data.split is [1, 2] (list); wanted a list of 3."),
    ({}, {"data": {"template": 3}}, "data.template is 3 (int); wanted text"),
    ({}, {"data": {"train": [{"prompt": "a", "response": "b"}]}}, "data.train names files, and {'prompt': 'a', 'respo"),
    ({}, {"data.validation": Odd()}, "data.validation names files, and odd thing (Odd) was given. Write examples to a"),
    ({}, {"data": {"train": ["a.jsonl", ""]}}, "data.train = ('a.jsonl', ''): one of the names is empty: remove it."),
    ({}, {"data": {"train": "a\0b"}}, "holds a null character or no valid text: write it in UTF-8."),
    ({}, {"train": {"max_steps": 0}}, "the arguments of select: train.max_steps = 0: must be in [1, 1e+07]."),
    ({}, {"outer": {"max_step": np.inf}}, "the arguments of select: outer.max_step = inf: must be finite."),
    ({}, {"outer": {"method": "implicit"}}, "outer.proximal = 0.0: must be 0 or more; the implicit method needs it"),
    ({}, {"lora": {"r": 0}, "model.base_dtype": "bfloat16"}, "only a frozen base can be stored in bfloat16"),
    ({"output": {"dir": ""}}, {}, "output.dir = '': name the run's folder."),
]  # fmt: skip


@pytest.mark.parametrize("config, sections, said", MISUSES, ids=[said[:50] for _, _, said in MISUSES])
def test_a_misuse_is_one_sentence(config, sections, said):
    base = {**GIVEN, **config} if isinstance(config, dict) else config
    with pytest.raises(ValueError) as caught:
        make_config(SelectConfig, base, sections)
    text = str(caught.value)
    assert said in text and "\n" not in text and text.endswith(".")


def test_all_errors_are_told_at_once(tmp_path):
    (tmp_path / "c.yaml").write_text("modle: {}\n")
    for config, first in (({"modle": {}}, "select"), (tmp_path / "c.yaml", f"{tmp_path}/c.yaml:1")):
        with pytest.raises(ValueError) as caught:
            make_config(SelectConfig, config, {"train": {"step": 1, "global_batch_size": "x"}, "outer.nothing": 1})
        lines = str(caught.value).splitlines()
        assert [line.partition(": ")[0] for line in lines] == [first, "select", "select", "select"]
    with pytest.raises(ValueError) as caught:
        make_config(SelectConfig, None, {"train.max_steps": 0})
    assert [line.split()[0] for line in str(caught.value).splitlines()] == [
        "the", "model.name_or_path", "data.train", "data.validation", "train.max_steps"
    ]  # fmt: skip


@pytest.mark.parametrize("config_class", COMMANDS)
def test_the_messages_of_every_command_name_it(config_class):
    with pytest.raises(ValueError, match=f"^{COMMANDS[config_class]}: unknown section 'nothing'; the sections: "):
        make_config(config_class, None, {"nothing": {}})


@pytest.mark.parametrize("config_class", COMMANDS)
def test_no_value_of_any_key_breaks_the_check(config_class):
    """Whatever is given for a key or a section, the answer is a config or a ValueError."""
    sections = field_types(config_class)
    base = {name: values for name, values in GIVEN.items() if name in sections and name != "train"}
    keys = [*sections, *(f"{name}.{key}" for name, section in sections.items() for key in field_types(section))]
    for key in keys:
        for value in (None, True, -1, 1e308, "x", "1e400", [[1, 2]], {"a": 1}, np.ones((2, 2)), "a" * 10_000, Odd()):
            with contextlib.suppress(ValueError):
                assert isinstance(make_config(config_class, base, {key: value}), config_class)


def test_a_long_value_is_cut():
    with pytest.raises(ValueError) as caught:
        make_config(SelectConfig, GIVEN, {"objective.reference": "a" * 10_000})
    assert len(str(caught.value)) < 600 and "aaa ... aaa" in str(caught.value)


def test_a_config_that_is_not_there_is_no_value_error():
    with pytest.raises(FileNotFoundError, match="nowhere.yaml: no such config. .*Those that come with the package"):
        make_config(SelectConfig, "nowhere.yaml", {})
    with pytest.raises(IsADirectoryError, match="a folder, and no config"):
        make_config(SelectConfig, "/", {})
