"""The processes of a run as objects of one process: they meet, agree, and hear of each other's end within seconds.

test_distributed_slow starts real processes, and kills them.
"""

import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bilevel_jax.runs.config.schema import DistributedSection
from bilevel_jax.runs.infra import distributed, peers
from bilevel_jax.runs.infra.peers import PeerError, Peers

HOST = "127.0.0.1"
KEPT: list[Peers] = []
"""Connections end with their process: that of the tests keeps them to its end."""


@pytest.fixture
def ended(monkeypatch):
    """The (sentence, exit code) of each process that would have been ended."""
    sentences: list[tuple[str, int]] = []
    monkeypatch.setattr(peers, "end_process", lambda sentence, code: sentences.append((sentence, code)))
    return sentences


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def start(numbers, *, counts=None, timeout=5.0):
    """(the processes, what each raised or None); `counts` are those that the processes were given."""
    port, counts = free_port(), counts or [len(numbers)] * len(numbers)
    processes = [Peers(number, count) for number, count in zip(numbers, counts, strict=True)]
    KEPT.extend(processes)

    def meet(process):
        try:
            if process is processes[0]:
                process.listen([HOST], port)
                process.wait_for_all(f"{HOST}:{port}", timeout)
            else:
                process.connect([(HOST, port)], timeout)
        except PeerError as error:
            return str(error)

    with ThreadPoolExecutor(len(numbers)) as pool:
        return processes, list(pool.map(meet, processes))


def everywhere(processes, work):
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(work, processes))


def test_all_get_what_each_gives_in_the_order_of_their_numbers(ended):
    processes, errors = start([0, 2, 1])
    assert errors == [None] * 3
    for topic in ("one", "two"):
        found = everywhere(processes, lambda process, topic=topic: process.gather(topic, f"{process.process_id % 2}"))
        assert found == [["0", "1", "0"]] * 3
    long = "x" * 200_000  # longer than a stream's usual limit of a line
    assert everywhere(processes, lambda process: process.gather("long", long)) == [[long] * 3] * 3
    everywhere(processes[::-1], lambda process: process.leave("", 0))
    assert not ended


@pytest.mark.parametrize(
    "numbers, counts, words",
    [
        ([0, 1, 1], None, "two processes have distributed.process_id = 1: PID .* and PID .*from 0 to 2"),
        ([0, 1], [2, 3], "distributed.num_processes is 2 in process 0 .* and 3 in process 1"),
        ([0, 2], None, "distributed.process_id = 2 .*: number the 2 processes from 0 to 1"),
    ],
    ids=["a number twice", "another count", "a number beyond"],
)
def test_processes_that_do_not_fit_all_hear_why(numbers, counts, words, ended):
    _, errors = start(numbers, counts=counts)
    sentences = [error for error in errors if error] + [sentence for sentence, _ in ended]
    assert len(sentences) == len(numbers)
    for sentence in sentences:
        assert re.search(words, sentence), sentence


def test_a_process_that_does_not_come_is_named(monkeypatch, capsys, ended):
    monkeypatch.setattr(peers, "NOTICE_SECONDS", 0.6)
    _, errors = start([0, 1], counts=[3, 3], timeout=1.0)
    assert "process 2 of 3 did not come within 1 s" in errors[0] and errors[1] == errors[0]
    assert "for process 2 of 3; up to 1 s" in capsys.readouterr().err
    with pytest.raises(PeerError, match="process 0 of the run did not answer within 0 s .Connection refused"):
        Peers(1, 2).connect([(HOST, free_port())], 0.3)


def test_who_dies_or_fails_ends_all_others(ended):
    for number, end, words, code in (
        (1, "dies", "process 1 of 3 (PID", 1),
        (1, "leaves", "process 1 (PID {} on {}) stopped: no file", 143),
        (0, "leaves", "process 0 (PID {} on {}) stopped: no file", 143),
        (0, "dies", "process 0 of 3 ended without a word: it was killed", 1),
    ):
        ended.clear()
        processes, _ = start([0, 1, 2])
        loser = processes[number]
        if end == "leaves":
            loser.leave("no file", 143)
        else:
            loser.is_leaving, loser._finished = True, {0, 1, 2}  # the dead say nothing, and hear nothing
            for writer in loser._lines.values():  # as the kernel does
                loser._loop.call_soon_threadsafe(writer.transport.abort)
        deadline = time.monotonic() + 5
        while len(ended) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        name = loser.name.removeprefix("PID ").split(" on ")
        assert len(ended) == 2 and all(words.format(*name) in sentence for sentence, _ in ended), ended
        assert {exit_code for _, exit_code in ended} == {code}


