"""Initialisation, agreement and single-writer work of several processes.

Every process runs the same program over its own devices and makes the same calls in the same order; what each of these
functions returns is the same in all of them. With one process they cost nothing.
"""

import atexit
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from bilevel_jax.runs.config.schema import DistributedSection
from bilevel_jax.runs.infra import peers
from bilevel_jax.runs.infra.peers import PeerError, Peers

ResultT = TypeVar("ResultT")
MAX_ERROR_BYTES = 2000
"""Longest error message, in bytes, that the other processes receive."""
MAX_SHARED_BYTES = 1 << 26
"""Bytes that are sent to the other processes at once; more goes in pieces."""
MAX_DIFFERENCES = 5
"""Differences between processes that are written out."""
JAX_START_SECONDS = 60
"""Seconds within which JAX's own start must be over once all processes are there."""
JAX_END_SECONDS = 25
"""Seconds that JAX waits at the end for the other processes."""
CAUSE_SECONDS = 1.0
"""Seconds that a failed process waits to learn whether another one's end is the cause."""

_on_first_process_only = False
"""True inside `run_on_first_process`, where nothing is gathered from the others."""
_peers: Peers | None = None
"""The connections to the other processes, once there are some."""


def initialize_distributed(
    distributed: DistributedSection, list_shared: Callable[[], Mapping[str, str]] = dict
) -> None:
    """Join the other processes of the run, if it has any; before anything asks for a device.

    The coordinator is distributed.coordinator_address or JAX_COORDINATOR_ADDRESS; the number of processes and that of
    this one are the config's, or JAX_NUM_PROCESSES and JAX_PROCESS_ID, or what the cluster says. `list_shared` gives
    values that all processes must have alike, such as the keys of a config. Raises ValueError in every process where
    the processes do not find each other, do not fit together, or differ in one of these.
    """
    coordinator = find_coordinator(distributed)
    if not coordinator or jax.distributed.is_initialized():
        return
    num_processes = distributed.num_processes or _read_number("JAX_NUM_PROCESSES", 0)
    process_id = distributed.process_id if distributed.process_id >= 0 else _read_number("JAX_PROCESS_ID", -1)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which the session handles
    # on CPUs two programs may run at once, in another order in another process, and wait for each other for ever
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if coordinator == "auto" or not num_processes or process_id < 0:
        _initialize_jax(coordinator, num_processes, process_id)
        _meet_after_jax(distributed.initialization_timeout)
        require_agreement("the start", list_shared())
        return
    _meet(coordinator, num_processes, process_id, distributed.initialization_timeout)
    require_agreement("the start", list_shared())
    _initialize_jax(coordinator, num_processes, process_id)


def find_coordinator(distributed: DistributedSection) -> str:
    """host:port of the first process, or auto; empty for a run that is alone."""
    return distributed.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS", "")


def is_multiprocess() -> bool:
    """Whether the run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first_process() -> bool:
    """Whether this is the process that writes and talks."""
    return process_number() == 0


def process_number() -> int:
    """The number of this process, from 0."""
    return jax.process_index() if is_multiprocess() else 0


def num_processes() -> int:
    """How many processes the run has."""
    return jax.process_count() if is_multiprocess() else 1


def is_alone_at_work() -> bool:
    """Whether this process is inside `run_on_first_process`, while the others wait for its end."""
    return _on_first_process_only


def require_agreement(topic: str, values: Mapping[str, str]) -> None:
    """Raise ValueError, the same in every process, where a value is not the same in all of them.

    All processes call this. `topic` says in a few words what is compared.
    """
    if _peers is None and not is_multiprocess():
        return
    tables = [json.loads(text) for text in _gather_texts(topic, json.dumps(dict(values)))]
    keys = dict.fromkeys(key for table in tables for key in table)
    differences = [
        _describe_difference(key, [table.get(key, "nothing") for table in tables])
        for key in keys
        if len({table.get(key) for table in tables}) > 1
    ]
    if not differences:
        return
    assert _peers is not None
    _peers.agree_to_stop()
    more = f", and {len(differences) - MAX_DIFFERENCES} more" if len(differences) > MAX_DIFFERENCES else ""
    raise PeerError(
        f"the processes of this run differ in {'; in '.join(differences[:MAX_DIFFERENCES])}{more}. Start all of them "
        "with the same config, packages, flags and files."
    )


def wait_for_cause() -> None:
    """Before this process says why it failed: give the end of another process, which may be why, time to be said.

    Does not return where that is said.
    """
    if _peers is None or _peers.is_leaving:
        return
    time.sleep(CAUSE_SECONDS)
    while not _peers.take_last_word():
        time.sleep(CAUSE_SECONDS)  # another thread is ending this process


def agree_to_stop() -> None:
    """Note that all processes stop here, with the same signal or error, so that none speaks of another's."""
    if _peers is not None:
        _peers.agree_to_stop()


