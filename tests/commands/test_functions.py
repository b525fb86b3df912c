"""The commands from Python: typed results, arrays joined by id, errors instead of exits, threads and notebooks."""

import threading
from pathlib import Path

import jax
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax import commands
from bilevel_jax.cli import main
from bilevel_jax.commands import functions
from bilevel_jax.lm.data.examples import load_examples
from tests.commands.typed_results import check_columns

BRIEF = {
    "train": {"max_steps": 4, "global_batch_size": 8},
    "outer": {"steps": 1, "learning_rate": 0.1},
    "certify": {"enabled": False},
    "retrain": {"enabled": False},
}


def in_a_thread(work):
    """What work returns, or raises, outside of the main thread."""
    outcome = []

    def run():
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


@pytest.fixture(scope="module")
def selected(made, tmp_path_factory):
    """The result of a short `select`, made in a thread as a web server or a notebook's widget would."""
    out = tmp_path_factory.mktemp("python") / "run"
    return in_a_thread(lambda: bj.commands.select(made / "select.yaml", **BRIEF, **{"output.dir": out}))


@pytest.mark.slow
def test_the_arrays_are_those_of_the_table_by_id(made, selected):
    columns = {
        "ids": "id", "sources": "source", "labels": "label", "weights": "weight", "hypergradients": "hypergradient",
        "first_hypergradients": "first_hypergradient", "alignment": "alignment", "losses": "loss",
        "selected": "selected",
    }  # fmt: skip
    again, table = check_columns(selected.folder, "weights.parquet", columns)
    assert type(again) is type(selected) is commands.SelectResult
    for name in columns:
        np.testing.assert_array_equal(getattr(selected, name), getattr(again, name))
    assert (again.config, again.verdict, again.summary) == (selected.config, selected.verdict, selected.summary)
    examples = load_examples([str(made / "train.jsonl")])
    assert selected.ids.tolist() == [example.id for example in examples]
    by_id = dict(zip(table["id"].to_pylist(), table["weight"].to_pylist(), strict=True))
    wanted = selected.ids[::-3]
    assert selected.weights[selected.rows(wanted)].tolist() == [by_id[example_id] for example_id in wanted]
    assert selected.rows(str(selected.ids[5])).tolist() == [5]
    with pytest.raises(ValueError, match="no example has the id 'no'; there are 36 ids."):
        selected.rows(["no", selected.ids[0]])
    assert selected.weights.std() > 0 and (selected.model / "config.json").is_file()
    assert isinstance(selected.verdict, bj.Verdict) and selected.summary.startswith(str(selected.verdict))
    assert selected.result["records"][-1]["step"] == 1 and selected.config.train.max_steps == 4


@pytest.mark.slow
def test_a_result_is_readable_and_frozen(selected):
    lines = repr(selected).splitlines()
    assert lines[0] == f"SelectResult({selected.folder})" and lines[1].startswith("  verdict   UNDECIDED: ")
    assert "36, weights 0." in lines[2] and "hypergradients" in lines[3] and lines[4].endswith("/report.html")
    with pytest.raises(AttributeError, match="cannot assign to field"):
        selected.weights = None
    assert selected == selected and hash(selected)  # by identity: arrays have no single truth


@pytest.mark.slow
def test_what_stands_there_is_not_overwritten_and_can_be_resumed(selected):
    with pytest.raises(FileExistsError, match="holds a run; go on with it by --resume") as caught:
        commands.select(selected.config)
    assert caught.value.__notes__ == [functions.FLAGS_IN_PYTHON]
    again = commands.select(selected.config, output={"resume": True})
    np.testing.assert_array_equal(again.weights, selected.weights)
    with pytest.raises(ValueError, match="train.max_steps: 4 in the run, 5 now"):
        commands.select(selected.config, output={"resume": True}, train={"max_steps": 5})


