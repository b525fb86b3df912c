import json
import shutil
import warnings
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bilevel_jax.runs.infra import checkpoint, run_dir, seals
from bilevel_jax.runs.infra.journal import Journal, JsonLog, read_journal
from tests.runs import damage

STATE = {"w": jnp.zeros(5), "n": 0}


def reopen(folder):
    """As a run that is resumed does."""
    run_dir.check_files(folder)
    seals.hold(folder)
    run_dir.reopen_run(folder)


def write_run(folder: Path, seed: int) -> Path:
    """A run with a file of each kind, that is not finished."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    seals.begin(folder)
    (folder / "checkpoints").mkdir()
    run_dir.write_atomic(folder / "config.yaml", f"train: {{seed: {seed}}}\n")
    run_dir.write_json(folder / "environment.json", {"packages": {"bilevel-jax": "0.2.0"}, "seed": seed})
    run_dir.write_json(folder / "inputs.json", {"data.train": {"rows.jsonl": {"bytes": 7 + seed}}})
    log = JsonLog(folder / "log.jsonl")
    for step in range(4):
        log.write({"step": step, "loss": random.random()})
    checkpoint.save_checkpoint(
        folder / "checkpoints" / "train", 2, {"w": jnp.full(5, float(seed)), "n": seed}, {"at": 2}
    )
    log.sync()
    checkpoint.save_checkpoint(
        folder / "checkpoints" / "train", 4, {"w": jnp.full(5, float(seed)), "n": seed}, {"at": 4}
    )
    answers = Journal(folder / "checkpoints" / "answers.jsonl", fsync=True)
    for number in range(3):
        answers.append({f"question {number}": [random.random()]})
    for jobs in range(3):
        run_dir.write_atomic(folder / "checkpoints" / "done.json", json.dumps({str(n): seed for n in range(jobs)}))
    run_dir.write_parquet(folder / "weights.parquet", pa.table({"id": ["a", "b"], "weight": random.random(2)}))
    (folder / "parts").mkdir()
    with run_dir.atomic_replace(folder / "parts" / "seed.npz") as place, open(place, "wb") as file:
        np.savez(file, losses=random.random(8))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"hidden_size": seed}))
    (folder / "model" / "model.safetensors").write_bytes(random.bytes(50))
    seals.note_folder(folder / "model")
    run_dir.write_json(folder / "result.json", {"loss": random.random(), "bad": float("nan")})
    log.close()
    return folder


def read_run(folder: Path) -> dict:
    """Everything in a run, by the functions that read it."""
    read = {}
    for name in damage.list_files(folder):
        path = folder / name
        if name in (seals.SEALS_FILE, seals.MANIFEST_FILE) or "step_" in name:
            continue
        if path.suffix == ".jsonl":
            read[name] = read_journal(path)
        elif path.suffix == ".json":
            read[name] = run_dir.read_json(path)
        elif path.suffix == ".parquet":
            read[name] = run_dir.read_parquet(path).to_pylist()
        elif path.suffix == ".npz":
            read[name] = {key: value.tolist() for key, value in run_dir.read_arrays(path).items()}
        else:
            read[name] = run_dir.read_bytes(path)
    return read


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(a run, another one), each not finished and finished."""
    folder = tmp_path_factory.mktemp("runs")
    stopped = [write_run(folder / f"stopped {seed}", seed) for seed in (1, 2)]
    finished = [Path(shutil.copytree(one, folder / one.name.replace("stopped", "finished"))) for one in stopped]
    for one in finished:
        seals.hold(one)
        run_dir.write_manifest(one)
    return {"stopped": stopped, "finished": finished}


def names_case(text: str, folder: Path, case: damage.Case) -> bool:
    """Whether a message names the damaged file, the other one of a swap, or the checkpoint of one of them."""
    names = [case.name, case.other or case.name]
    names += [str(parent) for name in names for parent in Path(name).parents if parent.name.startswith("step_")]
    return any(str(folder / name) in text for name in names)


def read_outcome(folder: Path, whole: dict, case: damage.Case) -> str:
    """What the readers make of a damaged run: "named", "unharmed", or what is wrong."""
    try:
        read = read_run(folder)
    except ValueError as error:
        if case.kind in ("delete", "swap") and case.name == seals.SEALS_FILE:
            return "named"  # nobody can tell whether the file or the seals are those of the run
        return "named" if names_case(str(error), folder, case) else f"wrong: {error}"
    differing = [name for name in whole if read.get(name) != whole[name]]
    if not differing:
        return "unharmed"
    if case.kind == "delete" and differing == [case.name]:
        return "made again"
    answers = read.get("checkpoints/answers.jsonl", [])
    if differing == ["checkpoints/answers.jsonl"] and answers == whole[differing[0]][: len(answers)]:
        return "made again"  # an answer that is missing is asked for again
    return f"wrong: {differing} differ"


