"""The command line: its table of commands, help, short flags, shipped configs and exit codes."""

import dataclasses
import importlib
import inspect
import io
import re
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import rich.table

from bilevel_jax import cli
from bilevel_jax.cli import COMMANDS, main
from bilevel_jax.commands import functions
from bilevel_jax.runs.config import load
from bilevel_jax.runs.config.flags import (
    COMMON_KEYS,
    NOT_IN_COMPARE,
    NOT_IN_EVALUATE,
    NOT_IN_OWN_EVALUATION,
    NOT_IN_REFINE,
    NOT_IN_SCORE,
    NOT_IN_TUNE,
    SHORT_FLAGS,
    parse_flags,
)
from bilevel_jax.runs.config.rules import flatten_config
from bilevel_jax.runs.infra import distributed
from bilevel_jax.runs.infra.progress import make_progress_bar
from bilevel_jax.runs.infra.session import Interrupted
from bilevel_jax.runs.terminal import guard_streams, make_console


def flags_of(config_class):
    return {f"--{key}".replace("_", "-") for key, _ in flatten_config(config_class())}


def flags_in(text):
    return set(re.findall(r"^\W*(--[a-z0-9-]+\.[a-z0-9-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_names_what_exists(name):
    config_class = getattr(load, COMMANDS[name].config)
    assert dataclasses.is_dataclass(config_class)
    own = getattr(importlib.import_module(f"bilevel_jax.commands.{name}.run"), name)
    for function in (own, getattr(functions, name, own)):
        assert next(iter(inspect.signature(function).parameters)) == "config"
    assert hasattr(functions, name) or name == "watch"  # which draws in a terminal
    assert (load.COMMANDS | load.COMMANDS_WITHOUT_RUN)[config_class] == name


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
    own = dict.fromkeys(("select", "train"), NOT_IN_OWN_EVALUATION)
    own |= {"refine": NOT_IN_REFINE, "compare": NOT_IN_COMPARE, "tune": NOT_IN_TUNE}
    unused = ({"score": NOT_IN_SCORE, "evaluate": NOT_IN_EVALUATE} | own).get(name, ())
    common -= {f"--{key}".replace("_", "-") for key in unused}
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
    monkeypatch.setattr(cli, "_call", lambda function, config: calls.append(config) or "done")
    flags = ["--model", "m", "--train", "rows.jsonl", "--validation", "trusted.jsonl", "--out", "out/mine"]
    assert main([name, *flags]) == 0 and capsys.readouterr().out == "done\n"
    [config] = calls
    shipped = load.load_config(type(config), f"configs/{name}.yaml")
    assert (
        isinstance(config, getattr(load, COMMANDS[name].config))
        and config.train == shipped.train
        and config.optimizer == shipped.optimizer
    )
    assert config.data == dataclasses.replace(shipped.data, train=("rows.jsonl",), validation=("trusted.jsonl",))
    assert config.model.name_or_path == "m" and config.output.dir == "out/mine"


def test_the_shipped_config_does_not_stand_in_for_data(capsys):
    assert main(["select"]) == 1
    said = capsys.readouterr().err
    assert "model.name_or_path = ''" in said and "data.train = ()" in said and "data.validation = ()" in said


@pytest.mark.parametrize("path", ["/typo/dir/select.yaml", "config/select.yaml", "configs/more/select.yaml"])
def test_a_mistyped_folder_is_not_the_shipped_config(path, capsys):
    assert main(["select", path, "--model", "m"]) == 1
    said = capsys.readouterr().err
    assert f"{path}: no such config. " in said and "Those that come with the package: " in said


@pytest.mark.parametrize("path", ["select.yaml", "configs/select.yaml", "./select.yaml"])
def test_a_shipped_config_is_found_by_its_name_from_anywhere(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load.find_config(path).parts[-2:] == ("configs", "select.yaml")


def test_a_file_of_that_name_comes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "select.yaml").write_text("train: {max_steps: 3}\n")
    assert load.find_config("select.yaml").resolve() == tmp_path / "select.yaml"


def test_one_process_prints_the_summary(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_call", lambda function, config: "done")
    for is_first, text in ((True, "done\n"), (False, "")):
        monkeypatch.setattr(distributed, "is_first_process", lambda is_first=is_first: is_first)
        assert main(["inspect", "--model", "m", "--train", "t"]) == 0 and capsys.readouterr().out == text


def raised(error, file=cli.__file__):
    """A command that raises an error in a file: of this package, or of a library."""

    def run(name, config):
        exec(compile("raise error", file, "exec"), {"error": error})

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


@pytest.mark.parametrize("error", [KeyError("x\x1b[2J"), ValueError("bad\nshape"), AssertionError()], ids=repr)
def test_an_error_that_nobody_thought_of_is_a_sentence_with_its_traceback_in_a_file(error, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_call", raised(error, "somewhere/else.py"))
    arguments = ["inspect", "--model", "m", "--train", "t"]
    with pytest.raises(type(error)):
        main(arguments)  # in tests nothing is hidden
    monkeypatch.delenv(cli.DEBUG_VARIABLE)
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"bilevel-jax: unexpected {type(error).__name__}: ") and said.count("\n") == 1
    assert "\x1b" not in said and "please report it" in said
    traceback = Path(re.search(r"traceback is in (.*)\.$", said)[1])
    assert "somewhere/else.py" in traceback.read_text()
    traceback.unlink()


@pytest.mark.parametrize(
    "error, text, code",
    [
        (PermissionError(13, "Permission denied", "out/x\x1b[2J"), "out/x␛[2J: permission denied. Change its perm", 1),
        (FileNotFoundError(2, "No such file or directory", b"a.txt"), "a.txt: no such file or directory. Look at", 1),
        (OSError(28, "the disk is full: x was not written."), "the disk is full: x was not written.", 1),
        (OSError(28, "No space left on device"), "No space left on device. Free space, then --resume.\n", 1),
        (OSError(104, "Connection reset by peer"), "Connection reset by peer\n", 1),
        (MemoryError(), "the memory is full (of this machine). `bilevel-jax estimate", 1),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"),
            "the memory is full (RESOURCE_EXHAUSTED: Out of m",
            1,
        ),
        (KeyboardInterrupt(), "stopped at once by SIGINT", 130),
    ],
    ids=repr,
)
def test_known_errors_of_the_machine(error, text, code, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_call", raised(error, "library.py"))
    assert main(["inspect", "--model", "m", "--train", "t"]) == code
    said = capsys.readouterr().err
    assert said.startswith(f"bilevel-jax: {text}") and said.count("\n") == 1


def test_a_rate_limit_of_a_service_is_no_full_memory(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_call", raised(RuntimeError("status 429: RESOURCE_EXHAUSTED")))
    assert main(["inspect", "--model", "m", "--train", "t"]) == 1
    assert capsys.readouterr().err == "bilevel-jax: status 429: RESOURCE_EXHAUSTED\n"


def test_a_renamed_flag_is_a_wrong_command_line(capsys):
    assert main(["select", "configs/select.yaml", "--train.batch", "8"]) == 2
    assert capsys.readouterr().err == "bilevel-jax: --train.batch is now --train.global-batch-size.\n"
    assert main(["select", "configs/select.yaml", "--train.bath", "8"]) == 2
    assert capsys.readouterr().err.startswith("bilevel-jax: --train.bath: no such flag; the keys of train: max-steps, ")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("estimate", "export")])
def test_the_result_is_summarised(name, monkeypatch):
    config = getattr(load, COMMANDS[name].config)()
    has_report = "output" in vars(config)
    result = SimpleNamespace(summary="so", **({"report": "there"} if has_report else {}))
    monkeypatch.setattr(functions, "run_command", lambda config: result)
    expected = f"so\nreport: {config.output.dir}/report.html" if has_report else "so"
    assert cli._call("run_command", config) == expected


def test_help_shows_the_values_of_the_config(capsys):
    assert main(["select", "configs/quickstart.yaml", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "Optimizer steps of one run. (default: 128)" in text
    assert main(["select", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "(default: 200)" in text and "Without CONFIG the defaults are those of configs/select.yaml" in text
    assert main(["select", "nowhere.yaml", "--help"]) == 1
    assert "nowhere.yaml: no such config" in capsys.readouterr().err


HOSTILE = "a\x1b[31mred\x9b2J\x07\u202eevil\u2028next\r\x00"


def is_clean(text):
    return not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\u061c]", text)


def test_no_control_character_reaches_the_terminal(monkeypatch, capsys):
    """Whoever writes it: the result, an error, a warning, a library, a logger that outlives the command."""
    streams = []

    def run(name, config):
        print(HOSTILE)
        sys.stdout.writelines([HOSTILE, HOSTILE])
        sys.stderr.write(HOSTILE)
        streams.append(sys.stderr)
        sys.stderr.write(warnings.formatwarning(HOSTILE, UserWarning, "f.py", 1))
        return HOSTILE

    monkeypatch.setattr(cli, "_call", run)
    assert main(["inspect", "--model", "m", "--train", "t"]) == 0
    out, err = capsys.readouterr()
    assert is_clean(out) and is_clean(err) and not is_clean(HOSTILE)
    assert out.count("red") == 4 and "bilevel-jax: warning: a␛[31mred⟨U+9B⟩2J␇⟨U+202E⟩evil⟨U+2028⟩next␍␀\n" in err
    streams[0].write("later\x1b")  # to the stream of that time, and not to one that is closed
    assert warnings.formatwarning("w", UserWarning, "f.py", 1).startswith("f.py:1: UserWarning")


def test_wrong_command_lines_show_no_control_character(capsys):
    for arguments in (
        [HOSTILE],
        ["select", HOSTILE],
        ["select", f"--{HOSTILE}"],
        ["select", "--train.max-steps", HOSTILE],
    ):
        assert main(arguments) in (1, 2)
        out, err = capsys.readouterr()
        assert out == "" and is_clean(err) and err.startswith("bilevel-jax: ") and "red" in err
        assert err.count("\n") == 1


def test_help_shows_hostile_values_without_obeying_them(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text('output: {dir: "a\\e[31mred\\u202Eevil"}\n')
    assert main(["select", str(tmp_path / "c.yaml"), "--help-all"]) == 0
    out = capsys.readouterr().out
    assert is_clean(out) and "red⟨U+202E⟩" in "".join(out.split())


def test_consoles_and_bars_show_control_characters(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with guard_streams():
        with make_progress_bar(True) as bar:
            bar.add_task(f"[red]{HOSTILE}")
            bar.console.print(HOSTILE, soft_wrap=True)
            bar.refresh()
        table = rich.table.Table()
        table.add_row(HOSTILE)
        make_console(stderr=True).print(table)
    text = stream.getvalue()
    own = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]|\r", "", text)  # styles and cursor moves of the bar
    assert is_clean(own) and "red⟨U+9B⟩2J" in own and "[red]" in own and "\x1b[31mred" not in text