@pytest.mark.slow
def test_the_other_commands_take_a_result(made, selected, tmp_path, capsys):
    exported = commands.export(selected, export={"dir": tmp_path / "exported"}, selection={"top_share": 0.25})
    assert exported.repeats.sum() == 9 and exported.file.is_file() and exported.card.is_file()
    np.testing.assert_array_equal(exported.weights, selected.weights[selected.rows(exported.ids)])
    assert (exported.weights[exported.repeats > 0].min() >= exported.weights[exported.repeats == 0]).all()
    assert commands.export(selected.folder, **{"export.dir": tmp_path / "e"}, selection={"top_share": 1}).repeats.all()

    found = commands.inspect(selected.config, show={"examples": 1})
    assert "tokens of a row" in capsys.readouterr().out
    assert found.findings == () or f"{len(found.findings)} thing" in found.summary
    part = found.parts["training"]
    assert set(part.ids) == set(selected.ids) and (part.tokens >= part.targets).all() and part.targets.min() > 0
    assert "36 training" in repr(found) and all(finding in repr(found) for finding in found.findings)

    measured = commands.estimate(selected)
    assert measured.result["measured"]["passes"] == selected.result["measured"]["passes"] <= measured.training_steps
    planned = commands.estimate(selected.config, estimate={"compile": False, "measure": False})
    assert planned.training_steps == measured.training_steps and planned.peak_bytes > 0 and planned.hours is None
    assert "training steps" in repr(planned) and "training steps" in capsys.readouterr().out

    trained = commands.train(
        made / "train.yaml",
        weights={"file": selected.folder / "weights.parquet"},
        train={"max_steps": 2, "global_batch_size": 8, "eval_steps": 2},
        output={"dir": tmp_path / "trained", "progress": False},
    )
    np.testing.assert_array_equal(trained.weights, selected.weights[selected.rows(trained.ids)])
    columns = {"ids": "id", "sources": "source", "labels": "label", "weights": "weight"}
    assert check_columns(trained.folder, "weights.parquet", columns)[0].summary == trained.summary
    assert trained.result["steps"] == 2 and (trained.model / "config.json").is_file()
    assert trained.rows(trained.ids).tolist() == list(range(36))


@pytest.mark.parametrize("before", [False, True])
def test_the_config_decides_on_64_bits_and_the_caller_keeps_its_own(made, before, monkeypatch):
    seen = []

    def run(config):
        seen.append(jax.config.read("jax_enable_x64"))
        raise FloatingPointError

    monkeypatch.setattr(functions, "_import", lambda path: run)
    jax.config.update("jax_enable_x64", before)
    try:
        for dtype in ("float64", "float32"):
            with pytest.raises(FloatingPointError):
                commands.train(made / "train.yaml", **{"model.param_dtype": dtype})
        assert seen == [True, False] and jax.config.read("jax_enable_x64") is before
    finally:
        jax.config.update("jax_enable_x64", False)


def test_a_process_runs_one_command_at_a_time(made, monkeypatch):
    def run(config):
        with pytest.raises(RuntimeError, match="another command runs in this process, in another thread. Call them"):
            in_a_thread(lambda: commands.inspect(made / "select.yaml"))
        raise FloatingPointError

    monkeypatch.setattr(functions, "_import", lambda path: run)
    for _ in range(2):  # also after an error
        with pytest.raises(FloatingPointError):
            commands.train(made / "train.yaml")


@pytest.mark.slow
def test_a_stop_is_an_exception_and_the_run_goes_on(made, tmp_path, stop_at):
    flags = {"output": {"dir": tmp_path / "run"}, "train": {"max_steps": 3, "global_batch_size": 8}}
    stop_at(2)
    with pytest.raises(commands.Interrupted, match="everything is saved") as caught:
        commands.train(made / "train.yaml", **flags)
    assert caught.value.__notes__ == [functions.FLAGS_IN_PYTHON]
    with pytest.raises(FileNotFoundError, match="no result.json. Give the folder of a finished run."):
        commands.read_result(tmp_path / "run")
    stop_at(0)
    assert commands.train(made / "train.yaml", **flags, **{"output.resume": True}).result["resumed"] == 1


def test_the_builtin_task_needs_no_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = commands.inspect("configs/quickstart.yaml")
    assert len(found.parts["training"].ids) == 384 and found.findings == ()
    assert commands.estimate("configs/quickstart.yaml", estimate={"compile": False, "measure": False}).peak_bytes > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # 16 s: the model of the task is taught twice
