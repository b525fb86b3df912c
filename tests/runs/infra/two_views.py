"""What each of two processes finds that do not see the same files: a program of its own, started by test_two_views."""

import json
import math
import shutil
import sys
import threading
from pathlib import Path

import numpy as np

from bilevel_jax.runs.config.schema import DistributedSection
from bilevel_jax.runs.infra import checkpoint, distributed, run_dir
from bilevel_jax.runs.infra.journal import Journal
from bilevel_jax.runs.infra.session import open_session

LONG = {"text": "é" * 3000, "nan": math.nan, "list": [0.1, None]}
distributed.MAX_SHARED_BYTES = 1 << 10  # so that it comes in pieces


def views(number: int, folder: Path) -> dict:
    """`folder` is this process's own: it stands for what the process sees of one that all share."""
    with open_session(folder, progress=False, save_seconds=1e9) as session:
        computed: list[str] = []

        def compute(key: str) -> dict:
            computed.append(key)
            return {"of": number}

        found = {key: session.run_once(key, lambda key=key: compute(key)) for key in ("stored", "new")}
        found["file kept"] = session.run_once("with a file", lambda: compute("with a file"), (folder / "file").exists())
        journal = Journal(folder / "journal.jsonl", fsync=True)
        found["records"] = journal.read_new()
        journal.append({"new": number})
        found["new records"] = journal.read_new()
        checkpoints = folder / "checkpoints" / "train"
        found["saved"] = checkpoint.read_checkpoint_meta(checkpoints, 3)
        found |= look_at_late_files(number, folder, checkpoints)
        path = folder / "parts" / "array.npy"
        run_dir.write_arrays(path, np.full(2, float(number)))
        return {
            **found,
            "computed": computed,
            "there": distributed.is_there(folder / "file"),
            "absent": distributed.is_there(folder / "only the second has it"),
            "long": json.dumps(distributed.share_from_first(LONG if number == 0 else object())) == json.dumps(LONG),
            "wrote": path.exists(),
        }


def look_at_late_files(number: int, folder: Path, checkpoints: Path) -> dict:
    """Reads of a checkpoint, a snapshot and a file that only the first process sees, until they come to the second."""

    def read(name: str) -> object:
        if name == "checkpoint":
            return checkpoint.restore_checkpoint(checkpoints, {"a": 1}).tree
        if name == "snapshot":
            return checkpoint.make_snapshot_store(checkpoints).get(3, {"a": 1})
        return run_dir.read_json(folder / "late.json")

    found = {}
    for name in ("checkpoint", "snapshot", "late.json"):
        run_dir.SEEN_SECONDS = 0.0
        try:
            read(name)
            found[name] = ["not seen" if number == 0 else "seen at once"]
        except FileNotFoundError as error:
            parts = ["process 1 on ", "waited 0 s", "A network disk", "Remove nothing"]
            found[name] = ["not seen" if all(part in str(error) for part in parts) else str(error)]
        run_dir.SEEN_SECONDS = 60.0
        coming = checkpoints / "step_0000000003" if name != "late.json" else folder / name
        if number == 1:
            threading.Timer(0.3, copy_from_first, [folder, coming]).start()
        found[name].append(read(name))
        if number == 1 and name == "checkpoint":
            shutil.rmtree(coming)
    return found


def copy_from_first(folder: Path, path: Path) -> None:
    """Let the second process see what the first one does."""
    source = folder.with_name("0") / path.relative_to(folder)
    if source.is_file():
        path.write_bytes(source.read_bytes())
        return
    shutil.copytree(source, path.with_name("coming"))
    path.with_name("coming").rename(path)


if __name__ == "__main__":  # coordinator, number, folder
    number, folder = int(sys.argv[2]), Path(sys.argv[3])
    distributed.initialize_distributed(
        DistributedSection(coordinator_address=sys.argv[1], num_processes=2, process_id=number)
    )
    (folder / "found.json").write_text(json.dumps(views(number, folder)))
