import pytest

from bilevel_jax.cli import COMMANDS
from bilevel_jax.runs.config import load
from bilevel_jax.runs.config.renamed_keys import RENAMED_KEYS, RENAMED_SECTIONS, RenamedError, new_key
from bilevel_jax.runs.config.yaml_reader import field_types, read_yaml_config

CONFIGS = [getattr(load, command.config) for command in COMMANDS.values()]
UNCHANGED = {
    "bench.seeds": "compare.seeds",
    "check.name": "verifier.name",
    "compare.seeds": "retrain.seeds",
    "devices.data": "mesh.data",
    "keep.top_share": "selection.top_share",
    "look.ids": "show.ids",
    "single.steps": "single_loop.steps",
}
"""Keys whose section alone was renamed, one for each such section."""


def keys(config_class):
    return {f"{section}.{key}" for section, kind in field_types(config_class).items() for key in field_types(kind)}


def command_of(old, new):
    """A config that has the new key and not the old one."""
    return next(config for config in CONFIGS if new in keys(config) and old not in keys(config))


def test_every_renamed_section_has_a_case():
    assert {old.partition(".")[0] for old in UNCHANGED} == set(RENAMED_SECTIONS)


@pytest.mark.parametrize("old, new", (RENAMED_KEYS | UNCHANGED).items())
def test_an_old_key_in_a_file_is_an_error_that_names_the_new_one(tmp_path, old, new):
    section, key = old.split(".")
    (tmp_path / "c.yaml").write_text(f"# a file of an earlier version\n{section}:\n  {key}: 1\n")
    with pytest.raises(ValueError) as caught:
        read_yaml_config(command_of(old, new), tmp_path / "c.yaml")
    assert f"c.yaml:3: '{old}' is now '{new}'" in str(caught.value)
    assert new_key(old) == new


@pytest.mark.parametrize("old, new", (RENAMED_KEYS | UNCHANGED).items())
@pytest.mark.parametrize("value", [("1",), ()], ids=["next", "same"])
def test_an_old_flag_is_an_error_that_names_the_new_one(old, new, value):
    flag, new_flag = f"--{old}".replace("_", "-"), f"--{new}".replace("_", "-")
    config_class = command_of(old, new)
    arguments = [flag, *value] if value else [f"{flag}=1"]
    with pytest.raises(RenamedError) as caught:
        if config_class is load.EstimateConfig:
            load.load_config_to_estimate("configs/quickstart.yaml", arguments)
        else:
            load.load_config(config_class, None, arguments)
    assert f"{flag} is now {new_flag}" in str(caught.value)


def test_values_that_changed_are_said(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {keep: best}\noptimizer: {warmup: 0.1}\ndata: {supervise: last}\n")
    with pytest.raises(ValueError) as caught:
        read_yaml_config(load.TrainConfig, tmp_path / "c.yaml")
    said = str(caught.value)
    assert "'train.keep' is now 'train.load_best' (best is now true, last is false)" in said
    assert "a fraction below 1 is now optimizer.warmup_ratio" in said and "last is last_turn" in said


def test_old_flags_are_told_together_and_off_stays_off():
    with pytest.raises(RenamedError) as caught:
        load.load_config(load.SelectConfig, None, ["--train.batch", "8", "--compare.no-enabled", "--train.max-steps=3"])
    assert str(caught.value) == (
        "--train.batch is now --train.global-batch-size; --compare.no-enabled is now --retrain.no-enabled."
    )


def test_an_empty_old_section_is_named(tmp_path):
    (tmp_path / "c.yaml").write_text("keep:\n")
    with pytest.raises(ValueError, match="c.yaml:1: section 'keep' is now 'selection'"):
        read_yaml_config(load.SelectConfig, tmp_path / "c.yaml")
