"""What of a training is kept for its sweep within a budget, and where: on the device, in host memory or on disk."""

import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel_jax.core import schedule
from bilevel_jax.core.types import Inner, Keep, Transition
from bilevel_jax.runs import checkpoint, processes
from bilevel_jax.runs.sections import OuterSection

GIB = 2.0**30
SHARE = 0.5
"""Of a device's memory beside the model: what the states of a training may take where the config says nothing."""
PENDING = 2
"""States that wait to be written before training waits for them."""


def planned(
    outer: OuterSection,
    steps: int,
    state: Any,
    base: Any,
    device: float = 0.0,
    linear: Callable[[], float] = lambda: 0.0,
) -> Keep:
    """What a training of so many steps keeps within outer.memory_gib of a device that has so many bytes (0: this one).

    `state` and `base` are arrays or shapes of arrays; `linear` is asked for the bytes of a step's linearisation, where
    outer.linearize keeps them. Without outer.memory_gib it is half of what the model leaves,
    from sizes alone, so that every run on such a device keeps the same.

    Raises:
        ValueError: if one state and one step on the tape are more than the budget.
    """
    if outer.method not in ("unrolled", "window"):
        return schedule.NOTHING
    snapshot = held(state)
    visit = snapshot + held(state.params) + (linear() if outer.linearize else 0)
    least = visit + (snapshot if outer.offload == "device" else 0)
    budget = outer.memory_gib * GIB or max(least, SHARE * ((device or of_device()) - held(base) - held(state.params)))
    if budget < least:
        raise ValueError(
            f"outer.memory_gib = {outer.memory_gib:g}: a sweep keeps at least one state of training and one step, "
            f"{least / GIB:.3g} GiB here. Give it that, or "
            f"{'set outer.linearize to false' if outer.linearize else 'split the parameters (mesh.fsdp)'}."
        )
    if outer.offload == "device":
        keep = schedule.within(swept(outer, steps), snapshot, visit, budget)
    else:
        keep = schedule.once(swept(outer, steps), int(budget // visit))
    return keep._replace(linear=outer.linearize)


def swept(outer: OuterSection, steps: int) -> int:
    """How many of the last steps of a training are swept."""
    return min(outer.window, steps) if outer.method == "window" else steps


def place(outer: OuterSection, folder: Path, like: Inner, *, resumed: bool = False) -> MutableMapping[int, Inner]:
    """An empty store of states by step, where outer.offload says; on disk, with `resumed`, what it held."""
    if outer.offload == "host":
        return Host(like)
    if outer.offload == "disk":
        return Disk(folder, like, resumed=resumed)
    return {}


class Host(MutableMapping[int, Inner]):
    """States in the host's memory: page-locked, so that they are copied while the device goes on."""

    def __init__(self, like: Inner):
        self._back = jax.tree.map(lambda leaf: leaf.sharding, like)
        self._there = jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), self._back)
        self._states: dict[int, Inner] = {}

    def __setitem__(self, step: int, state: Inner) -> None:
        self._states[step] = jax.device_put(state, self._there)

    def __getitem__(self, step: int) -> Inner:
        return jax.device_put(self._states[step], self._back)

    def __delitem__(self, step: int) -> None:
        del self._states[step]

    def __iter__(self) -> Iterator[int]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)


class Disk(MutableMapping[int, Inner]):
    """States on disk, written beside the training and read ahead of the sweep; a damaged one is an error.

    Several processes write and read one after another, together.
    """

    def __init__(self, folder: Path, like: Inner, *, resumed: bool = False):
        if not resumed:
            processes.by_first(lambda: shutil.rmtree(folder, ignore_errors=True))
        self._files, self._folder = checkpoint.snapshots(folder), folder
        self._like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        self._steps = set(checkpoint.steps(folder))
        self._worker = None if processes.several() else ThreadPoolExecutor(1, thread_name_prefix="states")
        self._written: dict[int, Future[None]] = {}
        self._ahead: dict[int, Future[Inner]] = {}

    def __setitem__(self, step: int, state: Inner) -> None:
        if self._worker is None:
            self._files.put(step, state)
        else:
            waiting = deque(self._written)
            while len(waiting) >= PENDING:
                self._finish(waiting.popleft())
            # the worker waits for the device, too: nothing takes the memory of a state that it holds
            self._written[step] = self._worker.submit(lambda: self._files.put(step, jax.tree.map(np.asarray, state)))
        self._steps.add(step)

    def __getitem__(self, step: int) -> Inner:
        if step not in self._steps:
            raise KeyError(step)
        for written in list(self._written):
            self._finish(written)
        if self._worker is None:
            return self._files.get(step, self._like)
        state = self._ahead.pop(step, None) or self._worker.submit(self._files.get, step, self._like)
        self._ahead.clear()
        if earlier := [other for other in self._steps if other < step]:
            self._ahead[max(earlier)] = self._worker.submit(self._files.get, max(earlier), self._like)
        return state.result()

    def __delitem__(self, step: int) -> None:
        self._steps.remove(step)
        self._ahead.pop(step, None)
        for written in list(self._written):
            self._finish(written)
        processes.by_first(lambda: self._files.remove(step))

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._steps))

    def __len__(self) -> int:
        return len(self._steps)

    def _finish(self, step: int) -> None:
        self._written.pop(step).result()

    def settle(self) -> None:
        """Wait until everything is written, so that a checkpoint may count on it."""
        for step in list(self._written):
            self._finish(step)

    def clear(self) -> None:
        """Remove all of it from the disk."""
        self.settle()
        self._ahead.clear()
        if self._worker:
            self._worker.shutdown()
        self._steps.clear()
        processes.by_first(lambda: shutil.rmtree(self._folder, ignore_errors=True))


# ---- sizes


def held(some: Any) -> int:
    """Bytes of all leaves on one device: arrays or shapes, whole or the part that their sharding gives it."""
    return sum(_held(leaf) for leaf in jax.tree.leaves(some))


def _held(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def linearised(step: Transition, *arguments: Any) -> int:
    """Bytes of a step's linearisation, beside its state and its batch; `arguments` are those of `step.linearize`.

    On one device of several it is taken to be an even share, as the rows of a batch are.
    """
    linear = jax.eval_shape(step.linearize, *arguments)[2]
    devices = {leaf.sharding.num_devices for leaf in jax.tree.leaves(arguments) if getattr(leaf, "sharding", None)}
    return held(linear) // max(devices, default=1)


def of_device() -> float:
    """Bytes that one device of this machine has; the CPU's devices share the machine's."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / len(jax.local_devices())
