"""Objects below a URL: written whole, listed and removed, with bounded retries."""

import contextlib
import errno
import functools
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from bilevel_jax.storage import urls

ResultT = TypeVar("ResultT")
Check = Callable[[], None]
"""Raises where this process may write no more; it is called before every try of a write, however long it waited."""
RETRY_SECONDS = 300.0
"""Seconds after which a request that the server keeps refusing is given up."""
FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS = 0.5, 30.0
"""The mean wait before a second try is half of the first; it doubles up to the second."""
PARALLEL_TRANSFERS = 8
"""Objects of one folder that are moved at once."""
THROTTLING_CODES = {
    "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "RequestTimeout",
    "ServiceUnavailable", "InternalError", "ConditionalRequestConflict", "OperationAborted", "503", "500", "429",
}  # fmt: skip
LIBRARIES = {"aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs", "urllib3"}
"""Whose errors, beside OSError, are a server's answer; any other, such as a signal handler's, is its caller's."""
LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
"""What a full disk of this machine says; no server does."""
FINAL_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


_is_stopping = threading.Event()


def stop_trying() -> None:
    """Have each request be made once, and waits for another try end: the program is to end at once."""
    _is_stopping.set()


def try_again() -> None:
    """Undo `stop_trying`."""
    _is_stopping.clear()


class StorageError(OSError):
    """A server did not do what was asked; one sentence with what was asked, its answer and the remedy."""


