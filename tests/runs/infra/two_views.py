"""What each of two processes finds that do not see the same files: a program of its own, started by test_two_views."""

import json
import math
import sys
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
        try:
            checkpoint.restore_checkpoint(checkpoints, {"a": 1})
            found["restored"] = "whole" if number == 0 else "what it does not see"
        except ValueError as error:
            found["restored"] = "whole" if number == 1 and "need to see" in str(error) else str(error)
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


if __name__ == "__main__":  # coordinator, number, folder
    number, folder = int(sys.argv[2]), Path(sys.argv[3])
    distributed.initialize_distributed(
        DistributedSection(coordinator_address=sys.argv[1], num_processes=2, process_id=number)
    )
    (folder / "found.json").write_text(json.dumps(views(number, folder)))
