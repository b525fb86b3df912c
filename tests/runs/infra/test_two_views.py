"""Two processes that see different files decide by what the first one sees."""

import json
import os
import subprocess
import sys

import pyarrow as pa

from bilevel_jax.runs.infra import checkpoint, run_dir, seals
from bilevel_jax.runs.infra.journal import Journal
from tests.conftest import ROOT
from tests.runs.engine.test_agreement import free_port


def test_the_first_decides_and_its_values_are_those_of_all(tmp_path):
    """A finished job, a file, a record and a checkpoint that one of the two does not see (yet).

    What the first one wrote and all read is waited for: then the other one sees it, or says for what it waited.
    """
    folders = [tmp_path / str(number) for number in range(2)]
    for folder in folders:
        (folder / "checkpoints").mkdir(parents=True)
    job = {"value": {"of": "an earlier run"}, "work": 3.0, "seconds": 1.0}
    jobs = seals.format_json({"stored": job, "with a file": job})
    run_dir.write_atomic(folders[0] / "checkpoints" / "done.json", jobs)
    (folders[0] / "file").touch()
    run_dir.write_json(folders[0] / "late.json", {"late": 1})
    for folder, columns in zip(folders, ({"id": ["a"], "loss": [1.0]}, {"id": ["a"]}), strict=True):
        run_dir.write_parquet(folder / "scores.parquet", pa.table(columns))
    for folder, count in zip(folders, (2, 1), strict=True):
        journal = Journal(folder / "journal.jsonl", fsync=True)
        for record in range(count):
            journal.append({"old": record})
    checkpoint.save_checkpoint(folders[0] / "checkpoints" / "train", 3, {"a": 1}, {"losses": 2})
    (folders[1] / "only the second has it").touch()
    port, flags = free_port(), os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.runs.infra.two_views", f"127.0.0.1:{port}", str(number), str(folder)],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": flags},
        )
        for number, folder in enumerate(folders)
    ]
    try:
        assert [process.wait(timeout=120) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()  # where one failed, the other would wait for it
    first, second = (json.loads((folder / "found.json").read_text()) for folder in folders)
    assert (first.pop("wrote"), second.pop("wrote")) == (True, False)  # one writer
    assert (
        first
        == second
        == {
            "stored": {"of": "an earlier run"},
            "new": {"of": 0},
            "file kept": {"of": "an earlier run"},
            "computed": ["new"],
            "there": True,
            "absent": False,
            "records": [{"old": 0}, {"old": 1}],
            "new records": [{"new": 0}],
            "saved": {"losses": 2},
            "checkpoint": ["not seen", {"a": 1}],
            "snapshot": ["not seen", {"a": 1}],
            "late.json": ["not seen", {"late": 1}],
            "scores.parquet": ["not seen", ["id", "loss"]],
            "long": True,
            "cg": 3,
            "negative curvature": 1,
            "batches": 4,
        }
    )
