"""Checkpoints in orbax format, verified by a manifest of hashes.

A step is one folder, renamed into place when whole:

    step_0000000012/
      arrays/          what orbax writes; on object storage arrays_2/ of a step that takes the place of another with
                       arrays/: the files of the one that counts stay until the next has its manifest
      manifest.json    every leaf (path, shape, dtype), meta, and the SHA-256 of every file; itself hashed, written last

orbax alone restores a flipped byte silently as a wrong number, and takes a truncated step for the latest one.
"""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from bilevel_jax.runs.infra import distributed, seals
from bilevel_jax.runs.infra.run_dir import disk_full_error, fsync_path, read_when_seen, remove_folder
from bilevel_jax.runs.infra.seals import MANIFEST_FILE
from bilevel_jax.storage import copies

PyTree = Any
ARRAYS_FOLDERS = ("arrays", "arrays_2")
"""In the folder of a step: what orbax writes, the one or the other."""
MID_STEP_FOLDER = "inner"
"""In the run's checkpoints: what is saved in the middle of an outer step."""


class RestoredCheckpoint(NamedTuple):
    """A restored tree with its metadata and step."""

    tree: PyTree
    meta: dict[str, Any]
    step: int


class SnapshotStore(NamedTuple):
    """A store of states by step: `put(step, tree)`, `get(step, like)`, `remove(step)`."""

    put: Callable[[int, PyTree], None]
    get: Callable[[int, PyTree], PyTree]
    remove: Callable[[int], None]


def save_checkpoint(
    folder: str | Path, step: int, tree: PyTree, meta: dict[str, Any], max_to_keep: int | None = 2
) -> Path:
    """Write `tree` and `meta` (JSON values) as `step`, whole or not at all; then prune to `max_to_keep` (None: all).

    Every array is stored bit for bit: jax arrays of any dtype and sharding, numpy arrays, typed keys (as their data),
    Python numbers. With several processes all call this, and `folder` is one that all of them see; of what each has for
    itself that of the first is stored.
    """
    return _save_step(Path(folder), step, tree, meta, max_to_keep, is_noted=True)


def _save_step(
    folder: Path, step: int, tree: PyTree, meta: dict[str, Any], max_to_keep: int | None, *, is_noted: bool
) -> Path:
    final = _step_folder(folder, step)
    part = folder / f".{final.name}.part"
    leaves = _flatten(tree)
    arrays_folder = _choose_arrays_folder(final)
    manifest = {"step": step, "meta": meta, "leaves": [_describe_leaf(name, leaf) for name, leaf in leaves]}
    if arrays_folder != ARRAYS_FOLDERS[0]:
        manifest["arrays"] = arrays_folder
    seals.format_json(manifest)  # a meta that is not JSON fails here, before anything is written
    is_first = distributed.is_first_process()

    def create_part_folder() -> None:
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed while saving
        part.mkdir(parents=True)

    def finish() -> None:
        _write_manifest(part, manifest, final if is_noted else None)
        _move_into_place(part, final)
        if max_to_keep is not None:
            prune_checkpoints(folder, max_to_keep)

    try:
        distributed.run_on_first_process(create_part_folder)
        arrays = {_leaf_key(i): _to_storable(leaf) for i, (_, leaf) in enumerate(leaves) if _is_stored(leaf)}
        if arrays:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save((part / arrays_folder).absolute(), arrays)
        distributed.run_on_first_process(finish)
    except BaseException as error:
        if is_first:
            shutil.rmtree(part, ignore_errors=True)
        if disk_full := disk_full_error(final, error):
            raise disk_full from error
        if isinstance(error, OSError | ValueError) and "OCDBT" in str(error):  # orbax's storage
            raise OSError(
                f"{final} could not be written ({str(error).splitlines()[0][:200]}); what was there before is intact. "
                "Look at the disk and its limits (ulimit -f, quotas), then --resume."
            ) from error
        raise
    return final