def test_the_quickstart_gives_what_the_command_line_gives(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    brief = {"train.max_steps": 4, "optimizer.warmup_steps": 2, "outer.steps": 1}
    result = commands.select("configs/quickstart.yaml", **brief, **{"certify.enabled": False, "retrain.enabled": False})
    assert len(result.ids) == 384 and set(result.labels) == {"clean", "wrong", "noise"}
    assert result.report == Path("out/quickstart/report.html") and result.report.is_file()
    flags = [word for key, value in brief.items() for word in (f"--{key}", str(value))]
    assert main(["select", "configs/quickstart.yaml", "--fast", *flags, "--out", "out/cli"]) == 0
    assert capsys.readouterr().out == f"{result.summary}\nreport: out/cli/report.html\n"
    again = commands.read_result("out/cli")
    np.testing.assert_array_equal(again.weights, result.weights)
    np.testing.assert_array_equal(again.hypergradients, result.hypergradients)


# ---- wrong input

INPUT = {"model": {"name_or_path": "m"}, "data": {"train": ["t.jsonl"], "validation": ["v.jsonl"]}}
BAD = {
    # what is wrong: (config, sections, kinds of error)
    "nothing": (None, {}, ValueError),
    "a number": (3, {}, ValueError),
    "a list": ([], {}, ValueError),
    "an unknown section": ({"nothing": {}}, {}, ValueError),
    "an unknown keyword": (None, {"nothing": 3}, ValueError),
    "a section of numbers": (None, {"data": 3}, ValueError),
    "a text for a section": (None, {"model": "m"}, ValueError),
    "an unknown key": (None, {"data": {"trains": "t.jsonl"}}, ValueError),
    "a former key": (None, {"data": {"select": "t.jsonl"}}, ValueError),
    "a wrong type": (None, {"data": {"seed": "many"}}, ValueError),
    "out of bounds": (None, {"data": {"max_length": -1}}, ValueError),
    "examples for files": (None, {"data": {"train": [{"prompt": "a"}]}}, ValueError),
    "help": ("--help", {}, OSError),
    "a flag": (["--train.max-steps", "3"], {}, ValueError),
    "no such config": ("nowhere.yaml", {}, OSError),
    "an empty name": ("", {}, (OSError, ValueError)),
    "a null character": ("a\0b", {}, (OSError, ValueError)),
    "a folder": (Path("."), {}, (OSError, ValueError)),
    "no such model": (INPUT, {}, (OSError, ValueError)),
}


@pytest.mark.parametrize("name", commands.COMMAND_NAMES)
def test_wrong_input_is_an_error_and_no_exit(name, tmp_path, monkeypatch, capsys):
    """Whatever is given, nothing is written and nothing is printed; `pytest.raises` would let SystemExit through."""
    monkeypatch.chdir(tmp_path)
    for what, (config, sections, kinds) in BAD.items():
        with pytest.raises(kinds) as caught:
            getattr(commands, name)(config, **sections)
        text = str(caught.value)
        assert text and "Traceback" not in text and text.endswith("."), what
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "sections, kind, said",
    [
        ({"data.train": "no.jsonl"}, FileNotFoundError, "no.jsonl"),
        ({"data.train": "."}, ValueError, "."),
        ({"model.name_or_path": "nowhere"}, OSError, "nowhere"),
        ({"data.prompt_field": "question"}, ValueError, "question"),
        ({"data.label_field": "labels"}, ValueError, "labels"),
        ({"output.dir": "here.yaml"}, NotADirectoryError, "here.yaml is a file; choose another folder"),
        ({"output.dir": "/proc/no"}, OSError, "/proc/no"),
        ({"output.resume": True, "output.dir": "never"}, FileNotFoundError, "never holds no run"),
        ({"data.max_length": 2}, ValueError, "11 tokens, and max_length is 2"),
        ({"mesh.fsdp": 3}, ValueError, "8 examples do not spread evenly over 3 devices"),
    ],
    ids=str,
)
def test_wrong_files_are_named_and_leave_no_folder(made, sections, kind, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.yaml").write_text("")
    with pytest.raises(kind) as caught:
        commands.select(made / "select.yaml", **sections)
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "here.yaml"]


@pytest.mark.slow
def test_folders_that_hold_no_result_are_named(selected, tmp_path):
    for folder, kind, said in (
        (tmp_path, FileNotFoundError, "no config.yaml. Give the folder of a finished run."),
        (tmp_path / "no", FileNotFoundError, "no config.yaml"),
    ):
        with pytest.raises(kind, match=said):
            commands.read_result(folder)
    (tmp_path / "config.yaml").write_text("bench: {}\n")
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="has the sections of no command of this version."):
        commands.read_result(tmp_path)
    (tmp_path / "config.yaml").write_text((selected.folder / "config.yaml").read_text())
    (tmp_path / "weights.parquet").write_bytes((selected.folder / "weights.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"its files are those of another version or command \(KeyError: 'verdict'\)."):
        commands.read_result(tmp_path)
    with pytest.raises(ValueError, match="holds no run: config.yaml is missing"):
        commands.export(tmp_path.parent)
    with pytest.raises(ValueError, match="is a finished run, which has no estimate.devices to change."):
        commands.estimate(selected, **{"estimate.devices": 2})
    with pytest.raises(ValueError, match="estimate.devices = 99, and this process has 8: .* a process of its own"):
        commands.estimate(selected.config, **{"estimate.devices": 99})
