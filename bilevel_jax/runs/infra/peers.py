"""Connections between the processes of a run: who is there, what all share, and who has died.

The processes meet here before JAX starts, because what JAX does when they do not fit together is to wait, to train on,
or to end with a C++ stack. The first process listens at the coordinator's address; every other one holds one
connection to it, its lifeline, for as long as it lives. The kernel closes the lifeline of a process that dies, and
keepalive packets notice a machine that is gone, so every other process knows within seconds, even inside a collective
that never returns; no process has to answer in time, so a busy one is never taken for dead.

JAX's coordination service listens on the loopback interface of the first process's machine. The other processes reach
it through the port of the coordinator's address: each connects to a relay of its own, which passes the bytes on. Of a
first process that dies JAX sees nothing, as the relay stays open, and the lifeline ends the process with a sentence
before JAX can abort it. Whoever reaches the port is taken at its word: the network has to be a trusted one.

Messages are lines of JSON.
"""

import asyncio
import contextlib
import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent import futures
from typing import Any, NoReturn

PROTOCOL = "bilevel-jax peers 1"
ANSWER_SECONDS = 10.0
"""Seconds within which a program that accepts a connection must say that it is a process of bilevel-jax."""
RETRY_SECONDS = 0.25
"""Seconds between two tries to connect."""
NOTICE_SECONDS = 10.0
"""Seconds after which a process says, once, what it waits for."""
FAREWELL_SECONDS = 20.0
"""Longest wait, in seconds, of the first process for the others at the end of a run."""
MAX_MESSAGE_BYTES = 1 << 26
"""Longest message: the configs of all processes, where they differ."""
MAX_REASON_CHARACTERS = 1000
"""Longest error message that the other processes receive."""
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 15_000}
"""Socket options by which a machine that vanished is noticed in 15 seconds; systems have some of them."""
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
RESUME_HINT = "What was saved is whole: start all processes again, with --resume where the run had begun."


class PeerError(ValueError):
    """The processes do not fit together, or one of them has ended."""