def restore_checkpoint(folder: str | Path, like: PyTree, step: int | None = None) -> RestoredCheckpoint | None:
    """The latest valid step (or exactly `step`) in the structure, dtypes and shardings of `like`; None without one.

    `like` holds arrays or jax.ShapeDtypeStruct. A step that is damaged or incomplete is passed over with a warning that
    says what is wrong with it. A sound step of another structure is an error: going further back would not help.
    Of several processes the first one says which step that is; the others wait until they see it.
    """

    def find_valid_manifest() -> dict[str, Any] | None:
        for candidate in reversed(list_checkpoint_steps(folder)) if step is None else [step]:
            manifest, problem = _verify(_step_folder(folder, candidate))
            if manifest is not None:
                return manifest
            warnings.warn(f"checkpoint {_step_folder(folder, candidate)} is refused: {problem}", stacklevel=5)
        return None

    manifest = distributed.share_work_of_first(find_valid_manifest)
    if manifest is None:
        return None
    path = _step_folder(folder, manifest["step"])

    def find_same() -> None:
        seen, problem = _verify(path, contents=False)
        if seen is None or seals.format_json(seen) != seals.format_json(manifest):
            raise seals.DamagedFileError(problem or "another checkpoint of that number is there")

    if not distributed.is_first_process():
        read_when_seen(path, find_same)
    return RestoredCheckpoint(_load_tree(path, manifest, like), manifest["meta"], manifest["step"])


def read_checkpoint_meta(folder: str | Path, step: int) -> dict[str, Any] | None:
    """The metadata saved with the arrays of a step; None where there is no whole step of that number.

    Of several processes all call this, and get what the first one finds.
    """

    def read() -> dict[str, Any] | None:
        manifest, _ = _verify(_step_folder(folder, step), contents=False)
        return None if manifest is None else manifest["meta"]

    return distributed.share_work_of_first(read)


def prune_checkpoints(folder: str | Path, max_to_keep: int) -> None:
    """Remove all but the last `max_to_keep` complete steps: the manifest is sound and every file has its size."""
    remaining = max_to_keep
    for step in reversed(list_checkpoint_steps(folder)):
        path = _step_folder(folder, step)
        if remaining > 0 and _verify(path, contents=False)[0] is not None:
            remaining -= 1
        elif remaining <= 0:
            remove_folder(path)


def keep_last_checkpoints(run_folder: Path) -> None:
    """Of a run that has done its work: the last checkpoint of each kind, and none of the middle of an outer step.

    Which others there are depends on when the run was saved.
    """
    for kind in sorted(path for path in (run_folder / "checkpoints").iterdir() if path.is_dir()):
        remove_folder(kind) if kind.name == MID_STEP_FOLDER else prune_checkpoints(kind, 1)


def list_checkpoint_steps(folder: str | Path) -> list[int]:
    """The steps that are there, valid or not, in order."""
    return sorted(int(path.name.removeprefix("step_")) for path in Path(folder).glob("step_*[0-9]") if path.is_dir())


def make_snapshot_store(folder: str | Path) -> SnapshotStore:
    """The states of a training run on disk, for the backward pass. A damaged one is an error, never a wrong number."""
    folder = Path(folder)

    def put(step: int, tree: PyTree) -> None:
        # not noted in the run: there are many, and none is read by another process than that which wrote it, but after
        # a resume, which finds each whole or not by its own manifest
        _save_step(folder, step, tree, {}, None, is_noted=False)

    def get(step: int, like: PyTree) -> PyTree:
        path = _step_folder(folder, step)

        def find_sound() -> dict[str, Any]:
            manifest, problem = _verify(path)
            if manifest is None:
                raise seals.DamagedFileError(
                    f"snapshot {path} is refused: {problem}.", f"Remove {folder} and train again to replace it."
                )
            return manifest

        return _load_tree(path, read_when_seen(path, find_sound, by_any=True), like)

    return SnapshotStore(put, get, lambda step: remove_folder(_step_folder(folder, step)))


# --- leaves: what orbax stores, and what the manifest itself can hold


def _flatten(tree: PyTree) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path) or "the tree", leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _leaf_key(index: int) -> str:
    return f"{index:06d}"


def _is_prng_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_storable(leaf: Any) -> Any:
    if _is_prng_key(leaf):
        leaf = jax.random.key_data(leaf)
    # of several processes each has its own copy of such an array, and orbax stores none of them
    is_of_one_process = isinstance(leaf, jax.Array) and leaf.is_fully_addressable and distributed.is_multiprocess()
    return np.asarray(leaf) if is_of_one_process or isinstance(leaf, np.generic) else leaf


def _is_stored(leaf: Any) -> bool:
    return not isinstance(leaf, bool | int | float) and np.prod(leaf.shape) > 0  # orbax refuses empty arrays


