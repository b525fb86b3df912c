"""What two processes find that see other files and numbers than each other: a program, started by test_two_views."""

import json
import math
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from bilevel_jax.core.types import LinearSolver, SolveResult
from bilevel_jax.runs.config.schema import DistributedSection
from bilevel_jax.runs.engine.trainer import check_finite
from bilevel_jax.runs.infra import checkpoint, distributed, run_dir
from bilevel_jax.runs.infra.journal import Journal
from bilevel_jax.runs.infra.session import open_session
from bilevel_jax.runs.scoring.scores import read_scores_table

TASK: Any = SimpleNamespace(examples=[SimpleNamespace(id="a")], trainable_indices=lambda: [0])
"""The part of a task that a table of scores is read by."""
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
            **decide_by_numbers(number),
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
        if name == "scores.parquet":
            return read_scores_table(folder, TASK).column_names
        return run_dir.read_json(folder / "late.json")

    found = {}
    for name in ("checkpoint", "snapshot", "late.json", "scores.parquet"):
        run_dir.SEEN_SECONDS = 0.0
        try:
            read(name)
            found[name] = ["not seen" if number == 0 else "seen at once"]
        except FileNotFoundError as error:
            parts = ["process 1 on ", "waited 0 s", "A network disk", "Remove nothing"]
            found[name] = ["not seen" if all(part in str(error) for part in parts) else str(error)]
        run_dir.SEEN_SECONDS = 60.0
        coming = folder / name if "." in name else checkpoints / "step_0000000003"
        if number == 1:
            threading.Timer(0.3, copy_from_first, [folder, coming]).start()
        found[name].append(read(name))
        if number == 1 and name == "checkpoint":
            shutil.rmtree(coming)
    return found


def decide_by_numbers(number: int) -> dict:
    """What host loops decide whose numbers the second process has otherwise: by its own it would stop elsewhere."""

    def differ(first: object, second: object) -> jax.Array:
        """An array with a copy in each process, whose copies are not alike."""
        mesh = jax.sharding.Mesh(jax.devices(), ("processes",))
        copy = jnp.asarray(second if number else first, jnp.float32)
        return jax.make_array_from_single_device_arrays(
            copy.shape, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), [copy]
        )

    fetch, multiply = distributed.fetch_from_first, jax.jit(jnp.multiply)

    def count_products(first: object, second: object) -> int:
        diagonal, ones = differ(first, second), differ(np.ones(3), np.ones(3))
        return bj.solvers.cg(tolerance=1e-5, fetch=fetch)(lambda v: multiply(diagonal, v), ones).steps

    # the solution turns with each doubling of the batches in the first process, and never in the second
    turns = iter([differ(first, [1.0, 0.0]) for first in ([1.0, 0.0], [0.0, 1.0], [1.0, 0.0])])
    solver = LinearSolver(lambda *_: SolveResult(next(turns), 0.0, 1.0, 1), lambda *_: None)
    problem = bj.weighted(lambda params, frozen, batch: 0.5 * ((params - batch["data"]) ** 2).sum(-1))
    batch = {
        "data": np.ones((1, 4, 1), np.float32),
        "index": np.arange(4, dtype=np.int32)[None],
        "num_examples": np.full(1, 4.0, np.float32),
    }
    stream, params, weights = bj.Stream(lambda step: batch, 4), np.full(2, 2.0), np.ones(4)
    estimate = bj.implicit_estimator(problem, lambda *_: None, solver, batches=1, fetch=fetch)(
        bj.trajectory_from_params(differ(params, params)), differ(weights, weights), (), stream, stream
    )
    check_finite(None, {3: differ(1.0, np.nan)}, None, {"a": differ([1.0], [np.inf])})  # raises for the second's own
    return {
        "cg": count_products([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]),
        "negative curvature": count_products([-3.0, 1.0, 1.0], [1.0, 2.0, 3.0]),
        "batches": estimate.checks.batches,
    }


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
