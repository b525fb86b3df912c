"""`score`: a rater on new rows gives what it gave on its own, chooses as weights in memory do, and tells drift."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bilevel_jax.cli import main
from bilevel_jax.commands.score import chunks, scorer
from bilevel_jax.commands.score import run as score_run
from bilevel_jax.commands.score.choose import choose_rows
from bilevel_jax.lm.data.examples import load_examples
from bilevel_jax.runs.config.load import ScoreConfig, load_config
from bilevel_jax.runs.config.schema import RaterSection, SelectionSection
from bilevel_jax.runs.engine import raters
from bilevel_jax.runs.engine.raters import CHUNK_EXAMPLES
from bilevel_jax.runs.engine.selection import describe_shortfall, describe_ties, select_examples
from bilevel_jax.runs.infra import distributed, run_dir
from bilevel_jax.runs.infra.session import Interrupted
from bilevel_jax.runs.scoring import features
from tests.commands.run_table import contents, differences, without_clock
from tests.commands.typed_results import check_columns
from tests.conftest import ROOT
from tests.runs.engine.test_agreement import free_port
from tests.runs.tiny_rater import write_rater


@pytest.fixture(scope="module")
def rater(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    return folder / "rater", write_rater(made, folder)


def score(made, rater_folder, out, *flags, data=None):
    words = ["--rater", str(rater_folder), "--data", str(data or made / "train.jsonl"), "--model", str(made / "model"),
             "--output.no-progress", *flags, "--out", str(out)]  # fmt: skip
    return score_run.score(load_config(ScoreConfig, None, words))


def test_the_rater_says_of_its_own_examples_what_it_said_in_training(made, rater, tmp_path):
    folder, logits = rater
    result = score(made, folder, tmp_path / "out", "--score.features", "--selection.top-share", "0.25")
    columns = {"ids": "id", "sources": "source", "logits": "logit", "weights": "weight", "selected": "selected"}
    typed, table = check_columns(tmp_path / "out", "scores.parquet", columns)
    np.testing.assert_allclose(typed.logits, logits, atol=1e-4)  # float32 losses in other batches
    np.testing.assert_allclose(typed.weights.mean(), 1, rtol=1e-6)
    assert result["drift_sentences"] == [] and typed.drifted == ()
    expected = select_examples(typed.weights, np.arange(len(logits)), SelectionSection(top_share=0.25),
                               sources=typed.sources.tolist(), seed=0)  # fmt: skip
    assert np.flatnonzero(typed.selected).tolist() == expected.tolist()
    chosen = [json.loads(line) for line in (tmp_path / "out" / "selected.jsonl").read_text().splitlines()]
    assert [row["id"] for row in chosen] == typed.ids[expected].tolist()
    assert [row["weight"] for row in chosen] == typed.weights[expected].tolist()
    assert {"feature loss", "feature length of prompt", "feature mean likeness"} <= set(table.column_names)
    assert not list((tmp_path / "out" / "checkpoints" / "score").iterdir())
    assert "No feature has drifted" in (tmp_path / "out" / "report.html").read_text()


def test_a_stopped_run_goes_on_to_the_same_bits(made, rater, tmp_path, stop_at, monkeypatch):
    monkeypatch.setattr(score_run, "CHUNK_EXAMPLES", 8)
    with without_clock():
        score(made, rater[0], tmp_path / "run")
        whole = contents(tmp_path / "run")
        (tmp_path / "run").rename(tmp_path / "whole")
        stop_at(3)
        with pytest.raises(Interrupted):
            score(made, rater[0], tmp_path / "run")
        assert len(chunks.list_chunks(tmp_path / "run")) == 3
        score(made, rater[0], tmp_path / "run", "--output.resume")
    assert contents(tmp_path / "run") == whole


FULL_AT = {
    "config.yaml": "the disk is full: .*/run holds no run yet. Free space, then start it again.",
    "chunk_00000000.parquet": "",
    "chunk_00000001.parquet": "",
    "scores.parquet": "",
    "report.html": "",
}
"""The file that meets a full disk -> what is said, if it is not that --resume goes on."""


def test_a_full_disk_keeps_what_was_written_and_resumes_to_the_same_bits(made, rater, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(score_run, "CHUNK_EXAMPLES", 12)
    words = ["score", "--rater", rater[0], "--data", made / "train.jsonl", "--model", made / "model",
             "--output.no-progress", "--out", tmp_path / "run"]  # fmt: skip
    words = list(map(str, words))
    replace = os.replace
    with without_clock():
        assert main(words) == 0
        whole = contents(tmp_path / "run")
        for name, said in FULL_AT.items():
            shutil.rmtree(tmp_path / "run")

            def replace_or_fail(source, target, name=name):
                if os.path.basename(target) == name:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                replace(source, target)

            capsys.readouterr()
            with monkeypatch.context() as full:
                full.setattr(os, "replace", replace_or_fail)
                assert main(words) == 1
            said = said or f"the disk is full: .*/{name} was not written, .* Free space, then --resume."
            assert re.fullmatch(f"bilevel-jax: {said}\n", capsys.readouterr().err)
            is_kept = (tmp_path / "run").exists()
            assert is_kept == (name != "config.yaml"), name
            assert main([*words, *(["--resume"] if is_kept else [])]) == 0
            assert contents(tmp_path / "run") == whole, name


@pytest.mark.parametrize("name", ["selected.jsonl", "checkpoints/done.json"])
def test_what_a_finished_run_has_lost_is_made_again_from_its_scores(made, rater, tmp_path, monkeypatch, name):
    monkeypatch.setattr(score_run, "CHUNK_EXAMPLES", 12)
    flags = ("--selection.resample", "40")
    with without_clock():
        score(made, rater[0], tmp_path / "run", *flags)
        whole = contents(tmp_path / "run")
        (tmp_path / "run" / name).unlink()
        monkeypatch.setattr(score_run, "score_examples", None)  # nothing is scored again
        with pytest.warns(UserWarning, match=f"{name} is missing"):
            score(made, rater[0], tmp_path / "run", *flags, "--output.resume")
    assert set(differences(contents(tmp_path / "run"), whole)) <= {"checkpoints/done.json"}  # in another order


def test_other_rows_are_told_as_drift(made, rater, tmp_path):
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
    (tmp_path / "long.jsonl").write_text(
        "".join(json.dumps({"prompt": row["prompt"], "response": row["response"] * 2}) + "\n" for row in rows)
    )
    words = ["score", "--rater", rater[0], "--data", tmp_path / "long.jsonl", "--model", made / "model"]
    assert main([*map(str, words), "--output.no-progress", "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert any("length of response" in line and "outside the range" in line for line in result["drift_sentences"])
    assert "drifted" in result["sentence"]


def test_a_row_that_is_too_long_stops_the_run_or_is_dropped(made, rater, tmp_path):
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()][:3]
    rows[1]["response"] *= 99
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="long.jsonl:2: .* set truncation to .* 'drop'"):
        score(made, rater[0], tmp_path / "stopped", data=data)
    result = score(made, rater[0], tmp_path / "out", "--data.truncation", "drop", data=data)
    assert result["counts"] == {"rows": 3, "scored": 2, "dropped": 1, "selected": 2}
    assert "too few to tell" in result["sentence"] and result["drift_sentences"] == []
    logits = pq.read_table(tmp_path / "out" / "scores.parquet")["logit"].to_pylist()
    assert logits[1] is None and None not in (logits[0], logits[2])


def test_a_column_that_hardly_varied_in_training_has_not_drifted_where_it_is_the_same(rater):
    learned = raters.read_rater(rater[0])
    raw = np.ones((1000, 2))
    raw[0], raw[:, 1] = 3, np.arange(1000)  # cut at the quantile .99, the first column is constant
    knots = np.quantile(raw, np.linspace(0, 1, features.RANK_KNOTS), axis=0).T
    recipe = learned.recipe._replace(
        columns=("rare", "varied"), low=raw.min(0), high=raw.max(0), knots=knots, indicators=np.zeros(2, bool)
    )
    assert features.find_constant_columns(recipe).tolist() == [True, False]
    none = np.zeros(2)
    moments = chunks.ColumnMoments(1000, none, none, raw.min(0), raw.max(0), none.astype(int))
    drift = score_run.describe_drift(learned._replace(recipe=recipe), moments)
    assert drift[0]["deviation"] is None and drift[0]["sentence"] == "" and "spread" in drift[1]["sentence"]


def test_a_weight_that_overflows_names_its_row_and_feature(made, rater):
    learned = raters.read_rater(rater[0])
    rows = load_examples([str(made / "train.jsonl")])[:3]
    scaled = np.zeros((3, len(learned.recipe.columns)))
    scorer.check_weights(learned, rows, scaled, np.array([0.0, 100.0, -1e9]))
    scaled[1, 0] = -4000
    with pytest.raises(ValueError, match="train.jsonl:2: .* overflows: 'length of prompt' is -4e\\+03 deviations"):
        scorer.check_weights(learned, rows, scaled, np.array([0.0, 1000.0, 2000.0]))


ERRORS = {
    "no rater": (lambda made, rater: ["--rater", str(made)], "no rater.json, so no rater"),
    "another model": (lambda made, rater: ["--model", str(rater.parent / "other")], "another model than the one"),
    "other reading": (lambda made, rater: ["--data.max-length", "9"], "data.max_length = 9, and the rater was learned"),
    "validation": (lambda made, rater: ["--data.validation", str(made / "dev.jsonl")], "reads data.train alone"),
    "columns that are not read": (lambda made, rater: ["--score.file", str(made / "dev.jsonl")], "reads no columns"),
    "no place of the model": (lambda made, rater: ["--model", ""], "lies in no run's folder"),
    "strata": (lambda made, rater: ["--selection.strata", "loss"], "score knows no loss before training"),
    "no data": (lambda made, rater: ["--data", str(made / "nothing.jsonl")], "nothing.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit_is_an_error_before_any_work(made, rater, tmp_path, name):
    flags, words = ERRORS[name]
    other = rater[0].parent / "other"
    if not other.exists():
        shutil.copytree(made / "model", other)
        content = (other / "config.json").read_text()
        (other / "config.json").write_text(content + "\n")
    given = {"--rater": str(rater[0]), "--data": str(made / "train.jsonl"), "--model": str(made / "model")}
    changed = flags(made, rater[0])
    given |= dict(zip(changed[::2], changed[1::2], strict=True))
    arguments = [word for pair in given.items() for word in pair]
    with pytest.raises((ValueError, OSError), match=words):
        score_run.score(load_config(ScoreConfig, None, [*arguments, "--out", str(tmp_path / "new" / "out")]))
    assert not (tmp_path / "new").exists()


def test_a_damaged_rater_is_refused(rater, tmp_path):
    for name, words in ((raters.ARRAYS_FILE, "rater.safetensors is damaged"), (raters.DOCUMENT_FILE, "is damaged")):
        copy = tmp_path / name
        shutil.copytree(rater[0], copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(bytes(content))
        with pytest.raises(ValueError, match=words):
            raters.read_rater(copy)


def test_the_folder_holds_the_rater(made, tmp_path):
    settings = RaterSection(features=("length", "hidden", "hidden_likeness"), link="sigmoid", directions=2)
    with pytest.raises(KeyError):  # the hidden states of validation are measured by a run alone
        write_rater(made, tmp_path, settings)
    logits = write_rater(made, tmp_path, RaterSection(features=("length", "hidden"), link="sigmoid", directions=2))
    rater = raters.read_rater(tmp_path / "rater")
    assert (
        rater.recipe.columns[-2:] == ("hidden 1", "hidden 2")
        and rater.document["coefficients"][-1]["name"] == "intercept"
    )
    assert len(rater.coefficients) == len(rater.recipe.columns) + 1
    weights = rater.weights(logits)
    np.testing.assert_allclose(weights, 2 / (1 + np.exp(-logits)))


def test_a_rater_of_embeddings_reads_those_of_new_examples(made, tmp_path, capsys):
    examples = [e for name in ("train", "validation") for e in load_examples([str(made / f"{name}.jsonl")])]
    vectors = np.random.default_rng(0).normal(size=(len(examples), 5))

    def write(name, width=5, count=None):
        table = {"id": [e.id for e in examples[:count]], "embedding": vectors[:count, :width].tolist()}
        pq.write_table(pa.table(table), tmp_path / name)
        return str(tmp_path / name)

    settings = RaterSection(
        features=("length", "embedding", "embedding_likeness"), directions=2, embedding_file=write("e.parquet")
    )
    logits = write_rater(made, tmp_path, settings)
    words = ["score", "--rater", tmp_path / "rater", "--data", made / "train.jsonl", "--model", made / "model"]
    words = [*map(str, words), "--output.no-progress"]
    assert main([*words, "--score.embedding-file", write("e.parquet"), "--out", str(tmp_path / "out")]) == 0
    np.testing.assert_allclose(pq.read_table(tmp_path / "out" / "scores.parquet")["logit"].to_numpy(), logits)
    for flags, said in (
        ((), "the rater reads embeddings of the user's own: give a file with those of the new examples"),
        (("--score.embedding-file", write("n.parquet", width=4)), "embeddings of 4 numbers, and the rater was learned"),
        (("--score.embedding-file", write("s.parquet", count=9)), "no embedding for the example"),
    ):
        capsys.readouterr()
        assert main([*words, *flags, "--out", str(tmp_path / "wrong")]) == 1
        assert said in " ".join(capsys.readouterr().err.split())


def test_a_rater_without_embeddings_reads_none(made, rater, tmp_path, capsys):
    words = ["score", "--rater", rater[0], "--data", made / "train.jsonl", "--model", made / "model"]
    flags = ["--score.embedding-file", "e.parquet", "--output.no-progress", "--out", tmp_path / "out"]
    assert main([*map(str, [*words, *flags])]) == 1
    assert "the rater reads no embeddings of a file: leave score.embedding_file empty" in capsys.readouterr().err


@pytest.mark.parametrize("values", ["normal", "ties", "special"])
def test_the_kth_largest_is_exact(values):
    rng = np.random.default_rng(0)
    table = {
        "normal": rng.normal(size=2000) * 10.0 ** rng.integers(-300, 300, 2000),
        "ties": rng.integers(-3, 4, 2000).astype(float),
        "special": np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 5e-324, -5e-324, 1.0, np.nan, -1.0]),
    }[values]
    parts = np.array_split(table, 7)
    known = np.sort(table[~np.isnan(table)])[::-1]
    for count in {1, 2, len(known) // 3, len(known)} - {0}:
        value, larger = chunks.kth_largest(lambda: iter(parts), count)
        assert value == known[count - 1] and larger == int((known > value).sum())


RULES = {
    "share": SelectionSection(top_share=0.3),
    "threshold": SelectionSection(threshold=1.2),
    "resample": SelectionSection(resample=37),
    "capped": SelectionSection(resample=150, max_repeats=2),
    "capped at all": SelectionSection(resample=999, max_repeats=3),
    "sources": SelectionSection(per_source=23),
}


def write_chunks(folder, logits, sources):
    paths = []
    for number, rows in enumerate(np.array_split(np.arange(len(logits)), 6)):
        paths.append(folder / f"{number}.parquet")
        pq.write_table(pa.table({"logit": logits[rows], "source": sources[rows]}), paths[-1])
    return paths


@pytest.mark.parametrize("spread", [1.0, 0.0], ids=["learned", "nothing learned"])
@pytest.mark.parametrize("rule", RULES)
def test_rows_are_chosen_as_from_weights_in_memory(rater, tmp_path, rule, spread):
    learned = raters.read_rater(rater[0])
    rng = np.random.default_rng(1)
    logits = np.round(spread * rng.normal(size=100), 1) + (1 - spread)  # with ties, or ties alone
    logits[::17] = np.nan
    sources = rng.choice(["a", "b", "c"], 100)
    paths = write_chunks(tmp_path, logits, sources)
    weights = np.nan_to_num(learned.weights(logits))
    known = np.flatnonzero(~np.isnan(logits))
    expected = select_examples(weights, known, RULES[rule], sources=sources, seed=3)
    choice = choose_rows(paths, learned, RULES[rule], seed=3)
    repeats = np.concatenate(list(choice.repeats()))
    assert np.repeat(np.arange(100), repeats).tolist() == expected.tolist() and choice.total == len(expected)
    notes = (
        describe_ties(weights, known, expected, RULES[rule], sources),
        describe_shortfall(RULES[rule], len(expected)),
    )
    assert choice.note == " ".join(filter(None, notes))
    assert spread or rule == "threshold" or "all 94 rows weigh the same" in choice.note


@pytest.mark.parametrize("rule", ["resample", "sources"])
def test_weights_that_underflow_leave_nothing_to_draw_by(rater, tmp_path, rule):
    learned = raters.read_rater(rater[0])
    paths = write_chunks(tmp_path, np.linspace(-2000, -1000, 100), np.repeat(["a", "b"], 50))
    with pytest.raises(ValueError, match="every weight underflows to 0, as the largest logit is -1e\\+03 .*top_share"):
        choose_rows(paths, learned, RULES[rule], seed=3)
    assert choose_rows(paths, learned, RULES["share"], seed=3).total == 30


def test_a_chunk_that_is_not_seen_is_waited_for_and_then_named(tmp_path, monkeypatch):
    """Another machine has written it; without it the table would lack its rows."""
    seen, late = tmp_path / "seen", tmp_path / "late"
    seen.touch()
    with pytest.raises(FileNotFoundError, match="late: no such file, though all 2 chunks are scored"):
        chunks.wait_for_chunks([seen, late])  # of one process, which has nobody to wait for
    monkeypatch.setattr(distributed, "is_multiprocess", lambda: True)
    threading.Timer(0.3, late.touch).start()
    chunks.wait_for_chunks([seen, late])
    monkeypatch.setattr(run_dir, "SEEN_SECONDS", 0.0)
    with pytest.raises(FileNotFoundError, match="never: process 0 on .* waited 0 s.* A network disk .*Remove nothing"):
        chunks.wait_for_chunks([seen, tmp_path / "never"])


@pytest.mark.slow
def test_two_processes_share_the_chunks_and_write_the_same(made, rater, tmp_path):
    rows = (made / "train.jsonl").read_text().splitlines()
    (tmp_path / "many.jsonl").write_text("\n".join(rows * (1 + 2 * CHUNK_EXAMPLES // len(rows))) + "\n")
    port = free_port()

    def launch(out, processes, *flags):
        command = [
            sys.executable, "-m", "bilevel_jax.cli", "score", "--rater", rater[0], "--model", made / "model", "--data",
            tmp_path / "many.jsonl", "--output.no-progress", *flags, "--out", tmp_path / out,
        ]  # fmt: skip
        settings = [
            {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number)}
            if processes > 1
            else {}
            for number in range(processes)
        ]
        return [subprocess.Popen([*map(str, command)], cwd=ROOT, env=os.environ | extra) for extra in settings]

    def ended(running):
        return [process.wait(timeout=900) for process in running]

    assert ended(launch("one", 1)) == [0] and ended(launch("two", 2)) == [0, 0]
    running = launch("killed", 2)
    while not chunks.list_chunks(tmp_path / "killed"):
        assert all(process.poll() is None for process in running)
        time.sleep(0.01)
    running[1].kill()
    assert ended(running) == [1, -signal.SIGKILL]
    assert not (tmp_path / "killed" / "scores.parquet").exists()
    assert ended(launch("killed", 2, "--output.resume")) == [0, 0]
    for name in ("scores.parquet", "selected.jsonl"):
        for out in ("two", "killed"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / out / name).read_bytes()