class Peers:
    """This process's connections to the others. All methods but the private ones are for the main thread.

    A process that dies or stops with an error ends all others: where the main thread waits here, by a `PeerError`;
    elsewhere by a sentence on stderr and exit code 1, whatever the main thread does.
    """

    def __init__(self, process_id: int, num_processes: int):
        self.process_id, self.num_processes = process_id, num_processes
        self.name = f"PID {os.getpid()} on {socket.gethostname()}"
        self.jax_port = 0
        """The port of this machine where JAX finds its coordination service."""
        self._names = {process_id: self.name}
        """Of the processes that have come; of the first process alone."""
        self._lines: dict[int, asyncio.StreamWriter] = {}
        """To every other process, in the first; to the first process (0) in the others."""
        self._finished: set[int] = set()
        self._is_complete = False
        self._gathered: dict[str, dict[int, str]] = {}
        self._futures: dict[str, futures.Future] = {}
        self._tasks: set[asyncio.Task] = set()
        self._relayed: list[asyncio.StreamWriter] = []
        """To JAX in this process: a writer that nothing holds is closed."""
        self._last_word = threading.Lock()
        """Held by what says why this process ends; never released."""
        self.is_leaving = False
        """Whether this process ends of itself; what the others do is then no matter."""
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="peers", daemon=True).start()

    # --- the main thread

    def listen(self, hosts: list[str] | None, port: int) -> int:
        """Open the first process's port, 0 for any, on the given addresses of this machine (None: all).

        Returns the port. Raises OSError where it is in use or not of this machine.
        """

        async def open_port() -> int:
            if port:
                await asyncio.start_server(self._serve, hosts, port, limit=MAX_MESSAGE_BYTES)
                return port
            # one socket: each of two would get a port of its own
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            opened = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
            await asyncio.start_server(self._serve, sock=opened, limit=MAX_MESSAGE_BYTES)
            return opened.getsockname()[1]

        self.jax_port = find_free_port()
        self._futures["everyone"] = futures.Future()
        return self._run(open_port())

    def wait_for_all(self, address: str, timeout: float) -> None:
        """In the first process: wait until all others have come. Raises PeerError for a wrong one, or none."""

        def missing() -> str:
            absent = sorted(set(range(self.num_processes)) - set(self._names))
            shown = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
            return f"{'process' if len(absent) == 1 else 'processes'} {shown} of {self.num_processes}"

        self._run(self._check_complete())
        notice = f"waiting at {address} for {{}}"
        if not self._wait("everyone", timeout, lambda: notice.format(missing())):
            sentence = (
                f"{address}: {missing()} did not come within {timeout:.0f} s. Start it with the same "
                "--distributed.coordinator-address and --distributed.num-processes, and see what it says."
            )
            self._run(self._stop_others(sentence))
            raise PeerError(sentence)

    def connect(self, addresses: list[tuple[str, int]], timeout: float) -> None:
        """In the other processes: connect to the first at one of its addresses, and wait until all have come.

        Raises PeerError where it is not there in time, where another program answers, or where it refuses.
        """
        shown = " or ".join(f"{host}:{port}" for host, port in addresses)
        self._futures["everyone"] = futures.Future()
        start = time.monotonic()
        reason = self._run(self._connect(addresses, timeout, f"process 0 at {shown}"))
        if reason:
            raise PeerError(
                f"{shown}: process 0 of the run did not answer within {timeout:.0f} s ({reason}). See what it says; "
                "all processes need the same --distributed.coordinator-address, the host and a free port of process 0."
            )
        remaining = max(timeout - (time.monotonic() - start), 1.0) + ANSWER_SECONDS  # the first gives up before
        if not self._wait("everyone", remaining, lambda: f"waiting at {shown} for the other processes"):
            raise PeerError(f"{shown}: the other processes did not come within {timeout:.0f} s; see what they say.")

    def gather(self, topic: str, value: str) -> list[str]:
        """The values that all processes give under a topic of their own, by process. All call this."""
        self._futures[topic] = futures.Future()
        if self.process_id == 0:
            self._run(self._collect(topic, 0, value))
        else:
            self._run(self._send(0, {"gather": topic, "value": value}))
        message = self._futures[topic].result()
        del self._futures[topic]
        return [message["values"][index] for index in message["indices"]]

    def agree_to_stop(self) -> None:
        """Note that all processes stop with the same error, so that none speaks of another's."""
        self.is_leaving = True

    def take_last_word(self) -> bool:
        """Whether the main thread is the one to say why this process ends."""
        return self._last_word.acquire(blocking=False)

    def leave(self, reason: str, code: int) -> None:
        """Tell the others that this process ends: well ("") or with an error and an exit code, which ends them, too."""
        self.is_leaving = True
        with contextlib.suppress(OSError):
            self._run(self._leave(reason[:MAX_REASON_CHARACTERS], code), timeout=FAREWELL_SECONDS + 1)

    def _run(self, work: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def _wait(self, topic: str, timeout: float, notice: Callable[[], str]) -> bool:
        """Whether a message came in time; says once what is waited for."""
        for seconds in (min(NOTICE_SECONDS, timeout), max(timeout - NOTICE_SECONDS, 0.0)):
            try:
                self._futures[topic].result(seconds)
            except futures.TimeoutError:
                if seconds == NOTICE_SECONDS < timeout:
                    say(f"{notice()}; up to {timeout:.0f} s")
            else:
                return True
        return False

    # --- the first process

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Whoever connects: another process, its relay, or a stranger."""
        hello = await _read_message(reader, ANSWER_SECONDS)
        if not hello or not _is_hello(hello):
            writer.close()
        elif hello["role"] == "relay":
            await self._relay_to_service(reader, writer)
        else:
            await self._accept(hello, reader, writer)

    async def _accept(self, hello: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, count, name = hello["process"], hello["processes"], hello["name"]
        problem = ""
        if self._is_complete:
            problem = (
                f"a run whose {self.num_processes} processes are all there has this port (process 0 is {self.name}). "
                "Choose another port for another run."
            )
        elif count != self.num_processes:
            problem = (
                f"distributed.num_processes is {self.num_processes} in process 0 ({self.name}) and {count} in process "
                f"{number} ({name}). Give all processes the same number."
            )
        elif not 0 <= number < count:
            problem = f"distributed.process_id = {number} ({name}): number the {count} processes from 0 to {count - 1}."
        elif number in self._names:
            problem = (
                f"two processes have distributed.process_id = {number}: {self._names[number]}, and {name}. Number the "
                f"{count} processes from 0 to {count - 1}, each number once."
            )
        if problem:
            await _write_message(writer, {"stop": problem, "code": 1})
            writer.close()
            if not self._is_complete:
                await self._stop_others(problem)
                self._fail(problem)
            return
        set_keepalive(writer)
        self._names[number], self._lines[number] = name, writer
        await _write_message(writer, {"protocol": PROTOCOL})
        await self._check_complete()
        while (message := await _read_message(reader)) is not None:
            if "gather" in message:
                await self._collect(message["gather"], number, message["value"])
            elif "leave" in message:
                self._finished.add(number)
                if message["leave"]:
                    await self._lose(number, f"process {number} ({name}) stopped: {message['leave']}", message["code"])
                break
        writer.close()
        if number not in self._finished:
            self._finished.add(number)
            await self._lose(
                number,
                f"process {number} of {self.num_processes} ({name}) ended without a word: it was killed, or its "
                f"machine or the network failed. {RESUME_HINT}",
            )

    async def _check_complete(self) -> None:
        everyone = self._futures["everyone"]
        if len(self._names) == self.num_processes and not self._is_complete and not everyone.done():
            self._is_complete = True
            everyone.set_result({})
            await self._tell_others({"go": True})

    async def _collect(self, topic: str, number: int, value: str) -> None:
        values = self._gathered.setdefault(topic, {})
        values[number] = value
        if len(values) == self.num_processes:
            unique = list(dict.fromkeys(values.values()))
            places = {value: place for place, value in enumerate(unique)}
            message = {"gathered": topic, "values": unique, "indices": [places[values[n]] for n in sorted(values)]}
            del self._gathered[topic]
            await self._tell_others(message)
            self._futures[topic].set_result(message)

    async def _lose(self, number: int, sentence: str, code: int = 1) -> None:
        await self._stop_others(sentence, code, besides=number)
        self._fail(sentence, code)

    async def _stop_others(self, sentence: str, code: int = 1, besides: int = 0) -> None:
        await self._tell_others({"stop": sentence, "code": code}, besides)

    async def _tell_others(self, message: dict[str, Any], besides: int = 0) -> None:
        for number, writer in list(self._lines.items()):
            if number != besides and number not in self._finished:
                await _write_message(writer, message)

    async def _relay_to_service(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what another process's JAX says to the coordination service, which may not have started yet."""
        for _ in range(int(60 / RETRY_SECONDS)):
            try:
                service_reader, service_writer = await asyncio.open_connection("127.0.0.1", self.jax_port)
            except OSError:
                await asyncio.sleep(RETRY_SECONDS)
            else:
                await _write_message(writer, {"protocol": PROTOCOL})
                await asyncio.gather(_pump(reader, service_writer), _pump(service_reader, writer))
                return
        writer.close()

    # --- the other processes

    async def _connect(self, addresses: list[tuple[str, int]], timeout: float, awaited: str) -> str:
        """Why there is no connection; "" where there is one."""
        deadline, reason, was_noted = time.monotonic() + timeout, "", False
        notice_time = time.monotonic() + NOTICE_SECONDS
        while True:
            for host, port in addresses:
                try:
                    reader, writer = await asyncio.open_connection(host, port, limit=MAX_MESSAGE_BYTES)
                except OSError as error:
                    reason = describe_socket_error(error)
                    continue
                self._open_line(await self._greet(reader, writer, f"{host}:{port}"), writer)
                await self._open_relay(host, port)
                return ""
            if time.monotonic() > deadline:
                return reason
            if time.monotonic() > notice_time and not was_noted:
                was_noted = True
                say(f"waiting for {awaited} ({reason}); up to {timeout:.0f} s")
            await asyncio.sleep(RETRY_SECONDS)

    async def _greet(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str
    ) -> asyncio.StreamReader:
        await _write_message(writer, self._hello("lifeline"))
        answer = await _read_message(reader, ANSWER_SECONDS)
        if answer and answer.get("protocol") == PROTOCOL:
            return reader
        writer.close()
        if answer and "stop" in answer:
            raise PeerError(f"{address}: {answer['stop']}")
        raise PeerError(
            f"{address}: what answers there is not process 0 of a run of this version. Another program may have the "
            "port: choose one that is free on that machine, the same for all processes."
        )

    def _open_line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        set_keepalive(writer)
        self._lines[0] = writer
        task = self._loop.create_task(self._listen_to_first(reader))
        self._tasks.add(task)  # the loop itself holds tasks weakly

    async def _listen_to_first(self, reader: asyncio.StreamReader) -> None:
        while (message := await _read_message(reader)) is not None:
            if "go" in message:
                self._is_complete = True
                self._futures["everyone"].set_result(message)
            elif "gathered" in message:
                self._futures[message["gathered"]].set_result(message)
            elif "stop" in message:
                self._finished.add(0)
                self._fail(message["stop"], message["code"])
            elif "leave" in message:
                self._finished.add(0)
        self._lines[0].close()
        if 0 not in self._finished:
            self._fail(
                f"process 0 of {self.num_processes} ended without a word: it was killed, or its machine or the network "
                f"failed. {RESUME_HINT}"
            )

    async def _open_relay(self, host: str, port: int) -> None:
        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                up_reader, up_writer = await asyncio.open_connection(host, port)
                await _write_message(up_writer, self._hello("relay"))
                await up_reader.readline()
            except OSError:
                return  # the first process is gone; the lifeline says so
            # what JAX has here stays open when the first process goes: JAX would abort before a word was said
            self._relayed.append(writer)
            await asyncio.gather(_pump(reader, up_writer), _pump(up_reader, writer, close=False))

        server = await asyncio.start_server(relay, "127.0.0.1", 0)
        self.jax_port = server.sockets[0].getsockname()[1]

    async def _send(self, number: int, message: dict[str, Any]) -> None:
        await _write_message(self._lines[number], message)

    # --- all

    def _hello(self, role: str) -> dict[str, Any]:
        return {
            "protocol": PROTOCOL,
            "role": role,
            "process": self.process_id,
            "processes": self.num_processes,
            "name": self.name,
        }

    async def _leave(self, reason: str, code: int) -> None:
        if self.process_id > 0:
            await self._send(0, {"leave": reason, "code": code})
            self._lines[0].close()
            await self._lines[0].wait_closed()
            return
        if reason:
            await self._stop_others(f"process 0 ({self.name}) stopped: {reason}", code)
            return
        # the last bytes of JAX's farewell pass through this process: it goes last
        for _ in range(int(FAREWELL_SECONDS / 0.02)):
            if len(self._finished) >= self.num_processes - 1:
                break
            await asyncio.sleep(0.02)
        await self._tell_others({"leave": ""})

    def _fail(self, sentence: str, code: int = 1) -> None:
        """End this process, by the waiting main thread or without it."""
        if self.is_leaving:
            return
        waiting = [future for future in self._futures.values() if not future.done()]
        for future in waiting:
            future.set_exception(PeerError(sentence))
        if not waiting:
            if not self._last_word.acquire(blocking=False):
                return  # the main thread is saying why
            end_process(sentence, code)


def end_process(sentence: str, code: int) -> NoReturn:
    """Say why, and end the process at once: the main thread may wait in a collective for ever."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K\x1b[?25h")  # a progress bar has hidden the cursor
    say(sentence)
    sys.stdout.flush()
    os._exit(code)


def say(sentence: str) -> None:
    """One line on stderr, from any thread."""
    with contextlib.suppress(OSError, ValueError):  # closed
        sys.stderr.write(f"bilevel-jax: {sentence}\n")
        sys.stderr.flush()


def find_free_port() -> int:
    """A port of the loopback interface that nothing has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def describe_socket_error(error: OSError) -> str:
    """The system's words, without Python's around them."""
    number = error.errno or 0
    return os.strerror(number) if number in errno.errorcode else error.strerror or str(error)


def set_keepalive(writer: asyncio.StreamWriter) -> None:
    """Have the kernel notice a machine that is gone."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if name in vars(socket):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _is_hello(message: dict[str, Any]) -> bool:
    """Whether a message is what a process of this version says first."""
    kinds = {"role": str, "process": int, "processes": int, "name": str}
    return message.get("protocol") == PROTOCOL and all(isinstance(message.get(key), kinds[key]) for key in kinds)


async def _read_message(reader: asyncio.StreamReader, timeout: float | None = None) -> dict[str, Any] | None:
    """The next message; None at the end, after `timeout`, and for what is no message."""
    try:
        line = await asyncio.wait_for(reader.readline(), timeout)
        message = json.loads(line) if line.endswith(b"\n") else None
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None


async def _write_message(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # gone: its reader says so
        writer.write(json.dumps(message).encode() + b"\n")
        await asyncio.wait_for(writer.drain(), ANSWER_SECONDS)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, close: bool = True) -> None:
    """Pass bytes on until the end."""
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    if close:
        writer.close()
