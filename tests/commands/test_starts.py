"""A run that does not get to its work: stopped while it prepares, it is resumed; with an error it leaves no folder."""

import json
import os
import signal

import pytest

from bilevel_jax.commands.train import run as train_run
from bilevel_jax.commands.train.loop import TrainingLoop
from bilevel_jax.lm.models.huggingface import atomic_folder
from bilevel_jax.runs.infra import run_dir, session
from bilevel_jax.runs.tasks import builtin, reference
from tests.commands.run_table import contents, files, start, table_inputs, without_clock  # noqa: F401

ERRORS = {
    "an option of the built-in task": ("--data.train builtin:cipher?rows=3", "no option 'rows'"),
    "a missing file": ("--data.train {made}/nothing.jsonl", "nothing.jsonl"),
    "a row that is too long": ("--data.max-length 3", "max_length"),
    "no dev": ("--data.validation --data.dev --train.load-best", "load_best"),
    "a weight too few": ("--weights.file {made}/half.jsonl", "half.jsonl"),
    "a score without validation": ("--data.validation --data.dev --weights.score alignment", "validation has none"),
    "pairs that are none": ("--objective.name dpo", "rejected one"),
    "an unknown device mesh": ("--mesh.data 999", "999"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("has_folder", [False, True])
def test_an_error_before_the_work_leaves_no_folder(table_inputs, tmp_path, name, has_folder):  # noqa: F811
    flags, words = ERRORS[name]
    out = tmp_path / "new" / "run"
    if has_folder:
        out.mkdir(parents=True)
    with pytest.raises((ValueError, OSError), match=words):
        start(table_inputs, "train", out, *flags.format(made=table_inputs).split())
    assert list(tmp_path.rglob("*")) == ([out.parent, out] if has_folder else [])


def test_an_error_after_work_keeps_the_folder(table_inputs, tmp_path, monkeypatch):  # noqa: F811
    def fail(*given, **more):
        raise ValueError("late")

    monkeypatch.setattr(train_run.artifacts, "write_model", fail)
    with pytest.raises(ValueError, match="late"):
        start(table_inputs, "train", tmp_path / "run")
    monkeypatch.undo()
    assert start(table_inputs, "train", tmp_path / "run", "--resume").result["resumed"] == 0


def test_a_refused_resume_removes_nothing(table_inputs, tmp_path):  # noqa: F811
    start(table_inputs, "train", tmp_path / "run")
    before = files(tmp_path / "run")
    for flags in (("--resume", "--train.seed", "5"), ()):
        with pytest.raises((ValueError, FileExistsError)):
            start(table_inputs, "train", tmp_path / "run", *flags)
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name, place",
    [
        ("train, dpo", (reference, "evaluate_per_example")),
        pytest.param(
            "select, the built-in task", (builtin, "pretrain_builtin_model"), marks=pytest.mark.slow
        ),  # 300 steps of training, three times
    ],
)
def test_a_start_that_is_stopped_is_resumed(table_inputs, tmp_path, monkeypatch, name, place, number):  # noqa: F811
    """While the reference of DPO, or the model of a built-in task, is made."""
    with without_clock():
        start(table_inputs, name, tmp_path / "run")
        whole = contents(tmp_path / "run")
        os.rename(tmp_path / "run", tmp_path / "whole")
        monkeypatch.setattr(*place, lambda *given, **more: signal.raise_signal(number))
        with pytest.raises(session.Interrupted, match="--resume"):
            start(table_inputs, name, tmp_path / "run")
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        start(table_inputs, name, tmp_path / "run", "--resume")
    assert contents(tmp_path / "run") == whole


def test_a_signal_that_a_library_passes_over_stops_the_run_before_its_first_step(
    table_inputs,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    load_splits = train_run.splits.load_splits

    def passed_over(*given):
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            return load_splits(*given)

    monkeypatch.setattr(train_run.splits, "load_splits", passed_over)
    monkeypatch.setattr(TrainingLoop, "run", lambda self: pytest.fail("it trains"))
    with pytest.raises(session.Interrupted):
        start(table_inputs, "train", tmp_path / "run")


def test_what_a_kill_of_the_first_file_leaves_can_be_started(table_inputs, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    out.mkdir()
    (out / ".lock").write_text("process 1 on there\n")
    (out / ".config.yaml.123.part").write_text("model: {")
    start(table_inputs, "train", out)
    assert not [name for name in files(out) if name.startswith(".")]


def test_leftovers_are_swept(tmp_path):
    run, hexadecimal = tmp_path / "run", "0123456789abcdef" * 2
    names = (
        ".result.json.77.part", "checkpoints/train/.step_0000000004.part/arrays/d", "checkpoints/x/.step_1.old/a",
        "checkpoints/x/step_1/a", "checkpoints/y/.step_2.old/a", f".model.{hexadecimal}/config.json",
        "model/config.json", ".hidden", "parts/inside/.lock", "parts/inside/.a.1.part", "parts/.b.1.part",
        "notes/.git/.thesis.2.part", "notes/.a.1.part", ".thesis.part", ".draft.md.old", f".note.{hexadecimal}",
        "checkpoints/.git/.b.1.part", ".step_x.part/a",
    )  # fmt: skip
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    run_dir.sweep_leftovers(run)
    kept = {str(path.relative_to(run)): path.read_text() for path in run.rglob("*") if path.is_file()}
    own = ("checkpoints/x/step_1/a", *names[6:10], *names[11:])
    assert kept == {name: name for name in own} | {"checkpoints/y/step_2/a": "checkpoints/y/.step_2.old/a"}


def test_a_folder_that_is_written_whole_removes_what_dead_processes_left(tmp_path):
    dead, other = tmp_path / f".rows.{'a' * 32}", tmp_path / f".rows-2.{'b' * 32}"
    for folder in (dead, other):
        folder.mkdir()
        (folder / "x").write_text(json.dumps(1))
    with atomic_folder(tmp_path / "rows") as alive:
        (alive / "x").write_text("1")
        with pytest.raises(KeyError), atomic_folder(tmp_path / "rows"):
            assert alive.exists() and not dead.exists() and other.exists()
            raise KeyError
    assert (tmp_path / "rows" / "x").exists() and sorted(os.listdir(tmp_path)) == [other.name, "rows"]