def resume_outcome(folder: Path, case: damage.Case) -> str:
    """What `--resume` makes of a damaged run: "named", "an older checkpoint", "unharmed", or what is wrong."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            reopen(folder)
            newest = checkpoint.restore_checkpoint(folder / "checkpoints" / "train", STATE)
        except ValueError as error:
            return "named" if names_case(str(error), folder, case) else f"wrong: {error}"
    if any(names_case(str(one.message), folder, case) for one in warned):
        return "named"
    if newest is None or newest.meta["at"] != 4:
        return "wrong: an older checkpoint"
    return "unharmed"


@pytest.mark.parametrize("state", ["stopped", "finished"])
@pytest.mark.parametrize("kind", damage.KINDS)
@pytest.mark.parametrize("count", [24, pytest.param(400, marks=pytest.mark.slow)])
def test_every_damage_is_named_or_does_no_harm(runs, tmp_path, kind, state, count):
    one, other = runs[state]
    whole = read_run(one)
    found: Counter = Counter()
    for folder, case in damage.damaged_copies(kind, one, other, tmp_path / "run", count):
        read, resumed = read_outcome(folder, whole, case), resume_outcome(folder, case)
        assert not read.startswith("wrong") and not resumed.startswith("wrong"), (case, read, resumed)
        found[f"read {read}"] += 1
        found[f"resume {resumed}"] += 1
        if state == "finished":
            assert resumed == "named" or case == ("delete", seals.MANIFEST_FILE, ""), case
            assert read != "made again" or case.kind == "delete", case
        else:
            old = "step_0000000002" in case.name  # not read
            assert resumed == "named" or old or kind == "delete" or case.name.endswith(".jsonl"), case
    print(state, kind, {name: times for name, times in found.items() if isinstance(name, str)})


def test_files_that_somebody_adds_are_read_as_they_are(runs, tmp_path):
    folder = Path(shutil.copytree(runs["finished"][0], tmp_path / "run"))
    (folder / "notes.json").write_text('{"mine": 1}')
    (folder / "model" / "notes.json").write_text('{"mine": 2}')
    seals.check(folder / "model")
    assert run_dir.read_json(folder / "notes.json") == {"mine": 1}
    assert seals.check_run(folder) == [] and run_dir.restore_manifest(folder)
    run_dir.write_json(folder / "mine" / "estimate.json", 1) if (folder / "mine").mkdir() else None
    assert seals.check_run(folder) == []


def test_a_model_that_is_copied_elsewhere_is_read_as_any_other(runs, tmp_path):
    shutil.copytree(runs["finished"][0] / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    seals.check(tmp_path / "model")
    with pytest.raises(seals.DamagedFileError, match="config.json has 2 bytes, 18 were written"):
        folder = Path(shutil.copytree(runs["finished"][0], tmp_path / "run"))
        (folder / "model" / "config.json").write_text("{}")
        seals.check(folder / "model")


def test_a_manifest_that_was_deleted_is_written_again_byte_for_byte(runs, tmp_path):
    folder = Path(shutil.copytree(runs["finished"][0], tmp_path / "run"))
    (folder / seals.MANIFEST_FILE).unlink()
    assert run_dir.restore_manifest(folder)
    assert (folder / seals.MANIFEST_FILE).read_bytes() == (runs["finished"][0] / seals.MANIFEST_FILE).read_bytes()


def test_the_manifest_names_every_file_but_the_seals(runs):
    folder = runs["finished"][0]
    manifest = json.loads((folder / seals.MANIFEST_FILE).read_text())
    steps = {f"checkpoints/train/step_000000000{step}" for step in (2, 4)}
    files = {name for name in damage.list_files(folder) if not any(name.startswith(f"{step}/") for step in steps)}
    files |= {f"{step}/manifest.json" for step in steps}
    assert set(manifest["files"]) == files - {seals.SEALS_FILE, seals.MANIFEST_FILE}
    for name, written in manifest["files"].items():
        assert written == seals.describe_file(folder / name)


@pytest.mark.parametrize("kill", ["before the file has its name", "after"])
@pytest.mark.parametrize("had", [True, False])
def test_a_kill_between_the_note_and_the_file_is_no_damage(runs, tmp_path, monkeypatch, kill, had):
    folder = Path(shutil.copytree(runs["stopped"][0], tmp_path / "run"))
    path = folder / ("result.json" if had else "new.json")
    seals.hold(folder)

    def killed(*arguments):
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run_dir.os, "replace", killed)
        run_dir.write_json(path, {"new": 1})
    if kill == "after":
        path.write_text(json.dumps({"new": 1}, indent=1))
    for _ in range(2):
        reopen(folder)
        run_dir.write_json(folder / "environment.json", {"other": 1})
    assert path.exists() == (had or kill == "after")
    if path.exists():
        assert (run_dir.read_json(path) == {"new": 1}) == (kill == "after")


def test_a_kill_before_several_files_of_one_line_is_no_damage(runs, tmp_path):
    folder = Path(shutil.copytree(runs["stopped"][0], tmp_path / "run"))
    seals.hold(folder)
    for name in ("a", "b"):
        run_dir.write_json(folder / name, 1)
    seals.Ledger(folder).append(dict.fromkeys(("a", "b"), seals.Seal(5, "0" * 64)))
    reopen(folder)
    run_dir.write_json(folder / "c", 1)
    assert seals.check_run(folder) == []


@pytest.mark.parametrize(("packages", "words"), [({"bilevel-jax": "0.1.0"}, r"version \(0.1.0\)"), ({}, "version,")])
def test_a_run_of_a_version_without_seals_is_told_as_such(tmp_path, packages, words):
    (tmp_path / "environment.json").write_text(json.dumps({"packages": packages}))
    with pytest.raises(ValueError, match=f"was made by an earlier {words}.* cannot be resumed .* with --out"):
        run_dir.check_files(tmp_path)


def test_a_run_of_this_version_without_its_seals_is_damaged(tmp_path):
    (tmp_path / "environment.json").write_text(json.dumps({"packages": {"bilevel-jax": "0.2.0.dev0"}}))
    with pytest.raises(seals.DamagedFileError, match=r"seals.jsonl is missing"):
        run_dir.check_files(tmp_path)


def test_a_log_that_was_deleted_is_told(runs, tmp_path):
    folder = Path(shutil.copytree(runs["stopped"][0], tmp_path / "run"))
    (folder / "log.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"log.jsonl is missing. It begins anew"):
        reopen(folder)
    JsonLog(folder / "log.jsonl").write({"step": 9})
    reopen(folder)
    assert read_journal(folder / "log.jsonl") == [{"step": 9}]


@pytest.mark.parametrize("harm", ["changed", "deleted"])
def test_the_log_of_a_finished_run_is_not_promised_to_be_made_again(runs, tmp_path, harm):
    folder = Path(shutil.copytree(runs["finished"][0], tmp_path / "run"))
    log = folder / "log.jsonl"
    log.write_text(log.read_text() + "x\n") if harm == "changed" else log.unlink()
    with pytest.raises(seals.DamagedFileError, match="Put back a copy of it, or start a new run with --out"):
        reopen(folder)


def test_a_table_that_is_copied_elsewhere_is_read_by_its_checksums(runs, tmp_path):
    content = bytearray((runs["finished"][0] / "weights.parquet").read_bytes())
    assert pq.read_table(pa.BufferReader(bytes(content))).num_rows == 2
    content[content.index(b"a") + 1] ^= 1
    (tmp_path / "weights.parquet").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"weights.parquet: not a whole parquet file \(.*CRC"):
        run_dir.read_parquet(tmp_path / "weights.parquet")


def test_a_file_that_another_process_writes_into_a_run_that_goes_on_is_not_of_the_run(runs, tmp_path):
    folder = Path(shutil.copytree(runs["stopped"][0], tmp_path / "run"))
    seals_before = (folder / seals.SEALS_FILE).read_bytes()
    run_dir.write_json(folder / "estimate.json", {"bytes": 1})  # this process has not reopened the run
    assert (folder / seals.SEALS_FILE).read_bytes() == seals_before
    reopen(folder)
    run_dir.write_json(folder / "result.json", {"loss": 1.0})
    seals.release(folder)
    run_dir.write_json(folder / "estimate.json", {"bytes": 2})
    reopen(folder)
    assert run_dir.read_json(folder / "estimate.json") == {"bytes": 2}
