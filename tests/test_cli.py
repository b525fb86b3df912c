"""The command line: its table of commands, help, short flags, shipped configs and exit codes."""

import dataclasses
import importlib
import inspect
import re
from importlib.metadata import version

import pytest

from bilevel_jax import cli
from bilevel_jax.cli import COMMANDS, main
from bilevel_jax.runs.config import load
from bilevel_jax.runs.config.flags import COMMON_KEYS, SHORT_FLAGS, parse_flags
from bilevel_jax.runs.config.rules import flatten_config
from bilevel_jax.runs.infra.session import Interrupted


def flags_of(config_class):
    return {f"--{key}".replace("_", "-") for key, _ in flatten_config(config_class())}


def flags_in(text):
    return set(re.findall(r"^\W*(--[a-z0-9-]+\.[a-z0-9-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_names_what_exists(name):
    command = COMMANDS[name]
    assert dataclasses.is_dataclass(getattr(load, command.config))
    for path in (command.function, command.summary):
        module, _, attribute = path.partition(":")
        if attribute:
            assert callable(getattr(importlib.import_module(module), attribute))
    function = getattr(importlib.import_module(command.function.partition(":")[0]), name)
    assert next(iter(inspect.signature(function).parameters)) == "config"
    assert name == "estimate" or load.COMMANDS[getattr(load, command.config)] == name


def test_usage_names_every_command_and_the_exit_codes(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name:<10}{command.help}\n" in text for name, command in COMMANDS.items())
    assert "Exit codes: 0 success, 1 an error" in text and "--help-all" in text and "--tyro-print-completion" in text
    assert main([]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_keys_that_most_runs_set_and_help_all_the_rest(name, capsys):
    config_class = getattr(load, COMMANDS[name].config)
    assert main([name, "--help"]) == 0
    short = capsys.readouterr().out
    common = {f"--{section}.{key}".replace("_", "-") for section, keys in COMMON_KEYS.items() for key in keys}
    assert flags_in(short) == common & flags_of(config_class) and 1 < len(flags_in(short)) <= 30
    assert "--help-all shows all" in short and "Exit codes" in short and config_class.__doc__.split("\n")[0] in short
    assert main([name, "CONFIG", "--help-all"]) == 0
    assert flags_in(capsys.readouterr().out) == flags_of(config_class)


def test_common_keys_and_short_flags_are_keys():
    known = {key for command in COMMANDS.values() for key, _ in flatten_config(getattr(load, command.config)())}
    assert {f"{section}.{key}" for section, keys in COMMON_KEYS.items() for key in keys} <= known
    assert set(SHORT_FLAGS.values()) <= known


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bilevel-jax {version('bilevel-jax')}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_flags(shell, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--tyro-print-completion", shell])
    text = capsys.readouterr().out
    assert caught.value.code in (0, None)
    assert all(name in text for name in COMMANDS) and "outer.learning-rate" in text


def test_a_command_that_is_none_names_the_nearest(capsys):
    assert main(["selct"]) == 2
    assert "no command 'selct'; did you mean 'select'?" in capsys.readouterr().err


def test_short_flags():
    flags = ["--model", "m", "--train", "a.jsonl", "b.jsonl", "--validation=v.jsonl", "--weights", "w.parquet"]
    config = parse_flags(load.TrainConfig(), [*flags, "--out", "there", "--resume"], "prog")
    assert config.model.name_or_path == "m" and config.data.train == ("a.jsonl", "b.jsonl")
    assert config.data.validation == ("v.jsonl",) and config.weights.file == "w.parquet"
    assert config.output.dir == "there" and config.output.resume
    config = parse_flags(load.SelectConfig(), ["--fast"], "prog")
    assert not config.retrain.enabled and not config.certify.enabled
    config = parse_flags(load.AuditConfig(), ["--fast"], "prog")
    assert not config.certify.enabled
    assert parse_flags(load.ExportConfig(), ["--out", "x"], "prog").export.dir == "x"


@pytest.mark.parametrize("name", ["select", "train"])
def test_without_a_config_the_shipped_one_is_used(name, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(cli, "_call", lambda name, config: calls.append((name, config)) or "done")
    flags = ["--model", "m", "--train", "rows.jsonl", "--validation", "trusted.jsonl", "--out", "out/mine"]
    assert main([name, *flags]) == 0 and capsys.readouterr().out == "done\n"
    [(called, config)] = calls
    shipped = load.load_config(type(config), f"configs/{name}.yaml")
    assert called == name and config.train == shipped.train and config.optimizer == shipped.optimizer
    assert config.data == dataclasses.replace(shipped.data, train=("rows.jsonl",), validation=("trusted.jsonl",))
    assert config.model.name_or_path == "m" and config.output.dir == "out/mine"


def test_the_shipped_config_does_not_stand_in_for_data(capsys):
    assert main(["select"]) == 1
    said = capsys.readouterr().err
    assert "model.name_or_path = ''" in said and "data.train = ()" in said and "data.validation = ()" in said


@pytest.mark.parametrize("path", ["/typo/dir/select.yaml", "config/select.yaml", "configs/more/select.yaml"])
def test_a_mistyped_folder_is_not_the_shipped_config(path, capsys):
    assert main(["select", path, "--model", "m"]) == 1
    assert f"{path}: no such config. Those that come with the package:" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["select.yaml", "configs/select.yaml", "./select.yaml"])
def test_a_shipped_config_is_found_by_its_name_from_anywhere(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load.find_config(path).parts[-2:] == ("configs", "select.yaml")


def test_a_file_of_that_name_comes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "select.yaml").write_text("train: {max_steps: 3}\n")
    assert load.find_config("select.yaml").resolve() == tmp_path / "select.yaml"


def raised(error):
    def run(name, config):
        raise error

    return run


@pytest.mark.parametrize(
    "error, code",
    [(ValueError("no"), 1), (OSError("no"), 1), (FloatingPointError("no"), 1), (Interrupted(15), 143)],
    ids=repr,
)
def test_exit_codes(error, code, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_call", raised(error))
    assert main(["inspect", "--model", "m", "--train", "t"]) == code
    assert capsys.readouterr().err.startswith("bilevel-jax: ")


def test_a_renamed_flag_is_a_wrong_command_line(capsys):
    assert main(["select", "configs/select.yaml", "--train.batch", "8"]) == 2
    assert capsys.readouterr().err == "bilevel-jax: --train.batch is now --train.global-batch-size.\n"
    with pytest.raises(SystemExit) as caught:
        main(["select", "configs/select.yaml", "--train.bath", "8"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "name", [name for name, command in COMMANDS.items() if command.summary.partition(":")[2] == ""]
)
def test_the_result_is_summarised(name, monkeypatch):
    summary = COMMANDS[name].summary
    result = {"sentence": "so", "verdict": {"sentence": "so"}} if summary else "so"
    monkeypatch.setattr(cli, "_import", lambda path: lambda config, *more: result)
    config = getattr(load, COMMANDS[name].config)()
    expected = f"so\nreport: {config.output.dir}/report.html" if summary else "so"
    assert cli._call(name, config) == expected


def test_help_shows_the_values_of_the_config(capsys):
    assert main(["select", "configs/quickstart.yaml", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "Optimizer steps of one run. (default: 128)" in text
    assert main(["select", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "(default: 200)" in text and "Without CONFIG the defaults are those of configs/select.yaml" in text
    assert main(["select", "nowhere.yaml", "--help"]) == 1
    assert "nowhere.yaml: no such config" in capsys.readouterr().err