class ObjectStore:
    """The objects below a URL, by name. Each is written whole or not at all; a folder is what names have in common.

    Example:
        >>> store = ObjectStore("memory://docs/run")
        >>> store.write("log.jsonl", b"{}")
        >>> store.read("log.jsonl"), store.list_all(), store.create("log.jsonl", b"other")
        (b'{}', {'log.jsonl': 2}, False)
        >>> store.remove(["log.jsonl"])
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._filesystem, self._root = urls.open_filesystem(self.url)
        self._is_away = False
        """Whether a request was given up: the next ones are not made again and again, so that the program ends."""

    def url_of(self, name: str) -> str:
        """The URL of an object."""
        return urls.join_url(self.url, name)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}" if name else self._root.rstrip("/")

    def read(self, name: str) -> bytes:
        """What an object holds. Raises FileNotFoundError."""
        return self._try("read", name, lambda: self._filesystem.cat_file(self._path(name)))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end` of an object."""
        return self._try("read", name, lambda: self._filesystem.cat_file(self._path(name), start=start, end=end))

    def write(self, name: str, data: bytes) -> None:
        """Write an object whole, over one of its name."""
        self._try("written", name, lambda: self._filesystem.pipe_file(self._path(name), data))

    def create(self, name: str, data: bytes) -> bool:
        """Write an object where there is none of its name, and say whether there was none: one of several wins."""

        def create() -> bool:
            try:
                self._filesystem.pipe_file(self._path(name), data, mode="create")
            except Exception as error:
                if isinstance(error, FileExistsError) or status_of(error) == 412:
                    return False
                raise
            return True

        # an answer that was lost on its way makes a second try see the object of the first
        return self._try("created", name, create) or self.read_or_none(name) == data

    def read_or_none(self, name: str) -> bytes | None:
        """What an object holds; None where there is none."""
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name."""

        def exists() -> bool:
            try:
                return self._filesystem.info(self._path(name))["type"] == "file"  # isfile() hides a busy server
            except FileNotFoundError:
                return False

        return self._try("looked for", name, exists)

    def list_all(self, folder: str = "") -> dict[str, int]:
        """Name -> size of every object below a folder, in order, but for what a console makes to show a folder.

        Raises StorageError for a name that would be no file inside of a folder of this machine, such as ../x.
        """
        prefix = self._path("") + "/"

        def list_objects() -> dict[str, int]:
            found = self._filesystem.find(self._path(folder), detail=True)
            return {
                path.removeprefix(prefix): int(entry["size"] or 0)
                for path, entry in sorted(found.items())
                if path.startswith(prefix)
            }

        found = self._try("listed", folder, list_objects)
        names = {name: size for name, size in found.items() if size or not name.endswith("/")}
        for name in names:
            if "\0" in name or {"", ".", ".."} & set(name.split("/")):
                raise StorageError(
                    f"{self.url} holds an object {name!r}, whose name has a part that is empty, . or .., so that no "
                    "file of this machine can stand for it. Remove it, or name another folder."
                )
        return names

    def list_names(self, folder: str = "") -> list[str]:
        """The first parts of the names below a folder, without what lies deeper."""

        def list_names() -> list[str]:
            try:
                entries = self._filesystem.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                return []
            prefix = self._path(folder) + "/"
            names = {entry.rstrip("/").removeprefix(prefix) for entry in entries if entry.startswith(prefix)}
            return sorted(name for name in names if name)

        return self._try("listed", folder, list_names)

    def upload(self, file: Path, name: str, check: Check | None = None) -> None:
        """Write an object that holds what a file of this machine holds."""
        self._try("written", name, lambda: self._filesystem.put_file(str(file), self._path(name)), check)

    def upload_all(self, files: dict[str, Path], check: Check | None = None) -> None:
        """As `upload` for name -> file, several at once."""
        _run_parallel(lambda name: self.upload(files[name], name, check), files)

    def download(self, name: str, file: Path) -> None:
        """Write a file of this machine that holds what an object holds; whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.{os.getpid()}.part")
        try:
            self._try("read", name, lambda: self._filesystem.get_file(self._path(name), str(part)))
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)

    def download_all(self, files: dict[str, Path]) -> None:
        """As `download` for name -> file, several at once."""
        _run_parallel(lambda name: self.download(name, files[name]), files)

    def remove(self, names: Iterable[str], check: Check | None = None) -> None:
        """Remove objects; one that is not there is no error."""

        def remove(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._filesystem.rm_file(self._path(name))

        _run_parallel(lambda name: self._try("removed", name, lambda: remove(name), check), list(names))

    def _try(self, done: str, name: str, request: Callable[[], ResultT], check: Check | None = None) -> ResultT:
        """What a request returns; it is made again while the server is busy or cannot be reached."""
        start, wait, tries = time.monotonic(), FIRST_WAIT_SECONDS, 0
        while True:
            tries += 1
            if check is not None:
                check()
            try:
                answer = request()
                self._is_away = False
                return answer
            except FileNotFoundError as error:
                if done == "read":
                    raise FileNotFoundError(f"{self.url_of(name)}: there is no such object.") from None
                raise StorageError(
                    f"{self.url_of(name)} could not be {done}: {_describe(error)}. Make the bucket, or name another."
                ) from error
            except Exception as error:
                if not _is_answer(error):
                    raise
                elapsed = time.monotonic() - start
                if not is_transient(error):
                    raise StorageError(
                        f"{self.url_of(name)} could not be {done}: {_describe(error)}. What was written before is "
                        f"intact. Look at the permissions of the bucket, and at {urls.credentials_hint(self.url)}; "
                        "a run goes on with --resume."
                    ) from error
                if elapsed + wait > RETRY_SECONDS or self._is_away or _is_stopping.is_set():
                    self._is_away = True
                    count = f"{tries} {'try' if tries == 1 else 'tries'}"
                    raise StorageError(
                        f"{self.url_of(name)} could not be {done}: {_describe(error)}, in {count} within "
                        f"{elapsed:.0f} s. What was written before is intact; a run goes on with --resume."
                    ) from error
            _is_stopping.wait(random.uniform(0, wait))
            wait = min(2 * wait, MAX_WAIT_SECONDS)


def _run_parallel(work: Callable[[str], None], names: Iterable[str]) -> None:
    names = list(names)
    if len(names) < 2:
        for name in names:
            work(name)
        return
    with ThreadPoolExecutor(PARALLEL_TRANSFERS, thread_name_prefix="objects") as pool:
        try:
            for done in [pool.submit(work, name) for name in names]:
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those that are not begun; the others are waited for
            raise


# ---- what a server answered


def _is_answer(error: Exception) -> bool:
    """Whether an error is what a server or its library said, and not of this program or of this machine's disk."""
    if isinstance(error, OSError):
        return error.errno not in LOCAL_ERRORS
    return any(kind.__module__.partition(".")[0] in LIBRARIES for kind in type(error).__mro__)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: the server is busy, fails, or cannot be reached."""
    for one in _chain(error):
        status, code = _status_of(one), _code_of(one)
        if code in THROTTLING_CODES or status in (408, 425, 429) or 500 <= status < 600:
            return True
        if status >= 300 or isinstance(one, FINAL_ERRORS):
            return False
        if isinstance(one, ConnectionError | TimeoutError):
            return True
        if isinstance(one, OSError) and one.errno in (errno.EBUSY, errno.EIO, getattr(errno, "EREMOTEIO", errno.EIO)):
            return True
        library, kinds = type(one).__module__.partition(".")[0], {kind.__name__ for kind in type(one).__mro__}
        if library == "botocore" and kinds & {"HTTPClientError", "ConnectionError", "ResponseParserError"}:
            return True
        if library == "aiohttp" and "ClientError" in kinds:
            return True
    return False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from: libraries wrap what the server answered."""
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int:
    """The HTTP status that an error, or one that it was raised from, tells; 0 for none."""
    return next((status for one in _chain(error) if (status := _status_of(one))), 0)


def _status_of(error: BaseException) -> int:
    """The HTTP status that an error of botocore, gcsfs or aiohttp tells; 0 for none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
    for name in ("status", "code"):  # `code` of aiohttp is deprecated
        value = getattr(error, name, None)
        if isinstance(value, int | str) and str(value).isdigit() and 100 <= int(value) < 600:
            return int(value)
    return 0


def _code_of(error: BaseException) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _describe(error: BaseException) -> str:
    """The server's answer, or why there was none, in a few words."""
    chain = list(_chain(error))
    code = next((code for one in chain if (code := _code_of(one))), "")
    status = status_of(error)
    text = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    answer = " ".join(part for part in (str(status) if status else "", code if code != str(status) else "") if part)
    return f"the server answered {answer} ({text})" if answer else f"{type(error).__name__} ({text})"


@functools.cache
def open_store(url: str) -> ObjectStore:
    """The objects below a URL, the same for the same URL."""
    return ObjectStore(url)
