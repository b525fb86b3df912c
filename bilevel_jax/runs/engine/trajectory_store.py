"""Storage of training states for the backward pass."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel_jax.core import checkpointing
from bilevel_jax.core.types import CheckpointPlan, TrainState, TrainStep
from bilevel_jax.runs.config.schema import OuterSection
from bilevel_jax.runs.infra import checkpoint, distributed
from bilevel_jax.runs.infra.run_dir import remove_folder

GIB = 2.0**30
DEFAULT_MEMORY_SHARE = 0.5
"""Share of the memory that the model leaves on a device: what stored states take where the config says nothing."""
PINNED_HOST = "pinned_host"
"""JAX's name of the host's page-locked memory."""
MAX_PENDING_WRITES = 2
"""States that wait to be written before training waits for them."""


def plan_checkpoints(
    outer: OuterSection,
    steps: int,
    state: Any,
    base: Any,
    device_bytes: float = 0.0,
    linearization_size: Callable[[], float] = lambda: 0.0,
) -> CheckpointPlan:
    """The states that a training run stores within outer.memory_gib of a device with so many bytes (0: this one).

    `state` and `base` are arrays or shapes of arrays; `linearization_size` returns the bytes of a step's linearisation,
    where outer.linearize keeps them. Without outer.memory_gib it is half of what the model leaves, from sizes alone, so
    that every run on such a device keeps the same.

    Raises:
        ValueError: if one state and one stored step are more than the budget.
    """
    if outer.method not in ("unrolled", "window"):
        return checkpointing.NO_CHECKPOINTS
    state_bytes = bytes_per_device(state)
    step_bytes = state_bytes + bytes_per_device(state.params) + (linearization_size() if outer.linearize else 0)
    min_bytes = step_bytes + (state_bytes if outer.offload == "device" else 0)
    budget = outer.memory_gib * GIB
    if not budget:
        device_bytes = device_bytes or device_memory_bytes()
        if not device_bytes:
            raise ValueError(
                f"{jax.local_devices()[0].device_kind} does not tell its memory (on GPUs where "
                "XLA_PYTHON_CLIENT_ALLOCATOR is platform): set outer.memory_gib, what stored states may take of it."
            )
        left = device_bytes - bytes_per_device(base) - bytes_per_device(state.params)
        budget = max(min_bytes, DEFAULT_MEMORY_SHARE * left)
    if budget < min_bytes:
        raise ValueError(
            f"outer.memory_gib = {outer.memory_gib:g}: a sweep keeps at least one state of training and one step, "
            f"{min_bytes / GIB:.3g} GiB here. Give it that, or "
            f"{'set outer.linearize to false' if outer.linearize else 'split the parameters (mesh.fsdp)'}."
        )
    if outer.offload == "device":
        plan = checkpointing.plan_within_budget(num_backward_steps(outer, steps), state_bytes, step_bytes, budget)
    else:
        plan = checkpointing.single_replay_plan(num_backward_steps(outer, steps), int(budget // step_bytes))
    return plan._replace(linearize=outer.linearize)


def num_backward_steps(outer: OuterSection, steps: int) -> int:
    """How many of the last steps of a training run the backward pass visits."""
    return min(outer.window, steps) if outer.method == "window" else steps


def make_state_store(
    outer: OuterSection, folder: Path, like: TrainState, *, resume: bool = False
) -> MutableMapping[int, TrainState]:
    """An empty store of states by step, where outer.offload says; with `resume`, what the disk holds."""
    if outer.offload == "host":
        return HostStore(like)
    if outer.offload == "disk":
        return DiskStore(folder, like, resume=resume)
    return {}


class HostStore(MutableMapping[int, TrainState]):
    """States in the host's memory: page-locked, so that they are copied while the device goes on.

    Raises ValueError for a device that has no such memory.
    """

    def __init__(self, like: TrainState):
        device = jax.local_devices()[0]
        kinds = [memory.kind for memory in device.addressable_memories()]
        if PINNED_HOST not in kinds:
            raise ValueError(
                f"outer.offload = host: {device.device_kind} has no memory {PINNED_HOST}, only {', '.join(kinds)}. Set "
                "outer.offload to disk or device."
            )
        self._device_sharding = jax.tree.map(lambda leaf: leaf.sharding, like)
        self._host_sharding = jax.tree.map(
            lambda sharding: sharding.with_memory_kind(PINNED_HOST), self._device_sharding
        )
        self._states: dict[int, TrainState] = {}

    def __setitem__(self, step: int, state: TrainState) -> None:
        self._states[step] = jax.device_put(state, self._host_sharding)

    def __getitem__(self, step: int) -> TrainState:
        return jax.device_put(self._states[step], self._device_sharding)

    def __delitem__(self, step: int) -> None:
        del self._states[step]

    def __iter__(self) -> Iterator[int]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)


class DiskStore(MutableMapping[int, TrainState]):
    """States on disk, written while training goes on and read ahead of the backward pass; a damaged one is an error.

    Several processes write and read one after another, together.
    """

    def __init__(self, folder: Path, like: TrainState, *, resume: bool = False):
        if not resume:
            distributed.run_on_first_process(lambda: remove_folder(folder))
        self._files, self._folder = checkpoint.make_snapshot_store(folder), folder
        self._like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        self._steps = set(distributed.share_work_of_first(lambda: checkpoint.list_checkpoint_steps(folder)))
        self._worker = None if distributed.is_multiprocess() else ThreadPoolExecutor(1, thread_name_prefix="states")
        self._pending_writes: dict[int, Future[None]] = {}
        self._prefetched: dict[int, Future[TrainState]] = {}

    def __setitem__(self, step: int, state: TrainState) -> None:
        if self._worker is None:
            self._files.put(step, state)
        else:
            waiting = deque(self._pending_writes)
            while len(waiting) >= MAX_PENDING_WRITES:
                self._finish_write(waiting.popleft())
            # the worker waits for the device, too: nothing takes the memory of a state that it holds
            self._pending_writes[step] = self._worker.submit(
                lambda: self._files.put(step, jax.tree.map(np.asarray, state))
            )
        self._steps.add(step)

    def __getitem__(self, step: int) -> TrainState:
        if step not in self._steps:
            raise KeyError(step)
        for written in list(self._pending_writes):
            self._finish_write(written)
        if self._worker is None:
            return self._files.get(step, self._like)
        state = self._prefetched.pop(step, None) or self._worker.submit(self._files.get, step, self._like)
        self._prefetched.clear()
        if earlier := [other for other in self._steps if other < step]:
            self._prefetched[max(earlier)] = self._worker.submit(self._files.get, max(earlier), self._like)
        return state.result()

    def __delitem__(self, step: int) -> None:
        self._steps.remove(step)
        self._prefetched.pop(step, None)
        for written in list(self._pending_writes):
            self._finish_write(written)
        distributed.run_on_first_process(lambda: self._files.remove(step))

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._steps))

    def __len__(self) -> int:
        return len(self._steps)

    def _finish_write(self, step: int) -> None:
        self._pending_writes.pop(step).result()

    def wait_until_written(self) -> None:
        """Wait until everything is written, so that a checkpoint may count on it."""
        for step in list(self._pending_writes):
            self._finish_write(step)

    def clear(self) -> None:
        """Remove all of it from the disk."""
        self.wait_until_written()
        self._prefetched.clear()
        if self._worker:
            self._worker.shutdown()
        self._steps.clear()
        distributed.run_on_first_process(lambda: remove_folder(self._folder))


# ---- sizes


def bytes_per_device(tree: Any) -> int:
    """Bytes of all leaves on one device: arrays or shapes, whole or the part that their sharding gives it."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def linearization_bytes(step: TrainStep, *arguments: Any) -> int:
    """Bytes of a step's linearization, without its state and its batch; `arguments` are those of `step.linearize`.

    On one device of several it is taken to be an even share, as the rows of a batch are.
    """
    linearization = jax.eval_shape(step.linearize, *arguments)[2]
    devices = {leaf.sharding.num_devices for leaf in jax.tree.leaves(arguments) if getattr(leaf, "sharding", None)}
    return bytes_per_device(linearization) // max(devices, default=1)


def device_memory_bytes() -> float:
    """Bytes that one device of this machine has, 0 where an accelerator does not tell; CPU devices share the machine's.

    Of several processes all call this, and get the least of all: what is planned by it must be the same in each.
    """
    device = jax.local_devices()[0]  # those of other processes cannot be asked
    if device.platform == "cpu":
        machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        device_bytes = machine_bytes / len(jax.local_devices())
    else:
        device_bytes = float((device.memory_stats() or {}).get("bytes_limit", 0))
    if not distributed.is_multiprocess():
        return device_bytes
    return float(distributed.allgather_values([int(device_bytes) >> 20]).min()) * (1 << 20)
