import dataclasses
import math
import re
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import optax
import pytest

from bilevel_jax.lm.data.examples import DataOptions
from bilevel_jax.lm.data.formats import READ_FORMATS
from bilevel_jax.runs.config.flags import parse_flags
from bilevel_jax.runs.config.load import (
    COMMANDS,
    RESUME_EXEMPT_KEYS,
    AuditConfig,
    CompareConfig,
    EvaluateConfig,
    InspectConfig,
    RankConfig,
    RefineConfig,
    SelectConfig,
    TrainConfig,
    check_config,
    config_hash,
    config_to_yaml,
    diff_configs,
    find_config,
    load_config,
    print_config_help,
)
from bilevel_jax.runs.config.renamed_keys import FlagError
from bilevel_jax.runs.config.rules import flatten_config
from bilevel_jax.runs.config.schema import ExampleFormat
from bilevel_jax.runs.config.yaml_reader import field_types, read_yaml_config
from bilevel_jax.runs.tasks.optimizers import (
    DECAY_SHAPES,
    UPDATE_RULES,
    build_optimizer,
    clip_global_norm,
    learning_rate_schedule,
)

SMALL = """
model: {name_or_path: builtin:cipher}
lora: {r: 1e1}
data: {train: a.jsonl, validation: [v.jsonl]}
optimizer:
  learning_rate: 1e-5
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def broken(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_yaml_config(SelectConfig, path)
    return str(caught.value).replace(f"{path}", "c.yaml")


def test_values_are_decoded_by_their_fields_type(small):
    config = load_config(SelectConfig, small)
    assert config.optimizer.learning_rate == 1e-5  # YAML 1.1 reads 1e-5 as text
    assert config.lora.r == 10 and isinstance(config.lora.r, int)
    assert config.data.train == ("a.jsonl",) and config.data.validation == ("v.jsonl",)
    assert config.outer == SelectConfig().outer


def test_the_command_line_wins(small):
    flags = ["--optimizer.learning-rate", "2e-4", "--data.train", "x", "y", "--fast", "--out=there", "--resume"]
    config = load_config(SelectConfig, small, flags)
    assert config.optimizer.learning_rate == 2e-4
    assert config.data.train == ("x", "y")
    assert not config.retrain.enabled and not config.certify.enabled
    assert config.output.dir == "there" and config.output.resume


def test_defaults_need_only_a_model_and_data():
    config = load_config(
        SelectConfig, None, ["--model.name-or-path", "m", "--data.train", "t", "--data.validation", "v"]
    )
    assert config.train == SelectConfig().train


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "modle: {path: x}",
            "c.yaml:1: unknown section 'modle'; did you mean 'model'? the sections: model, lora, data,",
        ),
        (
            "optimizer:\n  learning_rat: 1",
            "c.yaml:2: unknown key 'optimizer.learning_rat'; did you mean 'learning_rate'? the keys of optimizer:",
        ),
        ("output: {learning_rate: 3}", "did you mean 'optimizer.learning_rate'?"),
        ("train: {max_steps: 1.5}", "c.yaml:1: train.max_steps is 1.5 (float); wanted a whole number."),
        ("train: {max_steps: many}", "train.max_steps is 'many' (str); wanted a whole number."),
        ("train: {max_steps: true}", "train.max_steps is True (bool); wanted a whole number."),
        ("train: {max_steps:}", "train.max_steps is empty; wanted a whole number."),
        ("outer: {proximal: .nan}", "outer.proximal is nan (float); wanted a number."),
        ("outer: {method: exact}", "wanted one of unrolled, implicit, window, alignment, penalty, bmo, mixing."),
        ("outer: {reshuffle: 'yes'}", "outer.reshuffle is 'yes' (str); wanted true or false."),
        ("data: {template: 3}", "data.template is 3 (int); wanted text (quote"),
        ("data: {split: [1, 2]}", "wanted a list of 3."),
        ("train: 3", "c.yaml:1: train is 3 (int); wanted its keys: max_steps, global_batch_size,"),
        (
            "train:\n  max_steps: 3\n  max_steps: 4",
            "c.yaml:3: 'train.max_steps' stands twice; the first is at c.yaml:2.",
        ),
        ("3", "c.yaml: holds 3 (int); wanted sections: model,"),
        ("true: 1", "unknown section 'True'"),
        ("train: [", "c.yaml:1: not YAML: while parsing a flow node"),
    ],
)
def test_trouble_in_the_file_is_named(tmp_path, text, said):
    assert said in broken(tmp_path, text)


def test_all_trouble_is_told_at_once(tmp_path):
    text = broken(tmp_path, "modle: {}\ntrain: {step: 1, global_batch_size: x}\n")
    assert len(text.splitlines()) == 3


def test_an_empty_file_is_the_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert read_yaml_config(SelectConfig, tmp_path / "c.yaml") == SelectConfig()
    (tmp_path / "c.yaml").write_text("train:\n")
    assert read_yaml_config(SelectConfig, tmp_path / "c.yaml") == SelectConfig()


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            ["--train.gradient-accumulation-steps", "3"],
            "train.gradient_accumulation_steps = 3: must be 1 or more and divide train.global_batch_size",
        ),
        (
            ["--outer.method", "implicit"],
            "outer.proximal = 0.0: must be 0 or more; the implicit method needs it above 0",
        ),
        (["--optimizer.name", "lion"], "optimizer.name = 'lion': lion steps along a sign, whose derivative is 0"),
        (["--outer.max-step", "inf"], "outer.max_step = inf: must be finite"),
        (["--optimizer.learning-rate", "nan"], "--optimizer.learning-rate is 'nan'; wanted a number"),
        (["--data.split", "0.5", "0.5", "0.5"], "data.split = (0.5, 0.5, 0.5): three shares"),
        (["--lora.r", "0", "--model.base-dtype", "bfloat16"], "only a frozen base can be stored in bfloat16"),
        (["--optimizer.warmup-steps", "9", "--train.max-steps", "9"], "must be below train.max_steps"),
        (["--optimizer.warmup-ratio", "1"], "optimizer.warmup_ratio = 1.0: must be in [0, 1)"),
        (["--optimizer.warmup-steps", "-1", "--optimizer.warmup-ratio", "0.1"], "optimizer.warmup_steps = -1"),
        (
            ["--selection.threshold", "1", "--selection.resample", "5"],
            "selection: threshold, resample and per_source are three ways",
        ),
        (
            ["--rater.features", "length", "embedding"],
            "rater.embedding_file = '': embedding and embedding_likeness of rater.features read it",
        ),
        (["--rater.embedding-file", "e.parquet"], "name one of them and the file, or neither"),
        (
            ["--selection.max-repeats", "4"],
            "selection.max_repeats = 4: it caps how often selection.resample takes one example, and that is 0",
        ),
        (
            ["--selection.strata", "length", "--selection.per-source", "5"],
            "selection.strata = 'length': strata divide selection.top_share: leave threshold, resample and per_source",
        ),
        (
            ["--selection.num-strata", "4"],
            "selection.num_strata = 4: it is the number of strata of selection.strata, and that is empty: set strata, "
            "or leave num_strata at 5",
        ),
        (["--certify.retrains", "3"], "must be 0 (not measured), or 8 or more"),
    ],
)
def test_rules(small, flags, said):
    with pytest.raises(ValueError) as caught:
        load_config(SelectConfig, small, flags)
    assert said in str(caught.value)


def test_rules_hold_for_lion_where_its_derivative_is_not_used(small):
    flags = ["--optimizer.name", "lion", "--outer.method", "alignment"]
    assert load_config(SelectConfig, small, flags).optimizer.name == "lion"


def test_broken_rules_are_told_together():
    with pytest.raises(ValueError) as caught:
        check_config(SelectConfig(), "here")
    assert [line.split()[0] for line in str(caught.value).splitlines()[1:]] == [
        "model.name_or_path",
        "data.train",
        "data.validation",
    ]


def test_a_wrong_flag_names_the_nearest(small):
    with pytest.raises(FlagError, match="learning-rat: no such flag; did you mean '--optimizer.learning-rate'"):
        load_config(SelectConfig, small, ["--optimizer.learning-rat", "3"])


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--train.steps-max", "3"], "--train.steps-max: no such flag; .*`bilevel-jax select --help-all` lists all."),
        (["--learning-rate", "3"], "--learning-rate: no such flag; did you mean '--optimizer.learning-rate'"),
        (["--weights.file", "w"], "--weights.file is a flag of train and export, not of bilevel-jax select."),
        (["-x", "3"], "-x: no such flag"),
        (["more.yaml"], "'more.yaml' stands behind no flag"),
        (["--train.max-steps"], "--train.max-steps has no value; a whole number is wanted"),
        (["--train.max-steps", "--out", "x"], "--train.max-steps has no value"),
        (["--train.max-steps", "many"], "--train.max-steps is 'many'; wanted a whole number"),
        (["--train.max-steps", "1.5"], "--train.max-steps is '1.5'; wanted a whole number"),
        (["--train.max-steps", "9" * 30], "wanted a whole number below 2.63"),
        (["--train.max-steps", "3", "4"], "--train.max-steps takes one value, and 2 stand behind it: '3 4'"),
        (["--train.max-steps="], "--train.max-steps is ''; wanted a whole number"),
        (["--optimizer.learning-rate", "fast"], "--optimizer.learning-rate is 'fast'; wanted a number"),
        (["--optimizer.name", "adamv"], r"--optimizer.name is 'adamv'; wanted one of sgd, .*did you mean 'adam'"),
        (["--outer.weighting"], "--outer.weighting has no value; one of softmax, sigmoid"),
        (["--output.resume", "yes"], "--output.resume takes no value, and 'yes' .* Its opposite is --output.no-resume"),
        (["--output.no-resume=1"], "--output.no-resume takes no value"),
        (["--output.resume=maybe"], "--output.resume is 'maybe'; wanted true or false"),
        (["--data.split", "1", "0"], "--data.split is '1 0'; wanted a list of 3"),
        (["--data.train", "a", "--data.train", "b"], "--data.train stands twice; give all of its values behind one"),
        (["--retrain.variants", "uniform", "unifrm"], "--retrain.variants is 'uniform unifrm'; wanted one of uniform"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(small, flags, text):
    with pytest.raises(FlagError, match=text) as caught:
        load_config(SelectConfig, small, flags)
    assert "\n" not in str(caught.value)


def test_flags_of_every_type(small):
    flags = [
        "--train.max_steps", "1e1", "--outer.steps=3", "--outer.steps", "2", "--optimizer.learning-rate", "-3e-4",
        "--output.no-progress", "--certify.enabled=false", "--data.train", "a.jsonl", "b c.jsonl", "--data.dev",
        "--data.split", ".5", "0.25", "0.25", "--data.template=--odd x", "--retrain.variants", "uniform", "learned",
    ]  # fmt: skip
    config = parse_flags(load_config(SelectConfig, small), flags, "bilevel-jax select")
    assert (config.train.max_steps, config.outer.steps, config.optimizer.learning_rate) == (10, 2, -3e-4)
    assert not config.output.progress and not config.certify.enabled and config.data.dev == ()
    assert config.data.train == ("a.jsonl", "b c.jsonl") and config.data.split == (0.5, 0.25, 0.25)
    assert config.data.template == "--odd x" and config.retrain.variants == ("uniform", "learned")


def test_help_says_what_every_key_means(small, capsys):
    print_config_help(SelectConfig, small, show_all=True)
    text = capsys.readouterr().out
    for section, kind in field_types(SelectConfig).items():
        for key in field_types(kind):
            flag = f"--{section}.{key}".replace("_", "-")
            start = text.index(flag)  # the flag's own line, then what it means, then its default
            about = " ".join(text[start : text.index("(default:", start)].replace("│", "").split()[2:])
            assert len(about) > 10, f"{flag} has no comment"


def test_resolved_reads_back_equal(small, tmp_path):
    config = load_config(SelectConfig, small, ["--data.template", "é: {prompt}\n", "--output.dir", "1e5"])
    (tmp_path / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config(SelectConfig, tmp_path / "config.yaml") == config


def test_hash_and_differences_see_what_changes_the_numbers(small):
    config = load_config(SelectConfig, small)
    other = load_config(SelectConfig, small, ["--train.max-steps", "7", "--optimizer.warmup-steps", "2"])
    assert config_hash(config) != config_hash(other)
    assert diff_configs(config, other) == [
        "optimizer.warmup_steps: 10 in the run, 2 now",
        "train.max_steps: 300 in the run, 7 now",
    ]
    moved = load_config(SelectConfig, small, ["--out", "b", "--resume", "--output.no-progress", "--mesh.data", "2"])
    assert config_hash(config) == config_hash(moved) and diff_configs(config, moved) == []


def test_what_may_differ_exists():
    known = {
        f"{section}.{key}"
        for config_class in (SelectConfig, EvaluateConfig, RankConfig)
        for section, kind in field_types(config_class).items()
        for key in field_types(kind)
    }
    assert set(RESUME_EXEMPT_KEYS) <= known


def test_a_config_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere.yaml: no such config"):
        find_config("nowhere.yaml")


@pytest.mark.parametrize("name", UPDATE_RULES)
def test_optimizers_go_downhill(name):
    config = field_types(SelectConfig)["optimizer"](
        name=name, learning_rate=0.1, warmup_steps=0, max_grad_norm=1.0, weight_decay=1e-3
    )
    tx = build_optimizer(config, num_steps=60)
    params = jnp.array([2.0, -1.0])

    @jax.jit
    def step(params, state):
        updates, state = tx.update(2 * params, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(60):
        params, state = step(params, state)
    assert jnp.linalg.norm(params) < 0.3  # from 2.2


def test_adamw_is_that_of_optax(x64):
    config = SelectConfig().optimizer
    ours = build_optimizer(config, num_steps=300)
    theirs = optax.adamw(
        learning_rate_schedule(config, 300), eps_root=config.eps_root, weight_decay=config.weight_decay
    )
    params = jnp.array([1.0, 2.0])
    a, b = ours.init(params), theirs.init(params)
    for grad in ([0.3, -2.0], [0.0, 1.0]):
        (u, a), (v, b) = ours.update(jnp.array(grad), a, params), theirs.update(jnp.array(grad), b, params)
        assert jnp.allclose(u, v, rtol=1e-12)  # the same formula in another order


@pytest.mark.parametrize("name", DECAY_SHAPES)
def test_schedules(name):
    config = field_types(SelectConfig)["optimizer"](schedule=name, warmup_steps=10, learning_rate=2.0)
    rates = jnp.array([learning_rate_schedule(config, 100)(step) for step in range(101)])
    assert rates[0] == pytest.approx(2 / 11) and float(rates.max()) == pytest.approx(2.0) and rates[10] == 2.0
    assert rates[100] == pytest.approx(2.0 if name == "constant" else 0.0, abs=1e-6)


def test_clip_is_that_of_optax_with_a_derivative_at_zero():
    grad = {"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}
    for greatest in (1.0, 10.0):
        ours, theirs = clip_global_norm(greatest), optax.clip_by_global_norm(greatest)
        a, b = ours.update(grad, ours.init(grad))[0], theirs.update(grad, theirs.init(grad))[0]
        assert jnp.allclose(a["a"], b["a"])
    slope = jax.grad(lambda g: clip_global_norm(1.0).update(g, optax.EmptyState())[0].sum())(jnp.zeros(2))
    assert jnp.array_equal(slope, jnp.ones(2))
    assert not math.isnan(float(slope[0]))


CONFIG_FILES = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def config_class_of(path):
    classes = {"train": TrainConfig, "compare": CompareConfig, "audit": AuditConfig, "rank": RankConfig}
    return (classes | {"refine": RefineConfig, "evaluate": EvaluateConfig}).get(path.stem.split("_")[0], SelectConfig)


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.name)
def test_the_configs_that_come_with_the_package_are_right(path):
    config = load_config(config_class_of(path), path)
    if isinstance(config, EvaluateConfig):
        assert config.data.test
        return
    assert config.data.train
    if config.model.name_or_path:  # arrays have no language model
        assert load_config(InspectConfig, path).data.train == config.data.train  # its other sections are passed over


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.name)
def test_the_flags_in_the_header_of_a_config_are_keys(path):
    header = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    known = {key.replace("_", "-") for key, _ in flatten_config(config_class_of(path)())}
    assert set(re.findall(r"--([a-z_]+\.[a-z0-9_-]+)", header)) <= known
    assert f"bilevel-jax {COMMANDS[config_class_of(path)]} " in header


def test_the_formats_of_the_config_are_those_that_are_read():
    assert get_args(ExampleFormat) == ("auto", *READ_FORMATS)
    assert {field.name for field in dataclasses.fields(DataOptions)} <= set(
        field_types(field_types(SelectConfig)["data"])
    )
