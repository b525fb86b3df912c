"""The lock of a folder on object storage: a lease that its owner renews."""

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from bilevel_jax.storage.objects import ObjectStore, StorageError

LOCK_NAME = re.compile(r"\.lock\.(?P<number>[0-9]{8})")
RENEW_SECONDS = 10.0
"""Seconds between two renewals of a lease by its owner."""
LEASE_SECONDS = 60.0
"""Seconds after which a lease that is not renewed is another's to take."""
POLL_SECONDS = 1.0
"""Seconds between two looks at the lease of another process."""


class LeaseLostError(RuntimeError):
    """Another process has taken the folder over; what this one would write now could spoil that one's work."""


class Lease:
    """The right to write below a URL, for as long as it is renewed.

    Each lease is an object `.lock.N`; the highest number counts, and a number is made by one process alone, with a
    conditional write. A lease that does not change for LEASE_SECONDS, by the clock of the one who waits, is of a
    process that has died: no two clocks are compared. On the machine of a process that has died no one waits.
    """

    def __init__(self, store: ObjectStore, number: int, token: str):
        self._store, self._number, self._token = store, number, token
        self._renewals, self._renewed = 0, time.monotonic()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._lost: Exception | None = None
        self._thread = threading.Thread(target=self._renew_often, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseLostError where another process may have taken the folder over; called before each try of a write.

        Whose last renewal is older than half of LEASE_SECONDS (the server was away, or this machine asleep) renews it
        first, and writes only when that went through in time.
        """
        while self._is_old():
            self._renew(only_old=True)
        if self._lost is not None:
            raise self._lost

    def _is_old(self) -> bool:
        return self._lost is None and time.monotonic() - self._renewed > LEASE_SECONDS / 2

    def release(self) -> None:
        """Let the next process have the folder."""
        self._ended.set()
        self._thread.join()
        with self._lock, contextlib.suppress(StorageError):
            if self._lost is None:
                self._store.write(_lock_name(self._number), _format_lock(self._token, is_free=True))

    def _renew(self, *, only_old: bool = False) -> None:
        with self._lock:
            if only_old and not self._is_old():  # another thread has renewed it
                return
            self._look()
            self._renewals += 1
            asked = time.monotonic()
            self._store.write(_lock_name(self._number), _format_lock(self._token, self._renewals))
            self._look()  # another process may have come before the write, which may have been tried for minutes
            self._renewed = asked

    def _look(self) -> None:
        if _last_number(self._store) != self._number:
            self._lost = LeaseLostError(
                f"{self._store.url} was taken over by another process, as this one was silent for more than "
                f"{LEASE_SECONDS:g} s. Let that one go on."
            )
            raise self._lost

    def _renew_often(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            with contextlib.suppress(StorageError, LeaseLostError):  # `check` says it where the work is
                self._renew()


@contextlib.contextmanager
def hold(store: ObjectStore, say: Callable[[str], None] = lambda text: None) -> Iterator[Lease]:
    """Hold what lies below a URL for this process; a second one is refused, a dead one's lease is taken over.

    Waits up to LEASE_SECONDS where another process may be alive, and tells `say` so.

    Raises:
        RuntimeError: where another process holds it.
    """
    lease = _take(store, say)
    try:
        yield lease
    finally:
        lease.release()


def _take(store: ObjectStore, say: Callable[[str], None]) -> Lease:
    token = secrets.token_hex(8)
    while True:
        number = _last_number(store)
        if number and not _wait_until_free(store, number, say):
            continue  # it has gone while we looked
        if store.create(_lock_name(number + 1), _format_lock(token)):
            if store.create(_lock_name(number + 1), _format_lock(token, renewals=1)):
                store.remove([_lock_name(number + 1)])
                raise StorageError(
                    f"{store.url}: the server lets two processes create one object, so that none can hold the folder "
                    "for itself. Use storage with conditional writes (If-None-Match), or a folder of this machine."
                )
            store.remove(_lock_name(old) for old in range(max(1, number - 1), number + 1))
            return Lease(store, number + 1, token)


def _wait_until_free(store: ObjectStore, number: int, say: Callable[[str], None]) -> bool:
    """Whether the lease has ended; False where there is none any more. Raises RuntimeError where it is renewed."""
    name, first = _lock_name(number), None
    start, has_said = time.monotonic(), False
    while True:
        content = store.read_or_none(name)
        if content is None:
            return False
        holder = _read_lock(content)
        if holder.get("is_free") or _is_dead_here(holder):
            return True
        owner = f"process {holder.get('process', '?')} on {holder.get('machine', '?')}"
        if first is not None and content != first:
            raise RuntimeError(f"{store.url} is in use by {owner}; wait, stop it, or choose another folder.")
        first = content
        if time.monotonic() - start > LEASE_SECONDS:
            say(
                f"{store.url} was held by {owner}, which has given no sign of life for {LEASE_SECONDS:g} s: taken over."
            )
            return True
        if not has_said:
            has_said = True
            say(f"{store.url} is held by {owner}; looking whether it is alive, for up to {LEASE_SECONDS:g} s")
        time.sleep(POLL_SECONDS)


def _last_number(store: ObjectStore) -> int:
    found = [LOCK_NAME.fullmatch(name) for name in store.list_names()]
    return max((int(match["number"]) for match in found if match), default=0)


def _lock_name(number: int) -> str:
    return f".lock.{number:08d}"


def _format_lock(token: str, renewals: int = 0, *, is_free: bool = False) -> bytes:
    lock = {
        "process": os.getpid(), "machine": socket.gethostname(), "space": _process_space(), "token": token,
        "renewals": renewals, "is_free": is_free,
    }  # fmt: skip
    return json.dumps(lock).encode()


def _read_lock(content: bytes) -> dict[str, Any]:
    try:
        lock = json.loads(content)
    except ValueError:
        return {}
    return lock if isinstance(lock, dict) else {}


def _process_space() -> str:
    """What tells this start of this machine, and this container, from others; "" where nothing does."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _is_dead_here(holder: dict[str, Any]) -> bool:
    """Whether the holder ran where this process runs, and has ended."""
    process, space = holder.get("process"), _process_space()
    if not space or holder.get("space") != space or not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
