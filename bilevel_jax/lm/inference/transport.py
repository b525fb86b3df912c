"""HTTP POST of JSON with bounds on size, time and redirects."""

import http.client
import json
import socket
import ssl
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from contextlib import suppress
from email.message import Message
from functools import cache, partial
from typing import IO, Any, NamedTuple

MAX_REPLY_BYTES = 2**25
"""Bytes of a reply, unpacked: 32 MiB, which log-probs of 100,000 tokens fill."""
MAX_ERROR_BYTES = 2**16
"""Bytes that are read of a reply with an error status."""


class Reply(NamedTuple):
    """What a server answered, of any status."""

    status: int
    reason: str
    headers: Message
    body: bytes
    """Of an error at most its first MAX_ERROR_BYTES."""


class TooLargeError(Exception):
    """The reply is larger than MAX_REPLY_BYTES, or is packed in a way that is not understood."""


def post_json(url: str, body: dict[str, Any], headers: dict[str, str], timeout: float) -> Reply:
    """Send a JSON object and read the reply, whatever its status. No redirect is followed.

    Args:
        url: begins with http:// or https://; proxies of the environment are used.
        body: what is sent.
        headers: beside the content type.
        timeout: seconds for all of it, from the connection to the last byte.

    Returns:
        The reply.

    Raises:
        TimeoutError: the last byte was not there in time.
        OSError: no connection, or a lost one.
        http.client.HTTPException: what came is no HTTP, or ends before its announced length.
        TooLargeError: for the size of the reply or its encoding.
    """
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for name, value in headers.items():
        request.add_unredirected_header(name, value)
    watchdog = _Watchdog(timeout)
    try:
        opener = urllib.request.build_opener(_NoRedirects, _HTTPHandler(watchdog), _HTTPSHandler(watchdog))
        try:
            with opener.open(request, timeout=timeout) as answer:
                reply = Reply(answer.status, answer.reason, answer.headers, _read(answer, answer.headers))
        except urllib.error.HTTPError as error:
            with error:
                reply = Reply(error.code, str(error.reason), error.headers, _read_error(error))
    except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:  # a socket that we closed is one
        if watchdog.expired or isinstance(getattr(error, "reason", error), TimeoutError):
            raise TimeoutError(f"no whole answer within {timeout:g} s") from None
        raise
    finally:
        watchdog.cancel()
    if watchdog.expired:  # without a length, a closed connection looks like the end
        raise TimeoutError(f"no whole answer within {timeout:g} s")
    return reply


class _Watchdog:
    """Ends the connections of a request when its time is over: a timeout of a socket bounds one read only."""

    def __init__(self, seconds: float):
        self.expired, self._lock = False, threading.Lock()
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def watch(self, sock: socket.socket) -> None:
        with self._lock:
            self._sockets.append(sock)
            if self.expired:
                _shut(sock)

    def cancel(self) -> None:
        self._timer.cancel()

    def _expire(self) -> None:
        with self._lock:
            self.expired = True
            for sock in self._sockets:
                _shut(sock)


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not that of TLS, which would wait for the peer


def _watched(connection_class: Callable[..., Any], watchdog: _Watchdog, *args: Any, **kwargs: Any) -> Any:
    connection = connection_class(*args, **kwargs)
    connect = connection.connect

    def connect_watched() -> None:
        connect()
        watchdog.watch(connection.sock)

    connection.connect = connect_watched
    return connection


class _HTTPHandler(urllib.request.HTTPHandler):
    def __init__(self, watchdog: _Watchdog):
        super().__init__()
        self._watchdog = watchdog

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(partial(_watched, http.client.HTTPConnection, self._watchdog), req)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def __init__(self, watchdog: _Watchdog):
        super().__init__(context=_tls_context())
        self._watchdog = watchdog

    def https_open(self, req: urllib.request.Request) -> Any:
        connection_class = partial(_watched, http.client.HTTPSConnection, self._watchdog)
        return self.do_open(connection_class, req, context=_tls_context())


@cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is a reply as any other: neither a prompt nor the key goes to an address that nobody named."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> None:
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _read(answer: Any, headers: Message) -> bytes:
    """All bytes of a reply, unpacked."""
    if (answer.length or 0) > MAX_REPLY_BYTES:
        raise TooLargeError(f"the answer has {answer.length:,} bytes, more than {MAX_REPLY_BYTES:,}")
    encoding = headers.get("Content-Encoding", "identity").strip()
    if encoding.lower() not in ("", "identity", "gzip"):
        raise TooLargeError(f"the answer is packed as {encoding!r}; identity was asked for, and gzip is understood")
    content = _read_up_to(answer, MAX_REPLY_BYTES + 1)
    if answer.length:
        raise http.client.IncompleteRead(content, answer.length)
    if encoding.lower() == "gzip":
        unpack = zlib.decompressobj(wbits=31)
        try:
            content = unpack.decompress(content, MAX_REPLY_BYTES + 1)
        except zlib.error:
            raise TooLargeError("the answer says that it is gzip, and is not") from None
        if not unpack.eof and len(content) <= MAX_REPLY_BYTES:
            raise http.client.IncompleteRead(content)
    if len(content) > MAX_REPLY_BYTES:
        raise TooLargeError(f"the answer has more than {MAX_REPLY_BYTES:,} bytes")
    return content


def _read_error(answer: IO[bytes]) -> bytes:
    """The beginning of an error's text, or nothing where it cannot be read: the status says enough."""
    try:
        return _read_up_to(answer, MAX_ERROR_BYTES)
    except (OSError, http.client.HTTPException, ValueError):
        return b""


def _read_up_to(answer: Any, limit: int) -> bytes:
    """By pieces as they come; `read` would reserve or wait for all of an announced length."""
    pieces, total = [], 0
    while total < limit and (piece := answer.read1(min(65536, limit - total))):
        pieces.append(piece)
        total += len(piece)
    return b"".join(pieces)