def _describe_leaf(name: str, leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, np.generic):
        leaf = np.asarray(leaf)  # np.float64 is also a Python float
    if isinstance(leaf, bool | int | float):
        return {"leaf": name, "dtype": type(leaf).__name__, "value": leaf}
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray):
        raise TypeError(f"{name} is a {type(leaf).__name__}; a checkpoint holds arrays and numbers.")
    return {"leaf": name, "dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def _load_tree(path: Path, manifest: dict[str, Any], like: PyTree) -> PyTree:
    """The tree of a verified step, after its leaves have been compared with those of `like`."""
    named_leaves = [(name, np.asarray(leaf) if isinstance(leaf, np.generic) else leaf) for name, leaf in _flatten(like)]
    stored_leaves, wanted_leaves = manifest["leaves"], [_describe_leaf(name, leaf) for name, leaf in named_leaves]
    mismatches = [
        f"{_format_leaf(a)} there, {_format_leaf(b)} wanted"
        for a, b in zip(stored_leaves, wanted_leaves, strict=False)
        if (a["leaf"], a["dtype"], a.get("shape")) != (b["leaf"], b["dtype"], b.get("shape"))
    ]
    if mismatches or len(stored_leaves) != len(wanted_leaves):
        more = f" ({len(mismatches)} differ; {len(stored_leaves)} leaves there, {len(wanted_leaves)} wanted)"
        raise ValueError(
            f"{path} is of another structure: {mismatches[0] if mismatches else 'leaves are missing'}{more}."
        )
    target = {_leaf_key(i): _restore_target(leaf) for i, (_, leaf) in enumerate(named_leaves) if _is_stored(leaf)}
    arrays = {}
    if target:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore((path / manifest.get("arrays", ARRAYS_FOLDERS[0])).absolute(), target)
    leaves = [
        _from_storable(leaf, arrays[_leaf_key(i)]) if _is_stored(leaf) else _from_manifest(leaf, record)
        for i, ((_, leaf), record) in enumerate(zip(named_leaves, stored_leaves, strict=True))
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _restore_target(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf
    if _is_prng_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf) if leaf.sharding is None else jax.random.key_data(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or _local_sharding())


def _local_sharding() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _from_storable(leaf: Any, array: Any) -> Any:
    if _is_prng_key(leaf):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(jnp.empty(0, leaf.dtype)))
    return array


def _from_manifest(leaf: Any, record: dict[str, Any]) -> Any:
    if "value" in record:
        return record["value"]  # JSON keeps Python's numbers exactly
    return leaf if isinstance(leaf, np.ndarray) else jnp.zeros(leaf.shape, leaf.dtype)  # an empty array


def _format_leaf(record: dict[str, Any]) -> str:
    return f"{record['leaf']} {record['dtype']}{record.get('shape', '')}"


# --- files: hashed, sealed, swapped into place, verified


def _step_folder(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step_{step:010d}"


def _choose_arrays_folder(final: Path) -> str:
    """Where orbax writes a step: of a published one, not where the arrays of the step lie whose place it takes."""
    first, second = ARRAYS_FOLDERS
    if not copies.is_published(final):
        return first
    replaced = _verify(final, contents=False)[0]
    return second if replaced is not None and replaced.get("arrays", first) == first else first


def _write_manifest(part: Path, manifest: dict[str, Any], final: Path | None) -> None:
    """Write the manifest of `part`, last; `final`: the place where a run should expect it from now on."""
    files = sorted(path for path in part.rglob("*") if path.is_file())
    for path in files:
        fsync_path(path)
    for inside in (path for path in part.rglob("*") if path.is_dir()):
        fsync_path(inside)
    hashes = {str(path.relative_to(part)): seals.describe_file(path) for path in files}
    (part / MANIFEST_FILE).write_text(seals.seal_document(manifest | {"files": hashes}), encoding="utf-8")
    fsync_path(part / MANIFEST_FILE)
    fsync_path(part)
    if final is not None:
        seals.note_file(final / MANIFEST_FILE, part / MANIFEST_FILE)


def _move_into_place(part: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():  # the same step again, after a resume
        final.rename(old)
    part.rename(final)
    fsync_path(final.parent)
    copies.publish_folder(final, last=MANIFEST_FILE)
    shutil.rmtree(old, ignore_errors=True)


def _verify(path: Path, contents: bool = True) -> tuple[dict[str, Any] | None, str]:
    """The manifest if everything is as it says, else None and what is wrong."""
    if not path.is_dir():
        return None, "it is not there"
    manifest, problem = seals.find_document_difference(path / MANIFEST_FILE, contents=contents)
    if manifest is None and not (path / MANIFEST_FILE).exists():
        problem += ", so it was never finished"
    try:
        seals.check(path / MANIFEST_FILE)
    except seals.DamagedFileError as error:
        problem = problem or str(error)
    return (None, problem) if problem else (manifest, "")