def exit_after_error(reason: str, code: int) -> None:
    """Of several processes: tell the others why this one stops, and end it without JAX's wait for the others.

    Returns where this is the only process, or where all have agreed to stop.
    """
    if _peers is None or _peers.is_leaving:
        return
    _peers.leave(reason, code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fetch_to_host(array: Any) -> np.ndarray:
    """All of an array on the host, also where parts of it lie with other processes."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def fetch_from_first(array: Any) -> np.ndarray:
    """As `fetch_to_host`, with the numbers of the first process in every process: for what all must decide alike.

    Copies of one array in two processes may differ by rounding, where a device adds in an order of its own. Shape and
    type must be the same in all.
    """
    host_array = fetch_to_host(array)
    if _on_first_process_only or not is_multiprocess():
        return host_array
    sent = multihost_utils.broadcast_one_to_all(np.frombuffer(host_array.tobytes(), np.uint8))
    return np.frombuffer(np.asarray(sent).tobytes(), host_array.dtype).reshape(host_array.shape).copy()


def allgather_values(values: list[int]) -> np.ndarray:
    """int32[processes, values]: the values of each process."""
    local_values = np.asarray(values, np.int32)
    return (
        local_values[None]
        if _on_first_process_only or not is_multiprocess()
        else np.asarray(multihost_utils.process_allgather(local_values))
    )


def gather_numbers(topic: str, values: list[int]) -> np.ndarray:
    """int64[processes, values]: as `allgather_values`, by the network alone, while the devices go on with their work.

    `topic` says in a few words what is gathered.
    """
    if not is_multiprocess():
        return np.array([values], np.int64)
    return np.array([json.loads(text) for text in _gather_texts(topic, json.dumps(values))], np.int64)


def broadcast_from_first(value: int) -> int:
    """The first process's value, in every process."""
    return int(allgather_values([value])[0, 0])


def share_from_first(value: Any) -> Any:
    """The first process's value, of what JSON can hold, in every process; those of the others may be anything."""
    if _on_first_process_only or not is_multiprocess():
        return value
    content = json.dumps(value).encode() if is_first_process() else b""
    num_pieces, last = allgather_values(list(divmod(len(content), MAX_SHARED_BYTES)))[0].tolist()
    pieces = [content[at * MAX_SHARED_BYTES :][:MAX_SHARED_BYTES] for at in range(num_pieces + 1)]
    sizes = [MAX_SHARED_BYTES] * num_pieces + [last]
    return json.loads(b"".join(map(_broadcast_bytes, pieces, sizes)))


def share_work_of_first(work: Callable[[], Any]) -> Any:
    """What the first process computes or reads, of what JSON can hold, in every process; all fail where it fails.

    For what decides what is done next: a file that all read may have another length in each of them, for a moment.
    """
    return share_from_first(run_on_first_process(work))


def is_there(path: str | Path) -> bool:
    """Whether the first process sees a file or folder, in every process.

    Another may see it later, or earlier: a folder that several machines see shows each its own moment.
    """
    return bool(broadcast_from_first(is_first_process() and Path(path).exists()))


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
    message = _broadcast_text(f"{type(failure).__name__}: {failure}" if failure else "")
    if failure:
        raise failure
    if message:
        raise RuntimeError(f"the first process stopped: {message}")
    return result


def share_text(topic: str, work: Callable[[], str]) -> str:
    """The text that the first process makes, in every process; all fail where it fails. `topic` says what it is."""
    if _peers is None and not is_multiprocess():
        return work()
    return _gather_texts(topic, run_on_first_process(work) or "")[0]


def compute_on_first_process(work: Callable[[], np.ndarray], like: np.ndarray) -> np.ndarray:
    """What the first process computes, in every process; `like` is an array of its shape and type."""
    computed = run_on_first_process(work)
    return fetch_from_first(like if computed is None else np.asarray(computed, like.dtype))


def wait_for_all_processes() -> None:
    """Return when all processes are here: what each of them wrote before can be read, what it read can be replaced."""
    allgather_values([0])


def _gather_texts(topic: str, text: str) -> list[str]:
    """The text of each process."""
    if _peers is None:  # the caller has started JAX by itself
        _meet_after_jax(DistributedSection().initialization_timeout)
    assert _peers is not None
    return _peers.gather(topic, text)


def _finish() -> None:
    """At the end of the program: leave JAX together with the others, and tell them whether all was well."""
    assert _peers is not None
    error = getattr(sys, "last_value", None)  # that nobody caught
    if error is not None:
        exit_after_error(f"{type(error).__name__}: {error}", 1)
    jax.distributed.shutdown()
    _peers.leave("", 0)


def _meet(coordinator: str, num_processes: int, process_id: int, timeout: int) -> None:
    """Connect all processes at the coordinator's address, before JAX starts."""
    global _peers
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ValueError(
            f"distributed.coordinator_address = {coordinator}: give host:port of process 0, the port from 1 to 65535."
        )
    if num_processes == 1:
        if process_id > 0:
            raise ValueError(f"distributed.process_id = {process_id}, and distributed.num_processes = 1: give 0.")
        return
    connections = Peers(process_id, num_processes)
    if process_id > 0:
        connections.connect([(host, int(port))], timeout)
    else:
        try:
            connections.listen([host] if host in peers.LOOPBACK_HOSTS else None, int(port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:  # raises: says what has it
                connections.connect([(host, int(port))], peers.ANSWER_SECONDS)
            raise PeerError(
                f"distributed.coordinator_address = {coordinator}: port {port} of this machine cannot be opened "
                f"({peers.describe_socket_error(error)}). Choose a free port, the same for all processes."
            ) from error
        connections.wait_for_all(coordinator, timeout)
    _peers = connections
    atexit.register(_finish)


def _meet_after_jax(timeout: int) -> None:
    """Connect all processes once JAX has: where only the cluster knew who is the first."""
    global _peers
    if not is_multiprocess():
        return
    connections = Peers(jax.process_index(), jax.process_count())
    own_addresses = ""
    if jax.process_index() == 0:
        port = connections.listen(None, 0)
        hosts = [socket.gethostname(), *(str(entry[4][0]) for entry in _addresses_of(socket.gethostname()))]
        own_addresses = _format_addresses(list(dict.fromkeys(hosts)), port)
    addresses = json.loads(_broadcast_text(own_addresses))
    if jax.process_index() == 0:
        connections.wait_for_all(f"port {addresses[0][1]} of {addresses[0][0]}", timeout)
    else:
        connections.connect([(host, port) for host, port in addresses], timeout)
    _peers = connections
    atexit.register(_finish)


def _initialize_jax(coordinator: str, num_processes: int, process_id: int) -> None:
    """Start JAX in all processes: over the port that they met at, or as the cluster says."""
    try:
        if _peers is None:
            jax.distributed.initialize(
                None if coordinator == "auto" else coordinator,
                num_processes or None,
                process_id if process_id >= 0 else None,
            )
            return
        service = f"127.0.0.1:{_peers.jax_port}"
        # JAX warns of proxies, and gRPC would ask them for the relay of this machine
        jax.config.update("jax_check_proxy_envs", False)
        os.environ.setdefault("no_grpc_proxy", f"127.0.0.1,{os.environ.get('no_proxy', '')}")
        jax.distributed.initialize(
            service,
            num_processes,
            process_id,
            coordinator_bind_address=service,
            initialization_timeout=JAX_START_SECONDS,
            shutdown_timeout_seconds=JAX_END_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"distributed.coordinator_address = {coordinator}: the processes did not find each other ({error}). "
            "On TPU pods, SLURM, Open MPI and Kubernetes give auto; elsewhere the same host:port to all, how many "
            "they are (--distributed.num-processes), and to each its own number from 0 (--distributed.process-id)."
        ) from error


def _broadcast_bytes(content: bytes, size: int) -> bytes:
    """The first process's content, whose size all know, in every process."""
    buffer = np.zeros(1 << max(10, (size - 1).bit_length()), np.uint8)  # few sizes, as each is compiled once
    buffer[: len(content)] = np.frombuffer(content, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer)))[:size]


def _read_number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if text and not text.isdigit():
        raise ValueError(f"{variable} = {text!r}: give a whole number from 0.")
    return int(text) if text else default


def _addresses_of(host: str) -> list[Any]:
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []


def _format_addresses(hosts: list[str], port: int) -> str:
    """As many of the first hosts as `_broadcast_text` can hold, each with the port, as JSON."""
    while len(text := json.dumps([[host, port] for host in hosts])) > MAX_ERROR_BYTES:
        hosts = hosts[:-1]
    return text


def _broadcast_text(text: str) -> str:
    """The first process's text, in every process, cut at MAX_ERROR_BYTES."""
    buffer = np.zeros(MAX_ERROR_BYTES, np.uint8)
    encoded = text.encode(errors="backslashreplace")[:MAX_ERROR_BYTES]
    buffer[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    buffer = np.asarray(multihost_utils.broadcast_one_to_all(buffer))
    return bytes(buffer).rstrip(bytes(1)).decode(errors="replace")


def _describe_difference(key: str, values: list[str]) -> str:
    """`key: a in process 0, b in processes 1 and 2`."""
    holders: dict[str, list[str]] = {}
    for process, value in enumerate(values):
        holders.setdefault(value, []).append(str(process))
    parts = []
    for value, numbers in holders.items():
        shown = numbers if len(numbers) <= 4 else [*numbers[:3], f"{len(numbers) - 3} others"]
        listed = " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]
        parts.append(f"{value} in process{'es' if len(numbers) > 1 else ''} {listed}")
    return f"{key} ({', '.join(parts)})"
