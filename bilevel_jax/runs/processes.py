"""Several processes that work as one run: how they start, agree, write once, and read what lies with the others.

Every process runs the same program over its own devices and makes the same calls in the same order; what each of these
functions says is the same in all of them. With one process they cost nothing.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from bilevel_jax.runs.sections import DistributedSection

Result = TypeVar("Result")
LONGEST = 2000
"""Bytes of an error that the others are told."""

_alone = False
"""Within `by_first`: what is asked there is the first process's own."""


def start(distributed: DistributedSection) -> None:
    """Join the other processes of the run, if it has any; before anything asks for a device.

    The coordinator is distributed.coordinator_address or JAX_COORDINATOR_ADDRESS; the number of processes and of this one are the
    config's, or JAX_NUM_PROCESSES and JAX_PROCESS_ID, or what the cluster says. Raises ValueError where nothing does.
    """
    coordinator = distributed.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if not coordinator or jax.distributed.is_initialized():
        return
    count = distributed.num_processes or int(os.environ.get("JAX_NUM_PROCESSES", "0"))
    number = distributed.process_id if distributed.process_id >= 0 else int(os.environ.get("JAX_PROCESS_ID", "-1"))
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which the session handles
    # on CPUs two programs may run at once, in another order in another process, and wait for each other for ever
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator, count or None, number if number >= 0 else None
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"distributed.coordinator_address = {coordinator}: the processes did not find each other ({error}). On TPU pods, "
            "SLURM, Open MPI and Kubernetes give auto; elsewhere the same host:port to all, how many they are "
            "(--distributed.num-processes), and to each its own number from 0 (--distributed.process-id)."
        ) from error


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes and talks."""
    return not several() or jax.process_index() == 0


def fetch(array: Any) -> np.ndarray:
    """All of an array on the host, also where parts of it lie with other processes."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def table(values: list[int]) -> np.ndarray:
    """int32[processes, values]: what each process says."""
    said = np.asarray(values, np.int32)
    return said[None] if _alone or not several() else np.asarray(multihost_utils.process_allgather(said))


def agreed(value: int) -> int:
    """What the first process says."""
    return int(table([value])[0, 0])


def by_first(work: Callable[[], Result]) -> Result | None:
    """Have the first process do what is done once, such as writing; the others wait for it, and fail where it fails.

    When it returns, every process sees what was written. The others get None.
    """
    global _alone
    if _alone or not several():
        return work()
    result, trouble = None, None
    if first():
        _alone = True
        try:
            result = work()
        except Exception as error:
            trouble = error
        finally:
            _alone = False
    words = f"{type(trouble).__name__}: {trouble}".encode()[:LONGEST] if trouble else b""
    told = np.zeros(LONGEST, np.uint8)
    told[: len(words)] = np.frombuffer(words, np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(told))
    if trouble:
        raise trouble
    if told.any():
        raise RuntimeError(f"the first process stopped: {bytes(told).rstrip(bytes(1)).decode(errors='replace')}")
    return result