def test_who_waits_for_the_others_hears_of_an_end_by_an_error(ended):
    processes, _ = start([0, 1])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(processes[0].gather, "tokens", "a")
        time.sleep(0.1)
        processes[1].leave("no such file", 1)
        with pytest.raises(PeerError, match="process 1 .* stopped: no such file"):
            waiting.result(5)
    assert not ended


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.0 400 Bad Request\r\n\r\n", b"{}\n", b"\xff\n", None], ids=repr)
def test_another_program_at_the_port_is_told(answer, monkeypatch):
    """It closes (b""), says something else, or nothing at all (None): for both processes."""
    monkeypatch.setattr(peers, "ANSWER_SECONDS", 0.3)
    with socket.create_server((HOST, 0)) as program:

        def serve():
            open_connections = []
            for _ in range(2):
                connection, _ = program.accept()
                open_connections.append(connection)
                if answer is not None:
                    connection.recv(100)
                    connection.sendall(answer)
                    connection.close()
            time.sleep(0.5)
            for connection in open_connections:
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"{HOST}:{program.getsockname()[1]}"
        for number in (1, 0):
            with pytest.raises(ValueError, match=f"{address}: what answers there is not process 0.*Another program"):
                distributed._meet(address, 2, number, 5)
        thread.join()


def test_another_run_at_the_port_is_told_and_goes_on(ended):
    processes, _ = start([0, 1])
    port = processes[0]._run(_port_of(processes[0]))
    for number in (1, 0):
        with pytest.raises(ValueError, match="a run whose 2 processes are all there has this port .*another port"):
            distributed._meet(f"{HOST}:{port}", 2, number, 5)
    assert everywhere(processes, lambda process: process.gather("on", "and on")) == [["and on"] * 2] * 2
    assert not ended


def test_strangers_at_the_port_disturb_nobody(ended):
    port, first = free_port(), Peers(0, 2)
    first.listen([HOST], port)
    for greeting in (b"GET / HTTP/1.0\r\n\r\n", b"[]\n", b'{"protocol": "other"}\n', b"", b"\0" * 1000 + b"\n"):
        with socket.create_connection((HOST, port)) as stranger:
            stranger.sendall(greeting)
    other = Peers(1, 2)
    with ThreadPoolExecutor(2) as pool:
        both = pool.submit(first.wait_for_all, "here", 5), pool.submit(other.connect, [(HOST, port)], 5)
        assert [one.result(5) for one in both] == [None, None] and not ended


def test_addresses_that_are_none_are_told():
    for address in ("host", "host:", ":80", "host:0", "host:70000", "host:http"):
        with pytest.raises(ValueError, match="give host:port of process 0"):
            distributed._meet(address, 2, 1, 1)
    with pytest.raises(ValueError, match="process_id = 1, and distributed.num_processes = 1"):
        distributed._meet("host:80", 1, 1, 1)


def test_variables_that_are_no_numbers_are_told(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES = 'two': give a whole number"):
        distributed.initialize_distributed(DistributedSection(coordinator_address="host:80"))


def test_the_relay_passes_on_what_jax_says(ended):
    """Bytes to a service that starts late and back; the relay stays open when the first process dies."""
    processes, _ = start([0, 1])
    with socket.create_connection((HOST, processes[1].jax_port)) as client:
        client.sendall(b"question")
        time.sleep(0.1)
        with socket.create_server((HOST, processes[0].jax_port)) as service:
            connection, _ = service.accept()
            with connection:
                assert connection.recv(100) == b"question"
                connection.sendall(json.dumps({"any": "bytes"}).encode())
                assert client.recv(100) == b'{"any": "bytes"}'
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(100)  # the service is gone, and JAX does not see it


async def _port_of(process: Peers) -> int:
    return process._lines[1].get_extra_info("sockname")[1]


@pytest.mark.parametrize(
    "hello", [{}, {"role": "relay"}, {"role": "process", "process": "x", "processes": 2, "name": ""}]
)
def test_a_first_message_that_lacks_something_is_hung_up_on(hello):
    first = Peers(0, 2)
    KEPT.append(first)
    port = first.listen([HOST], 0)
    with socket.create_connection((HOST, port), timeout=5) as stranger:
        stranger.sendall(json.dumps({"protocol": peers.PROTOCOL, **hello}).encode() + b"\n")
        assert stranger.recv(1) == b""
