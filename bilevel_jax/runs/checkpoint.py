"""Checkpoints: orbax for the arrays, our manifest of hashes for the truth, behind save, restore and prune.

A step is one folder, renamed into place when whole:

    step_0000000012/
      arrays/          what orbax writes
      manifest.json    every leaf (path, shape, dtype), meta, and the SHA-256 of every file; itself hashed, written last

orbax alone restores a flipped byte silently as a wrong number, and takes a truncated step for the latest one.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from bilevel_jax.runs import processes
from bilevel_jax.runs.files import full, sync, write_atomic

PyTree = Any
MANIFEST = "manifest.json"


class Restored(NamedTuple):
    """What `restore` found."""

    tree: PyTree
    meta: dict[str, Any]
    step: int


class Snapshots(NamedTuple):
    """A store of states by step: `put(step, tree)`, `get(step, like)`, `remove(step)`."""

    put: Callable[[int, PyTree], None]
    get: Callable[[int, PyTree], PyTree]
    remove: Callable[[int], None]


def save(folder: str | Path, step: int, tree: PyTree, meta: dict[str, Any], keep: int | None = 2) -> Path:
    """Write `tree` and `meta` (JSON values) as `step`, whole or not at all; then keep the last `keep` (None: all).

    Every array is stored bit for bit: jax arrays of any dtype and sharding, numpy arrays, typed keys (as their data),
    Python numbers. With several processes all call this, and `folder` is one that all of them see.
    """
    folder, final = Path(folder), _folder(folder, step)
    part = folder / f".{final.name}.part"
    leaves = _flatten(tree)
    head = {"step": step, "meta": meta, "leaves": [_describe(name, leaf) for name, leaf in leaves]}
    json.dumps(head)  # a meta that is not JSON fails here, before anything is written
    first = processes.first()

    def make() -> None:
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed while saving
        part.mkdir(parents=True)

    def place() -> None:
        _seal(part, head)
        _swap(part, final)
        if keep is not None:
            prune(folder, keep)

    try:
        processes.by_first(make)
        stored = {_key(i): _data(leaf) for i, (_, leaf) in enumerate(leaves) if _is_stored(leaf)}
        if stored:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save((part / "arrays").absolute(), stored)
        processes.by_first(place)
    except BaseException as error:
        if first:
            shutil.rmtree(part, ignore_errors=True)
        if disk_full := full(final, error):
            raise disk_full from error
        raise
    return final


def restore(folder: str | Path, like: PyTree, step: int | None = None) -> Restored | None:
    """The latest valid step (or exactly `step`) in the structure, dtypes and shardings of `like`; None without one.

    `like` holds arrays or jax.ShapeDtypeStruct. A step that is damaged or incomplete is passed over with a warning that
    says what is wrong with it. A sound step of another structure is an error: going further back would not help.
    """

    def valid() -> int:
        for found in reversed(steps(folder)) if step is None else [step]:
            head, trouble = _verify(_folder(folder, found))
            if head is not None:
                return found
            warnings.warn(f"checkpoint {_folder(folder, found)} is refused: {trouble}", stacklevel=3)
        return -1

    found = processes.agreed(valid() if processes.first() else -1)
    if found < 0:
        return None
    path = _folder(folder, found)
    head, trouble = _verify(path, contents=False)
    if head is None:
        raise ValueError(f"checkpoint {path} is refused: {trouble}. All processes need to see {folder}.")
    return Restored(_load(path, head, like), head["meta"], head["step"])


def meta(folder: str | Path, step: int) -> dict[str, Any] | None:
    """What was saved beside the arrays of a step; None where there is no whole step of that number."""
    head, _ = _verify(_folder(folder, step), contents=False)
    return None if head is None else head["meta"]


def prune(folder: str | Path, keep: int) -> None:
    """Remove all but the last `keep` whole steps. Whole = the manifest is sound and every file has its size."""
    left = keep
    for step in reversed(steps(folder)):
        path = _folder(folder, step)
        if left > 0 and _verify(path, contents=False)[0] is not None:
            left -= 1
        elif left <= 0:
            shutil.rmtree(path)


def steps(folder: str | Path) -> list[int]:
    """The steps that are there, valid or not, in order."""
    return sorted(int(path.name.removeprefix("step_")) for path in Path(folder).glob("step_*[0-9]") if path.is_dir())


def snapshots(folder: str | Path) -> Snapshots:
    """The states of a training run on disk, for the reverse sweep. A damaged one is an error, never a wrong number."""
    folder = Path(folder)

    def put(step: int, tree: PyTree) -> None:
        save(folder, step, tree, {}, keep=None)

    def get(step: int, like: PyTree) -> PyTree:
        path = _folder(folder, step)
        head, trouble = _verify(path)
        if head is None:
            raise ValueError(f"snapshot {path} is refused: {trouble}. Remove {folder} and train again to replace it.")
        return _load(path, head, like)

    return Snapshots(put, get, lambda step: shutil.rmtree(_folder(folder, step)))


# --- leaves: what orbax stores, and what the manifest itself can hold


def _flatten(tree: PyTree) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path) or "the tree", leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _key(index: int) -> str:
    return f"{index:06d}"


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def _is_stored(leaf: Any) -> bool:
    return not isinstance(leaf, bool | int | float) and np.prod(leaf.shape) > 0  # orbax refuses empty arrays


def _describe(name: str, leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, np.generic):
        leaf = np.asarray(leaf)  # np.float64 is also a Python float
    if isinstance(leaf, bool | int | float):
        return {"leaf": name, "dtype": type(leaf).__name__, "value": leaf}
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray):
        raise TypeError(f"{name} is a {type(leaf).__name__}; a checkpoint holds arrays and numbers.")
    return {"leaf": name, "dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def _load(path: Path, head: dict[str, Any], like: PyTree) -> PyTree:
    """The tree of a verified step, after its leaves have been compared with those of `like`."""
    wanted = [(name, np.asarray(leaf) if isinstance(leaf, np.generic) else leaf) for name, leaf in _flatten(like)]
    have, want = head["leaves"], [_describe(name, leaf) for name, leaf in wanted]
    wrong = [
        f"{_words(a)} there, {_words(b)} wanted"
        for a, b in zip(have, want, strict=False)
        if (a["leaf"], a["dtype"], a.get("shape")) != (b["leaf"], b["dtype"], b.get("shape"))
    ]
    if wrong or len(have) != len(want):
        more = f" ({len(wrong)} differ; {len(have)} leaves there, {len(want)} wanted)"
        raise ValueError(f"{path} is of another structure: {wrong[0] if wrong else 'leaves are missing'}{more}.")
    target = {_key(i): _target(leaf) for i, (_, leaf) in enumerate(wanted) if _is_stored(leaf)}
    arrays = {}
    if target:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore((path / "arrays").absolute(), target)
    leaves = [
        _whole(leaf, arrays[_key(i)]) if _is_stored(leaf) else _small(leaf, record)
        for i, ((_, leaf), record) in enumerate(zip(wanted, have, strict=True))
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _target(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf) if leaf.sharding is None else jax.random.key_data(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or _here())


def _here() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _whole(leaf: Any, array: Any) -> Any:
    if _is_key(leaf):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(jnp.empty(0, leaf.dtype)))
    return array


def _small(leaf: Any, record: dict[str, Any]) -> Any:
    if "value" in record:
        return record["value"]  # JSON keeps Python's numbers exactly
    return leaf if isinstance(leaf, np.ndarray) else jnp.zeros(leaf.shape, leaf.dtype)  # an empty array


def _words(record: dict[str, Any]) -> str:
    return f"{record['leaf']} {record['dtype']}{record.get('shape', '')}"


# --- files: hashed, sealed, swapped into place, verified


def _folder(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step_{step:010d}"


def _seal(part: Path, head: dict[str, Any]) -> None:
    files = sorted(path for path in part.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    for inside in (path for path in part.rglob("*") if path.is_dir()):
        sync(inside)
    hashes = {str(path.relative_to(part)): {"bytes": path.stat().st_size, "sha256": _hash(path)} for path in files}
    body = json.dumps(head | {"files": hashes}, indent=1)
    write_atomic(part / MANIFEST, f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}\n")


def _swap(part: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():  # the same step again, after a resume
        final.rename(old)
    part.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _verify(path: Path, contents: bool = True) -> tuple[dict[str, Any] | None, str]:
    """The manifest if everything is as it says, else None and what is wrong."""
    try:
        seal, _, body = (path / MANIFEST).read_text(encoding="utf-8").partition("\n")
    except FileNotFoundError:
        return None, f"{MANIFEST} is missing, so it was never finished" if path.is_dir() else "it is not there"
    except UnicodeDecodeError:
        return None, f"{MANIFEST} is damaged"
    if hashlib.sha256(body.removesuffix("\n").encode()).hexdigest() != seal:
        return None, f"{MANIFEST} is damaged"
    head = json.loads(body)
    for name, known in head["files"].items():
        file = path / name
        if not file.is_file():
            return None, f"{name} is missing"
        if file.stat().st_size != known["bytes"]:
            return None, f"{name} has {file.stat().st_size} bytes, {known['bytes']} were written"
        if contents and _hash(file) != known["sha256"]:
            return None, f"{name} is damaged: its SHA-256 is not the one that was written"
    return head, ""


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
