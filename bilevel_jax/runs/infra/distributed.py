"""Initialisation, agreement and single-writer work of several processes.

Every process runs the same program over its own devices and makes the same calls in the same order; what each of these
functions returns is the same in all of them. With one process they cost nothing.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from bilevel_jax.runs.config.schema import DistributedSection

ResultT = TypeVar("ResultT")
MAX_ERROR_BYTES = 2000
"""Longest error message, in bytes, that the other processes receive."""

_on_first_process_only = False
"""True inside `run_on_first_process`, where nothing is gathered from the others."""


def initialize_distributed(distributed: DistributedSection) -> None:
    """Join the other processes of the run, if it has any; before anything asks for a device.

    The coordinator is distributed.coordinator_address or JAX_COORDINATOR_ADDRESS; the number of processes and that of
    this one are the config's, or JAX_NUM_PROCESSES and JAX_PROCESS_ID, or what the cluster says. Raises ValueError
    where nothing does.
    """
    coordinator = distributed.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if not coordinator or jax.distributed.is_initialized():
        return
    num_processes = distributed.num_processes or int(os.environ.get("JAX_NUM_PROCESSES", "0"))
    process_id = distributed.process_id if distributed.process_id >= 0 else int(os.environ.get("JAX_PROCESS_ID", "-1"))
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which the session handles
    # on CPUs two programs may run at once, in another order in another process, and wait for each other for ever
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator,
            num_processes or None,
            process_id if process_id >= 0 else None,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"distributed.coordinator_address = {coordinator}: the processes did not find each other ({error}). "
            "On TPU pods, SLURM, Open MPI and Kubernetes give auto; elsewhere the same host:port to all, how many "
            "they are (--distributed.num-processes), and to each its own number from 0 (--distributed.process-id)."
        ) from error


def is_multiprocess() -> bool:
    """Whether the run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first_process() -> bool:
    """Whether this is the process that writes and talks."""
    return not is_multiprocess() or jax.process_index() == 0


def fetch_to_host(array: Any) -> np.ndarray:
    """All of an array on the host, also where parts of it lie with other processes."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def allgather_values(values: list[int]) -> np.ndarray:
    """int32[processes, values]: the values of each process."""
    local_values = np.asarray(values, np.int32)
    return (
        local_values[None]
        if _on_first_process_only or not is_multiprocess()
        else np.asarray(multihost_utils.process_allgather(local_values))
    )


def broadcast_from_first(value: int) -> int:
    """The first process's value, in every process."""
    return int(allgather_values([value])[0, 0])


def run_on_first_process(work: Callable[[], ResultT]) -> ResultT | None:
    """Have the first process do what is done once, such as writing; the others wait for it, and fail where it fails.

    When it returns, every process sees what was written. The others get None.
    """
    global _on_first_process_only
    if _on_first_process_only or not is_multiprocess():
        return work()
    result, failure = None, None
    if is_first_process():
        _on_first_process_only = True
        try:
            result = work()
        except Exception as error:
            failure = error
        finally:
            _on_first_process_only = False
    message = f"{type(failure).__name__}: {failure}".encode()[:MAX_ERROR_BYTES] if failure else b""
    message_buffer = np.zeros(MAX_ERROR_BYTES, np.uint8)
    message_buffer[: len(message)] = np.frombuffer(message, np.uint8)
    message_buffer = np.asarray(multihost_utils.broadcast_one_to_all(message_buffer))
    if failure:
        raise failure
    if message_buffer.any():
        raise RuntimeError(
            f"the first process stopped: {bytes(message_buffer).rstrip(bytes(1)).decode(errors='replace')}"
        )
    return result
